//! What the U-Net's levels are made of: residual blocks that are told the timestep, and transformers over the pixels
//! that read the prompt; diffusers' `ResnetBlock2D`, `Transformer2DModel` and `BasicTransformerBlock`.

use std::sync::Arc;

use candle_core::{D, Tensor};

use crate::models::encoder::Activation;
use crate::nn::ops::Padding;
use crate::nn::{Conv2d, GroupNorm, LayerNorm, Linear, Mask, Weights, layout, ops, recompute};
use crate::{Error, Result};

/// Epsilon of the norms of the transformers; that of the residual blocks is in the config.
const GROUP_EPS: f64 = 1e-6;
const LAYER_EPS: f64 = 1e-5;

/// What the residual blocks of one U-Net have in common.
#[derive(Debug, Clone, Copy)]
pub(super) struct ResnetSettings {
    /// Width of the embedded timestep.
    pub temb: usize,
    pub groups: usize,
    pub eps: f64,
    pub activation: Activation,
}

/// Two convolutions, each after a norm and an activation, beside a shortcut; the timestep is added between them.
pub(super) struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    time_emb_proj: Linear,
    norm2: GroupNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
    activation: Activation,
}

impl ResnetBlock {
    pub(super) fn new(
        (inputs, outputs): (usize, usize),
        settings: ResnetSettings,
        weights: &Weights,
    ) -> Result<Arc<Self>> {
        let same = Padding::Same(1);
        let norm = |channels, name: &str| {
            GroupNorm::new(settings.groups, channels, settings.eps, &weights.pp(name))
        };
        let conv_shortcut = if inputs == outputs {
            None
        } else {
            let place = weights.pp("conv_shortcut");
            Some(Conv2d::new(
                inputs,
                outputs,
                1,
                1,
                Padding::Same(0),
                &place,
            )?)
        };
        Ok(Arc::new(Self {
            norm1: norm(inputs, "norm1")?,
            conv1: Conv2d::new(inputs, outputs, 3, 1, same, &weights.pp("conv1"))?,
            time_emb_proj: Linear::new(settings.temb, outputs, true, &weights.pp("time_emb_proj"))?,
            norm2: norm(outputs, "norm2")?,
            conv2: Conv2d::new(outputs, outputs, 3, 1, same, &weights.pp("conv2"))?,
            conv_shortcut,
            activation: settings.activation,
        }))
    }

    /// `x` (b, inputs, h, w) and `temb` (b, temb) to (b, outputs, h, w), through [`recompute`].
    pub(super) fn forward(self: &Arc<Self>, x: &Tensor, temb: &Tensor) -> Result<Tensor> {
        let block = self.clone();
        recompute(&[x, temb], None, move |inputs, _| {
            block.compute(&inputs[0], &inputs[1])
        })
    }

    fn compute(&self, x: &Tensor, temb: &Tensor) -> Result<Tensor> {
        let h = self
            .conv1
            .forward(&self.activation.of_norm(&self.norm1, x)?)?;
        let time = self
            .time_emb_proj
            .forward(&self.activation.forward(temb)?)?;
        let h = h.broadcast_add(&time.unsqueeze(2)?.unsqueeze(3)?)?;
        let h = self
            .conv2
            .forward(&self.activation.of_norm(&self.norm2, &h)?)?;
        match &self.conv_shortcut {
            Some(shortcut) => layout::add(&shortcut.forward(x)?, &h),
            None => layout::add(x, &h),
        }
    }
}

/// Attention of pixels to each other, or to the prompt.
struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    heads: usize,
}

impl Attention {
    fn new(width: usize, context: usize, heads: usize, weights: &Weights) -> Result<Self> {
        let linear = |inputs, name: &str| Linear::new(inputs, width, false, &weights.pp(name));
        Ok(Self {
            to_q: linear(width, "to_q")?,
            to_k: linear(context, "to_k")?,
            to_v: linear(context, "to_v")?,
            to_out: Linear::new(width, width, true, &weights.pp("to_out.0"))?,
            heads,
        })
    }

    /// `x` (b, n, width), `context` (b, m, its width).
    fn forward(&self, x: &Tensor, context: &Tensor) -> Result<Tensor> {
        let d = x.dim(2)? / self.heads;
        let split = |linear: &Linear, x: &Tensor| {
            layout::split_heads(&linear.forward(x)?, 0, self.heads, d)
        };
        let q = split(&self.to_q, x)?;
        let (k, v) = (split(&self.to_k, context)?, split(&self.to_v, context)?);
        let scale = 1.0 / (d as f64).sqrt();
        let y = ops::attention(&q, &k, &v, scale, &Mask::None)?;
        self.to_out.forward(&layout::merge_heads(&y)?)
    }
}

/// `value · gelu(gate)` of one linear layer, and another: four times as wide within.
struct FeedForward {
    proj: Linear,
    out: Linear,
}

