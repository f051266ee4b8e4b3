//! Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952) from a directory in diffusers' layout, for example
//! `stabilityai/stable-diffusion-xl-base-1.0`: `model_index.json`, `unet/`, `vae/`, `scheduler/`, and for each text
//! encoder `text_encoder*/` and `tokenizer*/`.

mod block;
mod config;
pub(super) mod kohya;
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
use super::latent_diffusion::multiple_of;
use super::latent_diffusion::{Conditioning, Denoiser, DiffusionLearner, Framing, LatentDiffusion};
use super::limits::read_config;
use crate::config::Training;
use crate::diffusion::{Ddpm, DiscreteConfig, Guidance, TrainingDraw};
use crate::files::read_json;
use crate::nn::Weights;
use crate::{Error, Result};

/// The whole model.
pub type Sdxl = LatentDiffusion<SdxlDenoiser>;

/// The model as a learner.
pub type SdxlLearner = DiffusionLearner<SdxlDenoiser>;

/// The U-Net with its text encoders and its schedule.
pub struct SdxlDenoiser {
    text: TextEncoders,
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
    let config: Config = read_config(&directory.join("unet/config.json"))?;
    let vae: autoencoder::Config = read_config(&directory.join("vae/config.json"))?;
    let sampling: DiscreteConfig = read_json(&directory.join("scheduler/scheduler_config.json"))?;
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
    const NAME: &'static str = "SDXL";
    const COMPONENT: &'static str = "unet";
    const BUFFERS: &'static [&'static str] = &[];

    fn open(directory: &Path, weights: &Weights, opened: &mut Vec<Weights>) -> Result<Self> {
        let config: Config = read_config(&directory.join("unet/config.json"))?;
        let sampling: DiscreteConfig =
            read_json(&directory.join("scheduler/scheduler_config.json"))?;
        sampling.check_sampler()?;
        Ok(Self {
            text: TextEncoders::open(directory, weights, opened)?,
            unet: UNet::new(config, weights)?,
            training: Ddpm::new(&sampling)?,
            sampling,
            dtype: weights.dtype(),
        })
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
        let conditioning = self.text.encode(prompts)?;
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
        self.text.unconditional()
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
