//! What the latent diffusion models of all families share: the autoencoder and its latents, prompts that are encoded
//! once, noise by seed, guidance, and learning with an adapter. A family is a [`Denoiser`].

mod learner;
mod levels;
pub(super) mod text;

pub use learner::DiffusionLearner;
pub use levels::Levels;

use std::ops::Range;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use rand_chacha::ChaCha8Rng;

use super::autoencoder::{self, AutoencoderKl};
use super::checkpoint_files::{Layout, WeightFiles};
use super::finish_all;
use crate::config::Training;
use crate::diffusion::{self, Guidance, TrainingDraw};
use crate::nn::{self, Weights};
use crate::{Error, Result};

/// What the denoiser knows of the prompts, one row for each.
#[derive(Debug, Clone)]
pub struct Conditioning {
    /// Token states (b, n, their width).
    pub context: Tensor,
    /// Pooled states (b, their width).
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

/// Which part of which picture a sample is, in pixels, height before width: SDXL is told (Podell et al. 2023, arXiv
/// 2307.01952, section 2.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Framing {
    /// The picture before it was resized.
    pub original: [usize; 2],
    /// Top and left of what was cut out of it, after it was resized.
    pub crop: [usize; 2],
    /// What was cut out.
    pub target: [usize; 2],
}

impl Framing {
    /// A whole picture of its own size.
    pub fn whole(height: usize, width: usize) -> Self {
        Self {
            original: [height, width],
            crop: [0, 0],
            target: [height, width],
        }
    }
}

/// How images are drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleSettings {
    /// Steps, at least 1.
    pub num_inference_steps: usize,
    /// Classifier-free guidance; up to 1 there is none, as in the reference.
    pub guidance_scale: f64,
    /// Pixels, a multiple of [`LatentDiffusion::granularity`].
    pub height: usize,
    /// Pixels, a multiple of [`LatentDiffusion::granularity`].
    pub width: usize,
    /// What the images are guided away from; empty for nothing in particular.
    pub negative_prompt: String,
}

/// `side`, which is to be a multiple of `unit` pixels.
///
/// # Errors
/// When it is not.
pub(super) fn multiple_of(unit: usize, side: usize) -> Result<usize> {
    match side > 0 && unit > 0 && side.is_multiple_of(unit) {
        true => Ok(side),
        false => Err(Error::invalid(
            format!("a resolution of {side} pixels"),
            format!("choose a multiple of {unit} for this model"),
        )),
    }
}

/// The text encoders, which are to be open.
///
/// # Errors
/// When they are closed.
pub(super) fn opened<T>(text: &Option<T>) -> Result<&T> {
    text.as_ref().ok_or_else(|| Error::Invalid {
        what: "a prompt for text encoders that are closed".into(),
        hint: None,
    })
}

