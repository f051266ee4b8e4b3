//! `pipelines/nano-pretrain.toml` as types: every size and every setting of the nano checkpoints' training.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::checks;
use crate::config::Optimizer;
use crate::config::limits::TEXT_BYTES;
use crate::diffusion::PredictionType;
use crate::training::optimizer::{AdamWConfig, OptimizerConfig};
use crate::{Error, Result};

/// The whole file. Unknown fields are refused.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Fixes the fresh weights, the order of the scenes and all noise.
    pub seed: u64,
    /// Side of the drawn images in pixels, for models that do not say another.
    pub image_size: usize,
    /// Where the checkpoints go, and what a training continues from.
    pub out: PathBuf,
    pub clip: Clip,
    pub dino: Dino,
    pub vq: Vq,
    pub vae: Vae,
    pub gpt: Gpt,
    pub sd3: Sd3,
    pub vqgan: Vqgan,
    pub chameleon: Chameleon,
    /// Stable Diffusion 3.5.
    pub sd35: Sd3,
    pub flux: Flux,
    pub sdxl: Sdxl,
}

/// How one model is trained.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Training {
    /// Side of the images that the model learns from, in pixels. Default: the file's `image_size`.
    #[serde(default)]
    pub image_size: Option<usize>,
    /// How many images the model sees when neither `--images` nor `--minutes` is given.
    pub images: usize,
    /// Images per step.
    pub batch_size: usize,
    /// What moves the weights. Default AdamW.
    #[serde(default)]
    pub optimizer: Optimizer,
    /// The learning rate after the warm-up; it falls along half a cosine to a fiftieth at the end of the budget.
    pub learning_rate: f64,
    /// Images over which the learning rate rises from zero, in each session.
    #[serde(default = "warmup_images")]
    pub warmup_images: usize,
    /// AdamW's decay of the second moment.
    #[serde(default = "beta2")]
    pub beta2: f64,
    /// Decoupled weight decay, on tensors of two or more dimensions.
    #[serde(default = "weight_decay")]
    pub weight_decay: f64,
    /// Largest global norm of the gradient, over all weights whatever moves them.
    #[serde(default = "max_grad_norm")]
    pub max_grad_norm: f64,
}

fn warmup_images() -> usize {
    2000
}

fn beta2() -> f64 {
    0.99
}

fn weight_decay() -> f64 {
    0.01
}

fn max_grad_norm() -> f64 {
    1.0
}

impl Training {
    /// What moves the weights, with its constants. Only matrices decay.
    pub fn optimizer(&self) -> OptimizerConfig {
        let adamw = AdamWConfig {
            beta2: self.beta2,
            weight_decay: self.weight_decay,
            decay_vectors: false,
            ..AdamWConfig::default()
        };
        OptimizerConfig::of_kind(self.optimizer, adamw, None)
    }

    /// The learning rate after `images` of this session, when the share `spent` of the budget is spent.
    pub fn rate(&self, images: usize, spent: f64) -> f64 {
        let warmup = (images + self.batch_size) as f64 / self.warmup_images.max(1) as f64;
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * spent.min(1.0)).cos());
        self.learning_rate * warmup.min(1.0) * (0.02 + 0.98 * cosine)
    }
}

/// A transformer encoder's size.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tower {
    /// Width of the residual stream; the feed-forward layers are four times as wide.
    pub width: usize,
    pub layers: usize,
    pub heads: usize,
}

/// CLIP: an image tower and a text tower that agree on which caption belongs to which image.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Clip {
    /// Side of the image tower's patches in pixels.
    pub patch_size: usize,
    pub vision: Tower,
    pub text: Tower,
    /// Positions of a caption, both end tokens included.
    pub max_positions: usize,
    /// Width of the space that images and captions share.
    pub projection: usize,
    /// How many individuals of a batch are shown twice, so that images alone tell who they show.
    pub pairs: usize,
    /// Temperature and weight of the loss that compares the images of a batch with one another.
    pub pair_temperature: f64,
    pub pair_weight: f64,
    pub training: Training,
}

