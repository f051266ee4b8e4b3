//! The image tokenizers of LlamaGen and of Chameleon, trained by reconstruction. The published ones also have a
//! perceptual and an adversarial loss, for which a drawn world of flat colours has little use.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;

use candle_core::{D, Device, Tensor, Var};
use rand::Rng;
use serde_json::json;

use super::context::Context;
use super::course::Step;
use super::settings::Training;
use super::{files, psnr};
use crate::models::chameleon::{self, VqGan};
use crate::models::llamagen::vq::{Config, VqModel};
use crate::models::vqgan::TrainOutput;
use crate::nn::{Weights, no_grad};
use crate::{Error, Result};

const CODEBOOK: &str = "quantize.embedding.weight";

/// Trains, or goes on training, `llamagen/vq`.
pub fn train(context: &Context) -> Result<()> {
    let settings = &context.settings.vq;
    let folder = context.out.join("llamagen/vq");
    let config = Config {
        codebook_size: settings.codebook_size,
        codebook_embed_dim: settings.codebook_dim,
        commit_loss_beta: settings.commitment,
        encoder_ch_mult: settings.encoder_multipliers.clone(),
        decoder_ch_mult: settings.decoder_multipliers.clone(),
        z_channels: settings.z_channels,
        ch: settings.channels,
        norm_num_groups: settings.norm_groups,
        ..Config::default()
    };
    let described = json!({
            "codebook_size": config.codebook_size,
            "codebook_embed_dim": config.codebook_embed_dim,
            "codebook_l2_norm": config.codebook_l2_norm,
            "codebook_show_usage": true,
            "commit_loss_beta": config.commit_loss_beta,
            "entropy_loss_ratio": 0.0,
            "encoder_ch_mult": config.encoder_ch_mult,
            "decoder_ch_mult": config.decoder_ch_mult,
            "z_channels": config.z_channels,
            "ch": config.ch,
            "norm_num_groups": config.norm_num_groups,
            "dropout_p": 0.0,
    });
    let file = folder.join("model.safetensors");
    let opened = context.open("vq", &file, |weights| VqModel::new(&config, weights))?;
    let model = &opened.model;
    Learning {
        name: "vq",
        folder: &folder,
        file: &file,
        training: &settings.training,
        codes: settings.codebook_size,
        unit_length: true,
        absolute: settings.absolute,
        even: settings.even,
        decoder_only: settings.decoder_only,
        revive_after: settings.revive_after,
        afresh: &opened.afresh,
    }
    .run(
        context,
        &opened.weights,
        Passes {
            encode: &|pixels| model.encode_continuous(pixels),
            tokens: &|pixels| model.encode(pixels),
            decode: &|tokens| model.decode(tokens),
            train: &|pixels| model.forward_train(pixels),
        },
        &|| files::write_json(&folder.join("config.json"), &described),
    )
}

/// Trains, or goes on training, `lumina/tokenizer`: Chameleon's image tokenizer, with codes of any length.
pub fn train_chameleon(context: &Context) -> Result<()> {
    let settings = &context.settings.vqgan;
    let folder = context.out.join("lumina").join(chameleon::files::TOKENIZER);
    let config = chameleon::vq::Config {
        ch: settings.channels,
        ch_mult: settings.multipliers.clone(),
        num_res_blocks: settings.res_blocks,
        resolution: context.settings.side(&settings.training),
        z_channels: settings.z_channels,
        n_embed: settings.codebook_size,
        embed_dim: settings.codebook_dim,
        norm_num_groups: settings.norm_groups,
        ..chameleon::vq::Config::default()
    };
    let yaml = folder.join(chameleon::files::VQ_CONFIG);
    let file = folder.join(chameleon::files::VQ_WEIGHTS);
    let opened = context.open("vqgan", &file, |weights| VqGan::new(&config, weights))?;
    let model = &opened.model;
    Learning {
        name: "vqgan",
        folder: &folder,
        file: &file,
        training: &settings.training,
        codes: settings.codebook_size,
        unit_length: false,
        absolute: settings.absolute,
        even: settings.even,
        decoder_only: settings.decoder_only,
        revive_after: settings.revive_after,
        afresh: &opened.afresh,
    }
    .run(
        context,
        &opened.weights,
        Passes {
            encode: &|pixels| model.encode_continuous(pixels),
            tokens: &|pixels| model.encode(pixels),
            decode: &|tokens| model.decode(tokens),
            train: &|pixels| model.forward_train(pixels, settings.commitment),
        },
        &|| crate::files::write(&yaml, config.to_yaml().as_bytes()),
    )
}

/// Whether the variable `name` belongs to the decoding direction.
fn is_decoding(name: &str) -> bool {
    name.starts_with("decoder.") || name.starts_with("post_quant_conv.")
}

/// What a tokenizer computes.
struct Passes<'a> {
    encode: &'a dyn Fn(&Tensor) -> Result<Tensor>,
    tokens: &'a dyn Fn(&Tensor) -> Result<Tensor>,
    decode: &'a dyn Fn(&Tensor) -> Result<Tensor>,
    train: &'a dyn Fn(&Tensor) -> Result<TrainOutput>,
}

