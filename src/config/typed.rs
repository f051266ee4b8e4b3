//! What was typed: the sections of a pipeline file with the fields that stand in it, each with its place.

use super::limits;
use super::reader::{At, Choice, Faults, Section};
use super::resolved::{
    Device, Dtype, LrScheduler, Memory, Optimizer, Source, Tuning, WeightingScheme,
};
use super::tree::{Place, Table};

/// A field that may have been typed.
pub(super) type Typed<T> = Option<At<T>>;

pub(super) struct Pipeline {
    /// The start of the file, for what is missing.
    pub start: Place,
    pub seed: Typed<usize>,
    pub threads: Typed<usize>,
    pub subjects: Vec<Subject>,
    pub supervisor: Option<Supervisor>,
    pub proxies: Proxies,
    pub student: Option<Student>,
    pub direct: Direct,
    pub evaluation: Evaluation,
    pub channels: Channels,
}

pub(super) struct Subject {
    pub name: String,
    pub place: Place,
    pub images: Typed<String>,
    pub class: Typed<String>,
    pub token: Typed<String>,
    pub replay: Typed<usize>,
}

pub(super) struct Supervisor {
    pub place: Place,
    pub model: Typed<String>,
    pub device: Typed<Device>,
    pub dtype: Typed<Dtype>,
    pub resolution: Typed<usize>,
    pub adapter: Typed<String>,
    pub adapter_digest: Typed<String>,
    pub prompt: Typed<String>,
    pub center_crop: Typed<bool>,
    pub random_flip: Typed<bool>,
    pub training: Training,
    pub prior_preservation: Option<PriorPreservation>,
}

pub(super) struct PriorPreservation {
    pub place: Place,
    pub class_images: Typed<usize>,
    pub weight: Typed<f64>,
    pub prompt: Typed<String>,
}

#[derive(Default)]
pub(super) struct Training {
    pub tuning: Typed<Tuning>,
    pub steps: Typed<usize>,
    pub batch_size: Typed<usize>,
    pub gradient_accumulation_steps: Typed<usize>,
    pub learning_rate: Typed<f64>,
    pub optimizer: Typed<Optimizer>,
    pub adam_beta1: Typed<f64>,
    pub adam_beta2: Typed<f64>,
    pub adam_epsilon: Typed<f64>,
    pub weight_decay: Typed<f64>,
    pub prodigy: Prodigy,
    pub snr_gamma: Typed<f64>,
    pub flow_matching: FlowMatching,
    pub max_grad_norm: Typed<f64>,
    pub lr_scheduler: Typed<LrScheduler>,
    pub warmup_steps: Typed<usize>,
    pub rank: Typed<usize>,
    pub alpha: Typed<f64>,
    pub targets: Typed<Vec<At<String>>>,
    pub checkpoint_every: Typed<usize>,
    pub memory: Typed<Memory>,
}

/// Prodigy's own fields, which stand among those of a training.
#[derive(Default)]
pub(super) struct Prodigy {
    pub beta3: Typed<f64>,
    pub d0: Typed<f64>,
    pub d_coef: Typed<f64>,
    pub growth_rate: Typed<f64>,
    pub decouple: Typed<bool>,
    pub use_bias_correction: Typed<bool>,
    pub safeguard_warmup: Typed<bool>,
}

/// The fields of flow matching, which stand among those of a training.
#[derive(Default)]
pub(super) struct FlowMatching {
    pub weighting_scheme: Typed<WeightingScheme>,
    pub logit_mean: Typed<f64>,
    pub logit_std: Typed<f64>,
    pub mode_scale: Typed<f64>,
}

/// The fields of both ways of sampling; the model's family decides which may be typed.
#[derive(Default)]
pub(super) struct Sampling {
    pub guidance_scale: Typed<f64>,
    pub num_inference_steps: Typed<usize>,
    pub negative_prompt: Typed<String>,
    pub guidance_start: Typed<f64>,
    pub guidance_stop: Typed<f64>,
    pub top_k: Typed<usize>,
    pub top_p: Typed<f64>,
    pub temperature: Typed<f64>,
    pub guidance_interval: Typed<usize>,
}

