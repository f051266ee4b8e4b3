//! LlamaGen's VQ image tokenizer, a VQGAN with a small normalised codebook. Reference:
//! `tokenizer/tokenizer_image/vq_model.py`.
//!
//! Unlike taming-transformers, `decoder.conv_blocks.0` is the lowest resolution. Codes are looked up in the
//! normalised codebook, in decoding too.

use candle_core::{D, DType, Device, Tensor};
use serde::Deserialize;

use crate::nn::ops::{self, Padding};
use crate::nn::{Conv2d, GroupNorm, Init, Mask, Weights, parameter};
use crate::{Error, Result};

/// Residual blocks at each resolution of the encoder; the decoder has one more.
const RES_BLOCKS: usize = 2;
/// Images are decoded in slices of about this many pixels, which bounds the memory of the widest layer.
const PIXELS_AT_ONCE: usize = 4 * 256 * 256;

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

fn conv(inputs: usize, outputs: usize, kernel: usize, weights: &Weights) -> Result<Conv2d> {
    Conv2d::new(
        inputs,
        outputs,
        kernel,
        1,
        Padding::Same(kernel / 2),
        weights,
    )
}

fn norm(groups: usize, channels: usize, weights: &Weights) -> Result<GroupNorm> {
    GroupNorm::new(groups, channels, 1e-6, weights)
}

struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    norm2: GroupNorm,
    conv2: Conv2d,
    nin_shortcut: Option<Conv2d>,
}

