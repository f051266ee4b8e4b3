//! Rectified flow with a shifted schedule (Esser et al. 2024, arXiv 2403.03206), in the numbers of diffusers'
//! `FlowMatchEulerDiscreteScheduler` and `train_dreambooth_lora_sd3.py`.

use std::ops::Range;

use candle_core::{Device, Tensor};
use rand::Rng;
use rand_distr::{Distribution, StandardNormal};
use serde::{Deserialize, Serialize};

use super::noise;
use crate::{Error, Result};

/// A table is made of them; all published schedules have 1000.
pub(super) const MOST_TIMESTEPS: usize = 1 << 20;

/// `scheduler/scheduler_config.json`; the defaults are diffusers'.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SchedulerConfig {
    /// Number of noise levels that training draws from.
    pub num_train_timesteps: usize,
    /// How far the levels are moved towards noise: `σ' = shift · σ / (1 + (shift − 1) · σ)` (section 5.3.2).
    pub shift: f64,
    /// The sampler's levels are moved by the image's size in place of `shift`, and the training levels not at all (FLUX).
    pub use_dynamic_shifting: bool,
    /// The logarithm of the shift for `base_image_seq_len` tokens.
    pub base_shift: f64,
    /// The logarithm of the shift for `max_image_seq_len` tokens.
    pub max_shift: f64,
    /// Tokens of the smallest image that the shift was chosen for.
    pub base_image_seq_len: usize,
    /// Tokens of the largest.
    pub max_image_seq_len: usize,
    /// How levels are moved by the image's size.
    pub time_shift_type: TimeShift,
    /// Not supported.
    pub use_karras_sigmas: bool,
    /// Not supported.
    pub use_exponential_sigmas: bool,
    /// Not supported.
    pub use_beta_sigmas: bool,
    /// Not supported.
    pub invert_sigmas: bool,
    /// Not supported.
    pub stochastic_sampling: bool,
    /// Not supported.
    pub shift_terminal: Option<f64>,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self {
            num_train_timesteps: 1000,
            shift: 1.0,
            use_dynamic_shifting: false,
            base_shift: 0.5,
            max_shift: 1.15,
            base_image_seq_len: 256,
            max_image_seq_len: 4096,
            time_shift_type: TimeShift::Exponential,
            use_karras_sigmas: false,
            use_exponential_sigmas: false,
            use_beta_sigmas: false,
            invert_sigmas: false,
            stochastic_sampling: false,
            shift_terminal: None,
        }
    }
}

/// How levels are moved by the image's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimeShift {
    /// `σ' = e^μ / (e^μ + 1/σ − 1)`.
    #[default]
    Exponential,
    /// Not supported.
    Linear,
}

/// How a pipeline spaces the levels of its sampler, before they are moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spacing {
    /// Evenly between the ends of the training table, which `shift` has moved already: what published samples of SD3
    /// were made with.
    Table,
    /// Evenly from 1 to 1/steps (`FluxPipeline`).
    Inverse,
}

/// How training draws its noise levels: u in [0, 1], which grows as noise lessens (Esser et al. 2024, section 3.1; diffusers'
/// `compute_density_for_timestep_sampling`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Density {
    /// u = sigmoid(N(mean, std²)): equation 19.
    LogitNormal { mean: f64, std: f64 },
    /// Equation 20.
    Mode { scale: f64 },
    /// u uniform in [0, 1).
    Uniform,
}

impl Density {
    /// SD3's own.
    pub const STANDARD: Self = Self::LogitNormal {
        mean: 0.0,
        std: 1.0,
    };

    /// u from a number that was drawn from N(0, 1) for a logit-normal density, else evenly from [0, 1).
    pub fn u(self, drawn: f64) -> f64 {
        match self {
            Self::LogitNormal { mean, std } => 1.0 / (1.0 + (-(mean + std * drawn)).exp()),
            Self::Mode { scale } => {
                let cosine = (std::f64::consts::FRAC_PI_2 * drawn).cos();
                1.0 - drawn - scale * (cosine * cosine - 1.0 + drawn)
            }
            Self::Uniform => drawn,
        }
    }