#[derive(Default)]
pub(super) struct Proxies {
    /// Where the section was opened, if it was.
    pub place: Option<Place>,
    pub count: Typed<usize>,
    pub batch_size: Typed<usize>,
    pub prompts: Typed<Vec<At<String>>>,
    pub sampling: Sampling,
}

#[derive(Default)]
pub(super) struct Student {
    pub model: Typed<String>,
    pub device: Typed<Device>,
    pub dtype: Typed<Dtype>,
    pub resolution: Typed<usize>,
    pub source: Typed<Source>,
    pub init: Typed<String>,
    pub init_digest: Typed<String>,
    pub training: Training,
    pub condition_dropout: Typed<f64>,
    pub dropout: Typed<f64>,
    pub overlap: Typed<f64>,
    pub sampling: Sampling,
}

#[derive(Default)]
pub(super) struct Direct {
    pub enabled: Typed<bool>,
    pub source: Typed<Source>,
    pub training: Training,
    pub condition_dropout: Typed<f64>,
    pub dropout: Typed<f64>,
}

/// The prompts of `[evaluation]` as typed.
pub(super) enum Prompts {
    /// The name of a list, or a file.
    Named(At<String>),
    Listed(Vec<At<String>>),
}

#[derive(Default)]
pub(super) struct Evaluation {
    pub prompts: Option<Prompts>,
    pub images_per_prompt: Typed<usize>,
    pub batch_size: Typed<usize>,
    pub every: Typed<usize>,
    pub untouched: Typed<bool>,
    pub clip: Typed<String>,
    pub dino: Typed<String>,
    pub device: Typed<Device>,
}

#[derive(Default)]
pub(super) struct Channels {
    pub references: Typed<usize>,
    pub supervisors: Typed<usize>,
    pub proxies: Typed<usize>,
    pub kept: Typed<usize>,
    pub tokens: Typed<usize>,
    pub checkpoints: Typed<usize>,
    pub evaluations: Typed<usize>,
}

impl Choice for Tuning {
    const SPELLINGS: &'static [(&'static str, Self)] =
        &[("lora", Tuning::Lora), ("full", Tuning::Full)];
}

impl Choice for Dtype {
    const SPELLINGS: &'static [(&'static str, Self)] = &[
        ("auto", Dtype::Auto),
        ("f32", Dtype::F32),
        ("bf16", Dtype::Bf16),
        ("f16", Dtype::F16),
    ];
}

impl Choice for Memory {
    const SPELLINGS: &'static [(&'static str, Self)] = &[
        ("auto", Memory::Auto),
        ("fit", Memory::Fit),
        ("fast", Memory::Fast),
    ];
}

impl Choice for Optimizer {
    const SPELLINGS: &'static [(&'static str, Self)] = &[
        ("adamw", Optimizer::Adamw),
        ("prodigy", Optimizer::Prodigy),
        ("muon", Optimizer::Muon),
    ];
}

impl Choice for WeightingScheme {
    const SPELLINGS: &'static [(&'static str, Self)] = &[
        ("sigma_sqrt", WeightingScheme::SigmaSqrt),
        ("logit_normal", WeightingScheme::LogitNormal),
        ("mode", WeightingScheme::Mode),
        ("cosmap", WeightingScheme::Cosmap),
        ("none", WeightingScheme::None),
    ];
}

impl Choice for LrScheduler {
    const SPELLINGS: &'static [(&'static str, Self)] = &[
        ("constant", LrScheduler::Constant),
        ("constant_with_warmup", LrScheduler::ConstantWithWarmup),
        ("linear", LrScheduler::Linear),
        ("cosine", LrScheduler::Cosine),
    ];
}

impl Choice for Source {
    const SPELLINGS: &'static [(&'static str, Self)] = &[
        ("proxies", Source::Proxies),
        ("references", Source::References),
        ("augmented", Source::Augmented),
        ("custom", Source::Custom),
    ];
}

