//! One block of MMDiT: image and text with weights of their own, attending to each other (arXiv 2403.03206, figure
//! 2b); diffusers' `JointTransformerBlock`, with SD3.5 Medium's second attention over the image.

use std::sync::Arc;

use candle_core::{D, Tensor};

use super::transformer::{Config, QkNorm};
use crate::Result;
use crate::nn::{
    FusedLinear, Init, LayerNorm, Linear, Mask, RmsNorm, Weights, is_recomputing, layout, ops,
    recompute,
};

/// Epsilon of every norm of the transformer.
pub(in crate::models) const EPS: f64 = 1e-6;

/// A linear layer of SiLU(temb) whose output is cut into shifts, scales and gates.
pub(in crate::models) struct Modulation {
    linear: Linear,
    chunks: usize,
}

impl Modulation {
    pub(in crate::models) fn new(d: usize, chunks: usize, weights: &Weights) -> Result<Self> {
        let place = weights.pp("linear");
        let linear = Linear::with_init(d, chunks * d, true, Init::Zeros, &place)?;
        Ok(Self { linear, chunks })
    }

    /// `temb` (b, d) to as many tensors (b, d) as there are chunks.
    pub(in crate::models) fn forward(&self, temb: &Tensor) -> Result<Vec<Tensor>> {
        let all = self.linear.forward(&ops::silu(temb)?)?;
        Ok(all.chunk(self.chunks, D::Minus1)?)
    }
}

/// Queries, keys and values of one stream.
struct Projections {
    qkv: FusedLinear,
    norms: Option<(HeadNorm, HeadNorm)>,
    heads: usize,
}

/// The norm of each head's queries or keys.
enum HeadNorm {
    Rms(RmsNorm),
    Layer(LayerNorm),
}

impl HeadNorm {
    fn new(kind: QkNorm, width: usize, weights: &Weights) -> Result<Self> {
        Ok(match kind {
            QkNorm::RmsNorm => Self::Rms(RmsNorm::new(width, EPS, weights)?),
            QkNorm::LayerNorm => Self::Layer(LayerNorm::new(width, EPS, weights)?),
            QkNorm::Fp32LayerNorm => Self::Layer(LayerNorm::plain(EPS)),
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Rms(norm) => norm.forward(x),
            Self::Layer(norm) => norm.forward(x),
        }
    }
}

impl Projections {
    /// `names` are those of q, k, v and of the norms of q and k.
    fn new(config: &Config, names: [&str; 5], weights: &Weights) -> Result<Self> {
        let d = config.inner_dim();
        let places = [0, 1, 2].map(|i| (d, weights.pp(names[i])));
        let norm =
            |kind, name: &str| HeadNorm::new(kind, config.attention_head_dim, &weights.pp(name));
        let norms = match config.qk_norm {
            Some(kind) => Some((norm(kind, names[3])?, norm(kind, names[4])?)),
            None => None,
        };
        Ok(Self {
            qkv: FusedLinear::new(d, &places, true, Init::fan_in(d))?,
            norms,
            heads: config.num_attention_heads,
        })
    }

    /// (b, n, d) to q, k and v, each (b, heads, n, d / heads).
    fn forward(&self, x: &Tensor) -> Result<[Tensor; 3]> {
        let d = x.dim(2)? / self.heads;
        let qkv = self.qkv.forward(x)?;
        let [q, k, v] = [qkv.heads(0, d)?, qkv.heads(1, d)?, qkv.heads(2, d)?];
        match &self.norms {
            Some((norm_q, norm_k)) => Ok([norm_q.forward(&q)?, norm_k.forward(&k)?, v]),
            None => Ok([q, k, v]),
        }
    }
}

/// softmax(q·kᵀ / √d) · v with the heads joined: (b, n, d).
pub(in crate::models) fn attend(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let scale = 1.0 / (q.dim(3)? as f64).sqrt();
    layout::merge_heads(&ops::attention(q, k, v, scale, &Mask::None)?)
}

/// Linear, GELU (tanh), linear, four times as wide within.
pub(in crate::models) struct FeedForward {
    proj: Linear,
    out: Linear,
}

impl FeedForward {
    pub(in crate::models) fn new(d: usize, weights: &Weights) -> Result<Self> {
        Ok(Self {
            proj: Linear::new(d, 4 * d, true, &weights.pp("net.0.proj"))?,
            out: Linear::new(4 * d, d, true, &weights.pp("net.2"))?,
        })
    }

    pub(in crate::models) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.out.forward(&ops::gelu(&self.proj.forward(x)?)?)
    }
}

/// What the text stream has beyond attention; the last block has none of it, since nothing reads its text.
struct ContextTail {
    to_add_out: Linear,
    ff: FeedForward,
}

/// One block of MMDiT.
pub struct JointTransformerBlock {
    norm1: Modulation,
    norm1_context: Modulation,
    norm: LayerNorm,
    image: Projections,
    text: Projections,
    to_out: Linear,
    /// The second attention over the image alone, and its output layer.
    dual: Option<(Projections, Linear)>,
    ff: FeedForward,
    context_tail: Option<ContextTail>,
}

