//! LlamaGen (Sun et al. 2024, arXiv 2406.06525): text to image tokens with a GPT, and its VQ image tokenizer.
//! Reference code: <https://github.com/FoundationVision/LlamaGen>.

mod config;
pub mod generate;
pub mod gpt;
mod learner;
pub mod vq;

pub use generate::Sampling;
pub use gpt::Gpt;
pub use learner::{ImageTokenizer, LlamaGen, tokenizer_dir};
pub use vq::VqModel;
