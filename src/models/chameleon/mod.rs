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

use super::family::{Architecture, KnownModel, LearnerParts, TokenizerParts};
use super::reading::TextReader;
use crate::config::{Family, FamilySettings, Kind, Optimizer, SamplingDefaults, TrainingDefaults};
use crate::hub::catalogue;

/// Lumina-mGPT, with the numbers of its training code and of its README.
pub const FAMILY: Family = Family::new(&FamilySettings {
    name: "Lumina-mGPT",
    kind: Kind::Autoregressive,
    training: TrainingDefaults {
        steps: 2500,
        batch_size: 4,
        optimizer: Optimizer::Adamw,
        learning_rate: 2e-5,
        adam_beta2: 0.95,
        weight_decay: 0.1,
        decay_vectors: true,
        max_grad_norm: 4.0,
        dropout: 0.05,
        has_snr: false,
        weighting_scheme: None,
    },
    targets: &[
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ],
    sampling: SamplingDefaults::Autoregressive {
        guidance_scale: 4.0,
        top_k: 2000,
        guidance_interval: false,
    },
});

/// Lumina-mGPT in transformers' layout of Chameleon.
pub static ARCHITECTURE: Architecture = Architecture {
    family: FAMILY,
    recognises: |layout| layout.is_model_type("chameleon"),
    models: &[
        KnownModel {
            name: "nano-lumina",
            resolution: Some(32),
            directory: "datasets/nano/checkpoints/lumina",
            hub: None,
            files: &["config.json", "model.safetensors", "tokenizer/vqgan.yaml"],
        },
        KnownModel {
            name: "lumina-mgpt-7b-768",
            resolution: Some(768),
            directory: "datasets/checkpoints/lumina-mgpt-7b-768",
            hub: Some(&catalogue::LUMINA_MGPT_7B_768),
            files: &[],
        },
    ],
    readers: |dir, resolution, learns| TextReader::of_requests(format(dir, resolution)?, learns),
    learner: Some(LearnerParts {
        open: |options| Ok(Box::new(Lumina::open(options)?)),
        resolution: |dir, asked| Ok(format(dir, asked)?.1.side() as u32),
        backbone: |dir, _| super::family::Backbone::in_folder(dir, "", "model"),
        config: |_, _| Ok(None),
        tokenizer: Some(TokenizerParts {
            open: |dir, side, device| Ok(Box::new(VqTokenizer::open(dir, side, device)?)),
            files: tokenizer_files,
        }),
    }),
};
