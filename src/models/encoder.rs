//! The pre-norm transformer layer that CLIP's towers and the ViT share, and the activations that configs name.

use candle_core::Tensor;
use serde::{Deserialize, Deserializer};

use crate::Result;
use crate::nn::{GroupNorm, Init, LayerNorm, Linear, Mask, Weights, layout, ops};

/// An activation by its name in configs of transformers and diffusers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x · sigmoid(1.702·x)`.
    QuickGelu,
    /// With the error function.
    #[serde(alias = "gelu_python")]
    Gelu,
    /// In the tanh approximation.
    #[serde(
        alias = "gelu_pytorch_tanh",
        alias = "gelu_python_tanh",
        alias = "gelu_fast",
        alias = "gelu_accurate"
    )]
    GeluNew,
    Relu,
    #[serde(alias = "swish")]
    Silu,
    Tanh,
    Sigmoid,
    /// `x · tanh(ln(1 + eˣ))`.
    Mish,
}

impl Activation {
    /// Elementwise, any shape.
    pub fn forward(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::QuickGelu => ops::quick_gelu(x),
            Self::Gelu => ops::gelu_erf(x),
            Self::GeluNew => ops::gelu(x),
            Self::Relu => Ok(x.relu()?),
            Self::Silu => ops::silu(x),
            Self::Tanh => Ok(x.tanh()?),
            Self::Sigmoid => Ok(candle_nn::ops::sigmoid(x)?),
            Self::Mish => {
                // ln(1 + eˣ) without overflow.
                let softplus = (x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?)?;
                Ok((x * softplus.tanh()?)?)
            }
        }
    }

    /// `activation(gate) · value`, elementwise.
    pub fn gate(self, gate: &Tensor, value: &Tensor) -> Result<Tensor> {
        match self {
            Self::Silu => ops::swiglu(gate, value),
            Self::GeluNew => ops::geglu_tanh(value, gate),
            _ => Ok((self.forward(gate)? * value)?),
        }
    }

    /// Of what `norm` makes of `x` (b, c, h, w).
    pub fn of_norm(self, norm: &GroupNorm, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Silu => norm.forward_silu(x),
            _ => self.forward(&norm.forward(x)?),
        }
    }
}

/// An activation as diffusers reads it.
pub(super) fn act_fn<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Activation, D::Error> {
    let name = String::deserialize(deserializer)?;
    match name.to_lowercase().as_str() {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu" => Ok(Activation::Gelu),
        "mish" => Ok(Activation::Mish),
        "relu" => Ok(Activation::Relu),
        _ => Err(serde::de::Error::custom(format!(
            "act_fn {name}: silu, swish, gelu, mish or relu is expected"
        ))),
    }
}

/// Sizes of a stack of layers.
#[derive(Debug, Clone)]
pub(super) struct Sizes {
    pub width: usize,
    pub hidden: usize,
    pub heads: usize,
    /// Number of layers in the stack; it scales how new weights are drawn.
    pub layers: usize,
    pub eps: f64,
    pub activation: Activation,
    pub qkv_bias: bool,
}

/// Where a layer's parts are in the checkpoint, relative to the layer.
pub(super) struct Names {
    pub norm1: &'static str,
    pub attention: Projections,
    pub out: &'static str,
    pub norm2: &'static str,
    pub fc1: &'static str,
    pub fc2: &'static str,
}