impl Pipeline {
    /// Reads the whole file.
    pub fn read(faults: &Faults, start: Place, table: &Table) -> Self {
        let root = Section::new(faults, "", start.clone(), table);
        let pipeline = Pipeline {
            start,
            seed: root.count("seed", &limits::SEED),
            threads: root.count("threads", &limits::THREADS),
            subjects: root.section("subject").map_or_else(Vec::new, |all| {
                let subjects = all.sections().into_iter();
                subjects
                    .map(|(name, section)| Subject::read(name, section))
                    .collect()
            }),
            supervisor: root.section("supervisor").map(Supervisor::read),
            proxies: root
                .section("proxies")
                .map(Proxies::read)
                .unwrap_or_default(),
            student: root.section("student").map(Student::read),
            direct: root.section("direct").map(Direct::read).unwrap_or_default(),
            evaluation: root
                .section("evaluation")
                .map(Evaluation::read)
                .unwrap_or_default(),
            channels: root
                .section("channels")
                .map(Channels::read)
                .unwrap_or_default(),
        };
        root.finish();
        pipeline
    }
}

impl Subject {
    fn read(name: String, section: Section<'_>) -> Self {
        let subject = Subject {
            place: section.place().clone(),
            images: section.required_text("images", "\"photos/dog\""),
            class: section.required_text("class", "\"dog\""),
            token: section.text("token"),
            replay: section.count("replay", &limits::PROXIES),
            name,
        };
        section.finish();
        subject
    }
}

impl Supervisor {
    fn read(section: Section<'_>) -> Self {
        let supervisor = Supervisor {
            place: section.place().clone(),
            model: section.required_text("model", "\"nano-sd3\""),
            device: device(&section),
            dtype: section.choice("dtype"),
            resolution: section.count("resolution", &limits::RESOLUTION),
            adapter: section.text("adapter"),
            adapter_digest: section.text("adapter_digest"),
            prompt: section.text("prompt"),
            center_crop: section.boolean("center_crop"),
            random_flip: section.boolean("random_flip"),
            training: Training::read(&section),
            prior_preservation: section
                .section("prior_preservation")
                .map(PriorPreservation::read),
        };
        section.finish();
        supervisor
    }
}

impl PriorPreservation {
    fn read(section: Section<'_>) -> Self {
        let prior = PriorPreservation {
            place: section.place().clone(),
            class_images: section.count("class_images", &limits::CLASS_IMAGES),
            weight: section.number("weight", &limits::ABOVE_ZERO),
            prompt: section.text("prompt"),
        };
        section.finish();
        prior
    }
}

/// The place of a field, if it was typed.
fn place<T>(typed: &Typed<T>) -> Option<&Place> {
    typed.as_ref().map(|at| &at.place)
}

impl Training {
    /// Where each field was typed.
    pub fn places(&self) -> Vec<&Place> {
        let places = [
            place(&self.tuning),
            place(&self.steps),
            place(&self.batch_size),
            place(&self.gradient_accumulation_steps),
            place(&self.learning_rate),
            place(&self.optimizer),
            place(&self.adam_beta1),
            place(&self.adam_beta2),
            place(&self.adam_epsilon),
            place(&self.weight_decay),
            place(&self.snr_gamma),
            place(&self.max_grad_norm),
            place(&self.lr_scheduler),
            place(&self.warmup_steps),
            place(&self.rank),
            place(&self.alpha),
            place(&self.targets),
            place(&self.checkpoint_every),
            place(&self.memory),
        ];
        let own = self.prodigy.places().into_iter();
        let own = own.chain(self.flow_matching.places());
        let own = own.filter_map(|(_, place)| place);
        places.into_iter().flatten().chain(own).collect()
    }

