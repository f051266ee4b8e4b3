//! The noise levels that samplers of discrete diffusion models step through, in the numbers of diffusers.
//! σ = √((1 − ᾱ) / ᾱ) is the noise beside a sample of its own variance.

use super::ddpm::{
    BetaSchedule, DiscreteConfig, FinalSigma, Interpolation, SamplerKind, TimestepSpacing,
};
use super::dpm_solver;
use crate::{Error, Result};

/// What [`DiscreteConfig::levels`] gives.
#[derive(Debug, Clone, PartialEq)]
pub struct Levels {
    /// What the model is told before each step.
    pub timesteps: Vec<f32>,
    /// σ before each step, and after the last.
    pub sigmas: Vec<f32>,
    /// What noise of variance 1 is multiplied with before the first step.
    pub init_noise_sigma: f32,
}

impl DiscreteConfig {
    /// Fails where [`DiscreteConfig::check`] does, and where pictures cannot be drawn with the config's sampler.
    pub fn check_sampler(&self) -> Result<()> {
        self.check()?;
        match self.class_name {
            SamplerKind::EulerDiscreteScheduler => Ok(()),
            SamplerKind::DPMSolverMultistepScheduler => dpm_solver::check(self),
            SamplerKind::Other => Err(unknown_sampler()),
        }
    }

    /// The levels of `num_inference_steps` steps of the config's sampler.
    ///
    /// # Errors
    /// For no steps, more steps than the schedule has, and a sampler that is not known here.
    pub fn levels(&self, num_inference_steps: usize) -> Result<Levels> {
        self.check()?;
        if num_inference_steps == 0 || num_inference_steps > self.num_train_timesteps {
            return Err(Error::invalid(
                format!("num_inference_steps {num_inference_steps}"),
                format!("take from 1 to {} steps", self.num_train_timesteps),
            ));
        }
        let table = self.sigmas();
        let (timesteps, mut sigmas) = match self.class_name {
            SamplerKind::EulerDiscreteScheduler => self.euler_levels(&table, num_inference_steps),
            SamplerKind::DPMSolverMultistepScheduler => {
                self.dpm_levels(&table, num_inference_steps)?
            }
            SamplerKind::Other => return Err(unknown_sampler()),
        };
        sigmas.push(match self.final_sigmas_type {
            FinalSigma::Zero => 0.0,
            FinalSigma::SigmaMin => f64::from(table[0]),
        });
        let sigmas: Vec<f32> = sigmas.into_iter().map(|sigma| sigma as f32).collect();
        let largest = sigmas.iter().copied().fold(0.0, f32::max);
        let init_noise_sigma = match (self.class_name, self.timestep_spacing) {
            (SamplerKind::EulerDiscreteScheduler, TimestepSpacing::Leading) => {
                (largest * largest + 1.0).sqrt()
            }
            (SamplerKind::EulerDiscreteScheduler, _) => largest,
            _ => 1.0,
        };
        Ok(Levels {
            timesteps,
            sigmas,
            init_noise_sigma,
        })
    }

    /// σ of each timestep, ascending.
    fn sigmas(&self) -> Vec<f32> {
        let mut levels = self.alphas_cumprod();
        if let (Some(last), true) = (levels.last_mut(), self.rescale_betas_zero_snr) {
            // Not quite nothing, so that σ is finite.
            *last = 2f32.powi(-24);
        }
        levels.iter().map(|a| ((1.0 - a) / a).sqrt()).collect()
    }

    fn euler_levels(&self, table: &[f32], steps: usize) -> (Vec<f32>, Vec<f64>) {
        let count = self.num_train_timesteps;
        let timesteps: Vec<f32> = match self.timestep_spacing {
            TimestepSpacing::Linspace => {
                let gap = (count - 1) as f64 / (steps - 1).max(1) as f64;
                let at = |i: usize| match i {
                    // numpy's last point is the end itself.
                    _ if i > 0 && i + 1 == steps => (count - 1) as f32,
                    _ => (i as f64 * gap) as f32,
                };
                (0..steps).rev().map(at).collect()
            }
            TimestepSpacing::Leading => {
                let ratio = count / steps;
                let at = |i: usize| (i * ratio + self.steps_offset) as f32;
                (0..steps).rev().map(at).collect()
            }
            TimestepSpacing::Trailing => trailing(count, count, steps),
        };
        let mut sigmas: Vec<f64> = match self.interpolation_type {
            Interpolation::Linear => timesteps.iter().map(|&t| interpolated(table, t)).collect(),
            Interpolation::LogLinear => {
                let (first, last) = (f64::from(table[0]).ln(), f64::from(table[count - 1]).ln());
                let at = |i: usize| last + (first - last) / steps as f64 * i as f64;
                (0..=steps).map(|i| at(i).exp()).collect()
            }
        };
        let mut timesteps = timesteps;
        if self.use_karras_sigmas {
            let ends = (sigmas[sigmas.len() - 1], sigmas[0]);
            sigmas = self.karras(ends, steps);
            timesteps = sigmas.iter().map(|&s| timestep(table, s) as f32).collect();
        }
        // With levels by their logarithms there is one more than timesteps, and the last step is never taken.
        (timesteps, sigmas)
    }

