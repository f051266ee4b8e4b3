//! Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206) from a directory in diffusers' layout, for
//! example `stabilityai/stable-diffusion-3-medium-diffusers`: `model_index.json`, `transformer/`, `vae/`,
//! `scheduler/`, and for each text encoder `text_encoder*/` and `tokenizer*/`.

mod block;
mod sampling;
mod text;
mod transformer;

pub use super::latent_diffusion::{Conditioning, SampleSettings};
pub use block::JointTransformerBlock;
pub(super) use block::{EPS as NORM_EPS, FeedForward, Modulation, attend};
pub use sampling::denoise;
pub(super) use transformer::TIMESTEP;
pub use transformer::{Config, LORA_TARGETS, QkNorm, Sd3Transformer};

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use rand_chacha::ChaCha8Rng;

use self::text::TextEncoders;
use super::autoencoder;
use super::checkpoint_files::{Layout, WeightFiles};
use super::family::{Architecture, Backbone, KnownModel, LearnerParts};
use super::latent_diffusion::{
    Denoiser, DiffusionLearner, Framing, LatentDiffusion, Levels, network_files, opened,
};
use super::reading::TextReader;
use crate::config::{
    Family, FamilySettings, Kind, Optimizer, SamplingDefaults, Training, TrainingDefaults,
    WeightingScheme,
};
use crate::diffusion::{FlowMatchEuler, Guidance, LossForm, TrainingDraw};
use crate::hub::catalogue;
use crate::nn::Weights;
use crate::{Error, Result};

/// SD3 and SD3.5: MMDiT, rectified flow.
pub const FAMILY: Family = Family::new(&FamilySettings {
    name: "SD3",
    kind: Kind::Diffusion,
    training: TrainingDefaults::diffusion(
        Optimizer::Adamw,
        4e-4,
        Some(WeightingScheme::LogitNormal),
    ),
    targets: &LORA_TARGETS,
    sampling: SamplingDefaults::Diffusion {
        num_inference_steps: 28,
        guidance_scale: 7.0,
        classifier_free: true,
    },
});

/// SD3 and SD3.5 in diffusers' layout.
pub static ARCHITECTURE: Architecture = Architecture {
    family: FAMILY,
    recognises: |layout| layout.is_pipeline("StableDiffusion3Pipeline"),
    models: &[
        KnownModel {
            name: "nano-sd3",
            resolution: Some(32),
            directory: "datasets/nano/checkpoints/sd3",
            hub: None,
            files: &["model_index.json"],
        },
        KnownModel {
            name: "nano-sd3.5",
            resolution: Some(64),
            directory: "datasets/nano/checkpoints/sd35",
            hub: None,
            files: &["model_index.json"],
        },
        KnownModel {
            name: "sd3-medium",
            resolution: Some(512),
            directory: "datasets/checkpoints/sd3-medium",
            hub: Some(&catalogue::SD3_MEDIUM),
            files: &[],
        },
        KnownModel {
            name: "sd3.5-large",
            resolution: Some(512),
            directory: "datasets/checkpoints/sd3.5-large",
            hub: Some(&catalogue::SD35_LARGE),
            files: &[],
        },
    ],
    readers: |dir, _, _| TextReader::of_encoders(text_encoders(dir)?),
    learner: Some(LearnerParts {
        open: |options| Ok(Box::new(Sd3Learner::open(options)?)),
        resolution: |dir, asked| Ok(resolution(dir, asked.map(|side| side as usize))? as u32),
        backbone: |dir, _| Backbone::of_pipeline(dir, "transformer"),
        config: |_, _| Ok(None),
        tokenizer: None,
    }),
};

/// The whole model.
pub type Sd3 = LatentDiffusion<Mmdit>;

/// The model as a learner.
pub type Sd3Learner = DiffusionLearner<Mmdit>;

/// The transformer with its text encoders and its schedule.
pub struct Mmdit {
    text: Option<TextEncoders>,
    transformer: Sd3Transformer,
    schedule: FlowMatchEuler,
    levels: Levels,
    dtype: DType,
}

