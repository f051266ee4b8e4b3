//! supervise: a diffusion model learns each subject from its photos (DreamBooth with LoRA, Ruiz et al. 2023). An
//! adapter that the store has for the very same photos, checkpoint and settings is not trained again.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_stream::try_stream;
use candle_core::DType;
use futures::{Stream, StreamExt};

use super::class_images::{ClassImages, Drawing};
use super::train::Course;
use super::{Context, Supervisor, references::photo_examples};
use crate::config;
use crate::models::adapters::DIFFUSERS_WEIGHTS;
use crate::models::lora_write::{Layout, Written};
use crate::models::{LearnerOptions, Lesson, Tuning, sampling_file};
use crate::plan::Versions;
use crate::store::Claim;
use crate::stream::Meter;
use crate::{Error, Result, files};

/// Where the store keeps the adapter of the supervisor `key`.
pub fn adapter_dir(context: &Context, key: &str) -> std::path::PathBuf {
    context.store.path().join("adapters").join(key)
}

/// Under which of its keys the store at `store` has a supervisor, published or begun; the newest where it has none.
pub fn key_in<'a>(store: &Path, keys: &'a Versions<String>) -> &'a String {
    let is_in = |folder: &str, key: &String| store.join(folder).join(key).is_dir();
    match keys.all().any(|key| is_in("adapters", key)) {
        true => keys.found(|key| is_in("adapters", key)),
        false => keys.found(|key| is_in("training", key)),
    }
}

/// Where the run's directory has a copy of the adapter.
fn beside_run(context: &Context, subject: usize) -> std::path::PathBuf {
    context
        .dir
        .join("supervisor")
        .join(&context.subject(subject).name)
}

/// Where it stands with a supervisor, when looked at.
enum Turn {
    /// It is in the store.
    Published,
    /// This process trains it, and nobody else while this lives.
    Ours(Claim),
    /// Another process trains it.
    Theirs,
}

/// Between two looks at supervisors that other processes train.
const LOOK: Duration = Duration::from_millis(200);

/// Trains a supervisor for each subject of `input`, `(subject, key)`, and yields it when its adapter is published.
/// Processes that need the same one train it once: a subject that another has in hand is put off, and waited for when
/// nothing else is left. Should the other be killed, its checkpoints are in the store and the next one goes on.
pub fn supervise(
    context: Arc<Context>,
    opening: LearnerOptions,
    input: impl Stream<Item = (usize, String)> + Send,
    meter: Meter,
) -> impl Stream<Item = Result<Supervisor>> + Send {
    try_stream! {
        let Some((settings, proxies)) = context.resolved.teacher() else { return };
        let sampling = config::Sampling::Diffusion(proxies.sampling.clone());
        clear_leftovers(&context)?;
        let mut input = std::pin::pin!(input);
        let mut put_off = VecDeque::new();
        let mut ended = false;
        loop {
            let next = match ended {
                false => input.next().await,
                true => put_off.pop_front(),
            };
            let Some((subject, key)) = next else {
                if ended {
                    break;
                }
                ended = true;
                continue;
            };
            let adapter = adapter_dir(&context, &key);
            let claim = match turn(&context, &key)? {
                Turn::Theirs => {
                    put_off.push_back((subject, key));
                    if ended {
                        let name = &context.subject(subject).name;
                        meter.say(format!("another process trains the supervisor of {name}"));
                        tokio::select! {
                            () = tokio::time::sleep(LOOK) => {}
                            () = context.stop.wait() => return,
                        }
                    }
                    continue;
                }
                Turn::Published => None,
                Turn::Ours(claim) => Some(claim),
            };
            let learnt = match claim {
                None => {
                    meter.reuse(settings.steps());
                    true
                }
                Some(claim) if settings.adapter.is_some() => {
                    publish_given(&opening, &settings.model, &adapter, &sampling)?;
                    drop(claim);
                    true
                }
                Some(claim) => {
                    let name = &context.subject(subject).name;
                    let place = context.store.path().join("training").join(&key);
                    if place.is_dir() {
                        files::remove_leftovers(&place)?;
                    }
                    let course = Course::start(
                        context.clone(),
                        meter.clone(),
                        &format!("supervise:{name}"),
                        &key,
                        opening.clone(),
                        &settings.training,
                        (place.clone(), format!("supervisor {key}")),
                    )
                    .await?;
                    let learnt = train(&context, &course, subject, settings, &proxies.sampling).await?;
                    if learnt {
                        course.publish(adapter.clone(), false, sampling.clone()).await?;
                        std::fs::remove_dir_all(&place).map_err(Error::io(&place))?;
                    }
                    drop(claim);
                    learnt
                }
            };
            if !learnt {
                return;
            }
            let own = beside_run(&context, subject);
            files::copy_dir(&adapter, &own)?;
            // The run that trained it may have drawn otherwise.
            sampling_file::write(&own, &sampling)?;
            yield Supervisor { subject, key, adapter };
        }
    }
}

