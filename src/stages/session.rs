//! A training session: a learner on its thread, its checkpoints and its curve. Supervisors, the student and the direct
//! baseline are trained by the same one.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use candle_core::Tensor;

use super::{Log, OpenLearner, Warning};
use crate::config::{Sampling, Training, Tuning};
use crate::models::TrainingExample;
use crate::plan::step_seed;
use crate::store::MetricStage;
use crate::stream::Worker;
use crate::training::{Checkpoints, Trainer, restore};
use crate::{Error, Result, files};

/// What a session trains, and where it notes that.
pub struct SessionSettings {
    pub log: Log,
    /// Its name in the metrics, which also goes into the seeds of its steps.
    pub stage: MetricStage,
    /// Whose curve it is: the run, or the supervisor's key.
    pub owner: String,
    pub training: Training,
    pub checkpoints: Checkpoints,
    /// Where its randomness comes from.
    pub seed: u64,
    /// How samples of what is trained are drawn, which is noted beside it.
    pub sampling: Sampling,
    /// The folder in which adapters stay that are evaluated while it goes on; `None` where none are.
    pub evaluated: Option<PathBuf>,
}

/// An adapter, or a whole checkpoint, that a student starts from.
#[derive(Debug, Clone)]
pub struct InitialAdapter {
    pub dir: PathBuf,
    /// Digest of its files, as the run was planned with.
    pub digest: Option<String>,
}

/// One training.
pub struct TrainingSession {
    settings: SessionSettings,
    /// The stage as the metrics have it.
    name: String,
    worker: Worker<Trainer>,
}

impl TrainingSession {
    /// Opens the learner.
    ///
    /// # Errors
    /// When it cannot be opened, or nothing of it is trained.
    pub async fn start(open: &OpenLearner, settings: SessionSettings) -> Result<Self> {
        let name = settings.stage.to_string();
        let meter = &settings.log.meter;
        meter.say("opens the model");
        let (open, training) = (open.clone(), settings.training.clone());
        let worker = Worker::spawn(&name, move || Trainer::new(open()?, &training)).await?;
        meter.say("");
        Ok(Self {
            settings,
            name,
            worker,
        })
    }

    /// From here on the session is the student's: it starts from `init` and draws its randomness from `seed`.
    ///
    /// # Errors
    /// When `init` is not what the run was planned with, or does not fit the model.
    pub async fn of_student(mut self, init: Option<InitialAdapter>, seed: u64) -> Result<Self> {
        self.settings.seed = seed;
        let Some(InitialAdapter { dir, digest }) = init else {
            return Ok(self);
        };
        self.call(move |trainer| {
            if Some(files::digest_of(&dir)?) != digest {
                return Err(Error::invalid(
                    format!(
                        "{}: this is not the adapter that the run was planned with",
                        dir.display()
                    ),
                    "restore it, or take init_digest out of the pipeline file and start a new run",
                ));
            }
            let learner = trainer.learner();
            restore(&learner.variables(), &learner.read(&dir)?, &dir)
        })
        .await?;
        Ok(self)
    }

    /// Where its randomness comes from.
    pub fn seed(&self) -> u64 {
        self.settings.seed
    }

