//! CLIP and DINO from checkpoint folders, as [`super::embed`] wants them.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use image::RgbImage;

use super::embed::{ImageEmbedder, Prepared, TextEmbedder};
use super::preprocess::Preprocessing;
use crate::models::checkpoint_files;
use crate::models::clip::{self, Clip};
use crate::models::limits::read_config;
use crate::models::tokenizer::TextTokenizer;
use crate::models::vit::{self, Vit};
use crate::nn::Weights;
use crate::{Error, Result};

/// Pictures that go through a model at once.
const BATCH: usize = 16;

/// CLIP, with both towers.
pub struct ClipEmbedder {
    model: Clip,
    tokenizer: TextTokenizer,
    /// The most tokens of a text; the rest is cut off.
    max_length: usize,
    preprocessing: Preprocessing,
    directory: PathBuf,
    device: Device,
}

impl ClipEmbedder {
    /// Reads `config.json`, the weights, the tokenizer and, where there is one, `preprocessor_config.json`
    /// from the folder of a `CLIPModel`. Computes in f32. Fails when a file is missing or does not fit the others.
    pub fn load(directory: &Path, device: &Device) -> Result<Self> {
        let config: clip::Config = read_config(&directory.join("config.json"))?;
        let weights = read_weights(directory, device)?;
        let model = Clip::new(&config, &weights)?;
        weights.finish()?;
        Ok(Self {
            model,
            tokenizer: TextTokenizer::from_folder(directory)?,
            max_length: config.text_config.max_position_embeddings,
            preprocessing: clip_preprocessing(directory, &config)?,
            directory: directory.to_path_buf(),
            device: device.clone(),
        })
    }
}

impl ImageEmbedder for ClipEmbedder {
    fn prepare(&self, image: &RgbImage) -> Result<RgbImage> {
        self.preprocessing.prepare(image)
    }

    fn prepared(&self, prepared: &[RgbImage]) -> Result<Vec<Vec<f32>>> {
        in_batches(prepared, |batch| {
            let pixels = self.preprocessing.normalize(batch, &self.device)?;
            self.model.encode_image(&pixels)
        })
    }

    fn description(&self) -> String {
        describe("CLIP", &self.directory, &self.preprocessing)
    }
}

impl TextEmbedder for ClipEmbedder {
    /// One text at a time and without padding, so that neither the other texts nor a padding token can matter.
    fn texts(&self, texts: &[String]) -> Result<Vec<Vec<f32>>> {
        texts
            .iter()
            .map(|text| {
                let encoded = self.tokenizer.encode(text, self.max_length, 0)?;
                let length = encoded.mask.iter().filter(|&&kept| kept == 1).count();
                let ids = Tensor::new(&encoded.ids[..length], &self.device)?.unsqueeze(0)?;
                let embedding = self.model.encode_text(&ids)?.squeeze(0)?;
                Ok(embedding.to_dtype(DType::F32)?.to_vec1()?)
            })
            .collect()
    }
}

/// Side in pixels of the square images that the DINO in `directory` takes.
///
/// # Errors
/// When its config cannot be read, or its images are no squares.
pub fn dino_side(directory: &Path) -> Result<u32> {
    side_of(&vit::Config::read(directory)?)
}

fn side_of(config: &vit::Config) -> Result<u32> {
    let vit::Size { height, width } = config.image_size;
    let side = config.image_size.side().ok_or_else(|| {
        Error::invalid(
            format!("a DINO for images of {height} by {width} pixels"),
            "scores are taken with one for square images",
        )
    })?;
    Ok(side as u32)
}

/// DINO's vision transformer; an embedding is its class token after the final norm.
pub struct DinoEmbedder {
    model: Vit,
    preprocessing: Preprocessing,
    directory: PathBuf,
    device: Device,
}

impl DinoEmbedder {
    /// Reads `config.json`, the weights and, where there is one, `preprocessor_config.json` from the folder of
    /// a `ViTModel` or of timm. Computes in f32. Fails when a file is missing or does not fit the others, or images are
    /// no squares.
    ///
    /// A checkpoint of Meta's DINO (its folder or repository is called `dino-vit…`, with 224 pixels and patches of 8 or
    /// 16) takes [`Preprocessing::dino`] whatever its file says: on the hub that file is of `ViTFeatureExtractor`, which
    /// squashes pictures, while DINO's scores in papers are those of its own steps.
    pub fn load(directory: &Path, device: &Device) -> Result<Self> {
        let config = vit::Config::read(directory)?;
        let preprocessing = dino_preprocessing(directory, &config)?;
        let weights = read_weights(directory, device)?;
        let model = Vit::new(&config, &weights)?;
        weights.finish()?;
        Ok(Self {
            model,
            preprocessing,
            directory: directory.to_path_buf(),
            device: device.clone(),
        })
    }
}

