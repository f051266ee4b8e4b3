//! LlamaGen's VQ tokenizer, trained by reconstruction. The published one also has a perceptual and an adversarial
//! loss, for which a drawn world of flat colours has little use.

use std::cell::RefCell;
use std::collections::BTreeSet;

use candle_core::{D, Device, Tensor, Var};
use rand::Rng;
use serde_json::json;

use super::context::Context;
use super::course::Step;
use super::{files, psnr};
use crate::models::llamagen::vq::{Config, VqModel};
use crate::nn::no_grad;
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
    files::write_json(
        &folder.join("config.json"),
        &json!({
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
        }),
    )?;
    let file = folder.join("model.safetensors");
    let opened = context.open("vq", &file, |weights| VqModel::new(&config, weights))?;
    let (weights, model) = (opened.weights, opened.model);
    let scenes = context.scenes("vq");
    let variables = weights.variables();
    let codebook = Codebook::new(&variables, settings.codebook_size)?;
    if opened.afresh.contains(CODEBOOK) {
        // Codes that start where encodings are need no reviving.
        let batch = scenes.batch(0, settings.codebook_size.div_ceil(16));
        let pixels = scenes.pixels(&batch, &context.device)?;
        let z = no_grad(|| model.encode_continuous(&pixels))?;
        codebook.place_all(&z, &mut scenes.generator("codebook", 0))?;
    }
    let usage = RefCell::new(codebook);
    let course = context.course("vq", &settings.training, &folder, variables);
    let step = |seen: usize, spent: f64| {
        let batch = scenes.batch(seen, settings.training.batch_size);
        let pixels = scenes.pixels(&batch, &context.device)?;
        let output = model.forward_train(&pixels)?;
        let error = (&output.reconstruction - &pixels)?;
        let squared = error.sqr()?.mean_all()?;
        let absolute = error.abs()?.mean_all()?;
        let loss = ((&squared + (absolute * settings.absolute)?)?
            + (&output.vq_loss + &output.commit_loss)?)?;
        let mut usage = usage.borrow_mut();
        usage.count(&output.indices, settings.training.batch_size)?;
        // Late in the course a moved code would find no time to settle.
        let moved = if spent < 0.6 {
            let generator = &mut scenes.generator("revive", seen);
            usage.revive(
                settings.revive_after,
                || no_grad(|| model.encode_continuous(&pixels)),
                generator,
            )?
        } else {
            0
        };
        let figures = vec![
            ("psnr", psnr(f64::from(squared.to_scalar::<f32>()?))),
            ("code", f64::from(output.vq_loss.to_scalar::<f32>()?)),
            ("unused", usage.unused(settings.revive_after) as f64),
            ("moved", moved as f64),
        ];
        Ok(Step { loss, figures })
    };
    course.run(step, || files::write_weights(&file, &weights.variables()))
}

/// The codebook and how long each code has been out of use.
struct Codebook {
    variable: Var,
    /// Images since each code was last used.
    idle: Vec<usize>,
}

impl Codebook {
    fn new(variables: &[(String, Var)], size: usize) -> Result<Self> {
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

    /// Puts each of `codes` where one of the encodings `z` (b, d, h, w) is, at length 1.
    fn place(&self, codes: &[usize], z: &Tensor, generator: &mut impl Rng) -> Result<()> {
        let width = self.variable.dim(1)?;
        let rows = z
            .detach()
            .permute((0, 2, 3, 1))?
            .contiguous()?
            .reshape(((), width))?;
        let rows = rows.broadcast_div(&(rows.sqr()?.sum_keepdim(D::Minus1)? + 1e-12)?.sqrt()?)?;
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

/// The reconstructions of `pixels` (b, 3, h, w) by the checkpoint, and how many codes they use.
pub fn reconstruct(context: &Context, pixels: &Tensor) -> Result<(Tensor, usize)> {
    let model = super::frozen::vq(&context.out.join("llamagen/vq"), &context.device)?;
    let tokens = model.encode(pixels)?;
    let used: BTreeSet<u32> = tokens.flatten_all()?.to_vec1()?.into_iter().collect();
    Ok((model.decode(&tokens)?, used.len()))
}
