//! The boxes of the dataflow, one file each: a stream in, a stream out.
//!
//! ```text
//! references ─┬─▶ supervise ──▶ synthesize ─┬─▶ keep ──┬─▶ tokenize ──▶ train ──┬─▶ evaluate ──▶ report
//!             │                             │          └─▶ score                │
//!             │                             └─ supervisors, when done ──────────┤
//!             └─▶ direct ───────────────────────────────────────────────────────┘
//! ```
//! [`generate`] stands in for synthesize where proxies alone are made, and the batches shared between processes.
//! [`direct`] trains the baseline on the references alone. A pipeline without proxies has nothing between references
//! and train, which then runs [`direct`](direct::direct) too.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Tensor;
use image::RgbImage;

use crate::config::Resolved;
use crate::evaluation::embed::Evaluator;
use crate::evaluation::embedders::{ClipEmbedder, DinoEmbedder};
use crate::models::{Learner, LearnerOptions, open};
use crate::plan::{Plan, Versions, drawing_key, proxy_keys};
use crate::store::{Claim, MetricRow, ProxyRow, Store, Table, Writer, now_us};
use crate::stream::{Board, Stop, Worker};
use crate::{Error, Result};

mod class_images;
pub mod direct;
pub mod disk;
pub mod evaluate;
pub mod generate;
pub mod keep;
pub mod references;
pub mod report;
pub mod score;
pub mod supervise;
pub mod synthesize;
pub mod tokenize;
pub mod train;

/// What all stages of a run share.
pub struct Context {
    /// The run's name in the store.
    pub run: String,
    /// The run's directory.
    pub dir: PathBuf,
    pub resolved: Resolved,
    pub plan: Plan,
    pub subjects: Vec<Arc<Subject>>,
    /// Digest of everything that affects the student: a checkpoint of another one is not continued.
    pub student_identity: String,
    /// One supervisor's key for each subject; empty without proxies.
    pub supervisors: Vec<String>,
    /// The same in every known version.
    pub supervisor_keys: Vec<Versions<String>>,
    pub store: Store,
    /// Loss curves.
    pub metrics: Writer<MetricRow>,
    pub board: Board,
    pub stop: Stop,
    /// The supervisor's backbone for drawing: proxies, and its own samples in the evaluation.
    pub painter: Option<Lazy>,
    /// The student's backbone for drawing.
    pub sampler: Lazy,
    pub evaluator: LazyEvaluator,
    /// Digest of the student's image tokenizer and its tokens per image; `None` for a diffusion student.
    pub tokenizer: Option<TokenizerIdentity>,
    pub warnings: Warnings,
}

impl Context {
    /// The subject at `index` of the plan.
    pub fn subject(&self, index: usize) -> &Arc<Subject> {
        &self.subjects[index]
    }

    /// The keys of the proxies of batch `batch` of the plan: those under which `table` has all of them, or else those
    /// under which they are made now. Empty without proxies.
    pub fn proxy_keys(&self, batch: usize, table: &Table<ProxyRow>) -> Vec<String> {
        let keys = self.known_proxy_keys(batch);
        let keys = keys.map(|keys| {
            let found = keys.found(|keys| table.missing(keys).is_empty());
            found.clone()
        });
        keys.unwrap_or_default()
    }

    /// The keys of the proxies of batch `batch` of the plan in every known version; `None` without proxies.
    pub fn known_proxy_keys(&self, batch: usize) -> Option<Versions<Vec<String>>> {
        let (_, proxies) = self.resolved.teacher()?;
        let supervisor = &self.supervisor_keys[self.plan.batch(batch).subject];
        Some(proxy_keys(&self.plan, batch, supervisor, &proxies.sampling))
    }

