//! The text encoders of Stable Diffusion XL as `StableDiffusionXLPipeline.encode_prompt` combines them.

use candle_core::Tensor;
use serde::Deserialize;

use crate::models::checkpoint_files::Layout;
use crate::models::latent_diffusion::Conditioning;
use crate::models::latent_diffusion::text::ClipText;
use crate::nn::Weights;
use crate::{Error, Result};

/// What `model_index.json` says beside the components.
#[derive(Deserialize)]
#[serde(default)]
struct Index {
    /// Whether zeros stand for no prompt, not what the encoders say of an empty one.
    force_zeros_for_empty_prompt: bool,
}

impl Default for Index {
    fn default() -> Self {
        Self {
            force_zeros_for_empty_prompt: true,
        }
    }
}

/// Both CLIPs.
pub struct TextEncoders {
    clips: Vec<ClipText>,
    zeros_for_empty_prompt: bool,
}

impl TextEncoders {
    /// Opens those that the model has, in the precision of the U-Net. The weights that were opened are added to `opened`,
    /// for their faults to be reported together.
    pub(super) fn open(layout: &Layout, unet: &Weights, opened: &mut Vec<Weights>) -> Result<Self> {
        let index: Index = layout.index()?;
        Ok(Self {
            clips: ClipText::all(layout, unet, opened)?,
            zeros_for_empty_prompt: index.force_zeros_for_empty_prompt,
        })
    }

    /// One row for each prompt: the states entering the last layer of both encoders side by side, and what the second
    /// says of the whole text.
    pub(super) fn encode(&self, prompts: &[String]) -> Result<Conditioning> {
        let rows = prompts
            .iter()
            .map(|prompt| self.encode_one(prompt))
            .collect::<Result<Vec<_>>>()?;
        Conditioning::cat(&rows.iter().collect::<Vec<_>>())
    }

    /// What stands for no prompt.
    pub(super) fn unconditional(&self) -> Result<Conditioning> {
        let empty = self.encode_one("")?;
        if !self.zeros_for_empty_prompt {
            return Ok(empty);
        }
        Ok(Conditioning {
            context: empty.context.zeros_like()?,
            pooled: empty.pooled.zeros_like()?,
        })
    }

    fn encode_one(&self, prompt: &str) -> Result<Conditioning> {
        let (mut states, mut pooled) = (Vec::new(), None);
        for clip in &self.clips {
            let output = clip.encode(prompt)?;
            states.push(output.penultimate);
            pooled = Some(output.pooled);
        }
        let pooled = pooled.ok_or_else(|| Error::Invalid {
            what: "a model without text encoders".into(),
            hint: None,
        })?;
        Ok(Conditioning {
            context: Tensor::cat(&states, 2)?,
            pooled,
        })
    }
}
