//! CLIP text encoders with their tokenizers, as pipelines of diffusers have them.

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde_json::Value;

use crate::files::read_json;
use crate::models::checkpoint_files::Layout;
use crate::models::clip::{TextConfig, TextModel, TextOutput};
use crate::models::tokenizer::TextTokenizer;
use crate::nn::Weights;
use crate::{Error, Result};

/// A tokenizer with the id that fills the rest of a text.
pub struct PaddedTokenizer {
    tokenizer: TextTokenizer,
    padding: u32,
    length: usize,
}

impl PaddedTokenizer {
    /// Reads the tokenizer in `folder`, for texts of `length` tokens. The padding token is the one that
    /// `tokenizer_config.json` or `special_tokens_map.json` names, else `fallback` (the second CLIP of SDXL and SD3 pads
    /// with `!`, the first with the end token).
    pub fn open(folder: &Path, length: usize, fallback: &str) -> Result<Self> {
        let tokenizer = TextTokenizer::from_folder(folder)?;
        let token = settings(folder)?.iter().find_map(|settings| {
            let entry = settings.get("pad_token")?;
            let text = entry.as_str().or_else(|| entry.get("content")?.as_str());
            text.map(String::from)
        });
        let token = token.unwrap_or_else(|| fallback.to_string());
        let padding = tokenizer.id(&token).ok_or_else(|| Error::Checkpoint {
            path: folder.to_path_buf(),
            faults: vec![format!(
                "the padding token {token:?} is not in the vocabulary"
            )],
        })?;
        Ok(Self {
            tokenizer,
            padding,
            length,
        })
    }

    /// The ids (1, length) of one text.
    pub fn ids(&self, text: &str, device: &Device) -> Result<Tensor> {
        self.ids_of(text, self.length, device)
    }

    /// The ids (1, `length`) of one text.
    pub fn ids_of(&self, text: &str, length: usize, device: &Device) -> Result<Tensor> {
        let encoded = self.tokenizer.encode(text, length, self.padding)?;
        Ok(Tensor::from_vec(encoded.ids, (1, length), device)?)
    }
}

/// What the configs of the tokenizer in `folder` say, as far as they are there.
fn settings(folder: &Path) -> Result<Vec<Value>> {
    ["tokenizer_config.json", "special_tokens_map.json"]
        .map(|name| folder.join(name))
        .iter()
        .filter(|path| path.is_file())
        .map(|path| read_json(path))
        .collect()
}

/// Every CLIP that the pipeline has in `text_encoder` and `text_encoder_2`: what it is called, the folder
/// of its tokenizer, and how many tokens of a prompt it takes.
///
/// # Errors
/// When `model_index.json` or a config cannot be read.
pub fn described_clips(layout: &Layout) -> Result<Vec<(&'static str, PathBuf, usize)>> {
    let mut found = Vec::new();
    for (suffix, name) in [("", "CLIP"), ("_2", "the second CLIP")] {
        if layout.has(&format!("text_encoder{suffix}"))? {
            found.push(described_clip(layout, suffix, name)?);
        }
    }
    Ok(found)
}

/// The one in `text_encoder`SUFFIX, which is called `name`: see [`described_clips`].
///
/// # Errors
/// When its config cannot be read.
pub fn described_clip(
    layout: &Layout,
    suffix: &str,
    name: &'static str,
) -> Result<(&'static str, PathBuf, usize)> {
    let config: TextConfig = layout.config(&format!("text_encoder{suffix}"))?;
    let folder = layout.tokenizer(&format!("tokenizer{suffix}"))?;
    let length = longest(&folder, &config)?;
    Ok((name, folder, length))
}

/// How many tokens of a text the tokenizer in `folder` leaves for a tower of `config`.
fn longest(folder: &Path, config: &TextConfig) -> Result<usize> {
    let longest = settings(folder)?
        .iter()
        .find_map(|settings| settings.get("model_max_length")?.as_u64())
        .and_then(|longest| usize::try_from(longest).ok());
    let positions = config.max_position_embeddings;
    Ok(longest.map_or(positions, |longest| longest.min(positions)))
}

/// A CLIP text tower with its tokenizer.
pub struct ClipText {
    model: TextModel,
    pub tokenizer: PaddedTokenizer,
    device: Device,
}

impl ClipText {
    /// Every CLIP of `text_encoder` and `text_encoder_2` that the pipeline has, in this order, in the precision of `like`.
    /// Their weights are added to `opened`, for faults to be reported together.
    ///
    /// # Errors
    /// When there is none.
    pub fn all(layout: &Layout, like: &Weights, opened: &mut Vec<Weights>) -> Result<Vec<Self>> {
        let mut all = Vec::new();
        for suffix in ["", "_2"] {
            if layout.has(&format!("text_encoder{suffix}"))? {
                all.push(Self::open(layout, suffix, like, opened)?);
            }
        }
        if all.is_empty() {
            // What is missing then is said for the first.
            all.push(Self::open(layout, "", like, opened)?);
        }
        Ok(all)
    }

    /// The CLIP in `text_encoder`SUFFIX, with the tokenizer in `tokenizer`SUFFIX, as
    /// [`ClipText::all`] opens them.
    ///
    /// # Errors
    /// When a file of either is missing or unusable.
    pub fn open(
        layout: &Layout,
        suffix: &str,
        like: &Weights,
        opened: &mut Vec<Weights>,
    ) -> Result<Self> {
        let component = format!("text_encoder{suffix}");
        let config: TextConfig = layout.config(&component)?;
        let weights = layout
            .weights(&component)?
            .open(like.precision(), like.device())?;
        let model = TextModel::new(&config, &weights)?;
        opened.push(weights);
        let folder = layout.tokenizer(&format!("tokenizer{suffix}"))?;
        let length = longest(&folder, &config)?;
        Ok(Self {
            model,
            tokenizer: PaddedTokenizer::open(&folder, length, "<|endoftext|>")?,
            device: like.device().clone(),
        })
    }

    /// One row.
    pub fn encode(&self, prompt: &str) -> Result<TextOutput> {
        self.model
            .forward(&self.tokenizer.ids(prompt, &self.device)?)
    }
}
