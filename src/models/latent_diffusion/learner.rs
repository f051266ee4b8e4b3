//! A latent diffusion model as a [`Learner`].

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{Tensor, Var};
use image::RgbImage;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::{Conditioning, Denoiser, Framing, LatentDiffusion, network_files};
use crate::config::Training;
use crate::diffusion::Guidance;
use crate::models::checkpoint_files::Layout;
use crate::models::{
    Example, Learner, LearnerOptions, Request, Sampling, TrainingExample, Tuning, adapters,
};
use crate::nn::{Adapter, Weights, mean_over_parts, merged, recomputing};
use crate::{Error, Result, images};

/// Examples of a small model that are differentiated at once: its batches are small, and two keep a processor busy.
const AT_ONCE: usize = 2;

/// What the encoders say of so many prompts is kept at most: 8 MB each of FLUX's in f32.
const MOST_FORESEEN: usize = 256;

/// The denoiser with what it needs to learn and to draw.
pub struct DiffusionLearner<D> {
    model: LatentDiffusion<D>,
    dir: PathBuf,
    known: HashMap<String, Conditioning>,
    weights: Weights,
    adapter: Option<Arc<Adapter>>,
    config_text: String,
    condition_dropout: f64,
    recomputes: bool,
    at_once: usize,
    side: usize,
}

impl<D: Denoiser> DiffusionLearner<D> {
    /// Opens the checkpoint in `opening.dir`, in diffusers' layout or in single files.
    pub fn open(opening: &LearnerOptions) -> Result<Self> {
        let files = network_files::<D>(&opening.dir)?;
        let weights = match opening.tuning {
            Tuning::Full => files.open_trainable(opening.seed, &opening.device)?,
            Tuning::Lora(_) | Tuning::Given(_) | Tuning::Frozen => {
                files.open(opening.dtype, &opening.device)?
            }
        };
        let (weights, adapter) = opening.attach(weights);
        let model = LatentDiffusion::<D>::open(&opening.dir, &weights)?;
        let side = opening
            .resolution
            .map_or(model.resolution(), |side| side as usize);
        let config_text = Layout::open(&opening.dir)?.config_text(D::COMPONENT)?;
        Ok(Self {
            model,
            dir: opening.dir.clone(),
            known: HashMap::new(),
            recomputes: opening.recomputes(&weights),
            at_once: opening.at_once(&weights, AT_ONCE),
            weights,
            adapter,
            config_text,
            condition_dropout: opening.condition_dropout,
            side,
        })
    }

    fn condition(&mut self, prompts: &[&str]) -> Result<Conditioning> {
        for &prompt in prompts {
            if !self.known.contains_key(prompt) {
                self.model.open_text(&self.dir, &self.weights)?;
                let conditioning = self.model.condition(prompt)?;
                self.known.insert(prompt.to_string(), conditioning);
            }
        }
        let rows: Vec<&Conditioning> = prompts.iter().map(|&prompt| &self.known[prompt]).collect();
        Conditioning::cat(&rows)
    }
}

impl<D: Denoiser> Learner for DiffusionLearner<D> {
    fn resolution(&self) -> u32 {
        self.side as u32
    }

    fn set_training(&mut self, training: &Training) {
        self.model.denoiser.set_training(training);
    }

    fn encode(&mut self, images: &[RgbImage]) -> Result<Vec<Example>> {
        images::check_side(images, self.side as u32, D::NAME)?;
        let pixels = images::to_tensor(images, self.model.device())?;
        let (mean, logvar) = self.model.encode_images(&pixels)?;
        (0..images.len())
            .map(|i| {
                Ok(Example::Latents {
                    mean: mean.get(i)?.copy()?,
                    logvar: logvar.get(i)?.copy()?,
                    framing: Framing::whole(self.side, self.side),
                })
            })
            .collect()
    }

