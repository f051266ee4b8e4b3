//! The boxes of the dataflow, one file each: a struct of what the stage needs, a stream in, a stream out.
//!
//! ```text
//! references ─┬─▶ supervise ──▶ synthesize ─┬─▶ keep ──┬─▶ tokenize ──▶ train ──┬─▶ evaluate ──▶ report
//!             │                             │          └─▶ score                │
//!             │                             └─ supervisors, when done ──────────┤
//!             └─▶ direct ───────────────────────────────────────────────────────┘
//! ```
//! [`generate`] stands in for synthesize where proxies alone are made, and the batches shared between processes.
//! [`direct`] trains the baseline on the references alone. A pipeline without proxies has nothing between references
//! and train, which then runs [`direct`](direct::Direct) too. Where a program brings its own [`source`] of images, there
//! is no supervise.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Tensor;
use image::RgbImage;
use serde::{Deserialize, Serialize};

use crate::config::DiffusionSampling;
use crate::evaluation::embed::ImageScorer;
use crate::models::{Learner, LearnerOptions, open};
use crate::plan::{Plan, Versions, drawing_key, proxy_keys};
use crate::store::{Claim, MetricRow, MetricStage, ProxyRow, Store, Table, Writer, now_us};
use crate::stream::{Meter, Stop, Worker};
use crate::{Error, Result};

pub use crate::store::Method;

mod class_images;
pub mod direct;
pub mod disk;
pub mod evaluate;
#[cfg(test)]
pub(crate) mod fakes;
pub mod generate;
pub mod keep;
pub mod references;
pub mod report;
pub mod score;
pub mod session;
pub mod source;
pub mod supervise;
pub mod synthesize;
pub mod tokenize;
pub mod train;

/// The subjects of a run, in the order of the plan.
pub type Subjects = Arc<Vec<Arc<Subject>>>;

/// Where a stage notes its work, and by what it hears that it is to stop.
#[derive(Clone)]
pub struct Log {
    /// The run's name in the store.
    pub run: String,
    pub meter: Meter,
    pub stop: Stop,
    pub warnings: Warnings,
    /// Loss curves.
    pub metrics: Arc<Writer<MetricRow>>,
}

