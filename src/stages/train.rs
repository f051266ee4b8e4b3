//! train: the student learns from proxies while they arrive, and hands its checkpoints on. The loop itself,
//! [`Course`], is the same for supervisors and for the direct baseline.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use async_stream::try_stream;
use candle_core::Tensor;
use futures::{Stream, StreamExt};

use super::references::examples;
use super::{Checkpoint, Context, Method, ReadyBatch, ended_early, spawn_trainee};
use crate::config::{Sampling, Training, Tuning};
use crate::images::decode_png;
use crate::models::{Example, LearnerOptions, Lesson};
use crate::plan::{Plan, step_seed};
use crate::store::Columns;
use crate::stream::{Meter, Worker};
use crate::training::{Checkpoints, Trainer, restore, tuning};
use crate::{Error, Result, files};

/// One training: a trainee on its thread, its checkpoints, and where its curve goes.
pub(super) struct Course {
    pub context: Arc<Context>,
    pub meter: Meter,
    /// The stage's name in the metrics.
    pub name: String,
    /// Whose curve it is: the run, or the supervisor's key.
    pub owner: String,
    pub settings: Training,
    pub worker: Worker<Trainer>,
    pub checkpoints: Checkpoints,
    seed: u64,
}

impl Course {
    /// Opens the trainee; `dir` is where its checkpoints go and `identity` what they must match.
    pub async fn start(
        context: Arc<Context>,
        meter: Meter,
        name: &str,
        owner: &str,
        opening: LearnerOptions,
        settings: &Training,
        (dir, identity): (PathBuf, String),
    ) -> Result<Self> {
        meter.say("opens the model");
        let opening = LearnerOptions {
            tuning: tuning(settings),
            memory: settings.memory,
            ..opening
        };
        let worker = spawn_trainee(name, opening, settings.clone()).await?;
        meter.say("");
        let seed = context.resolved.seed;
        Ok(Self {
            context,
            meter,
            name: name.to_string(),
            owner: owner.to_string(),
            settings: settings.clone(),
            worker,
            checkpoints: Checkpoints::new(dir, identity),
            seed,
        })
    }

    /// Makes this the course of the run's student: it starts from the adapter that the pipeline names.
    pub async fn of_student(mut self) -> Result<Self> {
        self.seed = self.context.plan.student_seed();
        let student = &self.context.resolved.student;
        let Some(init) = student.init.clone() else {
            return Ok(self);
        };
        let expected = student.init_digest.clone();
        let begin = move |trainee: &mut Trainer| {
            if Some(files::digest_of(&init)?) != expected {
                return Err(Error::invalid(
                    format!(
                        "{}: this is not the adapter that the run was planned with",
                        init.display()
                    ),
                    "restore it, or take init_digest out of the pipeline file and start a new run",
                ));
            }
            let learner = trainee.learner();
            restore(&learner.variables(), &learner.read(&init)?, &init)
        };
        self.worker.call(&self.meter, begin).await?;
        Ok(self)
    }

    /// Where its randomness comes from.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Continues from the newest checkpoint that is whole, and says so where it is not the newest; returns the steps that
    /// are done. Whatever it goes on from, the result is the same.
    pub async fn resume(&self) -> Result<usize> {
        let checkpoints = self.checkpoints.clone();
        let resumed = self
            .worker
            .call(&self.meter, move |trainee| trainee.resume(&checkpoints))
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
        self.meter.reuse(step);
        Ok(step)
    }

    /// Where the adapter stays that is evaluated after `step` steps; `None` where all weights are trained, of which each
    /// copy is as large as the model.
    fn evaluated(&self, step: usize) -> Option<PathBuf> {
        let place = self.context.dir.join("evaluated");
        (self.settings.tuning == Tuning::Lora).then(|| place.join(format!("step-{step:06}")))
    }

    /// Takes step `step` on weighted batches, records it and, when due, writes a checkpoint.
    pub async fn step(&self, step: usize, batches: Vec<(f64, Vec<Lesson>)>) -> Result<()> {
        let seed = step_seed(self.seed, &self.name, step);
        let progress = self
            .worker
            .call(&self.meter, move |trainee| {
                trainee.step(step, &batches, seed)
            })
            .await?;
        self.meter.add(1);
        self.meter.say(format!("loss {:.4}", progress.loss));
        let numbers = [
            ("loss", progress.loss),
            ("grad_norm", progress.grad_norm),
            ("learning_rate", progress.learning_rate),
        ];
        self.context
            .record(&self.owner, &self.name, step, &numbers)
            .await?;
        let done = step + 1;
        if done < self.settings.steps && done.is_multiple_of(self.settings.checkpoint_every) {
            self.save(done).await?;
        }
        Ok(())
    }

