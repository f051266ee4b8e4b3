//! What VQGANs (Esser et al. 2021, arXiv 2012.09841) are made of, as taming-transformers wrote them and as LlamaGen and
//! Chameleon took them over: residual and attention blocks, the order of both directions, and the codebook with its
//! nearest-neighbour quantisation.
//! Reference: `taming/modules/diffusionmodules/model.py` and `taming/modules/vqvae/quantize.py`.

use candle_core::{D, DType, Device, Tensor};

use super::encoder::Activation;
use crate::nn::ops::{self, Padding};
use crate::nn::{Conv2d, GroupNorm, Init, Mask, Weights, layout, parameter};
use crate::{Error, Result};

/// Images are computed in slices of about this many pixels, which bounds the memory of the widest layer.
const PIXELS_AT_ONCE: usize = 4 * 256 * 256;

/// A convolution that keeps the size.
pub fn conv(inputs: usize, outputs: usize, kernel: usize, weights: &Weights) -> Result<Conv2d> {
    Conv2d::new(
        inputs,
        outputs,
        kernel,
        1,
        Padding::Same(kernel / 2),
        weights,
    )
}

/// A group norm as every VQGAN has it; the references always have 32 groups.
pub fn norm(groups: usize, channels: usize, weights: &Weights) -> Result<GroupNorm> {
    GroupNorm::new(groups, channels, 1e-6, weights)
}

/// Two convolutions, each after a norm and an activation, beside a shortcut.
pub struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    norm2: GroupNorm,
    conv2: Conv2d,
    shortcut: Option<Conv2d>,
    activation: Activation,
}

impl ResnetBlock {
    /// As VQGANs have it: with SiLU, and `nin_shortcut` where the widths differ.
    pub fn new(inputs: usize, outputs: usize, groups: usize, weights: &Weights) -> Result<Self> {
        let activation = Activation::Silu;
        Self::with(
            (inputs, outputs),
            groups,
            activation,
            "nin_shortcut",
            weights,
        )
    }

    /// Takes `norm1`, `conv1`, `norm2`, `conv2`, and what is called `shortcut` where the widths differ.
    pub fn with(
        (inputs, outputs): (usize, usize),
        groups: usize,
        activation: Activation,
        shortcut: &str,
        weights: &Weights,
    ) -> Result<Self> {
        Ok(Self {
            norm1: norm(groups, inputs, &weights.pp("norm1"))?,
            conv1: conv(inputs, outputs, 3, &weights.pp("conv1"))?,
            norm2: norm(groups, outputs, &weights.pp("norm2"))?,
            conv2: conv(outputs, outputs, 3, &weights.pp("conv2"))?,
            shortcut: if inputs == outputs {
                None
            } else {
                Some(conv(inputs, outputs, 1, &weights.pp(shortcut))?)
            },
            activation,
        })
    }

    /// `x` (b, inputs, h, w) to (b, outputs, h, w).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = self
            .conv1
            .forward(&self.activation.of_norm(&self.norm1, x)?)?;
        let h = self
            .conv2
            .forward(&self.activation.of_norm(&self.norm2, &h)?)?;
        match &self.shortcut {
            Some(shortcut) => layout::add(&shortcut.forward(x)?, &h),
            None => layout::add(x, &h),
        }
    }
}

/// Self-attention of all places with one head.
pub struct AttnBlock {
    norm: GroupNorm,
    q: Conv2d,
    k: Conv2d,
    v: Conv2d,
    proj_out: Conv2d,
}

impl AttnBlock {
    /// Takes `norm`, `q`, `k`, `v` and `proj_out`.
    pub fn new(channels: usize, groups: usize, weights: &Weights) -> Result<Self> {
        let point = |name| conv(channels, channels, 1, &weights.pp(name));
        Ok(Self {
            norm: norm(groups, channels, &weights.pp("norm"))?,
            q: point("q")?,
            k: point("k")?,
            v: point("v")?,
            proj_out: point("proj_out")?,
        })
    }

    /// `x` (b, channels, h, w) to the same shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
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
        layout::add(x, &self.proj_out.forward(&y)?)
    }
}

/// Residual blocks of one resolution, all or none of them followed by attention, and then perhaps a change of
/// resolution.
pub struct Level {
    blocks: Vec<ResnetBlock>,
    attn: Vec<AttnBlock>,
    resample: Option<Conv2d>,
}

