//! What a pipeline file has to know of an architecture. The architectures themselves are in `models`.

use super::resolved::{
    AutoregressiveSampling, DiffusionSampling, FlowMatching, LrScheduler, Memory, Optimizer,
    Prodigy, Sampling, Training, Tuning, WeightingScheme,
};

/// What a model can be in a pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A supervisor or a student.
    Diffusion,
    /// A student.
    Autoregressive,
    /// An evaluator of images and texts.
    Clip,
    /// An evaluator of images.
    Dino,
}

impl Kind {
    /// Whether such a model draws images.
    pub fn draws(self) -> bool {
        matches!(self, Kind::Diffusion | Kind::Autoregressive)
    }
}

/// A family of models: what decides defaults. Two are equal that have the same name.
#[derive(Clone, Copy)]
pub struct Family(&'static FamilySettings);

/// What a pipeline file has to know of a family.
#[derive(Debug)]
pub struct FamilySettings {
    /// As reports call it.
    pub name: &'static str,
    pub kind: Kind,
    pub training: TrainingDefaults,
    /// Ends of the names of the layers that carry an adapter where nothing else is said.
    pub targets: &'static [&'static str],
    pub sampling: SamplingDefaults,
}

/// How a model of the family learns where nothing else is said: the paper's Table 8, and the published training code where
/// the paper is silent.
#[derive(Debug)]
pub struct TrainingDefaults {
    pub steps: usize,
    pub batch_size: usize,
    pub optimizer: Optimizer,
    /// AdamW's.
    pub learning_rate: f64,
    pub adam_beta2: f64,
    pub weight_decay: f64,
    /// Whether norms and biases decay too, where all weights are trained.
    pub decay_vectors: bool,
    pub max_grad_norm: f64,
    /// Dropout inside the backbone, in [0, 1); diffusion models have none.
    pub dropout: f64,
    /// Whether its loss can be weighted by the ratio of signal to noise: that of a model which predicts noise or velocity.
    pub has_snr: bool,
    /// Where the noise levels of a model of flow matching are drawn from.
    pub weighting_scheme: Option<WeightingScheme>,
}

impl TrainingDefaults {
    /// diffusers' DreamBooth scripts with `steps` and batches of the paper's Table 8.
    pub const fn diffusion(
        optimizer: Optimizer,
        learning_rate: f64,
        weighting_scheme: Option<WeightingScheme>,
    ) -> Self {
        Self {
            steps: 500,
            batch_size: 4,
            optimizer,
            learning_rate,
            adam_beta2: 0.999,
            weight_decay: 1e-4,
            decay_vectors: true,
            max_grad_norm: 1.0,
            dropout: 0.0,
            has_snr: weighting_scheme.is_none(),
            weighting_scheme,
        }
    }
}

/// How a model of the family draws where nothing else is said, and what has an effect on it.
#[derive(Debug, Clone, Copy)]
pub enum SamplingDefaults {
    Diffusion {
        num_inference_steps: usize,
        guidance_scale: f64,
        /// Whether a second prediction is led away from: that of another prompt, and not at all steps if so wished.
        classifier_free: bool,
    },
    Autoregressive {
        guidance_scale: f64,
        top_k: usize,
        /// Whether guidance may end before the image is whole.
        guidance_interval: bool,
    },
}

impl SamplingDefaults {
    /// Of what draws nothing.
    pub const NONE: Self = Self::Diffusion {
        num_inference_steps: 1,
        guidance_scale: 1.0,
        classifier_free: false,
    };
}

impl FlowMatching {
    /// `weighting_scheme` with diffusers' numbers, of which each has its own.
    pub(super) fn weighted(weighting_scheme: WeightingScheme) -> Self {
        let logit_normal = weighting_scheme == WeightingScheme::LogitNormal;
        Self {
            weighting_scheme,
            logit_mean: logit_normal.then_some(0.0),
            logit_std: logit_normal.then_some(1.0),
            mode_scale: (weighting_scheme == WeightingScheme::Mode).then_some(1.29),
        }
    }
}