    /// Records the numbers of one training step.
    pub async fn record(
        &self,
        owner: &str,
        stage: &str,
        step: usize,
        numbers: &[(&str, f64)],
    ) -> Result<()> {
        for (name, value) in numbers {
            let row = MetricRow {
                run: owner.to_string(),
                stage: stage.to_string(),
                step: step as u64,
                name: name.to_string(),
                value: *value,
                created_us: now_us(),
            };
            self.metrics.push(row).await?;
        }
        Ok(())
    }
}

/// Which image tokenizer the student reads.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenizerIdentity {
    /// Key of the tokens that it makes of the run's proxies: the digest of its files, and how proxies are resized for it.
    pub digest: String,
    /// Tokens per image; the grid is square.
    pub count: usize,
}

/// A subject with its reference images.
#[derive(Debug)]
pub struct Subject {
    pub name: String,
    pub class: String,
    pub token: String,
    /// Digests of the files, in the order of their names.
    pub digests: Vec<String>,
    /// File names, in the same order.
    pub files: Vec<String>,
    /// The central squares, at most 1024 px wide, in the same order.
    pub images: Vec<RgbImage>,
    /// The same with all that is beside their squares.
    pub whole: Vec<RgbImage>,
    /// Their own captions, in the same order, where they have some: else they have the prompt of all.
    pub captions: Vec<Option<String>>,
}

/// A supervisor that has learnt its subject.
#[derive(Debug, Clone)]
pub struct Supervisor {
    /// The subject's index in the plan.
    pub subject: usize,
    /// Digest of everything that made it.
    pub key: String,
    /// The folder with its adapter.
    pub adapter: PathBuf,
}

/// A planned batch of proxies.
#[derive(Debug, Clone)]
pub struct ProxyBatch {
    /// Its number in the plan.
    pub batch: usize,
    /// The proxies' keys, in the order of the plan.
    pub keys: Vec<String>,
    /// Their pixels, if they have just been made; else they are in the store.
    pub images: Option<Arc<Vec<RgbImage>>>,
    /// Keeps other processes from making the same, until it is in the store.
    pub claim: Option<Arc<Claim>>,
}

/// A planned batch of proxies that a training step may use.
#[derive(Debug, Clone)]
pub struct ReadyBatch {
    /// Its number in the plan.
    pub batch: usize,
    /// The proxies' keys, in the order of the plan.
    pub keys: Vec<String>,
}

/// Who drew an evaluated image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Method {
    /// The student before it learnt anything.
    Untouched,
    /// The student tuned on the references.
    Direct,
    /// A diffusion model tuned on the references.
    Supervisor,
    /// The student of this pipeline.
    Student,
}

impl Method {
    /// The name in the store.
    pub fn name(self) -> &'static str {
        match self {
            Method::Untouched => "untouched",
            Method::Direct => "direct",
            Method::Supervisor => "supervisor",
            Method::Student => "student",
        }
    }
}

/// Something to draw samples with, on its way to evaluation.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    pub method: Method,
    /// Training steps taken.
    pub step: usize,
    /// The subjects that it can draw.
    pub subjects: Vec<usize>,
    /// The values of what was trained, by name.
    pub values: Arc<BTreeMap<String, Tensor>>,
}

/// A learner that is opened when it is first needed, on its own thread, and shared.
#[derive(Clone)]
pub struct Lazy {
    /// Digest of what decides, beside an adapter, what it draws: the checkpoint, the side length, the type of the
    /// weights and the kind of device.
    pub digest: String,
    name: String,
    opening: Arc<LearnerOptions>,
    worker: Arc<tokio::sync::OnceCell<Worker<Box<dyn Learner>>>>,
}

impl Lazy {
    /// The learner `opening` asks for, on a thread called `name`; `base` is the digest of its checkpoint.
    pub fn new(name: &str, opening: LearnerOptions, base: &str) -> Self {
        let kind = match opening.device.is_cpu() {
            true => "cpu",
            false => "cuda",
        };
        Self {
            digest: drawing_key(base, opening.resolution, opening.dtype, kind),
            name: name.to_string(),
            opening: Arc::new(opening),
            worker: Arc::default(),
        }
    }