    fn loss(&mut self, batch: &[TrainingExample], generator: &mut ChaCha8Rng) -> Result<Tensor> {
        let (mut means, mut logvars, mut framings) = (Vec::new(), Vec::new(), Vec::new());
        for pair in batch {
            match &pair.example {
                Example::Latents {
                    mean,
                    logvar,
                    framing,
                } => {
                    means.push(mean);
                    logvars.push(logvar);
                    framings.push(*framing);
                }
                Example::Tokens(_) => {
                    return Err(Error::Invalid {
                        what: "a diffusion model was given tokens to learn".into(),
                        hint: None,
                    });
                }
            }
        }
        let (mean, logvar) = (Tensor::stack(&means, 0)?, Tensor::stack(&logvars, 0)?);
        let latents = self.model.sample_latents(&mean, &logvar, generator)?;
        let prompts: Vec<&str> = batch
            .iter()
            .map(|pair| {
                let dropped = generator.random::<f64>() < self.condition_dropout;
                if dropped { "" } else { pair.prompt.as_str() }
            })
            .collect();
        let conditioning = self.condition(&prompts)?;
        let draw = self.model.draw(&latents, generator)?;
        let variables = self.variables();
        let (model, recomputes) = (&self.model, self.recomputes);
        mean_over_parts(
            &vec![1; batch.len()],
            self.at_once,
            &variables,
            generator,
            |part, _| {
                let latents = latents.narrow(0, part.start, part.len())?;
                let conditioning = conditioning.rows(part.clone())?;
                let framings = &framings[part.clone()];
                let draw = draw.rows(part)?;
                recomputing(recomputes, || {
                    model.loss_at(&latents, &conditioning, framings, &draw)
                })
            },
        )
    }

    fn foresee(&mut self, prompts: &[String]) -> Result<()> {
        let distinct: BTreeSet<&str> = prompts.iter().map(String::as_str).collect();
        if distinct.len() > MOST_FORESEEN {
            return Ok(());
        }
        for prompt in distinct {
            self.condition(&[prompt])?;
        }
        *self.model.denoiser.text() = None;
        Ok(())
    }

    fn generate(&mut self, requests: &[Request], sampling: &Sampling) -> Result<Vec<RgbImage>> {
        let sampling = sampling.diffusion()?;
        let prompts: Vec<&str> = requests
            .iter()
            .map(|request| request.prompt.as_str())
            .collect();
        let conditioning = self.condition(&prompts)?;
        let negative = self.condition(&[sampling.negative_prompt.as_str()])?;
        let seeds: Vec<u64> = requests.iter().map(|request| request.seed).collect();
        let noise = self.model.noise(&seeds, self.side, self.side)?;
        let guidance = Guidance {
            scale: sampling.guidance_scale,
            start: sampling.guidance_start.unwrap_or(0.0),
            stop: sampling.guidance_stop.unwrap_or(1.0),
        };
        images::from_tensor(&merged(|| {
            self.model.generate_from(
                &noise,
                &conditioning,
                &negative,
                sampling.num_inference_steps,
                guidance,
            )
        })?)
    }

    fn variables(&self) -> Vec<(String, Var)> {
        match &self.adapter {
            Some(adapter) => adapter.variables(),
            None => {
                let trained = |(name, _): &(String, Var)| !D::BUFFERS.contains(&name.as_str());
                self.weights
                    .variables()
                    .into_iter()
                    .filter(trained)
                    .collect()
            }
        }
    }

    fn save(&self, dir: &Path, values: &BTreeMap<String, Tensor>) -> Result<()> {
        match &self.adapter {
            Some(adapter) => {
                adapters::write_diffusers(dir, values, adapter.config(), D::COMPONENT).map(|_| ())
            }
            None => adapters::write_whole(dir, &self.weights, values, &self.config_text),
        }
    }

    fn read(&self, dir: &Path) -> Result<BTreeMap<String, Tensor>> {
        adapters::read_trained(dir, self.adapter.as_deref(), &self.weights)
    }
}