/// What a family adds to the autoencoder: text encoders, the network that denoises, and its schedule. The adapter, if
/// any, is on the network alone.
pub trait Denoiser: Sized + Send + Sync {
    /// Its text encoders.
    type Text;
    /// What the family is called.
    const NAME: &'static str;
    /// The network's folder in a checkpoint, and the name that adapters' files have for it.
    const COMPONENT: &'static str;
    /// Variables of a network whose own weights are trained in which nothing is learnt.
    const BUFFERS: &'static [&'static str];

    /// Opens all but the autoencoder of the model that lies as `layout` says, with the network's `weights`. What else is
    /// opened is added to `opened`, for faults to be reported together.
    fn open(layout: &Layout, weights: &Weights, opened: &mut Vec<Weights>) -> Result<Self>;

    /// The text encoders, where they are open: whoever lets go of them puts in nothing.
    fn text(&mut self) -> &mut Option<Self::Text>;

    /// Reads the text encoders, as [`Denoiser::open`] did.
    fn read_text(
        &self,
        layout: &Layout,
        weights: &Weights,
        opened: &mut Vec<Weights>,
    ) -> Result<Self::Text>;

    /// Channels of the latents.
    fn channels(&self) -> usize;

    /// Sides of latents are multiples of this.
    fn granularity(&self) -> usize;

    /// Side of the latents that the checkpoint is for.
    fn sample_size(&self) -> usize;

    /// What the text encoders say of `prompts`; at least one. A prompt's row depends on nothing else.
    /// `max_sequence_length` is that of the longest text encoder where it is not the pipeline's default.
    fn encode(
        &self,
        prompts: &[String],
        max_sequence_length: Option<usize>,
    ) -> Result<Conditioning>;

    /// What stands for no prompt, one row: the empty one, unless a family has something else.
    fn unconditional(&self, max_sequence_length: Option<usize>) -> Result<Conditioning> {
        self.encode(&[String::new()], max_sequence_length)
    }

    /// Which noise levels are learnt, and what they weigh: as `training` says, of which a family reads what it knows.
    fn set_training(&mut self, training: &Training);

    /// Noise levels and noise for latents of a shape, sample by sample.
    fn draw(
        &self,
        latents_shape: (usize, usize, usize, usize),
        generator: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<TrainingDraw>;

    /// The mean loss (a scalar, f32) of `latents` (b, c, h, w), scaled, f32, with one row of `conditioning` and one
    /// framing each.
    fn loss(
        &self,
        latents: &Tensor,
        conditioning: &Conditioning,
        framings: &[Framing],
        draw: &TrainingDraw,
    ) -> Result<Tensor>;

    /// `latents` (b, c, h, w) as diffusers' pipeline hands them over: packed for FLUX, else as they are.
    fn handed_over(&self, latents: &Tensor) -> Result<Tensor> {
        Ok(latents.clone())
    }

    /// Undoes [`Denoiser::handed_over`] for latents of `height`×`width`.
    fn taken_over(&self, latents: &Tensor, _height: usize, _width: usize) -> Result<Tensor> {
        Ok(latents.clone())
    }

    /// Latents of the shape of `noise` (b, c, h, w), f32, scaled as the network sees them, for pictures framed alike. With
    /// `negative`, as many rows and how strongly to lead away from them, steps are guided. Records no graph.
    fn denoise(
        &self,
        noise: &Tensor,
        conditioning: &Conditioning,
        negative: Option<(&Conditioning, Guidance)>,
        framing: Framing,
        num_inference_steps: usize,
    ) -> Result<Tensor>;
}

/// Pixels of the pictures that pass through the autoencoder together: of 1024×1024 it is one. At their full size it holds some
/// tensors of 256 channels, 1 GiB each for so many.
const PIXELS_AT_ONCE: usize = 1 << 20;

/// `b` pictures of `h`×`w` pixels, so many together as the autoencoder takes.
fn parts((b, h, w): (usize, usize, usize)) -> impl Iterator<Item = Range<usize>> {
    let together = (PIXELS_AT_ONCE / (h * w).max(1)).max(1);
    (0..b)
        .step_by(together)
        .map(move |start| start..b.min(start + together))
}

/// Some of the rows of `x`.
fn rows(x: &Tensor, range: Range<usize>) -> Result<Tensor> {
    Ok(x.narrow(0, range.start, range.len())?)
}

/// A whole model.
pub struct LatentDiffusion<D> {
    pub(crate) denoiser: D,
    vae: AutoencoderKl,
    /// Kept for others that are opened from the same files.
    _vae_weights: Weights,
    device: Device,
}

/// The weight files of the network of a family in `directory`, for [`LatentDiffusion::open`]. Fails where there are
/// none.
pub fn network_files<D: Denoiser>(directory: &Path) -> Result<WeightFiles> {
    Layout::open(directory)?.weights(D::COMPONENT)
}

