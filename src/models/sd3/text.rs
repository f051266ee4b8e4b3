//! The text encoders of Stable Diffusion 3 as `StableDiffusion3Pipeline.encode_prompt` combines them.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use super::Conditioning;
use super::files::has_component;
use crate::files::read_json;
use crate::models::{checkpoint_files, clip, t5, tokenizer::TextTokenizer};
use crate::nn::Weights;
use crate::{Error, Result};

/// Tokens of a prompt for T5: the pipeline's default, and what stands in zeros where T5 is left out.
const T5_TOKENS: usize = 256;

/// A tokenizer with the id that fills the rest of a text.
struct Padded {
    tokenizer: TextTokenizer,
    padding: u32,
    length: usize,
}

impl Padded {
    /// Reads the tokenizer in `folder`. The padding token is the one that `tokenizer_config.json` or
    /// `special_tokens_map.json` names, else `fallback` (SD3's second CLIP pads with `!`, its first with the end token).
    fn open(folder: &Path, length: usize, fallback: &str) -> Result<Self> {
        let tokenizer = TextTokenizer::from_folder(folder)?;
        let mut token = None;
        for name in ["tokenizer_config.json", "special_tokens_map.json"] {
            let path = folder.join(name);
            if token.is_none() && path.is_file() {
                let settings: Value = read_json(&path)?;
                let entry = settings.get("pad_token");
                let text = entry
                    .and_then(|entry| entry.as_str().or_else(|| entry.get("content")?.as_str()));
                token = text.map(String::from);
            }
        }
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
    fn ids(&self, text: &str, device: &Device) -> Result<Tensor> {
        let encoded = self.tokenizer.encode(text, self.length, self.padding)?;
        Ok(Tensor::from_vec(encoded.ids, (1, self.length), device)?)
    }
}

/// Every text encoder that the checkpoint in `directory` has: what it is called, the folder of its tokenizer, and how
/// many tokens of a prompt it takes.
pub(super) fn described(directory: &Path) -> Result<Vec<(&'static str, PathBuf, usize)>> {
    let mut found = Vec::new();
    for (suffix, name) in [("", "CLIP"), ("_2", "the second CLIP")] {
        let encoder = format!("text_encoder{suffix}");
        if has_component(directory, &encoder)? {
            let config = directory.join(encoder).join("config.json");
            let text: clip::TextConfig = read_json(&config)?;
            let folder = directory.join(format!("tokenizer{suffix}"));
            found.push((name, folder, text.max_position_embeddings));
        }
    }
    if has_component(directory, "text_encoder_3")? {
        found.push(("T5", directory.join("tokenizer_3"), T5_TOKENS));
    }
    Ok(found)
}

struct ClipText {
    model: clip::TextModel,
    tokenizer: Padded,
}

struct T5Text {
    model: t5::T5Encoder,
    tokenizer: Padded,
}

/// Every text encoder that a checkpoint has.
pub(super) struct TextEncoders {
    clips: Vec<ClipText>,
    t5: Option<T5Text>,
    joint_attention_dim: usize,
    pooled_projection_dim: usize,
    dtype: DType,
    device: Device,
}

impl TextEncoders {
    /// Opens `text_encoder`, `text_encoder_2` and `text_encoder_3` of `directory`, as far as `model_index.json` names
    /// them, in the precision of the transformer. The weights that were opened are added to `opened`, for their faults to be reported together.
    pub(super) fn open(
        directory: &Path,
        config: &super::Config,
        transformer: &Weights,
        opened: &mut Vec<Weights>,
    ) -> Result<Self> {
        let (precision, device) = (transformer.precision(), transformer.device());
        let mut clips = Vec::new();
        for suffix in ["", "_2"] {
            let name = format!("text_encoder{suffix}");
            if has_component(directory, &name)? {
                let folder = directory.join(name);
                let text: clip::TextConfig = read_json(&folder.join("config.json"))?;
                let weights = checkpoint_files::open(&folder, "model", precision, device)?;
                let model = clip::TextModel::new(&text, &weights)?;
                opened.push(weights);
                let folder = directory.join(format!("tokenizer{suffix}"));
                let tokenizer =
                    Padded::open(&folder, text.max_position_embeddings, "<|endoftext|>")?;
                clips.push(ClipText { model, tokenizer });
            }
        }
        let t5 = if has_component(directory, "text_encoder_3")? {
            let folder = directory.join("text_encoder_3");
            let text: t5::Config = read_json(&folder.join("config.json"))?;
            let weights = checkpoint_files::open(&folder, "model", precision, device)?;
            let model = t5::T5Encoder::new(&text, &weights)?;
            opened.push(weights);
            let tokenizer = Padded::open(&directory.join("tokenizer_3"), T5_TOKENS, "<pad>")?;
            Some(T5Text { model, tokenizer })
        } else {
            None
        };
        if clips.is_empty() {
            return Err(Error::Checkpoint {
                path: directory.join("model_index.json"),
                faults: vec!["names no text_encoder".to_string()],
            });
        }
        Ok(Self {
            clips,
            t5,
            joint_attention_dim: config.joint_attention_dim,
            pooled_projection_dim: config.pooled_projection_dim,
            dtype: transformer.dtype(),
            device: device.clone(),
        })
    }

    /// One row for each prompt; a prompt's row depends on nothing else.
    pub(super) fn encode(&self, prompts: &[String]) -> Result<Conditioning> {
        let rows = prompts
            .iter()
            .map(|prompt| self.encode_one(prompt))
            .collect::<Result<Vec<_>>>()?;
        Conditioning::cat(&rows.iter().collect::<Vec<_>>())
    }

    fn encode_one(&self, prompt: &str) -> Result<Conditioning> {
        let mut states = Vec::with_capacity(self.clips.len());
        let mut pooled = Vec::with_capacity(self.clips.len());
        for clip in &self.clips {
            let output = clip
                .model
                .forward(&clip.tokenizer.ids(prompt, &self.device)?)?;
            states.push(output.penultimate);
            pooled.push(output.pooled);
        }
        let context = Tensor::cat(&states, 2)?;
        let pooled = Tensor::cat(&pooled, 1)?;
        let (width, joint) = (context.dim(2)?, self.joint_attention_dim);
        if width > joint || pooled.dim(1)? != self.pooled_projection_dim {
            return Err(Error::invalid(
                format!(
                    "text encoders of widths {width} and {} (pooled) for a transformer that takes {joint} and {}",
                    pooled.dim(1)?,
                    self.pooled_projection_dim
                ),
                "use the text encoders that the transformer was trained with",
            ));
        }
        let context = context.pad_with_zeros(2, 0, joint - width)?;
        let long = match &self.t5 {
            Some(t5) => {
                let ids = t5.tokenizer.ids(prompt, &self.device)?;
                // the reference hands T5 no mask: padding is attended to
                Some(t5.model.forward(&ids, &ids.ones_like()?)?)
            }
            // a transformer wider than its CLIPs was trained with T5 and takes zeros in its place
            None if width < joint => Some(Tensor::zeros(
                (1, T5_TOKENS, joint),
                self.dtype,
                &self.device,
            )?),
            None => None,
        };
        let context = match long {
            Some(long) => Tensor::cat(&[context, long], 1)?,
            None => context,
        };
        Ok(Conditioning { context, pooled })
    }
}
