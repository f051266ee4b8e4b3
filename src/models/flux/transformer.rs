//! The denoiser of FLUX.1 (Black Forest Labs 2024) as diffusers' `FluxTransformer2DModel` computes it and names its
//! weights: blocks in which image and text have weights of their own, then blocks in which they share them.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use super::block::{DoubleBlock, SingleBlock};
use crate::models::encoder::Activation;
use crate::models::limits::{CHANNELS, HEADS, LAYERS, Limited, Limits, SIDE, WIDTH};
use crate::models::sd3::{Modulation, NORM_EPS, TIMESTEP};
use crate::models::timestep::TimestepEmbedding;
use crate::nn::{Init, LayerNorm, Linear, Weights, layout, ops};
use crate::{Error, Result};

/// Linear layers that a supervisor's adapter joins, as in diffusers' `train_dreambooth_lora_flux.py`. The ends of names
/// hit the queries, keys and values of the single blocks as well.
pub const LORA_TARGETS: [&str; 12] = [
    "attn.to_k",
    "attn.to_q",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
];

/// The base of the rotary angles.
const THETA: f64 = 10_000.0;

/// Timesteps and guidance are given in parts of one and embedded in thousandths.
const TIMESTEPS: f64 = 1000.0;

/// `transformer/config.json`; the defaults are diffusers'.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Latents per side of a patch that the model itself cuts: 1, as the pipeline packs 2×2 latents into channels.
    pub patch_size: usize,
    /// Channels of the packed latents that go in.
    pub in_channels: usize,
    /// Channels of the output; absent means as many as go in.
    pub out_channels: Option<usize>,
    /// Number of blocks with weights for either stream.
    pub num_layers: usize,
    /// Number of blocks with common weights.
    pub num_single_layers: usize,
    /// Width of an attention head.
    pub attention_head_dim: usize,
    /// Number of attention heads.
    pub num_attention_heads: usize,
    /// Width of `encoder_hidden_states`.
    pub joint_attention_dim: usize,
    /// Width of `pooled_projections`.
    pub pooled_projection_dim: usize,
    /// Whether the model is told the guidance it was distilled for (FLUX.1-dev), in place of guiding it.
    pub guidance_embeds: bool,
    /// Side of the latents that the checkpoint is for, where it says so; the published ones do not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sample_size: Option<usize>,
    /// Channels of a head that each coordinate of a position turns; together a head's width.
    pub axes_dims_rope: Vec<usize>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            patch_size: 1,
            in_channels: 64,
            out_channels: None,
            num_layers: 19,
            num_single_layers: 38,
            attention_head_dim: 128,
            num_attention_heads: 24,
            joint_attention_dim: 4096,
            pooled_projection_dim: 768,
            guidance_embeds: false,
            sample_size: None,
            axes_dims_rope: vec![16, 56, 56],
        }
    }
}

impl Limited for Config {
    fn limit(&self, limits: &mut Limits) {
        limits.within("patch_size", self.patch_size, &(1..=1));
        limits.within("in_channels", self.in_channels, &CHANNELS);
        limits.within("out_channels", self.outputs(), &CHANNELS);
        limits.within("num_layers", self.num_layers, &(0..=*LAYERS.end()));
        let singles = self.num_single_layers;
        limits.within("num_single_layers", singles, &(0..=*LAYERS.end()));
        limits.within("attention_head_dim", self.attention_head_dim, &WIDTH);
        limits.within("num_attention_heads", self.num_attention_heads, &HEADS);
        limits.within("joint_attention_dim", self.joint_attention_dim, &WIDTH);
        let pooled = self.pooled_projection_dim;
        limits.within("pooled_projection_dim", pooled, &WIDTH);
        limits.within("sample_size", self.sample_size.unwrap_or(1), &SIDE);
        limits.within(
            "number of axes_dims_rope",
            self.axes_dims_rope.len(),
            &(1..=8),
        );
        limits.all_within("axes_dims_rope", &self.axes_dims_rope, &WIDTH);
    }
}

impl Config {
    /// Side of the latents that the model is for; where the config says nothing, that of 512 pixels, at which diffusers
    /// trains adapters.
    pub fn side(&self) -> usize {
        self.sample_size.unwrap_or(64)
    }