/// The DINO-shaped vision transformer.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dino {
    /// Side of the patches in pixels.
    pub patch_size: usize,
    pub vision: Tower,
    /// How many identities of one class stand together in a batch, as hard negatives of one another.
    pub identities_per_class: usize,
    /// Temperature of the contrastive loss.
    pub temperature: f64,
    pub training: Training,
}

/// LlamaGen's VQ tokenizer.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vq {
    /// Channels of the first level.
    pub channels: usize,
    /// Channels of each level over `channels`, finest first; one level fewer than this are halvings.
    pub encoder_multipliers: Vec<usize>,
    /// The same for the decoder, also finest first.
    pub decoder_multipliers: Vec<usize>,
    /// Groups of the norms; they divide `channels`. With as many groups as channels an image's own contrast is lost.
    pub norm_groups: usize,
    /// Channels before the code projection.
    pub z_channels: usize,
    /// Entries of the codebook, and the width of each.
    pub codebook_size: usize,
    pub codebook_dim: usize,
    /// Weight of the commitment loss.
    pub commitment: f64,
    /// Weight of the mean absolute error beside the mean squared error.
    pub absolute: f64,
    /// Whether an image's squared error counts relative to its own size: what falls is then the mean of its logarithm,
    /// in which a decibel is worth the same in every image.
    pub even: bool,
    /// Whether the decoder alone learns: images get better, tokens stay, and so does what stands on them.
    pub decoder_only: bool,
    /// An entry that no image used for this many images is moved to an encoded patch.
    pub revive_after: usize,
    pub training: Training,
}

/// The KL autoencoder of the diffusion model.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vae {
    /// Channels of each level.
    pub channels: Vec<usize>,
    /// Groups of the norms; they divide every level's channels. With as many groups as channels an image's own
    /// contrast is lost.
    pub norm_groups: usize,
    /// Residual blocks per level of the encoder; the decoder has one more.
    pub layers_per_block: usize,
    pub latent_channels: usize,
    /// Weight of the Kullback-Leibler term, per latent value.
    pub kl: f64,
    /// Weight of the mean absolute error beside the mean squared error.
    pub absolute: f64,
    pub training: Training,
}

/// LlamaGen's GPT and the T5 encoder that learns jointly with it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gpt {
    pub width: usize,
    pub layers: usize,
    pub heads: usize,
    /// The feed-forward width is rounded up to a multiple of this.
    pub multiple_of: usize,
    /// Positions of the caption before the image tokens.
    pub caption_positions: usize,
    /// Share of captions replaced by the null condition.
    pub condition_dropout: f64,
    /// Dropout on tokens, residuals and feed-forward outputs.
    pub dropout: f64,
    pub t5: T5,
    /// Scenes that are drawn and encoded once and then used again.
    pub pool: usize,
    pub training: Training,
}

/// The T5 encoder.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct T5 {
    /// Width of the residual stream, and of the features.
    pub d_model: usize,
    pub d_ff: usize,
    pub d_kv: usize,
    pub heads: usize,
    pub layers: usize,
}

/// An MMDiT that another diffusion model begins with or learns from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mmdit {
    Sd3,
    Sd35,
}

impl Mmdit {
    /// The model's name, which is that of its folder too.
    pub fn name(self) -> &'static str {
        match self {
            Mmdit::Sd3 => "sd3",
            Mmdit::Sd35 => "sd35",
        }
    }

    /// What the settings say of it.
    pub fn of(self, settings: &Settings) -> &Sd3 {
        match self {
            Mmdit::Sd3 => &settings.sd3,
            Mmdit::Sd35 => &settings.sd35,
        }
    }
}