/// Puts the adapter that `opening` was given into the store as the folder `dir`, as one that was trained here: in
/// diffusers' layout.
fn publish_given(
    opening: &LearnerOptions,
    model: &str,
    dir: &Path,
    sampling: &config::Sampling,
) -> Result<()> {
    let Tuning::Given(layers) = &opening.tuning else {
        return Err(Error::Invalid {
            what: "a supervisor whose adapter was not read".into(),
            hint: None,
        });
    };
    let written = Written {
        layers,
        family: opening.family,
        base: Some(model),
        dtype: DType::F32,
    };
    files::write_dir(dir, |aside| {
        written.write(Layout::Diffusers, &aside.join(DIFFUSERS_WEIGHTS))?;
        sampling_file::write(aside, sampling)
    })
}

fn claim_of(key: &str) -> String {
    format!("supervisors/{key}")
}

/// Looks where it stands with the supervisor `key`, and claims it if nobody has.
fn turn(context: &Context, key: &str) -> Result<Turn> {
    let adapter = adapter_dir(context, key);
    if adapter.is_dir() {
        return Ok(Turn::Published);
    }
    let Some(claim) = context.store.locks().try_claim(&claim_of(key))? else {
        return Ok(Turn::Theirs);
    };
    // Whoever had the claim may have published meanwhile. A network disk shows that when the folder around it is
    // read again.
    if let Some(around) = adapter.parent() {
        files::create_dir(around)?;
        std::fs::read_dir(around).map_err(Error::io(around))?.next();
    }
    Ok(match adapter.is_dir() {
        true => Turn::Published,
        false => Turn::Ours(claim),
    })
}

/// Removes what processes left that were killed while they published a supervisor, or just after.
fn clear_leftovers(context: &Context) -> Result<()> {
    let store = context.store.path();
    // Who is publishing holds the claim, so what cannot be claimed is left alone.
    let clear = |key: &str, path: &Path| {
        let claim = context.store.locks().try_claim(&claim_of(key))?;
        match claim.is_some() && path.is_dir() {
            true => std::fs::remove_dir_all(path).map_err(Error::io(path)),
            false => Ok(()),
        }
    };
    for (name, path) in files::list(&store.join("adapters"))? {
        if let Some(key) = files::written_aside(&name) {
            clear(key, &path)?;
        }
    }
    for (key, path) in files::list(&store.join("training"))? {
        if adapter_dir(context, &key).is_dir() {
            clear(&key, &path)?;
        }
    }
    Ok(())
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
    let (own, seed) = (settings.clone(), context.resolved.seed);
    let examples = course
        .worker
        .call(&course.meter, move |trainee| {
            photo_examples(trainee.learner(), &learnt, &own, seed)
        })
        .await?;
    let learnt = context.subject(subject);
    let prompt = config::prompts::fill(&settings.prompt, &learnt.token, &learnt.class);
    let captions = &learnt.captions;
    let mut foreseen = vec![
        prompt.clone(),
        String::new(),
        sampling.negative_prompt.clone(),
    ];
    foreseen.extend(captions.iter().flatten().cloned());
    foreseen.extend(
        settings
            .prior_preservation
            .iter()
            .map(|prior| config::prompts::fill_without_token(&prior.prompt, &learnt.class)),
    );
    course
        .worker
        .call(&course.meter, move |trainee| {
            trainee.learner().foresee(&foreseen)
        })
        .await?;
    // Before a checkpoint is restored.
    let untouched = match settings.prior_preservation {
        Some(_) => Some(course.snapshot().await?),
        None => None,
    };
    let mut step = course.resume().await?;
    let mut class = match (
        &settings.prior_preservation,
        &planned.class_images,
        &context.painter,
        untouched,
    ) {
        (Some(prior), Some(schedule), Some(painter), Some(untouched)) => {
            let drawing = Drawing {
                painter: painter.clone(),
                untouched,
                prompt: config::prompts::fill_without_token(&prior.prompt, &learnt.class),
                seeds: planned.class_seeds.clone(),
                sampling: config::Sampling::Diffusion(sampling.clone()),
                batch_size: settings.training.batch_size,
            };
            let images = ClassImages::start(drawing, schedule, course, step);
            Some((prior.weight, images))
        }
        _ => None,
    };
    while step < settings.training.steps && !context.stop.requested() {
        let photos = planned.references.lessons(step).iter().map(|&i| Lesson {
            example: examples[i].clone(),
            prompt: captions[i].as_ref().unwrap_or(&prompt).clone(),
        });
        let mut batches = vec![(1.0, photos.collect())];
        if let Some((weight, images)) = &mut class {
            batches.push((*weight, images.lessons(course, step).await?));
        }
        course.step(step, batches).await?;
        step += 1;
    }
    if step < settings.training.steps {
        course.save(step).await?;
    }
    Ok(step >= settings.training.steps)
}