impl Level {
    /// As many residual blocks as `blocks` says, which the checkpoint has under that name, and attention at `attn`.
    pub fn new(
        (inputs, outputs): (usize, usize),
        (name, blocks): (&str, usize),
        attends: bool,
        resample: Option<Conv2d>,
        groups: usize,
        weights: &Weights,
    ) -> Result<Self> {
        Ok(Self {
            blocks: (0..blocks)
                .map(|i| {
                    let inputs = if i == 0 { inputs } else { outputs };
                    ResnetBlock::new(inputs, outputs, groups, &weights.pp(name).pp(i))
                })
                .collect::<Result<_>>()?,
            attn: (0..if attends { blocks } else { 0 })
                .map(|i| AttnBlock::new(outputs, groups, &weights.pp("attn").pp(i)))
                .collect::<Result<_>>()?,
            resample,
        })
    }

    fn forward(&self, mut h: Tensor) -> Result<Tensor> {
        for (i, block) in self.blocks.iter().enumerate() {
            h = block.forward(&h)?;
            if let Some(attn) = self.attn.get(i) {
                h = attn.forward(&h)?;
            }
        }
        Ok(h)
    }
}

/// The blocks at the lowest resolution.
pub struct Middle {
    first: ResnetBlock,
    attn: Option<AttnBlock>,
    last: ResnetBlock,
}

impl Middle {
    /// `names` are those of the first block, the attention and the last block.
    pub fn new(
        channels: usize,
        groups: usize,
        attends: bool,
        names: [&str; 3],
        weights: &Weights,
    ) -> Result<Self> {
        let block = |name| ResnetBlock::new(channels, channels, groups, &weights.pp(name));
        Ok(Self {
            first: block(names[0])?,
            attn: attends
                .then(|| AttnBlock::new(channels, groups, &weights.pp(names[1])))
                .transpose()?,
            last: block(names[2])?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut h = self.first.forward(x)?;
        if let Some(attn) = &self.attn {
            h = attn.forward(&h)?;
        }
        self.last.forward(&h)
    }
}

/// From images to what is quantised.
pub struct Encoder {
    pub conv_in: Conv2d,
    /// From the highest resolution to the lowest.
    pub levels: Vec<Level>,
    pub mid: Middle,
    pub norm_out: GroupNorm,
    pub conv_out: Conv2d,
}

impl Encoder {
    /// `x` (b, 3, h, w) to (b, z_channels, h / f, w / f).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut h = self.conv_in.forward(x)?;
        for level in &self.levels {
            h = level.forward(h)?;
            if let Some(halve) = &level.resample {
                h = halve.forward(&h)?;
            }
        }
        let h = self.mid.forward(&h)?;
        self.conv_out.forward(&self.norm_out.forward_silu(&h)?)
    }
}

/// From codes to images.
pub struct Decoder {
    pub conv_in: Conv2d,
    pub mid: Middle,
    /// From the lowest resolution to the highest.
    pub levels: Vec<Level>,
    pub norm_out: GroupNorm,
    pub conv_out: Conv2d,
}

impl Decoder {
    /// `z` (b, z_channels, h, w) to (b, 3, h · f, w · f).
    pub fn forward(&self, z: &Tensor) -> Result<Tensor> {
        let mut h = self.mid.forward(&self.conv_in.forward(z)?)?;
        for level in &self.levels {
            h = level.forward(h)?;
            if let Some(double) = &level.resample {
                h = double.forward(&ops::upsample_nearest2x(&h)?)?;
            }
        }
        self.conv_out.forward(&self.norm_out.forward_silu(&h)?)
    }
}

/// A convolution that halves the size, with the zeros on the right and at the bottom.
pub fn halving(channels: usize, weights: &Weights) -> Result<Conv2d> {
    Conv2d::new(channels, channels, 3, 2, Padding::RightBottom, weights)
}

/// Encodings and codes as a codebook compares them, for questions about single places.
pub struct Compared {
    /// (places, width), of f64 on the CPU, as `codes` (codes, width).
    encodings: Vec<Vec<f64>>,
    codes: Vec<Vec<f64>>,
}

impl Compared {
    /// The Euclidean distance of the encoding at `place`, counted row by row through the batch, to every code.
    pub fn distances(&self, place: usize) -> Vec<f64> {
        let encoding = &self.encodings[place];
        let distance = |code: &Vec<f64>| -> f64 {
            let pairs = encoding.iter().zip(code);
            pairs.map(|(z, e)| (z - e).powi(2)).sum::<f64>().sqrt()
        };
        self.codes.iter().map(distance).collect()
    }
}

/// What training needs of a quantisation.
#[derive(Debug, Clone)]
pub struct Quantization {
    /// The nearest codes in place of the encodings, (b, width, h, w); gradients pass straight through.
    pub codes: Tensor,
    /// Mean squared distance of the codes to the encodings; it moves the codebook only.
    pub vq_loss: Tensor,
    /// The commitment's weight times the same distance; it moves the encoder only.
    pub commit_loss: Tensor,
    /// Codes (b, h·w) of u32.
    pub indices: Tensor,
}

/// What training a tokenizer needs of one forward pass.
#[derive(Debug, Clone)]
pub struct TrainOutput {
    /// (b, 3, h, w), not clamped; gradients pass the quantisation straight through.
    pub reconstruction: Tensor,
    /// As in [`Quantization`], like the two that follow.
    pub vq_loss: Tensor,
    pub commit_loss: Tensor,
    pub indices: Tensor,
}

impl Quantization {
    /// With what the decoder made of the codes.
    pub fn decoded(self, reconstruction: Tensor) -> TrainOutput {
        TrainOutput {
            reconstruction,
            vq_loss: self.vq_loss,
            commit_loss: self.commit_loss,
            indices: self.indices,
        }
    }
}

/// The codebook.
pub struct Codebook {
    embedding: Tensor,
    unit_length: bool,
}

impl Codebook {
    /// Takes `weight` (`codes`, `width`) here. With `unit_length`, codes and encodings are compared at length 1.
    pub fn new(codes: usize, width: usize, unit_length: bool, weights: &Weights) -> Result<Self> {
        // The reference draws codes uniformly in a cube of side 2 / codes and, if they are to have unit length,
        // normalises them; a normal of this deviation has unit length in the mean.
        let init = if unit_length {
            Init::Normal((1.0 / width as f64).sqrt())
        } else {
            Init::Uniform(1.0 / codes as f64)
        };
        Ok(Self {
            embedding: weights.get((codes, width), "weight", init)?,
            unit_length,
        })
    }