impl ImageEmbedder for DinoEmbedder {
    fn prepare(&self, image: &RgbImage) -> Result<RgbImage> {
        self.preprocessing.prepare(image)
    }

    fn prepared(&self, prepared: &[RgbImage]) -> Result<Vec<Vec<f32>>> {
        in_batches(prepared, |batch| {
            let pixels = self.preprocessing.normalize(batch, &self.device)?;
            self.model.forward(&pixels)
        })
    }

    fn description(&self) -> String {
        describe("DINO", &self.directory, &self.preprocessing)
    }
}

/// How CLIP and DINO want their pictures: known from their folders' small files, before the models are there.
#[derive(Debug, Clone)]
pub struct Preparation {
    clip: Preprocessing,
    dino: Preprocessing,
}

impl Preparation {
    /// Of the checkpoints in the folders `clip` and `dino`. Fails as loading them does.
    pub fn read(clip: &Path, dino: &Path) -> Result<Self> {
        Ok(Self {
            clip: clip_preprocessing(clip, &read_config(&clip.join("config.json"))?)?,
            dino: dino_preprocessing(dino, &vit::Config::read(dino)?)?,
        })
    }

    /// `image`, of any size, for both.
    pub fn prepare(&self, image: &RgbImage) -> Result<Prepared> {
        Ok(Prepared {
            clip: self.clip.prepare(image)?,
            dino: self.dino.prepare(image)?,
        })
    }
}

fn clip_preprocessing(directory: &Path, config: &clip::Config) -> Result<Preprocessing> {
    let official = Preprocessing::clip(config.vision_config.image_size as u32);
    Preprocessing::from_checkpoint(directory, official)
}

fn dino_preprocessing(directory: &Path, config: &vit::Config) -> Result<Preprocessing> {
    let official = Preprocessing::dino(side_of(config)?);
    match is_official(directory, config) {
        true => Ok(official),
        false => Preprocessing::from_checkpoint(directory, official),
    }
}

fn in_batches(
    images: &[RgbImage],
    embed: impl Fn(&[RgbImage]) -> Result<Tensor>,
) -> Result<Vec<Vec<f32>>> {
    let mut embeddings = Vec::with_capacity(images.len());
    for batch in images.chunks(BATCH) {
        embeddings.extend(embed(batch)?.to_dtype(DType::F32)?.to_vec2::<f32>()?);
    }
    Ok(embeddings)
}

/// A sentence for the report; the folder by its name alone, because a page may be passed on.
fn describe(kind: &str, directory: &Path, preprocessing: &Preprocessing) -> String {
    format!("{kind}: {} ({}).", name_of(directory), preprocessing.name)
}

/// Whether the checkpoint in `directory` is one that Meta published for DINO.
fn is_official(directory: &Path, config: &vit::Config) -> bool {
    let name = name_of(directory);
    let own = name.rsplit('/').next().unwrap_or(&name);
    own.starts_with("dino-vit")
        && config.image_size.side() == Some(224)
        && matches!(config.patch_size.side(), Some(8 | 16))
}

/// A folder's name; of a snapshot in the hub's cache, whose name is a commit, that of the repository.
fn name_of(directory: &Path) -> String {
    let name = |path: &Path| {
        path.file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    };
    let repository = directory
        .parent()
        .filter(|parent| name(parent) == "snapshots")
        .and_then(Path::parent)
        .map(name)
        .and_then(|folder| Some(folder.strip_prefix("models--")?.replace("--", "/")));
    repository.unwrap_or_else(|| name(directory))
}

fn read_weights(directory: &Path, device: &Device) -> Result<Weights> {
    checkpoint_files::open(directory, "model", DType::F32, device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_dino_is_known_by_its_name_and_sizes() {
        let config = |image, patch| vit::Config {
            image_size: vit::Size::square(image),
            patch_size: vit::Size::square(patch),
            ..vit::Config::default()
        };
        for directory in [
            "datasets/checkpoints/dino-vits16",
            "hub/models--facebook--dino-vitb8/snapshots/0123",
        ] {
            assert!(is_official(Path::new(directory), &config(224, 16)));
            assert!(is_official(Path::new(directory), &config(224, 8)));
            assert!(!is_official(Path::new(directory), &config(32, 4)));
        }
        for directory in ["datasets/nano/checkpoints/dino", "my-vit"] {
            assert!(!is_official(Path::new(directory), &config(224, 16)));
        }
    }
}
