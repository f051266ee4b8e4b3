//! diffusers' `AutoencoderKL`: images to latents and back (Rombach et al. 2022, arXiv 2112.10752).
//!
//! Reference: `diffusers.models.autoencoders.autoencoder_kl`; weights as in any `vae/` folder of a diffusers
//! checkpoint, for example `stabilityai/stable-diffusion-3-medium-diffusers`.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::encoder::{Activation, act_fn};
use super::limits::{CHANNELS, LAYERS, LEVELS, Limited, Limits};
use super::vqgan::{ResnetBlock, halving, images_at_once, in_slices};
use crate::nn::ops::Padding;
use crate::nn::{Conv2d, GroupNorm, Linear, Mask, Weights, ops};
use crate::{Error, Result};

/// `vae/config.json`; the defaults are diffusers', keys that are not listed here do not change the numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Channels of the image that goes in.
    pub in_channels: usize,
    /// Channels of the image that comes out.
    pub out_channels: usize,
    /// Width of each level, finest first; every level but the last halves the image.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks of each level of the encoder; the decoder has one more.
    pub layers_per_block: usize,
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Groups of every group norm.
    pub norm_num_groups: usize,
    /// The denoiser sees `(latents − shift_factor) · scaling_factor`.
    pub scaling_factor: f64,
    /// See `scaling_factor`; absent means 0.
    pub shift_factor: Option<f64>,
    /// Whether a 1×1 convolution follows the encoder.
    pub use_quant_conv: bool,
    /// Whether a 1×1 convolution precedes the decoder.
    pub use_post_quant_conv: bool,
    /// Whether the coarsest level has self-attention.
    pub mid_block_add_attention: bool,
    /// Kinds of the encoder's levels; only diffusers' default, `DownEncoderBlock2D`, is known here.
    #[serde(skip_serializing)]
    pub down_block_types: Vec<DownBlock>,
    /// Kinds of the decoder's levels; only diffusers' default, `UpDecoderBlock2D`, is known here.
    #[serde(skip_serializing)]
    pub up_block_types: Vec<UpBlock>,
    /// The activation of the residual blocks.
    #[serde(skip_serializing, deserialize_with = "act_fn")]
    pub act_fn: Activation,
}

/// A level of the encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum DownBlock {
    /// Residual blocks.
    DownEncoderBlock2D,
}

/// A level of the decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum UpBlock {
    /// Residual blocks.
    UpDecoderBlock2D,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            block_out_channels: vec![64],
            layers_per_block: 1,
            latent_channels: 4,
            norm_num_groups: 32,
            scaling_factor: 0.18215,
            shift_factor: None,
            use_quant_conv: true,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
            down_block_types: vec![DownBlock::DownEncoderBlock2D],
            up_block_types: vec![UpBlock::UpDecoderBlock2D],
            act_fn: Activation::Silu,
        }
    }
}

impl Limited for Config {
    fn limit(&self, limits: &mut Limits) {
        limits.within("in_channels", self.in_channels, &CHANNELS);
        limits.within("out_channels", self.out_channels, &CHANNELS);
        let widths = &self.block_out_channels;
        limits.within("number of block_out_channels", widths.len(), &LEVELS);
        limits.all_within("block_out_channels", widths, &CHANNELS);
        let groups = ("norm_num_groups", self.norm_num_groups);
        limits.within(groups.0, groups.1, &CHANNELS);
        for width in widths.iter().take(*LEVELS.end()) {
            limits.multiple("block_out_channels", *width, groups);
        }
        limits.within("layers_per_block", self.layers_per_block, &LAYERS);
        limits.within("latent_channels", self.latent_channels, &CHANNELS);
        limits.above_zero("scaling_factor", self.scaling_factor);
        if let Some(shift) = self.shift_factor.filter(|shift| !shift.is_finite()) {
            limits.above_zero("shift_factor", shift);
        }
    }
}

