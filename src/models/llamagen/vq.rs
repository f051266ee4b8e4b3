//! LlamaGen's VQ image tokenizer, a VQGAN with a small normalised codebook. Reference:
//! `tokenizer/tokenizer_image/vq_model.py`.
//!
//! Unlike taming-transformers, `decoder.conv_blocks.0` is the lowest resolution. Codes are looked up in the
//! normalised codebook, in decoding too.

use candle_core::{Device, Tensor};
use serde::Deserialize;

use crate::models::limits::{CHANNELS, LEVELS, Limited, Limits, VOCABULARY};
use crate::models::vqgan::{
    Codebook, Compared, Decoder, Encoder, Level, Middle, TrainOutput, check_image, conv, halving,
    images_at_once, in_slices, norm, square,
};
use crate::nn::{Conv2d, Weights};
use crate::{Error, Result};

/// Residual blocks at each resolution of the encoder; the decoder has one more.
const RES_BLOCKS: usize = 2;

/// `config.json`: the reference's `ModelArgs`, and `ch`, which there is an argument of the encoder.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Number of codes.
    pub codebook_size: usize,
    /// Width of a code.
    pub codebook_embed_dim: usize,
    /// Whether codes and encodings are normalised to unit length.
    pub codebook_l2_norm: bool,
    /// Weight of the commitment loss.
    pub commit_loss_beta: f64,
    /// Factors on `ch` from the highest resolution to the lowest.
    pub encoder_ch_mult: Vec<usize>,
    /// The same for the decoder, also from the highest resolution.
    pub decoder_ch_mult: Vec<usize>,
    /// Channels between the encoder and the codebook.
    pub z_channels: usize,
    /// Channels at full resolution, a multiple of `norm_num_groups`.
    pub ch: usize,
    /// Groups of every group norm; the reference always has 32.
    pub norm_num_groups: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            codebook_size: 16384,
            codebook_embed_dim: 8,
            codebook_l2_norm: true,
            commit_loss_beta: 0.25,
            encoder_ch_mult: vec![1, 1, 2, 2, 4],
            decoder_ch_mult: vec![1, 1, 2, 2, 4],
            z_channels: 256,
            ch: 128,
            norm_num_groups: 32,
        }
    }
}

impl Limited for Config {
    fn limit(&self, limits: &mut Limits) {
        limits.within("codebook_size", self.codebook_size, &VOCABULARY);
        limits.within("codebook_embed_dim", self.codebook_embed_dim, &CHANNELS);
        for (name, factors) in [
            ("encoder_ch_mult", &self.encoder_ch_mult),
            ("decoder_ch_mult", &self.decoder_ch_mult),
        ] {
            limits.within(&format!("number of {name}"), factors.len(), &LEVELS);
            limits.all_within(name, factors, &(1..=64));
        }
        limits.within("z_channels", self.z_channels, &CHANNELS);
        limits.within("ch", self.ch, &CHANNELS);
        limits.within("norm_num_groups", self.norm_num_groups, &CHANNELS);
    }
}

impl Config {
    /// Pixels along one side of the square that one token stands for.
    pub fn downsampling(&self) -> usize {
        1 << self.encoder_ch_mult.len().saturating_sub(1)
    }

    fn validate(&self) -> Result<()> {
        if self.ch > 0
            && self.norm_num_groups > 0
            && self.ch.is_multiple_of(self.norm_num_groups)
            && self.codebook_size > 1
            && !self.encoder_ch_mult.is_empty()
            && !self.decoder_ch_mult.is_empty()
        {
            return Ok(());
        }
        Err(Error::invalid(
            format!("config of a LlamaGen VQ tokenizer: {self:?}"),
            "ch must be a multiple of norm_num_groups, no ch_mult empty, and there must be two codes",
        ))
    }
}

fn middle(channels: usize, groups: usize, weights: &Weights) -> Result<Middle> {
    Middle::new(channels, groups, true, ["0", "1", "2"], weights)
}

fn encoder(c: &Config, weights: &Weights) -> Result<Encoder> {
    let groups = c.norm_num_groups;
    let mut inputs = c.ch;
    let mut levels = Vec::new();
    for (i, factor) in c.encoder_ch_mult.iter().enumerate() {
        let (outputs, lowest) = (c.ch * factor, i + 1 == c.encoder_ch_mult.len());
        let here = weights.pp("conv_blocks").pp(i);
        let halve = (!lowest)
            .then(|| halving(outputs, &here.pp("downsample").pp("conv")))
            .transpose()?;
        let blocks = ("res", RES_BLOCKS);
        levels.push(Level::new(
            (inputs, outputs),
            blocks,
            lowest,
            halve,
            groups,
            &here,
        )?);
        inputs = outputs;
    }
    Ok(Encoder {
        conv_in: conv(3, c.ch, 3, &weights.pp("conv_in"))?,
        levels,
        mid: middle(inputs, groups, &weights.pp("mid"))?,
        norm_out: norm(groups, inputs, &weights.pp("norm_out"))?,
        conv_out: conv(inputs, c.z_channels, 3, &weights.pp("conv_out"))?,
    })
}