/// What the two tokenizers learn differently.
struct Learning<'a> {
    name: &'a str,
    folder: &'a Path,
    file: &'a Path,
    training: &'a Training,
    codes: usize,
    /// Whether codes are kept at length 1.
    unit_length: bool,
    absolute: f64,
    even: bool,
    decoder_only: bool,
    revive_after: usize,
    /// The variables that no checkpoint gave.
    afresh: &'a BTreeSet<String>,
}

impl Learning<'_> {
    fn run(
        &self,
        context: &Context,
        weights: &Weights,
        passes: Passes,
        write_config: &dyn Fn() -> Result<()>,
    ) -> Result<()> {
        let scenes = context.scenes(self.name, self.training);
        let mut variables = weights.variables();
        let codebook = Codebook::new(&variables, self.codes, self.unit_length)?;
        if self.decoder_only {
            if !self.afresh.iter().all(|name| is_decoding(name)) {
                return Err(Error::invalid(
                    format!(
                        "the decoder of {} alone, without tokens that it decodes",
                        self.name
                    ),
                    "train the whole tokenizer first, with decoder_only = false",
                ));
            }
            variables.retain(|(name, _)| is_decoding(name));
        }
        if self.afresh.contains(CODEBOOK) {
            // Codes that start where encodings are need no reviving.
            let batch = scenes.batch(0, self.codes.div_ceil(16));
            let pixels = scenes.pixels(&batch, &context.device)?;
            let z = no_grad(|| (passes.encode)(&pixels))?;
            codebook.place_all(&z, &mut scenes.generator("codebook", 0))?;
        }
        let usage = RefCell::new(codebook);
        let course = context.course(self.name, self.training, self.folder, variables);
        let difference =
            |images: &Tensor, pixels: &Tensor| difference(images, pixels, self.absolute, self.even);
        let step = |seen: usize, spent: f64| {
            let batch = scenes.batch(seen, self.training.batch_size);
            let pixels = scenes.pixels(&batch, &context.device)?;
            if self.decoder_only {
                let tokens = no_grad(|| (passes.tokens)(&pixels))?;
                let (loss, decibels) = difference(&(passes.decode)(&tokens)?, &pixels)?;
                let figures = vec![("psnr", decibels)];
                return Ok(Step { loss, figures });
            }
            let output = (passes.train)(&pixels)?;
            let (loss, decibels) = difference(&output.reconstruction, &pixels)?;
            let loss = (loss + (&output.vq_loss + &output.commit_loss)?)?;
            let mut usage = usage.borrow_mut();
            usage.count(&output.indices, self.training.batch_size)?;
            // Late in the course a moved code would find no time to settle.
            let moved = if spent < 0.6 {
                let generator = &mut scenes.generator("revive", seen);
                let encodings = || no_grad(|| (passes.encode)(&pixels));
                usage.revive(self.revive_after, encodings, generator)?
            } else {
                0
            };
            let figures = vec![
                ("psnr", decibels),
                ("code", f64::from(output.vq_loss.to_scalar::<f32>()?)),
                ("unused", usage.unused(self.revive_after) as f64),
                ("moved", moved as f64),
            ];
            Ok(Step { loss, figures })
        };
        course.run(step, || {
            write_config()?;
            files::write_weights(self.file, &weights.variables())
        })
    }
}

/// What is to fall of the difference between `images` and `pixels`, both (b, 3, h, w), and the batch's PSNR in dB.
/// `absolute` and `even` as in the settings.
fn difference(
    images: &Tensor,
    pixels: &Tensor,
    absolute: f64,
    even: bool,
) -> Result<(Tensor, f64)> {
    let error = (images - pixels)?;
    let squares = error.sqr()?.flatten_from(1)?.mean(1)?;
    let mean = squares.mean_all()?;
    let decibels = psnr(f64::from(mean.to_scalar::<f32>()?));
    let squared = if even {
        let shares = mean.detach().broadcast_div(&(squares.detach() + 1e-6)?)?;
        (squares * shares)?.mean_all()?
    } else {
        mean
    };
    let absolute = (error.abs()?.mean_all()? * absolute)?;
    Ok(((squared + absolute)?, decibels))
}

/// The codebook and how long each code has been out of use.
struct Codebook {
    variable: Var,
    unit_length: bool,
    /// Images since each code was last used.
    idle: Vec<usize>,
}

impl Codebook {
    fn new(variables: &[(String, Var)], size: usize, unit_length: bool) -> Result<Self> {
        let variable = variables
            .iter()
            .find(|(name, _)| name == CODEBOOK)
            .map(|(_, variable)| variable.clone())
            .ok_or_else(|| Error::Invalid {
                what: format!("the tokenizer has no {CODEBOOK}"),
                hint: None,
            })?;
        Ok(Self {
            variable,
            unit_length,
            idle: vec![0; size],
        })
    }

