//! Architectures, one file or folder each, and what the rest of the house sees of them: a [`Learner`].

pub mod adapters;
pub mod autoencoder;
pub mod chameleon;
pub mod checkpoint_files;
pub mod clip;
mod clip_tokenizer;
pub mod encoder;
pub mod flux;
pub mod latent_diffusion;
pub mod limits;
pub mod llamagen;
pub mod lora_file;
mod lora_fit;
pub mod merge;
pub mod pickle;
pub mod reading;
pub mod sampling_file;
pub mod sd3;
pub mod sdxl;
pub mod t5;
pub mod tensor_writer;
mod timestep;
pub mod tokenizer;
pub mod vit;
pub mod vqgan;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{Device, Tensor, Var};
use image::RgbImage;
use rand_chacha::ChaCha8Rng;

use self::checkpoint_files::WeightFiles;
use self::latent_diffusion::Framing;
use crate::config::{self, Dtype, Family, Memory};
use crate::nn::map_safetensors;
use crate::nn::{Adapter, LoraConfig, Weights};
use crate::{Error, Result};

/// What a backbone learns from one image, in its own terms.
#[derive(Debug, Clone)]
pub enum Example {
    /// VQ tokens, row by row.
    Tokens(Vec<u32>),
    /// The latent distribution of a VAE: mean and log-variance, each (c, h, w), and what part of a picture it is of.
    Latents {
        mean: Tensor,
        logvar: Tensor,
        framing: Framing,
    },
}

impl Example {
    /// The same, of a picture that was resized from `original`, its height and width: what a diffusion model may be
    /// told. Tokens are what they are.
    pub fn of_original(mut self, original: [usize; 2]) -> Self {
        if let Self::Latents { framing, .. } = &mut self {
            framing.original = original;
        }
        self
    }
}

/// An example with its prompt: what one training step learns several of.
#[derive(Debug, Clone)]
pub struct TrainingExample {
    pub example: Example,
    pub prompt: String,
}

/// One image to draw. Equal requests in equal batches give equal images.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    pub prompt: String,
    pub seed: u64,
}

/// How images are drawn; a family reads the fields that it knows.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Classifier-free guidance; 1 is off.
    pub guidance_scale: f64,
    /// Denoising steps of a diffusion model.
    pub num_inference_steps: usize,
    /// What a diffusion model is guided away from.
    pub negative_prompt: String,
    /// An AR model samples among this many likeliest tokens; 0 is all.
    pub top_k: usize,
    /// An AR model samples among the likeliest tokens of this total probability, in (0, 1].
    pub top_p: f64,
    /// Logits are divided by this; 0 takes the likeliest token.
    pub temperature: f64,
    /// LlamaGen's guidance ends after this many tokens beyond the first.
    pub guidance_interval: Option<usize>,
}

impl Sampling {
    /// As a diffusion model draws.
    pub fn diffusion(settings: &config::DiffusionSampling) -> Self {
        Self {
            guidance_scale: settings.guidance_scale,
            num_inference_steps: settings.num_inference_steps,
            negative_prompt: settings.negative_prompt.clone(),
            top_k: 0,
            top_p: 1.0,
            temperature: 1.0,
            guidance_interval: None,
        }
    }

    /// As a student of either kind draws.
    pub fn student(settings: &config::Sampling) -> Self {
        match settings {
            config::Sampling::Diffusion(settings) => Self::diffusion(settings),
            config::Sampling::Autoregressive(settings) => Self {
                guidance_scale: settings.guidance_scale,
                num_inference_steps: 0,
                negative_prompt: String::new(),
                top_k: settings.top_k,
                top_p: settings.top_p,
                temperature: settings.temperature,
                guidance_interval: settings.guidance_interval,
            },
        }
    }
}

/// A backbone that can learn and draw: diffusion and AR models alike.
pub trait Learner: Send {
    /// Side length in pixels of the square images that it draws and learns from.
    fn resolution(&self) -> u32;

    /// How many tokens it draws for one image, one after another; nothing for models that draw all at once.
    fn tokens_per_image(&self) -> Option<usize> {
        None
    }

    /// Turns images of that size into examples.
    fn encode(&mut self, images: &[RgbImage]) -> Result<Vec<Example>>;

    /// The mean loss of a batch, a scalar with its graph, whose gradients are [`crate::nn::backward`]'s to compute. All
    /// randomness (noise, timesteps, dropout) comes from `generator`.
    fn loss(&mut self, batch: &[TrainingExample], generator: &mut ChaCha8Rng) -> Result<Tensor>;

    /// Draws one image for each request, without a graph.
    fn generate(&mut self, requests: &[Request], sampling: &Sampling) -> Result<Vec<RgbImage>>;

    /// What is trained: the adapter's factors, or all weights. Empty for a frozen model.
    fn variables(&self) -> Vec<(String, Var)>;

