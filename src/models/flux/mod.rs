//! FLUX.1 (Black Forest Labs 2024) from a directory in diffusers' layout, for example `black-forest-labs/FLUX.1-dev`:
//! `model_index.json`, `transformer/`, `vae/`, `scheduler/`, `text_encoder/` and `tokenizer/` (CLIP),
//! `text_encoder_2/` and `tokenizer_2/` (T5).

mod block;
mod text;
mod transformer;

pub use transformer::{Condition, Config, FluxTransformer, LORA_TARGETS};

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use rand_chacha::ChaCha8Rng;

use self::text::TextEncoders;
use super::autoencoder;
use super::checkpoint_files::Layout;
use super::family::{Architecture, Backbone, KnownModel, LearnerParts};
use super::latent_diffusion::{
    Conditioning, Denoiser, DiffusionLearner, Framing, LatentDiffusion, Levels, multiple_of, opened,
};
use super::reading::TextReader;
use crate::config::{
    Family, FamilySettings, Kind, Optimizer, SamplingDefaults, Training, TrainingDefaults,
    WeightingScheme,
};
use crate::diffusion::{FlowMatchEuler, Guidance, LossForm, Spacing, TrainingDraw};
use crate::hub::catalogue;
use crate::nn::{self, Weights};
use crate::{Error, Result};

/// FLUX.1: double and single stream blocks, rectified flow. It was distilled: there is no second prediction to lead away
/// from.
pub const FAMILY: Family = Family::new(&FamilySettings {
    name: "FLUX",
    kind: Kind::Diffusion,
    training: TrainingDefaults::diffusion(Optimizer::Prodigy, 1e-4, Some(WeightingScheme::None)),
    targets: &LORA_TARGETS,
    sampling: SamplingDefaults::Diffusion {
        num_inference_steps: 28,
        guidance_scale: 3.5,
        classifier_free: false,
    },
});

/// FLUX.1 in diffusers' layout.
pub static ARCHITECTURE: Architecture = Architecture {
    family: FAMILY,
    recognises: |layout| layout.is_pipeline("FluxPipeline"),
    models: &[
        KnownModel {
            name: "flux.1-dev",
            resolution: Some(512),
            directory: "datasets/checkpoints/flux.1-dev",
            hub: Some(&catalogue::FLUX_1_DEV),
            files: &[],
        },
        KnownModel {
            name: "nano-flux",
            resolution: Some(64),
            directory: "datasets/nano/checkpoints/flux",
            hub: None,
            files: &["model_index.json"],
        },
    ],
    readers: |dir, _, _| TextReader::of_encoders(text_encoders(dir)?),
    learner: Some(LearnerParts {
        open: |options| Ok(Box::new(FluxLearner::open(options)?)),
        resolution: |dir, asked| Ok(resolution(dir, asked.map(|side| side as usize))? as u32),
        backbone: |dir, _| Backbone::of_pipeline(dir, "transformer"),
        config: |_, _| Ok(None),
        tokenizer: None,
    }),
};

/// The whole model.
pub type Flux = LatentDiffusion<FluxDenoiser>;

/// The model as a learner.
pub type FluxLearner = DiffusionLearner<FluxDenoiser>;

/// Latents per side of what the pipeline packs into one token.
const PACKED: usize = 2;

/// The guidance that a training step tells the model, as diffusers' documentation trains adapters for FLUX.1-dev.
const TRAINING_GUIDANCE: f64 = 1.0;

/// The transformer with its text encoders and its schedule.
pub struct FluxDenoiser {
    text: Option<TextEncoders>,
    transformer: FluxTransformer,
    schedule: FlowMatchEuler,
    levels: Levels,
    dtype: DType,
}

/// `latents` (b, c, h, w) as the transformer reads them: (b, h/2 · w/2, 4c), the four of a 2×2 patch behind each channel.
///
/// # Errors
/// When a side is odd.
pub fn pack(latents: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = latents.dims4()?;
    if !h.is_multiple_of(PACKED) || !w.is_multiple_of(PACKED) {
        return Err(Error::invalid(
            format!("latents of {h}×{w}"),
            "FLUX packs them two by two: use even sides",
        ));
    }
    let (rows, columns) = (h / PACKED, w / PACKED);
    Ok(latents
        .reshape(&[b, c, rows, PACKED, columns, PACKED][..])?
        .permute([0, 2, 4, 1, 3, 5])?
        .contiguous()?
        .reshape((b, rows * columns, c * PACKED * PACKED))?)
}

/// Undoes [`pack`] for latents of `height`×`width`.
///
/// # Errors
/// When `packed` (b, n, 4c) is not of that size.
pub fn unpack(packed: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    let (b, n, channels) = packed.dims3()?;
    let (rows, columns, c) = (
        height / PACKED,
        width / PACKED,
        channels / (PACKED * PACKED),
    );
    if n != rows * columns {
        return Err(Error::invalid(
            format!("{n} packed tokens for latents of {height}×{width}"),
            format!("there are {} of that size", rows * columns),
        ));
    }
    Ok(packed
        .reshape(&[b, rows, columns, c, PACKED, PACKED][..])?
        .permute([0, 3, 1, 4, 2, 5])?
        .contiguous()?
        .reshape((b, c, height, width))?)
}

