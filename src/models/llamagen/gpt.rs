//! LlamaGen's text-to-image GPT. Reference: `autoregressive/models/gpt.py`.
//!
//! The sequence is `cls_token_num` caption positions and then the image's tokens, row by row. Two properties of the
//! published weights are kept as they are: the caption positions have rotary rows of zeros, which makes their queries
//! and keys zero, and a caption's padding stands on the left.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use rand_chacha::ChaCha8Rng;

pub use super::config::Config;
use crate::nn::{Embedding, Init, Linear, Mask, RmsNorm, Weights, layout, no_grad, ops, recompute};
use crate::{Error, Result};

struct CaptionEmbedder {
    fc1: Linear,
    fc2: Linear,
    /// (rows, caption_dim): the reference stores 120 rows whatever `cls_token_num` is, and shorter captions meet the
    /// first ones.
    uncond_embedding: Tensor,
}

impl CaptionEmbedder {
    fn new(c: &Config, weights: &Weights) -> Result<Self> {
        let mlp = weights.pp("cap_proj");
        let init = Init::Normal(0.02);
        let rows = weights
            .dims("uncond_embedding")
            .and_then(|dims| dims.first().copied())
            .unwrap_or(c.cls_token_num);
        let uncond_embedding = weights.buffer(
            (rows, c.caption_dim),
            "uncond_embedding",
            Init::Normal((1.0 / c.caption_dim as f64).sqrt()),
        )?;
        Ok(Self {
            fc1: Linear::with_init(c.caption_dim, c.dim, false, init, &mlp.pp("fc1"))?,
            fc2: Linear::with_init(c.dim, c.dim, false, init, &mlp.pp("fc2"))?,
            uncond_embedding,
        })
    }

    fn forward(&self, captions: &Tensor) -> Result<Tensor> {
        self.fc2.forward(&ops::gelu(&self.fc1.forward(captions)?)?)
    }
}

/// Rotary tables of some positions: cosines and sines, each (n, head_dim / 2), f32.
#[derive(Clone)]
struct Rotary {
    cos: Tensor,
    sin: Tensor,
}

impl Rotary {
    /// Rows of zeros for the captions, then one row per place of the grid: the first half of the pairs turns with
    /// the row, the second with the column.
    fn new(c: &Config, device: &Device) -> Result<Self> {
        let (grid, quarter) = (c.grid(), c.head_dim() / 4);
        let half_dim = c.head_dim() / 2;
        let frequencies: Vec<f32> = (0..quarter)
            .map(|k| 1.0 / (c.rope_base as f32).powf((2 * k) as f32 / half_dim as f32))
            .collect();
        let rows = c.cls_token_num + c.block_size;
        let zeros = c.cls_token_num * half_dim;
        let (mut cos, mut sin) = (vec![0f32; zeros], vec![0f32; zeros]);
        for row in 0..grid {
            for column in 0..grid {
                for position in [row, column] {
                    for frequency in &frequencies {
                        let angle = position as f32 * frequency;
                        cos.push(angle.cos());
                        sin.push(angle.sin());
                    }
                }
            }
        }
        Ok(Self {
            cos: Tensor::from_vec(cos, (rows, half_dim), device)?,
            sin: Tensor::from_vec(sin, (rows, half_dim), device)?,
        })
    }

    fn narrow(&self, start: usize, count: usize) -> Result<Self> {
        Ok(Self {
            cos: self.cos.narrow(0, start, count)?,
            sin: self.sin.narrow(0, start, count)?,
        })
    }

    /// Turns `x` (b, h, n, d), in f32 as the reference does.
    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        ops::rope_adjacent(x, &self.cos, &self.sin)
    }
}

