//! What all of a run shares. The builder of the graph gives each stage what it needs of it.

use std::path::PathBuf;
use std::sync::Arc;

use crate::config::Resolved;
use crate::plan::Plan;
use crate::stages::report::ReportNeeds;
use crate::stages::score::Scorer;
use crate::stages::source::ImageSource;
use crate::stages::{
    LazyEvaluator, LazyLearner, Log, ProxyKeys, Subjects, TokenizerIdentity, Warnings,
};
use crate::store::{MetricRow, Store, Writer};
use crate::stream::{Board, Meter, Stop};

pub(super) struct Context {
    /// The run's name in the store.
    pub run: String,
    /// The run's directory.
    pub dir: PathBuf,
    pub resolved: Arc<Resolved>,
    pub plan: Arc<Plan>,
    pub subjects: Subjects,
    /// Digest of everything that affects the student: a checkpoint of another one is not continued.
    pub student_identity: String,
    /// The key of what makes each subject's images, a supervisor or a program's own source; empty without proxies.
    pub sources: Vec<String>,
    /// `None` without proxies.
    pub proxy_keys: Option<ProxyKeys>,
    pub store: Arc<Store>,
    /// Loss curves.
    pub metrics: Arc<Writer<MetricRow>>,
    pub board: Board,
    pub stop: Stop,
    pub warnings: Warnings,
    /// A program's own source, in place of supervisors.
    pub source: Option<Arc<dyn ImageSource>>,
    /// The supervisor's backbone for drawing: proxies, and its own samples in the evaluation.
    pub supervisor_sampler: Option<LazyLearner>,
    /// The student's backbone for drawing.
    pub student_sampler: LazyLearner,
    pub evaluator: LazyEvaluator,
    /// Digest of the student's image tokenizer and its tokens per image; `None` for a diffusion student.
    pub tokenizer: Option<TokenizerIdentity>,
}

impl Context {
    /// Where the stage of `meter` notes its work.
    pub fn log(&self, meter: &Meter) -> Log {
        Log {
            run: self.run.clone(),
            meter: meter.clone(),
            stop: self.stop.clone(),
            warnings: self.warnings.clone(),
            metrics: self.metrics.clone(),
        }
    }

    pub fn scorer(&self) -> Scorer {
        Scorer {
            subjects: self.subjects.clone(),
            store: self.store.clone(),
            evaluator: self.evaluator.clone(),
            run: self.run.clone(),
        }
    }

    pub fn report(&self) -> ReportNeeds {
        ReportNeeds {
            run: self.run.clone(),
            dir: self.dir.clone(),
            resolved: self.resolved.clone(),
            plan: self.plan.clone(),
            subjects: self.subjects.clone(),
            supervisors: self.sources.clone(),
            store: self.store.clone(),
            evaluator: self.evaluator.clone(),
        }
    }
}
