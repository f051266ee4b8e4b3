//! Chameleon's image tokenizer, the VQGAN of Make-A-Scene (Gafni et al. 2022, arXiv 2203.13131). References: the
//! encoder in transformers' `modeling_chameleon.py`, both directions in Meta's `vqgan.py`, which is
//! taming-transformers' (`decoder.up.0` is the highest resolution). A code is the nearest in Euclidean distance,
//! without normalisation.

use candle_core::{Device, Tensor};

pub use super::vq_config::Config;
use crate::models::vqgan::{
    AttnBlock, Codebook, Quantized, ResnetBlock, TrainOutput, check_image, conv, images_at_once,
    in_slices, norm, square,
};
use crate::nn::ops::{self, Padding};
use crate::nn::{Conv2d, GroupNorm, Weights};
use crate::{Error, Result};

/// Residual blocks, each followed by attention where the config says so, and then a change of resolution.
struct Level {
    block: Vec<ResnetBlock>,
    attn: Vec<AttnBlock>,
    resample: Option<Conv2d>,
}

impl Level {
    fn new(
        c: &Config,
        (inputs, outputs): (usize, usize),
        blocks: usize,
        attends: bool,
        resample: Option<Conv2d>,
        weights: &Weights,
    ) -> Result<Self> {
        let block = (0..blocks)
            .map(|i| {
                let inputs = if i == 0 { inputs } else { outputs };
                ResnetBlock::new(
                    inputs,
                    outputs,
                    c.norm_num_groups,
                    &weights.pp("block").pp(i),
                )
            })
            .collect::<Result<_>>()?;
        let attn = (0..if attends { blocks } else { 0 })
            .map(|i| AttnBlock::new(outputs, c.norm_num_groups, &weights.pp("attn").pp(i)))
            .collect::<Result<_>>()?;
        Ok(Self {
            block,
            attn,
            resample,
        })
    }

    fn forward(&self, mut h: Tensor) -> Result<Tensor> {
        for (i, block) in self.block.iter().enumerate() {
            h = block.forward(&h)?;
            if let Some(attn) = self.attn.get(i) {
                h = attn.forward(&h)?;
            }
        }
        Ok(h)
    }
}

struct Middle {
    block_1: ResnetBlock,
    attn_1: Option<AttnBlock>,
    block_2: ResnetBlock,
}

