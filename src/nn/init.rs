//! How weights start that no checkpoint gives.

use candle_core::{Device, Shape, Tensor};
use rand::Rng;
use rand_distr::{Distribution, Normal, Uniform};

use super::adapter::seeded;
use super::cuda;
use crate::{Error, Result};

/// How a trainable weight starts when no checkpoint gives it.
#[derive(Debug, Clone, Copy)]
pub enum Init {
    /// 0 everywhere.
    Zeros,
    /// 1 everywhere.
    Ones,
    /// This value everywhere.
    Constant(f64),
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
    /// Uniform in ±bound.
    Uniform(f64),
}

impl Init {
    /// Normal with variance 1 / `inputs`.
    pub fn fan_in(inputs: usize) -> Self {
        Init::Normal((1.0 / inputs as f64).sqrt())
    }
}

/// A tensor drawn as `init` says, by a generator seeded with `seed` and its `name`.
pub(super) fn draw(
    shape: &Shape,
    init: Init,
    seed: u64,
    name: &str,
    device: &Device,
) -> Result<Tensor> {
    /// So many random numbers of a tensor on a card are made there, in another way than the processor's.
    const MANY: usize = 1 << 20;
    let count = shape.elem_count();
    let mut generator = seeded(seed, name);
    if let Init::Normal(deviation) = init
        && device.is_cuda()
        && count >= MANY
    {
        let seed = generator.random();
        return Ok(cuda::rows::normal(shape, deviation, seed, device)?);
    }
    let values: Vec<f32> = match init {
        Init::Zeros => vec![0.0; count],
        Init::Ones => vec![1.0; count],
        Init::Constant(value) => vec![value as f32; count],
        Init::Normal(deviation) => {
            let normal = Normal::new(0f32, deviation as f32).map_err(|_| {
                Error::invalid(
                    format!("standard deviation {deviation} for {name}"),
                    "must be finite",
                )
            })?;
            (0..count).map(|_| normal.sample(&mut generator)).collect()
        }
        Init::Uniform(bound) => {
            let uniform = Uniform::new_inclusive(-bound as f32, bound as f32).map_err(|_| {
                Error::invalid(
                    format!("bound {bound} for {name}"),
                    "must be finite and not negative",
                )
            })?;
            (0..count).map(|_| uniform.sample(&mut generator)).collect()
        }
    };
    Ok(Tensor::from_vec(values, shape, device)?)
}
