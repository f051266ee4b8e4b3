//! The functions that layers and models are made of. Each has a right gradient for every argument that is tracked
//! and computes none for an argument that is not. Weights are taken through [`super::parameter`], so that nothing
//! is recorded inside [`super::no_grad`].

use std::borrow::Cow;

use candle_core::{DType, Tensor};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::cpu::activation::{Gelu, GeluErf, QuickGelu, Silu, activation, gated};
use super::cpu::rope::{Pairing, rope};
use super::cpu::takes;
use super::cuda::activation::Activation;
use super::{HalfMatrix, Lora, QuantisedMatrix, Weight, cpu, cuda, layout, parameter, plain};
use crate::{Error, Result};

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
    /// Every query sees every key.
    None,
    /// Query i of n sees key j of m when j ≤ i + (m − n).
    Causal,
    /// Added to the scaled scores; shape (1 or b, 1 or h, 1 or n, m), −∞ hides a key. A row must not hide every key.
    /// Receives a gradient where it is tracked.
    Additive(Tensor),
    /// [`Mask::Causal`] with this added to the scores of each key, shape (1 or b, 1, 1, m), −∞ hides it; but every
    /// query sees its own key, that of j = i + (m − n), as it is, so that padding at the start leaves no row empty.
    CausalKeys(Tensor),
}

/// `x` (…, inputs) · `weight` (outputs, inputs)ᵀ + `bias` (outputs).
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (weight, bias) = (parameter(weight), bias.map(parameter));
    let bias = bias.as_ref();
    if takes([x, &weight].into_iter().chain(bias)) {
        return Ok(cpu::linear::linear(x, &weight.into(), bias, None)?);
    }
    if cuda::takes([x, &weight].into_iter().chain(bias)) {
        return Ok(cuda::linear::linear(x, &weight, bias)?);
    }
    plain::linear(x, &weight, bias)
}

/// [`linear`] and, where there is one, the adapter's addition. With a weight in half precision or in blocks the arithmetic
/// is in `x`'s type, and the result is that of the widened weight.
pub fn adapted_linear(
    x: &Tensor,
    weight: &Weight,
    bias: Option<&Tensor>,
    lora: Option<&Lora>,
) -> Result<Tensor> {
    if matches!(weight, Weight::Tensor(_)) || !takes([x].into_iter().chain(bias)) {
        let weight = match weight {
            Weight::Half(half) => Cow::Owned(half.to_tensor()?.to_dtype(x.dtype())?),
            Weight::Quantised(packed) => Cow::Owned(packed.to_dtype(x.dtype())?),
            _ => weight.to_tensor()?,
        };
        return match lora {
            None => linear(x, &weight, bias),
            Some(lora) => linear_lora(x, &weight, bias, &lora.a, &lora.b, lora.scale),
        };
    }
    let factors = lora.map(|lora| [&*lora.a, &*lora.b].map(parameter));
    let factors = factors.as_ref().zip(lora);
    let factors = factors.map(|([a, b], lora)| (a, b, lora.scale));
    let bias = bias.map(parameter);
    Ok(cpu::linear::linear(x, weight, bias.as_ref(), factors)?)
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
    let (weight, bias) = (parameter(weight), bias.map(parameter));
    let (a, b) = (parameter(a), parameter(b));
    let bias = bias.as_ref();
    if takes([x, &weight, &a, &b].into_iter().chain(bias)) {
        let factors = Some((&a, &b, scale));
        return Ok(cpu::linear::linear(x, &weight.into(), bias, factors)?);
    }
    if cuda::takes([x, &weight].into_iter().chain(bias)) && cuda::takes_factors(x, &a, &b) {
        let factors = (&a, &b);
        return Ok(cuda::linear::linear_lora(x, &weight, bias, factors, scale)?);
    }
    plain::linear_lora(x, &weight, bias, &a, &b, scale)
}

/// `x` (b, c, h, w) convolved with `weight` (outputs, c, k, k).
pub fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    stride: usize,
    padding: Padding,
) -> Result<Tensor> {
    let (weight, bias) = (parameter(weight), bias.map(parameter));
    let bias = bias.as_ref();
    if takes([x, &weight].into_iter().chain(bias)) {
        return Ok(cpu::conv::conv2d(x, &weight, bias, stride, padding)?);
    }
    plain::conv2d(x, &weight, bias, stride, padding)
}