    /// Writes what was learnt into the folder `dir`, as it is published for this family: an adapter, or a whole
    /// checkpoint where all weights are trained. `values` stand in for the variables (see [`snapshot`]).
    fn save(&self, dir: &Path, values: &BTreeMap<String, Tensor>) -> Result<()>;

    /// The values that a folder written by [`Learner::save`] holds, by the names of the variables.
    fn read(&self, dir: &Path) -> Result<BTreeMap<String, Tensor>>;
}

/// Detached copies of the variables' values, on the CPU.
pub fn snapshot(variables: &[(String, Var)]) -> Result<BTreeMap<String, Tensor>> {
    variables
        .iter()
        .map(|(name, v)| {
            Ok((
                name.clone(),
                v.as_tensor()
                    .detach()
                    .to_device(&candle_core::Device::Cpu)?
                    .copy()?,
            ))
        })
        .collect()
}

/// What of a model is trained.
#[derive(Debug, Clone, PartialEq)]
pub enum Tuning {
    /// A LoRA adapter.
    Lora(LoraConfig),
    /// All weights of the backbone.
    Full,
    /// Nothing.
    Frozen,
}

/// How a learner is opened.
#[derive(Debug, Clone)]
pub struct Opening {
    /// The checkpoint's folder.
    pub dir: PathBuf,
    /// What adapters name as their base: the model as the pipeline file names it.
    pub name: String,
    pub family: Family,
    /// Side length of the images in pixels; the checkpoint's own where `None`.
    pub resolution: Option<u32>,
    pub tuning: Tuning,
    /// Draws what starts at random.
    pub seed: u64,
    pub device: Device,
    /// How frozen weights are kept.
    pub dtype: Dtype,
    /// What is kept for backward passes.
    pub memory: Memory,
    /// Dropout inside the backbone while it learns, in [0, 1).
    pub dropout: f64,
    /// Share of examples that are learnt without their caption, in [0, 1].
    pub condition_dropout: f64,
}

/// Weights of a large model: LlamaGen-B has 100 million, nano models two.
const LARGE: usize = 100_000_000;

impl Opening {
    /// Whether the backbone that was built from `weights` runs its blocks again in backward passes.
    fn recomputes(&self, weights: &Weights) -> bool {
        // From here on activations are worth a third more time.
        match self.memory {
            Memory::Fit => true,
            Memory::Fast => false,
            Memory::Auto => weights.elements() >= LARGE,
        }
    }

    /// How many examples of a batch are differentiated at once: `few` of a small model. The operations of a large one, or
    /// of a card, are worth cutting up themselves, and all examples share what is read of the weights.
    fn at_once(&self, weights: &Weights, few: usize) -> usize {
        match self.device.is_cpu() && weights.elements() < LARGE {
            true => few,
            false => usize::MAX,
        }
    }

    /// `weights` with the adapter that `tuning` asks for.
    fn attach(&self, weights: Weights) -> (Weights, Option<Arc<Adapter>>) {
        match &self.tuning {
            Tuning::Lora(config) => {
                let adapter = Arc::new(Adapter::new(config.clone(), self.seed));
                (weights.with_adapter(adapter.clone()), Some(adapter))
            }
            Tuning::Full | Tuning::Frozen => (weights, None),
        }
    }
}

/// Says why models of this `family` cannot learn or draw here, if they cannot: what [`open`] would say.
///
/// # Errors
/// Then.
pub fn check_family(family: Family) -> Result<()> {
    match family {
        Family::LlamaGen | Family::Lumina | Family::Sd3 | Family::Sdxl | Family::Flux => Ok(()),
        Family::Clip | Family::Dino => Err(Error::invalid(
            format!("{family} cannot be trained here"),
            "models that can: SDXL, SD3, SD3.5 and FLUX.1 (diffusion), LlamaGen and Lumina-mGPT (autoregressive)",
        )),
    }
}

/// Side in pixels of the square images that the checkpoint of this `family` in `dir` draws and learns from: what is
/// `asked` for, or its own.
///
/// # Errors
/// When it cannot have that side, or a part that tells is missing.
pub fn resolution(family: Family, dir: &Path, asked: Option<u32>) -> Result<u32> {
    let own = match family {
        Family::LlamaGen => llamagen::resolution(dir, asked)?,
        Family::Lumina => {
            let (_, format, _) = chameleon::format(dir, asked)?;
            format.side() as u32
        }
        Family::Sd3 => sd3::resolution(dir, asked.map(|side| side as usize))? as u32,
        Family::Sdxl => sdxl::resolution(dir, asked.map(|side| side as usize))? as u32,
        Family::Flux => flux::resolution(dir, asked.map(|side| side as usize))? as u32,
        Family::Clip | Family::Dino => {
            return asked.ok_or_else(|| Error::Invalid {
                what: format!("the resolution of a {family} model"),
                hint: None,
            });
        }
    };
    match asked {
        Some(asked) if asked != own => Err(Error::invalid(
            format!("the model draws images of {own} pixels, not of {asked}"),
            "leave resolution out, or name the checkpoint for another size",
        )),
        _ => Ok(own),
    }
}

