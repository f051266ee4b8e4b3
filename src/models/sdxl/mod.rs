//! Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952) from a directory in diffusers' layout, for example
//! `stabilityai/stable-diffusion-xl-base-1.0`: `model_index.json`, `unet/`, `vae/`, `scheduler/`, and for each text
//! encoder `text_encoder*/` and `tokenizer*/`.

mod block;
mod config;
mod sampling;
mod text;
mod unet;

pub use config::{Config, DownBlock, MidBlock, PerLevel, UpBlock};
pub use sampling::denoise;
pub use unet::UNet;

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use rand_chacha::ChaCha8Rng;

use self::text::TextEncoders;
use super::autoencoder;
use super::checkpoint_files::Layout;
use super::family::{Architecture, Backbone, KnownModel, LearnerParts};
use super::latent_diffusion::text::described_clips;
use super::latent_diffusion::{
    Conditioning, Denoiser, DiffusionLearner, Framing, LatentDiffusion, multiple_of, opened,
};
use super::reading::TextReader;
use crate::config::{
    Family, FamilySettings, Kind, Optimizer, SamplingDefaults, Training, TrainingDefaults,
};
use crate::diffusion::{Ddpm, DiscreteConfig, Guidance, TrainingDraw};
use crate::hub::catalogue;
use crate::nn::Weights;
use crate::{Error, Result};

/// SDXL: U-Net, epsilon or v-prediction.
pub const FAMILY: Family = Family::new(&FamilySettings {
    name: "SDXL",
    kind: Kind::Diffusion,
    training: TrainingDefaults::diffusion(Optimizer::Adamw, 1e-4, None),
    targets: &LORA_TARGETS,
    sampling: SamplingDefaults::Diffusion {
        num_inference_steps: 50,
        guidance_scale: 5.0,
        classifier_free: true,
    },
});

/// The layers that diffusers' `train_dreambooth_lora_sdxl.py` adapts.
pub const LORA_TARGETS: [&str; 4] = ["to_k", "to_q", "to_v", "to_out.0"];

/// SDXL in diffusers' layout.
pub static ARCHITECTURE: Architecture = Architecture {
    family: FAMILY,
    recognises: |layout| layout.is_pipeline("StableDiffusionXLPipeline"),
    models: &[
        KnownModel {
            name: "sdxl",
            resolution: Some(1024),
            directory: "datasets/checkpoints/sdxl",
            hub: Some(&catalogue::SDXL),
            files: &[],
        },
        KnownModel {
            name: "nano-sdxl",
            resolution: Some(32),
            directory: "datasets/nano/checkpoints/sdxl",
            hub: None,
            files: &["model_index.json"],
        },
    ],
    readers: |dir, _, _| TextReader::of_encoders(described_clips(&Layout::open(dir)?)?),
    learner: Some(LearnerParts {
        open: |options| Ok(Box::new(SdxlLearner::open(options)?)),
        resolution: |dir, asked| Ok(resolution(dir, asked.map(|side| side as usize))? as u32),
        backbone: |dir, _| Backbone::of_pipeline(dir, "unet"),
        config: |_, _| Ok(None),
        tokenizer: None,
    }),
};

/// The whole model.
pub type Sdxl = LatentDiffusion<SdxlDenoiser>;

/// The model as a learner.
pub type SdxlLearner = DiffusionLearner<SdxlDenoiser>;

/// The U-Net with its text encoders and its schedule.
pub struct SdxlDenoiser {
    text: Option<TextEncoders>,
    unet: UNet,
    sampling: DiscreteConfig,
    training: Ddpm,
    dtype: DType,
}

/// Side in pixels of the square images that the checkpoint in `directory` draws: what is `asked` for, or its own.
///
/// # Errors
/// When it cannot draw such images, or its configs cannot be read.
pub fn resolution(directory: &Path, asked: Option<usize>) -> Result<usize> {
    let layout = Layout::open(directory)?;
    let config: Config = layout.config("unet")?;
    let vae: autoencoder::Config = layout.config("vae")?;
    let sampling: DiscreteConfig = layout.scheduler()?;
    sampling.check_sampler()?;
    let own = vae.downscale().saturating_mul(config.side());
    multiple_of(vae.downscale(), asked.unwrap_or(own))
}