/// softmax(scale · q·kᵀ + mask) · v. `q` (b, h, n, d), `k` and `v` (b, h, m, d); result (b, h, n, d). Views whose
/// last dimension is adjacent, such as a transposed (b, n, h, d), are read in place.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, mask: &Mask) -> Result<Tensor> {
    if takes([q, k, v]) && cpu::attention::takes_mask(mask, q.dim(2)?, k.dim(2)?) {
        return Ok(cpu::attention::attention(q, k, v, scale, mask)?);
    }
    if cuda::takes([q, k, v]) && cuda::attention::takes_mask(mask, q, k) {
        return Ok(cuda::attention::attention(q, k, v, scale, mask)?);
    }
    plain::attention(q, k, v, scale, mask)
}

/// Softmax over the last dimension.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    if takes([x]) {
        return Ok(cpu::softmax::softmax(x)?);
    }
    if cuda::takes([x]) {
        return Ok(cuda::softmax::softmax(x)?);
    }
    plain::softmax(x)
}

/// `(x − mean) / √(variance + eps) · weight + bias` over the last dimension.
pub fn layer_norm(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<Tensor> {
    let (weight, bias) = (weight.map(parameter), bias.map(parameter));
    let (weight, bias) = (weight.as_ref(), bias.as_ref());
    if takes([x].into_iter().chain(weight).chain(bias)) {
        return Ok(cpu::norm::norm(x, weight, bias, eps, true)?);
    }
    if cuda::takes([x].into_iter().chain(weight).chain(bias)) {
        return Ok(cuda::norm::norm(x, weight, bias, eps, true)?);
    }
    plain::layer_norm(x, weight, bias, eps)
}

/// `x / √(mean(x²) + eps) · weight` over the last dimension, normalised in f32.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let weight = parameter(weight);
    if takes([x, &weight]) {
        return Ok(cpu::norm::norm(x, Some(&weight), None, eps, false)?);
    }
    if cuda::takes([x, &weight]) {
        return Ok(cuda::norm::norm(x, Some(&weight), None, eps, false)?);
    }
    plain::rms_norm(x, &weight, eps)
}

/// Group normalisation of `x` (b, c, …); `weight` and `bias` (c).
pub fn group_norm(
    x: &Tensor,
    groups: usize,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
) -> Result<Tensor> {
    let (weight, bias) = (parameter(weight), parameter(bias));
    if takes([x, &weight, &bias]) {
        return Ok(cpu::group_norm::group_norm(
            x, groups, &weight, &bias, eps, false,
        )?);
    }
    if cuda::takes([x, &weight, &bias]) {
        return Ok(cuda::norm::group_norm(
            x, groups, &weight, &bias, eps, false,
        )?);
    }
    plain::group_norm(x, groups, &weight, &bias, eps)
}

/// SiLU of [`group_norm`].
pub fn group_norm_silu(
    x: &Tensor,
    groups: usize,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
) -> Result<Tensor> {
    let (weight, bias) = (parameter(weight), parameter(bias));
    if takes([x, &weight, &bias]) {
        return Ok(cpu::group_norm::group_norm(
            x, groups, &weight, &bias, eps, true,
        )?);
    }
    if cuda::takes([x, &weight, &bias]) {
        return Ok(cuda::norm::group_norm(
            x, groups, &weight, &bias, eps, true,
        )?);
    }
    Ok(plain::group_norm(x, groups, &weight, &bias, eps)?.silu()?)
}

/// `x · sigmoid(x)`.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    if takes([x]) {
        return Ok(activation::<Silu>(x)?);
    }
    if cuda::takes([x]) {
        return Ok(cuda::activation::activation(x, Activation::Silu)?);
    }
    Ok(x.silu()?)
}

