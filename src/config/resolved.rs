//! What a pipeline file means: every field has a value. This is what runs, is kept in the run directory and goes
//! into keys; [`Resolved::to_toml`] prints it as a pipeline file that means the same.

use std::path::PathBuf;

use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize, Serializer};

pub use super::choices::*;
use super::family::Family;
use super::prompts::PromptList;
use crate::{Error, Result};

/// A whole pipeline with every value decided.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Resolved {
    /// All randomness of a run comes from this number. 0 to 2⁶³−1, default 0.
    pub seed: u64,
    /// Threads for computing, at least 1. Default: all cores of the machine on which the file was resolved.
    pub threads: usize,
    /// The subjects in the order of the file; at least one.
    #[serde(rename = "subject", serialize_with = "subjects_by_name")]
    pub subjects: Vec<Subject>,
    /// Present exactly when the student learns from proxies.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub supervisor: Option<Supervisor>,
    /// Present exactly when the student learns from proxies, or from a custom source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxies: Option<Proxies>,
    pub student: Student,
    pub direct: Direct,
    pub evaluation: Evaluation,
    pub channels: Channels,
}

/// `[subject.NAME]`: what is to be learned.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Subject {
    /// Letters, digits, `_`, `-` and `.`; seeds of proxies depend on it.
    #[serde(skip)]
    pub name: String,
    /// Folder with the reference images; relative paths start at the working directory. Required.
    pub images: PathBuf,
    /// What kind of thing it is, as a prompt says it, such as "dog". Required.
    pub class: String,
    /// The rare word that stands for this subject in prompts. Default: the first of
    /// [`RARE_TOKENS`](super::prompts::RARE_TOKENS) that no other subject has.
    pub token: String,
    /// The student learns only this many of the subject's proxies, at least 1, so that it does not forget what the
    /// adapter it starts from knows: other ones for each such adapter. Default: all of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replay: Option<usize>,
}

/// `[supervisor]`: the diffusion model that learns each subject and makes the proxies.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Supervisor {
    /// A known name or a directory. Required.
    pub model: String,
    /// Decided by `model`.
    #[serde(skip)]
    pub family: Family,
    /// Where it computes. Default "cpu".
    pub device: Device,
    /// How its frozen weights are kept. Default "auto".
    pub dtype: Dtype,
    /// Side of the square training images and of the proxies in pixels. Default: known by the model's name, else
    /// (`None`) the checkpoint's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resolution: Option<usize>,
    /// File or folder of an adapter that somebody has trained, in diffusers', kohya's, ComfyUI's or peft's layout: nothing is
    /// learnt, and it makes the proxies of every subject, which it should know by token and class. What else is said of
    /// learning has no effect then. Default: none, each subject is learnt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<PathBuf>,
    /// Digest of the bytes of `adapter`, which keys have in place of the path. Default: read from it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter_digest: Option<String>,
    /// Caption of the references that have none of their own (in `metadata.jsonl`, or a .txt of the photo's name, beside
    /// them); `{token}` and `{class}` are replaced in all. Default "a {token} {class}".
    pub prompt: String,
    /// Whether the middle of each photo is learnt, or else a square at random, chosen once. Default true.
    pub center_crop: bool,
    /// Whether each photo is flipped left to right with probability 1/2, decided once. Default false.
    pub random_flip: bool,
    #[serde(flatten)]
    pub training: Training,
    /// DreamBooth's class images beside the references (Ruiz et al. 2023, section 3.2). Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prior_preservation: Option<PriorPreservation>,
}

impl Supervisor {
    /// Optimizer steps that a supervisor of this pipeline takes; none where its adapter is given.
    pub fn steps(&self) -> usize {
        match self.adapter {
            Some(_) => 0,
            None => self.training.steps,
        }
    }
}

/// `[supervisor.prior_preservation]`: the table's presence turns it on.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PriorPreservation {
    /// Images per subject that the untouched model makes. At least 1, default 100.
    pub class_images: usize,
    /// Weight of their loss beside the references' loss. Above 0, default 1.
    pub weight: f64,
    /// Prompt and caption of the class images; `{class}` is replaced. Default "a {class}".
    pub prompt: String,
}

