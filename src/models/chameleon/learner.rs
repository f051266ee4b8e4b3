//! Lumina-mGPT as a [`Learner`]: Chameleon's transformer, its image tokenizer and its text tokenizer, from one checkpoint
//! folder.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use image::RgbImage;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::backbone::{Backbone, Dropout};
use super::config::Config;
use super::files;
use super::grammar::{Format, Vocabulary};
use super::loss::Sequence;
use super::vq::VqGan;
use crate::files::{SETTINGS, read_text};
use crate::models::checkpoint_files::WeightFiles;
use crate::models::limits::read_config;
use crate::models::tokenizer::TextTokenizer;
use crate::models::{
    Example, ImageTokenizer, Learner, LearnerOptions, Request, Sampling, TrainingExample, Tuning,
    adapters,
};
use crate::nn::{Adapter, Weights, mean_over_parts, merged, no_grad, recomputing};
use crate::{Error, Result, images};

/// Side in pixels of the square images of a checkpoint with this `config`: what is `asked` for, or its own.
///
/// # Errors
/// When the side is no multiple of [`Config::patch_size`].
pub fn resolution(config: &Config, asked: Option<u32>) -> Result<usize> {
    let side = asked.map_or(config.image_size, |side| side as usize);
    if side > 0 && side.is_multiple_of(config.patch_size.max(1)) {
        return Ok(side);
    }
    Err(Error::invalid(
        format!("a resolution of {side} pixels"),
        format!("choose a multiple of {} pixels", config.patch_size),
    ))
}

/// The image tokenizer alone, for square images of one size.
pub struct VqTokenizer {
    model: VqGan,
    resolution: u32,
    /// Kept for others that are opened from the same files.
    _weights: Weights,
}

impl VqTokenizer {
    /// Opens the tokenizer of the checkpoint in `dir`, see [`files::open_image_tokenizer`], for images of the side that
    /// is `asked` for, or the checkpoint's own.
    pub fn open(dir: &Path, asked: Option<u32>, device: &Device) -> Result<Self> {
        let config: Config = read_config(&dir.join("config.json"))?;
        let open = |files: WeightFiles| files.open(DType::F32, device);
        let (model, weights) = files::build_image_tokenizer(dir, open)?;
        weights.finish()?;
        Ok(Self {
            model,
            resolution: resolution(&config, asked)? as u32,
            _weights: weights,
        })
    }

    /// The images of codes (b, n).
    pub fn decode(&self, codes: &[Vec<u32>]) -> Result<Vec<RgbImage>> {
        let count = codes.first().map_or(0, Vec::len);
        let shape = (codes.len(), count);
        let codes = Tensor::from_vec(codes.concat(), shape, self.model.device())?;
        images::from_tensor(&no_grad(|| self.model.decode(&codes))?)
    }
}

impl ImageTokenizer for VqTokenizer {
    fn encode(&self, images: &[RgbImage]) -> Result<Vec<Vec<u32>>> {
        images::check_side(images, self.resolution, "Chameleon's image tokenizer")?;
        let pixels = images::to_tensor(images, self.model.device())?;
        Ok(no_grad(|| self.model.encode(&pixels))?.to_vec2::<u32>()?)
    }
}

/// Where the image tokenizer of the checkpoint in `dir` lies, and how many codes an image of the side that is `asked`
/// for has.
pub fn tokenizer_files(dir: &Path, asked: Option<u32>) -> Result<(PathBuf, usize)> {
    let config: Config = read_config(&dir.join("config.json"))?;
    let side = resolution(&config, asked)? / files::tokenizer_config(dir)?.downsampling();
    Ok((files::tokenizer_dir(dir), side * side))
}

/// The text tokenizer of the checkpoint in `dir`, the format of its images of the side that is `asked` for, and its
/// positions.
///
/// # Errors
/// When a part is missing, or the checkpoint cannot draw such images.
pub fn format(dir: &Path, asked: Option<u32>) -> Result<(TextTokenizer, Format, usize)> {
    let config: Config = read_config(&dir.join("config.json"))?;
    let sizes = files::tokenizer_config(dir)?;
    let text = files::text_tokenizer(dir)?;
    let side = resolution(&config, asked)?;
    let format = format_of(&text, &config, &sizes, side).map_err(|error| {
        // Nothing told the sizes: they are those of the published model.
        let given = config.vq_config.as_object().is_some_and(|o| !o.is_empty());
        let told = files::tokenizer_dir(dir) != dir || given;
        if told { error } else { files::absent(dir) }
    })?;
    Ok((text, format, config.max_position_embeddings))
}

fn format_of(
    text: &TextTokenizer,
    config: &Config,
    sizes: &super::vq::Config,
    side: usize,
) -> Result<Format> {
    Format::new(
        Vocabulary::of(text, config, sizes.n_embed)?,
        (side, side),
        config.patch_size,
        sizes.downsampling(),
    )
}

/// Examples of a small model that are differentiated at once, as LlamaGen's.
const AT_ONCE: usize = 5;

