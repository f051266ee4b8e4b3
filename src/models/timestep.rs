//! How denoisers are told numbers, such as the timestep: sines and cosines, then two linear layers.

use candle_core::{DType, Tensor};

use super::encoder::Activation;
use crate::Result;
use crate::nn::{Linear, Weights};

/// Which numbers [`Sinusoid::embed`] makes of one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sinusoid {
    /// Width of the result; an odd one ends with a zero.
    pub channels: usize,
    /// Cosines before sines (diffusers' `flip_sin_to_cos`).
    pub cosines_first: bool,
    /// How many steps before the end of the frequencies 1/10000 would be (diffusers' `freq_shift`).
    pub shift: f64,
}

impl Sinusoid {
    /// Sines and cosines of each of `values` (n) at half as many frequencies as there are channels, from 1 down to about
    /// 1/10000 (Ho et al. 2020, arXiv 2006.11239, as diffusers' `get_timestep_embedding` orders them). Values need not
    /// be whole; the result is (n, channels), f32.
    pub fn embed(self, values: &Tensor) -> Result<Tensor> {
        let half = self.channels / 2;
        let last = (half as f64 - self.shift) as f32;
        let frequencies: Vec<f32> = (0..half)
            .map(|i| (-(10000f32.ln()) * i as f32 / last).exp())
            .collect();
        let frequencies = Tensor::from_vec(frequencies, (1, half), values.device())?;
        let angles = values
            .to_dtype(DType::F32)?
            .unsqueeze(1)?
            .broadcast_mul(&frequencies)?;
        let (sin, cos) = (angles.sin()?, angles.cos()?);
        let both = match self.cosines_first {
            true => Tensor::cat(&[cos, sin], 1)?,
            false => Tensor::cat(&[sin, cos], 1)?,
        };
        Ok(both.pad_with_zeros(1, 0, self.channels - 2 * half)?)
    }
}

/// Two linear layers with an activation between them: diffusers' `TimestepEmbedding`.
pub struct TimestepEmbedding {
    linear_1: Linear,
    linear_2: Linear,
    activation: Activation,
}

impl TimestepEmbedding {
    /// Takes `linear_1` (`width`, `inputs`) and `linear_2` (`width`, `width`), both with biases.
    pub fn new(
        inputs: usize,
        width: usize,
        activation: Activation,
        weights: &Weights,
    ) -> Result<Self> {
        Ok(Self {
            linear_1: Linear::new(inputs, width, true, &weights.pp("linear_1"))?,
            linear_2: Linear::new(width, width, true, &weights.pp("linear_2"))?,
            activation,
        })
    }

    /// `x` (b, inputs) to (b, width).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let hidden = self.activation.forward(&self.linear_1.forward(x)?)?;
        self.linear_2.forward(&hidden)
    }
}