/// How a backbone learns; part of `[supervisor]`, `[student]` and `[direct]`. Defaults are the paper's Table 8 by
/// model family, and the reference training code's where the paper is silent.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Training {
    /// A LoRA adapter or all weights. Default "lora".
    pub tuning: Tuning,
    /// Optimizer steps, at least 1. Default: diffusion 500, LlamaGen 1250, Lumina 2500.
    pub steps: usize,
    /// Examples whose gradients are computed together, at least 1. Default: LlamaGen 8, others 4.
    pub batch_size: usize,
    /// Batches per optimizer step, which follows the mean of their gradients; at least 1. Default 1.
    pub gradient_accumulation_steps: usize,
    /// Peak learning rate, above 0. Default: 1 for Prodigy, which multiplies it with the rate that it finds; else SDXL,
    /// FLUX and LlamaGen 1e-4, SD3 4e-4, Lumina 2e-5.
    pub learning_rate: f64,
    /// Default: FLUX "prodigy", others "adamw".
    pub optimizer: Optimizer,
    /// Decay of the first moment, 0 ≤ β < 1. Default 0.9.
    pub adam_beta1: f64,
    /// Decay of the second moment, 0 ≤ β < 1. Default: diffusion 0.999, AR 0.95.
    pub adam_beta2: f64,
    /// Added to the root of the second moment, above 0. Default 1e-8.
    pub adam_epsilon: f64,
    /// Decoupled weight decay, at least 0. Default: diffusion 1e-4, LlamaGen 0.05, Lumina 0.1.
    pub weight_decay: f64,
    /// Whether norms and biases decay too, where all weights are trained. Decided by the family: diffusers and
    /// Lumina-mGPT give AdamW all weights alike, LlamaGen only matrices to decay.
    #[serde(skip)]
    pub decay_vectors: bool,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub prodigy: Option<Prodigy>,
    /// SDXL alone: the loss of a noise level weighs `min(SNR, snr_gamma) / SNR` (Hang et al. 2023, arXiv 2303.09556), so
    /// that levels with little noise do not count for too much. Above 0; 5 is usual. Default: all levels weigh alike.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snr_gamma: Option<f64>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub flow_matching: Option<FlowMatching>,
    /// The gradient's norm is clipped to this; above 0. Default 1, Lumina 4.
    pub max_grad_norm: f64,
    /// Default "constant".
    pub lr_scheduler: LrScheduler,
    /// Steps of linear rise at the start, the first of which has the rate 0; 0 to `steps`. Default 0.
    pub warmup_steps: usize,
    /// LoRA rank, at least 1. Default 16.
    pub rank: usize,
    /// The adapter is scaled by `alpha / rank`; above 0. Default: `rank`.
    pub alpha: f64,
    /// Ends of the names of the layers that carry the adapter. Default: by family, as published training code has it.
    pub targets: Vec<String>,
    /// Steps between checkpoints from which a stopped run resumes, at least 1. Does not affect the result. Default 100.
    pub checkpoint_every: usize,
    /// What is kept for the backward pass. Does not affect the result. Default "auto".
    pub memory: Memory,
}

impl Training {
    /// Examples that one optimizer step learns from.
    pub fn examples_per_step(&self) -> usize {
        self.batch_size * self.gradient_accumulation_steps
    }
}

/// What Prodigy is told beyond AdamW's numbers: more fields of `[supervisor]`, `[student]` and `[direct]`, where `optimizer`
/// is "prodigy". Defaults are the arguments of diffusers' DreamBooth scripts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Prodigy {
    /// Decay of the sums that the rate is estimated from, 0 ≤ β < 1. Default: √`adam_beta2`.
    #[serde(rename = "prodigy_beta3", skip_serializing_if = "Option::is_none")]
    pub beta3: Option<f64>,
    /// The estimate of the rate before the first step, above 0. Default 1e-6.
    #[serde(rename = "prodigy_d0")]
    pub d0: f64,
    /// The estimate is multiplied by this, above 0. Default 1.
    #[serde(rename = "prodigy_d_coef")]
    pub d_coef: f64,
    /// The estimate grows at most by this factor per step, at least 1. Default: without limit.
    #[serde(rename = "prodigy_growth_rate")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub growth_rate: Option<f64>,
    /// Whether weights decay beside the step, as AdamW's, and not through the gradient. Default true.
    #[serde(rename = "prodigy_decouple")]
    pub decouple: bool,
    /// Whether moments are corrected for having started at 0, as AdamW's are. Default true.
    #[serde(rename = "prodigy_use_bias_correction")]
    pub use_bias_correction: bool,
    /// Whether the learning rate stays out of the estimate's denominator, so that a warm-up does not inflate it.
    /// Default true.
    #[serde(rename = "prodigy_safeguard_warmup")]
    pub safeguard_warmup: bool,
}

impl Default for Prodigy {
    fn default() -> Self {
        Self {
            beta3: None,
            d0: 1e-6,
            d_coef: 1.0,
            growth_rate: None,
            decouple: true,
            use_bias_correction: true,
            safeguard_warmup: true,
        }
    }
}

