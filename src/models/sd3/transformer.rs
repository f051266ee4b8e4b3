//! The denoiser of Stable Diffusion 3 and 3.5: MMDiT (Esser et al. 2024, arXiv 2403.03206), as diffusers'
//! `SD3Transformer2DModel` computes it and names its weights.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::block::{JointTransformerBlock, Modulation};
use crate::models::encoder::Activation;
use crate::models::limits::{CHANNELS, HEADS, LAYERS, Limited, Limits, SIDE, WIDTH};
use crate::models::timestep::{Sinusoid, TimestepEmbedding};
use crate::nn::ops::Padding;
use crate::nn::{Conv2d, Init, LayerNorm, Linear, Weights, ops};
use crate::{Error, Result};

/// Linear layers that a supervisor's adapter joins, as in diffusers' `train_dreambooth_lora_sd3.py`.
pub const LORA_TARGETS: [&str; 8] = [
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
];

/// How the timestep is given.
pub(in crate::models) const TIMESTEP: Sinusoid = Sinusoid {
    channels: 256,
    cosines_first: true,
    shift: 0.0,
};

/// How the queries and keys of each head are normalised; weights are each stream's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QkNorm {
    /// Root mean square, with a weight.
    RmsNorm,
    /// Mean and variance, with a weight and a bias.
    LayerNorm,
    /// Mean and variance alone.
    Fp32LayerNorm,
}

/// `transformer/config.json`; the defaults are diffusers'.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Side of the latents the positions of a new model are scaled to.
    pub sample_size: usize,
    /// Latents per side of a patch.
    pub patch_size: usize,
    /// Channels of the latents that go in.
    pub in_channels: usize,
    /// Number of joint blocks.
    pub num_layers: usize,
    /// Width of an attention head.
    pub attention_head_dim: usize,
    /// Number of attention heads.
    pub num_attention_heads: usize,
    /// Width of `encoder_hidden_states`.
    pub joint_attention_dim: usize,
    /// Width they are projected to; equals heads × head width.
    pub caption_projection_dim: usize,
    /// Width of `pooled_projections`.
    pub pooled_projection_dim: usize,
    /// Channels of the output; absent means as many as go in.
    pub out_channels: Option<usize>,
    /// Side of the table of positions, in patches; its centre is used.
    pub pos_embed_max_size: usize,
    /// Blocks with a second attention over the image alone (SD3.5 Medium).
    pub dual_attention_layers: Vec<usize>,
    /// Normalisation of queries and keys; absent in SD3, `rms_norm` in SD3.5. diffusers' other kinds cannot be built
    /// with both streams.
    pub qk_norm: Option<QkNorm>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            sample_size: 128,
            patch_size: 2,
            in_channels: 16,
            num_layers: 18,
            attention_head_dim: 64,
            num_attention_heads: 18,
            joint_attention_dim: 4096,
            caption_projection_dim: 1152,
            pooled_projection_dim: 2048,
            out_channels: Some(16),
            pos_embed_max_size: 96,
            dual_attention_layers: Vec::new(),
            qk_norm: None,
        }
    }
}

impl Limited for Config {
    fn limit(&self, limits: &mut Limits) {
        limits.within("sample_size", self.sample_size, &SIDE);
        limits.within("patch_size", self.patch_size, &(1..=self.sample_size));
        limits.within("in_channels", self.in_channels, &CHANNELS);
        limits.within("out_channels", self.outputs(), &CHANNELS);
        limits.within("num_layers", self.num_layers, &LAYERS);
        limits.within("attention_head_dim", self.attention_head_dim, &WIDTH);
        limits.within("num_attention_heads", self.num_attention_heads, &HEADS);
        limits.within("joint_attention_dim", self.joint_attention_dim, &WIDTH);
        let caption = self.caption_projection_dim;
        limits.within("caption_projection_dim", caption, &WIDTH);
        let pooled = self.pooled_projection_dim;
        limits.within("pooled_projection_dim", pooled, &WIDTH);
        // Its square is a number of rows.
        limits.within("pos_embed_max_size", self.pos_embed_max_size, &(1..=4096));
    }
}