    fn count(&mut self, indices: &Tensor, images: usize) -> Result<()> {
        self.idle.iter_mut().for_each(|idle| *idle += images);
        for index in indices.flatten_all()?.to_vec1::<u32>()? {
            if let Some(idle) = self.idle.get_mut(index as usize) {
                *idle = 0;
            }
        }
        Ok(())
    }

    fn unused(&self, after: usize) -> usize {
        self.idle.iter().filter(|&&idle| idle > after).count()
    }

    /// Moves every code that has been idle for more than `after` images onto some encoding. Gives their number.
    fn revive(
        &mut self,
        after: usize,
        encodings: impl FnOnce() -> Result<Tensor>,
        generator: &mut impl Rng,
    ) -> Result<usize> {
        let dead: Vec<usize> = (0..self.idle.len())
            .filter(|&code| self.idle[code] > after)
            .collect();
        if dead.is_empty() {
            return Ok(0);
        }
        self.place(&dead, &encodings()?, generator)?;
        for &code in &dead {
            self.idle[code] = 0;
        }
        Ok(dead.len())
    }

    fn place_all(&self, z: &Tensor, generator: &mut impl Rng) -> Result<()> {
        let all: Vec<usize> = (0..self.idle.len()).collect();
        self.place(&all, z, generator)
    }

    /// Puts each of `codes` where one of the encodings `z` (b, d, h, w) is, at length 1 where all are.
    fn place(&self, codes: &[usize], z: &Tensor, generator: &mut impl Rng) -> Result<()> {
        let width = self.variable.dim(1)?;
        let rows = z
            .detach()
            .permute((0, 2, 3, 1))?
            .contiguous()?
            .reshape(((), width))?;
        let rows = match self.unit_length {
            true => rows.broadcast_div(&(rows.sqr()?.sum_keepdim(D::Minus1)? + 1e-12)?.sqrt()?)?,
            false => rows,
        };
        let rows = rows.to_device(&Device::Cpu)?.to_vec2::<f32>()?;
        let mut table = self
            .variable
            .as_tensor()
            .to_device(&Device::Cpu)?
            .to_vec2::<f32>()?;
        for &code in codes {
            table[code] = rows[generator.random_range(0..rows.len())].clone();
        }
        let table = Tensor::from_vec(
            table.concat(),
            self.variable.shape(),
            self.variable.device(),
        )?;
        Ok(self.variable.set(&table)?)
    }
}

/// The reconstructions of `pixels` (b, 3, h, w) by LlamaGen's checkpoint, and how many codes they use.
pub fn reconstruct(context: &Context, pixels: &Tensor) -> Result<(Tensor, usize)> {
    let model = super::frozen::vq(&context.out.join("llamagen/vq"), &context.device)?;
    let tokens = model.encode(pixels)?;
    Ok((model.decode(&tokens)?, distinct(&tokens)?))
}

/// The same by Chameleon's.
pub fn reconstruct_chameleon(context: &Context, pixels: &Tensor) -> Result<(Tensor, usize)> {
    let folder = context.out.join("lumina");
    let model = chameleon::files::open_image_tokenizer(&folder, &context.device)?;
    let tokens = model.encode(pixels)?;
    Ok((model.decode(&tokens)?, distinct(&tokens)?))
}

fn distinct(tokens: &Tensor) -> Result<usize> {
    let used: BTreeSet<u32> = tokens.flatten_all()?.to_vec1()?.into_iter().collect();
    Ok(used.len())
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;

    #[test]
    fn an_even_loss_falls_as_the_mean_logarithm_of_the_images_errors() {
        let pixels = Tensor::zeros((2, 3, 2, 2), DType::F32, &Device::Cpu).unwrap();
        let values: Vec<f32> = (0..24).map(|i| if i < 12 { 0.01 } else { 0.4 }).collect();
        let images = Var::from_vec(values, (2, 3, 2, 2), &Device::Cpu).unwrap();
        let gradient = |loss: &Tensor| {
            let gradients = crate::nn::backward(loss).unwrap();
            let gradient = gradients.get(&images).unwrap();
            gradient.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        let squares = images.sqr().unwrap().flatten_from(1).unwrap();
        let squares = squares.mean(1).unwrap();
        let logarithm = squares.log().unwrap().mean_all().unwrap();
        let mean = squares.mean_all().unwrap().to_scalar::<f32>().unwrap();

        let (even, decibels) = difference(&images, &pixels, 0.0, true).unwrap();
        assert!((decibels - psnr(f64::from(mean))).abs() < 1e-4);
        for (found, wanted) in gradient(&even).iter().zip(gradient(&logarithm)) {
            let wanted = mean * wanted;
            assert!((found - wanted).abs() < 0.02 * wanted, "{found} {wanted}");
        }
        let (plain, _) = difference(&images, &pixels, 0.0, false).unwrap();
        let plain = gradient(&plain);
        assert!((plain[12] / plain[0] - 40.0).abs() < 0.01);
    }
}
