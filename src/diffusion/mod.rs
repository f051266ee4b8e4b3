//! Noise schedules and samplers: flow matching as Stable Diffusion 3 trains and samples with it, and discrete
//! denoising diffusion as Stable Diffusion XL does.
//!
//! Everything here is a function of its arguments; randomness comes from the generator that is handed in, sample by
//! sample, so that a batch cut differently draws the same numbers.

mod ddpm;
mod dpm_solver;
mod euler;
mod flow_match;
mod guidance;
mod levels;

pub use ddpm::{
    BetaSchedule, Ddpm, DiscreteConfig, FinalSigma, Interpolation, PredictionType, SamplerKind,
    TimestepSpacing,
};
pub use dpm_solver::dpm_solver_2m;
pub use euler::euler;
pub use flow_match::{
    Density, FlowMatchEuler, LossForm, SchedulerConfig, Spacing, TimeShift, TrainingDraw, Weighting,
};
pub use guidance::{Guidance, guide};
pub use levels::Levels;

use candle_core::{Device, Shape, Tensor};
use rand::Rng;
use rand_distr::{Distribution, StandardNormal};

use crate::Result;

/// Independent draws from N(0, 1), f32, in row-major order of `shape`.
pub fn noise(shape: impl Into<Shape>, generator: &mut impl Rng, device: &Device) -> Result<Tensor> {
    let shape = shape.into();
    let values: Vec<f32> = (0..shape.elem_count())
        .map(|_| StandardNormal.sample(generator))
        .collect();
    Ok(Tensor::from_vec(values, shape, device)?)
}