impl Config {
    /// Width of the residual streams.
    pub fn inner_dim(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    fn outputs(&self) -> usize {
        self.out_channels.unwrap_or(self.in_channels)
    }

    fn check(&self) -> Result<()> {
        let inner = self.inner_dim();
        let (what, hint) = if self.caption_projection_dim != inner {
            (
                format!("caption_projection_dim {}", self.caption_projection_dim),
                format!(
                    "num_attention_heads · attention_head_dim is {inner}: both streams have that width"
                ),
            )
        } else if inner == 0 || !inner.is_multiple_of(4) {
            (
                format!("a transformer {inner} wide"),
                "the positions need a width that is a multiple of 4".to_string(),
            )
        } else if self.patch_size == 0 || self.sample_size < self.patch_size {
            (
                format!(
                    "patch_size {} for sample_size {}",
                    self.patch_size, self.sample_size
                ),
                "a patch holds at least one latent and fits into the sample".to_string(),
            )
        } else if self.num_layers == 0 {
            ("num_layers 0".to_string(), "at least one block".to_string())
        } else {
            return Ok(());
        };
        Err(Error::invalid(what, hint))
    }
}

/// Patches of the latents, with positions.
struct PatchEmbed {
    proj: Conv2d,
    /// (1, max², d), row by row.
    pos_embed: Tensor,
    patch: usize,
    max: usize,
}

impl PatchEmbed {
    fn new(config: &Config, weights: &Weights) -> Result<Self> {
        let (patch, max, d) = (
            config.patch_size,
            config.pos_embed_max_size,
            config.inner_dim(),
        );
        let padding = Padding::Same(0);
        let proj = Conv2d::new(
            config.in_channels,
            d,
            patch,
            patch,
            padding,
            &weights.pp("proj"),
        )?;
        let pos_embed = weights.buffer((1, max * max, d), "pos_embed", Init::Zeros)?;
        if !weights.contains("pos_embed") {
            let name = format!("{}.pos_embed", weights.path());
            let drawn = weights
                .variables()
                .into_iter()
                .find(|(key, _)| *key == name);
            if let Some((_, variable)) = drawn {
                let table =
                    sin_cos_positions(max, config.sample_size / patch, d, weights.device())?;
                variable.set(&table.to_dtype(variable.dtype())?)?;
            }
        }
        Ok(Self {
            proj,
            pos_embed,
            patch,
            max,
        })
    }

    /// (b, c, h, w) to (b, ⌊h / patch⌋ · ⌊w / patch⌋, d).
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (_, _, h, w) = x.dims4()?;
        let (rows, columns) = (h / self.patch, w / self.patch);
        if rows == 0 || columns == 0 || rows.max(columns) > self.max {
            let largest = self.max * self.patch;
            return Err(Error::invalid(
                format!(
                    "latents of {h}×{w} for patches of {} and positions up to {largest}",
                    self.patch
                ),
                format!("use sides from {} to {largest}", self.patch),
            ));
        }
        let (top, left) = ((self.max - rows) / 2, (self.max - columns) / 2);
        let d = self.pos_embed.dim(2)?;
        let positions = self
            .pos_embed
            .reshape((1, self.max, self.max, d))?
            .narrow(1, top, rows)?
            .narrow(2, left, columns)?
            .contiguous()?
            .reshape((1, rows * columns, d))?;
        let patches = self.proj.forward(x)?.flatten_from(2)?.transpose(1, 2)?;
        Ok(patches.contiguous()?.broadcast_add(&positions)?)
    }
}

/// The table (1, max², d) that a new model starts with: sines and cosines of the column in the first half of the
/// channels, of the row in the second, on a grid scaled so that `max` steps span `base` (diffusers'
/// `get_2d_sincos_pos_embed`, after MAE).
fn sin_cos_positions(max: usize, base: usize, d: usize, device: &Device) -> Result<Tensor> {
    let quarter = d / 4;
    let mut values = vec![0f32; max * max * d];
    let spread = max as f32 / base as f32;
    for (cell, out) in values.chunks_exact_mut(d).enumerate() {
        let (row, column) = (cell / max, cell % max);
        for (half, position) in [column, row].into_iter().enumerate() {
            let position = f64::from(position as f32 / spread);
            for i in 0..quarter {
                let angle = position / 10000f64.powf(i as f64 / quarter as f64);
                out[half * 2 * quarter + i] = angle.sin() as f32;
                out[half * 2 * quarter + quarter + i] = angle.cos() as f32;
            }
        }
    }
    Ok(Tensor::from_vec(values, (1, max * max, d), device)?)
}

/// The denoiser.
pub struct Sd3Transformer {
    config: Config,
    pos_embed: PatchEmbed,
    timestep_embedder: TimestepEmbedding,
    text_embedder: TimestepEmbedding,
    context_embedder: Linear,
    transformer_blocks: Vec<Arc<JointTransformerBlock>>,
    norm_out: Modulation,
    norm: LayerNorm,
    proj_out: Linear,
}