    /// Runs `job` on the learner's thread.
    ///
    /// # Errors
    /// Those of `job`.
    pub async fn call<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Trainer) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.worker.call(&self.settings.log.meter, job).await
    }

    /// Continues from the newest checkpoint that is whole, and says so where it is not the newest; returns the steps that
    /// are done. Whatever it goes on from, the result is the same.
    ///
    /// # Errors
    /// When checkpoints cannot be read, or a whole one does not fit the model.
    pub async fn resume(&self) -> Result<usize> {
        let checkpoints = self.settings.checkpoints.clone();
        let resumed = self
            .call(move |trainer| trainer.resume(&checkpoints))
            .await?;
        let name = &self.name;
        for (checkpoint, why) in &resumed.damaged {
            tracing::warn!("{name}: {checkpoint} is damaged and set aside: {why}");
        }
        match (resumed.step, resumed.damaged.len(), resumed.foreign) {
            (_, 0, 0) => {}
            (Some(step), ..) => {
                tracing::warn!("{name}: goes on from the checkpoint of step {step}")
            }
            (None, 0, _) => tracing::warn!(
                "{name}: begins at step 0: its checkpoints are of other photos, models or settings"
            ),
            (None, ..) => {
                tracing::warn!(
                    "{name}: begins at step 0, as no checkpoint is whole; the result is the same"
                )
            }
        }
        let step = resumed.step.unwrap_or(0);
        self.settings.log.meter.reuse(step);
        Ok(step)
    }

    /// Where the adapter stays that is evaluated after `step` steps; `None` where all weights are trained, of which each
    /// copy is as large as the model.
    fn evaluated(&self, step: usize) -> Option<PathBuf> {
        let place = self.settings.evaluated.as_ref()?;
        (self.settings.training.tuning == Tuning::Lora)
            .then(|| place.join(format!("step-{step:06}")))
    }

    /// Takes step `step` on weighted batches, records it and, when due, writes a checkpoint.
    ///
    /// # Errors
    /// When a loss or gradient is not finite; a full disk.
    pub async fn step(&self, step: usize, batches: Vec<(f64, Vec<TrainingExample>)>) -> Result<()> {
        let SessionSettings { log, training, .. } = &self.settings;
        let seed = step_seed(self.settings.seed, &self.name, step);
        let progress = self
            .call(move |trainer| trainer.step(step, &batches, seed))
            .await?;
        log.meter.add(1);
        log.meter.say(format!("loss {:.4}", progress.loss));
        let numbers = [
            ("loss", progress.loss),
            ("grad_norm", progress.grad_norm),
            ("learning_rate", progress.learning_rate),
        ];
        let stage = &self.settings.stage;
        log.record(&self.settings.owner, stage, step, &numbers)
            .await?;
        let done = step + 1;
        if done < training.steps && done.is_multiple_of(training.checkpoint_every) {
            self.save(done).await?;
        }
        Ok(())
    }

    /// Commits the curve so far and writes a checkpoint after `steps` steps.
    ///
    /// # Errors
    /// A full disk.
    pub async fn save(&self, steps: usize) -> Result<()> {
        self.settings.log.metrics.flush().await?;
        let checkpoints = self.settings.checkpoints.clone();
        self.call(move |trainer| trainer.save(&checkpoints, steps))
            .await
    }

    /// The current values of what is trained.
    ///
    /// # Errors
    /// When a card cannot be read.
    pub async fn snapshot(&self) -> Result<Arc<BTreeMap<String, Tensor>>> {
        self.call(|trainer| Ok(Arc::new(trainer.snapshot()?))).await
    }

    /// The current values, for an evaluation that is due after `step` steps; a run that resumes later has them too. An
    /// adapter stays for good, in the layout of what is published.
    ///
    /// # Errors
    /// A full disk.
    pub async fn due(&self, step: usize) -> Result<Arc<BTreeMap<String, Tensor>>> {
        let checkpoints = self.settings.checkpoints.clone();
        let adapter = self.evaluated(step);
        let sampling = self.settings.sampling.clone();
        self.call(move |trainer| {
            let values = Arc::new(trainer.snapshot()?);
            checkpoints.keep_due(step, &values)?;
            if let Some(dir) = adapter {
                trainer.write(&dir, &values, Some(&sampling))?;
            }
            Ok(values)
        })
        .await
    }

    /// What [`TrainingSession::due`] kept after `step` steps, with its adapter in place; `None` where nothing was, or it
    /// is damaged, which is said.
    async fn kept(&self, step: usize) -> Result<Option<Arc<BTreeMap<String, Tensor>>>> {
        let values = match self.settings.checkpoints.due(step) {
            Ok(None) => return Ok(None),
            Ok(Some(values)) => Arc::new(values),
            Err(error) => {
                self.settings.log.warnings.add(Warning::Other(format!(
                    "{}: step {step} is not evaluated: what was kept for it is damaged: {error}",
                    self.name
                )));
                return Ok(None);
            }
        };
        if let Some(dir) = self.evaluated(step).filter(|dir| !dir.is_dir()) {
            let values = values.clone();
            let sampling = self.settings.sampling.clone();
            self.call(move |trainer| trainer.write(&dir, &values, Some(&sampling)))
                .await?;
        }
        Ok(Some(values))
    }

    /// What fell due every `every` steps up to `step`, from which this run resumes: the run before it may have ended
    /// while training was ahead of the evaluation.
    ///
    /// # Errors
    /// A full disk.
    pub async fn due_before(
        &self,
        step: usize,
        every: usize,
    ) -> Result<Vec<(usize, Arc<BTreeMap<String, Tensor>>)>> {
        let mut due = Vec::new();
        if every == 0 {
            return Ok(due);
        }
        for earlier in (every..step).step_by(every) {
            if let Some(values) = self.kept(earlier).await? {
                due.push((earlier, values));
            }
        }
        if step > 0 && step.is_multiple_of(every) && step < self.settings.training.steps {
            due.push((step, self.due(step).await?));
        }
        Ok(due)
    }

    /// Publishes what was learnt as the folder `dir`, wholly or not at all. The last checkpoint stays beside it, so
    /// that a finished run is found finished; `resumed` says that it is there already.
    ///
    /// # Errors
    /// A full disk.
    pub async fn publish(
        &self,
        dir: PathBuf,
        resumed: bool,
    ) -> Result<Arc<BTreeMap<String, Tensor>>> {
        if !resumed {
            self.save(self.settings.training.steps).await?;
        }
        let sampling = self.settings.sampling.clone();
        self.call(move |trainer| Ok(Arc::new(trainer.publish(&dir, Some(&sampling))?)))
            .await
    }
}
