//! The encoder of T5 (Raffel et al. 2019, arXiv 1910.10683) and flan-T5, in the Hugging Face layout.
//!
//! Checkpoint: `google/flan-t5-xl`. Queries are not scaled, positions enter as a learned bias on the scores, and
//! nothing has a bias of its own.

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;

use super::encoder::Activation;
use super::limits::{HEADS, LAYERS, Limited, Limits, VOCABULARY, WIDTH};
use crate::nn::{Embedding, Init, Linear, Mask, RmsNorm, Weights, layout, ops};
use crate::{Error, Result};

/// Added to the scores of padding. Finite, so that a text of nothing but padding gives numbers.
const HIDDEN: f32 = -1e30;

/// `config.json`, with Hugging Face's defaults.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Number of tokens. Default 32128.
    pub vocab_size: usize,
    /// Width of the residual stream. Default 512.
    pub d_model: usize,
    /// Width of one head. Default 64.
    pub d_kv: usize,
    /// Width of the feed-forward's hidden layer. Default 2048.
    pub d_ff: usize,
    /// Number of blocks. Default 6.
    pub num_layers: usize,
    /// Number of heads. Default 8.
    pub num_heads: usize,
    /// Number of learned biases per head; half of them for each direction. Default 32.
    pub relative_attention_num_buckets: usize,
    /// Distances from here on share a bucket. Default 128.
    pub relative_attention_max_distance: usize,
    /// Added to the mean square in norms. Default 1e-6.
    pub layer_norm_epsilon: f64,
    /// The feed-forward's form. Default Relu.
    pub feed_forward_proj: FeedForwardKind,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 32128,
            d_model: 512,
            d_kv: 64,
            d_ff: 2048,
            num_layers: 6,
            num_heads: 8,
            relative_attention_num_buckets: 32,
            relative_attention_max_distance: 128,
            layer_norm_epsilon: 1e-6,
            feed_forward_proj: FeedForwardKind::Plain(Activation::Relu),
        }
    }
}

impl Limited for Config {
    fn limit(&self, limits: &mut Limits) {
        limits.within("vocab_size", self.vocab_size, &VOCABULARY);
        limits.within("d_model", self.d_model, &WIDTH);
        limits.within("d_kv", self.d_kv, &WIDTH);
        limits.within("d_ff", self.d_ff, &WIDTH);
        limits.within("num_layers", self.num_layers, &LAYERS);
        limits.within("num_heads", self.num_heads, &HEADS);
        // Each direction has a half of them, of which one half are single distances.
        let buckets = self.relative_attention_num_buckets;
        let distance = self.relative_attention_max_distance;
        limits.within("relative_attention_num_buckets", buckets, &(4..=1024));
        let single = (buckets / 4 + 1)..=1 << 20;
        limits.within("relative_attention_max_distance", distance, &single);
        limits.from_zero("layer_norm_epsilon", self.layer_norm_epsilon);
    }
}

/// The feed-forward's form, in configs `ACTIVATION` or `gated-ACTIVATION`: `relu` in T5, `gated-gelu` in T5 v1.1 and
/// flan-T5, where the GELU is the tanh approximation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum FeedForwardKind {
    /// `wo(activation(wi·x))`.
    Plain(Activation),
    /// `wo(activation(wi_0·x) · wi_1·x)`.
    Gated(Activation),
}

impl TryFrom<String> for FeedForwardKind {
    type Error = serde::de::value::Error;

    fn try_from(text: String) -> std::result::Result<Self, Self::Error> {
        let activation =
            |name: &str| Activation::deserialize(serde::de::value::StrDeserializer::new(name));
        match text.strip_prefix("gated-") {
            Some("gelu") => Ok(Self::Gated(Activation::GeluNew)),
            Some(name) => activation(name).map(Self::Gated),
            None => activation(&text).map(Self::Plain),
        }
    }
}

enum FeedForward {
    Plain {
        wi: Linear,
        wo: Linear,
        activation: Activation,
    },
    Gated {
        wi_0: Linear,
        wi_1: Linear,
        wo: Linear,
        activation: Activation,
    },
}

impl FeedForward {
    fn new(c: &Config, weights: &Weights) -> Result<Self> {
        let inner = |name| Linear::new(c.d_model, c.d_ff, false, &weights.pp(name));
        let wo = Linear::new(c.d_ff, c.d_model, false, &weights.pp("wo"))?;
        Ok(match c.feed_forward_proj {
            FeedForwardKind::Plain(activation) => Self::Plain {
                wi: inner("wi")?,
                wo,
                activation,
            },
            FeedForwardKind::Gated(activation) => Self::Gated {
                wi_0: inner("wi_0")?,
                wi_1: inner("wi_1")?,
                wo,
                activation,
            },
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Plain { wi, wo, activation } => wo.forward(&activation.forward(&wi.forward(x)?)?),
            Self::Gated {
                wi_0,
                wi_1,
                wo,
                activation,
            } => wo.forward(&activation.gate(&wi_0.forward(x)?, &wi_1.forward(x)?)?),
        }
    }
}

struct Attention {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    heads: usize,
    head_dim: usize,
}

impl Attention {
    fn new(c: &Config, weights: &Weights) -> Result<Self> {
        let inner = c.num_heads * c.d_kv;
        // Smaller queries stand in for the scale that the scores lack.
        let narrow = Init::Normal(((c.d_model * c.d_kv) as f64).powf(-0.5));
        Ok(Self {
            q: Linear::with_init(c.d_model, inner, false, narrow, &weights.pp("q"))?,
            k: Linear::new(c.d_model, inner, false, &weights.pp("k"))?,
            v: Linear::new(c.d_model, inner, false, &weights.pp("v"))?,
            o: Linear::new(inner, c.d_model, false, &weights.pp("o"))?,
            heads: c.num_heads,
            head_dim: c.d_kv,
        })
    }

