//! Chameleon's transformer (Chameleon team 2024, arXiv 2405.09818), which is LLaMA's with a layer norm of each query
//! and key. Reference: `ChameleonForConditionalGeneration` in transformers, whose logits of image tokens are not
//! masked here, as Lumina-mGPT trains and samples it.
//!
//! Two layouts of the query and key norms are read: a row for each head, or one row for several heads (Lumina-mGPT
//! stores one for all).

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use rand_chacha::ChaCha8Rng;

use super::cache::{Cache, RowCache};
pub use super::config::Config;
use crate::models::encoder::Activation;
use crate::nn::{
    Embedding, Init, LayerNorm, Linear, Mask, RmsNorm, Weights, layout, no_grad, ops, parameter,
    recompute,
};
use crate::{Error, Result};

/// The layer norm of queries or keys: each head is normalised alone and has its own scale and shift.
struct HeadNorm {
    norm: LayerNorm,
    /// (rows, head_dim), one row for every `heads / rows` neighbouring heads.
    weight: Tensor,
    bias: Tensor,
    heads: usize,
}

impl HeadNorm {
    fn new(heads: usize, head_dim: usize, weights: &Weights) -> Result<Self> {
        let rows = weights
            .dims("weight")
            .and_then(|dims| dims.first().copied())
            .filter(|rows| *rows > 0 && heads.is_multiple_of(*rows))
            .unwrap_or(heads);
        Ok(Self {
            norm: LayerNorm::plain(1e-5),
            weight: weights.get((rows, head_dim), "weight", Init::Ones)?,
            bias: weights.get((rows, head_dim), "bias", Init::Zeros)?,
            heads,
        })
    }

    /// `x` (b, heads, n, d) to the same shape.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, h, n, d) = x.dims4()?;
        if self.weight.dim(0)? == 1 {
            let (weight, bias) = (self.weight.squeeze(0)?, self.bias.squeeze(0)?);
            return ops::layer_norm(x, Some(&weight), Some(&bias), 1e-5);
        }
        let y = layout::reshape(&self.norm.forward(x)?, (b * h, n, d))?;
        let y = ops::modulate(
            &y,
            &self.each_head(&self.bias, b)?,
            &(self.each_head(&self.weight, b)? - 1.0)?,
        )?;
        layout::reshape(&y, (b, h, n, d))
    }

    /// `rows` (rows, d) as (b · heads, d).
    fn each_head(&self, rows: &Tensor, b: usize) -> Result<Tensor> {
        let (count, d) = rows.dims2()?;
        let rows = parameter(rows);
        if b * self.heads == count {
            return Ok(rows);
        }
        Ok(rows
            .reshape((1, count, 1, d))?
            .broadcast_as((b, count, self.heads / count, d))?
            .contiguous()?
            .reshape((b * self.heads, d))?)
    }
}

/// Rotary tables of the first positions: cosines and sines, each (positions, head_dim / 2), f32.
#[derive(Clone)]
struct Rotary {
    cos: Tensor,
    sin: Tensor,
}

impl Rotary {
    fn new(c: &Config, n: usize, device: &Device) -> Result<Self> {
        let half = c.head_dim() / 2;
        let frequencies: Vec<f32> = (0..half)
            .map(|i| 1.0 / (c.rope_base() as f32).powf(i as f32 / half as f32))
            .collect();
        let angles: Vec<f32> = (0..n)
            .flat_map(|position| frequencies.iter().map(move |f| position as f32 * f))
            .collect();
        let angles = Tensor::from_vec(angles, (n, half), device)?;
        Ok(Self {
            cos: angles.cos()?,
            sin: angles.sin()?,
        })
    }

    fn narrow(&self, start: usize, count: usize) -> Result<Self> {
        Ok(Self {
            cos: self.cos.narrow(0, start, count)?,
            sin: self.sin.narrow(0, start, count)?,
        })
    }

