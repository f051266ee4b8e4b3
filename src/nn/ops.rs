//! The functions that layers and models are made of. Each has a right gradient for every argument that is tracked
//! and computes none for an argument that is not. Weights are taken through [`super::parameter`], so that nothing
//! is recorded inside [`super::no_grad`].

use candle_core::Tensor;

use super::{parameter, plain};
use crate::Result;

/// Zeros around the two spatial dimensions of a convolution's input.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Padding {
    /// The same number on all four sides.
    Same(usize),
    /// One on the right and one at the bottom: the downsampling of VQGAN-like encoders.
    RightBottom,
}

/// What an attention's scores are masked with.
#[derive(Debug, Clone)]
pub enum Mask {
    None,
    /// Query i of n sees key j of m when j ≤ i + (m − n).
    Causal,
    /// Added to the scaled scores; shape (1 or b, 1 or h, n, m), −∞ hides a key. A row must not hide every key.
    /// Receives a gradient where it is tracked.
    Additive(Tensor),
}

/// `x` (…, inputs) · `weight` (outputs, inputs)ᵀ + `bias` (outputs).
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    plain::linear(x, &parameter(weight), bias.map(parameter).as_ref())
}

/// [`linear`] plus `scale · (x·aᵀ)·bᵀ` with `a` (rank, inputs) and `b` (outputs, rank).
pub fn linear_lora(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    a: &Tensor,
    b: &Tensor,
    scale: f64,
) -> Result<Tensor> {
    plain::linear_lora(
        x,
        &parameter(weight),
        bias.map(parameter).as_ref(),
        &parameter(a),
        &parameter(b),
        scale,
    )
}

/// `x` (b, c, h, w) convolved with `weight` (outputs, c, k, k).
pub fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    stride: usize,
    padding: Padding,
) -> Result<Tensor> {
    plain::conv2d(
        x,
        &parameter(weight),
        bias.map(parameter).as_ref(),
        stride,
        padding,
    )
}

/// softmax(scale · q·kᵀ + mask) · v. `q` (b, h, n, d), `k` and `v` (b, h, m, d); result (b, h, n, d).
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, mask: &Mask) -> Result<Tensor> {
    plain::attention(q, k, v, scale, mask)
}

/// `(x − mean) / √(variance + eps) · weight + bias` over the last dimension.
pub fn layer_norm(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<Tensor> {
    plain::layer_norm(
        x,
        weight.map(parameter).as_ref(),
        bias.map(parameter).as_ref(),
        eps,
    )
}

/// `x / √(mean(x²) + eps) · weight` over the last dimension, normalised in f32.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    plain::rms_norm(x, &parameter(weight), eps)
}

/// Group normalisation of `x` (b, c, …); `weight` and `bias` (c).
pub fn group_norm(
    x: &Tensor,
    groups: usize,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
) -> Result<Tensor> {
    plain::group_norm(x, groups, &parameter(weight), &parameter(bias), eps)
}

/// SiLU of [`group_norm`].
pub fn group_norm_silu(
    x: &Tensor,
    groups: usize,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
) -> Result<Tensor> {
    silu(&group_norm(x, groups, weight, bias, eps)?)
}

/// `x · sigmoid(x)`.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    Ok(x.silu()?)
}

/// GELU in the tanh approximation (torch's `approximate="tanh"`, T5's `gelu_new`).
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    Ok(x.gelu()?)
}

/// GELU with the error function.
pub fn gelu_erf(x: &Tensor) -> Result<Tensor> {
    Ok(x.gelu_erf()?)
}

/// `x · sigmoid(1.702·x)`, CLIP's activation.
pub fn quick_gelu(x: &Tensor) -> Result<Tensor> {
    plain::quick_gelu(x)
}

/// `silu(gate) · up`, elementwise.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    plain::swiglu(gate, up)
}

/// Rotary embedding of `x` (b, h, n, d), pairs (2i, 2i+1); `cos` and `sin` (n, d/2).
pub fn rope_adjacent(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    plain::rope_adjacent(x, cos, sin)
}

/// Rotary embedding of `x` (b, h, n, d), pairs (i, i + d/2); `cos` and `sin` (n, d/2).
pub fn rope_halves(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    plain::rope_halves(x, cos, sin)
}

/// −log softmax(logits)[target] for each row. `logits` (n, v), `targets` (n) of u32; result (n), f32.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    plain::cross_entropy(logits, targets)
}

/// Each pixel of `x` (b, c, h, w) four times: (b, c, 2h, 2w).
pub fn upsample_nearest2x(x: &Tensor) -> Result<Tensor> {
    plain::upsample_nearest2x(x)
}