    fn forward(&self, x: &Tensor, mask: &Mask) -> Result<Tensor> {
        let heads = |linear: &Linear| {
            layout::split_heads(&linear.forward(x)?, 0, self.heads, self.head_dim)
        };
        let y = ops::attention(
            &heads(&self.q)?,
            &heads(&self.k)?,
            &heads(&self.v)?,
            1.0,
            mask,
        )?;
        self.o.forward(&layout::merge_heads(&y)?)
    }
}

struct Block {
    attention_norm: RmsNorm,
    attention: Attention,
    feed_forward_norm: RmsNorm,
    feed_forward: FeedForward,
}

/// The encoder.
pub struct T5Encoder {
    shared: Embedding,
    relative_attention_bias: Embedding,
    blocks: Vec<Block>,
    final_layer_norm: RmsNorm,
    config: Config,
    device: Device,
}

impl T5Encoder {
    /// Builds the encoder from `weights`, whose root is the checkpoint's; a decoder in it is not used. Call
    /// [`Weights::finish`] afterwards.
    pub fn new(config: &Config, weights: &Weights) -> Result<Self> {
        let c = config;
        let encoder = weights.pp("encoder");
        let tied = "encoder.embed_tokens.weight";
        let shared = if !weights.contains("shared.weight") && weights.contains(tied) {
            encoder.pp("embed_tokens")
        } else {
            weights.pp("shared")
        };
        let norm = |weights: Weights| RmsNorm::new(c.d_model, c.layer_norm_epsilon, &weights);
        let mut blocks = Vec::new();
        for i in 0..c.num_layers {
            let layer = encoder.pp("block").pp(i).pp("layer");
            let (first, second) = (layer.pp(0), layer.pp(1));
            blocks.push(Block {
                attention_norm: norm(first.pp("layer_norm"))?,
                attention: Attention::new(c, &first.pp("SelfAttention"))?,
                feed_forward_norm: norm(second.pp("layer_norm"))?,
                feed_forward: FeedForward::new(c, &second.pp("DenseReluDense"))?,
            });
        }
        let first = encoder.pp("block").pp(0).pp("layer").pp(0);
        Ok(Self {
            shared: Embedding::new(c.vocab_size, c.d_model, &shared)?,
            relative_attention_bias: Embedding::new(
                c.relative_attention_num_buckets,
                c.num_heads,
                &first.pp("SelfAttention").pp("relative_attention_bias"),
            )?,
            blocks,
            final_layer_norm: norm(encoder.pp("final_layer_norm"))?,
            config: c.clone(),
            device: weights.device().clone(),
        })
    }

    /// The configuration it was built with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Last hidden states (b, n, d_model) of `input_ids` (b, n) of u32; `attention_mask` (b, n) is nonzero where a
    /// token is valid. What stands at padding means nothing.
    pub fn forward(&self, input_ids: &Tensor, attention_mask: &Tensor) -> Result<Tensor> {
        let (b, n) = input_ids.dims2()?;
        if attention_mask.dims() != [b, n] {
            return Err(Error::invalid(
                format!(
                    "text of shape ({b}, {n}) with a mask of shape {:?}",
                    attention_mask.dims()
                ),
                "both have the same shape",
            ));
        }
        let padding: Vec<f32> = attention_mask
            .to_dtype(DType::F32)?
            .flatten_all()?
            .to_vec1::<f32>()?
            .into_iter()
            .map(|valid| if valid == 0.0 { HIDDEN } else { 0.0 })
            .collect();
        let padding = Tensor::from_vec(padding, (b, 1, 1, n), &self.device)?;
        let bias = self.position_bias(n)?;
        let mask = Mask::Additive(bias.broadcast_add(&padding.to_dtype(bias.dtype())?)?);
        let mut h = self.shared.forward(input_ids)?;
        for block in &self.blocks {
            let normed = block.attention_norm.forward(&h)?;
            h = layout::add(&h, &block.attention.forward(&normed, &mask)?)?;
            let normed = block.feed_forward_norm.forward(&h)?;
            h = layout::add(&h, &block.feed_forward.forward(&normed)?)?;
        }
        self.final_layer_norm.forward(&h)
    }

    /// The learned bias of every pair of positions, (1, heads, n, n).
    fn position_bias(&self, n: usize) -> Result<Tensor> {
        let c = &self.config;
        let buckets: Vec<u32> = (0..n as i64)
            .flat_map(|query| (0..n as i64).map(move |key| key - query))
            .map(|offset| {
                bucket(
                    offset,
                    c.relative_attention_num_buckets,
                    c.relative_attention_max_distance,
                )
            })
            .collect();
        let buckets = Tensor::from_vec(buckets, (n, n), &self.device)?;
        Ok(self
            .relative_attention_bias
            .forward(&buckets)?
            .permute((2, 0, 1))?
            .unsqueeze(0)?
            .contiguous()?)
    }
}

/// The bucket of a key that stands `offset` after its query: one half of the buckets for each direction, of which one
/// half are single distances and the others grow logarithmically up to `max_distance`. In f32, as the reference.
fn bucket(offset: i64, buckets: usize, max_distance: usize) -> u32 {
    let half = buckets / 2;
    let base = if offset > 0 { half } else { 0 };
    let distance = offset.unsigned_abs() as usize;
    let exact = half / 2;
    if distance < exact {
        return (base + distance) as u32;
    }
    let steps = (distance as f32 / exact as f32).ln()
        / (max_distance as f64 / exact as f64).ln() as f32
        * (half - exact) as f32;
    (base + (exact + steps as usize).min(half - 1)) as u32
}