    /// Width of the residual streams.
    pub fn inner_dim(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    fn outputs(&self) -> usize {
        self.out_channels.unwrap_or(self.in_channels)
    }

    fn check(&self) -> Result<()> {
        let axes = &self.axes_dims_rope;
        let turned: usize = axes.iter().sum();
        let (what, hint) = if turned != self.attention_head_dim {
            (
                format!("axes_dims_rope {axes:?}"),
                format!(
                    "together they are attention_head_dim, {}",
                    self.attention_head_dim
                ),
            )
        } else if axes.iter().any(|width| !width.is_multiple_of(2)) {
            (
                format!("axes_dims_rope {axes:?}"),
                "channels are turned in pairs".to_string(),
            )
        } else if self.patch_size != 1 {
            (
                format!("patch_size {}", self.patch_size),
                "FLUX.1 has 1: the pipeline packs the latents".to_string(),
            )
        } else {
            return Ok(());
        };
        Err(Error::invalid(what, hint))
    }
}

/// Cosines and sines of the rotary angles of every position, each (n, head width / 2).
#[derive(Debug, Clone)]
pub(super) struct Rotation {
    pub cos: Tensor,
    pub sin: Tensor,
}

impl Rotation {
    /// Of `ids` (n, axes), f32: what each coordinate turns its own channels by, at frequencies falling from 1 to
    /// 1/10000. Angles are computed in f64 and kept in f32, whatever the model computes in.
    fn new(ids: &Tensor, axes: &[usize]) -> Result<Self> {
        let (n, coordinates) = ids.dims2()?;
        if coordinates != axes.len() {
            return Err(Error::invalid(
                format!("positions of {coordinates} coordinates"),
                format!("the transformer has {} axes", axes.len()),
            ));
        }
        let half: usize = axes.iter().sum::<usize>() / 2;
        let (mut cos, mut sin) = (Vec::with_capacity(n * half), Vec::with_capacity(n * half));
        let frequencies = |&width: &usize| -> Vec<f64> {
            let of = |pair| THETA.powf(-((2 * pair) as f64) / width as f64);
            (0..width / 2).map(of).collect()
        };
        let frequencies: Vec<Vec<f64>> = axes.iter().map(frequencies).collect();
        for position in ids.to_dtype(DType::F32)?.to_vec2::<f32>()? {
            for (&coordinate, frequencies) in position.iter().zip(&frequencies) {
                for frequency in frequencies {
                    let angle = f64::from(coordinate) * frequency;
                    cos.push(angle.cos() as f32);
                    sin.push(angle.sin() as f32);
                }
            }
        }
        let device = ids.device();
        Ok(Self {
            cos: Tensor::from_vec(cos, (n, half), device)?,
            sin: Tensor::from_vec(sin, (n, half), device)?,
        })
    }

    /// `x` (b, heads, n, d) turned, pairs (2i, 2i + 1).
    pub(super) fn turn(&self, x: &Tensor) -> Result<Tensor> {
        ops::rope_adjacent(x, &self.cos, &self.sin)
    }
}

/// What the denoiser is asked at one step, beside the latents.
#[derive(Debug, Clone, Copy)]
pub struct Condition<'a> {
    /// (b), f32 in [0, 1].
    pub timestep: &'a Tensor,
    /// (b), f32; present where the model embeds it.
    pub guidance: Option<&'a Tensor>,
    /// Token states, (b, m, joint_attention_dim).
    pub encoder_hidden_states: &'a Tensor,
    /// (b, pooled_projection_dim).
    pub pooled_projections: &'a Tensor,
    /// Positions of the text, (m, axes); zeros as the pipeline has them.
    pub txt_ids: &'a Tensor,
    /// Positions of the packed latents, (n, axes).
    pub img_ids: &'a Tensor,
}

/// The denoiser.
pub struct FluxTransformer {
    config: Config,
    timestep_embedder: TimestepEmbedding,
    guidance_embedder: Option<TimestepEmbedding>,
    text_embedder: TimestepEmbedding,
    context_embedder: Linear,
    x_embedder: Linear,
    transformer_blocks: Vec<Arc<DoubleBlock>>,
    single_transformer_blocks: Vec<Arc<SingleBlock>>,
    norm_out: Modulation,
    norm: LayerNorm,
    proj_out: Linear,
}