/// How queries, keys and values are stored.
pub(super) enum Projections {
    Separate([&'static str; 3]),
    /// One matrix, queries first.
    Joint(&'static str),
}

enum Qkv {
    Separate([Linear; 3]),
    Joint(Linear),
}

/// `x + attention(norm1(x))`, then `x + mlp(norm2(x))`.
pub(super) struct Layer {
    norm1: LayerNorm,
    qkv: Qkv,
    out: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    heads: usize,
    activation: Activation,
}

impl Layer {
    pub fn new(s: &Sizes, names: &Names, weights: &Weights) -> Result<Self> {
        let d = s.width;
        let at = |name: &str| name.split('.').fold(weights.clone(), |w, part| w.pp(part));
        // As CLIP's own initialisation: what adds to the residual stream is smaller in deeper stacks.
        let wide = (d as f64).powf(-0.5);
        let deep = wide * (2.0 * s.layers as f64).powf(-0.5);
        let linear = |name, inputs, outputs, bias, deviation| {
            Linear::with_init(inputs, outputs, bias, Init::Normal(deviation), &at(name))
        };
        let qkv = match names.attention {
            Projections::Separate([q, k, v]) => Qkv::Separate([
                linear(q, d, d, s.qkv_bias, deep)?,
                linear(k, d, d, s.qkv_bias, deep)?,
                linear(v, d, d, s.qkv_bias, deep)?,
            ]),
            Projections::Joint(name) => Qkv::Joint(linear(name, d, 3 * d, s.qkv_bias, deep)?),
        };
        Ok(Self {
            norm1: LayerNorm::new(d, s.eps, &at(names.norm1))?,
            qkv,
            out: linear(names.out, d, d, true, wide)?,
            norm2: LayerNorm::new(d, s.eps, &at(names.norm2))?,
            fc1: linear(names.fc1, d, s.hidden, true, wide * 0.5f64.sqrt())?,
            fc2: linear(names.fc2, s.hidden, d, true, deep)?,
            heads: s.heads,
            activation: s.activation,
        })
    }

    /// `x` (b, n, width) to the same shape.
    pub fn forward(&self, x: &Tensor, mask: &Mask) -> Result<Tensor> {
        let d = x.dim(2)?;
        let head_dim = d / self.heads;
        let split = |x: &Tensor, part| layout::split_heads(x, part * d, self.heads, head_dim);
        let normed = self.norm1.forward(x)?;
        let (q, k, v) = match &self.qkv {
            Qkv::Separate([q, k, v]) => (
                split(&q.forward(&normed)?, 0)?,
                split(&k.forward(&normed)?, 0)?,
                split(&v.forward(&normed)?, 0)?,
            ),
            Qkv::Joint(qkv) => {
                let all = qkv.forward(&normed)?;
                (split(&all, 0)?, split(&all, 1)?, split(&all, 2)?)
            }
        };
        let y = ops::attention(&q, &k, &v, 1.0 / (head_dim as f64).sqrt(), mask)?;
        let x = layout::add(x, &self.out.forward(&layout::merge_heads(&y)?)?)?;
        let hidden = self.fc1.forward(&self.norm2.forward(&x)?)?;
        layout::add(&x, &self.fc2.forward(&self.activation.forward(&hidden)?)?)
    }
}

/// Patches of `pixels` (b, c, h, w) after their convolution, (b, width, h', w'), as a sequence (b, h'·w', width)
/// with the class token (width) in front.
pub(super) fn with_class_token(patches: &Tensor, class: &Tensor) -> Result<Tensor> {
    let (b, width, h, w) = patches.dims4()?;
    let patches = patches
        .reshape((b, width, h * w))?
        .transpose(1, 2)?
        .contiguous()?;
    let class = class.reshape((1, 1, width))?.broadcast_as((b, 1, width))?;
    Ok(Tensor::cat(&[class.contiguous()?, patches], 1)?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn activations_are_those_of_transformers_by_their_names_alone_and_as_gates() {
        let x = [-3.0f32, -0.7, 0.0, 0.4, 2.5, 30.0];
        let sigmoid = [0.0474259, 0.3318122, 0.5, 0.5986876, 0.9241418, 1.0];
        let table: [(&str, [f32; 6]); 8] = [
            (
                "quick_gelu",
                [-0.0180713, -0.163106, 0.0, 0.2655669, 2.465014, 30.0],
            ),
            (
                "gelu",
                [-0.0040502, -0.1693746, 0.0, 0.2621687, 2.4844759, 30.0],
            ),
            (
                "gelu_new",
                [-0.0036374, -0.1694299, 0.0, 0.2621612, 2.4849157, 30.0],
            ),
            ("relu", [0.0, 0.0, 0.0, 0.4, 2.5, 30.0]),
            (
                "swish",
                [-0.1422776, -0.2322686, 0.0, 0.2394751, 2.3103545, 30.0],
            ),
            (
                "tanh",
                [-0.9950548, -0.6043678, 0.0, 0.379949, 0.9866143, 1.0],
            ),
            ("sigmoid", sigmoid),
            (
                "mish",
                [-0.1456475, -0.2678702, 0.0, 0.2890305, 2.4713924, 30.0],
            ),
        ];
        let gate = Tensor::new(&x, &Device::Cpu).unwrap();
        let two = (gate.ones_like().unwrap() * 2.0).unwrap();
        for (name, expected) in table {
            let activation: Activation = serde_json::from_value(name.into()).unwrap();
            let alone = activation.forward(&gate).unwrap();
            let gated = (activation.gate(&gate, &two).unwrap() * 0.5).unwrap();
            for y in [alone, gated] {
                let y = y.to_vec1::<f32>().unwrap();
                let apart = y.iter().zip(expected).map(|(a, b)| (a - b).abs());
                assert!(apart.fold(0.0, f32::max) < 3e-6, "{name}: {y:?}");
            }
        }
    }
}
