//! The checkpoints that later trainings and the measurements stand on, opened without gradients.

use std::path::Path;

use candle_core::{DType, Device};
use serde::de::DeserializeOwned;

use crate::models::autoencoder::{self, AutoencoderKl};
use crate::models::clip::{self, Clip, TextModel};
use crate::models::llamagen::vq::{self, VqModel};
use crate::models::sd3::{self, Sd3Transformer};
use crate::models::t5::{self, T5Encoder};
use crate::nn::Weights;
use crate::{Error, Result};

fn config<T: DeserializeOwned>(folder: &Path) -> Result<T> {
    let path = folder.join("config.json");
    let text = std::fs::read_to_string(&path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => Error::invalid(
            format!("{} is not there", path.display()),
            "train the models that this one stands on first: clip, vq and vae come before gpt and sd3, and those before sd35, \
             flux and sdxl",
        ),
        _ => Error::io(&path)(source),
    })?;
    serde_json::from_str(&text).map_err(|e| Error::Checkpoint {
        path,
        faults: vec![e.to_string()],
    })
}

fn weights(folder: &Path, file: &str, device: &Device) -> Result<Weights> {
    Weights::from_files(&[folder.join(file)], DType::F32, device)
}

/// The VQ tokenizer in `folder`.
pub fn vq(folder: &Path, device: &Device) -> Result<VqModel> {
    let config: vq::Config = config(folder)?;
    let weights = weights(folder, "model.safetensors", device)?;
    let model = VqModel::new(&config, &weights)?;
    weights.finish()?;
    Ok(model)
}

/// The autoencoder in `folder`.
pub fn vae(folder: &Path, device: &Device) -> Result<AutoencoderKl> {
    let config: autoencoder::Config = config(folder)?;
    let weights = weights(folder, "diffusion_pytorch_model.safetensors", device)?;
    let model = AutoencoderKl::new(config, &weights)?;
    weights.finish()?;
    Ok(model)
}

/// The MMDiT in `folder`.
pub fn mmdit(folder: &Path, device: &Device) -> Result<Sd3Transformer> {
    let config: sd3::Config = config(folder)?;
    let weights = weights(folder, "diffusion_pytorch_model.safetensors", device)?;
    let model = Sd3Transformer::new(config, &weights)?;
    weights.finish()?;
    Ok(model)
}

/// The T5 encoder in `folder`.
pub fn t5(folder: &Path, device: &Device) -> Result<T5Encoder> {
    let config: t5::Config = config(folder)?;
    let weights = weights(folder, "model.safetensors", device)?;
    let model = T5Encoder::new(&config, &weights)?;
    weights.finish()?;
    Ok(model)
}

/// CLIP in `folder`.
pub fn clip(folder: &Path, device: &Device) -> Result<(Clip, clip::Config)> {
    let config: clip::Config = config(folder)?;
    let weights = weights(folder, "model.safetensors", device)?;
    let model = Clip::new(&config, &weights)?;
    weights.finish()?;
    Ok((model, config))
}

/// CLIP's text tower alone, in `folder`.
pub fn clip_text(folder: &Path, device: &Device) -> Result<(TextModel, clip::TextConfig)> {
    let config: clip::TextConfig = config(folder)?;
    let weights = weights(folder, "model.safetensors", device)?;
    let model = TextModel::new(&config, &weights)?;
    weights.finish()?;
    Ok((model, config))
}