impl Config {
    /// Pixels of one latent's side: 2 to the number of downsamplings.
    pub fn downscale(&self) -> usize {
        1 << self.block_out_channels.len().saturating_sub(1)
    }

    fn level(&self, index: usize) -> Result<usize> {
        self.block_out_channels.get(index).copied().ok_or_else(|| {
            Error::invalid(
                "block_out_channels of the autoencoder is empty",
                "give one width per level",
            )
        })
    }
}

const EPS: f64 = 1e-6;

/// Self-attention over the pixels, one head.
struct AttentionBlock {
    group_norm: GroupNorm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
}

impl AttentionBlock {
    fn new(channels: usize, groups: usize, weights: &Weights) -> Result<Self> {
        let linear = |name: &str| Linear::new(channels, channels, true, &weights.pp(name));
        // What diffusers called them before version 0.15; files of Stable Diffusion still do.
        let names = if weights.contains("proj_attn.weight") {
            ["query", "key", "value", "proj_attn"]
        } else {
            ["to_q", "to_k", "to_v", "to_out.0"]
        };
        Ok(Self {
            group_norm: GroupNorm::new(groups, channels, EPS, &weights.pp("group_norm"))?,
            to_q: linear(names[0])?,
            to_k: linear(names[1])?,
            to_v: linear(names[2])?,
            to_out: linear(names[3])?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, c, h, w) = x.dims4()?;
        let pixels = self.group_norm.forward(x)?.flatten_from(2)?;
        let pixels = pixels.transpose(1, 2)?.contiguous()?;
        let q = self.to_q.forward(&pixels)?.unsqueeze(1)?;
        let k = self.to_k.forward(&pixels)?.unsqueeze(1)?;
        let v = self.to_v.forward(&pixels)?.unsqueeze(1)?;
        let scale = 1.0 / (c as f64).sqrt();
        let y = ops::attention(&q, &k, &v, scale, &Mask::None)?.squeeze(1)?;
        let y = self.to_out.forward(&y)?.transpose(1, 2)?;
        Ok((y.contiguous()?.reshape((b, c, h, w))? + x)?)
    }
}

fn resnet(widths: (usize, usize), config: &Config, weights: &Weights) -> Result<ResnetBlock> {
    let groups = config.norm_num_groups;
    ResnetBlock::with(widths, groups, config.act_fn, "conv_shortcut", weights)
}

struct MidBlock {
    first: ResnetBlock,
    attention: Option<AttentionBlock>,
    second: ResnetBlock,
}

impl MidBlock {
    fn new(channels: usize, config: &Config, weights: &Weights) -> Result<Self> {
        let attention = if config.mid_block_add_attention {
            let (groups, place) = (config.norm_num_groups, weights.pp("attentions.0"));
            Some(AttentionBlock::new(channels, groups, &place)?)
        } else {
            None
        };
        Ok(Self {
            first: resnet((channels, channels), config, &weights.pp("resnets.0"))?,
            attention,
            second: resnet((channels, channels), config, &weights.pp("resnets.1"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.first.forward(x)?;
        if let Some(attention) = &self.attention {
            x = attention.forward(&x)?;
        }
        self.second.forward(&x)
    }
}

/// One level: residual blocks, then a convolution that follows an upsampling (decoder) or halves the image (encoder).
struct Level {
    resnets: Vec<ResnetBlock>,
    resample: Option<Conv2d>,
}

impl Level {
    fn new(
        (inputs, outputs): (usize, usize),
        layers: usize,
        config: &Config,
        resample: Option<Conv2d>,
        weights: &Weights,
    ) -> Result<Self> {
        let resnets = (0..layers)
            .map(|i| {
                let inputs = if i == 0 { inputs } else { outputs };
                resnet((inputs, outputs), config, &weights.pp("resnets").pp(i))
            })
            .collect::<Result<_>>()?;
        Ok(Self { resnets, resample })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        for resnet in &self.resnets {
            x = resnet.forward(&x)?;
        }
        Ok(x)
    }
}

struct Encoder {
    conv_in: Conv2d,
    down_blocks: Vec<Level>,
    mid_block: MidBlock,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Encoder {
    fn new(config: &Config, weights: &Weights) -> Result<Self> {
        let same = Padding::Same(1);
        let groups = config.norm_num_groups;
        let finest = config.level(0)?;
        let levels = config.block_out_channels.len();
        let coarsest = config.level(levels - 1)?;
        let mut down_blocks = Vec::with_capacity(levels);
        let mut inputs = finest;
        for (i, &outputs) in config.block_out_channels.iter().enumerate() {
            let place = weights.pp("down_blocks").pp(i);
            let resample = if i + 1 == levels {
                None
            } else {
                Some(halving(outputs, &place.pp("downsamplers.0.conv"))?)
            };
            let (widths, layers) = ((inputs, outputs), config.layers_per_block);
            down_blocks.push(Level::new(widths, layers, config, resample, &place)?);
            inputs = outputs;
        }
        let place = weights.pp("conv_in");
        let latents = 2 * config.latent_channels;
        Ok(Self {
            conv_in: Conv2d::new(config.in_channels, finest, 3, 1, same, &place)?,
            down_blocks,
            mid_block: MidBlock::new(coarsest, config, &weights.pp("mid_block"))?,
            conv_norm_out: GroupNorm::new(groups, coarsest, EPS, &weights.pp("conv_norm_out"))?,
            conv_out: Conv2d::new(coarsest, latents, 3, 1, same, &weights.pp("conv_out"))?,
        })
    }

    fn forward(&self, image: &Tensor) -> Result<Tensor> {
        let mut x = self.conv_in.forward(image)?;
        for level in &self.down_blocks {
            x = level.forward(&x)?;
            if let Some(halve) = &level.resample {
                x = halve.forward(&x)?;
            }
        }
        let x = self.mid_block.forward(&x)?;
        self.conv_out.forward(&self.conv_norm_out.forward_silu(&x)?)
    }
}

struct Decoder {
    conv_in: Conv2d,
    mid_block: MidBlock,
    up_blocks: Vec<Level>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Decoder {
    fn new(config: &Config, weights: &Weights) -> Result<Self> {
        let same = Padding::Same(1);
        let groups = config.norm_num_groups;
        let finest = config.level(0)?;
        let levels = config.block_out_channels.len();
        let coarsest = config.level(levels - 1)?;
        let mut up_blocks = Vec::with_capacity(levels);
        let mut inputs = coarsest;
        for (i, &outputs) in config.block_out_channels.iter().rev().enumerate() {
            let place = weights.pp("up_blocks").pp(i);
            let resample = if i + 1 == levels {
                None
            } else {
                let place = place.pp("upsamplers.0.conv");
                Some(Conv2d::new(outputs, outputs, 3, 1, same, &place)?)
            };
            let (widths, layers) = ((inputs, outputs), config.layers_per_block + 1);
            up_blocks.push(Level::new(widths, layers, config, resample, &place)?);
            inputs = outputs;
        }
        let place = weights.pp("conv_in");
        Ok(Self {
            conv_in: Conv2d::new(config.latent_channels, coarsest, 3, 1, same, &place)?,
            mid_block: MidBlock::new(coarsest, config, &weights.pp("mid_block"))?,
            up_blocks,
            conv_norm_out: GroupNorm::new(groups, finest, EPS, &weights.pp("conv_norm_out"))?,
            conv_out: Conv2d::new(
                finest,
                config.out_channels,
                3,
                1,
                same,
                &weights.pp("conv_out"),
            )?,
        })
    }

    fn forward(&self, latents: &Tensor) -> Result<Tensor> {
        let mut x = self.mid_block.forward(&self.conv_in.forward(latents)?)?;
        for level in &self.up_blocks {
            x = level.forward(&x)?;
            if let Some(conv) = &level.resample {
                x = conv.forward(&ops::upsample_nearest2x(&x)?)?;
            }
        }
        self.conv_out.forward(&self.conv_norm_out.forward_silu(&x)?)
    }
}

/// The autoencoder. Latents of an image (b, 3, h, w) are (b, latent_channels, h / f, w / f) with f =
/// [`Config::downscale`].
pub struct AutoencoderKl {
    config: Config,
    encoder: Encoder,
    decoder: Decoder,
    quant_conv: Option<Conv2d>,
    post_quant_conv: Option<Conv2d>,
}

impl AutoencoderKl {
    /// Takes the weights of a `vae/` folder. Faults in names and shapes are reported by [`Weights::finish`].
    pub fn new(config: Config, weights: &Weights) -> Result<Self> {
        let one_by_one = |present: bool, channels: usize, name: &str| {
            let place = weights.pp(name);
            present
                .then(|| Conv2d::new(channels, channels, 1, 1, Padding::Same(0), &place))
                .transpose()
        };
        let latents = config.latent_channels;
        Ok(Self {
            encoder: Encoder::new(&config, &weights.pp("encoder"))?,
            decoder: Decoder::new(&config, &weights.pp("decoder"))?,
            quant_conv: one_by_one(config.use_quant_conv, 2 * latents, "quant_conv")?,
            post_quant_conv: one_by_one(config.use_post_quant_conv, latents, "post_quant_conv")?,
            config,
        })
    }

    /// What the model was built from.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The distribution of an image's latents. `image` (b, in_channels, h, w) in [−1, 1], h and w at least f =
    /// [`Config::downscale`]; mean and log-variance are (b, latent_channels, ⌊h / f⌋, ⌊w / f⌋), not rescaled, the
    /// log-variance clamped to [−30, 20]. A sample is `mean + exp(logvar / 2) · noise`.
    pub fn encode(&self, image: &Tensor) -> Result<(Tensor, Tensor)> {
        let (_, _, h, w) = image.dims4()?;
        let f = self.config.downscale();
        if h < f || w < f {
            return Err(Error::invalid(
                format!("an image of {w}×{h} pixels for an autoencoder that divides by {f}"),
                format!("use a width and a height of at least {f}"),
            ));
        }
        let moments = in_slices(image, images_at_once(h * w), |image| {
            let moments = self.encoder.forward(image)?;
            match &self.quant_conv {
                Some(conv) => conv.forward(&moments),
                None => Ok(moments),
            }
        })?;
        let latents = self.config.latent_channels;
        let mean = moments.narrow(1, 0, latents)?;
        let logvar = moments.narrow(1, latents, latents)?.clamp(-30f32, 20f32)?;
        Ok((mean.contiguous()?, logvar))
    }

    /// The image of `latents` (b, latent_channels, h, w), not rescaled (see [`AutoencoderKl::unscale`]); the result
    /// (b, out_channels, h · f, w · f) is about [−1, 1] and not clamped.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let (_, _, h, w) = latents.dims4()?;
        let f = self.config.downscale();
        in_slices(
            latents,
            images_at_once(h * f * w * f),
            |latents| match &self.post_quant_conv {
                Some(conv) => self.decoder.forward(&conv.forward(latents)?),
                None => self.decoder.forward(latents),
            },
        )
    }

    /// Latents as the denoiser sees them: `(latents − shift_factor) · scaling_factor`.
    pub fn scale(&self, latents: &Tensor) -> Result<Tensor> {
        let shift = self.config.shift_factor.unwrap_or(0.0);
        let factor = self.config.scaling_factor;
        Ok(latents.affine(factor, -shift * factor)?)
    }

    /// The inverse of [`AutoencoderKl::scale`]: `latents / scaling_factor + shift_factor`.
    pub fn unscale(&self, latents: &Tensor) -> Result<Tensor> {
        let shift = self.config.shift_factor.unwrap_or(0.0);
        Ok(latents.affine(1.0 / self.config.scaling_factor, shift)?)
    }
}
