//! Layers that hold weights: what `candle_nn` offers under the same names, with right gradients, frozen weights off
//! the tape, and room for an adapter.

use candle_core::{DType, Tensor};

use super::adapter::Lora;
use super::{Init, Weight, Weights, merged, ops};
use crate::Result;

/// Frozen weights of up to this many elements are kept turned as well, which takes little memory: to pack them again for
/// every few rows takes longer than some of the products.
const TURNED: usize = 1 << 18;

/// `y = x·Wᵀ + bias`, plus the adapter's `scale · (x·Aᵀ)·Bᵀ` where one is attached.
#[derive(Clone)]
pub struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
    lora: Option<Lora>,
}

impl Linear {
    /// Takes `weight` (`outputs`, `inputs`) and, if `bias`, `bias` (`outputs`) at this place of `weights`.
    pub fn new(inputs: usize, outputs: usize, bias: bool, weights: &Weights) -> Result<Self> {
        Self::with_init(inputs, outputs, bias, Init::fan_in(inputs), weights)
    }

    /// Like [`Linear::new`]; a weight that no checkpoint gives starts as `init`, the bias as zero.
    pub fn with_init(
        inputs: usize,
        outputs: usize,
        bias: bool,
        init: Init,
        weights: &Weights,
    ) -> Result<Self> {
        let mut weight = weights.matrix((outputs, inputs), "weight", init)?;
        if inputs * outputs <= TURNED {
            weight = weight.turned()?;
        }
        let bias = if bias {
            Some(weights.get(outputs, "bias", Init::Zeros)?)
        } else {
            None
        };
        Ok(Self {
            weight,
            bias,
            lora: weights.lora(inputs, outputs)?,
        })
    }

    /// `x` (…, inputs) to (…, outputs).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let bias = self.bias.as_ref();
        if let (Some(weight), Some(lora)) = (self.weight.tensor(), &self.lora)
            && let Some(merged) = merged::weight(weight, lora)?
        {
            return ops::adapted_linear(x, &merged, bias, None);
        }
        ops::adapted_linear(x, &self.weight, bias, self.lora.as_ref())
    }

    /// Everything in it that may be trained: weight, bias, and the adapter's factors.
    pub fn parameters(&self) -> Vec<&Tensor> {
        let factors = self.lora.iter().flat_map(|lora| [&*lora.a, &*lora.b]);
        let weight = self.weight.tensor().into_iter();
        weight.chain(&self.bias).chain(factors).collect()
    }

    /// W, shape (outputs, inputs), without the adapter.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }
}

/// A two-dimensional convolution over (b, c, h, w), plus the adapter's `scale · B∗(A∗x)` where one is attached: A has
/// the convolution's own kernel and stride, B a kernel of one pixel.
#[derive(Clone)]
pub struct Conv2d {
    weight: Tensor,
    bias: Option<Tensor>,
    lora: Option<Lora>,
    stride: usize,
    padding: ops::Padding,
}

impl Conv2d {
    /// Takes `weight` (`outputs`, `inputs`, `kernel`, `kernel`) and `bias` (`outputs`).
    pub fn new(
        inputs: usize,
        outputs: usize,
        kernel: usize,
        stride: usize,
        padding: ops::Padding,
        weights: &Weights,
    ) -> Result<Self> {
        let plain = Self::without_bias(inputs, outputs, kernel, stride, padding, weights)?;
        Ok(Self {
            bias: Some(weights.get(outputs, "bias", Init::Zeros)?),
            ..plain
        })
    }

    /// Like [`Conv2d::new`] without a bias.
    pub fn without_bias(
        inputs: usize,
        outputs: usize,
        kernel: usize,
        stride: usize,
        padding: ops::Padding,
        weights: &Weights,
    ) -> Result<Self> {
        let init = Init::Normal((1.0 / (inputs * kernel * kernel) as f64).sqrt());
        Ok(Self {
            weight: weights.get((outputs, inputs, kernel, kernel), "weight", init)?,
            bias: None,
            lora: weights.lora_conv(inputs, outputs, kernel)?,
            stride,
            padding,
        })
    }