/// Every text encoder that the checkpoint in `directory` has: what it is called, the folder of its tokenizer, and how
/// many tokens of a prompt it takes.
///
/// # Errors
/// When `model_index.json` or the config of an encoder cannot be read.
pub fn text_encoders(directory: &Path) -> Result<Vec<(&'static str, PathBuf, usize)>> {
    text::described(&Layout::open(directory)?)
}

/// Side in pixels of the square images that the checkpoint in `directory` draws: what is `asked` for, or its own.
///
/// # Errors
/// When it cannot draw such images, or its configs cannot be read.
pub fn resolution(directory: &Path, asked: Option<usize>) -> Result<usize> {
    let layout = Layout::open(directory)?;
    let config: Config = layout.config("transformer")?;
    let vae: autoencoder::Config = layout.config("vae")?;
    let unit = vae.downscale().saturating_mul(config.patch_size);
    let most = unit.saturating_mul(config.pos_embed_max_size);
    let side = asked.unwrap_or(vae.downscale().saturating_mul(config.sample_size));
    if side > 0 && unit > 0 && side.is_multiple_of(unit) && side <= most {
        return Ok(side);
    }
    Err(Error::invalid(
        format!("a resolution of {side} pixels"),
        format!("choose a multiple of {unit} up to {most} for this model"),
    ))
}

/// The weight files of the transformer of `directory`, for [`Sd3::open`]. Fails where there are none.
pub fn transformer_files(directory: &Path) -> Result<WeightFiles> {
    network_files::<Mmdit>(directory)
}

impl Denoiser for Mmdit {
    type Text = TextEncoders;
    const NAME: &'static str = "SD3";
    const COMPONENT: &'static str = "transformer";
    const BUFFERS: &'static [&'static str] = &["pos_embed.pos_embed"];

    fn open(layout: &Layout, weights: &Weights, opened: &mut Vec<Weights>) -> Result<Self> {
        let config: Config = layout.config("transformer")?;
        Ok(Self {
            text: Some(TextEncoders::open(layout, &config, weights, opened)?),
            transformer: Sd3Transformer::new(config, weights)?,
            schedule: FlowMatchEuler::new(layout.scheduler()?)?,
            levels: Levels::LOGIT_NORMAL,
            dtype: weights.dtype(),
        })
    }

    fn text(&mut self) -> &mut Option<TextEncoders> {
        &mut self.text
    }

    fn read_text(
        &self,
        layout: &Layout,
        weights: &Weights,
        opened: &mut Vec<Weights>,
    ) -> Result<TextEncoders> {
        TextEncoders::open(layout, self.transformer.config(), weights, opened)
    }

    fn channels(&self) -> usize {
        self.transformer.config().in_channels
    }

    fn granularity(&self) -> usize {
        self.transformer.config().patch_size
    }

    fn sample_size(&self) -> usize {
        self.transformer.config().sample_size
    }

    fn encode(
        &self,
        prompts: &[String],
        max_sequence_length: Option<usize>,
    ) -> Result<Conditioning> {
        opened(&self.text)?.encode(prompts, max_sequence_length)
    }

    fn set_training(&mut self, training: &Training) {
        self.levels = Levels::of(training).unwrap_or(Levels::LOGIT_NORMAL);
    }

    fn draw(
        &self,
        latents_shape: (usize, usize, usize, usize),
        generator: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<TrainingDraw> {
        self.schedule
            .draw(latents_shape, self.levels.density, generator, device)
    }

    fn loss(
        &self,
        latents: &Tensor,
        conditioning: &Conditioning,
        _framings: &[Framing],
        draw: &TrainingDraw,
    ) -> Result<Tensor> {
        let form = (LossForm::default(), self.levels.weighting);
        self.schedule.loss(latents, draw, form, |noisy, timesteps| {
            let noisy = noisy.to_dtype(self.dtype)?;
            let Conditioning { context, pooled } = conditioning;
            self.transformer.forward(&noisy, timesteps, context, pooled)
        })
    }

    fn denoise(
        &self,
        noise: &Tensor,
        conditioning: &Conditioning,
        negative: Option<(&Conditioning, Guidance)>,
        _framing: Framing,
        num_inference_steps: usize,
    ) -> Result<Tensor> {
        denoise(
            &self.transformer,
            &self.schedule,
            noise,
            conditioning,
            negative,
            num_inference_steps,
        )
    }
}