    fn draw(self, generator: &mut impl Rng) -> f64 {
        self.u(match self {
            Self::LogitNormal { .. } => StandardNormal.sample(generator),
            Self::Mode { .. } | Self::Uniform => generator.random(),
        })
    }
}

/// What the loss of a noise level σ is multiplied with (diffusers' `compute_loss_weighting_for_sd3`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Weighting {
    #[default]
    One,
    /// 1 / σ².
    SigmaSqrt,
    /// 2 / (π (1 − 2σ + 2σ²)).
    Cosmap,
}

impl Weighting {
    /// The weight at `sigma`, above 0.
    pub fn at(self, sigma: f32) -> f32 {
        match self {
            Self::One => 1.0,
            Self::SigmaSqrt => sigma.powi(-2),
            Self::Cosmap => {
                2.0 / (std::f32::consts::PI * (1.0 - 2.0 * sigma + 2.0 * sigma * sigma))
            }
        }
    }
}

/// What the training loss compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossForm {
    /// The clean latents that the velocity implies, `x_σ − σ·v`, with the clean latents: the velocity loss weighted
    /// by σ² (diffusers' `precondition_outputs=1`, its default).
    #[default]
    Preconditioned,
    /// The velocity with `noise − latents` (equation 13 with weight 1).
    Velocity,
}

/// What one training step draws, one entry for each sample of its batch.
#[derive(Debug, Clone)]
pub struct TrainingDraw {
    /// Index into the schedule's table: descending noise levels of flow matching, timesteps of a discrete schedule.
    pub indices: Vec<usize>,
    /// Shape of the latents, f32.
    pub noise: Tensor,
}

impl TrainingDraw {
    /// For each sample of `latents_shape` (b, c, h, w) what `index` draws, then its noise.
    ///
    /// # Errors
    /// None that a caller can cause.
    pub(super) fn each<R: Rng>(
        (b, c, h, w): (usize, usize, usize, usize),
        generator: &mut R,
        device: &Device,
        index: impl Fn(&mut R) -> usize,
    ) -> Result<Self> {
        let mut indices = Vec::with_capacity(b);
        let mut rows = Vec::with_capacity(b);
        for _ in 0..b {
            indices.push(index(generator));
            rows.push(noise((1, c, h, w), generator, device)?);
        }
        let noise = Tensor::cat(&rows, 0)?;
        Ok(Self { indices, noise })
    }

    /// Those of some samples.
    ///
    /// # Errors
    /// When there are not as many.
    pub fn rows(&self, samples: Range<usize>) -> Result<Self> {
        Ok(Self {
            noise: self.noise.narrow(0, samples.start, samples.len())?,
            indices: self.indices.get(samples).unwrap_or_default().to_vec(),
        })
    }
}

/// The schedule of a rectified-flow model and the Euler sampler.
#[derive(Debug, Clone)]
pub struct FlowMatchEuler {
    config: SchedulerConfig,
    /// Shifted, from 1 down.
    table: Vec<f32>,
}