/// The MMDiT of Stable Diffusion 3 and 3.5.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sd3 {
    /// Whether queries and keys are normalised, as in 3.5. Default false.
    #[serde(default)]
    pub qk_norm: bool,
    /// Whether prompts are read by LlamaGen's T5 as well as by CLIP. Default false.
    #[serde(default)]
    pub t5: bool,
    /// Whose weights of the same name and shape a new model begins with. Default: fresh ones.
    #[serde(default)]
    pub start: Option<Mmdit>,
    pub layers: usize,
    pub heads: usize,
    pub head_dim: usize,
    /// Side of a patch in latent pixels.
    pub patch_size: usize,
    /// Timestep shift of training and of the scheduler's config.
    pub shift: f64,
    /// Share of captions replaced by the empty one.
    pub condition_dropout: f64,
    /// Scenes that are drawn and encoded once and then used again.
    pub pool: usize,
    pub training: Training,
}

/// FLUX.1's transformer.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Flux {
    /// Blocks with weights for image and text each.
    pub layers: usize,
    /// Blocks with common weights, at least 1.
    pub single_layers: usize,
    pub heads: usize,
    pub head_dim: usize,
    /// Channels of a head that index, row and column turn; even, together `head_dim`.
    pub axes: [usize; 3],
    /// The least and the greatest guidance scale that the model is told, and that its teacher is guided with.
    pub guidance: [f64; 2],
    /// Whose guided predictions the model learns, as FLUX.1-dev is distilled. Default: the data's, told a guidance of 1.
    #[serde(default)]
    pub teacher: Option<Mmdit>,
    /// Whose weights a new model begins with, as far as they fit. Default: fresh ones.
    #[serde(default)]
    pub start: Option<Mmdit>,
    /// Scenes that are drawn and encoded once and then used again.
    pub pool: usize,
    pub training: Training,
}

/// SDXL's U-Net.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sdxl {
    /// Width of each level, finest first.
    pub channels: Vec<usize>,
    /// Residual blocks of each level on the way down; there is one more on the way up.
    pub layers_per_block: usize,
    /// Blocks of each level's transformers; 0 for a level without.
    pub depths: Vec<usize>,
    /// Width of an attention head; it divides the width of every level.
    pub head_dim: usize,
    /// Groups of the norms; they divide the width of every level.
    pub norm_groups: usize,
    /// Width of the embedding of each size that the model is told.
    pub size_channels: usize,
    /// What the model gives: `epsilon`, `v_prediction` or `sample`.
    pub prediction: PredictionType,
    /// Share of captions replaced by none.
    pub condition_dropout: f64,
    /// Whose predictions the model learns. Default: the data's.
    #[serde(default)]
    pub teacher: Option<Mmdit>,
    /// Scenes that are drawn and encoded once and then used again.
    pub pool: usize,
    pub training: Training,
}

/// Chameleon's image tokenizer.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vqgan {
    /// Channels of the first level.
    pub channels: usize,
    /// Channels of each level over `channels`, finest first; one level fewer than this are halvings.
    pub multipliers: Vec<usize>,
    /// Groups of the norms; they divide `channels`.
    pub norm_groups: usize,
    /// Residual blocks per level of the encoder; the decoder has one more.
    pub res_blocks: usize,
    /// Channels before the code projection.
    pub z_channels: usize,
    /// Entries of the codebook, and the width of each.
    pub codebook_size: usize,
    pub codebook_dim: usize,
    /// Weight of the commitment loss.
    pub commitment: f64,
    /// Weight of the mean absolute error beside the mean squared error.
    pub absolute: f64,
    /// Whether an image's squared error counts relative to its own size: what falls is then the mean of its logarithm,
    /// in which a decibel is worth the same in every image.
    pub even: bool,
    /// Whether the decoder alone learns: images get better, tokens stay, and so does what stands on them.
    pub decoder_only: bool,
    /// An entry that no image used for this many images is moved to an encoded patch.
    pub revive_after: usize,
    pub training: Training,
}