impl JointTransformerBlock {
    /// Block `index` of `config`, from the weights at `transformer_blocks.INDEX`.
    pub(super) fn new(config: &Config, index: usize, weights: &Weights) -> Result<Self> {
        let d = config.inner_dim();
        let own = ["to_q", "to_k", "to_v", "norm_q", "norm_k"];
        let added = [
            "add_q_proj",
            "add_k_proj",
            "add_v_proj",
            "norm_added_q",
            "norm_added_k",
        ];
        let (attn, attn2) = (weights.pp("attn"), weights.pp("attn2"));
        let linear = |weights: &Weights| Linear::new(d, d, true, weights);
        let dual = if config.dual_attention_layers.contains(&index) {
            Some((
                Projections::new(config, own, &attn2)?,
                linear(&attn2.pp("to_out.0"))?,
            ))
        } else {
            None
        };
        let is_last = index + 1 == config.num_layers;
        let context_tail = if is_last {
            None
        } else {
            Some(ContextTail {
                to_add_out: linear(&attn.pp("to_add_out"))?,
                ff: FeedForward::new(d, &weights.pp("ff_context"))?,
            })
        };
        Ok(Self {
            norm1: Modulation::new(d, if dual.is_some() { 9 } else { 6 }, &weights.pp("norm1"))?,
            norm1_context: Modulation::new(
                d,
                if is_last { 2 } else { 6 },
                &weights.pp("norm1_context"),
            )?,
            norm: LayerNorm::plain(EPS),
            image: Projections::new(config, own, &attn)?,
            text: Projections::new(config, added, &attn)?,
            to_out: linear(&attn.pp("to_out.0"))?,
            dual,
            ff: FeedForward::new(d, &weights.pp("ff"))?,
            context_tail,
        })
    }

    /// [`JointTransformerBlock::forward`] that goes through [`recompute`]: both streams as one, since a recomputed
    /// block has one result.
    pub fn forward_recomputed(
        self: &Arc<Self>,
        x: &Tensor,
        context: &Tensor,
        temb: &Tensor,
    ) -> Result<(Tensor, Option<Tensor>)> {
        if !is_recomputing() {
            return self.forward(x, context, temb);
        }
        let block = self.clone();
        let both = recompute(&[x, context, temb], None, move |inputs, _| {
            match block.forward(&inputs[0], &inputs[1], &inputs[2])? {
                (x, Some(context)) => layout::join(&x, &context, 1),
                (x, None) => Ok(x),
            }
        })?;
        if self.context_tail.is_none() {
            return Ok((both, None));
        }
        let (n, m) = (x.dim(1)?, context.dim(1)?);
        let context = layout::rows(&both, n, m)?;
        Ok((layout::rows(&both, 0, n)?, Some(context)))
    }

    /// `x` (b, n, d) the image's patches, `context` (b, m, d) the text, `temb` (b, d) the condition. Gives both
    /// streams after the block; the text is `None` after the last.
    pub fn forward(
        &self,
        x: &Tensor,
        context: &Tensor,
        temb: &Tensor,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let (n, m) = (x.dim(1)?, context.dim(1)?);
        // shift, scale and gate of the attention, the same of the feed-forward, the same of the second attention
        let image = self.norm1.forward(temb)?;
        let text = self.norm1_context.forward(temb)?;
        let normed = self.norm.forward(x)?;
        let normed_text = self.norm.forward(context)?;
        let x_in = ops::modulate(&normed, &image[0], &image[1])?;
        let context_in = match &self.context_tail {
            Some(_) => ops::modulate(&normed_text, &text[0], &text[1])?,
            // the last block's text norm has its scale first
            None => ops::modulate(&normed_text, &text[1], &text[0])?,
        };

        let [q, k, v] = self.image.forward(&x_in)?;
        let [text_q, text_k, text_v] = self.text.forward(&context_in)?;
        // the last block's text asks as well, though nothing reads the answer: its queries are weights of the published
        // files and targets of adapters, and get a gradient of zero like the reference's
        let q = layout::join(&q, &text_q, 2)?;
        let k = layout::join(&k, &text_k, 2)?;
        let v = layout::join(&v, &text_v, 2)?;
        let attended = attend(&q, &k, &v)?;

        let y = self.to_out.forward(&layout::rows(&attended, 0, n)?)?;
        let mut x = ops::gated_residual(x, &image[2], &y)?;
        if let Some((projections, to_out)) = &self.dual {
            let [q, k, v] = projections.forward(&ops::modulate(&normed, &image[6], &image[7])?)?;
            let y = to_out.forward(&attend(&q, &k, &v)?)?;
            x = ops::gated_residual(&x, &image[8], &y)?;
        }
        let y = ops::modulate(&self.norm.forward(&x)?, &image[3], &image[4])?;
        let x = ops::gated_residual(&x, &image[5], &self.ff.forward(&y)?)?;

        let Some(tail) = &self.context_tail else {
            return Ok((x, None));
        };
        let y = tail.to_add_out.forward(&layout::rows(&attended, n, m)?)?;
        let context = ops::gated_residual(context, &text[2], &y)?;
        let y = ops::modulate(&self.norm.forward(&context)?, &text[3], &text[4])?;
        let context = ops::gated_residual(&context, &text[5], &tail.ff.forward(&y)?)?;
        Ok((x, Some(context)))
    }
}