    fn read(section: &Section<'_>) -> Self {
        Training {
            tuning: section.choice("tuning"),
            steps: section.count("steps", &limits::STEPS),
            batch_size: section.count("batch_size", &limits::BATCH_SIZE),
            gradient_accumulation_steps: section
                .count("gradient_accumulation_steps", &limits::BATCH_SIZE),
            learning_rate: section.number("learning_rate", &limits::ABOVE_ZERO),
            optimizer: section.choice("optimizer"),
            adam_beta1: section.number("adam_beta1", &limits::BELOW_ONE),
            adam_beta2: section.number("adam_beta2", &limits::BELOW_ONE),
            adam_epsilon: section.number("adam_epsilon", &limits::ABOVE_ZERO),
            weight_decay: section.number("weight_decay", &limits::NOT_NEGATIVE),
            prodigy: Prodigy::read(section),
            snr_gamma: section.number("snr_gamma", &limits::ABOVE_ZERO),
            flow_matching: FlowMatching::read(section),
            max_grad_norm: section.number("max_grad_norm", &limits::ABOVE_ZERO),
            lr_scheduler: section.choice("lr_scheduler"),
            warmup_steps: section.count("warmup_steps", &limits::STEPS_OR_NONE),
            rank: section.count("rank", &limits::RANK),
            alpha: section.number("alpha", &limits::ABOVE_ZERO),
            targets: section.texts("targets"),
            checkpoint_every: section.count("checkpoint_every", &limits::CHECKPOINT_EVERY),
            memory: section.choice("memory"),
        }
    }
}

impl Prodigy {
    /// The fields with the places where they were typed.
    pub fn places(&self) -> [(&'static str, Option<&Place>); 7] {
        [
            ("prodigy_beta3", place(&self.beta3)),
            ("prodigy_d0", place(&self.d0)),
            ("prodigy_d_coef", place(&self.d_coef)),
            ("prodigy_growth_rate", place(&self.growth_rate)),
            ("prodigy_decouple", place(&self.decouple)),
            (
                "prodigy_use_bias_correction",
                place(&self.use_bias_correction),
            ),
            ("prodigy_safeguard_warmup", place(&self.safeguard_warmup)),
        ]
    }

    fn read(section: &Section<'_>) -> Self {
        Prodigy {
            beta3: section.number("prodigy_beta3", &limits::BELOW_ONE),
            d0: section.number("prodigy_d0", &limits::ABOVE_ZERO),
            d_coef: section.number("prodigy_d_coef", &limits::ABOVE_ZERO),
            growth_rate: section.number("prodigy_growth_rate", &limits::AT_LEAST_ONE),
            decouple: section.boolean("prodigy_decouple"),
            use_bias_correction: section.boolean("prodigy_use_bias_correction"),
            safeguard_warmup: section.boolean("prodigy_safeguard_warmup"),
        }
    }
}

impl FlowMatching {
    /// The fields with the places where they were typed.
    pub fn places(&self) -> [(&'static str, Option<&Place>); 4] {
        [
            ("weighting_scheme", place(&self.weighting_scheme)),
            ("logit_mean", place(&self.logit_mean)),
            ("logit_std", place(&self.logit_std)),
            ("mode_scale", place(&self.mode_scale)),
        ]
    }

    fn read(section: &Section<'_>) -> Self {
        FlowMatching {
            weighting_scheme: section.choice("weighting_scheme"),
            logit_mean: section.number("logit_mean", &limits::LOGIT),
            logit_std: section.number("logit_std", &limits::ABOVE_ZERO),
            mode_scale: section.number("mode_scale", &limits::MODE_SCALE),
        }
    }
}

impl Sampling {
    fn read_diffusion(section: &Section<'_>) -> Self {
        Sampling {
            guidance_scale: section.number("guidance_scale", &limits::GUIDANCE_SCALE),
            num_inference_steps: section.count("num_inference_steps", &limits::NUM_INFERENCE_STEPS),
            negative_prompt: section.any_text("negative_prompt"),
            guidance_start: section.number("guidance_start", &limits::SHARE),
            guidance_stop: section.number("guidance_stop", &limits::SHARE),
            ..Sampling::default()
        }
    }