fn decoder(c: &Config, weights: &Weights) -> Result<Decoder> {
    let groups = c.norm_num_groups;
    let lowest = c.ch * c.decoder_ch_mult.last().copied().unwrap_or(1);
    let mut inputs = lowest;
    let mut levels = Vec::new();
    for (i, factor) in c.decoder_ch_mult.iter().rev().enumerate() {
        let (outputs, highest) = (c.ch * factor, i + 1 == c.decoder_ch_mult.len());
        let here = weights.pp("conv_blocks").pp(i);
        let double = (!highest)
            .then(|| conv(outputs, outputs, 3, &here.pp("upsample").pp("conv")))
            .transpose()?;
        let blocks = ("res", RES_BLOCKS + 1);
        levels.push(Level::new(
            (inputs, outputs),
            blocks,
            i == 0,
            double,
            groups,
            &here,
        )?);
        inputs = outputs;
    }
    Ok(Decoder {
        conv_in: conv(c.z_channels, lowest, 3, &weights.pp("conv_in"))?,
        mid: middle(lowest, groups, &weights.pp("mid"))?,
        levels,
        norm_out: norm(groups, inputs, &weights.pp("norm_out"))?,
        conv_out: conv(inputs, 3, 3, &weights.pp("conv_out"))?,
    })
}

/// The tokenizer.
pub struct VqModel {
    config: Config,
    encoder: Encoder,
    decoder: Decoder,
    quant_conv: Conv2d,
    post_quant_conv: Conv2d,
    codebook: Codebook,
}

impl VqModel {
    /// Builds the tokenizer from `weights`, whose root is the checkpoint's. Call [`Weights::finish`] afterwards.
    pub fn new(config: &Config, weights: &Weights) -> Result<Self> {
        config.validate()?;
        let c = config;
        let width = c.codebook_embed_dim;
        let place = weights.pp("quantize").pp("embedding");
        Ok(Self {
            encoder: encoder(c, &weights.pp("encoder"))?,
            decoder: decoder(c, &weights.pp("decoder"))?,
            quant_conv: conv(c.z_channels, width, 1, &weights.pp("quant_conv"))?,
            post_quant_conv: conv(width, c.z_channels, 1, &weights.pp("post_quant_conv"))?,
            codebook: Codebook::new(c.codebook_size, width, c.codebook_l2_norm, &place)?,
            config: c.clone(),
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

    /// The encoding before quantisation and normalisation, (b, codebook_embed_dim, h / f, w / f) for `image`
    /// (b, 3, h, w) in [−1, 1] with h and w at least the downsampling f; where they are no multiples of it, the last
    /// rows and columns have no code of their own, as in the reference.
    pub fn encode_continuous(&self, image: &Tensor) -> Result<Tensor> {
        check_image(image, self.config.downsampling())?;
        let image = image.to_dtype(self.codebook.embedding().dtype())?;
        self.quant_conv.forward(&self.encoder.forward(&image)?)
    }

    /// Tokens (b, n) of u32, row by row, of `image` (b, 3, h, w) in [−1, 1].
    pub fn encode(&self, image: &Tensor) -> Result<Tensor> {
        self.quantize(&self.encode_continuous(image)?)
    }

    /// The nearest code for each place of `z` (b, codebook_embed_dim, h, w), the first of equals: (b, h·w) of u32.
    pub fn quantize(&self, z: &Tensor) -> Result<Tensor> {
        self.codebook.quantize(z)
    }

    /// What [`VqModel::quantize`] compares.
    pub fn compared(&self, z: &Tensor) -> Result<Compared> {
        self.codebook.compared(z)
    }

    /// Images (b, 3, h, w), about [−1, 1] and not clamped, of `tokens` (b, n) of u32: a square grid, row by row.
    pub fn decode(&self, tokens: &Tensor) -> Result<Tensor> {
        let grid = square(tokens)?;
        let at_once = images_at_once((grid * self.config.downsampling()).pow(2));
        self.decode_slices(tokens, grid, at_once)
    }

    fn decode_slices(&self, tokens: &Tensor, grid: usize, at_once: usize) -> Result<Tensor> {
        in_slices(tokens, at_once, |tokens| {
            let z = self.codebook.look_up(tokens, grid, grid)?;
            self.decoder.forward(&self.post_quant_conv.forward(&z)?)
        })
    }

    /// One forward pass for training on `image` (b, 3, h, w) in [−1, 1].
    pub fn forward_train(&self, image: &Tensor) -> Result<TrainOutput> {
        let z = self.encode_continuous(image)?;
        let quantized = self.codebook.train(&z, self.config.commit_loss_beta)?;
        let z = self.post_quant_conv.forward(&quantized.codes)?;
        Ok(quantized.decoded(self.decoder.forward(&z)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_decoded_in_slices_gives_the_images_that_each_of_its_rows_gives() {
        let config = Config {
            codebook_size: 9,
            codebook_embed_dim: 4,
            encoder_ch_mult: vec![1],
            decoder_ch_mult: vec![1],
            z_channels: 4,
            ch: 32,
            ..Config::default()
        };
        let device = Device::Cpu;
        let weights = Weights::trainable(&[], 3, &device).unwrap();
        let model = VqModel::new(&config, &weights).unwrap();
        let tokens = Tensor::new(&[[0u32, 1, 2, 3], [4, 5, 6, 7], [8, 1, 8, 2]], &device).unwrap();
        let values = |x: Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let sliced = values(model.decode_slices(&tokens, 2, 2).unwrap());
        let single: Vec<f32> = (0..3)
            .flat_map(|i| values(model.decode(&tokens.narrow(0, i, 1).unwrap()).unwrap()))
            .collect();
        let apart = sliced.iter().zip(&single).map(|(a, b)| (a - b).abs());
        assert!(apart.fold(0.0, f32::max) < 1e-5);
        assert_eq!(sliced.len(), 3 * 3 * 2 * 2);
    }
}