/// Positions of the packed tokens of latents of `height`×`width`, (n, 3): nothing, the row, the column.
///
/// # Errors
/// When there is no memory for them.
pub fn image_positions(height: usize, width: usize, device: &Device) -> Result<Tensor> {
    let (rows, columns) = (height / PACKED, width / PACKED);
    let ids: Vec<f32> = (0..rows)
        .flat_map(|row| (0..columns).flat_map(move |column| [0.0, row as f32, column as f32]))
        .collect();
    Ok(Tensor::from_vec(ids, (rows * columns, 3), device)?)
}

/// Both text encoders of the checkpoint in `directory`: what it is called, the folder of its tokenizer, and how many
/// tokens of a prompt it takes.
///
/// # Errors
/// When the config of CLIP cannot be read.
pub fn text_encoders(directory: &Path) -> Result<Vec<(&'static str, PathBuf, usize)>> {
    text::described(&Layout::open(directory)?)
}

/// Side in pixels of the square images that the checkpoint in `directory` draws: what is `asked` for, or its own.
///
/// # Errors
/// When it cannot draw such images, or its configs cannot be read.
pub fn resolution(directory: &Path, asked: Option<usize>) -> Result<usize> {
    let layout = Layout::open(directory)?;
    let config = config(&layout)?;
    let vae: autoencoder::Config = layout.config("vae")?;
    let own = vae.downscale().saturating_mul(config.side());
    multiple_of(vae.downscale() * PACKED, asked.unwrap_or(own))
}

/// The transformer's config; the pipeline's positions have three coordinates.
fn config(layout: &Layout) -> Result<Config> {
    let config: Config = layout.config("transformer")?;
    match config.axes_dims_rope.len() {
        3 => Ok(config),
        other => Err(Error::invalid(
            format!("axes_dims_rope of {other} widths"),
            "FLUX.1 has three: a position is an index, a row and a column",
        )),
    }
}

impl FluxDenoiser {
    /// The velocity at noisy latents (b, c, h, w), f32; `sigma` (b) in [0, 1].
    fn velocity(
        &self,
        noisy: &Tensor,
        sigma: &Tensor,
        guidance: f64,
        conditioning: &Conditioning,
    ) -> Result<Tensor> {
        let (b, _, h, w) = noisy.dims4()?;
        let device = noisy.device();
        let guidance = match self.transformer.config().guidance_embeds {
            true => Some(Tensor::full(guidance as f32, b, device)?),
            false => None,
        };
        let condition = Condition {
            timestep: sigma,
            guidance: guidance.as_ref(),
            encoder_hidden_states: &conditioning.context,
            pooled_projections: &conditioning.pooled,
            txt_ids: &Tensor::zeros((conditioning.context.dim(1)?, 3), DType::F32, device)?,
            img_ids: &image_positions(h, w, device)?,
        };
        let packed = pack(&noisy.to_dtype(self.dtype)?)?;
        unpack(&self.transformer.forward(&packed, &condition)?, h, w)
    }
}

impl Denoiser for FluxDenoiser {
    type Text = TextEncoders;
    const NAME: &'static str = "FLUX";
    const COMPONENT: &'static str = "transformer";
    const BUFFERS: &'static [&'static str] = &[];

    fn open(layout: &Layout, weights: &Weights, opened: &mut Vec<Weights>) -> Result<Self> {
        let config = config(layout)?;
        Ok(Self {
            text: Some(TextEncoders::open(layout, weights, opened)?),
            transformer: FluxTransformer::new(config, weights)?,
            schedule: FlowMatchEuler::new(layout.scheduler()?)?,
            levels: Levels::EVEN,
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
        self.transformer.config().in_channels / (PACKED * PACKED)
    }

    fn granularity(&self) -> usize {
        PACKED
    }

    fn sample_size(&self) -> usize {
        self.transformer.config().side()
    }

    fn encode(
        &self,
        prompts: &[String],
        max_sequence_length: Option<usize>,
    ) -> Result<Conditioning> {
        opened(&self.text)?.encode(prompts, max_sequence_length)
    }

    fn set_training(&mut self, training: &Training) {
        self.levels = Levels::of(training).unwrap_or(Levels::EVEN);
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
        let form = (LossForm::Velocity, self.levels.weighting);
        self.schedule.loss(latents, draw, form, |noisy, timesteps| {
            let sigma = self.schedule.sigma(timesteps)?;
            self.velocity(noisy, &sigma, TRAINING_GUIDANCE, conditioning)
        })
    }

    fn handed_over(&self, latents: &Tensor) -> Result<Tensor> {
        pack(latents)
    }

    fn taken_over(&self, latents: &Tensor, height: usize, width: usize) -> Result<Tensor> {
        unpack(latents, height, width)
    }

    /// The guidance scale is told to the model, which was distilled for it; there is no second prediction to lead away
    /// from, so a negative prompt has no effect.
    fn denoise(
        &self,
        noise: &Tensor,
        conditioning: &Conditioning,
        negative: Option<(&Conditioning, Guidance)>,
        _framing: Framing,
        num_inference_steps: usize,
    ) -> Result<Tensor> {
        nn::no_grad(|| {
            let (b, _, h, w) = noise.dims4()?;
            let guidance = negative.map_or(1.0, |(_, guidance)| guidance.scale);
            let tokens = (h / PACKED) * (w / PACKED);
            let velocity = |latents: &Tensor, sigma| {
                let sigma = Tensor::full(sigma, b, noise.device())?;
                self.velocity(latents, &sigma, guidance, conditioning)
            };
            self.schedule.follow(
                noise,
                num_inference_steps,
                tokens,
                Spacing::Inverse,
                velocity,
            )
        })
    }
}
