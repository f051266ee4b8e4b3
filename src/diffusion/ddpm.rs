//! Denoising diffusion on a discrete schedule (Ho et al. 2020, arXiv 2006.11239), as Stable Diffusion up to XL trains
//! and is published: the noise levels, what the model predicts, and the training loss, in the numbers of diffusers'
//! schedulers and `train_dreambooth_lora_sdxl.py`.

use candle_core::{Device, Tensor};
use rand::Rng;
use serde::{Deserialize, Serialize};

use super::TrainingDraw;
use super::flow_match::MOST_TIMESTEPS;
use crate::{Error, Result};

/// `scheduler/scheduler_config.json` of such a model, whichever sampler it names; the defaults are diffusers'.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DiscreteConfig {
    /// The sampler.
    #[serde(rename = "_class_name")]
    pub class_name: SamplerKind,
    /// Number of noise levels.
    pub num_train_timesteps: usize,
    /// Variance that the first step adds.
    pub beta_start: f64,
    /// Variance that the last step adds.
    pub beta_end: f64,
    /// How the variances go from one to the other.
    pub beta_schedule: BetaSchedule,
    /// The variances themselves, in place of the three settings above.
    pub trained_betas: Option<Vec<f32>>,
    /// What the model gives.
    pub prediction_type: PredictionType,
    /// Which timesteps a sampler takes.
    pub timestep_spacing: TimestepSpacing,
    /// Added to the timesteps of leading spacing.
    pub steps_offset: usize,
    /// Whether the last level is moved to pure noise (Lin et al. 2023, arXiv 2305.08891, algorithm 1).
    pub rescale_betas_zero_snr: bool,
    /// Whether a sampler's levels follow Karras et al. 2022 instead of its timesteps.
    pub use_karras_sigmas: bool,
    /// Smallest level of Karras' schedule; absent means the model's.
    pub sigma_min: Option<f64>,
    /// Largest level of Karras' schedule; absent means the model's.
    pub sigma_max: Option<f64>,
    /// The level after a sampler's last step.
    pub final_sigmas_type: FinalSigma,
    /// How levels between timesteps are found.
    pub interpolation_type: Interpolation,
    /// Order of DPM-Solver, 1 or 2.
    pub solver_order: usize,
    /// Variant of DPM-Solver.
    pub algorithm_type: String,
    /// Kind of DPM-Solver's second order.
    pub solver_type: String,
    /// Whether DPM-Solver's last step is of first order where there are fewer than 15.
    pub lower_order_final: bool,
    /// Whether DPM-Solver's last step is of first order in any case.
    pub euler_at_final: bool,
    /// DPM-Solver leaves out timesteps whose log signal-to-noise ratio, halved, is below this; absent means none. JSON
    /// has no word for the −∞ that diffusers writes, see [`finite`].
    #[serde(deserialize_with = "finite")]
    pub lambda_min_clipped: Option<f64>,
    /// Not supported.
    pub use_exponential_sigmas: bool,
    /// Not supported.
    pub use_beta_sigmas: bool,
    /// Not supported.
    pub use_lu_lambdas: bool,
    /// Not supported.
    pub use_flow_sigmas: bool,
    /// Not supported.
    pub thresholding: bool,
    /// `discrete`; others are not supported.
    pub timestep_type: String,
}

/// diffusers' samplers that are known here; [`SamplerKind::Other`] can be trained with, but draws nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum SamplerKind {
    #[default]
    EulerDiscreteScheduler,
    DPMSolverMultistepScheduler,
    #[serde(other)]
    Other,
}

/// How a variance for each timestep is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BetaSchedule {
    /// Evenly.
    #[default]
    Linear,
    /// Evenly by their roots: Stable Diffusion's.
    ScaledLinear,
    /// By the cosine of Nichol and Dhariwal 2021, arXiv 2102.09672, equation 17.
    SquaredcosCapV2,
}

/// What the model gives, for a sample `x_t = √ᾱ·x + √(1 − ᾱ)·ε`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PredictionType {
    /// The noise ε.
    #[default]
    Epsilon,
    /// `√ᾱ·ε − √(1 − ᾱ)·x` (Salimans and Ho 2022, arXiv 2202.00512, appendix D).
    VPrediction,
    /// The clean sample x.
    Sample,
}

