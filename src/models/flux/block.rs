//! The blocks of FLUX.1: diffusers' `FluxTransformerBlock` and `FluxSingleTransformerBlock`.

use std::sync::Arc;

use candle_core::Tensor;

use super::transformer::{Config, Rotation};
use crate::Result;
use crate::models::sd3::{FeedForward, Modulation, NORM_EPS, attend};
use crate::nn::{LayerNorm, Linear, RmsNorm, Weights, is_recomputing, layout, ops, recompute};

/// Queries, keys and values of one stream, queries and keys normalised head by head.
struct Projections {
    q: Linear,
    k: Linear,
    v: Linear,
    norm_q: RmsNorm,
    norm_k: RmsNorm,
    heads: usize,
}

impl Projections {
    /// `names` are those of q, k, v and of the norms of q and k.
    fn new(config: &Config, names: [&str; 5], weights: &Weights) -> Result<Self> {
        let d = config.inner_dim();
        let linear = |name: &str| Linear::new(d, d, true, &weights.pp(name));
        let norm =
            |name: &str| RmsNorm::new(config.attention_head_dim, NORM_EPS, &weights.pp(name));
        Ok(Self {
            q: linear(names[0])?,
            k: linear(names[1])?,
            v: linear(names[2])?,
            norm_q: norm(names[3])?,
            norm_k: norm(names[4])?,
            heads: config.num_attention_heads,
        })
    }

    /// (b, n, d) to q, k and v, each (b, heads, n, d / heads).
    fn forward(&self, x: &Tensor) -> Result<[Tensor; 3]> {
        let d = x.dim(2)? / self.heads;
        let heads = |layer: &Linear| layout::split_heads(&layer.forward(x)?, 0, self.heads, d);
        Ok([
            self.norm_q.forward(&heads(&self.q)?)?,
            self.norm_k.forward(&heads(&self.k)?)?,
            heads(&self.v)?,
        ])
    }
}

const OWN: [&str; 5] = ["to_q", "to_k", "to_v", "norm_q", "norm_k"];
const ADDED: [&str; 5] = [
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "norm_added_q",
    "norm_added_k",
];

/// A block in which image and text have weights of their own and attend to each other.
pub(super) struct DoubleBlock {
    norm1: Modulation,
    norm1_context: Modulation,
    norm: LayerNorm,
    image: Projections,
    text: Projections,
    to_out: Linear,
    to_add_out: Linear,
    ff: FeedForward,
    ff_context: FeedForward,
}

impl DoubleBlock {
    pub(super) fn new(config: &Config, weights: &Weights) -> Result<Self> {
        let d = config.inner_dim();
        let attn = weights.pp("attn");
        Ok(Self {
            norm1: Modulation::new(d, 6, &weights.pp("norm1"))?,
            norm1_context: Modulation::new(d, 6, &weights.pp("norm1_context"))?,
            norm: LayerNorm::plain(NORM_EPS),
            image: Projections::new(config, OWN, &attn)?,
            text: Projections::new(config, ADDED, &attn)?,
            to_out: Linear::new(d, d, true, &attn.pp("to_out.0"))?,
            to_add_out: Linear::new(d, d, true, &attn.pp("to_add_out"))?,
            ff: FeedForward::new(d, &weights.pp("ff"))?,
            ff_context: FeedForward::new(d, &weights.pp("ff_context"))?,
        })
    }

    /// `x` (b, n, d) the image, `context` (b, m, d) the text, `temb` (b, d) the condition; `rotation` has the text's
    /// positions first. Gives both after the block. A recomputed block has one result, so both are joined in it.
    pub(super) fn forward_recomputed(
        self: &Arc<Self>,
        x: &Tensor,
        context: &Tensor,
        temb: &Tensor,
        rotation: &Arc<Rotation>,
    ) -> Result<(Tensor, Tensor)> {
        if !is_recomputing() {
            return self.forward(x, context, temb, rotation);
        }
        let (block, rotation) = (self.clone(), rotation.clone());
        let both = recompute(&[x, context, temb], None, move |inputs, _| {
            let (x, context) = block.forward(&inputs[0], &inputs[1], &inputs[2], &rotation)?;
            layout::join(&x, &context, 1)
        })?;
        let (n, m) = (x.dim(1)?, context.dim(1)?);
        Ok((layout::rows(&both, 0, n)?, layout::rows(&both, n, m)?))
    }

