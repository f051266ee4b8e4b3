//! train: the student learns from proxies while they arrive, and hands its checkpoints on.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use async_stream::try_stream;
use futures::{Stream, StreamExt};

use super::session::{InitialAdapter, SessionSettings, TrainingSession};
use super::{
    Checkpoint, Log, Method, OpenLearner, ReadyBatch, TokenizerIdentity, ended_early, references,
};
use crate::Result;
use crate::config::{Sampling, Training};
use crate::images::decode_png;
use crate::models::{Example, TrainingExample};
use crate::plan::Plan;
use crate::store::{Columns, MetricStage, Store};
use crate::training::Checkpoints;

/// How the student of a run learns, whatever it learns from.
#[derive(Clone)]
pub struct StudentSettings {
    /// Opens it for training.
    pub open: OpenLearner,
    pub training: Training,
    /// How its samples are drawn.
    pub sampling: Sampling,
    pub init: Option<InitialAdapter>,
    /// Steps between evaluated checkpoints; 0: the last alone.
    pub evaluate_every: usize,
    /// Evaluate it before it has learnt anything, too.
    pub untouched: bool,
    /// Its checkpoints while it learns.
    pub checkpoints: Checkpoints,
    /// The run's directory.
    pub dir: PathBuf,
}

impl StudentSettings {
    /// A session of this student, as it is opened; `seed` is the run's.
    pub(super) async fn session(&self, log: &Log, seed: u64) -> Result<TrainingSession> {
        let settings = SessionSettings {
            log: log.clone(),
            stage: MetricStage::Train,
            owner: log.run.clone(),
            training: self.training.clone(),
            checkpoints: self.checkpoints.clone(),
            seed,
            sampling: self.sampling.clone(),
            evaluated: Some(self.dir.join("evaluated")),
        };
        TrainingSession::start(&self.open, settings).await
    }
}

/// What the stage needs.
pub struct Train {
    pub plan: Arc<Plan>,
    /// How many subjects there are.
    pub subjects: usize,
    pub student: StudentSettings,
    pub store: Arc<Store>,
    /// Whose tokens the student reads; `None` for a diffusion student, which reads pixels.
    pub tokenizer: Option<TokenizerIdentity>,
    /// How many proxies are committed when the first step is taken goes here, if it is less.
    pub first_training_proxy: Arc<AtomicUsize>,
    /// The run's.
    pub seed: u64,
    pub log: Log,
}

impl Train {
    /// Trains the student on the batches of `input`, each step as soon as the proxies that it may use are committed.
    /// Yields the untouched student if the evaluation wants it, the checkpoints that are due, and the last.
    pub fn run(
        self,
        input: impl Stream<Item = ReadyBatch> + Send,
    ) -> impl Stream<Item = Result<Checkpoint>> + Send {
        try_stream! {
            let Self { plan, student, log, .. } = &self;
            let (steps, every) = (student.training.steps, student.evaluate_every);
            let everyone: Vec<usize> = (0..self.subjects).collect();
            let checkpoint = |method, step, values| Checkpoint { method, step, subjects: everyone.clone(), values };
            let session = student.session(log, self.seed).await?;
            if student.untouched {
                yield checkpoint(Method::Untouched, 0, session.snapshot().await?);
            }
            let session = session.of_student(student.init.clone(), plan.student_seed()).await?;
            let mut step = session.resume().await?;
            let resumed = step == steps;
            let mut input = std::pin::pin!(input);
            let mut examples = Examples::new(plan, step, steps);
            let mut batches = 0;
            for (step, values) in session.due_before(step, every).await? {
                yield checkpoint(Method::Student, step, values);
            }
            while step < steps && !log.stop.requested() {
                let needed = plan.needs(step);
                while batches < needed {
                    match input.next().await {
                        Some(ready) => self.read(&mut examples, &session, &ready).await?,
                        None if log.stop.requested() => break,
                        None => Err(ended_early("train"))?,
                    }
                    batches += 1;
                }
                if batches < needed {
                    break;
                }
                let pairs = examples.take(plan, step)?;
                let committed = batches.checked_sub(1).map_or(0, |last| plan.batch(last).numbers.end);
                self.first_training_proxy.fetch_min(committed, Relaxed);
                session.step(step, vec![(1.0, pairs)]).await?;
                step += 1;
                if every > 0 && step.is_multiple_of(every) && step < steps {
                    yield checkpoint(Method::Student, step, session.due(step).await?);
                }
            }
            if step < steps {
                session.save(step).await?;
                return;
            }
            let values = session.publish(student.dir.join("student"), resumed).await?;
            yield checkpoint(Method::Student, steps, values);
            // What is still on its way only has to be committed, which it is; taking it lets the stages before end.
            while input.next().await.is_some() {}
        }
    }

