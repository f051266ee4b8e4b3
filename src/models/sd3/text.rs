//! The text encoders of Stable Diffusion 3 as `StableDiffusion3Pipeline.encode_prompt` combines them.

use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};

use super::Conditioning;
use crate::models::checkpoint_files::Layout;
use crate::models::latent_diffusion::text::{
    ClipText, PaddedTokenizer, described_clips, t5_tokens,
};
use crate::models::t5;
use crate::nn::Weights;
use crate::{Error, Result};

/// Tokens of a prompt for T5 where its tokenizer does not allow fewer: the pipeline's default, and what stands in zeros
/// where T5 is left out.
const T5_TOKENS: usize = 256;

/// Every text encoder that a checkpoint has: what it is called, the folder of its tokenizer, and how
/// many tokens of a prompt it takes.
pub(super) fn described(layout: &Layout) -> Result<Vec<(&'static str, PathBuf, usize)>> {
    let mut found = described_clips(layout)?;
    if layout.has("text_encoder_3")? {
        let folder = layout.tokenizer("tokenizer_3")?;
        let length = t5_tokens(&folder, T5_TOKENS)?;
        found.push(("T5", folder, length));
    }
    Ok(found)
}

struct T5Text {
    model: t5::T5Encoder,
    tokenizer: PaddedTokenizer,
    length: usize,
}

/// Every text encoder that a checkpoint has.
pub struct TextEncoders {
    clips: Vec<ClipText>,
    t5: Option<T5Text>,
    joint_attention_dim: usize,
    pooled_projection_dim: usize,
    dtype: DType,
    device: Device,
}

impl TextEncoders {
    /// Opens `text_encoder`, `text_encoder_2` and `text_encoder_3`, as far as the model has them, in the precision of the
    /// transformer. The weights that were opened are added to `opened`, for their faults to be reported together.
    pub(super) fn open(
        layout: &Layout,
        config: &super::Config,
        transformer: &Weights,
        opened: &mut Vec<Weights>,
    ) -> Result<Self> {
        let (precision, device) = (transformer.precision(), transformer.device());
        let clips = ClipText::all(layout, transformer, opened)?;
        let t5 = if layout.has("text_encoder_3")? {
            let text: t5::Config = layout.config("text_encoder_3")?;
            let weights = layout.weights("text_encoder_3")?.open(precision, device)?;
            let model = t5::T5Encoder::new(&text, &weights)?;
            opened.push(weights);
            let folder = layout.tokenizer("tokenizer_3")?;
            Some(T5Text {
                model,
                length: t5_tokens(&folder, T5_TOKENS)?,
                tokenizer: PaddedTokenizer::open(&folder, T5_TOKENS, "<pad>")?,
            })
        } else {
            None
        };
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
    /// `t5_tokens` of it are T5's; where nothing is said, [`T5_TOKENS`] or what its tokenizer allows.
    pub(super) fn encode(
        &self,
        prompts: &[String],
        t5_tokens: Option<usize>,
    ) -> Result<Conditioning> {
        let own = self.t5.as_ref().map_or(T5_TOKENS, |t5| t5.length);
        let t5_tokens = t5_tokens.unwrap_or(own);
        let rows = prompts
            .iter()
            .map(|prompt| self.encode_one(prompt, t5_tokens))
            .collect::<Result<Vec<_>>>()?;
        Conditioning::cat(&rows.iter().collect::<Vec<_>>())
    }

    fn encode_one(&self, prompt: &str, t5_tokens: usize) -> Result<Conditioning> {
        let mut states = Vec::with_capacity(self.clips.len());
        let mut pooled = Vec::with_capacity(self.clips.len());
        for clip in &self.clips {
            let output = clip.encode(prompt)?;
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
                let ids = t5.tokenizer.ids_of(prompt, t5_tokens, &self.device)?;
                // the reference hands T5 no mask: padding is attended to
                Some(t5.model.forward(&ids, &ids.ones_like()?)?)
            }
            // a transformer wider than its CLIPs was trained with T5 and takes zeros in its place
            None if width < joint => Some(Tensor::zeros(
                (1, t5_tokens, joint),
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
