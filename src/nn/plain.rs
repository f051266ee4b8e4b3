//! Every operation of [`super::ops`] written with candle's differentiable operations alone: the definition that the
//! fused forms are tested against, and what runs where no fused form exists (other devices, other dtypes).

use candle_core::{D, DType, Tensor};

use super::ops::{Mask, Padding};
use crate::{Error, Result};

/// See [`super::ops::linear`].
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (outputs, inputs) = weight.dims2()?;
    let mut shape = x.dims().to_vec();
    let rows = x.elem_count() / inputs.max(1);
    let y = x.reshape((rows, inputs))?.matmul(&weight.t()?)?;
    let y = match bias {
        Some(bias) => y.broadcast_add(bias)?,
        None => y,
    };
    if let Some(last) = shape.last_mut() {
        *last = outputs;
    }
    Ok(y.reshape(shape)?)
}

/// See [`super::ops::linear_lora`].
pub fn linear_lora(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    a: &Tensor,
    b: &Tensor,
    scale: f64,
) -> Result<Tensor> {
    let y = linear(x, weight, bias)?;
    let low = linear(x, &a.to_dtype(x.dtype())?, None)?;
    let addition = (linear(&low, &b.to_dtype(x.dtype())?, None)? * scale)?;
    Ok((y + addition)?)
}

/// See [`super::ops::conv2d`].
pub fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    stride: usize,
    padding: Padding,
) -> Result<Tensor> {
    let (x, symmetric) = match padding {
        Padding::Same(n) => (x.clone(), n),
        Padding::RightBottom => (x.pad_with_zeros(3, 0, 1)?.pad_with_zeros(2, 0, 1)?, 0),
    };
    // candle's gradient of a convolution takes images to be square. More zeros on the right or at the bottom only add
    // pixels to the result, which are cut off again.
    let (_, _, h, w) = x.dims4()?;
    let side = h.max(w);
    let square = x
        .pad_with_zeros(2, 0, side - h)?
        .pad_with_zeros(3, 0, side - w)?;
    let y = square
        .contiguous()?
        .conv2d(weight, symmetric, stride, 1, 1)?;
    let kernel = weight.dim(2)?;
    let result = |size: usize| ((size + 2 * symmetric).saturating_sub(kernel)) / stride + 1;
    let y = y.narrow(2, 0, result(h))?.narrow(3, 0, result(w))?;
    match bias {
        Some(bias) => Ok(y.broadcast_add(&bias.reshape((1, bias.elem_count(), 1, 1))?)?),
        None => Ok(y),
    }
}

/// See [`super::ops::attention`].
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, mask: &Mask) -> Result<Tensor> {
    let (n, m) = (q.dim(2)?, k.dim(2)?);
    let is_causal = matches!(mask, Mask::Causal | Mask::CausalKeys(_));
    if (is_causal && m < n) || (m == 0 && n > 0) {
        return Err(Error::invalid(
            format!("attention of {n} queries and {m} keys"),
            "give a key for every query",
        ));
    }
    let scores = (q.contiguous()?.matmul(&k.t()?.contiguous()?)? * scale)?;
    let scores = match mask {
        Mask::None => scores,
        Mask::Causal => scores.broadcast_add(&causal(q, k)?)?,
        Mask::CausalKeys(keys) => {
            let own: Vec<u8> = (0..n)
                .flat_map(|i| (0..m).map(move |j| u8::from(j == i + (m - n))))
                .collect();
            let own = Tensor::from_vec(own, (1, 1, n, m), q.device())?;
            let keys = keys.to_dtype(q.dtype())?;
            let keys = keys.broadcast_as((keys.dim(0)?, 1, n, m))?.contiguous()?;
            let own = own.broadcast_as(keys.shape())?.contiguous()?;
            let keys = own.where_cond(&keys.zeros_like()?, &keys)?;
            scores.broadcast_add(&keys)?.broadcast_add(&causal(q, k)?)?
        }
        Mask::Additive(bias) => scores.broadcast_add(&bias.to_dtype(q.dtype())?)?,
    };
    let probabilities = softmax(&scores)?;
    Ok(probabilities.matmul(&v.contiguous()?)?)
}

/// 0 for the keys that a query sees, −∞ for those after it: (1, 1, n, m).
fn causal(q: &Tensor, k: &Tensor) -> Result<Tensor> {
    let (n, m) = (q.dim(2)?, k.dim(2)?);
    let offset = m - n;
    let value = |i: usize, j: usize| match j <= i + offset {
        true => 0.0,
        false => f32::NEG_INFINITY,
    };
    let values: Vec<f32> = (0..n)
        .flat_map(|i| (0..m).map(move |j| value(i, j)))
        .collect();
    Ok(Tensor::from_vec(values, (1, 1, n, m), q.device())?.to_dtype(q.dtype())?)
}