impl Sd3Transformer {
    /// Takes the weights of a `transformer/` folder; faults in names and shapes are reported by
    /// [`Weights::finish`]. A new model starts with sine-cosine positions and with every modulation and the last
    /// layer at zero, as DiT does (Peebles and Xie 2023, arXiv 2212.09748). Fails where `config` contradicts itself.
    pub fn new(config: Config, weights: &Weights) -> Result<Self> {
        config.check()?;
        let d = config.inner_dim();
        let blocks = weights.pp("transformer_blocks");
        let transformer_blocks = (0..config.num_layers)
            .map(|i| {
                let block = JointTransformerBlock::new(&config, i, &blocks.pp(i))?;
                Ok(Arc::new(block))
            })
            .collect::<Result<_>>()?;
        let embedder = |inputs, name: &str| {
            let place = weights.pp("time_text_embed").pp(name);
            TimestepEmbedding::new(inputs, d, Activation::Silu, &place)
        };
        let outputs = config.patch_size * config.patch_size * config.outputs();
        Ok(Self {
            pos_embed: PatchEmbed::new(&config, &weights.pp("pos_embed"))?,
            timestep_embedder: embedder(TIMESTEP.channels, "timestep_embedder")?,
            text_embedder: embedder(config.pooled_projection_dim, "text_embedder")?,
            context_embedder: Linear::new(
                config.joint_attention_dim,
                d,
                true,
                &weights.pp("context_embedder"),
            )?,
            transformer_blocks,
            norm_out: Modulation::new(d, 2, &weights.pp("norm_out"))?,
            norm: LayerNorm::plain(super::block::EPS),
            proj_out: Linear::with_init(d, outputs, true, Init::Zeros, &weights.pp("proj_out"))?,
            config,
        })
    }

    /// What the model was built from.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The joint blocks, in order.
    pub fn blocks(&self) -> &[Arc<JointTransformerBlock>] {
        &self.transformer_blocks
    }

    /// The velocity at noisy latents. `hidden_states` (b, in_channels, h, w); `timestep` (b), f32 in [0, 1000];
    /// `encoder_hidden_states` (b, n, joint_attention_dim), `pooled_projections` (b, pooled_projection_dim). Result
    /// (b, out_channels, h, w) in the weights' dtype; where h and w are no multiples of the patch size, it is smaller
    /// by what remains, as in the reference.
    pub fn forward(
        &self,
        hidden_states: &Tensor,
        timestep: &Tensor,
        encoder_hidden_states: &Tensor,
        pooled_projections: &Tensor,
    ) -> Result<Tensor> {
        let (_, _, h, w) = hidden_states.dims4()?;
        let mut x = self.pos_embed.forward(hidden_states)?;
        let temb = self.embed_condition(timestep, pooled_projections)?;
        let mut context = Some(self.context_embedder.forward(encoder_hidden_states)?);
        for block in &self.transformer_blocks {
            if let Some(text) = &context {
                (x, context) = block.forward_recomputed(&x, text, &temb)?;
            }
        }
        let chunks = self.norm_out.forward(&temb)?;
        // the last norm has its scale first, unlike those of the blocks
        let x = ops::modulate(&self.norm.forward(&x)?, &chunks[1], &chunks[0])?;
        self.unpatch(&self.proj_out.forward(&x)?, h, w)
    }

    /// The vector (b, d) that modulates every block, from the timestep and the pooled text.
    fn embed_condition(&self, timestep: &Tensor, pooled: &Tensor) -> Result<Tensor> {
        let sinusoid = TIMESTEP.embed(timestep)?.to_dtype(pooled.dtype())?;
        let time = self.timestep_embedder.forward(&sinusoid)?;
        Ok((time + self.text_embedder.forward(pooled)?)?)
    }

    /// (b, rows · columns, p · p · c) to (b, c, h, w).
    fn unpatch(&self, x: &Tensor, h: usize, w: usize) -> Result<Tensor> {
        let (p, c) = (self.config.patch_size, self.config.outputs());
        let (b, rows, columns) = (x.dim(0)?, h / p, w / p);
        Ok(x.reshape(&[b, rows, columns, p, p, c][..])?
            .permute([0, 5, 1, 3, 2, 4])?
            .contiguous()?
            .reshape((b, c, rows * p, columns * p))?)
    }
}
