//! The KL autoencoder of the diffusion model, trained by reconstruction.

use candle_core::Tensor;
use serde_json::json;

use super::context::Context;
use super::course::Step;
use super::scenes::normal;
use super::{files, psnr};
use crate::models::autoencoder::{AutoencoderKl, Config};
use crate::nn::no_grad;
use crate::{Error, Result};

/// Scenes from which the scale and the shift of the latents are measured.
const MEASURED: usize = 512;

/// Trains, or goes on training, `sd3/vae`.
pub fn train(context: &Context) -> Result<()> {
    let settings = &context.settings.vae;
    let folder = context.out.join("sd3/vae");
    let file = folder.join("diffusion_pytorch_model.safetensors");
    let mut config = Config {
        block_out_channels: settings.channels.clone(),
        layers_per_block: settings.layers_per_block,
        latent_channels: settings.latent_channels,
        norm_num_groups: settings.norm_groups,
        use_quant_conv: false,
        use_post_quant_conv: false,
        ..Config::default()
    };
    let opened = context.open("vae", &file, |weights| {
        AutoencoderKl::new(config.clone(), weights)
    })?;
    let (weights, model) = (opened.weights, opened.model);
    let scenes = context.scenes("vae", &settings.training);
    let course = context.course("vae", &settings.training, &folder, weights.variables());
    let step = |seen: usize, _spent: f64| {
        let batch = scenes.batch(seen, settings.training.batch_size);
        let pixels = scenes.pixels(&batch, &context.device)?;
        let (mean, logvar) = model.encode(&pixels)?;
        let noise = normal(
            mean.dims(),
            &mut scenes.generator("noise", seen),
            &context.device,
        )?;
        let latents = (&mean + ((&logvar * 0.5)?.exp()? * noise)?)?;
        let error = (model.decode(&latents)? - &pixels)?;
        let squared = error.sqr()?.mean_all()?;
        let absolute = error.abs()?.mean_all()?;
        let kl = ((mean.sqr()? + logvar.exp()?)? - (&logvar + 1.0)?)?.mean_all()?;
        let loss = ((&squared + (absolute * settings.absolute)?)? + (&kl * (0.5 * settings.kl))?)?;
        let figures = vec![
            ("psnr", psnr(f64::from(squared.to_scalar::<f32>()?))),
            ("kl", 0.5 * f64::from(kl.to_scalar::<f32>()?)),
        ];
        Ok(Step { loss, figures })
    };
    let save = || {
        // The denoiser wants latents of mean 0 and deviation 1.
        let test = context.unseen("vae scale", &settings.training);
        let pixels = test.pixels(&test.batch(0, MEASURED), &context.device)?;
        let (mean, _) = no_grad(|| model.encode(&pixels))?;
        let centre = f64::from(mean.mean_all()?.to_scalar::<f32>()?);
        let variance = (mean - centre)?.sqr()?.mean_all()?.to_scalar::<f32>()?;
        config.shift_factor = Some(rounded(centre));
        config.scaling_factor = rounded(1.0 / f64::from(variance.max(1e-12)).sqrt());
        files::write_json(
            &folder.join("config.json"),
            &published(&config, context.settings.side(&settings.training))?,
        )?;
        files::write_weights(&file, &weights.variables())
    };
    course.run(step, save)
}

/// `config` with the keys that diffusers also wants to see.
fn published(config: &Config, image_size: usize) -> Result<serde_json::Value> {
    let levels = config.block_out_channels.len();
    let mut value = json!({
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "down_block_types": vec!["DownEncoderBlock2D"; levels],
        "up_block_types": vec!["UpDecoderBlock2D"; levels],
        "sample_size": image_size,
    });
    let rest = serde_json::to_value(config).map_err(|e| Error::Invalid {
        what: format!("the autoencoder's config: {e}"),
        hint: None,
    })?;
    if let (Some(value), Some(rest)) = (value.as_object_mut(), rest.as_object()) {
        value.extend(rest.clone());
    }
    Ok(value)
}

fn rounded(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

/// The reconstructions of `pixels` (b, 3, h, w) by the checkpoint.
pub fn reconstruct(context: &Context, pixels: &Tensor) -> Result<Tensor> {
    let model = super::frozen::vae(&context.out.join("sd3/vae"), &context.device)?;
    let (mean, _) = model.encode(pixels)?;
    model.decode(&mean)
}