/// Chameleon's transformer as Lumina-mGPT uses it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chameleon {
    pub width: usize,
    pub layers: usize,
    pub heads: usize,
    /// Width of the feed-forward's hidden layer.
    pub feed_forward: usize,
    /// Pixels of one unit of an image's height and width.
    pub patch_size: usize,
    /// The longest sequence in tokens.
    pub positions: usize,
    /// Share of images learnt without their caption.
    pub condition_dropout: f64,
    /// Dropout on both residual branches.
    pub dropout: f64,
    /// Scenes that are drawn and encoded once and then used again.
    pub pool: usize,
    pub training: Training,
}

impl Settings {
    /// Side in pixels of the images that a model with `training` learns from.
    pub fn side(&self, training: &Training) -> usize {
        training.image_size.unwrap_or(self.image_size)
    }

    /// Reads the file; the error names the line and column of what is wrong.
    pub fn read(path: &Path) -> Result<Self> {
        let text = crate::files::text::read(path, TEXT_BYTES)?;
        Self::parse(&text).map_err(|e| match e {
            Error::Config(faults) => Error::Config(
                faults
                    .into_iter()
                    .map(|fault| format!("{}: {fault}", path.display()))
                    .collect(),
            ),
            other => other,
        })
    }

    /// Reads the text of such a file.
    ///
    /// # Errors
    /// [`Error::Config`] with the place of what cannot be read or, where everything can, with every value that cannot
    /// be.
    pub fn parse(text: &str) -> Result<Self> {
        let settings: Self = toml::from_str(text).map_err(|e| {
            let hint = "pipelines/nano-pretrain.toml has every field";
            Error::Config(vec![format!(
                "{}\n  hint: {hint}",
                e.to_string().trim_end()
            )])
        })?;
        match checks::faults(&settings) {
            faults if faults.is_empty() => Ok(settings),
            faults => Err(Error::Config(faults)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHIPPED: &str = include_str!("../../../pipelines/nano-pretrain.toml");

    #[test]
    fn the_shipped_settings_are_complete() {
        let settings = Settings::parse(SHIPPED).unwrap();
        assert_eq!(settings.image_size, 32);
    }

    #[test]
    fn an_unknown_field_is_refused_with_its_name() {
        let text = SHIPPED.replace("commitment =", "comitment =");
        let error = Settings::parse(&text).unwrap_err().to_string();
        assert!(error.contains("comitment"), "{error}");
    }

    #[test]
    fn all_values_that_cannot_be_are_named_at_once_with_hints() {
        let text = SHIPPED
            .replacen("heads = 4", "heads = 3", 1)
            .replacen("norm_groups = 8", "norm_groups = 5", 1)
            .replacen("batch_size = 64", "batch_size = 0", 1)
            .replacen("condition_dropout = 0.1", "condition_dropout = 1.5", 1);
        let Err(Error::Config(faults)) = Settings::parse(&text) else {
            panic!("faults expected")
        };
        let starts = [
            "clip.training.batch_size = 0",
            "clip.vision.width = 128",
            "vq.channels = 16",
            "gpt.condition_dropout = 1.5",
        ];
        assert_eq!(faults.len(), starts.len(), "{faults:#?}");
        for (fault, start) in faults.iter().zip(starts) {
            assert!(fault.starts_with(start), "{fault}");
            assert!(fault.contains("\n  hint: "), "{fault}");
        }
    }

    #[test]
    fn the_learning_rate_rises_then_falls() {
        let training = Settings::parse(SHIPPED).unwrap().clip.training;
        let peak = training.learning_rate;
        assert!(training.rate(0, 0.0) < 0.1 * peak);
        assert!((training.rate(training.warmup_images, 0.0) - peak).abs() < 1e-12);
        assert!((training.rate(training.warmup_images, 1.0) - 0.02 * peak).abs() < 1e-12);
    }
}
