//! direct: the student's backbone tuned on the references alone (the paper's Table 1), plain or augmented (Table 7):
//! as a baseline beside the proxies, and as the student itself where the pipeline names no proxies.

use std::path::PathBuf;
use std::sync::Arc;

use async_stream::try_stream;
use futures::{Stream, StreamExt};
use image::RgbImage;
use rand::SeedableRng;

use super::references::{at_side, examples};
use super::session::{SessionSettings, TrainingSession};
use super::train::StudentSettings;
use super::{Checkpoint, Log, Method, OpenLearner, Subjects};
use crate::config::{Sampling, Training, prompts};
use crate::images::augment;
use crate::models::{Example, TrainingExample};
use crate::plan::{Plan, Reference, Schedule, step_seed};
use crate::store::MetricStage;
use crate::training::Checkpoints;
use crate::{Error, Result, nn};

/// What is tuned on references.
#[derive(Clone)]
pub enum Tuned {
    /// The student itself.
    Student(StudentSettings),
    /// A baseline beside the student.
    Baseline(BaselineSettings),
}

/// How the baseline learns.
#[derive(Clone)]
pub struct BaselineSettings {
    /// Opens it for training.
    pub open: OpenLearner,
    pub training: Training,
    /// How its samples are drawn.
    pub sampling: Sampling,
    /// Its checkpoints while it learns.
    pub checkpoints: Checkpoints,
    /// The run's directory.
    pub dir: PathBuf,
}

/// What the stage needs.
pub struct Direct {
    pub plan: Arc<Plan>,
    pub subjects: Subjects,
    pub tuned: Tuned,
    /// The photos are changed at random each time they are learnt.
    pub augmented: bool,
    /// The run's.
    pub seed: u64,
    pub log: Log,
}

impl Direct {
    /// Waits until all subjects have come through `input`, then trains. Yields the checkpoints that are due: for the
    /// baseline its last, for the student all that the evaluation wants.
    pub fn run(
        self,
        input: impl Stream<Item = usize> + Send,
    ) -> impl Stream<Item = Result<Checkpoint>> + Send {
        try_stream! {
            let mut input = std::pin::pin!(input);
            let mut subjects = Vec::new();
            while let Some(subject) = input.next().await {
                subjects.push(subject);
            }
            if subjects.len() < self.subjects.len() {
                return;
            }
            let checkpoint = |method, step, values| Checkpoint { method, step, subjects: subjects.clone(), values };
            let (method, training, every, place) = match &self.tuned {
                Tuned::Student(student) => {
                    (Method::Student, &student.training, student.evaluate_every, student.dir.join("student"))
                }
                Tuned::Baseline(baseline) => (Method::Direct, &baseline.training, 0, baseline.dir.join("direct")),
            };
            let mut session = self.session().await?;
            if let Tuned::Student(student) = &self.tuned {
                if student.untouched {
                    yield checkpoint(Method::Untouched, 0, session.snapshot().await?);
                }
                session = session.of_student(student.init.clone(), self.plan.student_seed()).await?;
            }
            let photos = Photos::prepare(&self, &session).await?;
            let mut step = session.resume().await?;
            let resumed = step == training.steps;
            for (step, values) in session.due_before(step, every).await? {
                yield checkpoint(method, step, values);
            }
            while step < training.steps && !self.log.stop.requested() {
                let pairs = photos.batch(&self, &session, step).await?;
                session.step(step, vec![(1.0, pairs)]).await?;
                step += 1;
                if every > 0 && step.is_multiple_of(every) && step < training.steps {
                    yield checkpoint(method, step, session.due(step).await?);
                }
            }
            if step < training.steps {
                session.save(step).await?;
                return;
            }
            let values = session.publish(place, resumed).await?;
            yield checkpoint(method, step, values);
        }
    }

    async fn session(&self) -> Result<TrainingSession> {
        let baseline = match &self.tuned {
            Tuned::Student(student) => return student.session(&self.log, self.seed).await,
            Tuned::Baseline(baseline) => baseline,
        };
        let settings = SessionSettings {
            log: self.log.clone(),
            stage: MetricStage::Direct,
            owner: self.log.run.clone(),
            training: baseline.training.clone(),
            checkpoints: baseline.checkpoints.clone(),
            seed: self.seed,
            sampling: baseline.sampling.clone(),
            evaluated: None,
        };
        TrainingSession::start(&baseline.open, settings).await
    }

    /// Positions in the plan's references of what step `step` learns from.
    fn planned(&self, step: usize) -> Result<&[usize]> {
        match &self.tuned {
            Tuned::Student(_) => Ok(self.plan.examples(step)),
            Tuned::Baseline(_) => {
                let planned = self.plan.direct().map(|plan: &Schedule| plan.batch(step));
                planned.ok_or_else(|| Error::Invalid {
                    what: "a baseline that is not planned".into(),
                    hint: None,
                })
            }
        }
    }
}

/// The photos of all subjects as a student sees them, in the order of the plan's references.
struct Photos {
    images: Arc<Vec<RgbImage>>,
    examples: Vec<Example>,
    prompts: Vec<String>,
}

