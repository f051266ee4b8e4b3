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

use super::family::{Architecture, Backbone, KnownModel, LearnerParts, Rest, TokenizerParts};
use super::reading::TextReader;
use crate::config::{Family, FamilySettings, Kind, Optimizer, SamplingDefaults, TrainingDefaults};
use crate::hub::catalogue;

/// LlamaGen, text to image, with the numbers of its training code and of `sample_t2i.py`.
pub const FAMILY: Family = Family::new(&FamilySettings {
    name: "LlamaGen",
    kind: Kind::Autoregressive,
    training: TrainingDefaults {
        steps: 1250,
        batch_size: 8,
        optimizer: Optimizer::Adamw,
        learning_rate: 1e-4,
        adam_beta2: 0.95,
        weight_decay: 0.05,
        decay_vectors: false,
        max_grad_norm: 1.0,
        dropout: 0.1,
        has_snr: false,
        weighting_scheme: None,
    },
    targets: &["wqkv", "wo", "w1", "w2", "w3"],
    sampling: SamplingDefaults::Autoregressive {
        guidance_scale: 7.5,
        top_k: 1000,
        guidance_interval: true,
    },
});

/// LlamaGen as it is published, and in proxytune's layout.
pub static ARCHITECTURE: Architecture = Architecture {
    family: FAMILY,
    recognises: |layout| {
        layout.has("cls_token_num")
            // It is published without a config: `t2i_XL_stage1_256.pt` and such.
            || layout.has_bare_file(|name| name.starts_with("t2i_") && name.ends_with(".pt"))
    },
    models: &[
        KnownModel {
            name: "nano-llamagen",
            resolution: Some(32),
            directory: "datasets/nano/checkpoints/llamagen",
            hub: None,
            files: &[],
        },
        KnownModel {
            name: "llamagen-xl",
            resolution: Some(512),
            directory: "datasets/checkpoints/llamagen-xl",
            hub: Some(&catalogue::LLAMAGEN_XL),
            files: &[
                "config.json",
                "model.safetensors",
                "vq/config.json",
                "vq/model.safetensors",
                "t5/config.json",
            ],
        },
        KnownModel {
            name: "llamagen-xl-256",
            resolution: Some(256),
            directory: "datasets/checkpoints/llamagen-xl-256",
            hub: Some(&catalogue::LLAMAGEN_XL_256),
            files: &[
                "config.json",
                "model.safetensors",
                "vq/config.json",
                "vq/model.safetensors",
                "t5/config.json",
            ],
        },
    ],
    readers: |dir, resolution, _| {
        let (folder, length) = caption_encoder(dir, resolution)?;
        TextReader::of_encoders([("T5", folder, length)])
    },
    learner: Some(LearnerParts {
        open: |options| Ok(Box::new(LlamaGen::open(options)?)),
        resolution,
        backbone: |dir, resolution| {
            let parts = Files::find(dir, resolution)?;
            let tokenizer = parts.tokenizer().to_path_buf();
            Ok(Backbone {
                folder: "",
                stem: "model",
                files: parts.backbone()?,
                rest: Rest::Parts(vec![(tokenizer, "vq"), (parts.t5().to_path_buf(), "t5")]),
            })
        },
        config: |dir, resolution| Files::find(dir, resolution)?.gpt_config_text().map(Some),
        tokenizer: Some(TokenizerParts {
            open: |dir, side, device| Ok(Box::new(VqTokenizer::open(dir, side, device)?)),
            files: tokenizer_files,
        }),
    }),
};