impl Middle {
    fn new(c: &Config, channels: usize, weights: &Weights) -> Result<Self> {
        let groups = c.norm_num_groups;
        Ok(Self {
            block_1: ResnetBlock::new(channels, channels, groups, &weights.pp("block_1"))?,
            attn_1: if c.attention {
                Some(AttnBlock::new(channels, groups, &weights.pp("attn_1"))?)
            } else {
                None
            },
            block_2: ResnetBlock::new(channels, channels, groups, &weights.pp("block_2"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut h = self.block_1.forward(x)?;
        if let Some(attn) = &self.attn_1 {
            h = attn.forward(&h)?;
        }
        self.block_2.forward(&h)
    }
}

struct Encoder {
    conv_in: Conv2d,
    down: Vec<Level>,
    mid: Middle,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Encoder {
    fn new(c: &Config, weights: &Weights) -> Result<Self> {
        let mut inputs = c.ch;
        let mut down = Vec::new();
        for (i, factor) in c.ch_mult.iter().enumerate() {
            let outputs = c.ch * factor;
            let here = weights.pp("down").pp(i);
            let halve = if i + 1 == c.ch_mult.len() {
                None
            } else {
                let place = here.pp("downsample").pp("conv");
                Some(Conv2d::new(
                    outputs,
                    outputs,
                    3,
                    2,
                    Padding::RightBottom,
                    &place,
                )?)
            };
            down.push(Level::new(
                c,
                (inputs, outputs),
                c.num_res_blocks,
                c.attends(i),
                halve,
                &here,
            )?);
            inputs = outputs;
        }
        Ok(Self {
            conv_in: conv(3, c.ch, 3, &weights.pp("conv_in"))?,
            down,
            mid: Middle::new(c, inputs, &weights.pp("mid"))?,
            norm_out: norm(c.norm_num_groups, inputs, &weights.pp("norm_out"))?,
            conv_out: conv(inputs, c.z_channels, 3, &weights.pp("conv_out"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut h = self.conv_in.forward(x)?;
        for level in &self.down {
            h = level.forward(h)?;
            if let Some(halve) = &level.resample {
                h = halve.forward(&h)?;
            }
        }
        let h = self.mid.forward(&h)?;
        self.conv_out.forward(&self.norm_out.forward_silu(&h)?)
    }
}

struct Decoder {
    conv_in: Conv2d,
    mid: Middle,
    /// From the lowest resolution to the highest, against the order of their names.
    up: Vec<Level>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Decoder {
    fn new(c: &Config, weights: &Weights) -> Result<Self> {
        let lowest = c.ch * c.ch_mult.last().copied().unwrap_or(1);
        let mut inputs = lowest;
        let mut up = Vec::new();
        for (i, factor) in c.ch_mult.iter().enumerate().rev() {
            let outputs = c.ch * factor;
            let here = weights.pp("up").pp(i);
            let double = if i == 0 {
                None
            } else {
                let place = here.pp("upsample").pp("conv");
                Some(conv(outputs, outputs, 3, &place)?)
            };
            let blocks = c.num_res_blocks + 1;
            up.push(Level::new(
                c,
                (inputs, outputs),
                blocks,
                c.attends(i),
                double,
                &here,
            )?);
            inputs = outputs;
        }
        Ok(Self {
            conv_in: conv(c.z_channels, lowest, 3, &weights.pp("conv_in"))?,
            mid: Middle::new(c, lowest, &weights.pp("mid"))?,
            up,
            norm_out: norm(c.norm_num_groups, inputs, &weights.pp("norm_out"))?,
            conv_out: conv(inputs, 3, 3, &weights.pp("conv_out"))?,
        })
    }

    fn forward(&self, z: &Tensor) -> Result<Tensor> {
        let mut h = self.mid.forward(&self.conv_in.forward(z)?)?;
        for level in &self.up {
            h = level.forward(h)?;
            if let Some(double) = &level.resample {
                h = double.forward(&ops::upsample_nearest2x(&h)?)?;
            }
        }
        self.conv_out.forward(&self.norm_out.forward_silu(&h)?)
    }
}

/// The tokenizer.
pub struct VqGan {
    config: Config,
    encoder: Encoder,
    quant_conv: Conv2d,
    codebook: Codebook,
    /// Absent where the checkpoint is transformers', which keeps the encoder only.
    decoder: Option<(Conv2d, Decoder)>,
}

impl VqGan {
    /// Builds both directions from `weights`, whose root is that of Meta's checkpoint. Call [`Weights::finish`]
    /// afterwards.
    pub fn new(config: &Config, weights: &Weights) -> Result<Self> {
        let mut model = Self::encoder(config, weights)?;
        let (width, channels) = (config.embed_dim, config.z_channels);
        model.decoder = Some((
            conv(width, channels, 1, &weights.pp("post_quant_conv"))?,
            Decoder::new(config, &weights.pp("decoder"))?,
        ));
        Ok(model)
    }

    /// Builds the encoding direction alone, from Meta's checkpoint or from transformers' `model.vqmodel`.
    pub fn encoder(config: &Config, weights: &Weights) -> Result<Self> {
        let config = config.clone().validated()?;
        let (width, channels) = (config.embed_dim, config.z_channels);
        let place = weights.pp("quantize").pp("embedding");
        Ok(Self {
            encoder: Encoder::new(&config, &weights.pp("encoder"))?,
            quant_conv: conv(channels, width, 1, &weights.pp("quant_conv"))?,
            codebook: Codebook::new(config.n_embed, width, false, &place)?,
            decoder: None,
            config,
        })
    }

    /// The configuration it was built with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        self.codebook.embedding().device()
    }

    /// The encoding before quantisation, (b, embed_dim, h / f, w / f) for `image` (b, 3, h, w) in [−1, 1] with h and w at
    /// least the downsampling f.
    pub fn encode_continuous(&self, image: &Tensor) -> Result<Tensor> {
        check_image(image, self.config.downsampling())?;
        let image = image.to_dtype(self.codebook.embedding().dtype())?;
        self.quant_conv.forward(&self.encoder.forward(&image)?)
    }

    /// The nearest code for each place of `z` (b, embed_dim, h, w), the first of equals.
    pub fn quantize(&self, z: &Tensor) -> Result<Quantized> {
        self.codebook.quantize(z)
    }

    /// Codes (b, n) of u32, row by row, of `image` (b, 3, h, w) in [−1, 1].
    pub fn encode(&self, image: &Tensor) -> Result<Tensor> {
        Ok(self.quantize(&self.encode_continuous(image)?)?.tokens)
    }

    /// Images (b, 3, h, w), about [−1, 1] and not clamped, of `tokens` (b, n) of u32: codes of a square grid, row by
    /// row.
    ///
    /// # Errors
    /// When the checkpoint has no decoder, or the tokens form no square.
    pub fn decode(&self, tokens: &Tensor) -> Result<Tensor> {
        let (post_quant_conv, decoder) = self.decoding()?;
        let grid = square(tokens)?;
        let at_once = images_at_once((grid * self.config.downsampling()).pow(2));
        in_slices(tokens, at_once, |tokens| {
            let z = self.codebook.look_up(tokens, grid, grid)?;
            decoder.forward(&post_quant_conv.forward(&z)?)
        })
    }

    /// One forward pass for training on `image` (b, 3, h, w) in [−1, 1], with the commitment loss weighted by `beta`.
    pub fn forward_train(&self, image: &Tensor, beta: f64) -> Result<TrainOutput> {
        let (post_quant_conv, decoder) = self.decoding()?;
        let quantized = self.codebook.train(&self.encode_continuous(image)?, beta)?;
        let z = post_quant_conv.forward(&quantized.codes)?;
        Ok(quantized.decoded(decoder.forward(&z)?))
    }

    fn decoding(&self) -> Result<&(Conv2d, Decoder)> {
        self.decoder.as_ref().ok_or_else(|| {
            Error::invalid(
                "this checkpoint of Chameleon's image tokenizer has no decoder",
                "only Meta's files have one: place vqgan.yaml and vqgan.ckpt of facebook/chameleon in the \
                 checkpoint's folder tokenizer",
            )
        })
    }
}
