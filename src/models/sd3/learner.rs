//! Stable Diffusion 3 and 3.5 as a [`Learner`].

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use candle_core::{Tensor, Var};
use image::RgbImage;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::{Conditioning, Sd3, transformer_files};
use crate::models::{Example, Learner, Lesson, Opening, Request, Sampling, Tuning, adapters};
use crate::nn::{Adapter, Weights, mean_over_parts, merged, recomputing};
use crate::{Error, Result, images};

/// Examples of a small model that are differentiated at once: its batches are small, and two keep a processor busy.
const AT_ONCE: usize = 2;

/// The denoiser with what it needs to learn and to draw.
pub struct Sd3Learner {
    model: Sd3,
    known: HashMap<String, Conditioning>,
    weights: Weights,
    adapter: Option<Arc<Adapter>>,
    config_text: String,
    condition_dropout: f64,
    recomputes: bool,
    at_once: usize,
    side: usize,
}

impl Sd3Learner {
    /// Opens the checkpoint in `opening.dir`, in diffusers' layout.
    pub fn open(opening: &Opening) -> Result<Self> {
        let files = transformer_files(&opening.dir)?;
        let weights = match opening.tuning {
            Tuning::Full => Weights::trainable(&files, opening.seed, &opening.device)?,
            Tuning::Lora(_) | Tuning::Frozen => {
                Weights::from_files(&files, opening.dtype, &opening.device)?
            }
        };
        let (weights, adapter) = opening.attach(weights);
        let model = Sd3::open(&opening.dir, &weights)?;
        let side = opening
            .resolution
            .map_or(model.resolution(), |side| side as usize);
        let config = opening.dir.join("transformer/config.json");
        let config_text = std::fs::read_to_string(&config).map_err(Error::io(&config))?;
        Ok(Self {
            model,
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
                let conditioning = self.model.encode_prompts(&[prompt.to_string()])?;
                self.known.insert(prompt.to_string(), conditioning);
            }
        }
        let rows: Vec<&Conditioning> = prompts.iter().map(|&prompt| &self.known[prompt]).collect();
        Conditioning::cat(&rows)
    }
}

impl Learner for Sd3Learner {
    fn resolution(&self) -> u32 {
        self.side as u32
    }

    fn encode(&mut self, images: &[RgbImage]) -> Result<Vec<Example>> {
        images::check_side(images, self.side as u32, "SD3")?;
        let pixels = images::to_tensor(images, self.model.device())?;
        let (mean, logvar) = self.model.encode_images(&pixels)?;
        (0..images.len())
            .map(|i| {
                Ok(Example::Latents {
                    mean: mean.get(i)?.copy()?,
                    logvar: logvar.get(i)?.copy()?,
                })
            })
            .collect()
    }

    fn loss(&mut self, batch: &[Lesson], generator: &mut ChaCha8Rng) -> Result<Tensor> {
        let (mut means, mut logvars) = (Vec::new(), Vec::new());
        for lesson in batch {
            match &lesson.example {
                Example::Latents { mean, logvar } => {
                    means.push(mean);
                    logvars.push(logvar);
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
            .map(|lesson| {
                let dropped = generator.random::<f64>() < self.condition_dropout;
                if dropped { "" } else { lesson.prompt.as_str() }
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
                let (conditioning, draw) = (conditioning.rows(part.clone())?, draw.rows(part)?);
                recomputing(recomputes, || model.loss_at(&latents, &conditioning, &draw))
            },
        )
    }

    fn generate(&mut self, requests: &[Request], sampling: &Sampling) -> Result<Vec<RgbImage>> {
        let prompts: Vec<&str> = requests
            .iter()
            .map(|request| request.prompt.as_str())
            .collect();
        let conditioning = self.condition(&prompts)?;
        let negative = self.condition(&[sampling.negative_prompt.as_str()])?;
        let seeds: Vec<u64> = requests.iter().map(|request| request.seed).collect();
        let noise = self.model.noise(&seeds, self.side, self.side)?;
        images::from_tensor(&merged(|| {
            self.model.generate_from(
                &noise,
                &conditioning,
                &negative,
                sampling.num_inference_steps,
                sampling.guidance_scale,
            )
        })?)
    }

    fn variables(&self) -> Vec<(String, Var)> {
        match &self.adapter {
            Some(adapter) => adapter.variables(),
            // The table of positions is a buffer: nothing is learnt there.
            None => {
                let trained = |(name, _): &(String, Var)| name != "pos_embed.pos_embed";
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
                adapters::write_diffusers(dir, values, adapter.config(), "transformer").map(|_| ())
            }
            None => adapters::write_whole(dir, &self.weights, values, &self.config_text),
        }
    }

    fn read(&self, dir: &Path) -> Result<BTreeMap<String, Tensor>> {
        adapters::read_trained(dir, self.adapter.as_deref())
    }
}