/// Which noise levels SD3 and FLUX learn, and how much each weighs: more fields of `[supervisor]`, `[student]` and
/// `[direct]` for these models, with the names and formulas of diffusers' DreamBooth scripts (Esser et al. 2024, arXiv
/// 2403.03206, section 3.1).
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct FlowMatching {
    /// "logit_normal" and "mode" draw levels by these densities, "sigma_sqrt" and "cosmap" evenly and weigh their losses;
    /// "none" does neither. Default: SD3 "logit_normal", FLUX "none".
    pub weighting_scheme: WeightingScheme,
    /// With "logit_normal" alone: mean of the normal distribution whose sigmoid is drawn; above 0, levels with little noise
    /// are learnt more often. Default 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logit_mean: Option<f64>,
    /// With "logit_normal" alone: its standard deviation, above 0. Default 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logit_std: Option<f64>,
    /// With "mode" alone: how far levels in the middle (above 0) or at the ends (below 0) are preferred; -1 to 1.75.
    /// Default 1.29.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode_scale: Option<f64>,
}

/// `[proxies]`: the images the supervisors make, or a custom source, which has no settings of sampling.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Proxies {
    /// Proxies per subject, at least 1. Default 100.
    pub count: usize,
    /// Proxies generated, tokenized and scored together, at least 1. Default 4.
    pub batch_size: usize,
    /// Prompt templates, taken in turn. Default ["a {token} {class}"].
    pub prompts: Vec<String>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub sampling: Option<DiffusionSampling>,
}

/// How a diffusion model samples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiffusionSampling {
    /// Denoising steps, at least 1. Default: 28, SDXL 50.
    pub num_inference_steps: usize,
    /// Classifier-free guidance, at least 1, which is none. Default: SD3 7, SDXL 5, FLUX 3.5.
    pub guidance_scale: f64,
    /// What guidance leads away from. Default "".
    pub negative_prompt: String,
    /// Guidance begins after this share of the steps (Kynkäänniemi et al. 2024, arXiv 2404.07724); 0 to 1. FLUX has none.
    /// Default 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guidance_start: Option<f64>,
    /// Guidance ends after this share of the steps, above `guidance_start`; what is not guided costs half. FLUX has none.
    /// Default 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guidance_stop: Option<f64>,
}

/// How an autoregressive model samples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AutoregressiveSampling {
    /// Classifier-free guidance on logits, at least 1, which is none. Default: LlamaGen 7.5, Lumina 4.
    pub guidance_scale: f64,
    /// Only this many most likely tokens may be drawn; 0 is all. Default: LlamaGen 1000, Lumina 2000.
    pub top_k: usize,
    /// Only the most likely tokens that together reach this probability may be drawn; 0 < p ≤ 1. Default 1.
    pub top_p: f64,
    /// Logits are divided by this; 0 takes the likeliest token. At least 0, default 1.
    pub temperature: f64,
    /// LlamaGen alone: guidance ends after this many tokens beyond the first. Default: never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guidance_interval: Option<usize>,
}

/// How LlamaGen's `sample_t2i.py` draws.
impl Default for AutoregressiveSampling {
    fn default() -> Self {
        Self {
            guidance_scale: 7.5,
            top_k: 1000,
            top_p: 1.0,
            temperature: 1.0,
            guidance_interval: None,
        }
    }
}

/// The student's way of sampling follows from its family.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Sampling {
    Diffusion(DiffusionSampling),
    Autoregressive(AutoregressiveSampling),
}

impl Sampling {
    /// As a diffusion model draws.
    ///
    /// # Errors
    /// When it is for a model of the other kind.
    pub fn diffusion(&self) -> Result<&DiffusionSampling> {
        match self {
            Self::Diffusion(settings) => Ok(settings),
            Self::Autoregressive(_) => Err(other_kind("a diffusion")),
        }
    }

    /// As an autoregressive model draws.
    ///
    /// # Errors
    /// When it is for a model of the other kind.
    pub fn autoregressive(&self) -> Result<&AutoregressiveSampling> {
        match self {
            Self::Autoregressive(settings) => Ok(settings),
            Self::Diffusion(_) => Err(other_kind("an autoregressive")),
        }
    }
}

fn other_kind(kind: &str) -> Error {
    Error::Invalid {
        what: format!("these settings of sampling are not for {kind} model"),
        hint: None,
    }
}

