use candle_core::Tensor;

use super::ddpm::PredictionType;
use super::levels::Levels;
use crate::Result;

/// Euler's method on the probability flow (Karras et al. 2022, arXiv 2206.00364, algorithm 2 without its second order
/// and its churn), as diffusers' `EulerDiscreteScheduler`. `noise` (b, c, h, w), N(0, 1), f32, becomes a sample of the
/// same shape. `predict` gives the model's output, f32, for a noisy sample of variance about 1 and a timestep.
pub fn euler(
    levels: &Levels,
    prediction: PredictionType,
    noise: &Tensor,
    mut predict: impl FnMut(&Tensor, f32) -> Result<Tensor>,
) -> Result<Tensor> {
    let mut sample = (noise * f64::from(levels.init_noise_sigma))?;
    for (&timestep, pair) in levels.timesteps.iter().zip(levels.sigmas.windows(2)) {
        let (sigma, next) = (f64::from(pair[0]), f64::from(pair[1]));
        let spread = sigma * sigma + 1.0;
        let output = predict(&(&sample / spread.sqrt())?, timestep)?;
        let clean = match prediction {
            PredictionType::Epsilon => (&sample - (output * sigma)?)?,
            PredictionType::VPrediction => {
                ((output * (-sigma / spread.sqrt()))? + (&sample / spread)?)?
            }
            PredictionType::Sample => output,
        };
        let derivative = ((&sample - clean)? / sigma)?;
        sample = (sample + (derivative * (next - sigma))?)?;
    }
    Ok(sample)
}