/// What the U-Net is told of the pictures, (b, 6), f32.
pub fn time_ids(framings: &[Framing], device: &Device) -> Result<Tensor> {
    let numbers: Vec<f32> = framings
        .iter()
        .flat_map(|framing| [framing.original, framing.crop, framing.target])
        .flatten()
        .map(|number| number as f32)
        .collect();
    Ok(Tensor::from_vec(numbers, (framings.len(), 6), device)?)
}

/// Fails where a length of texts is asked for: CLIP's is what it is.
fn fixed(max_sequence_length: Option<usize>) -> Result<()> {
    match max_sequence_length {
        None => Ok(()),
        Some(length) => Err(Error::invalid(
            format!("max_sequence_length {length} for SDXL"),
            "leave it out: the length of CLIP's texts is that of its tokenizer",
        )),
    }
}

impl Denoiser for SdxlDenoiser {
    type Text = TextEncoders;
    const NAME: &'static str = "SDXL";
    const COMPONENT: &'static str = "unet";
    const BUFFERS: &'static [&'static str] = &[];

    fn open(layout: &Layout, weights: &Weights, opened: &mut Vec<Weights>) -> Result<Self> {
        let config: Config = layout.config("unet")?;
        let sampling: DiscreteConfig = layout.scheduler()?;
        sampling.check_sampler()?;
        Ok(Self {
            text: Some(TextEncoders::open(layout, weights, opened)?),
            unet: UNet::new(config, weights)?,
            training: Ddpm::new(&sampling)?,
            sampling,
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
        TextEncoders::open(layout, weights, opened)
    }

    fn channels(&self) -> usize {
        self.unet.config().in_channels
    }

    fn granularity(&self) -> usize {
        1
    }

    fn sample_size(&self) -> usize {
        self.unet.config().side()
    }

    fn encode(
        &self,
        prompts: &[String],
        max_sequence_length: Option<usize>,
    ) -> Result<Conditioning> {
        fixed(max_sequence_length)?;
        let conditioning = opened(&self.text)?.encode(prompts)?;
        let pooled = conditioning.pooled.dim(1)?;
        if pooled != self.unet.text_embeds_dim() {
            return Err(Error::invalid(
                format!(
                    "a text encoder of width {pooled} for a U-Net that takes {}",
                    self.unet.text_embeds_dim()
                ),
                "use the text encoders that the U-Net was trained with",
            ));
        }
        Ok(conditioning)
    }

    fn unconditional(&self, max_sequence_length: Option<usize>) -> Result<Conditioning> {
        fixed(max_sequence_length)?;
        opened(&self.text)?.unconditional()
    }

    fn set_training(&mut self, training: &Training) {
        self.training.snr_gamma = training.snr_gamma;
    }

    fn draw(
        &self,
        latents_shape: (usize, usize, usize, usize),
        generator: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<TrainingDraw> {
        self.training.draw(latents_shape, generator, device)
    }

    fn loss(
        &self,
        latents: &Tensor,
        conditioning: &Conditioning,
        framings: &[Framing],
        draw: &TrainingDraw,
    ) -> Result<Tensor> {
        let time_ids = time_ids(framings, latents.device())?;
        self.training.loss(latents, draw, |noisy, timesteps| {
            let noisy = noisy.to_dtype(self.dtype)?;
            let Conditioning { context, pooled } = conditioning;
            self.unet
                .forward(&noisy, timesteps, context, pooled, &time_ids)
        })
    }

    fn denoise(
        &self,
        noise: &Tensor,
        conditioning: &Conditioning,
        negative: Option<(&Conditioning, Guidance)>,
        framing: Framing,
        num_inference_steps: usize,
    ) -> Result<Tensor> {
        denoise(
            &self.unet,
            &self.sampling,
            noise,
            conditioning,
            negative,
            framing,
            num_inference_steps,
        )
    }
}
