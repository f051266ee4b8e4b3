//! Chameleon's image tokenizer, the VQGAN of Make-A-Scene (Gafni et al. 2022, arXiv 2203.13131). References: the
//! encoder in transformers' `modeling_chameleon.py`, both directions in Meta's `vqgan.py`, which is
//! taming-transformers' (`decoder.up.0` is the highest resolution). A code is the nearest in Euclidean distance,
//! without normalisation.

use candle_core::{Device, Tensor};

pub use super::vq_config::Config;
use crate::models::vqgan::{
    Codebook, Compared, Decoder, Encoder, Level, Middle, TrainOutput, check_image, conv, halving,
    images_at_once, in_slices, norm, square,
};
use crate::nn::{Conv2d, Weights};
use crate::{Error, Result};

fn middle(c: &Config, channels: usize, weights: &Weights) -> Result<Middle> {
    let names = ["block_1", "attn_1", "block_2"];
    Middle::new(channels, c.norm_num_groups, c.attention, names, weights)
}

fn encoder(c: &Config, weights: &Weights) -> Result<Encoder> {
    let groups = c.norm_num_groups;
    let mut inputs = c.ch;
    let mut levels = Vec::new();
    for (i, factor) in c.ch_mult.iter().enumerate() {
        let (outputs, lowest) = (c.ch * factor, i + 1 == c.ch_mult.len());
        let here = weights.pp("down").pp(i);
        let halve = (!lowest)
            .then(|| halving(outputs, &here.pp("downsample").pp("conv")))
            .transpose()?;
        let (blocks, attends) = (("block", c.num_res_blocks), c.encoder_attends(i));
        levels.push(Level::new(
            (inputs, outputs),
            blocks,
            attends,
            halve,
            groups,
            &here,
        )?);
        inputs = outputs;
    }
    Ok(Encoder {
        conv_in: conv(3, c.ch, 3, &weights.pp("conv_in"))?,
        levels,
        mid: middle(c, inputs, &weights.pp("mid"))?,
        norm_out: norm(groups, inputs, &weights.pp("norm_out"))?,
        conv_out: conv(inputs, c.z_channels, 3, &weights.pp("conv_out"))?,
    })
}

fn decoder(c: &Config, weights: &Weights) -> Result<Decoder> {
    let groups = c.norm_num_groups;
    let lowest = c.ch * c.ch_mult.last().copied().unwrap_or(1);
    let mut inputs = lowest;
    let mut levels = Vec::new();
    for (i, factor) in c.ch_mult.iter().enumerate().rev() {
        let outputs = c.ch * factor;
        let here = weights.pp("up").pp(i);
        let double = (i > 0)
            .then(|| conv(outputs, outputs, 3, &here.pp("upsample").pp("conv")))
            .transpose()?;
        let (blocks, attends) = (("block", c.num_res_blocks + 1), c.decoder_attends(i));
        levels.push(Level::new(
            (inputs, outputs),
            blocks,
            attends,
            double,
            groups,
            &here,
        )?);
        inputs = outputs;
    }
    Ok(Decoder {
        conv_in: conv(c.z_channels, lowest, 3, &weights.pp("conv_in"))?,
        mid: middle(c, lowest, &weights.pp("mid"))?,
        levels,
        norm_out: norm(groups, inputs, &weights.pp("norm_out"))?,
        conv_out: conv(inputs, 3, 3, &weights.pp("conv_out"))?,
    })
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
            decoder(config, &weights.pp("decoder"))?,
        ));
        Ok(model)
    }

    /// Builds the encoding direction alone, from Meta's checkpoint or from transformers' `model.vqmodel`.
    pub fn encoder(config: &Config, weights: &Weights) -> Result<Self> {
        let config = config.clone().validated()?;
        let (width, channels) = (config.embed_dim, config.z_channels);
        let place = weights.pp("quantize").pp("embedding");
        Ok(Self {
            encoder: encoder(&config, &weights.pp("encoder"))?,
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

    /// The nearest code for each place of `z` (b, embed_dim, h, w), the first of equals: (b, h·w) of u32.
    pub fn quantize(&self, z: &Tensor) -> Result<Tensor> {
        self.codebook.quantize(z)
    }

    /// What [`VqGan::quantize`] compares.
    pub fn compared(&self, z: &Tensor) -> Result<Compared> {
        self.codebook.compared(z)
    }

    /// Codes (b, n) of u32, row by row, of `image` (b, 3, h, w) in [−1, 1].
    pub fn encode(&self, image: &Tensor) -> Result<Tensor> {
        self.quantize(&self.encode_continuous(image)?)
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
