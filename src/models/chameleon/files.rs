//! Where a checkpoint's parts lie: the transformer as transformers' `save_pretrained` writes it, in one file or in
//! shards, and the image tokenizer as Meta publishes it, `vqgan.yaml` beside `vqgan.ckpt`, in the folder `tokenizer`.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};

use super::config::Config;
use super::vq::{self, VqGan};
use crate::files::{SETTINGS, read_text};
use crate::models::checkpoint_files::WeightFiles;
use crate::models::limits::read_config;
use crate::models::tokenizer::TextTokenizer;
use crate::nn::Weights;
use crate::{Error, Result};

/// Meta's names, and ours for the same tensors as safetensors.
pub const VQ_CONFIG: &str = "vqgan.yaml";
pub const VQ_PICKLE: &str = "vqgan.ckpt";
pub const VQ_WEIGHTS: &str = "vqgan.safetensors";
/// The folder of the image tokenizer.
pub const TOKENIZER: &str = "tokenizer";

/// The tokenizer of texts in `dir`: `tokenizer.json`, or Meta's `tokenizer/text_tokenizer.json`.
pub fn text_tokenizer(dir: &Path) -> Result<TextTokenizer> {
    let meta = dir.join(TOKENIZER).join("text_tokenizer.json");
    let own = dir.join("tokenizer.json");
    let choose_meta = !own.is_file() && meta.is_file();
    TextTokenizer::from_file(if choose_meta { &meta } else { &own })
}

/// The folder that holds the image tokenizer of the checkpoint in `dir`: one with `vqgan.yaml`, else `dir` itself, where
/// transformers keeps the encoder among the model's weights.
pub fn tokenizer_dir(dir: &Path) -> PathBuf {
    let folder = dir.join(TOKENIZER);
    if folder.join(VQ_CONFIG).is_file() {
        folder
    } else {
        dir.to_path_buf()
    }
}

/// The sizes of the image tokenizer of the checkpoint in `dir`.
pub fn tokenizer_config(dir: &Path) -> Result<vq::Config> {
    let yaml = tokenizer_dir(dir).join(VQ_CONFIG);
    if yaml.is_file() {
        let text = read_text(&yaml, SETTINGS)?;
        return vq::Config::from_yaml(&text);
    }
    let config: Config = read_config(&dir.join("config.json"))?;
    vq::Config::from_vq_config(&config.vq_config)
}

/// The image tokenizer of the checkpoint in `dir`, or in Meta's folder itself, frozen in f32. In transformers' layout it
/// encodes only.
///
/// # Errors
/// When there is none, or its names and shapes are not those of its config.
pub fn open_image_tokenizer(dir: &Path, device: &Device) -> Result<VqGan> {
    let open = |files: WeightFiles| files.open(DType::F32, device);
    let (model, weights) = build_image_tokenizer(dir, open)?;
    weights.finish()?;
    Ok(model)
}

/// [`open_image_tokenizer`] from weights as `open` reads them, whose faults are still to be asked for.
pub fn build_image_tokenizer(
    dir: &Path,
    open: impl FnOnce(WeightFiles) -> Result<Weights>,
) -> Result<(VqGan, Weights)> {
    let (folder, config) = (tokenizer_dir(dir), tokenizer_config(dir)?);
    if folder.join(VQ_CONFIG).is_file() {
        let safetensors = folder.join(VQ_WEIGHTS);
        let file = if safetensors.is_file() {
            safetensors
        } else {
            folder.join(VQ_PICKLE)
        };
        let weights = open(WeightFiles::single(&file))?;
        return Ok((VqGan::new(&config, &weights)?, weights));
    }
    let weights = open(WeightFiles::find(dir, "model")?)?;
    let root = ["model.vqmodel", "vqmodel", ""]
        .into_iter()
        .map(|prefix| weights.pp(prefix))
        .find(|place| place.contains("encoder.conv_in.weight"))
        .ok_or_else(|| absent(dir))?;
    Ok((VqGan::encoder(&config, &root)?, weights))
}

/// That the checkpoint in `dir` has no image tokenizer.
pub(super) fn absent(dir: &Path) -> Error {
    Error::invalid(
        format!("{} holds no image tokenizer", dir.display()),
        format!(
            "place {VQ_CONFIG} and {VQ_PICKLE} of Meta's Chameleon in {}",
            dir.join(TOKENIZER).display()
        ),
    )
}
