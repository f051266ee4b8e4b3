//! Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206) from a directory in diffusers' layout, for
//! example `stabilityai/stable-diffusion-3-medium-diffusers`: `model_index.json`, `transformer/`, `vae/`,
//! `scheduler/`, and for each text encoder `text_encoder*/` and `tokenizer*/`.

mod block;
mod files;
mod learner;
mod sampling;
mod text;
mod transformer;

pub use block::JointTransformerBlock;
pub use learner::Sd3Learner;
pub use sampling::denoise;
pub use transformer::{Config, LORA_TARGETS, QkNorm, Sd3Transformer};

use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use rand_chacha::ChaCha8Rng;

use self::text::TextEncoders;
use super::autoencoder::{self, AutoencoderKl};
use super::checkpoint_files::{self, WeightFiles};
use super::finish_all;
use crate::diffusion::{self, FlowMatchEuler, LossForm, TrainingDraw};
use crate::files::read_json;
use crate::nn::{self, Weights};
use crate::{Error, Result};

/// What the denoiser knows of the prompts, one row for each.
#[derive(Debug, Clone)]
pub struct Conditioning {
    /// Token states (b, n, joint_attention_dim).
    pub context: Tensor,
    /// Pooled states (b, pooled_projection_dim).
    pub pooled: Tensor,
}

impl Conditioning {
    /// The rows of all parts, one after another; n must be equal and `parts` not empty.
    pub fn cat(parts: &[&Conditioning]) -> Result<Self> {
        let contexts: Vec<&Tensor> = parts.iter().map(|part| &part.context).collect();
        let pooled: Vec<&Tensor> = parts.iter().map(|part| &part.pooled).collect();
        Ok(Self {
            context: Tensor::cat(&contexts, 0)?,
            pooled: Tensor::cat(&pooled, 0)?,
        })
    }

    /// Some of the rows.
    pub fn rows(&self, range: Range<usize>) -> Result<Self> {
        let some = |x: &Tensor| x.narrow(0, range.start, range.len());
        Ok(Self {
            context: some(&self.context)?,
            pooled: some(&self.pooled)?,
        })
    }

    /// All rows `count` times over, at least once.
    pub fn repeat(&self, count: usize) -> Result<Self> {
        Self::cat(&vec![self; count.max(1)])
    }
}

/// How images are drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleSettings {
    /// Euler steps, at least 1.
    pub num_inference_steps: usize,
    /// Classifier-free guidance; up to 1 there is none, as in the reference.
    pub guidance_scale: f64,
    /// Pixels, a multiple of [`Sd3::granularity`].
    pub height: usize,
    /// Pixels, a multiple of [`Sd3::granularity`].
    pub width: usize,
    /// What the images are guided away from; empty for nothing in particular.
    pub negative_prompt: String,
}

/// The whole model. The adapter, if any, is on the transformer alone.
pub struct Sd3 {
    text: TextEncoders,
    transformer: Sd3Transformer,
    vae: AutoencoderKl,
    schedule: FlowMatchEuler,
    loss_form: LossForm,
    dtype: DType,
    device: Device,
}

/// Every text encoder that the checkpoint in `directory` has: what it is called, the folder of its tokenizer, and how
/// many tokens of a prompt it takes.
///
/// # Errors
/// When `model_index.json` or the config of an encoder cannot be read.
pub fn text_encoders(directory: &Path) -> Result<Vec<(&'static str, PathBuf, usize)>> {
    text::described(directory)
}