struct Attention {
    wqkv: Linear,
    wo: Linear,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl Attention {
    fn new(c: &Config, weights: &Weights) -> Result<Self> {
        let outputs = (c.n_head + 2 * c.kv_heads()) * c.head_dim();
        let init = Init::Normal(0.02);
        Ok(Self {
            wqkv: Linear::with_init(c.dim, outputs, false, init, &weights.pp("wqkv"))?,
            wo: Linear::with_init(c.dim, c.dim, false, init, &weights.pp("wo"))?,
            heads: c.n_head,
            kv_heads: c.kv_heads(),
            head_dim: c.head_dim(),
        })
    }

    /// What the heads see, side by side: (b, n, dim), not projected yet.
    fn attend(
        &self,
        x: &Tensor,
        rotary: &Rotary,
        mask: &Mask,
        cache: Option<(&LayerCache, usize)>,
    ) -> Result<Tensor> {
        let dim = x.dim(2)?;
        let kv_dim = self.kv_heads * self.head_dim;
        let qkv = self.wqkv.forward(x)?;
        let split = |start, heads| layout::split_heads(&qkv, start, heads, self.head_dim);
        let q = rotary.apply(&split(0, self.heads)?)?;
        let k = rotary.apply(&split(dim, self.kv_heads)?)?;
        let v = split(dim + kv_dim, self.kv_heads)?;
        let (k, v) = match cache {
            None => (k, v),
            Some((cache, position)) => cache.extend(&k, &v, position)?,
        };
        let times = self.heads / self.kv_heads;
        let (k, v) = (ops::repeat_heads(&k, times)?, ops::repeat_heads(&v, times)?);
        let scale = 1.0 / (self.head_dim as f64).sqrt();
        let y = ops::attention(&q, &k, &v, scale, mask)?;
        layout::merge_heads(&y)
    }
}

/// The last `count` positions of `x` (b, n, dim).
fn ends(x: &Tensor, count: usize) -> Result<Tensor> {
    layout::rows(x, x.dim(1)? - count, count)
}

struct FeedForward {
    /// The gate.
    w1: Linear,
    w3: Linear,
    w2: Linear,
}

impl FeedForward {
    fn new(c: &Config, weights: &Weights) -> Result<Self> {
        let hidden = c.hidden_dim();
        let init = Init::Normal(0.02);
        let up = |name| Linear::with_init(c.dim, hidden, false, init, &weights.pp(name));
        Ok(Self {
            w1: up("w1")?,
            w3: up("w3")?,
            w2: Linear::with_init(hidden, c.dim, false, init, &weights.pp("w2"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let gated = ops::swiglu(&self.w1.forward(x)?, &self.w3.forward(x)?)?;
        self.w2.forward(&gated)
    }
}

struct Block {
    attention: Attention,
    feed_forward: FeedForward,
    attention_norm: RmsNorm,
    ffn_norm: RmsNorm,
    resid_dropout_p: f64,
    ffn_dropout_p: f64,
}

impl Block {
    fn new(c: &Config, weights: &Weights) -> Result<Self> {
        Ok(Self {
            attention: Attention::new(c, &weights.pp("attention"))?,
            feed_forward: FeedForward::new(c, &weights.pp("feed_forward"))?,
            attention_norm: RmsNorm::new(c.dim, c.norm_eps, &weights.pp("attention_norm"))?,
            ffn_norm: RmsNorm::new(c.dim, c.norm_eps, &weights.pp("ffn_norm"))?,
            resid_dropout_p: c.resid_dropout_p,
            ffn_dropout_p: c.ffn_dropout_p,
        })
    }

    /// The layer's result at all positions of `x` (b, n, dim), or at the last `wanted`.
    fn forward(
        &self,
        x: &Tensor,
        rotary: &Rotary,
        mask: &Mask,
        cache: Option<(&LayerCache, usize)>,
        wanted: Option<usize>,
        mut dropout: Option<&mut ChaCha8Rng>,
    ) -> Result<Tensor> {
        let normed = self.attention_norm.forward(x)?;
        let attended = self.attention.attend(&normed, rotary, mask, cache)?;
        let (x, attended) = match wanted {
            Some(count) => (&ends(x, count)?, ends(&attended, count)?),
            None => (x, attended),
        };
        let attended = self.attention.wo.forward(&attended)?;
        let h = add_dropped(x, &attended, self.resid_dropout_p, &mut dropout)?;
        let fed = self.feed_forward.forward(&self.ffn_norm.forward(&h)?)?;
        add_dropped(&h, &fed, self.ffn_dropout_p, &mut dropout)
    }
}

struct LayerCache {
    keys: Tensor,
    values: Tensor,
}

impl LayerCache {
    /// Writes `k` and `v` (b, h, n, d) at `position` and returns everything up to their end.
    fn extend(&self, k: &Tensor, v: &Tensor, position: usize) -> Result<(Tensor, Tensor)> {
        let length = position + k.dim(2)?;
        self.keys.slice_set(&layout::contiguous(k)?, 2, position)?;
        self.values
            .slice_set(&layout::contiguous(v)?, 2, position)?;
        Ok((
            self.keys.narrow(2, 0, length)?,
            self.values.narrow(2, 0, length)?,
        ))
    }
}

/// Keys and values of a batch of sequences that are being sampled, with room for a fixed number of tokens.
pub struct Cache {
    layers: Vec<LayerCache>,
    /// Additive mask over keys, (b, 1, 1, capacity): caption padding is hidden.
    hidden: Option<Tensor>,
    length: usize,
    capacity: usize,
}

impl Cache {
    /// Number of positions held, captions included.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether nothing has been prefilled.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }
}

/// The model.
pub struct Gpt {
    config: Config,
    cls_embedding: CaptionEmbedder,
    tok_embeddings: Embedding,
    layers: Vec<Arc<Block>>,
    norm: RmsNorm,
    output: Linear,
    rotary: Rotary,
    dtype: DType,
    device: Device,
}

impl Gpt {
    /// Builds the model from `weights`, whose root is the checkpoint's. Call [`Weights::finish`] afterwards.
    pub fn new(config: &Config, weights: &Weights) -> Result<Self> {
        config.validate()?;
        let c = config;
        Ok(Self {
            config: c.clone(),
            cls_embedding: CaptionEmbedder::new(c, &weights.pp("cls_embedding"))?,
            tok_embeddings: Embedding::new(c.vocab_size, c.dim, &weights.pp("tok_embeddings"))?,
            layers: (0..c.n_layer)
                .map(|i| Ok(Arc::new(Block::new(c, &weights.pp("layers").pp(i))?)))
                .collect::<Result<_>>()?,
            norm: RmsNorm::new(c.dim, c.norm_eps, &weights.pp("norm"))?,
            output: Linear::with_init(
                c.dim,
                c.vocab_size,
                false,
                Init::Zeros,
                &weights.pp("output"),
            )?,
            rotary: Rotary::new(c, weights.device())?,
            dtype: weights.dtype(),
            device: weights.device().clone(),
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

    /// The null condition that stands for "no caption", (cls_token_num, caption_dim).
    ///
    /// # Errors
    /// When the checkpoint stores fewer rows: it computes with captions only.
    pub fn uncond_embedding(&self) -> Result<Tensor> {
        let stored = &self.cls_embedding.uncond_embedding;
        let (rows, wanted) = (stored.dim(0)?, self.config.cls_token_num);
        if rows < wanted {
            return Err(Error::invalid(
                format!("a null condition of {rows} rows for captions of {wanted} tokens"),
                "use captions alone: guidance 1, and no dropping of captions in training",
            ));
        }
        Ok(stored.narrow(0, 0, wanted)?)
    }

    /// `caption_embeddings` (b, cls_token_num, caption_dim) with the null condition in place of sample i where
    /// `drop[i]`, as condition dropout in training does. The caption's mask stays as it is.
    ///
    /// # Errors
    /// When a caption is dropped and there is no whole null condition, see [`Gpt::uncond_embedding`].
    pub fn drop_captions(&self, caption_embeddings: &Tensor, drop: &[bool]) -> Result<Tensor> {
        let b = caption_embeddings.dim(0)?;
        if drop.len() != b {
            return Err(Error::invalid(
                format!("{} drop flags for {b} captions", drop.len()),
                "give one for each caption",
            ));
        }
        if !drop.contains(&true) {
            return Ok(caption_embeddings.clone());
        }
        let shape = caption_embeddings.shape();
        let null = self
            .uncond_embedding()?
            .to_dtype(caption_embeddings.dtype())?
            .broadcast_as(shape)?;
        let flags: Vec<u8> = drop.iter().map(|&drop| u8::from(drop)).collect();
        let flags = Tensor::from_vec(flags, (b, 1, 1), caption_embeddings.device())?;
        Ok(flags
            .broadcast_as(shape)?
            .where_cond(&null, caption_embeddings)?)
    }

    /// Logits (b, n, vocab_size) in f32 for all n tokens of images whose first n − 1 are given: from the last caption
    /// position on, as in training.
    ///
    /// `caption_embeddings` (b, cls_token_num, caption_dim); `caption_mask` (b, cls_token_num), nonzero where valid,
    /// padded on the left; `tokens` (b, n − 1) of u32 (n − 1 may be 0). Dropout happens only where a generator is given.
    pub fn forward(
        &self,
        caption_embeddings: &Tensor,
        caption_mask: &Tensor,
        tokens: &Tensor,
        mut dropout: Option<&mut ChaCha8Rng>,
    ) -> Result<Tensor> {
        let c = &self.config;
        let b = self.check_captions(caption_embeddings, caption_mask)?;
        if dropout.is_some() && c.attn_dropout_p != 0.0 {
            return Err(Error::invalid(
                format!("training with attn_dropout_p {}", c.attn_dropout_p),
                "set it to 0 in the checkpoint's config.json, as in all that are published",
            ));
        }
        let (rows, given) = tokens.dims2()?;
        if rows != b || given >= c.block_size {
            return Err(Error::invalid(
                format!("tokens of shape ({rows}, {given}) for {b} captions"),
                format!("at most {} tokens for each caption", c.block_size - 1),
            ));
        }
        let (skipped, caption_embeddings, caption_mask) =
            self.without_padding(caption_embeddings, caption_mask)?;
        let captions = self
            .cls_embedding
            .forward(&caption_embeddings.to_dtype(self.dtype)?)?;
        let h = if given == 0 {
            captions
        } else {
            layout::join(&captions, &self.tok_embeddings.forward(tokens)?, 1)?
        };
        let mut h = drop_out(h, c.token_dropout_p, &mut dropout)?;
        let n = c.cls_token_num - skipped + given;
        let rotary = self.rotary.narrow(skipped, n)?;
        let mask = Mask::CausalKeys(self.hidden_keys(&caption_mask, n)?);
        for (i, layer) in self.layers.iter().enumerate() {
            // Nothing is predicted from the captions' positions: the last layer ends without them.
            let wanted = (i + 1 == self.layers.len()).then_some(given + 1);
            let (layer, rotary, mask) = (layer.clone(), rotary.clone(), mask.clone());
            h = recompute(&[&h], dropout.as_deref_mut(), move |h, dropout| {
                layer.forward(&h[0], &rotary, &mask, None, wanted, dropout)
            })?;
        }
        self.logits(&ends(&h, given + 1)?)
    }

    /// An empty cache for `batch` sequences of a caption and up to `tokens` image tokens.
    pub fn cache(&self, batch: usize, tokens: usize) -> Result<Cache> {
        let c = &self.config;
        let capacity = c.cls_token_num + tokens.min(c.block_size);
        let shape = (batch, c.kv_heads(), capacity, c.head_dim());
        let layers = (0..c.n_layer)
            .map(|_| {
                Ok(LayerCache {
                    keys: Tensor::zeros(shape, self.dtype, &self.device)?,
                    values: Tensor::zeros(shape, self.dtype, &self.device)?,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Cache {
            layers,
            hidden: None,
            length: 0,
            capacity,
        })
    }

    /// Fills an empty `cache` with captions and gives the logits (b, vocab_size), f32, of the first image token.
    /// Inputs as in [`Gpt::forward`]. Nothing is recorded for gradients.
    pub fn prefill(
        &self,
        caption_embeddings: &Tensor,
        caption_mask: &Tensor,
        cache: &mut Cache,
    ) -> Result<Tensor> {
        self.check_captions(caption_embeddings, caption_mask)?;
        let n = self.config.cls_token_num;
        no_grad(|| {
            let mut h = self
                .cls_embedding
                .forward(&caption_embeddings.to_dtype(self.dtype)?)?;
            let rotary = self.rotary.narrow(0, n)?;
            let mask = Mask::CausalKeys(self.hidden_keys(caption_mask, n)?);
            for (layer, cache) in self.layers.iter().zip(&cache.layers) {
                h = layer.forward(&h, &rotary, &mask, Some((cache, 0)), None, None)?;
            }
            cache.hidden = Some(self.hidden_keys(caption_mask, cache.capacity)?);
            cache.length = n;
            Ok(self
                .logits(&h.narrow(1, n - 1, 1)?.contiguous()?)?
                .squeeze(1)?)
        })
    }

    /// Appends one token to each sequence and gives the logits (b, vocab_size), f32, of the next. `tokens` (b) of u32.
    /// Nothing is recorded for gradients.
    pub fn step(&self, tokens: &Tensor, cache: &mut Cache) -> Result<Tensor> {
        let Some(hidden) = cache.hidden.clone() else {
            return Err(Error::invalid(
                "a step with an empty cache",
                "call prefill first",
            ));
        };
        if cache.length == cache.capacity {
            return Err(Error::invalid(
                format!("the cache's {} positions are used up", cache.capacity),
                "make the cache for more tokens",
            ));
        }
        no_grad(|| {
            let position = cache.length;
            let mut h = self.tok_embeddings.forward(&tokens.unsqueeze(1)?)?;
            let rotary = self.rotary.narrow(position, 1)?;
            let mask = Mask::Additive(hidden.narrow(3, 0, position + 1)?.contiguous()?);
            for (layer, cache) in self.layers.iter().zip(&cache.layers) {
                h = layer.forward(&h, &rotary, &mask, Some((cache, position)), None, None)?;
            }
            cache.length += 1;
            Ok(self.logits(&h)?.squeeze(1)?)
        })
    }

    fn logits(&self, h: &Tensor) -> Result<Tensor> {
        layout::to_f32(&self.output.forward(&self.norm.forward(h)?)?)
    }

    fn check_captions(&self, captions: &Tensor, mask: &Tensor) -> Result<usize> {
        let c = &self.config;
        let (b, n, d) = captions.dims3()?;
        if (n, d) != (c.cls_token_num, c.caption_dim) || mask.dims() != [b, n] {
            return Err(Error::invalid(
                format!(
                    "caption embeddings of shape {:?} with a mask of shape {:?}",
                    captions.dims(),
                    mask.dims()
                ),
                format!(
                    "(b, {}, {}) and (b, {}) are expected",
                    c.cls_token_num, c.caption_dim, c.cls_token_num
                ),
            ));
        }
        Ok(b)
    }

    /// How many positions all captions begin with as padding, and the captions and their mask without these. Nothing
    /// sees such positions, and every caption position is turned alike, so that only rounding can tell the difference;
    /// of LlamaGen's 120 positions a prompt takes some twenty. The last one stays in any case. Sampling does not leave
    /// them out: there a row is drawn to the bit alike whatever shares its batch.
    fn without_padding(&self, captions: &Tensor, mask: &Tensor) -> Result<(usize, Tensor, Tensor)> {
        let n = mask.dim(1)?;
        let rows = self.valid(mask)?.to_vec2::<u8>()?;
        let padding = |row: &Vec<u8>| row.iter().take_while(|&&valid| valid == 0).count();
        let skipped = rows.iter().map(padding).min().unwrap_or(0).min(n - 1);
        if skipped == 0 {
            return Ok((0, captions.clone(), mask.clone()));
        }
        let kept = |x: &Tensor| x.narrow(1, skipped, n - skipped)?.contiguous();
        Ok((skipped, kept(captions)?, kept(mask)?))
    }

    /// `mask` as u8 ones and zeros on the model's device.
    fn valid(&self, mask: &Tensor) -> Result<Tensor> {
        Ok(mask
            .to_device(&self.device)?
            .ne(&mask.zeros_like()?.to_device(&self.device)?)?)
    }

    /// 0 where `allowed` (u8) is nonzero, −∞ elsewhere.
    fn additive(&self, allowed: &Tensor) -> Result<Tensor> {
        let zeros = Tensor::zeros(allowed.shape(), DType::F32, &self.device)?;
        let hidden = Tensor::full(f32::NEG_INFINITY, allowed.shape(), &self.device)?;
        Ok(allowed.where_cond(&zeros, &hidden)?)
    }

    /// (b, 1, 1, n), added to the scores of keys: caption padding is hidden.
    fn hidden_keys(&self, caption_mask: &Tensor, n: usize) -> Result<Tensor> {
        let (b, captions) = caption_mask.dims2()?;
        let valid = self.valid(caption_mask)?;
        let valid = if n > captions {
            let images = Tensor::ones((b, n - captions), DType::U8, &self.device)?;
            Tensor::cat(&[valid, images], 1)?
        } else {
            valid
        };
        Ok(self.additive(&valid)?.unsqueeze(1)?.unsqueeze(1)?)
    }
}

/// `x + y`, with dropout of `y` where a generator is given, that is, in training.
fn add_dropped(
    x: &Tensor,
    y: &Tensor,
    p: f64,
    generator: &mut Option<&mut ChaCha8Rng>,
) -> Result<Tensor> {
    match generator {
        Some(generator) => ops::dropout_onto(x, y, p, generator),
        None => layout::add(x, y),
    }
}

/// Dropout where a generator is given, that is, in training.
fn drop_out(x: Tensor, p: f64, generator: &mut Option<&mut ChaCha8Rng>) -> Result<Tensor> {
    match generator {
        Some(generator) => ops::dropout(&x, p, generator),
        None => Ok(x),
    }
}