    /// The learner's thread.
    pub async fn get(&self) -> Result<&Worker<Box<dyn Learner>>> {
        self.worker
            .get_or_try_init(|| async {
                let opening = self.opening.clone();
                Worker::spawn(&self.name, move || open(&opening)).await
            })
            .await
    }
}

/// CLIP and DINO.
pub type Evaluators = Evaluator<ClipEmbedder, DinoEmbedder>;

/// The evaluators, opened when first needed, on their own thread.
#[derive(Clone)]
pub struct LazyEvaluator {
    build: Arc<dyn Fn() -> Result<Evaluators> + Send + Sync>,
    worker: Arc<tokio::sync::OnceCell<Worker<Evaluators>>>,
    /// Digest of both checkpoints.
    pub digest: String,
    /// Length of a CLIP embedding.
    pub clip: usize,
    /// Length of a DINO embedding.
    pub dino: usize,
}

impl LazyEvaluator {
    /// Evaluators that `build` opens; `digest` and the lengths of their embeddings name their table.
    pub fn new(
        build: impl Fn() -> Result<Evaluators> + Send + Sync + 'static,
        digest: String,
        clip: usize,
        dino: usize,
    ) -> Self {
        Self {
            build: Arc::new(build),
            worker: Arc::default(),
            digest,
            clip,
            dino,
        }
    }

    /// The evaluators' thread.
    pub async fn get(&self) -> Result<&Worker<Evaluators>> {
        self.worker
            .get_or_try_init(|| async {
                let build = self.build.clone();
                Worker::spawn("evaluator", move || build()).await
            })
            .await
    }
}

/// Things that went wrong without stopping the run: photos set aside, unknown words.
#[derive(Clone, Default)]
pub struct Warnings {
    list: Arc<Mutex<Vec<String>>>,
}

impl Warnings {
    /// Notes one, and says it at once.
    pub fn add(&self, warning: impl Into<String>) {
        let warning = warning.into();
        tracing::warn!("{warning}");
        self.list
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(warning);
    }

    /// All of them, in their order.
    pub fn all(&self) -> Vec<String> {
        self.list
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// A batch that ended although its plan did not.
fn ended_early(stage: &str) -> Error {
    Error::Invalid {
        what: format!("{stage}: the input ended before the plan did"),
        hint: None,
    }
}

/// Opens a learner on a thread of its own and prepares it for training.
async fn spawn_trainee(
    name: &str,
    opening: LearnerOptions,
    settings: crate::config::Training,
) -> Result<Worker<crate::training::Trainer>> {
    Worker::spawn(name, move || {
        crate::training::Trainer::new(open(&opening)?, &settings)
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Dtype, Memory};
    use crate::models::Tuning;

    #[test]
    fn samples_of_models_that_draw_otherwise_have_other_keys() {
        let drawn = |base: &str, resolution, dtype| {
            let opening = LearnerOptions {
                dir: "anywhere".into(),
                name: "any name".into(),
                family: crate::models::llamagen::FAMILY,
                resolution,
                tuning: Tuning::Frozen,
                seed: 0,
                device: candle_core::Device::Cpu,
                dtype,
                memory: Memory::Auto,
                dropout: 0.0,
                condition_dropout: 0.0,
            };
            Lazy::new("sampler", opening, base).digest
        };
        let digests = [
            drawn("a", None, Dtype::Auto),
            drawn("b", None, Dtype::Auto),
            drawn("a", Some(64), Dtype::Auto),
            drawn("a", None, Dtype::Bf16),
        ];
        let distinct: std::collections::BTreeSet<&String> = digests.iter().collect();
        assert_eq!(distinct.len(), digests.len());
        assert_eq!(digests[0], drawn("a", None, Dtype::Auto));
    }
}