/// Side in pixels of the square images that the checkpoint in `directory` draws: what is `asked` for, or its own.
///
/// # Errors
/// When it cannot draw such images, or its configs cannot be read.
pub fn resolution(directory: &Path, asked: Option<usize>) -> Result<usize> {
    let config: Config = read_json(&directory.join("transformer/config.json"))?;
    let vae: autoencoder::Config = read_json(&directory.join("vae/config.json"))?;
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
pub fn transformer_files(directory: &Path) -> Result<Vec<PathBuf>> {
    WeightFiles::find(&directory.join("transformer"), "diffusion_pytorch_model")?.into_safetensors()
}

impl Sd3 {
    /// Opens `directory`. `transformer` holds the weights of [`transformer_files`], frozen, with an adapter, or
    /// trainable; its precision and device are those of the text encoders too, while the autoencoder computes in f32,
    /// in which half precision would overflow. Everything that is missing or misshapen in any component is reported at
    /// once.
    pub fn open(directory: &Path, transformer: &Weights) -> Result<Self> {
        let (dtype, device) = (transformer.dtype(), transformer.device().clone());
        let config: Config = read_json(&directory.join("transformer/config.json"))?;
        let vae_config: autoencoder::Config = read_json(&directory.join("vae/config.json"))?;
        let scheduler = read_json(&directory.join("scheduler/scheduler_config.json"))?;

        let vae = directory.join("vae");
        let vae_weights =
            checkpoint_files::open(&vae, "diffusion_pytorch_model", DType::F32, &device)?;
        let mut opened = vec![transformer.clone(), vae_weights.clone()];
        let text = TextEncoders::open(directory, &config, transformer, &mut opened)?;
        let model = Self {
            text,
            transformer: Sd3Transformer::new(config, transformer)?,
            vae: AutoencoderKl::new(vae_config, &vae_weights)?,
            schedule: FlowMatchEuler::new(scheduler)?,
            loss_form: LossForm::default(),
            dtype,
            device,
        };
        transformer.expect_no_others();
        finish_all(directory, &opened)?;
        Ok(model)
    }

    /// The same model with another form of the training loss.
    pub fn with_loss_form(mut self, loss_form: LossForm) -> Self {
        self.loss_form = loss_form;
        self
    }

    /// The denoiser.
    pub fn transformer(&self) -> &Sd3Transformer {
        &self.transformer
    }

    /// The autoencoder.
    pub fn vae(&self) -> &AutoencoderKl {
        &self.vae
    }

    /// The schedule.
    pub fn schedule(&self) -> &FlowMatchEuler {
        &self.schedule
    }

    /// Where the model computes.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Sides of images are multiples of this many pixels.
    pub fn granularity(&self) -> usize {
        self.vae.config().downscale() * self.transformer.config().patch_size
    }

    /// Side in pixels of the square images that the checkpoint is for.
    pub fn resolution(&self) -> usize {
        self.vae.config().downscale() * self.transformer.config().sample_size
    }

    /// What the text encoders say of `prompts`, without a graph; at least one prompt. A prompt's row depends on
    /// nothing else, so rows may be kept. Texts are cut at the encoders' lengths.
    pub fn encode_prompts(&self, prompts: &[String]) -> Result<Conditioning> {
        nn::no_grad(|| self.text.encode(prompts))
    }

    /// Mean and log-variance of the latents of `images` (b, 3, h, w) in [−1, 1], not rescaled, f32, without a graph.
    pub fn encode_images(&self, images: &Tensor) -> Result<(Tensor, Tensor)> {
        nn::no_grad(|| self.vae.encode(&images.to_dtype(DType::F32)?))
    }

    /// Latents drawn from the distribution that [`Sd3::encode_images`] gives, scaled as [`Sd3::loss`] takes them.
    pub fn sample_latents(
        &self,
        mean: &Tensor,
        logvar: &Tensor,
        generator: &mut ChaCha8Rng,
    ) -> Result<Tensor> {
        let noise = diffusion::noise(mean.shape(), generator, mean.device())?;
        let sample = (mean + ((logvar * 0.5)?.exp()? * noise)?)?;
        self.vae.scale(&sample)
    }

    /// The training loss of a batch (a scalar, f32): `latents` (b, c, h, w) scaled, f32, with one row of
    /// `conditioning` each. Noise levels and noise come from `generator`, sample by sample.
    pub fn loss(
        &self,
        latents: &Tensor,
        conditioning: &Conditioning,
        generator: &mut ChaCha8Rng,
    ) -> Result<Tensor> {
        let draw = self.draw(latents, generator)?;
        self.loss_at(latents, conditioning, &draw)
    }

    /// What [`Sd3::loss`] draws for `latents` (b, c, h, w).
    pub fn draw(&self, latents: &Tensor, generator: &mut ChaCha8Rng) -> Result<TrainingDraw> {
        self.schedule
            .draw(latents.dims4()?, generator, latents.device())
    }

    /// [`Sd3::loss`] with what was drawn for it.
    pub fn loss_at(
        &self,
        latents: &Tensor,
        conditioning: &Conditioning,
        draw: &TrainingDraw,
    ) -> Result<Tensor> {
        self.schedule
            .loss(latents, draw, self.loss_form, |noisy, timesteps| {
                let noisy = noisy.to_dtype(self.dtype)?;
                let Conditioning { context, pooled } = conditioning;
                self.transformer.forward(&noisy, timesteps, context, pooled)
            })
    }

    /// One image for each prompt and seed: (b, 3, height, width) in [−1, 1], f32, without a graph. The noise of an
    /// image depends on its own seed alone.
    pub fn generate(
        &self,
        prompts: &[String],
        seeds: &[u64],
        settings: &SampleSettings,
    ) -> Result<Tensor> {
        let noise = self.noise(seeds, settings.height, settings.width)?;
        let conditioning = self.encode_prompts(prompts)?;
        let negative = self.encode_prompts(std::slice::from_ref(&settings.negative_prompt))?;
        let steps = settings.num_inference_steps;
        self.generate_from(
            &noise,
            &conditioning,
            &negative,
            steps,
            settings.guidance_scale,
        )
    }

    /// The noise that images of `height`×`width` pixels start from, f32: a row for each seed, which depends on that
    /// seed alone.
    pub fn noise(&self, seeds: &[u64], height: usize, width: usize) -> Result<Tensor> {
        let unit = self.granularity();
        if height == 0 || width == 0 || !height.is_multiple_of(unit) || !width.is_multiple_of(unit)
        {
            return Err(Error::invalid(
                format!("images of {width}×{height} pixels"),
                format!("use a width and a height that are multiples of {unit}"),
            ));
        }
        let f = self.vae.config().downscale();
        let channels = self.transformer.config().in_channels;
        let shape = (1, channels, height / f, width / f);
        let rows = seeds
            .iter()
            .map(|&seed| diffusion::noise(shape, &mut nn::seeded(seed, "latents"), &self.device))
            .collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&rows, 0)?)
    }

    /// [`Sd3::generate`] from `noise` (b, c, h, w) and prompts that are encoded already: b rows of `conditioning`,
    /// and of `negative` one row for all or b.
    pub fn generate_from(
        &self,
        noise: &Tensor,
        conditioning: &Conditioning,
        negative: &Conditioning,
        num_inference_steps: usize,
        guidance_scale: f64,
    ) -> Result<Tensor> {
        let (b, rows) = (noise.dim(0)?, conditioning.context.dim(0)?);
        if b != rows {
            return Err(Error::invalid(
                format!("noise of {b} images for {rows} prompts"),
                "give one seed for each prompt",
            ));
        }
        let negative = match negative.context.dim(0)? {
            1 => negative.repeat(b)?,
            _ => negative.clone(),
        };
        let guided = (guidance_scale > 1.0).then_some((&negative, guidance_scale));
        let latents = denoise(
            &self.transformer,
            &self.schedule,
            noise,
            conditioning,
            guided,
            num_inference_steps,
        )?;
        nn::no_grad(|| {
            let image = self.vae.decode(&self.vae.unscale(&latents)?)?;
            Ok(image.clamp(-1f32, 1f32)?)
        })
    }
}