/// Which of the timesteps are taken (table 2 of arXiv 2305.08891).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimestepSpacing {
    #[default]
    Linspace,
    Leading,
    Trailing,
}

/// Where a sampler ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinalSigma {
    /// At the clean sample.
    #[default]
    Zero,
    /// At the first level of the schedule.
    SigmaMin,
}

/// How Euler's levels are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Interpolation {
    /// Those of the timesteps, between them linearly.
    #[default]
    Linear,
    /// Evenly by their logarithms, whatever the timesteps.
    LogLinear,
}

impl Default for DiscreteConfig {
    fn default() -> Self {
        Self {
            class_name: SamplerKind::default(),
            num_train_timesteps: 1000,
            beta_start: 0.0001,
            beta_end: 0.02,
            beta_schedule: BetaSchedule::default(),
            trained_betas: None,
            prediction_type: PredictionType::default(),
            timestep_spacing: TimestepSpacing::default(),
            steps_offset: 0,
            rescale_betas_zero_snr: false,
            use_karras_sigmas: false,
            sigma_min: None,
            sigma_max: None,
            final_sigmas_type: FinalSigma::default(),
            interpolation_type: Interpolation::default(),
            solver_order: 2,
            algorithm_type: "dpmsolver++".to_string(),
            solver_type: "midpoint".to_string(),
            lower_order_final: true,
            euler_at_final: false,
            lambda_min_clipped: None,
            use_exponential_sigmas: false,
            use_beta_sigmas: false,
            use_lu_lambdas: false,
            use_flow_sigmas: false,
            thresholding: false,
            timestep_type: "discrete".to_string(),
        }
    }
}

/// A number, or nothing where diffusers wrote its −∞ as text.
fn finite<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Option<f64>, D::Error> {
    match serde_json::Value::deserialize(deserializer)? {
        serde_json::Value::Null => Ok(None),
        serde_json::Value::String(text) if text.trim_start().starts_with("-inf") => Ok(None),
        other => match other.as_f64() {
            Some(number) => Ok(Some(number)),
            None => Err(serde::de::Error::custom(format!("{other} is no number"))),
        },
    }
}

impl DiscreteConfig {
    /// Fails for settings that change the levels in ways that are not implemented.
    pub fn check(&self) -> Result<()> {
        let unsupported = [
            ("use_exponential_sigmas", self.use_exponential_sigmas),
            ("use_beta_sigmas", self.use_beta_sigmas),
            ("use_lu_lambdas", self.use_lu_lambdas),
            ("use_flow_sigmas", self.use_flow_sigmas),
            ("thresholding", self.thresholding),
            ("timestep_type", self.timestep_type != "discrete"),
        ];
        if let Some((name, _)) = unsupported.iter().find(|(_, is_set)| *is_set) {
            return Err(Error::invalid(
                format!("scheduler_config.json sets {name}, which is not supported"),
                "remove it from scheduler/scheduler_config.json: Stable Diffusion XL is published without it",
            ));
        }
        let betas = self.trained_betas.as_ref().map(Vec::len);
        if !(2..=MOST_TIMESTEPS).contains(&self.num_train_timesteps)
            || betas.is_some_and(|count| count != self.num_train_timesteps)
        {
            return Err(Error::invalid(
                format!(
                    "a schedule of {} timesteps with {} trained_betas",
                    self.num_train_timesteps,
                    betas.map_or("no".to_string(), |count| count.to_string())
                ),
                format!(
                    "num_train_timesteps is from 2 to {MOST_TIMESTEPS}, and there are as many trained_betas, if any"
                ),
            ));
        }
        let trained = self
            .trained_betas
            .iter()
            .flatten()
            .map(|beta| f64::from(*beta));
        let mut betas = [self.beta_start, self.beta_end].into_iter().chain(trained);
        if let Some(beta) = betas.find(|beta| !(*beta > 0.0 && *beta < 1.0)) {
            return Err(Error::invalid(
                format!("scheduler_config.json has a beta of {beta}"),
                "beta_start, beta_end and trained_betas are above 0 and below 1",
            ));
        }
        if self.steps_offset >= self.num_train_timesteps {
            return Err(Error::invalid(
                format!(
                    "scheduler_config.json has a steps_offset of {}",
                    self.steps_offset
                ),
                "it is below num_train_timesteps: Stable Diffusion XL has 1",
            ));
        }
        Ok(())
    }

