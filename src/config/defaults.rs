//! Defaults that depend on the family of a model: the paper's Table 8, and the published training and sampling code
//! where the paper is silent.

use super::models::Family;
use super::resolved::{
    AutoregressiveSampling, DiffusionSampling, FlowMatching, Optimizer, WeightingScheme,
};

/// Table 8, with AdamW's numbers from diffusers' DreamBooth scripts, LlamaGen's and Lumina-mGPT's training code.
pub(super) struct TrainingDefaults {
    pub steps: usize,
    pub batch_size: usize,
    pub optimizer: Optimizer,
    /// AdamW's.
    pub learning_rate: f64,
    pub adam_beta2: f64,
    pub weight_decay: f64,
    pub max_grad_norm: f64,
    pub dropout: f64,
}

pub(super) const CHECKPOINT_EVERY: usize = 100;
pub(super) const RANK: usize = 16;

/// Table 8's rate for Prodigy, which finds its scale itself. Muon's steps are scaled to share AdamW's.
pub(super) fn learning_rate(family: Family, optimizer: Optimizer) -> f64 {
    match optimizer {
        Optimizer::Prodigy => 1.0,
        Optimizer::Adamw | Optimizer::Muon => training(family).learning_rate,
    }
}

pub(super) fn training(family: Family) -> TrainingDefaults {
    let diffusion = |optimizer, learning_rate| TrainingDefaults {
        steps: 500,
        batch_size: 4,
        optimizer,
        learning_rate,
        adam_beta2: 0.999,
        weight_decay: 1e-4,
        max_grad_norm: 1.0,
        dropout: 0.0,
    };
    match family {
        // evaluators do not train; a pipeline that makes one learn is refused where its role is read
        Family::Sdxl | Family::Clip | Family::Dino => diffusion(Optimizer::Adamw, 1e-4),
        Family::Sd3 => diffusion(Optimizer::Adamw, 4e-4),
        Family::Flux => diffusion(Optimizer::Prodigy, 1e-4),
        Family::LlamaGen => TrainingDefaults {
            steps: 1250,
            batch_size: 8,
            optimizer: Optimizer::Adamw,
            learning_rate: 1e-4,
            adam_beta2: 0.95,
            weight_decay: 0.05,
            max_grad_norm: 1.0,
            dropout: 0.1,
        },
        Family::Lumina => TrainingDefaults {
            steps: 2500,
            batch_size: 4,
            optimizer: Optimizer::Adamw,
            learning_rate: 2e-5,
            adam_beta2: 0.95,
            weight_decay: 0.1,
            max_grad_norm: 4.0,
            dropout: 0.05,
        },
    }
}

/// The layers that diffusers' DreamBooth LoRA scripts adapt; all linear layers of the blocks for AR backbones.
pub(super) fn targets(family: Family) -> Vec<String> {
    let names: &[&str] = match family {
        Family::Sdxl => &["to_k", "to_q", "to_v", "to_out.0"],
        Family::Sd3 => &[
            "attn.to_q",
            "attn.to_k",
            "attn.to_v",
            "attn.to_out.0",
            "attn.add_q_proj",
            "attn.add_k_proj",
            "attn.add_v_proj",
            "attn.to_add_out",
        ],
        Family::Flux => &[
            "attn.to_q",
            "attn.to_k",
            "attn.to_v",
            "attn.to_out.0",
            "attn.add_q_proj",
            "attn.add_k_proj",
            "attn.add_v_proj",
            "attn.to_add_out",
            "ff.net.0.proj",
            "ff.net.2",
            "ff_context.net.0.proj",
            "ff_context.net.2",
        ],
        Family::LlamaGen => &["wqkv", "wo", "w1", "w2", "w3"],
        Family::Lumina => &[
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ],
        Family::Clip | Family::Dino => &[],
    };
    names.iter().map(|name| name.to_string()).collect()
}

/// The defaults of diffusers' pipelines.
pub(super) fn diffusion_sampling(family: Family) -> DiffusionSampling {
    let (num_inference_steps, guidance_scale) = match family {
        Family::Sdxl => (50, 5.0),
        Family::Flux => (28, 3.5),
        _ => (28, 7.0),
    };
    DiffusionSampling {
        num_inference_steps,
        guidance_scale,
        negative_prompt: String::new(),
        guidance_start: None,
        guidance_stop: None,
    }
}

/// What diffusers' DreamBooth scripts train; `None` where a model is not one of flow matching.
pub(super) fn flow_matching(family: Family) -> Option<FlowMatching> {
    match family {
        Family::Sd3 => Some(weighted(WeightingScheme::LogitNormal)),
        Family::Flux => Some(weighted(WeightingScheme::None)),
        Family::Sdxl | Family::LlamaGen | Family::Lumina | Family::Clip | Family::Dino => None,
    }
}

/// A scheme with diffusers' numbers, of which each has its own.
pub(super) fn weighted(weighting_scheme: WeightingScheme) -> FlowMatching {
    let logit_normal = weighting_scheme == WeightingScheme::LogitNormal;
    FlowMatching {
        weighting_scheme,
        logit_mean: logit_normal.then_some(0.0),
        logit_std: logit_normal.then_some(1.0),
        mode_scale: (weighting_scheme == WeightingScheme::Mode).then_some(1.29),
    }
}

/// The defaults of LlamaGen's `sample_t2i.py` and of Lumina-mGPT's README.
pub(super) fn autoregressive_sampling(family: Family) -> AutoregressiveSampling {
    let (guidance_scale, top_k) = match family {
        Family::Lumina => (4.0, 2000),
        _ => (7.5, 1000),
    };
    AutoregressiveSampling {
        guidance_scale,
        top_k,
        top_p: 1.0,
        temperature: 1.0,
        guidance_interval: None,
    }
}