impl FlowMatchEuler {
    /// Fails for settings that change the schedule in ways that are not implemented.
    pub fn new(config: SchedulerConfig) -> Result<Self> {
        let unsupported = [
            (
                "time_shift_type to linear",
                config.use_dynamic_shifting && config.time_shift_type == TimeShift::Linear,
            ),
            ("use_karras_sigmas", config.use_karras_sigmas),
            ("use_exponential_sigmas", config.use_exponential_sigmas),
            ("use_beta_sigmas", config.use_beta_sigmas),
            ("invert_sigmas", config.invert_sigmas),
            ("stochastic_sampling", config.stochastic_sampling),
            (
                "shift_terminal",
                config.shift_terminal.is_some_and(|to| to != 0.0),
            ),
        ];
        if let Some((name, _)) = unsupported.iter().find(|(_, is_set)| *is_set) {
            return Err(Error::invalid(
                format!("scheduler_config.json sets {name}, which is not supported"),
                "set it to false, or remove it: Stable Diffusion 3, 3.5 and FLUX.1 are published without it",
            ));
        }
        let steps = config.num_train_timesteps;
        if !(1..=MOST_TIMESTEPS).contains(&steps)
            || !config.shift.is_finite()
            || config.shift <= 0.0
        {
            return Err(Error::invalid(
                format!(
                    "a schedule of {steps} timesteps with shift {}",
                    config.shift
                ),
                format!("num_train_timesteps must be from 1 to {MOST_TIMESTEPS} and shift above 0"),
            ));
        }
        let sizes = (config.base_image_seq_len, config.max_image_seq_len);
        let shifts = [config.base_shift, config.max_shift];
        if config.use_dynamic_shifting
            && (sizes.0 >= sizes.1 || !shifts.iter().all(|s| s.is_finite()))
        {
            return Err(Error::invalid(
                format!(
                    "a schedule that is shifted from {} to {} tokens",
                    sizes.0, sizes.1
                ),
                "max_image_seq_len must be above base_image_seq_len, and base_shift and max_shift numbers",
            ));
        }
        // in f32 like the reference, so that the tables are equal to the bit
        let shift = match config.use_dynamic_shifting {
            true => 1.0,
            false => config.shift,
        };
        let table = (1..=steps)
            .rev()
            .map(|t| t as f32 / steps as f32)
            .map(|sigma| shift as f32 * sigma / (1.0 + (shift - 1.0) as f32 * sigma))
            .collect();
        Ok(Self { config, table })
    }

    /// The noise levels that training draws from, descending from 1, `num_train_timesteps` of them.
    pub fn training_sigmas(&self) -> &[f32] {
        &self.table
    }

    /// The levels of a sampler of `num_inference_steps` steps on an image of `tokens` patches: as many, then 0. They are
    /// spaced as the pipeline spaces them, then moved: by the image's size where the schedule says so, else by its
    /// `shift`. Fails for 0 steps.
    pub fn sigmas(
        &self,
        num_inference_steps: usize,
        tokens: usize,
        spacing: Spacing,
    ) -> Result<Vec<f32>> {
        let (Some(&first), Some(&last), true) = (
            self.table.first(),
            self.table.last(),
            num_inference_steps > 0,
        ) else {
            return Err(Error::invalid(
                "num_inference_steps 0",
                "take at least one step",
            ));
        };
        let steps = self.config.num_train_timesteps as f64;
        // Timesteps for the one, levels for the other, as the reference computes them.
        let (start, stop, unit) = match spacing {
            Spacing::Table => (f64::from(first) * steps, f64::from(last) * steps, steps),
            Spacing::Inverse => (1.0, 1.0 / num_inference_steps as f64, 1.0),
        };
        let gaps = num_inference_steps - 1;
        let even = |i: usize| match i {
            0 => start,
            _ if i == gaps => stop,
            _ => start + (stop - start) / gaps as f64 * i as f64,
        };
        let levels = (0..num_inference_steps).map(|i| match spacing {
            Spacing::Table => self.moved(even(i) / unit, tokens) as f32,
            // In f32, as the pipeline hands them over.
            Spacing::Inverse => self.moved(f64::from(even(i) as f32), tokens) as f32,
        });
        Ok(levels.chain([0.0]).collect())
    }

    /// `sigma` moved towards noise.
    fn moved(&self, sigma: f64, tokens: usize) -> f64 {
        let config = &self.config;
        if !config.use_dynamic_shifting {
            return config.shift * sigma / (1.0 + (config.shift - 1.0) * sigma);
        }
        let (least, most) = (
            config.base_image_seq_len as f64,
            config.max_image_seq_len as f64,
        );
        let slope = (config.max_shift - config.base_shift) / (most - least);
        let moved = (tokens as f64 * slope + config.base_shift - slope * least).exp();
        moved / (moved + (1.0 / sigma - 1.0))
    }