    fn forward(
        &self,
        x: &Tensor,
        context: &Tensor,
        temb: &Tensor,
        rotation: &Rotation,
    ) -> Result<(Tensor, Tensor)> {
        let (n, m) = (x.dim(1)?, context.dim(1)?);
        // shift, scale and gate of the attention, and the same of the feed-forward
        let image = self.norm1.forward(temb)?;
        let text = self.norm1_context.forward(temb)?;
        let x_in = ops::modulate(&self.norm.forward(x)?, &image[0], &image[1])?;
        let context_in = ops::modulate(&self.norm.forward(context)?, &text[0], &text[1])?;
        let [q, k, v] = self.image.forward(&x_in)?;
        let [text_q, text_k, text_v] = self.text.forward(&context_in)?;
        let q = rotation.turn(&layout::join(&text_q, &q, 2)?)?;
        let k = rotation.turn(&layout::join(&text_k, &k, 2)?)?;
        let attended = attend(&q, &k, &layout::join(&text_v, &v, 2)?)?;
        let y = self.to_out.forward(&layout::rows(&attended, m, n)?)?;
        let x = ops::gated_residual(x, &image[2], &y)?;
        let y = ops::modulate(&self.norm.forward(&x)?, &image[3], &image[4])?;
        let x = ops::gated_residual(&x, &image[5], &self.ff.forward(&y)?)?;
        let y = self.to_add_out.forward(&layout::rows(&attended, 0, m)?)?;
        let context = ops::gated_residual(context, &text[2], &y)?;
        let y = ops::modulate(&self.norm.forward(&context)?, &text[3], &text[4])?;
        let context = ops::gated_residual(&context, &text[5], &self.ff_context.forward(&y)?)?;
        Ok((x, context))
    }
}

/// A block in which image and text share weights, and attention and feed-forward run side by side.
pub(super) struct SingleBlock {
    modulation: Modulation,
    norm: LayerNorm,
    attn: Projections,
    proj_mlp: Linear,
    proj_out: Linear,
}

impl SingleBlock {
    pub(super) fn new(config: &Config, weights: &Weights) -> Result<Self> {
        let d = config.inner_dim();
        Ok(Self {
            modulation: Modulation::new(d, 3, &weights.pp("norm"))?,
            norm: LayerNorm::plain(NORM_EPS),
            attn: Projections::new(config, OWN, &weights.pp("attn"))?,
            proj_mlp: Linear::new(d, 4 * d, true, &weights.pp("proj_mlp"))?,
            proj_out: Linear::new(5 * d, d, true, &weights.pp("proj_out"))?,
        })
    }

    /// `both` (b, m + n, d): the text, then the image; `temb` (b, d).
    pub(super) fn forward_recomputed(
        self: &Arc<Self>,
        both: &Tensor,
        temb: &Tensor,
        rotation: &Arc<Rotation>,
    ) -> Result<Tensor> {
        let (block, rotation) = (self.clone(), rotation.clone());
        recompute(&[both, temb], None, move |inputs, _| {
            block.forward(&inputs[0], &inputs[1], &rotation)
        })
    }

    fn forward(&self, both: &Tensor, temb: &Tensor, rotation: &Rotation) -> Result<Tensor> {
        // shift, scale and gate
        let chunks = self.modulation.forward(temb)?;
        let normed = ops::modulate(&self.norm.forward(both)?, &chunks[0], &chunks[1])?;
        let [q, k, v] = self.attn.forward(&normed)?;
        let attended = attend(&rotation.turn(&q)?, &rotation.turn(&k)?, &v)?;
        let within = ops::gelu(&self.proj_mlp.forward(&normed)?)?;
        let y = self
            .proj_out
            .forward(&layout::join(&attended, &within, 2)?)?;
        ops::gated_residual(both, &chunks[2], &y)
    }
}