    /// `x` (b, inputs, h, w) to (b, outputs, h', w').
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let bias = self.bias.as_ref();
        let y = ops::conv2d(x, &self.weight, bias, self.stride, self.padding)?;
        let Some(lora) = &self.lora else {
            return Ok(y);
        };
        // The factors are f32, whatever is computed in.
        let (a, b) = (lora.a.to_dtype(x.dtype())?, lora.b.to_dtype(x.dtype())?);
        let low = ops::conv2d(x, &a, None, self.stride, self.padding)?;
        let addition = ops::conv2d(&low, &b, None, 1, ops::Padding::Same(0))?;
        Ok((y + (addition * lora.scale)?)?)
    }
}

/// Layer normalisation over the last dimension.
#[derive(Clone)]
pub struct LayerNorm {
    weight: Option<Tensor>,
    bias: Option<Tensor>,
    eps: f64,
}

impl LayerNorm {
    /// Takes `weight` and `bias`, both (`width`).
    pub fn new(width: usize, eps: f64, weights: &Weights) -> Result<Self> {
        let weight = Some(weights.get(width, "weight", Init::Ones)?);
        let bias = Some(weights.get(width, "bias", Init::Zeros)?);
        Ok(Self { weight, bias, eps })
    }

    /// Without weights: `(x − mean) / √(variance + eps)`.
    pub fn plain(eps: f64) -> Self {
        Self {
            weight: None,
            bias: None,
            eps,
        }
    }

    /// `x` (…, width) to the same shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::layer_norm(x, self.weight.as_ref(), self.bias.as_ref(), self.eps)
    }
}

/// Root-mean-square normalisation over the last dimension: `x / √(mean(x²) + eps) · weight`.
#[derive(Clone)]
pub struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    /// Takes `weight` (`width`).
    pub fn new(width: usize, eps: f64, weights: &Weights) -> Result<Self> {
        Ok(Self {
            weight: weights.get(width, "weight", Init::Ones)?,
            eps,
        })
    }

    /// `x` (…, width) to the same shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::rms_norm(x, &self.weight, self.eps)
    }
}

/// Group normalisation of (b, c, …) over `groups` equal groups of channels.
#[derive(Clone)]
pub struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: usize,
    eps: f64,
}

impl GroupNorm {
    /// Takes `weight` and `bias`, both (`channels`).
    pub fn new(groups: usize, channels: usize, eps: f64, weights: &Weights) -> Result<Self> {
        let weight = weights.get(channels, "weight", Init::Ones)?;
        let bias = weights.get(channels, "bias", Init::Zeros)?;
        Ok(Self {
            weight,
            bias,
            groups,
            eps,
        })
    }

    /// `x` (b, channels, h, w) to the same shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::group_norm(x, self.groups, &self.weight, &self.bias, self.eps)
    }

    /// The norm followed by SiLU, as residual blocks of VAEs and U-Nets use it, in one operation.
    pub fn forward_silu(&self, x: &Tensor) -> Result<Tensor> {
        ops::group_norm_silu(x, self.groups, &self.weight, &self.bias, self.eps)
    }
}

/// A table of vectors.
#[derive(Clone)]
pub struct Embedding {
    weight: Weight,
    /// What is computed in.
    dtype: DType,
}

impl Embedding {
    /// Takes `weight` (`count`, `width`).
    pub fn new(count: usize, width: usize, weights: &Weights) -> Result<Self> {
        Ok(Self {
            weight: weights.matrix((count, width), "weight", Init::Normal(0.02))?,
            dtype: weights.dtype(),
        })
    }

    /// The table, (count, width).
    pub fn weight(&self) -> &Weight {
        &self.weight
    }

    /// `ids` (…) of u32 to (…, width).
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        match &self.weight {
            Weight::Tensor(weight) | Weight::Twice { weight, .. } => ops::embedding(weight, ids),
            Weight::Half(weight) => ops::half_embedding(weight, ids),
            Weight::Quantised(weight) => ops::quantised_embedding(weight, ids, self.dtype),
        }
    }
}