impl<D: Denoiser> LatentDiffusion<D> {
    /// Opens the model at `directory`, in diffusers' layout or in single files (see [`Layout`]). `weights` are those of [`network_files`], frozen, with an adapter, or
    /// trainable; their precision and device are those of the text encoders too, while the autoencoder computes in f32,
    /// in which half precision would overflow. Everything that is missing or misshapen in any component is reported at
    /// once.
    pub fn open(directory: &Path, weights: &Weights) -> Result<Self> {
        let device = weights.device().clone();
        let layout = Layout::open(directory)?;
        let vae_config: autoencoder::Config = layout.config("vae")?;
        let vae_weights = layout.weights("vae")?.open(DType::F32, &device)?;
        let mut opened = vec![weights.clone(), vae_weights.clone()];
        let model = Self {
            denoiser: D::open(&layout, weights, &mut opened)?,
            vae: AutoencoderKl::new(vae_config, &vae_weights)?,
            _vae_weights: vae_weights,
            device,
        };
        weights.expect_no_others();
        finish_all(directory, &opened)?;
        Ok(model)
    }

    /// Opens the text encoders of the model at `directory` again where they were closed.
    pub(super) fn open_text(&mut self, directory: &Path, weights: &Weights) -> Result<()> {
        if self.denoiser.text().is_some() {
            return Ok(());
        }
        let mut opened = Vec::new();
        let layout = Layout::open(directory)?;
        let text = self.denoiser.read_text(&layout, weights, &mut opened)?;
        finish_all(directory, &opened)?;
        *self.denoiser.text() = Some(text);
        Ok(())
    }

    /// The autoencoder.
    pub fn vae(&self) -> &AutoencoderKl {
        &self.vae
    }

    /// Where the model computes.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Sides of images are multiples of this many pixels.
    pub fn granularity(&self) -> usize {
        self.vae.config().downscale() * self.denoiser.granularity()
    }

    /// Side in pixels of the square images that the checkpoint is for.
    pub fn resolution(&self) -> usize {
        self.vae.config().downscale() * self.denoiser.sample_size()
    }

    /// What the text encoders say of `prompts`, without a graph; at least one prompt. A prompt's row depends on
    /// nothing else, so rows may be kept. Texts are cut at the encoders' lengths.
    pub fn encode_prompts(&self, prompts: &[String]) -> Result<Conditioning> {
        nn::no_grad(|| self.denoiser.encode(prompts, None))
    }

    /// What stands for no prompt, one row: what the family's pipeline takes where no negative prompt is given.
    pub fn unconditional(&self) -> Result<Conditioning> {
        nn::no_grad(|| self.denoiser.unconditional(None))
    }

    /// [`LatentDiffusion::encode_prompts`] of one prompt, an empty one being none.
    pub fn condition(&self, prompt: &str) -> Result<Conditioning> {
        match prompt.is_empty() {
            true => self.unconditional(),
            false => self.encode_prompts(&[prompt.to_string()]),
        }
    }

    /// Mean and log-variance of the latents of `images` (b, 3, h, w) in [−1, 1], not rescaled, f32, without a graph.
    pub fn encode_images(&self, images: &Tensor) -> Result<(Tensor, Tensor)> {
        nn::no_grad(|| {
            let (b, _, h, w) = images.dims4()?;
            let parts = parts((b, h, w))
                .map(|part| self.vae.encode(&rows(images, part)?.to_dtype(DType::F32)?))
                .collect::<Result<Vec<_>>>()?;
            let (means, logvars): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
            Ok((Tensor::cat(&means, 0)?, Tensor::cat(&logvars, 0)?))
        })
    }

    /// Latents drawn from the distribution that [`LatentDiffusion::encode_images`] gives, scaled as
    /// [`LatentDiffusion::loss`] takes them.
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

