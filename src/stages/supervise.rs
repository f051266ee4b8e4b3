//! supervise: a diffusion model learns each subject from its photos (DreamBooth with LoRA, Ruiz et al. 2023). An
//! adapter that the store has for the very same photos, checkpoint and settings is not trained again.

use std::sync::Arc;

use async_stream::try_stream;
use futures::{Stream, StreamExt};

use super::train::Course;
use super::{Context, Supervisor, references::at_resolution};
use crate::config;
use crate::models::{Lesson, Opening, Request, Sampling};
use crate::stream::Meter;
use crate::{Error, Result, files};

/// Where the store keeps the adapter of the supervisor `key`.
pub fn adapter_dir(context: &Context, key: &str) -> std::path::PathBuf {
    context.store.path().join("adapters").join(key)
}

/// Where the run's directory has a copy of the adapter.
fn beside_run(context: &Context, subject: usize) -> std::path::PathBuf {
    context
        .dir
        .join("supervisor")
        .join(&context.subject(subject).name)
}

/// Trains a supervisor for each subject of `input`, `(subject, key)`, and yields it when its adapter is published.
pub fn supervise(
    context: Arc<Context>,
    opening: Opening,
    input: impl Stream<Item = (usize, String)> + Send,
    meter: Meter,
) -> impl Stream<Item = Result<Supervisor>> + Send {
    try_stream! {
        let Some((settings, proxies)) = context.resolved.teacher() else { return };
        let mut input = std::pin::pin!(input);
        while let Some((subject, key)) = input.next().await {
            let adapter = adapter_dir(&context, &key);
            let made = Supervisor { subject, key: key.clone(), adapter: adapter.clone() };
            if adapter.is_dir() {
                meter.reuse(settings.training.steps);
                files::copy_dir(&adapter, &beside_run(&context, subject))?;
                yield made;
                continue;
            }
            let lesson = Course::start(
                context.clone(),
                meter.clone(),
                &format!("supervise:{}", context.subject(subject).name),
                &key,
                opening.clone(),
                &settings.training,
                (context.dir.join("checkpoints/supervise").join(&context.subject(subject).name), format!("supervisor {key}")),
            )
            .await?;
            if train(&context, &lesson, subject, settings, &proxies.sampling).await? {
                lesson.publish(adapter.clone(), false).await?;
                lesson.checkpoints.clear()?;
                files::copy_dir(&adapter, &beside_run(&context, subject))?;
                yield made;
            }
        }
    }
}

/// Takes all steps; false if the run was asked to stop before.
async fn train(
    context: &Arc<Context>,
    course: &Course,
    subject: usize,
    settings: &config::Supervisor,
    sampling: &config::DiffusionSampling,
) -> Result<bool> {
    let planned = context
        .plan
        .supervisor(subject)
        .ok_or_else(|| Error::Invalid {
            what: "a supervisor that is not planned".into(),
            hint: None,
        })?;
    let learnt = context.subject(subject).clone();
    let examples = course
        .worker
        .call(&course.meter, move |trainee| {
            let learner = trainee.learner();
            learner.encode(&at_resolution(&learnt, learner.resolution()))
        })
        .await?;
    let learnt = context.subject(subject);
    let prompt = config::prompts::fill(&settings.prompt, &learnt.token, &learnt.class);
    // Class images come from the model as it was, so they are drawn before a checkpoint is restored.
    let class = match &settings.prior_preservation {
        Some(prior) => {
            let prompt = config::prompts::fill_without_token(&prior.prompt, &learnt.class);
            let requests: Vec<Request> = planned
                .class_seeds
                .iter()
                .map(|&seed| Request {
                    prompt: prompt.clone(),
                    seed,
                })
                .collect();
            let sampling = Sampling::diffusion(sampling);
            let batch = settings.training.batch_size;
            let examples = course
                .worker
                .call(&course.meter, move |trainee| {
                    let learner = trainee.learner();
                    let mut examples = Vec::new();
                    for requests in requests.chunks(batch) {
                        let images = learner.generate(requests, &sampling)?;
                        examples.extend(learner.encode(&images)?);
                    }
                    Ok(examples)
                })
                .await?;
            Some((prior.weight, prompt, examples))
        }
        None => None,
    };
    let mut step = course.resume().await?;
    while step < settings.training.steps && !context.stop.requested() {
        let lesson = |example, prompt: &String| Lesson {
            example,
            prompt: prompt.clone(),
        };
        let photos = planned.references.lessons(step);
        let mut batches = vec![(
            1.0,
            photos
                .iter()
                .map(|&i| lesson(examples[i].clone(), &prompt))
                .collect(),
        )];
        if let (Some((weight, prompt, examples)), Some(schedule)) = (&class, &planned.class_images)
        {
            let images = schedule.lessons(step);
            batches.push((
                *weight,
                images
                    .iter()
                    .map(|&i| lesson(examples[i].clone(), prompt))
                    .collect(),
            ));
        }
        course.step(step, batches).await?;
        step += 1;
    }
    if step < settings.training.steps {
        course.save(step).await?;
    }
    Ok(step >= settings.training.steps)
}
