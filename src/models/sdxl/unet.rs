//! The denoiser of Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952): a U-Net of residual blocks and
//! transformers, as diffusers' `UNet2DConditionModel` computes it and names its weights.

use std::sync::Arc;

use candle_core::Tensor;

use super::block::{ResnetBlock, ResnetSettings, SpatialTransformer, TransformerSettings};
use super::config::{Config, Level, MidBlock};
use crate::models::encoder::Activation;
use crate::models::timestep::{Sinusoid, TimestepEmbedding};
use crate::nn::ops::Padding;
use crate::nn::{Conv2d, GroupNorm, Weights, layout, ops};
use crate::{Error, Result};

/// Numbers of `time_ids`: original height and width, top and left of the crop, target height and width.
const SIZES: usize = 6;

/// Residual blocks, each followed by its transformer where the level has them.
struct Stage {
    resnets: Vec<Arc<ResnetBlock>>,
    transformers: Vec<SpatialTransformer>,
}

impl Stage {
    /// `inputs` are the widths that the residual blocks take.
    fn new(
        inputs: impl IntoIterator<Item = usize>,
        level: &Level,
        config: &Config,
        settings: ResnetSettings,
        weights: &Weights,
    ) -> Result<Self> {
        let resnets = inputs.into_iter().enumerate().map(|(i, inputs)| {
            let place = weights.pp("resnets").pp(i);
            ResnetBlock::new((inputs, level.channels), settings, &place)
        });
        let transformers = level.depths.iter().enumerate().map(|(i, &depth)| {
            let place = weights.pp("attentions").pp(i);
            SpatialTransformer::new(level.channels, depth, transformer(level, config), &place)
        });
        Ok(Self {
            resnets: resnets.collect::<Result<_>>()?,
            transformers: transformers.collect::<Result<_>>()?,
        })
    }

    /// What block `index` makes of `x`.
    fn forward(&self, index: usize, x: &Tensor, told: &Told) -> Result<Tensor> {
        let x = self.resnets[index].forward(x, &told.temb)?;
        match self.transformers.get(index) {
            Some(transformer) => transformer.forward(&x, &told.context),
            None => Ok(x),
        }
    }
}

fn transformer(level: &Level, config: &Config) -> TransformerSettings {
    TransformerSettings {
        heads: level.heads,
        context: level.context,
        groups: config.norm_num_groups,
        is_linear: config.use_linear_projection,
    }
}

/// A level, and the convolution that halves or doubles its result.
struct Scale {
    stage: Stage,
    resample: Option<Conv2d>,
}

/// The coarsest level.
struct Middle {
    first: Arc<ResnetBlock>,
    rest: Option<(SpatialTransformer, Arc<ResnetBlock>)>,
}

/// What every block is told.
struct Told {
    /// The timestep and the sizes, (b, temb).
    temb: Tensor,
    /// The prompt, (b, n, its width).
    context: Tensor,
}