    /// Commits the curve so far and writes a checkpoint after `steps` steps.
    pub async fn save(&self, steps: usize) -> Result<()> {
        self.context.metrics.flush().await?;
        let checkpoints = self.checkpoints.clone();
        self.worker
            .call(&self.meter, move |trainee| {
                trainee.save(&checkpoints, steps)
            })
            .await
    }

    /// The current values of what is trained.
    pub async fn snapshot(&self) -> Result<Arc<BTreeMap<String, Tensor>>> {
        self.worker
            .call(&self.meter, |trainee| Ok(Arc::new(trainee.snapshot()?)))
            .await
    }

    /// The current values, for an evaluation that is due after `step` steps; a run that resumes later has them too. An
    /// adapter stays for good, in the layout of what is published.
    pub async fn due(&self, step: usize) -> Result<Arc<BTreeMap<String, Tensor>>> {
        let checkpoints = self.checkpoints.clone();
        let adapter = self.evaluated(step);
        let sampling = self.context.resolved.student.sampling.clone();
        self.worker
            .call(&self.meter, move |trainee| {
                let values = Arc::new(trainee.snapshot()?);
                checkpoints.keep_due(step, &values)?;
                if let Some(dir) = adapter {
                    trainee.write(&dir, &values, Some(&sampling))?;
                }
                Ok(values)
            })
            .await
    }

    /// What [`Course::due`] kept after `step` steps, with its adapter in place; `None` where nothing was, or it is damaged,
    /// which is said.
    async fn kept(&self, step: usize) -> Result<Option<Arc<BTreeMap<String, Tensor>>>> {
        let values = match self.checkpoints.due(step) {
            Ok(None) => return Ok(None),
            Ok(Some(values)) => Arc::new(values),
            Err(error) => {
                self.context.warnings.add(format!(
                    "{}: step {step} is not evaluated: what was kept for it is damaged: {error}",
                    self.name
                ));
                return Ok(None);
            }
        };
        if let Some(dir) = self.evaluated(step).filter(|dir| !dir.is_dir()) {
            let values = values.clone();
            let sampling = self.context.resolved.student.sampling.clone();
            self.worker
                .call(&self.meter, move |trainee| {
                    trainee.write(&dir, &values, Some(&sampling))
                })
                .await?;
        }
        Ok(Some(values))
    }

    /// What fell due every `every` steps up to `step`, from which this run resumes: the run before it may have ended
    /// while training was ahead of the evaluation.
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
        if step > 0 && step.is_multiple_of(every) && step < self.settings.steps {
            due.push((step, self.due(step).await?));
        }
        Ok(due)
    }

    /// Publishes what was learnt as the folder `dir`, wholly or not at all. The last checkpoint stays beside it, so
    /// that a finished run is found finished; `resumed` says that it is there already. `sampling` is how its samples are
    /// drawn.
    pub async fn publish(
        &self,
        dir: PathBuf,
        resumed: bool,
        sampling: Sampling,
    ) -> Result<Arc<BTreeMap<String, Tensor>>> {
        if !resumed {
            self.save(self.settings.steps).await?;
        }
        self.worker
            .call(&self.meter, move |trainee| {
                Ok(Arc::new(trainee.publish(&dir, Some(&sampling))?))
            })
            .await
    }
}

/// What the student reads: examples by proxy number, taken from the store when a step first needs them, and kept until
/// the last step that does.
struct Examples {
    known: BTreeMap<usize, Example>,
    /// The last step of the plan that uses a proxy, by its number.
    last_use: BTreeMap<usize, usize>,
}

impl Examples {
    /// None yet, for the steps from `step` on.
    fn new(plan: &Plan, step: usize, steps: usize) -> Self {
        let uses =
            (step..steps).flat_map(|step| plan.lessons(step).iter().map(move |&n| (n, step)));
        Self {
            known: BTreeMap::new(),
            last_use: uses.collect(),
        }
    }