/// `[student]`: the model that learns from a source of images.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Student {
    /// A known name or a directory. Required. Usually autoregressive; a diffusion model may stand here (Table 4).
    pub model: String,
    /// Decided by `model`.
    #[serde(skip)]
    pub family: Family,
    /// Where it computes. Default "cpu".
    pub device: Device,
    /// How its frozen weights are kept. Default "auto".
    pub dtype: Dtype,
    /// Side of its square images in pixels. Default: known by the model's name, else (`None`) the checkpoint's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resolution: Option<usize>,
    /// What it learns from; "custom" are images that a program gives to the library (`run_with_source`). Default "proxies".
    pub source: Source,
    /// Folder or file of the adapter (or, where all weights are trained, folder of the checkpoint) that it starts from, with
    /// fresh moments; relative paths start at the working directory. Default: none, it starts from the model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<PathBuf>,
    /// Digest of the files in `init`: what the plan depends on in place of the path. Default: read from the folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_digest: Option<String>,
    #[serde(flatten)]
    pub training: Training,
    /// Share of examples whose caption is replaced by the empty condition; 0 to 1. Default 0.1.
    pub condition_dropout: f64,
    /// Dropout inside the backbone while training, as its checkpoint was trained; 0 ≤ p < 1. Default: LlamaGen 0.1,
    /// Lumina 0.05, diffusion 0.
    pub dropout: f64,
    /// Share of the steps during which proxies are still being made; 0 to 1. 0: training begins when all are made.
    /// Default 0.5.
    pub overlap: f64,
    #[serde(flatten)]
    pub sampling: Sampling,
}

/// `[direct]`: the baseline, the same student tuned directly on the references (Table 1). Fields default to
/// `[student]`'s.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Direct {
    /// Default: true when the student learns from proxies.
    pub enabled: bool,
    /// "references" or "augmented". Default "references".
    pub source: Source,
    #[serde(flatten)]
    pub training: Training,
    /// Share of examples whose caption is replaced by the empty condition; 0 to 1.
    pub condition_dropout: f64,
    /// Dropout inside the backbone while training; 0 ≤ p < 1.
    pub dropout: f64,
}

/// `[evaluation]`: which images are sampled from each checkpoint, and what scores them.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Evaluation {
    /// "dreambooth" (25 prompts by class), "nano-10", a text file with one template per line, or a list of templates.
    /// A file is read when the pipeline is resolved, and its lines kept. Default "dreambooth".
    pub prompts: PromptList,
    /// Images per prompt, at least 1. Default 4.
    pub images_per_prompt: usize,
    /// Images sampled together, at least 1. Default 5.
    pub batch_size: usize,
    /// Student steps between evaluated checkpoints; 0: only the last. Default 0.
    pub every: usize,
    /// Evaluate the student before it has learned anything, too. Default true.
    pub untouched: bool,
    /// CLIP checkpoint: a known name or a directory. Default: "nano-clip" for nano students, else
    /// "clip-vit-base-patch32".
    pub clip: String,
    /// DINO checkpoint: a known name or a directory. Default: "nano-dino" for nano students, else "dino-vits16".
    pub dino: String,
    /// Where CLIP and DINO compute. Default "cpu".
    pub device: Device,
}

/// `[channels]`: how many items may wait between two stages, each at least 1. Does not affect the result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Channels {
    /// Subjects with their references, on the way to supervision. Default 4.
    pub references: usize,
    /// Trained supervisors, on the way to synthesis. Default 1.
    pub supervisors: usize,
    /// Batches of proxies that have just been made, on the way to the store. Default 2.
    pub proxies: usize,
    /// Batches of committed proxies, on the way to tokenizing, and as many to scoring. Default 4.
    pub kept: usize,
    /// Batches with committed tokens, on the way to training. Default 16.
    pub tokens: usize,
    /// Checkpoints, on the way to evaluation. Default 2.
    pub checkpoints: usize,
    /// Scores of a checkpoint, on the way to the report. Default 4.
    pub evaluations: usize,
}

impl Resolved {
    /// The full pipeline file; reading it again gives an equal value.
    ///
    /// # Errors
    /// When a value cannot be written as TOML, such as a path that is not UTF-8.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|error| {
            Error::invalid(
                format!("the resolved pipeline cannot be written as TOML: {error}"),
                "use file names that are valid UTF-8",
            )
        })
    }

    /// Supervisor and proxies with how they are sampled, when the student learns from a supervisor's proxies.
    pub fn teacher(&self) -> Option<(&Supervisor, &Proxies, &DiffusionSampling)> {
        let (supervisor, proxies) = self.supervisor.as_ref().zip(self.proxies.as_ref())?;
        Some((supervisor, proxies, proxies.sampling.as_ref()?))
    }

    /// The baseline, when it is enabled.
    pub fn direct(&self) -> Option<&Direct> {
        self.direct.enabled.then_some(&self.direct)
    }
}

fn subjects_by_name<S: Serializer>(subjects: &[Subject], serializer: S) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(subjects.len()))?;
    for subject in subjects {
        map.serialize_entry(&subject.name, subject)?;
    }
    map.end()
}