impl FeedForward {
    fn new(width: usize, weights: &Weights) -> Result<Self> {
        Ok(Self {
            proj: Linear::new(width, 8 * width, true, &weights.pp("net.0.proj"))?,
            out: Linear::new(4 * width, width, true, &weights.pp("net.2"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let both = self.proj.forward(x)?;
        let halves = both.chunk(2, D::Minus1)?;
        let (value, gate) = (halves[0].contiguous()?, halves[1].contiguous()?);
        self.out.forward(&Activation::Gelu.gate(&gate, &value)?)
    }
}

/// Attention of the pixels to each other, attention to the prompt, and a feed-forward, each after a norm and beside a
/// shortcut.
struct TransformerBlock {
    norms: [LayerNorm; 3],
    attn1: Attention,
    attn2: Attention,
    ff: FeedForward,
}

impl TransformerBlock {
    fn new(width: usize, context: usize, heads: usize, weights: &Weights) -> Result<Self> {
        let norm = |name: &str| LayerNorm::new(width, LAYER_EPS, &weights.pp(name));
        Ok(Self {
            norms: [norm("norm1")?, norm("norm2")?, norm("norm3")?],
            attn1: Attention::new(width, width, heads, &weights.pp("attn1"))?,
            attn2: Attention::new(width, context, heads, &weights.pp("attn2"))?,
            ff: FeedForward::new(width, &weights.pp("ff"))?,
        })
    }

    fn forward(&self, x: &Tensor, context: &Tensor) -> Result<Tensor> {
        let [norm1, norm2, norm3] = &self.norms;
        let normed = norm1.forward(x)?;
        let x = layout::add(x, &self.attn1.forward(&normed, &normed)?)?;
        let normed = norm2.forward(&x)?;
        let x = layout::add(&x, &self.attn2.forward(&normed, context)?)?;
        layout::add(&x, &self.ff.forward(&norm3.forward(&x)?)?)
    }
}

/// The way into the transformer or out of it.
enum Projection {
    /// Of pixels (SDXL).
    Linear(Linear),
    /// Of one pixel, the same with other names of dimensions (older models).
    Conv(Conv2d),
}

impl Projection {
    fn new(width: usize, is_linear: bool, weights: &Weights) -> Result<Self> {
        Ok(match is_linear {
            true => Self::Linear(Linear::new(width, width, true, weights)?),
            false => Self::Conv(Conv2d::new(width, width, 1, 1, Padding::Same(0), weights)?),
        })
    }
}

/// How the transformers of a level are made.
#[derive(Debug, Clone, Copy)]
pub(super) struct TransformerSettings {
    pub heads: usize,
    /// Width of the prompt's states.
    pub context: usize,
    pub groups: usize,
    pub is_linear: bool,
}

/// A transformer over all pixels.
pub(super) struct SpatialTransformer {
    norm: GroupNorm,
    proj_in: Projection,
    blocks: Vec<Arc<TransformerBlock>>,
    proj_out: Projection,
}

impl SpatialTransformer {
    pub(super) fn new(
        width: usize,
        depth: usize,
        settings: TransformerSettings,
        weights: &Weights,
    ) -> Result<Self> {
        let TransformerSettings {
            heads,
            context,
            groups,
            is_linear,
        } = settings;
        if heads == 0 || !width.is_multiple_of(heads) {
            return Err(Error::invalid(
                format!("{heads} attention heads in a level {width} wide"),
                "attention_head_dim, which is the number of heads, divides block_out_channels",
            ));
        }
        let blocks = (0..depth)
            .map(|i| {
                let place = weights.pp("transformer_blocks").pp(i);
                Ok(Arc::new(TransformerBlock::new(
                    width, context, heads, &place,
                )?))
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            norm: GroupNorm::new(groups, width, GROUP_EPS, &weights.pp("norm"))?,
            proj_in: Projection::new(width, is_linear, &weights.pp("proj_in"))?,
            blocks,
            proj_out: Projection::new(width, is_linear, &weights.pp("proj_out"))?,
        })
    }

    /// `x` (b, width, h, w), `context` (b, n, its width); each block through [`recompute`].
    pub(super) fn forward(&self, x: &Tensor, context: &Tensor) -> Result<Tensor> {
        let (b, c, h, w) = x.dims4()?;
        let rows = |x: &Tensor| -> Result<Tensor> {
            Ok(x.flatten_from(2)?.transpose(1, 2)?.contiguous()?)
        };
        let pixels = |x: &Tensor| -> Result<Tensor> {
            Ok(x.transpose(1, 2)?.contiguous()?.reshape((b, c, h, w))?)
        };
        let normed = self.norm.forward(x)?;
        let mut y = match &self.proj_in {
            Projection::Linear(linear) => linear.forward(&rows(&normed)?)?,
            Projection::Conv(conv) => rows(&conv.forward(&normed)?)?,
        };
        for block in &self.blocks {
            let block = block.clone();
            y = recompute(&[&y, context], None, move |inputs, _| {
                block.forward(&inputs[0], &inputs[1])
            })?;
        }
        let y = match &self.proj_out {
            Projection::Linear(linear) => pixels(&linear.forward(&y)?)?,
            Projection::Conv(conv) => conv.forward(&pixels(&y)?)?,
        };
        layout::add(x, &y)
    }
}