    /// The lessons of `step`. What no later step needs is let go.
    fn lessons(&mut self, plan: &Plan, step: usize) -> Vec<Lesson> {
        let numbers = plan.lessons(step);
        let lesson = |&number: &usize| Lesson {
            example: self.known[&number].clone(),
            prompt: plan.proxy(number).prompt.clone(),
        };
        let lessons = numbers.iter().map(lesson).collect();
        for number in numbers {
            if self.last_use.get(number) == Some(&step) {
                self.known.remove(number);
            }
        }
        lessons
    }

    /// Reads the examples of a batch that has just become ready.
    async fn read(&mut self, context: &Context, course: &Course, ready: &ReadyBatch) -> Result<()> {
        let numbers = context.plan.batch(ready.batch).numbers.clone();
        if !numbers
            .clone()
            .any(|number| self.last_use.contains_key(&number))
        {
            return Ok(());
        }
        let lost = || super::ended_early("train");
        match &context.tokenizer {
            Some(tokenizer) => {
                let table = context
                    .store
                    .tokens(&tokenizer.digest, tokenizer.count)
                    .await?;
                for (number, row) in numbers.zip(table.get(&ready.keys, Columns::All).await?) {
                    self.known
                        .insert(number, Example::Tokens(row.ok_or_else(lost)?.tokens));
                }
            }
            None => {
                let rows = context
                    .store
                    .proxies()
                    .await?
                    .get(&ready.keys, Columns::All)
                    .await?;
                let examples = course
                    .worker
                    .call(&course.meter, move |trainee| {
                        let images = rows.into_iter().map(|row| {
                            let row = row.ok_or_else(lost)?;
                            decode_png(&row.image, &row.key)
                        });
                        let images = images.collect::<Result<Vec<_>>>()?;
                        examples(trainee.learner(), &images)
                    })
                    .await?;
                self.known.extend(numbers.zip(examples));
            }
        }
        let last_use = &self.last_use;
        self.known.retain(|number, _| last_use.contains_key(number));
        Ok(())
    }
}

/// Trains the student on the batches of `input`, each step as soon as the proxies that it may use are committed.
/// Yields the untouched student if the evaluation wants it, the checkpoints that are due, and the last.
pub fn train(
    context: Arc<Context>,
    opening: LearnerOptions,
    input: impl Stream<Item = ReadyBatch> + Send,
    first_training_proxy: Arc<AtomicUsize>,
    meter: Meter,
) -> impl Stream<Item = Result<Checkpoint>> + Send {
    try_stream! {
        let student = &context.resolved.student;
        let steps = student.training.steps;
        let evaluation = &context.resolved.evaluation;
        let everyone: Vec<usize> = (0..context.subjects.len()).collect();
        let checkpoint = |method, step, values| Checkpoint { method, step, subjects: everyone.clone(), values };
        let identity = format!("student {}", context.student_identity);
        let place = (context.dir.join("checkpoints/student"), identity);
        let course =
            Course::start(context.clone(), meter.clone(), "train", &context.run, opening, &student.training, place).await?;
        if evaluation.untouched {
            yield checkpoint(Method::Untouched, 0, course.snapshot().await?);
        }
        let course = course.of_student().await?;
        let mut step = course.resume().await?;
        let resumed = step == steps;
        let mut input = std::pin::pin!(input);
        let mut examples = Examples::new(&context.plan, step, steps);
        let mut batches = 0;
        for (step, values) in course.due_before(step, evaluation.every).await? {
            yield checkpoint(Method::Student, step, values);
        }
        while step < steps && !context.stop.requested() {
            let needed = context.plan.needs(step);
            while batches < needed {
                match input.next().await {
                    Some(ready) => examples.read(&context, &course, &ready).await?,
                    None if context.stop.requested() => break,
                    None => Err(ended_early("train"))?,
                }
                batches += 1;
            }
            if batches < needed {
                break;
            }
            let lessons = examples.lessons(&context.plan, step);
            let committed = batches.checked_sub(1).map_or(0, |last| context.plan.batch(last).numbers.end);
            first_training_proxy.fetch_min(committed, Relaxed);
            course.step(step, vec![(1.0, lessons)]).await?;
            step += 1;
            if evaluation.every > 0 && step.is_multiple_of(evaluation.every) && step < steps {
                yield checkpoint(Method::Student, step, course.due(step).await?);
            }
        }
        if step < steps {
            course.save(step).await?;
            return;
        }
        let values = course.publish(context.dir.join("student"), resumed, student.sampling.clone()).await?;
        yield checkpoint(Method::Student, steps, values);
        // What is still on its way only has to be committed, which it is; taking it lets the stages before end.
        while input.next().await.is_some() {}
    }
}
