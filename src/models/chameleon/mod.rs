//! Chameleon (Chameleon team 2024, arXiv 2405.09818) as Lumina-mGPT (Liu et al. 2024, arXiv 2408.02657) trains it to
//! draw: one transformer over text and image tokens, and a VQGAN. Reference code:
//! <https://github.com/Alpha-VLLM/Lumina-mGPT> and transformers' `models/chameleon`.

mod backbone;
mod cache;
mod config;
pub mod files;
mod generate;
pub mod grammar;
mod learner;
mod loss;
pub mod vq;
mod vq_config;

pub use backbone::{Backbone, Dropout};
pub use cache::Cache;
pub use config::Config;
pub use grammar::{Format, Vocabulary};
pub use learner::{Lumina, VqTokenizer, format, tokenizer_files};
pub use loss::Sequence;
pub use vq::VqGan;