    /// Reads the examples of a batch that has just become ready.
    async fn read(
        &self,
        examples: &mut Examples,
        session: &TrainingSession,
        ready: &ReadyBatch,
    ) -> Result<()> {
        let numbers = self.plan.batch(ready.batch).numbers.clone();
        if !numbers.clone().any(|number| examples.will_be_used(number)) {
            return Ok(());
        }
        let lost = || ended_early("train");
        let proxies = self.store.proxies().await?;
        let columns = match &self.tokenizer {
            Some(_) => Columns::WithoutPictures,
            None => Columns::All,
        };
        let rows = proxies.get(&ready.keys, columns).await?;
        let rows = rows.into_iter().map(|row| row.ok_or_else(lost));
        let rows = rows.collect::<Result<Vec<_>>>()?;
        let prompts: Vec<String> = rows.iter().map(|row| row.prompt.clone()).collect();
        let read: Vec<Example> = match &self.tokenizer {
            Some(TokenizerIdentity { digest, count }) => {
                let table = self.store.tokens(digest, *count).await?;
                let rows = table.get(&ready.keys, Columns::All).await?;
                let tokens = rows.into_iter().map(|row| row.map(|row| row.tokens));
                let tokens = tokens.map(|tokens| tokens.map(Example::Tokens).ok_or_else(lost));
                tokens.collect::<Result<_>>()?
            }
            None => {
                session
                    .call(move |trainer| {
                        let images = rows.iter().map(|row| decode_png(&row.image, &row.key));
                        let images = images.collect::<Result<Vec<_>>>()?;
                        references::examples(trainer.learner(), &images)
                    })
                    .await?
            }
        };
        let pairs = read.into_iter().zip(prompts);
        let pairs = pairs.map(|(example, prompt)| TrainingExample { example, prompt });
        examples.add(numbers.zip(pairs));
        Ok(())
    }
}

/// What the student reads: examples by proxy number, taken from the store when a step first needs them, and kept until
/// the last step that does.
struct Examples {
    known: BTreeMap<usize, TrainingExample>,
    /// The last step of the plan that uses a proxy, by its number.
    last_use: BTreeMap<usize, usize>,
}

impl Examples {
    /// None yet, for the steps from `step` on.
    fn new(plan: &Plan, step: usize, steps: usize) -> Self {
        let uses =
            (step..steps).flat_map(|step| plan.examples(step).iter().map(move |&n| (n, step)));
        Self {
            known: BTreeMap::new(),
            last_use: uses.collect(),
        }
    }

    fn will_be_used(&self, number: usize) -> bool {
        self.last_use.contains_key(&number)
    }

    fn add(&mut self, pairs: impl Iterator<Item = (usize, TrainingExample)>) {
        let last_use = &self.last_use;
        let used = pairs.filter(|(number, _)| last_use.contains_key(number));
        self.known.extend(used);
    }