/// The paths of the linear layers of the backbone of the checkpoint in `dir`, as its file names them; `None` where only
/// opening it would tell.
///
/// # Errors
/// When its weights are missing or damaged.
pub fn linear_layers(
    family: Family,
    dir: &Path,
    resolution: Option<u32>,
) -> Result<Option<Vec<String>>> {
    let files = match family {
        Family::LlamaGen => llamagen::Files::find(dir, resolution)?.backbone()?,
        Family::Lumina => WeightFiles::find(dir, "model")?,
        Family::Sd3 | Family::Sdxl | Family::Flux => {
            let part = if family == Family::Sdxl {
                "unet"
            } else {
                "transformer"
            };
            WeightFiles::find(&dir.join(part), "diffusion_pytorch_model")?
        }
        Family::Clip | Family::Dino => return Ok(None),
    };
    let WeightFiles::Safetensors(files) = files else {
        return Ok(None);
    };
    let mut layers = Vec::new();
    for (name, view) in map_safetensors(&files)?.tensors() {
        let layer = name.strip_suffix(".weight");
        let is_table = |layer: &&str| {
            ["tok_embeddings", "embed_tokens"]
                .iter()
                .any(|table| layer.ends_with(table))
        };
        layers.extend(
            layer
                .filter(|layer| view.shape().len() == 2 && !is_table(layer))
                .map(String::from),
        );
    }
    Ok(Some(layers))
}

/// Opens the learner of the opening's family.
pub fn open(opening: &Opening) -> Result<Box<dyn Learner>> {
    match opening.family {
        Family::LlamaGen => Ok(Box::new(llamagen::LlamaGen::open(opening)?)),
        Family::Lumina => Ok(Box::new(chameleon::Lumina::open(opening)?)),
        Family::Sd3 => Ok(Box::new(sd3::Sd3Learner::open(opening)?)),
        Family::Sdxl => Ok(Box::new(sdxl::SdxlLearner::open(opening)?)),
        Family::Flux => Ok(Box::new(flux::FluxLearner::open(opening)?)),
        family @ (Family::Clip | Family::Dino) => {
            check_family(family)?;
            Err(Error::Invalid {
                what: format!("{family} is not opened"),
                hint: None,
            })
        }
    }
}

/// What the tokenizing stage runs on a thread of its own.
pub trait ImageTokenizer: Send {
    /// The tokens of each image, row by row.
    fn encode(&self, images: &[RgbImage]) -> Result<Vec<Vec<u32>>>;
}

/// Opens the image tokenizer of a checkpoint of an autoregressive `family`.
pub fn open_image_tokenizer(
    family: Family,
    dir: &Path,
    resolution: Option<u32>,
    device: &Device,
) -> Result<Box<dyn ImageTokenizer>> {
    match family {
        Family::LlamaGen => Ok(Box::new(llamagen::VqTokenizer::open(
            dir, resolution, device,
        )?)),
        Family::Lumina => Ok(Box::new(chameleon::VqTokenizer::open(
            dir, resolution, device,
        )?)),
        Family::Sdxl | Family::Sd3 | Family::Flux | Family::Clip | Family::Dino => {
            Err(Error::Invalid {
                what: format!("{family} has no image tokenizer"),
                hint: None,
            })
        }
    }
}

/// The folder of the image tokenizer of the checkpoint in `dir`, and its tokens for an image of `resolution` pixels a
/// side (the checkpoint's own where `None`); nothing for a family that reads pixels.
pub fn image_tokenizer_files(
    family: Family,
    dir: &Path,
    resolution: Option<u32>,
) -> Result<Option<(PathBuf, usize)>> {
    match family {
        Family::LlamaGen => llamagen::tokenizer_files(dir, resolution).map(Some),
        Family::Lumina => chameleon::tokenizer_files(dir, resolution).map(Some),
        Family::Sdxl | Family::Sd3 | Family::Flux | Family::Clip | Family::Dino => Ok(None),
    }
}

/// Reports the faults of several components of the checkpoint in `directory` at once.
fn finish_all<'a>(
    directory: &Path,
    components: impl IntoIterator<Item = &'a Weights>,
) -> Result<()> {
    let mut faults = Vec::new();
    for component in components {
        match component.finish() {
            Err(Error::Checkpoint { path, faults: own }) => {
                // The directory is named once, in front of all.
                let file = path.strip_prefix(directory).unwrap_or(&path).display();
                faults.extend(own.iter().map(|fault| format!("{file}: {fault}")));
            }
            other => other?,
        }
    }
    if faults.is_empty() {
        return Ok(());
    }
    Err(Error::Checkpoint {
        path: directory.to_path_buf(),
        faults,
    })
}
