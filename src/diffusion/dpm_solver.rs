use candle_core::Tensor;

use super::ddpm::{DiscreteConfig, FinalSigma, PredictionType};
use crate::{Error, Result};

/// DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2), as diffusers' `DPMSolverMultistepScheduler` with
/// its midpoint solver. `noise` (b, c, h, w), N(0, 1), f32, becomes a sample of the same shape in
/// `num_inference_steps` steps. `predict` gives the model's output, f32, for a noisy sample of variance about 1 and a
/// timestep.
///
/// # Errors
/// Where `config` asks for another variant, another order than 1 or 2, or levels that there are not.
pub fn dpm_solver_2m(
    config: &DiscreteConfig,
    num_inference_steps: usize,
    noise: &Tensor,
    mut predict: impl FnMut(&Tensor, f32) -> Result<Tensor>,
) -> Result<Tensor> {
    check(config)?;
    let levels = config.levels(num_inference_steps)?;
    let count = levels.timesteps.len();
    // Signal and noise at level σ of a sample whose variance stays 1, and half the log signal-to-noise ratio.
    let parts = |sigma: f32| {
        let sigma = f64::from(sigma);
        let signal = 1.0 / (sigma * sigma + 1.0).sqrt();
        (signal, sigma * signal, -sigma.ln())
    };
    let mut sample = (noise * f64::from(levels.init_noise_sigma))?;
    let mut before: Option<(Tensor, f64)> = None;
    for (i, (&timestep, pair)) in levels
        .timesteps
        .iter()
        .zip(levels.sigmas.windows(2))
        .enumerate()
    {
        let (signal, grain, lambda) = parts(pair[0]);
        let (next_signal, next_grain, next_lambda) = parts(pair[1]);
        let output = predict(&sample, timestep)?;
        let clean = match config.prediction_type {
            PredictionType::Epsilon => ((&sample - (output * grain)?)? / signal)?,
            PredictionType::VPrediction => ((&sample * signal)? - (output * grain)?)?,
            PredictionType::Sample => output,
        };
        let h = next_lambda - lambda;
        let is_last = i + 1 == count;
        let first_order = config.solver_order == 1
            || is_last
                && (config.euler_at_final
                    || config.lower_order_final && count < 15
                    || config.final_sigmas_type == FinalSigma::Zero);
        let data = match &before {
            Some((earlier, earlier_lambda)) if !first_order => {
                let r = (lambda - earlier_lambda) / h;
                (&clean + ((&clean - earlier)? * (0.5 / r))?)?
            }
            _ => clean.clone(),
        };
        sample = ((&sample * (next_grain / grain))? - (data * (next_signal * (-h).exp_m1()))?)?;
        before = Some((clean, lambda));
    }
    Ok(sample)
}

pub(super) fn check(config: &DiscreteConfig) -> Result<()> {
    let fits = config.algorithm_type == "dpmsolver++"
        && config.solver_type == "midpoint"
        && matches!(config.solver_order, 1 | 2);
    if fits {
        return Ok(());
    }
    Err(Error::invalid(
        format!(
            "scheduler_config.json asks for {} of order {} with the {} solver",
            config.algorithm_type, config.solver_order, config.solver_type
        ),
        "dpmsolver++ of order 1 or 2 with the midpoint solver is what is built",
    ))
}