    fn dpm_levels(&self, table: &[f32], steps: usize) -> Result<(Vec<f32>, Vec<f64>)> {
        let count = self.num_train_timesteps;
        if self.use_karras_sigmas {
            let ends = (f64::from(table[0]), f64::from(table[count - 1]));
            let sigmas = self.karras(ends, steps);
            let timesteps = sigmas
                .iter()
                .map(|&sigma| match self.beta_schedule {
                    BetaSchedule::SquaredcosCapV2 => timestep(table, sigma).trunc() as f32,
                    _ => timestep(table, sigma).round_ties_even() as f32,
                })
                .collect();
            return Ok((timesteps, sigmas));
        }
        let clipped = |lambda_min: f64| {
            let below = |&&sigma: &&f32| -f64::from(sigma).ln() < lambda_min;
            table.iter().filter(below).count()
        };
        let last = count - self.lambda_min_clipped.map_or(0, clipped);
        if last < 2 {
            return Err(Error::invalid(
                "lambda_min_clipped of scheduler_config.json leaves no timesteps",
                "lower it",
            ));
        }
        let timesteps: Vec<f32> = match self.timestep_spacing {
            TimestepSpacing::Linspace => {
                let gap = (last - 1) as f64 / steps as f64;
                let at = |i: usize| match i {
                    _ if i == steps => (last - 1) as f32,
                    _ => (i as f64 * gap).round_ties_even() as f32,
                };
                (1..=steps).rev().map(at).collect()
            }
            TimestepSpacing::Leading => {
                let ratio = last / (steps + 1);
                let at = |i: usize| (i * ratio + self.steps_offset) as f32;
                (1..=steps).rev().map(at).collect()
            }
            TimestepSpacing::Trailing => trailing(last, count, steps),
        };
        let sigmas = timesteps.iter().map(|&t| interpolated(table, t)).collect();
        Ok((timesteps, sigmas))
    }

    /// `steps` levels from the larger of `ends` to the smaller, evenly by their seventh roots (Karras et al. 2022, arXiv
    /// 2206.00364, equation 5).
    fn karras(&self, (smallest, largest): (f64, f64), steps: usize) -> Vec<f64> {
        const RHO: f64 = 7.0;
        let root = |sigma: f64| sigma.powf(1.0 / RHO);
        let last = root(self.sigma_min.unwrap_or(smallest));
        let first = root(self.sigma_max.unwrap_or(largest));
        let gaps = (steps - 1).max(1) as f64;
        (0..steps)
            .map(|i| (first + i as f64 / gaps * (last - first)).powf(RHO))
            .collect()
    }
}

fn unknown_sampler() -> Error {
    Error::invalid(
        "scheduler_config.json names a sampler that is not known here",
        "set _class_name to EulerDiscreteScheduler or DPMSolverMultistepScheduler",
    )
}

/// Timesteps from the last, `start`, down by `count / steps`.
fn trailing(start: usize, count: usize, steps: usize) -> Vec<f32> {
    let ratio = count as f64 / steps as f64;
    let total = (start as f64 / ratio).ceil() as usize;
    (0..total)
        .map(|i| (start as f64 - i as f64 * ratio).round_ties_even() as f32 - 1.0)
        .collect()
}

/// The level of timestep `t`, which need not be whole.
fn interpolated(table: &[f32], t: f32) -> f64 {
    let last = table.len() - 1;
    let t = f64::from(t).clamp(0.0, last as f64);
    let below = (t as usize).min(last.saturating_sub(1));
    let (from, to) = (f64::from(table[below]), f64::from(table[below + 1]));
    from + (to - from) * (t - below as f64)
}

/// The timestep of level `sigma`, between those of the table by logarithms.
fn timestep(table: &[f32], sigma: f64) -> f64 {
    let log = sigma.max(1e-10).ln();
    let logs = |i: usize| f64::from(table[i].ln());
    let reached = (0..table.len()).take_while(|&i| logs(i) <= log).count();
    let low = reached.saturating_sub(1).min(table.len() - 2);
    let share = (logs(low) - log) / (logs(low) - logs(low + 1));
    low as f64 + share.clamp(0.0, 1.0)
}