    /// β of each timestep, in f32 like the reference.
    fn betas(&self) -> Vec<f32> {
        if let Some(betas) = &self.trained_betas {
            return betas.clone();
        }
        let count = self.num_train_timesteps;
        match self.beta_schedule {
            BetaSchedule::Linear => linspace(self.beta_start, self.beta_end, count),
            BetaSchedule::ScaledLinear => {
                let roots = linspace(self.beta_start.sqrt(), self.beta_end.sqrt(), count);
                roots.into_iter().map(|root| root * root).collect()
            }
            BetaSchedule::SquaredcosCapV2 => {
                let remaining = |t: f64| {
                    let angle = (t + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2;
                    angle.cos().powi(2)
                };
                (0..count)
                    .map(|i| {
                        let (from, to) = (i as f64 / count as f64, (i + 1) as f64 / count as f64);
                        (1.0 - remaining(to) / remaining(from)).min(0.999) as f32
                    })
                    .collect()
            }
        }
    }

    /// ᾱ of each timestep: the share of the sample's variance that is left of what went in. With
    /// `rescale_betas_zero_snr` the last is 0.
    pub fn alphas_cumprod(&self) -> Vec<f32> {
        let product = |betas: &[f32]| -> Vec<f32> {
            let mut product = 1.0f64;
            let next = |beta: &f32| {
                product *= f64::from(1.0 - beta);
                product as f32
            };
            betas.iter().map(next).collect()
        };
        let levels = product(&self.betas());
        let (Some(&first), Some(&last), true) =
            (levels.first(), levels.last(), self.rescale_betas_zero_snr)
        else {
            return levels;
        };
        let (first, last) = (first.sqrt(), last.sqrt());
        let moved: Vec<f32> = levels
            .iter()
            .map(|level| ((level.sqrt() - last) * (first / (first - last))).powi(2))
            .collect();
        // By way of β, as the reference does it.
        let before = std::iter::once(1.0).chain(moved.iter().copied());
        let betas: Vec<f32> = moved
            .iter()
            .zip(before)
            .map(|(level, before)| 1.0 - level / before)
            .collect();
        product(&betas)
    }
}

/// `count` numbers from `start` to `end`, at least two, each computed from the nearer end in f32 as torch does.
fn linspace(start: f64, end: f64, count: usize) -> Vec<f32> {
    let (start, end) = (start as f32, end as f32);
    let step = (end - start) / (count - 1) as f32;
    (0..count)
        .map(|i| match i < count / 2 {
            true => start + step * i as f32,
            false => end - step * (count - 1 - i) as f32,
        })
        .collect()
}

/// What training needs of the schedule: `DDPMScheduler` of diffusers.
#[derive(Debug, Clone)]
pub struct Ddpm {
    alphas_cumprod: Vec<f32>,
    prediction: PredictionType,
    /// Min-SNR weights (Hang et al. 2023, arXiv 2303.09556, section 3.4): each sample's loss times `min(SNR, γ) / SNR`, and
    /// for v-prediction plus 1, as the script has it.
    pub snr_gamma: Option<f64>,
}

impl Ddpm {
    /// Fails where [`DiscreteConfig::check`] does.
    pub fn new(config: &DiscreteConfig) -> Result<Self> {
        config.check()?;
        Ok(Self {
            alphas_cumprod: config.alphas_cumprod(),
            prediction: config.prediction_type,
            snr_gamma: None,
        })
    }

    /// ᾱ of each timestep.
    pub fn alphas_cumprod(&self) -> &[f32] {
        &self.alphas_cumprod
    }

    /// Draws the timestep and the noise of each sample of `latents_shape` (b, c, h, w): for one sample after another, a
    /// timestep, all equally likely, then its noise.
    pub fn draw(
        &self,
        latents_shape: (usize, usize, usize, usize),
        generator: &mut impl Rng,
        device: &Device,
    ) -> Result<TrainingDraw> {
        let count = self.alphas_cumprod.len();
        TrainingDraw::each(latents_shape, generator, device, |generator| {
            generator.random_range(0..count)
        })
    }