impl ResnetBlock {
    fn new(inputs: usize, outputs: usize, groups: usize, weights: &Weights) -> Result<Self> {
        Ok(Self {
            norm1: norm(groups, inputs, &weights.pp("norm1"))?,
            conv1: conv(inputs, outputs, 3, &weights.pp("conv1"))?,
            norm2: norm(groups, outputs, &weights.pp("norm2"))?,
            conv2: conv(outputs, outputs, 3, &weights.pp("conv2"))?,
            nin_shortcut: if inputs == outputs {
                None
            } else {
                Some(conv(inputs, outputs, 1, &weights.pp("nin_shortcut"))?)
            },
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = self.conv1.forward(&self.norm1.forward_silu(x)?)?;
        let h = self.conv2.forward(&self.norm2.forward_silu(&h)?)?;
        match &self.nin_shortcut {
            Some(shortcut) => Ok((shortcut.forward(x)? + h)?),
            None => Ok((x + h)?),
        }
    }
}

struct AttnBlock {
    norm: GroupNorm,
    q: Conv2d,
    k: Conv2d,
    v: Conv2d,
    proj_out: Conv2d,
}

impl AttnBlock {
    fn new(channels: usize, groups: usize, weights: &Weights) -> Result<Self> {
        let point = |name| conv(channels, channels, 1, &weights.pp(name));
        Ok(Self {
            norm: norm(groups, channels, &weights.pp("norm"))?,
            q: point("q")?,
            k: point("k")?,
            v: point("v")?,
            proj_out: point("proj_out")?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, c, h, w) = x.dims4()?;
        let normed = self.norm.forward(x)?;
        let rows = |conv: &Conv2d| -> Result<Tensor> {
            Ok(conv
                .forward(&normed)?
                .reshape((b, 1, c, h * w))?
                .transpose(2, 3)?
                .contiguous()?)
        };
        let (q, k, v) = (rows(&self.q)?, rows(&self.k)?, rows(&self.v)?);
        let y = ops::attention(&q, &k, &v, 1.0 / (c as f64).sqrt(), &Mask::None)?;
        let y = y.transpose(2, 3)?.contiguous()?.reshape((b, c, h, w))?;
        Ok((x + self.proj_out.forward(&y)?)?)
    }
}

/// Residual blocks, each followed by attention at the lowest resolution, and then a change of resolution.
struct Level {
    res: Vec<ResnetBlock>,
    attn: Vec<AttnBlock>,
    resample: Option<Conv2d>,
}

impl Level {
    fn new(
        (inputs, outputs): (usize, usize),
        blocks: usize,
        lowest: bool,
        resample: Option<Conv2d>,
        groups: usize,
        weights: &Weights,
    ) -> Result<Self> {
        let res = (0..blocks)
            .map(|i| {
                let inputs = if i == 0 { inputs } else { outputs };
                ResnetBlock::new(inputs, outputs, groups, &weights.pp("res").pp(i))
            })
            .collect::<Result<_>>()?;
        let attn = (0..if lowest { blocks } else { 0 })
            .map(|i| AttnBlock::new(outputs, groups, &weights.pp("attn").pp(i)))
            .collect::<Result<_>>()?;
        Ok(Self {
            res,
            attn,
            resample,
        })
    }

    fn forward(&self, x: Tensor) -> Result<Tensor> {
        let mut h = x;
        for (i, res) in self.res.iter().enumerate() {
            h = res.forward(&h)?;
            if let Some(attn) = self.attn.get(i) {
                h = attn.forward(&h)?;
            }
        }
        Ok(h)
    }
}

struct Middle {
    first: ResnetBlock,
    attn: AttnBlock,
    last: ResnetBlock,
}

impl Middle {
    fn new(channels: usize, groups: usize, weights: &Weights) -> Result<Self> {
        Ok(Self {
            first: ResnetBlock::new(channels, channels, groups, &weights.pp(0))?,
            attn: AttnBlock::new(channels, groups, &weights.pp(1))?,
            last: ResnetBlock::new(channels, channels, groups, &weights.pp(2))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.last
            .forward(&self.attn.forward(&self.first.forward(x)?)?)
    }
}

struct Encoder {
    conv_in: Conv2d,
    conv_blocks: Vec<Level>,
    mid: Middle,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Encoder {
    fn new(c: &Config, weights: &Weights) -> Result<Self> {
        let (levels, groups) = (c.encoder_ch_mult.len(), c.norm_num_groups);
        let mut inputs = c.ch;
        let mut conv_blocks = Vec::new();
        for (i, factor) in c.encoder_ch_mult.iter().enumerate() {
            let (outputs, lowest) = (c.ch * factor, i + 1 == levels);
            let here = weights.pp("conv_blocks").pp(i);
            let down = if lowest {
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
            conv_blocks.push(Level::new(
                (inputs, outputs),
                RES_BLOCKS,
                lowest,
                down,
                groups,
                &here,
            )?);
            inputs = outputs;
        }
        Ok(Self {
            conv_in: conv(3, c.ch, 3, &weights.pp("conv_in"))?,
            conv_blocks,
            mid: Middle::new(inputs, groups, &weights.pp("mid"))?,
            norm_out: norm(groups, inputs, &weights.pp("norm_out"))?,
            conv_out: conv(inputs, c.z_channels, 3, &weights.pp("conv_out"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut h = self.conv_in.forward(x)?;
        for level in &self.conv_blocks {
            h = level.forward(h)?;
            if let Some(down) = &level.resample {
                h = down.forward(&h)?;
            }
        }
        let h = self.mid.forward(&h)?;
        self.conv_out.forward(&self.norm_out.forward_silu(&h)?)
    }
}

struct Decoder {
    conv_in: Conv2d,
    mid: Middle,
    conv_blocks: Vec<Level>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Decoder {
    fn new(c: &Config, weights: &Weights) -> Result<Self> {
        let (levels, groups) = (c.decoder_ch_mult.len(), c.norm_num_groups);
        let lowest = c.ch * c.decoder_ch_mult[levels - 1];
        let mut inputs = lowest;
        let mut conv_blocks = Vec::new();
        for (i, factor) in c.decoder_ch_mult.iter().rev().enumerate() {
            let outputs = c.ch * factor;
            let here = weights.pp("conv_blocks").pp(i);
            let up = if i + 1 == levels {
                None
            } else {
                let place = here.pp("upsample").pp("conv");
                Some(conv(outputs, outputs, 3, &place)?)
            };
            conv_blocks.push(Level::new(
                (inputs, outputs),
                RES_BLOCKS + 1,
                i == 0,
                up,
                groups,
                &here,
            )?);
            inputs = outputs;
        }
        Ok(Self {
            conv_in: conv(c.z_channels, lowest, 3, &weights.pp("conv_in"))?,
            mid: Middle::new(lowest, groups, &weights.pp("mid"))?,
            conv_blocks,
            norm_out: norm(groups, inputs, &weights.pp("norm_out"))?,
            conv_out: conv(inputs, 3, 3, &weights.pp("conv_out"))?,
        })
    }

    fn forward(&self, z: &Tensor) -> Result<Tensor> {
        let mut h = self.mid.forward(&self.conv_in.forward(z)?)?;
        for level in &self.conv_blocks {
            h = level.forward(h)?;
            if let Some(up) = &level.resample {
                h = up.forward(&ops::upsample_nearest2x(&h)?)?;
            }
        }
        self.conv_out.forward(&self.norm_out.forward_silu(&h)?)
    }
}

/// The nearest code of each encoding.
#[derive(Debug, Clone)]
pub struct Quantized {
    /// Codes (b, n) of u32, row by row.
    pub tokens: Tensor,
    /// For each code in the same order, how much further away the second nearest is, in squared distance.
    pub gaps: Vec<f32>,
}

/// What training the tokenizer needs of one forward pass.
#[derive(Debug, Clone)]
pub struct TrainOutput {
    /// (b, 3, h, w), not clamped; gradients pass the quantisation straight through.
    pub reconstruction: Tensor,
    /// Mean squared distance of the codes to the encodings; it moves the codebook only.
    pub vq_loss: Tensor,
    /// `commit_loss_beta` times the same distance; it moves the encoder only.
    pub commit_loss: Tensor,
    /// Codes (b, n) of u32.
    pub indices: Tensor,
}

/// The tokenizer.
pub struct VqModel {
    config: Config,
    encoder: Encoder,
    decoder: Decoder,
    quant_conv: Conv2d,
    post_quant_conv: Conv2d,
    embedding: Tensor,
}

impl VqModel {
    /// Builds the tokenizer from `weights`, whose root is the checkpoint's. Call [`Weights::finish`] afterwards.
    pub fn new(config: &Config, weights: &Weights) -> Result<Self> {
        config.validate()?;
        let c = config;
        let (codes, width) = (c.codebook_size, c.codebook_embed_dim);
        // The reference draws codes uniformly in a cube of side 2 / codebook_size and, if they are to have unit
        // length, normalises them; a normal of this deviation has unit length in the mean.
        let init = if c.codebook_l2_norm {
            Init::Normal((1.0 / width as f64).sqrt())
        } else {
            Init::Uniform(1.0 / codes as f64)
        };
        Ok(Self {
            encoder: Encoder::new(c, &weights.pp("encoder"))?,
            decoder: Decoder::new(c, &weights.pp("decoder"))?,
            quant_conv: conv(c.z_channels, width, 1, &weights.pp("quant_conv"))?,
            post_quant_conv: conv(width, c.z_channels, 1, &weights.pp("post_quant_conv"))?,
            embedding: weights.pp("quantize").pp("embedding").get(
                (codes, width),
                "weight",
                init,
            )?,
            config: c.clone(),
        })
    }

    /// The configuration it was built with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        self.embedding.device()
    }

    /// The encoding before quantisation and normalisation, (b, codebook_embed_dim, h / f, w / f) for `image`
    /// (b, 3, h, w) in [−1, 1] with h and w at least the downsampling f; where they are no multiples of it, the last
    /// rows and columns have no code of their own, as in the reference.
    pub fn encode_continuous(&self, image: &Tensor) -> Result<Tensor> {
        let (_, c, h, w) = image.dims4()?;
        let f = self.config.downsampling();
        if c != 3 || h < f || w < f {
            return Err(Error::invalid(
                format!("an image of shape {:?} for the tokenizer", image.dims()),
                format!("three channels and sides of at least {f} are expected"),
            ));
        }
        self.quant_conv.forward(
            &self
                .encoder
                .forward(&image.to_dtype(self.embedding.dtype())?)?,
        )
    }

    /// Tokens (b, n) of u32, row by row, of `image` (b, 3, h, w) in [−1, 1].
    pub fn encode(&self, image: &Tensor) -> Result<Tensor> {
        Ok(self.quantize(&self.encode_continuous(image)?)?.tokens)
    }

    /// The nearest code for each place of `z` (b, codebook_embed_dim, h, w), the first of equals.
    pub fn quantize(&self, z: &Tensor) -> Result<Quantized> {
        let (b, _, h, w) = z.dims4()?;
        let rows = self.rows(&z.detach())?.to_dtype(DType::F32)?;
        let codebook = self.codebook()?.detach().to_dtype(DType::F32)?;
        let lengths = codebook.sqr()?.sum_keepdim(1)?.t()?;
        let transposed = codebook.t()?.contiguous()?;
        let (mut tokens, mut gaps) = (Vec::new(), Vec::new());
        // A slice of rows at a time: the table of distances is rows times codes.
        for start in (0..b * h * w).step_by(1024) {
            let rows = rows.narrow(0, start, 1024.min(b * h * w - start))?;
            let distances = (rows.sqr()?.sum_keepdim(1)?.broadcast_add(&lengths)?
                - (rows.matmul(&transposed)? * 2.0)?)?;
            for row in distances.to_vec2::<f32>()? {
                let (token, gap) = nearest(&row);
                tokens.push(token);
                gaps.push(gap);
            }
        }
        Ok(Quantized {
            tokens: Tensor::from_vec(tokens, (b, h * w), z.device())?,
            gaps,
        })
    }

    /// Images (b, 3, h, w), about [−1, 1] and not clamped, of `tokens` (b, n) of u32: a square grid, row by row.
    pub fn decode(&self, tokens: &Tensor) -> Result<Tensor> {
        let (_, n) = tokens.dims2()?;
        let grid = n.isqrt();
        if grid * grid != n || n == 0 {
            return Err(Error::invalid(
                format!("{n} tokens to decode"),
                "the tokens of an image form a square",
            ));
        }
        let pixels = n * self.config.downsampling().pow(2);
        self.decode_slices(tokens, grid, (PIXELS_AT_ONCE / pixels).max(1))
    }

    fn decode_slices(&self, tokens: &Tensor, grid: usize, at_once: usize) -> Result<Tensor> {
        let b = tokens.dim(0)?;
        let codes = self.codebook()?;
        let slices = (0..b)
            .step_by(at_once)
            .map(|start| {
                let tokens = tokens.narrow(0, start, at_once.min(b - start))?;
                let z = self.look_up(&codes, &tokens, grid, grid)?;
                self.decoder.forward(&self.post_quant_conv.forward(&z)?)
            })
            .collect::<Result<Vec<_>>>()?;
        match <[Tensor; 1]>::try_from(slices) {
            Ok([one]) => Ok(one),
            Err(slices) => Ok(Tensor::cat(&slices, 0)?),
        }
    }

    /// One forward pass for training on `image` (b, 3, h, w) in [−1, 1].
    pub fn forward_train(&self, image: &Tensor) -> Result<TrainOutput> {
        let z = self.encode_continuous(image)?;
        let (b, c, h, w) = z.dims4()?;
        let indices = self.quantize(&z)?.tokens;
        let codes = self.look_up(&self.codebook()?, &indices, h, w)?;
        let z = self
            .rows(&z)?
            .reshape((b, h, w, c))?
            .permute((0, 3, 1, 2))?
            .contiguous()?;
        let vq_loss = (&codes - z.detach())?.sqr()?.mean_all()?;
        let commit = (codes.detach() - &z)?.sqr()?.mean_all()?;
        let straight = (&z + (&codes - &z)?.detach())?;
        Ok(TrainOutput {
            reconstruction: self
                .decoder
                .forward(&self.post_quant_conv.forward(&straight)?)?,
            vq_loss,
            commit_loss: (commit * self.config.commit_loss_beta)?,
            indices,
        })
    }

    /// `z` (b, c, h, w) as rows (b·h·w, c), of unit length where the codebook is.
    fn rows(&self, z: &Tensor) -> Result<Tensor> {
        let (b, c, h, w) = z.dims4()?;
        let rows = z
            .permute((0, 2, 3, 1))?
            .contiguous()?
            .reshape((b * h * w, c))?;
        self.normalised(rows)
    }

    fn codebook(&self) -> Result<Tensor> {
        self.normalised(parameter(&self.embedding))
    }

    fn normalised(&self, rows: Tensor) -> Result<Tensor> {
        if !self.config.codebook_l2_norm {
            return Ok(rows);
        }
        // The floor on the length is 1e-12, as in torch's normalize.
        let length = (rows.sqr()?.sum_keepdim(D::Minus1)? + 1e-24)?.sqrt()?;
        Ok(rows.broadcast_div(&length)?)
    }

    /// The rows of `codes` for `tokens` (b, h·w), as (b, c, h, w).
    fn look_up(&self, codes: &Tensor, tokens: &Tensor, h: usize, w: usize) -> Result<Tensor> {
        let b = tokens.dim(0)?;
        Ok(codes
            .index_select(&tokens.flatten_all()?.contiguous()?, 0)?
            .reshape((b, h, w, self.config.codebook_embed_dim))?
            .permute((0, 3, 1, 2))?
            .contiguous()?)
    }
}

/// The place of the smallest of `distances` and how much larger the second smallest is.
fn nearest(distances: &[f32]) -> (u32, f32) {
    let (mut best, mut smallest, mut second) = (0, f32::INFINITY, f32::INFINITY);
    for (i, &distance) in distances.iter().enumerate() {
        if distance < smallest {
            second = smallest;
            (best, smallest) = (i as u32, distance);
        } else if distance < second {
            second = distance;
        }
    }
    (best, second - smallest)
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

    #[test]
    fn the_second_nearest_code_gives_the_gap() {
        assert_eq!(nearest(&[3.0, 1.0, 1.5, 9.0]), (1, 0.5));
        assert_eq!(nearest(&[2.0, 2.0]), (0, 0.0));
    }
}