impl Photos {
    async fn prepare(needs: &Direct, session: &TrainingSession) -> Result<Self> {
        let subjects = needs.subjects.clone();
        let (images, examples) = session
            .call(move |trainer| {
                let learner = trainer.learner();
                let (mut resized, mut learnt) = (Vec::new(), Vec::new());
                for subject in subjects.iter() {
                    resized.extend(at_side(&subject.images, learner.resolution()));
                    learnt.extend(examples(learner, &subject.images)?);
                }
                Ok((resized, learnt))
            })
            .await?;
        let prompt = |photo: &Reference| {
            let subject = &needs.subjects[photo.subject];
            let own = subject.captions.get(photo.index).cloned().flatten();
            own.unwrap_or_else(|| prompts::fill(PROMPT, &subject.token, &subject.class))
        };
        let prompts = needs.plan.references().iter().map(prompt);
        Ok(Self {
            images: Arc::new(images),
            examples,
            prompts: prompts.collect(),
        })
    }

    async fn batch(
        &self,
        needs: &Direct,
        session: &TrainingSession,
        step: usize,
    ) -> Result<Vec<TrainingExample>> {
        let indices = needs.planned(step)?;
        let examples = match needs.augmented {
            false => indices.iter().map(|&i| self.examples[i].clone()).collect(),
            true => {
                let seed = step_seed(session.seed(), "augment", step);
                let (images, own) = (self.images.clone(), indices.to_vec());
                session
                    .call(move |trainer| {
                        let mut generator = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
                        let changed: Vec<_> = own
                            .iter()
                            .map(|&index| augment(&images[index], &mut generator))
                            .collect();
                        nn::no_grad(|| trainer.learner().encode(&changed))
                    })
                    .await?
            }
        };
        let pairs = examples.into_iter().zip(indices);
        let pair = |(example, &index): (Example, &usize)| TrainingExample {
            example,
            prompt: self.prompts[index].clone(),
        };
        Ok(pairs.map(pair).collect())
    }
}

/// The caption of a reference, as in the paper.
pub(crate) const PROMPT: &str = "a {token} {class}";

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::SeqCst;

    use futures::stream;

    use super::super::fakes::{Fakes, all, next};
    use super::*;

    async fn stage(fakes: &Fakes, augmented: bool) -> Direct {
        let baseline = BaselineSettings {
            open: fakes.learner(),
            training: fakes.resolved.direct.training.clone(),
            sampling: fakes.resolved.student.sampling.clone(),
            checkpoints: Checkpoints::new(fakes.dir.path().join("checkpoints"), "direct"),
            dir: fakes.dir.path().to_path_buf(),
        };
        Direct {
            plan: fakes.plan.clone(),
            subjects: fakes.subjects.clone(),
            tuned: Tuned::Baseline(baseline),
            augmented,
            seed: fakes.resolved.seed,
            log: fakes.log("direct").await,
        }
    }

    fn planned(fakes: &Fakes, step: usize) -> Vec<String> {
        let photos = fakes.plan.direct().unwrap().batch(step).iter();
        let subject = |&photo: &usize| &fakes.subjects[fakes.plan.references()[photo].subject];
        let prompt = |s: &Arc<super::super::Subject>| prompts::fill(PROMPT, &s.token, &s.class);
        photos.map(subject).map(prompt).collect()
    }

    #[tokio::test]
    async fn the_photos_are_learnt_as_planned_once_all_subjects_have_come() {
        let fakes = Fakes::new(&[]).await;
        let none = all(stage(&fakes, false).await.run(stream::iter([0])))
            .await
            .unwrap();
        assert_eq!((none.len(), fakes.work.of_learners()), (0, [0; 4]));
        let learnt = all(stage(&fakes, false).await.run(stream::iter([0, 1])))
            .await
            .unwrap();
        let [checkpoint] = &learnt[..] else {
            panic!("{learnt:?}")
        };
        assert_eq!((checkpoint.method, checkpoint.step), (Method::Direct, 2));
        let expected = [planned(&fakes, 0), planned(&fakes, 1)].concat();
        assert_eq!(*fakes.work.learnt.lock().unwrap(), expected);
        // Each of six photos is encoded once.
        assert_eq!(fakes.work.encoded.load(SeqCst), 6);
        // The same folder again: nothing is learnt.
        let steps = fakes.work.losses.load(SeqCst);
        let again = all(stage(&fakes, false).await.run(stream::iter([0, 1])))
            .await
            .unwrap();
        let digest = |c: &Checkpoint| crate::files::values_digest(&c.values).unwrap();
        assert_eq!(digest(&again[0]), digest(checkpoint));
        assert_eq!((steps, fakes.work.losses.load(SeqCst)), (2, 2));
    }

    #[tokio::test]
    async fn augmented_photos_are_encoded_anew_for_each_step() {
        let fakes = Fakes::new(&[]).await;
        all(stage(&fakes, true).await.run(stream::iter([0, 1])))
            .await
            .unwrap();
        let batch = fakes.resolved.direct.training.batch_size;
        assert_eq!(fakes.work.encoded.load(SeqCst), 6 + 2 * batch);
    }

    #[tokio::test]
    async fn a_stop_leaves_a_checkpoint_and_no_plan_is_an_error() {
        let fakes = Fakes::new(&[]).await;
        fakes.stop.request();
        let stopped = stage(&fakes, false).await.run(stream::iter([0, 1]));
        let mut stopped = std::pin::pin!(stopped);
        assert!(next(&mut stopped).await.is_none());
        assert!(
            fakes
                .dir
                .path()
                .join("checkpoints/checkpoint-000000")
                .is_dir()
        );
        assert_eq!(fakes.work.losses.load(SeqCst), 0);
        let without = fakes.again(&["direct.enabled=false"]);
        let error = all(stage(&without, false).await.run(stream::iter([0, 1]))).await;
        assert!(error.unwrap_err().to_string().contains("not planned"));
    }
}