impl FluxTransformer {
    /// Takes the weights of a `transformer/` folder; faults in names and shapes are reported by [`Weights::finish`].
    /// A new model starts with every modulation and the last layer at zero. Fails where `config` contradicts itself.
    pub fn new(config: Config, weights: &Weights) -> Result<Self> {
        config.check()?;
        let d = config.inner_dim();
        let embed = weights.pp("time_text_embed");
        let (double, single) = (
            weights.pp("transformer_blocks"),
            weights.pp("single_transformer_blocks"),
        );
        let embedder = |inputs, name: &str| {
            TimestepEmbedding::new(inputs, d, Activation::Silu, &embed.pp(name))
        };
        let linear = |inputs, name: &str| Linear::new(inputs, d, true, &weights.pp(name));
        Ok(Self {
            timestep_embedder: embedder(TIMESTEP.channels, "timestep_embedder")?,
            guidance_embedder: match config.guidance_embeds {
                true => Some(embedder(TIMESTEP.channels, "guidance_embedder")?),
                false => None,
            },
            text_embedder: embedder(config.pooled_projection_dim, "text_embedder")?,
            context_embedder: linear(config.joint_attention_dim, "context_embedder")?,
            x_embedder: linear(config.in_channels, "x_embedder")?,
            transformer_blocks: (0..config.num_layers)
                .map(|i| Ok(Arc::new(DoubleBlock::new(&config, &double.pp(i))?)))
                .collect::<Result<_>>()?,
            single_transformer_blocks: (0..config.num_single_layers)
                .map(|i| Ok(Arc::new(SingleBlock::new(&config, &single.pp(i))?)))
                .collect::<Result<_>>()?,
            norm_out: Modulation::new(d, 2, &weights.pp("norm_out"))?,
            norm: LayerNorm::plain(NORM_EPS),
            proj_out: Linear::with_init(
                d,
                config.outputs(),
                true,
                Init::Zeros,
                &weights.pp("proj_out"),
            )?,
            config,
        })
    }

    /// What the model was built from.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The velocity at packed noisy latents `hidden_states` (b, n, in_channels), in the weights' dtype: (b, n,
    /// out_channels).
    ///
    /// # Errors
    /// When a guidance is missing that the model embeds, or a shape does not fit.
    pub fn forward(&self, hidden_states: &Tensor, condition: &Condition) -> Result<Tensor> {
        let temb = self.embed_condition(condition)?;
        let ids = Tensor::cat(&[condition.txt_ids, condition.img_ids], 0)?;
        let rotation = Arc::new(Rotation::new(&ids, &self.config.axes_dims_rope)?);
        let mut x = self.x_embedder.forward(hidden_states)?;
        let mut context = self
            .context_embedder
            .forward(condition.encoder_hidden_states)?;
        for block in &self.transformer_blocks {
            (x, context) = block.forward_recomputed(&x, &context, &temb, &rotation)?;
        }
        let (m, n) = (context.dim(1)?, x.dim(1)?);
        let mut both = layout::join(&context, &x, 1)?;
        for block in &self.single_transformer_blocks {
            both = block.forward_recomputed(&both, &temb, &rotation)?;
        }
        let x = layout::rows(&both, m, n)?;
        let chunks = self.norm_out.forward(&temb)?;
        // the last norm has its scale first, unlike those of the blocks
        let x = ops::modulate(&self.norm.forward(&x)?, &chunks[1], &chunks[0])?;
        self.proj_out.forward(&x)
    }

    /// The vector (b, d) that modulates every block.
    fn embed_condition(&self, condition: &Condition) -> Result<Tensor> {
        let pooled = condition.pooled_projections;
        let embed = |embedder: &TimestepEmbedding, value: &Tensor| {
            let thousandths = (value.to_dtype(DType::F32)? * TIMESTEPS)?;
            embedder.forward(&TIMESTEP.embed(&thousandths)?.to_dtype(pooled.dtype())?)
        };
        let mut temb = embed(&self.timestep_embedder, condition.timestep)?;
        if let Some(embedder) = &self.guidance_embedder {
            let guidance = condition.guidance.ok_or_else(|| {
                Error::invalid(
                    "this transformer embeds a guidance, and none is given",
                    "FLUX.1-dev is sampled with 3.5 and trained with 1",
                )
            })?;
            temb = (temb + embed(embedder, guidance)?)?;
        }
        Ok((temb + self.text_embedder.forward(pooled)?)?)
    }
}