/// The denoiser.
pub struct UNet {
    config: Config,
    conv_in: Conv2d,
    time_proj: Sinusoid,
    time_embedding: TimestepEmbedding,
    add_time_proj: Sinusoid,
    add_embedding: TimestepEmbedding,
    down_blocks: Vec<Scale>,
    mid_block: Option<Middle>,
    up_blocks: Vec<Scale>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl UNet {
    /// Takes the weights of a `unet/` folder; faults in names and shapes are reported by [`Weights::finish`]. Fails
    /// where `config` contradicts itself or asks for what is not built.
    pub fn new(config: Config, weights: &Weights) -> Result<Self> {
        let levels = config.levels()?;
        let finest = config.block_out_channels[0];
        let temb = config.time_embedding_dim.unwrap_or(4 * finest);
        let settings = ResnetSettings {
            temb,
            groups: config.norm_num_groups,
            eps: config.norm_eps,
            activation: config.act_fn,
        };
        let sinusoid = |channels| Sinusoid {
            channels,
            cosines_first: config.flip_sin_to_cos,
            shift: config.freq_shift,
        };
        let embedding = |inputs, activation, name: &str| {
            TimestepEmbedding::new(inputs, temb, activation, &weights.pp(name))
        };
        let kept = |inputs, outputs, kernel: usize, name: &str| {
            let padding = Padding::Same(kernel / 2);
            Conv2d::new(inputs, outputs, kernel, 1, padding, &weights.pp(name))
        };
        let (size, added) = levels.added;
        let place = weights.pp("conv_norm_out");
        Ok(Self {
            conv_in: kept(config.in_channels, finest, config.conv_in_kernel, "conv_in")?,
            time_proj: sinusoid(finest),
            time_embedding: embedding(finest, config.act_fn, "time_embedding")?,
            add_time_proj: sinusoid(size),
            // `act_fn` has no say here (diffusers' `_set_add_embedding`).
            add_embedding: embedding(added, Activation::Silu, "add_embedding")?,
            down_blocks: down_blocks(&levels.down, &config, settings, weights)?,
            mid_block: middle(&levels.down, levels.mid_depth, &config, settings, weights)?,
            up_blocks: up_blocks(&levels.up, &config, settings, weights)?,
            conv_norm_out: GroupNorm::new(config.norm_num_groups, finest, config.norm_eps, &place)?,
            conv_out: kept(
                finest,
                config.out_channels,
                config.conv_out_kernel,
                "conv_out",
            )?,
            config,
        })
    }

    /// What the model was built from.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Width of `text_embeds`.
    pub fn text_embeds_dim(&self) -> usize {
        let all = self.config.projection_class_embeddings_input_dim;
        all.unwrap_or(0)
            .saturating_sub(SIZES * self.add_time_proj.channels)
    }

    /// What the schedule's [`crate::diffusion::PredictionType`] says, for noisy latents. `sample` (b, in_channels, h,
    /// w); `timestep` (b), f32; `encoder_hidden_states` (b, n, cross_attention_dim); `text_embeds` (b,
    /// [`UNet::text_embeds_dim`]); `time_ids` (b, 6), f32, in pixels: height and width of the original, top and left of
    /// the crop, height and width of the target. The result (b, out_channels, h, w) is in the weights' dtype.
    pub fn forward(
        &self,
        sample: &Tensor,
        timestep: &Tensor,
        encoder_hidden_states: &Tensor,
        text_embeds: &Tensor,
        time_ids: &Tensor,
    ) -> Result<Tensor> {
        let told = Told {
            temb: self.embed(timestep, text_embeds, time_ids)?,
            context: encoder_hidden_states.clone(),
        };
        let mut x = self.conv_in.forward(sample)?;
        let mut skips = vec![x.clone()];
        for block in &self.down_blocks {
            for i in 0..block.stage.resnets.len() {
                x = block.stage.forward(i, &x, &told)?;
                skips.push(x.clone());
            }
            if let Some(halve) = &block.resample {
                x = halve.forward(&x)?;
                skips.push(x.clone());
            }
        }
        if let Some(middle) = &self.mid_block {
            x = middle.first.forward(&x, &told.temb)?;
            if let Some((transformer, last)) = &middle.rest {
                x = transformer.forward(&x, &told.context)?;
                x = last.forward(&x, &told.temb)?;
            }
        }
        for block in &self.up_blocks {
            for i in 0..block.stage.resnets.len() {
                let skip = skips.pop().ok_or_else(|| Error::Invalid {
                    what: "a U-Net whose way up is longer than its way down".into(),
                    hint: None,
                })?;
                x = block
                    .stage
                    .forward(i, &layout::join(&x, &skip, 1)?, &told)?;
            }
            if let (Some(conv), Some(skip)) = (&block.resample, skips.last()) {
                x = conv.forward(&nearest(&x, skip)?)?;
            }
        }
        let activation = self.config.act_fn;
        self.conv_out
            .forward(&activation.of_norm(&self.conv_norm_out, &x)?)
    }

    /// The vector (b, temb) that every residual block is told.
    fn embed(&self, timestep: &Tensor, text_embeds: &Tensor, time_ids: &Tensor) -> Result<Tensor> {
        let (b, sizes) = time_ids.dims2()?;
        let (rows, width) = text_embeds.dims2()?;
        if sizes != SIZES || rows != b || width != self.text_embeds_dim() {
            return Err(Error::invalid(
                format!(
                    "text_embeds {:?} and time_ids {:?}",
                    text_embeds.dims(),
                    time_ids.dims()
                ),
                format!(
                    "this U-Net takes (b, {}) and (b, {SIZES})",
                    self.text_embeds_dim()
                ),
            ));
        }
        let dtype = text_embeds.dtype();
        let time = self.time_proj.embed(timestep)?.to_dtype(dtype)?;
        let sizes = self.add_time_proj.embed(&time_ids.flatten_all()?)?;
        let sizes = sizes.reshape((b, SIZES * self.add_time_proj.channels))?;
        let added = Tensor::cat(&[text_embeds, &sizes.to_dtype(dtype)?], 1)?;
        layout::add(
            &self.time_embedding.forward(&time)?,
            &self.add_embedding.forward(&added)?,
        )
    }
}

/// `x` (b, c, h, w) with as many rows and columns as `like`, each the nearest above or left: twice as many, but for
/// levels whose odd sides were rounded when they were halved.
fn nearest(x: &Tensor, like: &Tensor) -> Result<Tensor> {
    let (_, _, h, w) = like.dims4()?;
    let (_, _, height, width) = x.dims4()?;
    if (h, w) == (2 * height, 2 * width) {
        return ops::upsample_nearest2x(x);
    }
    let taken = |to: usize, from: usize| {
        let rows: Vec<u32> = (0..to).map(|i| (i * from / to) as u32).collect();
        Tensor::from_vec(rows, to, x.device())
    };
    Ok(x.index_select(&taken(h, height)?, 2)?
        .index_select(&taken(w, width)?, 3)?)
}

fn down_blocks(
    levels: &[Level],
    config: &Config,
    settings: ResnetSettings,
    weights: &Weights,
) -> Result<Vec<Scale>> {
    let padding = match config.downsample_padding {
        0 => Padding::RightBottom,
        _ => Padding::Same(1),
    };
    let mut inputs = config.block_out_channels[0];
    let mut blocks = Vec::with_capacity(levels.len());
    for (i, level) in levels.iter().enumerate() {
        let (place, width) = (weights.pp("down_blocks").pp(i), level.channels);
        let widths = (0..level.resnets).map(|j| if j == 0 { inputs } else { width });
        let resample = if i + 1 < levels.len() {
            let place = place.pp("downsamplers.0.conv");
            Some(Conv2d::new(width, width, 3, 2, padding, &place)?)
        } else {
            None
        };
        blocks.push(Scale {
            stage: Stage::new(widths, level, config, settings, &place)?,
            resample,
        });
        inputs = width;
    }
    Ok(blocks)
}

fn middle(
    levels: &[Level],
    depth: usize,
    config: &Config,
    settings: ResnetSettings,
    weights: &Weights,
) -> Result<Option<Middle>> {
    let (Some(kind), Some(coarsest)) = (config.mid_block_type, levels.last()) else {
        return Ok(None);
    };
    let (place, width) = (weights.pp("mid_block"), coarsest.channels);
    let resnet = |name: &str| ResnetBlock::new((width, width), settings, &place.pp(name));
    let rest = match kind {
        MidBlock::UNetMidBlock2D => None,
        MidBlock::UNetMidBlock2DCrossAttn => {
            let (settings, place) = (transformer(coarsest, config), place.pp("attentions.0"));
            Some((
                SpatialTransformer::new(width, depth, settings, &place)?,
                resnet("resnets.1")?,
            ))
        }
    };
    Ok(Some(Middle {
        first: resnet("resnets.0")?,
        rest,
    }))
}

fn up_blocks(
    levels: &[Level],
    config: &Config,
    settings: ResnetSettings,
    weights: &Weights,
) -> Result<Vec<Scale>> {
    let mut before = levels.first().map_or(0, |coarsest| coarsest.channels);
    let mut blocks = Vec::with_capacity(levels.len());
    for (i, level) in levels.iter().enumerate() {
        let (place, width) = (weights.pp("up_blocks").pp(i), level.channels);
        // What comes up from the level below, and what is kept of the way down, the last of it before this level.
        let finer = levels.get(i + 1).map_or(width, |finer| finer.channels);
        let widths = (0..level.resnets).map(|j| {
            let own = if j == 0 { before } else { width };
            let kept = if j + 1 == level.resnets { finer } else { width };
            own + kept
        });
        let resample = if i + 1 < levels.len() {
            let place = place.pp("upsamplers.0.conv");
            Some(Conv2d::new(width, width, 3, 1, Padding::Same(1), &place)?)
        } else {
            None
        };
        blocks.push(Scale {
            stage: Stage::new(widths, level, config, settings, &place)?,
            resample,
        });
        before = width;
    }
    Ok(blocks)
}