impl Log {
    /// Records the numbers of one training step of `stage`; `owner` is whose curve it is.
    ///
    /// # Errors
    /// When they are due to be committed and cannot be.
    pub async fn record(
        &self,
        owner: &str,
        stage: &MetricStage,
        step: usize,
        numbers: &[(&str, f64)],
    ) -> Result<()> {
        for (name, value) in numbers {
            let row = MetricRow {
                run: owner.to_string(),
                stage: stage.clone(),
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

/// The keys of the proxies of a plan.
#[derive(Clone)]
pub struct ProxyKeys {
    pub plan: Arc<Plan>,
    /// What makes each subject's images, in every known version of its key.
    pub sources: Vec<Versions<String>>,
    /// How supervisors sample; `None` for images of a program's own source.
    pub sampling: Option<DiffusionSampling>,
}

impl ProxyKeys {
    /// The keys of the proxies of batch `batch` of the plan: those under which `table` has all of them, or else those
    /// under which they are made now.
    pub fn of(&self, batch: usize, table: &Table<ProxyRow>) -> Vec<String> {
        let keys = self.known(batch);
        keys.found(|keys| table.missing(keys).is_empty()).clone()
    }

    /// The keys of the proxies of batch `batch` of the plan in every known version.
    pub fn known(&self, batch: usize) -> Versions<Vec<String>> {
        let source = &self.sources[self.plan.batch(batch).subject];
        proxy_keys(&self.plan, batch, source, self.sampling.as_ref())
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
#[derive(Debug, Clone)]
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
    /// The proxies, if they have just been made; else they are in the store.
    pub made: Option<Made>,
    /// Keeps other processes from making the same, until it is in the store.
    pub claim: Option<Arc<Claim>>,
}

/// Proxies that have just been made, in the order of the plan.
#[derive(Debug, Clone)]
pub struct Made {
    pub images: Arc<Vec<RgbImage>>,
    /// What each is told by.
    pub captions: Arc<Vec<Caption>>,
}

/// What is noted of an image beside its pixels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caption {
    /// What the student learns it by.
    pub prompt: String,
    /// Where it comes from or how it was sampled, JSON.
    pub settings: String,
}

/// A planned batch of proxies that a training step may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadyBatch {
    /// Its number in the plan.
    pub batch: usize,
    /// The proxies' keys, in the order of the plan.
    pub keys: Vec<String>,
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

/// Opens a learner: the model of a checkpoint, or a stand-in for one.
pub type OpenLearner = Arc<dyn Fn() -> Result<Box<dyn Learner>> + Send + Sync>;

/// Opens the learner that `opening` asks for.
pub fn opener(opening: LearnerOptions) -> OpenLearner {
    Arc::new(move || open(&opening))
}

/// A model that is opened when it is first needed, on its own thread, and shared.
pub struct Lazy<M> {
    /// Digest of what decides what it computes; of a learner, an adapter aside.
    pub digest: String,
    name: String,
    open: Arc<dyn Fn() -> Result<M> + Send + Sync>,
    worker: Arc<tokio::sync::OnceCell<Worker<M>>>,
}

impl<M> Clone for Lazy<M> {
    fn clone(&self) -> Self {
        Self {
            digest: self.digest.clone(),
            name: self.name.clone(),
            open: self.open.clone(),
            worker: self.worker.clone(),
        }
    }
}

impl<M: Send + 'static> Lazy<M> {
    /// The model that `open` opens, on a thread called `name`.
    pub fn new(name: &str, digest: String, open: Arc<dyn Fn() -> Result<M> + Send + Sync>) -> Self {
        Self {
            digest,
            name: name.to_string(),
            open,
            worker: Arc::default(),
        }
    }

    /// The model's thread.
    ///
    /// # Errors
    /// When the model cannot be opened.
    pub async fn get(&self) -> Result<&Worker<M>> {
        self.worker
            .get_or_try_init(|| async {
                let open = self.open.clone();
                Worker::spawn(&self.name, move || open()).await
            })
            .await
    }
}

/// A learner that draws.
pub type LazyLearner = Lazy<Box<dyn Learner>>;

impl LazyLearner {
    /// The learner that `opening` asks for, on a thread called `name`; `base` is the digest of its checkpoint. Its own
    /// digest also names the side length, the type of the weights and the kind of device.
    pub fn of_checkpoint(name: &str, opening: LearnerOptions, base: &str) -> Self {
        let kind = match opening.device.is_cpu() {
            true => "cpu",
            false => "cuda",
        };
        let digest = drawing_key(base, opening.resolution, opening.dtype, kind);
        Self::new(name, digest, opener(opening))
    }
}

/// CLIP and DINO.
#[derive(Clone)]
pub struct LazyEvaluator {
    scorer: Lazy<Box<dyn ImageScorer>>,
    /// Digest of both checkpoints.
    pub digest: String,
    /// Length of a CLIP embedding.
    pub clip: usize,
    /// Length of a DINO embedding.
    pub dino: usize,
}

impl LazyEvaluator {
    /// Evaluators that `open` opens; `digest` and the lengths of their embeddings name their table.
    pub fn new(
        open: impl Fn() -> Result<Box<dyn ImageScorer>> + Send + Sync + 'static,
        digest: String,
        clip: usize,
        dino: usize,
    ) -> Self {
        Self {
            scorer: Lazy::new("evaluator", digest.clone(), Arc::new(open)),
            digest,
            clip,
            dino,
        }
    }

    /// The evaluators' thread.
    ///
    /// # Errors
    /// When they cannot be opened.
    pub async fn get(&self) -> Result<&Worker<Box<dyn ImageScorer>>> {
        self.scorer.get().await
    }
}

/// Something that went wrong without stopping the run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", content = "text", rename_all = "snake_case")]
pub enum Warning {
    /// A photo was left out.
    SetAside(String),
    /// Anything else: unknown words, a full disk.
    Other(String),
}

impl std::fmt::Display for Warning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::SetAside(text) | Self::Other(text) => f.write_str(text),
        }
    }
}

impl<'de> Deserialize<'de> for Warning {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "snake_case")]
        enum Kind {
            SetAside,
            Other,
        }
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Whole {
                kind: Kind,
                text: String,
            },
            /// As older versions wrote it.
            Text(String),
        }
        Ok(match Written::deserialize(deserializer)? {
            Written::Whole {
                kind: Kind::SetAside,
                text,
            } => Self::SetAside(text),
            Written::Whole { text, .. } | Written::Text(text) => Self::Other(text),
        })
    }
}

/// Everything that went wrong in a run without stopping it.
#[derive(Clone, Default)]
pub struct Warnings {
    list: Arc<Mutex<Vec<Warning>>>,
}

impl Warnings {
    /// Notes one, and says it at once.
    pub fn add(&self, warning: Warning) {
        tracing::warn!("{warning}");
        self.list
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(warning);
    }

    /// All of them, in their order.
    pub fn all(&self) -> Vec<Warning> {
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

/// The table of the scores of `evaluator`.
async fn evaluations(
    store: &Store,
    evaluator: &LazyEvaluator,
) -> Result<Table<crate::store::EvaluationRow>> {
    let LazyEvaluator {
        digest, clip, dino, ..
    } = evaluator;
    store.evaluations(digest, *clip, *dino).await
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
            LazyLearner::of_checkpoint("sampler", opening, base).digest
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

    #[test]
    fn a_warning_is_read_as_it_was_written_also_by_an_older_version() {
        let warnings = [
            Warning::SetAside("subject dog1: a.jpg is empty".into()),
            Warning::Other("there is one photo only".into()),
        ];
        let text = serde_json::to_string(&warnings).unwrap();
        let read: Vec<Warning> = serde_json::from_str(&text).unwrap();
        assert_eq!(read, warnings);
        let read: Vec<Warning> = serde_json::from_str("[\"it was full\"]").unwrap();
        assert_eq!(read, [Warning::Other("it was full".into())]);
    }
}