    /// Turns `x` (b, h, n, d), in f32.
    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        ops::rope_halves(x, &self.cos, &self.sin)
    }

    /// The rows of `positions`, of u32.
    fn select(&self, positions: &Tensor) -> Result<Self> {
        Ok(Self {
            cos: self.cos.index_select(positions, 0)?,
            sin: self.sin.index_select(positions, 0)?,
        })
    }
}

struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    q_norm: HeadNorm,
    k_norm: HeadNorm,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl Attention {
    fn new(c: &Config, weights: &Weights) -> Result<Self> {
        let (hidden, kv_width) = (c.hidden_size, c.kv_heads() * c.head_dim());
        let (bias, init) = (c.attention_bias, Init::Normal(0.02));
        let linear =
            |outputs, name| Linear::with_init(hidden, outputs, bias, init, &weights.pp(name));
        Ok(Self {
            q_proj: linear(hidden, "q_proj")?,
            k_proj: linear(kv_width, "k_proj")?,
            v_proj: linear(kv_width, "v_proj")?,
            o_proj: linear(hidden, "o_proj")?,
            q_norm: HeadNorm::new(c.num_attention_heads, c.head_dim(), &weights.pp("q_norm"))?,
            k_norm: HeadNorm::new(c.kv_heads(), c.head_dim(), &weights.pp("k_norm"))?,
            heads: c.num_attention_heads,
            kv_heads: c.kv_heads(),
            head_dim: c.head_dim(),
        })
    }

    /// `x` (b, n, hidden) to the same shape; `attend` is given queries (b, heads, n, d) and keys and values
    /// (b, kv_heads, n, d), and returns (b, heads, n, d).
    fn forward(
        &self,
        x: &Tensor,
        rotary: &Rotary,
        attend: impl FnOnce(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let split = |linear: &Linear, heads| {
            layout::split_heads(&linear.forward(x)?, 0, heads, self.head_dim)
        };
        let q = split(&self.q_proj, self.heads)?;
        let k = split(&self.k_proj, self.kv_heads)?;
        let v = split(&self.v_proj, self.kv_heads)?;
        let q = rotary.apply(&self.q_norm.forward(&q)?)?;
        let k = rotary.apply(&self.k_norm.forward(&k)?)?;
        self.o_proj
            .forward(&layout::merge_heads(&attend(&q, &k, &v)?)?)
    }

    fn scale(&self) -> f64 {
        1.0 / (self.head_dim as f64).sqrt()
    }

    /// Each key or value head once for every query head that it serves.
    fn repeat(&self, x: &Tensor) -> Result<Tensor> {
        ops::repeat_heads(x, self.heads / self.kv_heads)
    }
}

struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
    activation: Activation,
}