    fn read_any(section: &Section<'_>) -> Self {
        Sampling {
            top_k: section.count("top_k", &limits::TOP_K),
            top_p: section.number("top_p", &limits::PROBABILITY),
            temperature: section.number("temperature", &limits::NOT_NEGATIVE),
            guidance_interval: section.count("guidance_interval", &limits::GUIDANCE_INTERVAL),
            ..Sampling::read_diffusion(section)
        }
    }
}

impl Proxies {
    fn read(section: Section<'_>) -> Self {
        let proxies = Proxies {
            place: Some(section.place().clone()),
            count: section.count("count", &limits::PROXIES),
            batch_size: section.count("batch_size", &limits::BATCH_SIZE),
            prompts: section.texts("prompts"),
            sampling: Sampling::read_diffusion(&section),
        };
        section.finish();
        proxies
    }
}

impl Student {
    fn read(section: Section<'_>) -> Self {
        let student = Student {
            model: section.required_text("model", "\"nano-llamagen\""),
            device: device(&section),
            dtype: section.choice("dtype"),
            resolution: section.count("resolution", &limits::RESOLUTION),
            source: section.choice("source"),
            init: section.text("init"),
            init_digest: section.text("init_digest"),
            training: Training::read(&section),
            condition_dropout: section.number("condition_dropout", &limits::SHARE),
            dropout: section.number("dropout", &limits::BELOW_ONE),
            overlap: section.number("overlap", &limits::SHARE),
            sampling: Sampling::read_any(&section),
        };
        section.finish();
        student
    }
}

impl Direct {
    /// Where each field but `enabled` was typed.
    pub fn places(&self) -> Vec<&Place> {
        let own = [
            place(&self.source),
            place(&self.condition_dropout),
            place(&self.dropout),
        ];
        let own = own.into_iter().flatten();
        own.chain(self.training.places()).collect()
    }

    fn read(section: Section<'_>) -> Self {
        let direct = Direct {
            enabled: section.boolean("enabled"),
            source: section.choice("source"),
            training: Training::read(&section),
            condition_dropout: section.number("condition_dropout", &limits::SHARE),
            dropout: section.number("dropout", &limits::BELOW_ONE),
        };
        section.finish();
        direct
    }
}

impl Evaluation {
    fn read(section: Section<'_>) -> Self {
        let evaluation = Evaluation {
            prompts: if section.is_text("prompts") {
                section.text("prompts").map(Prompts::Named)
            } else {
                section
                    .texts("prompts")
                    .map(|list| Prompts::Listed(list.value))
            },
            images_per_prompt: section.count("images_per_prompt", &limits::IMAGES_PER_PROMPT),
            batch_size: section.count("batch_size", &limits::BATCH_SIZE),
            every: section.count("every", &limits::STEPS_OR_NONE),
            untouched: section.boolean("untouched"),
            clip: section.text("clip"),
            dino: section.text("dino"),
            device: device(&section),
        };
        section.finish();
        evaluation
    }
}

impl Channels {
    fn read(section: Section<'_>) -> Self {
        let channels = Channels {
            references: section.count("references", &limits::CHANNEL),
            supervisors: section.count("supervisors", &limits::CHANNEL),
            proxies: section.count("proxies", &limits::CHANNEL),
            kept: section.count("kept", &limits::CHANNEL),
            tokens: section.count("tokens", &limits::CHANNEL),
            checkpoints: section.count("checkpoints", &limits::CHANNEL),
            evaluations: section.count("evaluations", &limits::CHANNEL),
        };
        section.finish();
        channels
    }
}

fn device(section: &Section<'_>) -> Typed<Device> {
    let text = section.text("device")?;
    match text.value.parse() {
        Ok(value) => Some(At {
            value,
            place: text.place,
        }),
        Err(hint) => {
            let what = format!(
                "{} = {:?} is not a device",
                section.name("device"),
                text.value
            );
            let hint: String = hint;
            section.faults().push(&text.place, what, hint);
            None
        }
    }
}