    /// The timestep that the model is told at noise level `sigma`: `σ · num_train_timesteps`.
    pub fn timestep(&self, sigma: f32) -> f32 {
        sigma * self.config.num_train_timesteps as f32
    }

    /// The noise levels of `timesteps`: what [`FlowMatchEuler::timestep`] undoes.
    ///
    /// # Errors
    /// None that a caller can cause.
    pub fn sigma(&self, timesteps: &Tensor) -> Result<Tensor> {
        Ok((timesteps / self.config.num_train_timesteps as f64)?)
    }

    /// One Euler step along the flow, `x + (σ_next − σ) · velocity`. Both tensors f32 of one shape.
    pub fn step(
        &self,
        velocity: &Tensor,
        sample: &Tensor,
        sigma: f32,
        sigma_next: f32,
    ) -> Result<Tensor> {
        let difference = f64::from(sigma_next - sigma);
        Ok((sample + (velocity * difference)?)?)
    }

    /// Follows the flow from `noise` (b, c, h, w), f32, to latents: `velocity` gives what the model says of the latents
    /// at a σ. `tokens` is what the model makes of a picture, for the shift.
    ///
    /// # Errors
    /// Those of [`FlowMatchEuler::sigmas`] and of `velocity`.
    pub fn follow(
        &self,
        noise: &Tensor,
        num_inference_steps: usize,
        tokens: usize,
        spacing: Spacing,
        mut velocity: impl FnMut(&Tensor, f32) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let mut latents = noise.clone();
        for pair in self
            .sigmas(num_inference_steps, tokens, spacing)?
            .windows(2)
        {
            let velocity = velocity(&latents, pair[0])?.to_dtype(noise.dtype())?;
            latents = self.step(&velocity, &latents, pair[0], pair[1])?;
        }
        Ok(latents)
    }

    /// Draws the level and the noise of each sample of `latents_shape` (b, c, h, w): for one sample after another, u by
    /// `density`, index ⌊u · n⌋ into the descending table, then its noise.
    pub fn draw(
        &self,
        latents_shape: (usize, usize, usize, usize),
        density: Density,
        generator: &mut impl Rng,
        device: &Device,
    ) -> Result<TrainingDraw> {
        let count = self.table.len();
        TrainingDraw::each(latents_shape, generator, device, |generator| {
            ((density.draw(generator) * count as f64) as usize).min(count - 1)
        })
    }