    /// The stored table, (codes, width).
    pub fn embedding(&self) -> &Tensor {
        &self.embedding
    }

    /// The nearest code for each place of `z` (b, width, h, w), the first of equals: (b, h·w) of u32, row by row.
    pub fn quantize(&self, z: &Tensor) -> Result<Tensor> {
        let (b, _, h, w) = z.dims4()?;
        let rows = self.rows(&z.detach())?.to_dtype(DType::F32)?;
        let codebook = self.codes()?.detach().to_dtype(DType::F32)?;
        let lengths = codebook.sqr()?.sum_keepdim(1)?.t()?;
        let transposed = codebook.t()?.contiguous()?;
        let mut tokens = Vec::with_capacity(b * h * w);
        // A slice of rows at a time: the table of distances is rows times codes.
        for start in (0..b * h * w).step_by(1024) {
            let rows = rows.narrow(0, start, 1024.min(b * h * w - start))?;
            let distances = (rows.sqr()?.sum_keepdim(1)?.broadcast_add(&lengths)?
                - (rows.matmul(&transposed)? * 2.0)?)?;
            tokens.extend(distances.to_vec2::<f32>()?.iter().map(|row| nearest(row)));
        }
        Ok(Tensor::from_vec(tokens, (b, h * w), z.device())?)
    }

    /// What [`Codebook::quantize`] compares for `z` (b, width, h, w), in f64.
    pub fn compared(&self, z: &Tensor) -> Result<Compared> {
        let wide = |t: &Tensor| t.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64);
        Ok(Compared {
            encodings: self.rows(&wide(z)?)?.to_vec2()?,
            codes: self.normalised(wide(&self.embedding)?)?.to_vec2()?,
        })
    }

    /// The codes of `tokens` (b, h·w) of u32, row by row, as (b, width, h, w).
    pub fn look_up(&self, tokens: &Tensor, h: usize, w: usize) -> Result<Tensor> {
        let b = tokens.dim(0)?;
        let width = self.embedding.dim(1)?;
        Ok(self
            .codes()?
            .index_select(&tokens.flatten_all()?.contiguous()?, 0)?
            .reshape((b, h, w, width))?
            .permute((0, 3, 1, 2))?
            .contiguous()?)
    }

