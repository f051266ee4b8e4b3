//! Architectures, one file or folder each, and what the rest of the house sees of them: a [`Learner`].

pub mod adapters;
pub mod autoencoder;
pub mod chameleon;
pub mod checkpoint_files;
pub mod clip;
mod clip_tokenizer;
pub mod encoder;
pub mod family;
pub mod flux;
pub mod latent_diffusion;
pub mod limits;
pub mod llamagen;
pub mod locate;
pub mod lora_file;
mod lora_fit;
pub mod lora_names;
pub mod lora_write;
pub mod merge;
pub mod pickle;
pub mod reading;
pub mod registry;
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

pub use self::family::{Architecture, ImageTokenizer, KnownModel};
pub use self::locate::locate;
pub use self::registry::{Registry, architecture, family, known};

use self::latent_diffusion::Framing;
use crate::config::{Dtype, Family, Memory, Sampling};
use crate::nn::{Adapter, Factors, LoraConfig, Weights};
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

    /// The same, told to be another part of another picture.
    pub fn framed(mut self, told: Framing) -> Self {
        if let Self::Latents { framing, .. } = &mut self {
            *framing = told;
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

/// A backbone that can learn and draw: diffusion and AR models alike.
pub trait Learner: Send {
    /// Side length in pixels of the square images that it draws and learns from.
    fn resolution(&self) -> u32;

    /// How many tokens it draws for one image, one after another; nothing for models that draw all at once.
    fn tokens_per_image(&self) -> Option<usize> {
        None
    }

    /// What is learnt beside that: as `training` says, of which a backbone reads what it knows.
    fn set_training(&mut self, _training: &crate::config::Training) {}

    /// Turns images of that size into examples.
    fn encode(&mut self, images: &[RgbImage]) -> Result<Vec<Example>>;

    /// The mean loss of a batch, a scalar with its graph, whose gradients are [`crate::nn::backward`]'s to compute. All
    /// randomness (noise, timesteps, dropout) comes from `generator`.
    fn loss(&mut self, batch: &[TrainingExample], generator: &mut ChaCha8Rng) -> Result<Tensor>;

    /// Told every prompt that is to come, a model keeps what its text encoders say of each and lets go of the encoders,
    /// which may be larger than the rest; a prompt that comes nevertheless opens them again. Nothing happens in a model
    /// that reads prompts as it draws.
    ///
    /// # Errors
    /// When a prompt cannot be read.
    fn foresee(&mut self, _prompts: &[String]) -> Result<()> {
        Ok(())
    }

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
#[derive(Debug, Clone)]
pub enum Tuning {
    /// A LoRA adapter.
    Lora(LoraConfig),
    /// An adapter that is there, by layer: each has a rank and scale of its own, and convolutions may be among them.
    Given(Arc<BTreeMap<String, Factors>>),
    /// All weights of the backbone.
    Full,
    /// Nothing.
    Frozen,
}

/// How a learner is opened.
#[derive(Debug, Clone)]
pub struct LearnerOptions {
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

impl LearnerOptions {
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
            Tuning::Given(layers) => {
                let layers = (**layers).clone();
                let adapter = Arc::new(Adapter::from_factors(layers, str::to_string));
                (weights.with_adapter(adapter.clone()), Some(adapter))
            }
            Tuning::Full | Tuning::Frozen => (weights, None),
        }
    }
}

/// The layers that an adapter may join, linear ones and convolutions, of the backbone of the checkpoint in `dir`: their
/// paths, as its file names them, with the shapes of their weights; `None` where only opening it would tell.
///
/// # Errors
/// When its weights are missing or damaged.
pub fn layers(
    family: Family,
    dir: &Path,
    resolution: Option<u32>,
) -> Result<Option<BTreeMap<String, Vec<usize>>>> {
    let Some(parts) = &architecture(family)?.learner else {
        return Ok(None);
    };
    let Some(shapes) = (parts.backbone)(dir, resolution)?.files.shapes()? else {
        return Ok(None);
    };
    let mut layers = BTreeMap::new();
    for (name, shape) in shapes {
        let layer = name.strip_suffix(".weight");
        let is_table = |layer: &&str| {
            ["tok_embeddings", "embed_tokens"]
                .iter()
                .any(|table| layer.ends_with(table))
        };
        let layer = layer.filter(|layer| shape.len() > 1 && !is_table(layer));
        layers.extend(layer.map(|layer| (layer.to_string(), shape)));
    }
    Ok(Some(layers))
}

/// Opens a learner.
///
/// # Errors
/// When its family cannot learn, or its checkpoint cannot be read.
pub fn open(options: &LearnerOptions) -> Result<Box<dyn Learner>> {
    (architecture(options.family)?.learner()?.open)(options)
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