/// GELU in the tanh approximation (torch's `approximate="tanh"`, T5's `gelu_new`).
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    if takes([x]) {
        return Ok(activation::<Gelu>(x)?);
    }
    if cuda::takes([x]) {
        return Ok(cuda::activation::activation(x, Activation::Gelu)?);
    }
    Ok(x.gelu()?)
}

/// GELU with the error function.
pub fn gelu_erf(x: &Tensor) -> Result<Tensor> {
    if takes([x]) {
        return Ok(activation::<GeluErf>(x)?);
    }
    if cuda::takes([x]) {
        return Ok(cuda::activation::activation(x, Activation::GeluErf)?);
    }
    Ok(x.gelu_erf()?)
}

/// `x · sigmoid(1.702·x)`, CLIP's activation.
pub fn quick_gelu(x: &Tensor) -> Result<Tensor> {
    if takes([x]) {
        return Ok(activation::<QuickGelu>(x)?);
    }
    if cuda::takes([x]) {
        return Ok(cuda::activation::activation(x, Activation::QuickGelu)?);
    }
    plain::quick_gelu(x)
}

/// `silu(gate) · up`, elementwise.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if takes([gate, up]) {
        return Ok(gated::<Silu>(gate, up)?);
    }
    if cuda::takes([gate, up]) {
        return Ok(cuda::activation::gated(gate, up, Activation::Silu)?);
    }
    plain::swiglu(gate, up)
}

/// `value · gelu(gate)` with the tanh approximation, elementwise: the feed-forward of T5 1.1.
pub fn geglu_tanh(value: &Tensor, gate: &Tensor) -> Result<Tensor> {
    if takes([value, gate]) {
        return Ok(gated::<Gelu>(gate, value)?);
    }
    if cuda::takes([value, gate]) {
        return Ok(cuda::activation::gated(gate, value, Activation::Gelu)?);
    }
    plain::geglu_tanh(value, gate)
}

/// Rotary embedding of `x` (b, h, n, d), pairs (2i, 2i+1); `cos` and `sin` (n, d/2), in whose type it is turned. The
/// result has the type of `x`.
pub fn rope_adjacent(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    if takes([x, cos, sin]) && !cos.track_op() && !sin.track_op() {
        return Ok(rope(x, cos, sin, Pairing::Adjacent)?);
    }
    if cuda::rope::takes_angles(x, cos, sin) {
        return Ok(cuda::rope::rope(x, cos, sin, true)?);
    }
    let turned = plain::rope_adjacent(&x.to_dtype(cos.dtype())?, cos, sin)?;
    Ok(turned.to_dtype(x.dtype())?)
}

/// Rotary embedding of `x` (b, h, n, d), pairs (i, i + d/2); types as in [`rope_adjacent`].
pub fn rope_halves(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    if takes([x, cos, sin]) && !cos.track_op() && !sin.track_op() {
        return Ok(rope(x, cos, sin, Pairing::Halves)?);
    }
    if cuda::rope::takes_angles(x, cos, sin) {
        return Ok(cuda::rope::rope(x, cos, sin, false)?);
    }
    let turned = plain::rope_halves(&x.to_dtype(cos.dtype())?, cos, sin)?;
    Ok(turned.to_dtype(x.dtype())?)
}

/// Heads of `x` (b, h, m, d), each `times` over in its place: (b, h · times, m, d). Keys and values that serve several
/// query heads.
pub fn repeat_heads(x: &Tensor, times: usize) -> Result<Tensor> {
    if times == 1 {
        return Ok(x.clone());
    }
    let (b, h, m, d) = x.dims4()?;
    Ok(x.unsqueeze(2)?
        .broadcast_as((b, h, times, m, d))?
        .contiguous()?
        .reshape((b, h * times, m, d))?)
}

/// −log softmax(logits)[target] for each row. `logits` (n, v), `targets` (n) of u32; result (n), f32.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    if takes([logits]) {
        return Ok(cpu::softmax::cross_entropy(logits, targets)?);
    }
    if cuda::takes([logits]) {
        return Ok(cuda::softmax::cross_entropy(logits, targets)?);
    }
    plain::cross_entropy(logits, targets)
}

