//! direct: the student's backbone tuned on the references alone (the paper's Table 1), plain or augmented (Table 7):
//! as a baseline beside the proxies, and as the student itself where the pipeline names no proxies.

use std::sync::Arc;

use async_stream::try_stream;
use futures::{Stream, StreamExt};
use rand::SeedableRng;

use super::references::{at_side, examples};
use super::train::Course;
use super::{Checkpoint, Context, Method};
use crate::config::{Source, Training, prompts};
use crate::images::augment;
use crate::models::{LearnerOptions, Lesson};
use crate::plan::{Reference, step_seed};
use crate::stream::Meter;
use crate::{Result, nn};

/// What is tuned on references: the baseline or the student.
#[derive(Debug, Clone)]
pub struct Tuned {
    pub method: Method,
    pub source: Source,
    pub settings: Training,
}

/// Waits until all subjects have come through `input`, then trains. Yields the checkpoints that are due: for the
/// baseline its last, for the student all that the evaluation wants.
pub fn direct(
    context: Arc<Context>,
    opening: LearnerOptions,
    tuned: Tuned,
    input: impl Stream<Item = usize> + Send,
    meter: Meter,
) -> impl Stream<Item = Result<Checkpoint>> + Send {
    try_stream! {
        let mut input = std::pin::pin!(input);
        let mut subjects = Vec::new();
        while let Some(subject) = input.next().await {
            subjects.push(subject);
        }
        if subjects.len() < context.subjects.len() {
            return;
        }
        let (name, every) = match tuned.method {
            Method::Student => ("train", context.resolved.evaluation.every),
            _ => ("direct", 0),
        };
        let checkpoint = |method, step, values| Checkpoint { method, step, subjects: subjects.clone(), values };
        let place = (context.dir.join("checkpoints").join(name), format!("{name} {}", context.student_identity));
        let course =
            Course::start(context.clone(), meter.clone(), name, &context.run, opening, &tuned.settings, place).await?;
        if tuned.method == Method::Student && context.resolved.evaluation.untouched {
            yield checkpoint(Method::Untouched, 0, course.snapshot().await?);
        }
        let course = if tuned.method == Method::Student { course.of_student().await? } else { course };
        let photos = Photos::prepare(&context, &course).await?;
        let mut step = course.resume().await?;
        let resumed = step == tuned.settings.steps;
        for (step, values) in course.due_before(step, every).await? {
            yield checkpoint(tuned.method, step, values);
        }
        while step < tuned.settings.steps && !context.stop.requested() {
            let lessons = photos.lessons(&context, &course, &tuned, step).await?;
            course.step(step, vec![(1.0, lessons)]).await?;
            step += 1;
            if every > 0 && step.is_multiple_of(every) && step < tuned.settings.steps {
                yield checkpoint(tuned.method, step, course.due(step).await?);
            }
        }
        if step < tuned.settings.steps {
            course.save(step).await?;
            return;
        }
        let folder = if tuned.method == Method::Student { "student" } else { "direct" };
        let sampling = context.resolved.student.sampling.clone();
        let values = course.publish(context.dir.join(folder), resumed, sampling).await?;
        yield checkpoint(tuned.method, step, values);
    }
}

/// The photos of all subjects as a student sees them, in the order of the plan's references.
struct Photos {
    images: Arc<Vec<image::RgbImage>>,
    examples: Vec<crate::models::Example>,
    prompts: Vec<String>,
}

impl Photos {
    async fn prepare(context: &Arc<Context>, course: &Course) -> Result<Self> {
        let own = context.clone();
        let (images, examples) = course
            .worker
            .call(&course.meter, move |trainee| {
                let learner = trainee.learner();
                let (mut resized, mut learnt) = (Vec::new(), Vec::new());
                for subject in &own.subjects {
                    resized.extend(at_side(&subject.images, learner.resolution()));
                    learnt.extend(examples(learner, &subject.images)?);
                }
                Ok((resized, learnt))
            })
            .await?;
        let prompt = |photo: &Reference| {
            let subject = context.subject(photo.subject);
            let own = subject.captions.get(photo.index).cloned().flatten();
            own.unwrap_or_else(|| prompts::fill(PROMPT, &subject.token, &subject.class))
        };
        let prompts = context.plan.references().iter().map(prompt).collect();
        Ok(Self {
            images: Arc::new(images),
            examples,
            prompts,
        })
    }

    async fn lessons(
        &self,
        context: &Context,
        course: &Course,
        tuned: &Tuned,
        step: usize,
    ) -> Result<Vec<Lesson>> {
        let indices = match (tuned.method, context.plan.direct()) {
            (Method::Direct, Some(schedule)) => schedule.lessons(step).to_vec(),
            _ => context.plan.lessons(step).to_vec(),
        };
        let prompt = |&index: &usize| self.prompts[index].clone();
        if tuned.source != Source::Augmented {
            return Ok(indices
                .iter()
                .map(|index| Lesson {
                    example: self.examples[*index].clone(),
                    prompt: prompt(index),
                })
                .collect());
        }
        let seed = step_seed(course.seed(), "augment", step);
        let (images, own) = (self.images.clone(), indices.clone());
        let examples = course
            .worker
            .call(&course.meter, move |trainee| {
                let mut generator = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
                let changed: Vec<_> = own
                    .iter()
                    .map(|&index| augment(&images[index], &mut generator))
                    .collect();
                nn::no_grad(|| trainee.learner().encode(&changed))
            })
            .await?;
        Ok(examples
            .into_iter()
            .zip(&indices)
            .map(|(example, index)| Lesson {
                example,
                prompt: prompt(index),
            })
            .collect())
    }
}

/// The caption of a reference, as in the paper.
pub(crate) const PROMPT: &str = "a {token} {class}";