    /// What `step` learns from. What no later step needs is let go.
    fn take(&mut self, plan: &Plan, step: usize) -> Result<Vec<TrainingExample>> {
        let numbers = plan.examples(step);
        let known = numbers.iter().map(|number| self.known.get(number).cloned());
        let pairs: Option<Vec<TrainingExample>> = known.collect();
        for number in numbers {
            if self.last_use.get(number) == Some(&step) {
                self.known.remove(number);
            }
        }
        pairs.ok_or_else(|| ended_early("train"))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::SeqCst;

    use futures::stream;

    use super::super::fakes::{Fakes, all, next, settles};
    use super::*;
    use crate::stream::channel;

    async fn stage(fakes: &Fakes) -> Train {
        let (identity, _) = fakes.tokenizer();
        Train {
            plan: fakes.plan.clone(),
            subjects: fakes.subjects.len(),
            student: StudentSettings {
                open: fakes.learner(),
                training: fakes.resolved.student.training.clone(),
                sampling: fakes.resolved.student.sampling.clone(),
                init: None,
                evaluate_every: fakes.resolved.evaluation.every,
                untouched: fakes.resolved.evaluation.untouched,
                checkpoints: Checkpoints::new(fakes.dir.path().join("checkpoints"), "student"),
                dir: fakes.dir.path().to_path_buf(),
            },
            store: fakes.store.clone(),
            tokenizer: Some(identity),
            first_training_proxy: Arc::new(AtomicUsize::new(usize::MAX)),
            seed: fakes.resolved.seed,
            log: fakes.log("train").await,
        }
    }

    /// All batches of the plan, with their tokens in the store.
    async fn ready(fakes: &Fakes) -> Vec<ReadyBatch> {
        let kept = fakes.kept().await;
        let (identity, open) = fakes.tokenizer();
        let stage = super::super::tokenize::Tokenize {
            store: fakes.store.clone(),
            tokenizer: Some(identity),
            open,
            log: fakes.log("tokenize").await,
        };
        let ready = all(stage.run(stream::iter(kept))).await.unwrap();
        fakes.work.encoded.store(0, SeqCst);
        ready
    }

    /// The prompts of the examples that the plan wants learnt from step `first` on.
    fn planned(fakes: &Fakes, first: usize) -> Vec<String> {
        let steps = first..fakes.resolved.student.training.steps;
        let numbers = steps.flat_map(|step| fakes.plan.examples(step).to_vec());
        numbers
            .map(|n| fakes.plan.proxies()[n].prompt.clone())
            .collect()
    }

    fn told(checkpoints: &[Checkpoint]) -> Vec<(Method, usize)> {
        checkpoints.iter().map(|c| (c.method, c.step)).collect()
    }

    const DUE: [(Method, usize); 3] = [
        (Method::Untouched, 0),
        (Method::Student, 4),
        (Method::Student, 8),
    ];

    #[tokio::test]
    async fn it_learns_what_is_planned_in_order_and_hands_on_what_is_due() {
        let fakes = Fakes::new(&["evaluation.untouched=true"]).await;
        let ready = ready(&fakes).await;
        let stage = stage(&fakes).await;
        let first = stage.first_training_proxy.clone();
        let checkpoints = all(stage.run(stream::iter(ready))).await.unwrap();
        assert_eq!(told(&checkpoints), DUE);
        assert_eq!(*fakes.work.learnt.lock().unwrap(), planned(&fakes, 0));
        assert_eq!(
            first.load(SeqCst),
            fakes.plan.batch(fakes.plan.needs(0) - 1).numbers.end
        );
        assert!(fakes.dir.path().join("student").is_dir());
        assert!(fakes.dir.path().join("evaluated/step-000004").is_dir());
        // The tokens come from the store.
        assert_eq!(fakes.work.encoded.load(SeqCst), 0);
    }

    #[tokio::test]
    async fn it_takes_as_many_steps_as_the_batches_allow_that_have_come() {
        let fakes = Fakes::new(&["evaluation.every=0", "student.overlap=1"]).await;
        let ready = ready(&fakes).await;
        let meters = ["tokenize", "train"].map(|name| fakes.board.meter(name, "items"));
        let (outlet, inlet) = channel(&fakes.board, "tokens", 6, &meters[0], &meters[1]);
        let stage = stage(&fakes).await;
        let running = tokio::spawn(async move { all(stage.run(inlet)).await });
        let mut given = 0;
        for batch in ready {
            outlet.send(batch).await.ok().unwrap();
            given += 1;
            let steps = fakes.resolved.student.training.steps;
            let allowed = (0..steps)
                .take_while(|&s| fakes.plan.needs(s) <= given)
                .count();
            let taken = || fakes.work.losses.load(SeqCst);
            settles(taken, allowed, &format!("after {given} batches")).await;
        }
        drop(outlet);
        let checkpoints = running.await.unwrap().unwrap();
        assert_eq!(checkpoints.last().unwrap().step, 8);
    }

    #[tokio::test]
    async fn a_stopped_student_goes_on_to_the_same_values_and_a_finished_one_is_not_trained_again()
    {
        let whole = Fakes::new(&[]).await;
        let batches = ready(&whole).await;
        let expected = all(stage(&whole).await.run(stream::iter(batches.clone())))
            .await
            .unwrap();
        let mut fakes = whole.again(&[]);
        {
            let running = stage(&fakes).await.run(stream::iter(batches.clone()));
            let mut running = std::pin::pin!(running);
            // The first checkpoints: of step 0, if it is evaluated, and of step 4.
            while next(&mut running).await.unwrap().unwrap().step < 4 {}
            fakes.stop.request();
            assert!(next(&mut running).await.is_none());
        }
        assert_eq!(fakes.work.losses.load(SeqCst), 4);
        for (losses, learnt) in [(4, planned(&whole, 4)), (0, Vec::new())] {
            let dir = fakes.dir;
            fakes = whole.again(&[]);
            fakes.dir = dir;
            let checkpoints = all(stage(&fakes).await.run(stream::iter(batches.clone()))).await;
            let checkpoints = checkpoints.unwrap();
            assert_eq!(fakes.work.losses.load(SeqCst), losses);
            assert_eq!(*fakes.work.learnt.lock().unwrap(), learnt);
            let digest = |c: &Checkpoint| crate::files::values_digest(&c.values).unwrap();
            let (last, whole) = (checkpoints.last().unwrap(), expected.last().unwrap());
            assert_eq!((last.step, digest(last)), (8, digest(whole)));
            // What was due before the stop is evaluated still.
            assert!(told(&checkpoints).contains(&(Method::Student, 4)));
        }
    }

    #[tokio::test]
    async fn an_input_that_ends_too_early_and_a_lost_row_are_errors() {
        let fakes = Fakes::new(&[]).await;
        let batches = ready(&fakes).await;
        let first = batches[..1].to_vec();
        let error = all(stage(&fakes).await.run(stream::iter(first)))
            .await
            .unwrap_err();
        assert!(error.to_string().starts_with("train: "), "{error}");
        let fakes = fakes.again(&[]);
        let mut lost = batches;
        lost[0].keys[0] = "no such key".into();
        let error = all(stage(&fakes).await.run(stream::iter(lost)))
            .await
            .unwrap_err();
        assert!(error.to_string().starts_with("train: "), "{error}");
        assert_eq!(fakes.work.losses.load(SeqCst), 0);
    }
}
