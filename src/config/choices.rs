//! What a field of a pipeline file may be where it is one of a few words.

use serde::{Deserialize, Serialize, Serializer};

/// A device by the name a pipeline file gives it: "cpu", "cuda" (the first card) or "cuda:N".
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Device {
    Cpu,
    /// The card's number, from 0.
    Cuda(usize),
}

/// How frozen weights are kept. On the CPU arithmetic is in f32 whatever they are; on a card it is in their own type.
/// Adapters, what the optimizer remembers, and weights that are all trained are always f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    /// As the checkpoint has them, so that nothing is rounded (what is small in f32, which is faster); on a card bf16 for
    /// every checkpoint in half precision.
    #[default]
    Auto,
    F32,
    Bf16,
    F16,
}

/// What a training step keeps of its forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Memory {
    /// `Fit` for a backbone of 100 million weights and more, else `Fast`.
    #[default]
    Auto,
    /// The inputs of its blocks; each block runs again in the backward pass, with equal results.
    Fit,
    /// Everything.
    Fast,
}

/// What is learned: a low-rank adapter, or all weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Tuning {
    Lora,
    Full,
}

/// What moves the weights.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Optimizer {
    /// Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101), with torch's semantics.
    #[default]
    Adamw,
    /// AdamW with a rate that it estimates itself (Mishchenko and Defazio 2023, arXiv 2306.06101), as the package
    /// `prodigyopt` has it.
    Prodigy,
    /// Orthogonal steps (Jordan et al. 2024) for matrices inside the network, AdamW for everything else, both with the
    /// same learning rate and decay.
    Muon,
}

/// Which noise levels are learnt, and what they weigh. The names are diffusers' own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightingScheme {
    /// All levels equally often, the loss divided by σ².
    SigmaSqrt,
    /// Levels in the middle more often.
    LogitNormal,
    /// Levels in the middle more often, with more at the ends than a logit-normal density has.
    Mode,
    /// All levels equally often, those in the middle weighing more.
    Cosmap,
    /// All levels equally often and alike.
    None,
}

/// How the learning rate goes on after the warm-up. The names are diffusers' own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LrScheduler {
    /// Constant, without warm-up.
    Constant,
    /// Linear warm-up, then constant.
    ConstantWithWarmup,
    /// Linear warm-up, then linear to 0, which the step after the last would have.
    Linear,
    /// Linear warm-up, then half a cosine to 0, which the step after the last would have.
    Cosine,
}

/// Where (image, prompt) pairs come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// Images made by a supervisor for each subject.
    Proxies,
    /// The subjects' own photos.
    References,
    /// The photos, changed at random each time they are drawn (Table 7).
    Augmented,
    /// Images of a program's own, which it gives to the library's `run_with_source`; `[proxies]` says how many.
    Custom,
}

impl Source {
    /// Whether there are proxies: images that are planned, kept and scored before the student learns them.
    pub fn makes_proxies(self) -> bool {
        match self {
            Source::Proxies | Source::Custom => true,
            Source::References | Source::Augmented => false,
        }
    }
}

impl Device {
    /// The kind alone, "cpu" or "cuda": the part that can affect results.
    pub fn kind(self) -> &'static str {
        match self {
            Device::Cpu => "cpu",
            Device::Cuda(_) => "cuda",
        }
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(0) => f.write_str("cuda"),
            Device::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl std::str::FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let ordinal = text
            .strip_prefix("cuda:")
            .and_then(|ordinal| ordinal.parse().ok());
        match text {
            "cpu" => Ok(Device::Cpu),
            "cuda" => Ok(Device::Cuda(0)),
            _ => ordinal.map(Device::Cuda).ok_or_else(|| {
                "the devices are \"cpu\", \"cuda\" (the first card) and \"cuda:N\"".to_string()
            }),
        }
    }
}

impl Serialize for Device {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl std::str::FromStr for Dtype {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(Dtype::Auto),
            "f32" => Ok(Dtype::F32),
            "bf16" => Ok(Dtype::Bf16),
            "f16" => Ok(Dtype::F16),
            _ => Err("the choices are \"auto\", \"f32\", \"bf16\" and \"f16\"".to_string()),
        }
    }
}