    /// The loss of a batch: the mean over all elements of the squared difference that `form` names, times `weighting`.
    /// `latents` (b, c, h, w), scaled as the model sees them, f32; `predict` gives the
    /// velocity of noisy latents (b, c, h, w) at timesteps (b). The result is a scalar with a gradient to whatever
    /// `predict` depends on.
    pub fn loss(
        &self,
        latents: &Tensor,
        draw: &TrainingDraw,
        (form, weighting): (LossForm, Weighting),
        predict: impl FnOnce(&Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let b = latents.dim(0)?;
        let sigmas: Vec<f32> = draw
            .indices
            .iter()
            .filter_map(|&index| self.table.get(index).copied())
            .collect();
        if sigmas.len() != b {
            return Err(Error::invalid(
                format!("{} noise levels for {b} samples", sigmas.len()),
                "draw one index below num_train_timesteps for each sample",
            ));
        }
        let weights: Vec<f32> = sigmas.iter().map(|&sigma| weighting.at(sigma)).collect();
        let timesteps: Vec<f32> = sigmas.iter().map(|&sigma| self.timestep(sigma)).collect();
        let timesteps = Tensor::from_vec(timesteps, b, latents.device())?;
        let sigmas = Tensor::from_vec(sigmas, (b, 1, 1, 1), latents.device())?;
        let clean = latents.broadcast_mul(&sigmas.affine(-1.0, 1.0)?)?;
        let noisy = (clean + draw.noise.broadcast_mul(&sigmas)?)?;
        let velocity = predict(&noisy, &timesteps)?.to_dtype(latents.dtype())?;
        let difference = match form {
            LossForm::Preconditioned => ((&noisy - velocity.broadcast_mul(&sigmas)?)? - latents)?,
            LossForm::Velocity => (velocity - (&draw.noise - latents)?)?,
        };
        let squared = difference.sqr()?;
        let squared = match weighting {
            Weighting::One => squared,
            Weighting::SigmaSqrt | Weighting::Cosmap => squared
                .broadcast_mul(&Tensor::from_vec(weights, (b, 1, 1, 1), latents.device())?)?,
        };
        Ok(squared.mean_all()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    #[test]
    fn the_draw_of_a_sample_does_not_depend_on_the_samples_after_it() -> Result<()> {
        let schedule = FlowMatchEuler::new(SchedulerConfig::default())?;
        let draw = |b: usize| {
            let mut generator = ChaCha8Rng::seed_from_u64(3);
            schedule.draw(
                (b, 2, 3, 3),
                Density::STANDARD,
                &mut generator,
                &Device::Cpu,
            )
        };
        let (one, three) = (draw(1)?, draw(3)?);
        assert_eq!(one.indices[0], three.indices[0]);
        let row = three
            .noise
            .narrow(0, 0, 1)?
            .flatten_all()?
            .to_vec1::<f32>()?;
        assert_eq!(one.noise.flatten_all()?.to_vec1::<f32>()?, row);
        Ok(())
    }

    #[test]
    fn drawn_levels_follow_the_logit_normal_density() -> Result<()> {
        let schedule = FlowMatchEuler::new(SchedulerConfig::default())?;
        let mut generator = ChaCha8Rng::seed_from_u64(4);
        let draw = schedule.draw(
            (20_000, 1, 1, 1),
            Density::STANDARD,
            &mut generator,
            &Device::Cpu,
        )?;
        // P(u < 0.25) of a logit-normal with mean 0 and deviation 1 is Φ(ln(1/3)) = 0.1360
        let below = draw.indices.iter().filter(|&&index| index < 250).count();
        assert!((below as f64 / 20_000.0 - 0.1360).abs() < 0.01, "{below}");
        Ok(())
    }

    /// diffusers' values: `calculate_shift(1024)` is 0.63, and four steps at that size.
    #[test]
    fn levels_are_moved_by_the_images_size_as_flux_has_them() -> Result<()> {
        let schedule = FlowMatchEuler::new(SchedulerConfig {
            shift: 3.0,
            use_dynamic_shifting: true,
            ..SchedulerConfig::default()
        })?;
        let unmoved = FlowMatchEuler::new(SchedulerConfig::default())?;
        for (schedule, spacing, expected) in [
            (
                &schedule,
                Spacing::Inverse,
                [1.0, 0.8492348, 0.6524894, 0.3849447, 0.0],
            ),
            // SD3's pipeline with the same schedule.
            (
                &schedule,
                Spacing::Table,
                [1.0, 0.7899539, 0.4849674, 0.0018760, 0.0],
            ),
            // FLUX.1-schnell.
            (&unmoved, Spacing::Inverse, [1.0, 0.75, 0.5, 0.25, 0.0]),
        ] {
            let levels = schedule.sigmas(4, 1024, spacing)?;
            assert_eq!(levels.len(), 5);
            for (level, expected) in levels.iter().zip(expected) {
                assert!((level - expected).abs() < 1e-6, "{levels:?}");
            }
        }
        // Training does not move them.
        assert_eq!(schedule.training_sigmas()[499], 0.501);
        Ok(())
    }

    #[test]
    fn an_unsupported_schedule_is_refused_by_name() {
        let config = SchedulerConfig {
            use_karras_sigmas: true,
            ..SchedulerConfig::default()
        };
        let error = FlowMatchEuler::new(config)
            .map(|_| ())
            .unwrap_err()
            .to_string();
        assert!(error.contains("use_karras_sigmas"), "{error}");
    }
}