/// See [`super::ops::layer_norm`].
pub fn layer_norm(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<Tensor> {
    let mut y = standardised(&widened(x)?, eps)?;
    if let Some(weight) = weight {
        y = y.broadcast_mul(&weight.to_dtype(y.dtype())?)?;
    }
    if let Some(bias) = bias {
        y = y.broadcast_add(&bias.to_dtype(y.dtype())?)?;
    }
    Ok(y.to_dtype(x.dtype())?)
}

/// `(x − mean) / √(variance + eps)` over the last dimension.
fn standardised(x: &Tensor, eps: f64) -> Result<Tensor> {
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    Ok(centred.broadcast_div(&(variance + eps)?.sqrt()?)?)
}

/// `x` in f32 where its type is narrower: in half precision sums over many elements lose most of their digits.
fn widened(x: &Tensor) -> Result<Tensor> {
    Ok(match x.dtype() {
        DType::BF16 | DType::F16 => x.to_dtype(DType::F32)?,
        _ => x.clone(),
    })
}

/// See [`super::ops::rms_norm`].
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let wide = widened(x)?;
    let norm = (wide.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    Ok(wide
        .broadcast_div(&norm)?
        .to_dtype(x.dtype())?
        .broadcast_mul(weight)?)
}

/// See [`super::ops::group_norm`].
pub fn group_norm(
    x: &Tensor,
    groups: usize,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
) -> Result<Tensor> {
    let dims = x.dims().to_vec();
    let (b, c) = (dims[0], dims[1]);
    let flat = x.reshape((b, groups, x.elem_count() / (b * groups)))?;
    let normed = standardised(&widened(&flat)?, eps)?.reshape(dims.clone())?;
    let mut shape = vec![1; dims.len()];
    shape[1] = c;
    let channels = |t: &Tensor| t.reshape(shape.clone())?.to_dtype(normed.dtype());
    Ok(normed
        .broadcast_mul(&channels(weight)?)?
        .broadcast_add(&channels(bias)?)?
        .to_dtype(x.dtype())?)
}

/// See [`super::ops::swiglu`].
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    Ok((gate.silu()? * up)?)
}

/// See [`super::ops::quick_gelu`].
pub fn quick_gelu(x: &Tensor) -> Result<Tensor> {
    Ok((x * candle_nn::ops::sigmoid(&(x * 1.702)?)?)?)
}

/// See [`super::ops::rope_adjacent`].
pub fn rope_adjacent(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (b, h, n, d) = x.dims4()?;
    let pairs = x.reshape((b, h, n, d / 2, 2))?;
    let (first, second) = (pairs.narrow(4, 0, 1)?, pairs.narrow(4, 1, 1)?);
    let cos = cos.reshape((1, 1, n, d / 2, 1))?;
    let sin = sin.reshape((1, 1, n, d / 2, 1))?;
    let one = (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?;
    let two = (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?;
    Ok(Tensor::cat(&[one, two], 4)?.reshape((b, h, n, d))?)
}

/// See [`super::ops::rope_halves`].
pub fn rope_halves(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (_, _, n, d) = x.dims4()?;
    let (first, second) = (x.narrow(3, 0, d / 2)?, x.narrow(3, d / 2, d / 2)?);
    let cos = cos.reshape((1, 1, n, d / 2))?;
    let sin = sin.reshape((1, 1, n, d / 2))?;
    let one = (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?;
    let two = (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?;
    Ok(Tensor::cat(&[one, two], 3)?)
}

/// See [`super::ops::cross_entropy`].
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let log_probabilities = candle_nn::ops::log_softmax(logits, D::Minus1)?;
    Ok(log_probabilities
        .gather(&targets.unsqueeze(1)?, 1)?
        .squeeze(1)?
        .neg()?)
}

/// See [`super::ops::upsample_nearest2x`].
pub fn upsample_nearest2x(x: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    Ok(x.reshape((b, c, h, 1, w, 1))?
        .broadcast_as((b, c, h, 2, w, 2))?
        .contiguous()?
        .reshape((b, c, 2 * h, 2 * w))?)
}

/// See [`super::ops::softmax`].
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    Ok(candle_nn::ops::softmax(&widened(x)?, D::Minus1)?.to_dtype(x.dtype())?)
}

/// See [`super::ops::geglu_tanh`].
pub fn geglu_tanh(value: &Tensor, gate: &Tensor) -> Result<Tensor> {
    Ok((value * gate.gelu()?)?)
}

/// See [`super::ops::embedding`].
pub fn embedding(weight: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let mut shape = ids.dims().to_vec();
    shape.push(weight.dim(1)?);
    Ok(weight
        .index_select(&ids.flatten_all()?, 0)?
        .reshape(shape)?)
}

/// See [`super::ops::modulate`].
pub fn modulate(x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
    let (scale, shift) = (scale.unsqueeze(1)?, shift.unsqueeze(1)?);
    Ok(x.broadcast_mul(&(scale + 1.0)?)?.broadcast_add(&shift)?)
}

/// See [`super::ops::gated_residual`].
pub fn gated_residual(x: &Tensor, gate: &Tensor, y: &Tensor) -> Result<Tensor> {
    Ok((x + y.broadcast_mul(&gate.unsqueeze(1)?)?)?)
}