    /// The loss of a batch: the mean over all elements of the squared difference of what the model gives and what
    /// [`PredictionType`] says, times the weights of [`Ddpm::snr_gamma`]. `latents` (b, c, h, w), scaled as the
    /// model sees them, f32; `predict` gives the model's output for noisy latents (b, c, h, w) at timesteps (b). The
    /// result is a scalar with a gradient to whatever `predict` depends on.
    ///
    /// # Errors
    /// When `draw` is not of as many samples.
    pub fn loss(
        &self,
        latents: &Tensor,
        draw: &TrainingDraw,
        predict: impl FnOnce(&Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let b = latents.dim(0)?;
        let levels: Vec<f32> = draw
            .indices
            .iter()
            .filter_map(|&index| self.alphas_cumprod.get(index).copied())
            .collect();
        if levels.len() != b {
            return Err(Error::invalid(
                format!("{} timesteps for {b} samples", levels.len()),
                "draw one below num_train_timesteps for each sample",
            ));
        }
        let column = |of: &dyn Fn(f32) -> f32| {
            let values: Vec<f32> = levels.iter().map(|&level| of(level)).collect();
            Tensor::from_vec(values, (b, 1, 1, 1), latents.device())
        };
        let (signal, grain) = (
            column(&|level| level.sqrt())?,
            column(&|l| (1.0 - l).sqrt())?,
        );
        let noise = &draw.noise;
        let noisy = (latents.broadcast_mul(&signal)? + noise.broadcast_mul(&grain)?)?;
        let timesteps: Vec<f32> = draw.indices.iter().map(|&index| index as f32).collect();
        let timesteps = Tensor::from_vec(timesteps, b, latents.device())?;
        let target = match self.prediction {
            PredictionType::Epsilon => noise.clone(),
            PredictionType::Sample => latents.clone(),
            PredictionType::VPrediction => {
                (noise.broadcast_mul(&signal)? - latents.broadcast_mul(&grain)?)?
            }
        };
        let output = predict(&noisy, &timesteps)?.to_dtype(latents.dtype())?;
        let squared = (output - target)?.sqr()?;
        let squared = match self.snr_gamma {
            Some(gamma) => {
                squared.broadcast_mul(&column(&|level| self.weight(level, gamma) as f32)?)?
            }
            None => squared,
        };
        Ok(squared.mean_all()?)
    }

    /// The weight of a sample at level `level`.
    fn weight(&self, level: f32, gamma: f64) -> f64 {
        let level = f64::from(level);
        let snr = level / (1.0 - level);
        // Where nothing is left of the sample, the limit.
        let weight = if snr > 0.0 { snr.min(gamma) / snr } else { 1.0 };
        match self.prediction {
            PredictionType::VPrediction => weight + 1.0,
            PredictionType::Epsilon | PredictionType::Sample => weight,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    #[test]
    fn the_draw_of_a_sample_does_not_depend_on_the_samples_after_it() -> Result<()> {
        let schedule = Ddpm::new(&DiscreteConfig::default())?;
        let draw = |b: usize| {
            let mut generator = ChaCha8Rng::seed_from_u64(3);
            schedule.draw((b, 2, 3, 3), &mut generator, &Device::Cpu)
        };
        let (one, three) = (draw(1)?, draw(3)?);
        assert_eq!(one.indices[0], three.indices[0]);
        let values = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
        assert_eq!(values(&one.noise)?, values(&three.noise.narrow(0, 0, 1)?)?);
        Ok(())
    }

    #[test]
    fn all_timesteps_are_drawn_equally_often() -> Result<()> {
        let config = DiscreteConfig {
            num_train_timesteps: 10,
            ..DiscreteConfig::default()
        };
        let mut generator = ChaCha8Rng::seed_from_u64(4);
        let shape = (20_000, 1, 1, 1);
        let draw = Ddpm::new(&config)?.draw(shape, &mut generator, &Device::Cpu)?;
        for timestep in 0..10 {
            let count = draw.indices.iter().filter(|&&t| t == timestep).count();
            assert!((1800..2200).contains(&count), "{timestep}: {count}");
        }
        Ok(())
    }

    #[test]
    fn settings_that_would_change_the_levels_are_refused_by_name() {
        for key in ["use_beta_sigmas", "thresholding"] {
            let config = serde_json::json!({key: true, "lambda_min_clipped": "-inf"});
            let config: DiscreteConfig = serde_json::from_value(config).unwrap();
            let error = Ddpm::new(&config).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
    }
}