/// The rows of `weight` (count, width) that `ids` (…) of u32 name: (…, width).
pub fn embedding(weight: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let weight = parameter(weight);
    if takes([&weight]) {
        return Ok(cpu::embedding::embedding(&weight, ids)?);
    }
    if cuda::takes([&weight]) {
        return Ok(cuda::embedding::embedding(&weight, ids)?);
    }
    plain::embedding(&weight, ids)
}

/// [`embedding`] in a frozen table of half precision, (count, width); the result is in f32.
pub fn half_embedding(weight: &HalfMatrix, ids: &Tensor) -> Result<Tensor> {
    Ok(cpu::embedding::half_embedding(weight, ids)?)
}

/// [`embedding`] in a frozen table that is kept in blocks, (count, width); the result is in `dtype`.
pub fn quantised_embedding(weight: &QuantisedMatrix, ids: &Tensor, dtype: DType) -> Result<Tensor> {
    match ids.device().is_cpu() {
        true => Ok(cpu::embedding::quantised_embedding(weight, ids)?),
        false => embedding(&weight.to_dtype(dtype)?, ids),
    }
}

/// `x · (1 + scale) + shift` with `x` (b, n, c), `shift` and `scale` (b, c).
pub fn modulate(x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
    if takes([x, shift, scale]) {
        return Ok(cpu::rows::modulate(x, shift, scale)?);
    }
    if cuda::takes([x, shift, scale]) {
        return Ok(cuda::rows::modulate(x, shift, scale)?);
    }
    plain::modulate(x, shift, scale)
}

/// `x + gate · y` with `x` and `y` (b, n, c) and `gate` (b, c).
pub fn gated_residual(x: &Tensor, gate: &Tensor, y: &Tensor) -> Result<Tensor> {
    if takes([x, gate, y]) {
        return Ok(cpu::rows::gated_residual(x, gate, y)?);
    }
    if cuda::takes([x, gate, y]) {
        return Ok(cuda::rows::gated_residual(x, gate, y)?);
    }
    plain::gated_residual(x, gate, y)
}

/// Each element of `x` zero with probability `p` in 0..1, the others divided by 1 − p. Draws one number per element
/// from `generator`, none if `p` is 0; on a card one in all, from which the card makes the others.
pub fn dropout(x: &Tensor, p: f64, generator: &mut ChaCha8Rng) -> Result<Tensor> {
    if !(0.0..1.0).contains(&p) {
        return Err(Error::invalid(
            format!("dropout with probability {p}"),
            "choose one from 0 up to, but not including, 1",
        ));
    }
    if p == 0.0 {
        return Ok(x.clone());
    }
    if cuda::takes([x]) {
        return Ok(cuda::rows::dropout(x, None, p, generator.random())?);
    }
    let threshold = (p * (1u64 << 32) as f64) as u32;
    let kept = (1.0 / (1.0 - p)) as f32;
    let factors: Vec<f32> = (0..x.elem_count())
        .map(|_| {
            if generator.random::<u32>() < threshold {
                0.0
            } else {
                kept
            }
        })
        .collect();
    if takes([x]) {
        return Ok(cpu::rows::times(x, factors)?);
    }
    let factors = Tensor::from_vec(factors, x.shape(), x.device())?.to_dtype(x.dtype())?;
    Ok((x * factors)?)
}

/// `x + dropout(y)`, of equal shapes; draws as [`dropout`] does.
pub fn dropout_onto(x: &Tensor, y: &Tensor, p: f64, generator: &mut ChaCha8Rng) -> Result<Tensor> {
    if (0.0..1.0).contains(&p) && p > 0.0 && cuda::takes([x, y]) {
        return Ok(cuda::rows::dropout(y, Some(x), p, generator.random())?);
    }
    layout::add(x, &dropout(y, p, generator)?)
}

/// Each pixel of `x` (b, c, h, w) four times: (b, c, 2h, 2w).
pub fn upsample_nearest2x(x: &Tensor) -> Result<Tensor> {
    if takes([x]) {
        return Ok(cpu::rows::upsample_nearest2x(x)?);
    }
    if cuda::takes([x]) {
        return Ok(cuda::rows::upsample_nearest2x(x)?);
    }
    plain::upsample_nearest2x(x)
}
