//! The text encoders of FLUX.1 as `FluxPipeline.encode_prompt` combines them: T5's states of every token, and CLIP-L's
//! pooled state of the whole text.

use std::path::PathBuf;

use candle_core::Device;

use crate::Result;
use crate::models::checkpoint_files::Layout;
use crate::models::latent_diffusion::Conditioning;
use crate::models::latent_diffusion::text::{ClipText, PaddedTokenizer, described_clip, t5_tokens};
use crate::models::t5;
use crate::nn::Weights;

/// Tokens of a prompt for T5 where its tokenizer does not allow fewer: the pipeline's default.
const T5_TOKENS: usize = 512;

/// See [`super::text_encoders`].
pub(super) fn described(layout: &Layout) -> Result<Vec<(&'static str, PathBuf, usize)>> {
    let folder = layout.tokenizer("tokenizer_2")?;
    let length = t5_tokens(&folder, T5_TOKENS)?;
    Ok(vec![
        described_clip(layout, "", "CLIP")?,
        ("T5", folder, length),
    ])
}

/// CLIP and T5.
pub struct TextEncoders {
    clip: ClipText,
    t5: t5::T5Encoder,
    tokenizer: PaddedTokenizer,
    length: usize,
    device: Device,
}

impl TextEncoders {
    /// Opens `text_encoder` (CLIP) and `text_encoder_2` (T5) in the precision of the transformer. The
    /// weights that were opened are added to `opened`, for their faults to be reported together.
    pub(super) fn open(
        layout: &Layout,
        transformer: &Weights,
        opened: &mut Vec<Weights>,
    ) -> Result<Self> {
        let clip = ClipText::open(layout, "", transformer, opened)?;
        let config: t5::Config = layout.config("text_encoder_2")?;
        let files = layout.weights("text_encoder_2")?;
        let weights = files.open(transformer.precision(), transformer.device())?;
        let t5 = t5::T5Encoder::new(&config, &weights)?;
        opened.push(weights);
        let folder = layout.tokenizer("tokenizer_2")?;
        Ok(Self {
            clip,
            t5,
            length: t5_tokens(&folder, T5_TOKENS)?,
            tokenizer: PaddedTokenizer::open(&folder, T5_TOKENS, "<pad>")?,
            device: transformer.device().clone(),
        })
    }

    /// One row for each prompt, of `max_sequence_length` tokens or the pipeline's default; a prompt's row depends on
    /// nothing else.
    pub(super) fn encode(
        &self,
        prompts: &[String],
        max_sequence_length: Option<usize>,
    ) -> Result<Conditioning> {
        let length = max_sequence_length.unwrap_or(self.length);
        let rows = prompts
            .iter()
            .map(|prompt| {
                let ids = self.tokenizer.ids_of(prompt, length, &self.device)?;
                Ok(Conditioning {
                    // the reference hands T5 no mask: padding is attended to
                    context: self.t5.forward(&ids, &ids.ones_like()?)?,
                    pooled: self.clip.encode(prompt)?.pooled,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        Conditioning::cat(&rows.iter().collect::<Vec<_>>())
    }
}
