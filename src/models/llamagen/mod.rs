//! LlamaGen (Sun et al. 2024, arXiv 2406.06525): text to image tokens with a GPT, and its VQ image tokenizer.
//! Reference code: <https://github.com/FoundationVision/LlamaGen>.

mod config;
mod files;
pub mod generate;
pub mod gpt;
mod learner;
pub mod vq;

pub use files::Files;
pub use generate::Sampling;
pub use gpt::Gpt;
pub use learner::{LlamaGen, VqTokenizer, caption_encoder, resolution, tokenizer_files};
pub use vq::VqModel;