impl Mlp {
    fn new(c: &Config, weights: &Weights) -> Result<Self> {
        let (hidden, inner) = (c.hidden_size, c.intermediate_size);
        let (bias, init) = (c.mlp_bias, Init::Normal(0.02));
        let up = |name| Linear::with_init(hidden, inner, bias, init, &weights.pp(name));
        Ok(Self {
            gate_proj: up("gate_proj")?,
            up_proj: up("up_proj")?,
            down_proj: Linear::with_init(inner, hidden, bias, init, &weights.pp("down_proj"))?,
            activation: c.hidden_act,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let gate = self.gate_proj.forward(x)?;
        let gated = self.activation.gate(&gate, &self.up_proj.forward(x)?)?;
        self.down_proj.forward(&gated)
    }
}

struct Layer {
    self_attn: Attention,
    mlp: Mlp,
    input_layernorm: RmsNorm,
    post_attention_layernorm: RmsNorm,
    swin_norm: bool,
}

impl Layer {
    fn new(c: &Config, weights: &Weights) -> Result<Self> {
        let norm = |name| RmsNorm::new(c.hidden_size, c.rms_norm_eps, &weights.pp(name));
        Ok(Self {
            self_attn: Attention::new(c, &weights.pp("self_attn"))?,
            mlp: Mlp::new(c, &weights.pp("mlp"))?,
            input_layernorm: norm("input_layernorm")?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
            swin_norm: c.swin_norm,
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        rotary: &Rotary,
        attend: impl FnOnce(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
        mut dropout: Option<Dropout>,
    ) -> Result<Tensor> {
        let (norm1, norm2) = (&self.input_layernorm, &self.post_attention_layernorm);
        let h = if self.swin_norm {
            norm1.forward(&self.self_attn.forward(x, rotary, attend)?)?
        } else {
            self.self_attn.forward(&norm1.forward(x)?, rotary, attend)?
        };
        let x = layout::add(x, &Dropout::apply(&mut dropout, h)?)?;
        let h = if self.swin_norm {
            norm2.forward(&self.mlp.forward(&x)?)?
        } else {
            self.mlp.forward(&norm2.forward(&x)?)?
        };
        layout::add(&x, &Dropout::apply(&mut dropout, h)?)
    }
}

/// Dropout on both residual branches of every layer, in training.
pub struct Dropout<'a> {
    /// Probability of a zero, in [0, 1).
    pub p: f64,
    pub generator: &'a mut ChaCha8Rng,
}

impl Dropout<'_> {
    fn apply(this: &mut Option<Self>, x: Tensor) -> Result<Tensor> {
        match this {
            Some(dropout) => ops::dropout(&x, dropout.p, dropout.generator),
            None => Ok(x),
        }
    }
}

/// The model.
pub struct Backbone {
    config: Config,
    embed_tokens: Embedding,
    layers: Vec<Arc<Layer>>,
    norm: RmsNorm,
    lm_head: Linear,
    rotary: Rotary,
    /// The type of activations.
    dtype: DType,
    device: Device,
}

impl Backbone {
    /// Builds the model from `weights`, whose root is the checkpoint's; its names may lack the leading `model.`. Call
    /// [`Weights::finish`] afterwards. Adapters attach to `model.layers.0.self_attn.q_proj` and so on, and to `lm_head`.
    pub fn new(config: &Config, weights: &Weights) -> Result<Self> {
        config.validate()?;
        let c = config;
        let body = if weights.contains("embed_tokens.weight") {
            weights.as_module("model")
        } else {
            weights.pp("model")
        };
        let head = if c.tie_word_embeddings {
            body.pp("embed_tokens").as_module("lm_head")
        } else {
            weights.pp("lm_head")
        };
        let init = Init::Normal(0.02);
        Ok(Self {
            embed_tokens: Embedding::new(c.vocab_size, c.hidden_size, &body.pp("embed_tokens"))?,
            layers: (0..c.num_hidden_layers)
                .map(|i| Ok(Arc::new(Layer::new(c, &body.pp("layers").pp(i))?)))
                .collect::<Result<_>>()?,
            norm: RmsNorm::new(c.hidden_size, c.rms_norm_eps, &body.pp("norm"))?,
            lm_head: Linear::with_init(c.hidden_size, c.vocab_size, false, init, &head)?,
            rotary: Rotary::new(c, c.max_position_embeddings, weights.device())?,
            dtype: weights.dtype(),
            device: weights.device().clone(),
            config: c.clone(),
        })
    }

    /// The configuration it was built with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Logits (b, n, vocab_size) in f32 of the tokens that follow each of `ids` (b, n) of u32. Like the reference, it
    /// computes sequences longer than `max_position_embeddings` too.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        self.logits(&self.hidden(ids, None)?)
    }

    /// The normed hidden states (b, n, hidden_size) of `ids` (b, n) of u32. Padding on the right changes nothing to its
    /// left.
    pub fn hidden(&self, ids: &Tensor, mut dropout: Option<Dropout>) -> Result<Tensor> {
        let (_, n) = ids.dims2()?;
        let rotary = if n <= self.config.max_position_embeddings {
            self.rotary.narrow(0, n)?
        } else {
            Rotary::new(&self.config, n, &self.device)?
        };
        let mut h = self.embed(ids)?;
        let p = dropout.as_ref().map_or(0.0, |dropout| dropout.p);
        for layer in &self.layers {
            let (layer, rotary) = (layer.clone(), rotary.clone());
            let generator = dropout.as_mut().map(|dropout| &mut *dropout.generator);
            h = recompute(&[&h], generator, move |h, generator| {
                let attention = &layer.self_attn;
                let attend = |q: &Tensor, k: &Tensor, v: &Tensor| {
                    let (k, v) = (attention.repeat(k)?, attention.repeat(v)?);
                    ops::attention(q, &k, &v, attention.scale(), &Mask::Causal)
                };
                let dropout = generator.map(|generator| Dropout { p, generator });
                layer.forward(&h[0], &rotary, attend, dropout)
            })?;
        }
        self.norm.forward(&h)
    }

    /// Logits (…, vocab_size) in f32 of normed hidden states (…, hidden_size).
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        layout::to_f32(&self.lm_head.forward(hidden)?)
    }

    /// What [`Backbone::logits`] learns, if anything.
    pub fn head(&self) -> &Linear {
        &self.lm_head
    }

    /// An empty cache for `rows` sequences of at most `capacity` tokens each.
    pub fn cache(&self, rows: usize, capacity: usize) -> Result<Cache> {
        self.check_length(capacity)?;
        let c = &self.config;
        let shape = (1, c.kv_heads(), capacity, c.head_dim());
        Cache::new(rows, c.num_hidden_layers, shape, self.dtype, &self.device)
    }

    /// Appends `tokens` (r, tokens of sequence r, possibly none) to the sequences of `cache` and gives the logits
    /// (r, vocab_size), f32, of what follows each of those that grew, in their order. Sequences of any lengths stand
    /// side by side without padding. Nothing is recorded for gradients.
    pub fn extend(&self, tokens: &[Vec<u32>], cache: &mut Cache) -> Result<Tensor> {
        let segments = cache.segments(tokens)?;
        let positions: Vec<u32> = segments.iter().flat_map(|s| s.positions()).collect();
        let last: Vec<u32> = segments.iter().map(|s| s.last()).collect();
        no_grad(|| {
            let count = positions.len();
            let positions = Tensor::from_vec(positions, count, &self.device)?;
            let rotary = self.rotary.select(&positions)?;
            let ids = Tensor::from_vec(tokens.concat(), (1, count), &self.device)?;
            let mut h = self.embed(&ids)?;
            for (layer, cache) in self.layers.iter().zip(cache.layers()) {
                let attention = &layer.self_attn;
                let attend = |q: &Tensor, k: &Tensor, v: &Tensor| {
                    let parts = segments
                        .iter()
                        .map(|segment| {
                            let row: &RowCache = &cache[segment.row];
                            let cut = |x: &Tensor| x.narrow(2, segment.start, segment.count);
                            let (k, v) = row.extend(&cut(k)?, &cut(v)?, segment.position)?;
                            let (k, v) = (attention.repeat(&k)?, attention.repeat(&v)?);
                            ops::attention(&cut(q)?, &k, &v, attention.scale(), &Mask::Causal)
                        })
                        .collect::<Result<Vec<_>>>()?;
                    Ok(Tensor::cat(&parts, 2)?)
                };
                h = layer.forward(&h, &rotary, attend, None)?;
            }
            let last = Tensor::from_vec(last, segments.len(), &self.device)?;
            let h = h.squeeze(0)?.index_select(&last, 0)?;
            cache.advance(tokens);
            self.logits(&self.norm.forward(&h)?)
        })
    }

    fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        Ok(self.embed_tokens.forward(ids)?.to_dtype(self.dtype)?)
    }

    /// Fails where `n` tokens are more than the model was made for.
    pub(super) fn check_length(&self, n: usize) -> Result<()> {
        let most = self.config.max_position_embeddings;
        if n <= most {
            return Ok(());
        }
        Err(Error::invalid(
            format!("a sequence of {n} tokens; the model has {most} positions"),
            "choose a smaller resolution or a shorter prompt",
        ))
    }
}