/// Lumina-mGPT, ready to learn and to draw.
pub struct Lumina {
    backbone: Backbone,
    format: Format,
    text: TextTokenizer,
    tokenizer: VqTokenizer,
    weights: Weights,
    adapter: Option<Arc<Adapter>>,
    config_text: String,
    base: String,
    dropout: f64,
    condition_dropout: f64,
    recomputes: bool,
    at_once: usize,
}

impl Lumina {
    /// Opens the checkpoint in `opening.dir`; see [`files`] for its parts.
    pub fn open(opening: &LearnerOptions) -> Result<Self> {
        let (dir, device) = (&opening.dir, &opening.device);
        let config_path = dir.join("config.json");
        let config: Config = read_config(&config_path)?;
        let config_text = read_text(&config_path, SETTINGS)?;
        let found = WeightFiles::find(dir, "model")?;
        let weights = match opening.tuning {
            Tuning::Full => Weights::trainable(&found.into_safetensors()?, opening.seed, device)?,
            Tuning::Lora(_) | Tuning::Given(_) | Tuning::Frozen => {
                found.open(opening.dtype, device)?
            }
        };
        let (weights, adapter) = opening.attach(weights);
        let backbone = Backbone::new(&config, &weights)?;
        weights.finish()?;
        let tokenizer = VqTokenizer::open(dir, opening.resolution, device)?;
        let text = files::text_tokenizer(dir)?;
        let side = tokenizer.resolution as usize;
        let format = format_of(&text, &config, tokenizer.model.config(), side)?;
        Ok(Self {
            backbone,
            format,
            text,
            tokenizer,
            recomputes: opening.recomputes(&weights),
            at_once: opening.at_once(&weights, AT_ONCE),
            weights,
            adapter,
            config_text,
            base: opening.name.clone(),
            dropout: opening.dropout,
            condition_dropout: opening.condition_dropout,
        })
    }

    /// The sequence of one pair. Without its caption it is the answer alone, as guidance asks for it.
    fn sequence(&self, pair: &TrainingExample, captioned: bool) -> Result<Sequence> {
        let Example::Tokens(codes) = &pair.example else {
            return Err(Error::Invalid {
                what: "an autoregressive model was given latents to learn".into(),
                hint: None,
            });
        };
        let answer = self.format.answer(codes)?;
        if !captioned {
            return Ok(Sequence {
                tokens: answer,
                labelled: 1,
            });
        }
        let prompt = self.format.prompt(&self.text, &pair.prompt)?;
        Ok(Sequence {
            labelled: prompt.len(),
            tokens: [prompt, answer].concat(),
        })
    }
}

impl Learner for Lumina {
    fn resolution(&self) -> u32 {
        self.tokenizer.resolution
    }

    fn tokens_per_image(&self) -> Option<usize> {
        Some((self.resolution() as usize / self.tokenizer.model.config().downsampling()).pow(2))
    }

    fn encode(&mut self, images: &[RgbImage]) -> Result<Vec<Example>> {
        let codes = self.tokenizer.encode(images)?;
        Ok(codes.into_iter().map(Example::Tokens).collect())
    }

    fn loss(&mut self, batch: &[TrainingExample], generator: &mut ChaCha8Rng) -> Result<Tensor> {
        let sequences = batch
            .iter()
            .map(|pair| {
                let captioned = generator.random::<f64>() >= self.condition_dropout;
                self.sequence(pair, captioned)
            })
            .collect::<Result<Vec<_>>>()?;
        let labelled: Vec<usize> = sequences
            .iter()
            .map(|sequence| sequence.tokens.len().saturating_sub(sequence.labelled))
            .collect();
        let variables = self.variables();
        let (backbone, p, recomputes) = (&self.backbone, self.dropout, self.recomputes);
        mean_over_parts(
            &labelled,
            self.at_once,
            &variables,
            generator,
            |part, generator| {
                let dropout = Some(Dropout { p, generator });
                recomputing(recomputes, || backbone.loss(&sequences[part], dropout))
            },
        )
    }

    fn generate(&mut self, requests: &[Request], sampling: &Sampling) -> Result<Vec<RgbImage>> {
        let prompts = requests
            .iter()
            .map(|request| self.format.prompt(&self.text, &request.prompt))
            .collect::<Result<Vec<_>>>()?;
        let seeds: Vec<u64> = requests.iter().map(|request| request.seed).collect();
        let settings = sampling.autoregressive()?;
        let count = self.format.count();
        let codes = merged(|| {
            self.backbone
                .draw(&prompts, &self.format, count, settings, &seeds)
        })?;
        self.tokenizer.decode(&codes)
    }

    fn variables(&self) -> Vec<(String, Var)> {
        match &self.adapter {
            Some(adapter) => adapter.variables(),
            None => self.weights.variables(),
        }
    }

    fn save(&self, dir: &Path, values: &BTreeMap<String, Tensor>) -> Result<()> {
        match &self.adapter {
            Some(adapter) => adapters::write_peft(dir, values, adapter.config(), &self.base),
            None => adapters::write_whole(dir, &self.weights, values, &self.config_text),
        }
    }

    fn read(&self, dir: &Path) -> Result<BTreeMap<String, Tensor>> {
        adapters::read_trained(dir, self.adapter.as_deref(), &self.weights)
    }
}
