//! Noise schedules and samplers: flow matching as Stable Diffusion 3 trains and samples with it.
//!
//! Everything here is a function of its arguments; randomness comes from the generator that is handed in, sample by
//! sample, so that a batch cut differently draws the same numbers.

mod flow_match;
mod guidance;

pub use flow_match::{Density, FlowMatchEuler, LossForm, SchedulerConfig, TimeShift, TrainingDraw};
pub use guidance::guide;

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