const CHECKPOINT_EVERY: usize = 100;
const RANK: usize = 16;

impl Family {
    /// The family of these settings.
    pub const fn new(settings: &'static FamilySettings) -> Self {
        Self(settings)
    }

    /// As reports call it.
    pub fn name(self) -> &'static str {
        self.0.name
    }

    /// What its models can be in a pipeline.
    pub fn kind(self) -> Kind {
        self.0.kind
    }

    /// Dropout inside the backbone where nothing else is said.
    pub(super) fn dropout(self) -> f64 {
        self.0.training.dropout
    }

    /// The rate for `optimizer`. Table 8's for Prodigy, which finds its scale itself; Muon's steps are scaled to share
    /// AdamW's.
    pub(super) fn learning_rate(self, optimizer: Optimizer) -> f64 {
        match optimizer {
            Optimizer::Prodigy => 1.0,
            Optimizer::Adamw | Optimizer::Muon => self.0.training.learning_rate,
        }
    }

    /// How its models learn where nothing else is said.
    pub fn training(self) -> Training {
        let defaults = &self.0.training;
        let optimizer = defaults.optimizer;
        Training {
            tuning: Tuning::Lora,
            steps: defaults.steps,
            batch_size: defaults.batch_size,
            gradient_accumulation_steps: 1,
            learning_rate: self.learning_rate(optimizer),
            optimizer,
            adam_beta1: 0.9,
            adam_beta2: defaults.adam_beta2,
            adam_epsilon: 1e-8,
            weight_decay: defaults.weight_decay,
            decay_vectors: defaults.decay_vectors,
            prodigy: (optimizer == Optimizer::Prodigy).then(Prodigy::default),
            snr_gamma: None,
            flow_matching: defaults.weighting_scheme.map(FlowMatching::weighted),
            max_grad_norm: defaults.max_grad_norm,
            lr_scheduler: LrScheduler::Constant,
            warmup_steps: 0,
            rank: RANK,
            alpha: RANK as f64,
            targets: self.0.targets.iter().map(ToString::to_string).collect(),
            checkpoint_every: CHECKPOINT_EVERY,
            memory: Memory::Auto,
        }
    }

    /// How its models draw where nothing else is said.
    pub fn sampling(self) -> Sampling {
        match self.0.sampling {
            SamplingDefaults::Diffusion {
                num_inference_steps,
                guidance_scale,
                ..
            } => Sampling::Diffusion(DiffusionSampling {
                num_inference_steps,
                guidance_scale,
                negative_prompt: String::new(),
                guidance_start: None,
                guidance_stop: None,
            }),
            SamplingDefaults::Autoregressive {
                guidance_scale,
                top_k,
                ..
            } => Sampling::Autoregressive(AutoregressiveSampling {
                guidance_scale,
                top_k,
                top_p: 1.0,
                temperature: 1.0,
                guidance_interval: None,
            }),
        }
    }

    /// Whether its models draw with the setting `field`.
    pub fn draws_with(self, field: &str) -> bool {
        let (classifier_free, interval, is_diffusion) = match self.0.sampling {
            SamplingDefaults::Diffusion {
                classifier_free, ..
            } => (classifier_free, false, true),
            SamplingDefaults::Autoregressive {
                guidance_interval, ..
            } => (false, guidance_interval, false),
        };
        match field {
            "num_inference_steps" => is_diffusion,
            "negative_prompt" | "guidance_start" | "guidance_stop" => classifier_free,
            "top_k" | "top_p" | "temperature" => !is_diffusion,
            "guidance_interval" => interval,
            _ => true,
        }
    }

    /// Whether the loss of its models can be weighted by the ratio of signal to noise.
    pub(super) fn has_snr(self) -> bool {
        self.0.training.has_snr
    }
}

impl PartialEq for Family {
    fn eq(&self, other: &Self) -> bool {
        self.0.name == other.0.name
    }
}

impl Eq for Family {}

impl std::fmt::Display for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0.name)
    }
}

impl std::fmt::Debug for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Family({})", self.0.name)
    }
}