    /// The training loss of a batch of whole pictures (a scalar, f32): `latents` (b, c, h, w) scaled, f32, with one row
    /// of `conditioning` each. Noise levels and noise come from `generator`, sample by sample.
    pub fn loss(
        &self,
        latents: &Tensor,
        conditioning: &Conditioning,
        generator: &mut ChaCha8Rng,
    ) -> Result<Tensor> {
        let draw = self.draw(latents, generator)?;
        let framings = vec![self.framing(latents)?; latents.dim(0)?];
        self.loss_at(latents, conditioning, &framings, &draw)
    }

    /// What [`LatentDiffusion::loss`] draws for `latents` (b, c, h, w).
    pub fn draw(&self, latents: &Tensor, generator: &mut ChaCha8Rng) -> Result<TrainingDraw> {
        self.denoiser
            .draw(latents.dims4()?, generator, latents.device())
    }

    /// [`LatentDiffusion::loss`] of pictures framed as `framings` say, with what was drawn for it.
    pub fn loss_at(
        &self,
        latents: &Tensor,
        conditioning: &Conditioning,
        framings: &[Framing],
        draw: &TrainingDraw,
    ) -> Result<Tensor> {
        self.denoiser.loss(latents, conditioning, framings, draw)
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
        let negative = self.condition(&settings.negative_prompt)?;
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
        let shape = (1, self.denoiser.channels(), height / f, width / f);
        let rows = seeds
            .iter()
            .map(|&seed| diffusion::noise(shape, &mut nn::seeded(seed, "latents"), &self.device))
            .collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&rows, 0)?)
    }

    /// [`LatentDiffusion::generate`] from `noise` (b, c, h, w) and prompts that are encoded already: b rows of
    /// `conditioning`, and of `negative` one row for all or b.
    pub fn generate_from(
        &self,
        noise: &Tensor,
        conditioning: &Conditioning,
        negative: &Conditioning,
        num_inference_steps: usize,
        guidance: impl Into<Guidance>,
    ) -> Result<Tensor> {
        let latents = self.denoise(noise, conditioning, negative, num_inference_steps, guidance)?;
        self.decode(&latents)
    }

    /// The latents of [`LatentDiffusion::generate_from`], scaled as the network sees them.
    pub fn denoise(
        &self,
        noise: &Tensor,
        conditioning: &Conditioning,
        negative: &Conditioning,
        num_inference_steps: usize,
        guidance: impl Into<Guidance>,
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
        let guidance = guidance.into();
        let guided = (guidance.scale > 1.0).then_some((&negative, guidance));
        let framing = self.framing(noise)?;
        self.denoiser
            .denoise(noise, conditioning, guided, framing, num_inference_steps)
    }

    /// The images (b, 3, height, width) in [−1, 1] of `latents` (b, c, h, w), scaled as the network sees them, without a
    /// graph.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        nn::no_grad(|| {
            let f = self.vae.config().downscale();
            let (b, _, h, w) = latents.dims4()?;
            let images = parts((b, h * f, w * f))
                .map(|part| self.vae.decode(&self.vae.unscale(&rows(latents, part)?)?))
                .collect::<Result<Vec<_>>>()?;
            Ok(Tensor::cat(&images, 0)?.clamp(-1f32, 1f32)?)
        })
    }

    /// Whole pictures with `latents` (b, c, h, w).
    fn framing(&self, latents: &Tensor) -> Result<Framing> {
        let (_, _, h, w) = latents.dims4()?;
        let f = self.vae.config().downscale();
        Ok(Framing::whole(h * f, w * f))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_pictures_pass_through_the_autoencoder_one_by_one_and_small_ones_together() {
        let cut = |b, side| parts((b, side, side)).collect::<Vec<_>>();
        assert_eq!(cut(3, 1024), [0..1, 1..2, 2..3]);
        assert_eq!(cut(2, 2048), [0..1, 1..2]);
        assert_eq!(cut(5, 512), [0..4, 4..5]);
        let whole = 0..64;
        assert_eq!(cut(64, 32), std::slice::from_ref(&whole));
    }
}