    /// Quantises `z` (b, width, h, w) for training, with the commitment loss weighted by `beta`.
    pub fn train(&self, z: &Tensor, beta: f64) -> Result<Quantization> {
        let (b, c, h, w) = z.dims4()?;
        let indices = self.quantize(z)?;
        let codes = self.look_up(&indices, h, w)?;
        let z = self
            .rows(z)?
            .reshape((b, h, w, c))?
            .permute((0, 3, 1, 2))?
            .contiguous()?;
        let vq_loss = (&codes - z.detach())?.sqr()?.mean_all()?;
        let commit = (codes.detach() - &z)?.sqr()?.mean_all()?;
        Ok(Quantization {
            codes: (&z + (&codes - &z)?.detach())?,
            vq_loss,
            commit_loss: (commit * beta)?,
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

    fn codes(&self) -> Result<Tensor> {
        self.normalised(parameter(&self.embedding))
    }

    fn normalised(&self, rows: Tensor) -> Result<Tensor> {
        if !self.unit_length {
            return Ok(rows);
        }
        // The floor on the length is 1e-12, as in torch's normalize.
        let length = (rows.sqr()?.sum_keepdim(D::Minus1)? + 1e-24)?.sqrt()?;
        Ok(rows.broadcast_div(&length)?)
    }
}

/// Fails unless `image` is (b, 3, h, w) with sides of at least `downsampling`.
pub fn check_image(image: &Tensor, downsampling: usize) -> Result<()> {
    let (_, c, h, w) = image.dims4()?;
    if c == 3 && h >= downsampling && w >= downsampling {
        return Ok(());
    }
    Err(Error::invalid(
        format!("an image of shape {:?} for the tokenizer", image.dims()),
        format!("three channels and sides of at least {downsampling} are expected"),
    ))
}

/// The side of the square that `tokens` (b, n) form.
pub fn square(tokens: &Tensor) -> Result<usize> {
    let (_, n) = tokens.dims2()?;
    let grid = n.isqrt();
    if grid * grid == n && n > 0 {
        return Ok(grid);
    }
    Err(Error::invalid(
        format!("{n} tokens to decode"),
        "the tokens of an image form a square",
    ))
}

/// How many images of `pixels` pixels are computed at once.
pub fn images_at_once(pixels: usize) -> usize {
    (PIXELS_AT_ONCE / pixels.max(1)).max(1)
}

/// `body` of `x` (b, …), `at_once` rows at a time.
pub fn in_slices(
    x: &Tensor,
    at_once: usize,
    body: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let b = x.dim(0)?;
    let slices = (0..b)
        .step_by(at_once)
        .map(|start| body(&x.narrow(0, start, at_once.min(b - start))?))
        .collect::<Result<Vec<_>>>()?;
    match <[Tensor; 1]>::try_from(slices) {
        Ok([one]) => Ok(one),
        Err(slices) => Ok(Tensor::cat(&slices, 0)?),
    }
}

/// The place of the smallest of `distances`, the first of equals.
fn nearest(distances: &[f32]) -> u32 {
    let mut best = 0;
    for (i, distance) in distances.iter().enumerate() {
        if *distance < distances[best] {
            best = i;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_code_is_the_first_of_equals() {
        assert_eq!(nearest(&[3.0, 1.0, 1.5, 1.0]), 1);
    }

    #[test]
    fn distances_are_those_of_encodings_and_codes_of_unit_length_where_the_codebook_has_it() {
        let place = |values: &[f32]| Tensor::new(values, &Device::Cpu).unwrap();
        let codebook = |unit_length| Codebook {
            embedding: place(&[3.0, 4.0, 0.0, 2.0]).reshape((2, 2)).unwrap(),
            unit_length,
        };
        // Two places of two channels each: (0, 5) and (0, −1).
        let z = place(&[0.0, 0.0, 5.0, -1.0]).reshape((1, 2, 1, 2)).unwrap();
        let distances = |unit_length, place| {
            let compared = codebook(unit_length).compared(&z).unwrap();
            compared.distances(place)
        };
        let is = |found: Vec<f64>, wanted: [f64; 2]| {
            let apart = found.iter().zip(wanted).map(|(a, b)| (a - b).abs());
            assert!(apart.fold(0.0, f64::max) < 1e-9, "{found:?}");
        };
        is(distances(false, 0), [10f64.sqrt(), 3.0]);
        is(distances(false, 1), [34f64.sqrt(), 3.0]);
        is(distances(true, 0), [0.4f64.sqrt(), 0.0]);
        is(distances(true, 1), [3.6f64.sqrt(), 2.0]);
        let tokens = codebook(true).quantize(&z).unwrap();
        assert_eq!(tokens.to_vec2::<u32>().unwrap(), [[1, 0]]);
    }
}
