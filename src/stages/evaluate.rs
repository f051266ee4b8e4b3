//! evaluate: every checkpoint draws the planned samples, and these are scored. Downstream of training.

use std::sync::Arc;

use async_stream::try_stream;
use futures::{Stream, StreamExt};

use super::score::{score, table};
use super::{Checkpoint, Context, Lazy, Method};
use crate::config;
use crate::files::values_digest;
use crate::images::encode_png;
use crate::models::Request;
use crate::plan::{Sampled, Versions, sample_keys};
use crate::store::{EvaluationRow, now_us};
use crate::stream::{Meter, blocking};
use crate::training::restore;
use crate::{Error, Result};

/// The scored samples of one checkpoint, by the keys of their rows, in the order of the plan.
#[derive(Debug, Clone)]
pub struct Evaluated {
    pub method: Method,
    pub step: usize,
    /// Digest of what was trained.
    pub adapter: String,
    /// Positions in the evaluation plan, and the rows' keys.
    pub samples: Vec<(usize, String)>,
}

/// Draws and scores the samples of each checkpoint of `input`, in planned batches that are always drawn whole.
pub fn evaluate(
    context: Arc<Context>,
    input: impl Stream<Item = Checkpoint> + Send,
    meter: Meter,
) -> impl Stream<Item = Result<Evaluated>> + Send {
    try_stream! {
        let table = table(&context).await?;
        let mut input = std::pin::pin!(input);
        while let Some(checkpoint) = input.next().await {
            if context.stop.requested() {
                // Taking what comes lets training get on to its checkpoint.
                continue;
            }
            let values = checkpoint.values.clone();
            let digesting = blocking("the digest of an adapter", move || values_digest(&values));
            let adapter = meter.busy(digesting).await?;
            let mut samples = Vec::new();
            let plan = context.plan.evaluation();
            for batch in &plan.batches {
                let images = &plan.images[batch.clone()];
                let Some(subject) = images.first().map(|image| image.subject) else { continue };
                if context.stop.requested() {
                    break;
                }
                if !checkpoint.subjects.contains(&subject) {
                    continue;
                }
                let keys = known_keys(&context, &checkpoint, &adapter, batch.clone())?;
                let keys = keys.found(|keys| table.missing(keys).is_empty()).clone();
                samples.extend(batch.clone().zip(keys.iter().cloned()));
                if table.missing(&keys).is_empty() {
                    meter.reuse(keys.len());
                    continue;
                }
                let requests =
                    images.iter().map(|image| Request { prompt: image.prompt.clone(), seed: image.seed }).collect();
                let drawn = Arc::new(draw(&context, &checkpoint, requests, &meter).await?);
                let texts = images.iter().map(|image| image.text.clone()).collect();
                let (embeddings, scores) = score(&context, subject, drawn.clone(), texts, &meter).await?;
                let encoding = blocking("encoding pictures", move || {
                    drawn.iter().map(encode_png).collect::<Result<Vec<_>>>()
                });
                let mut pictures = meter.busy(encoding).await?.into_iter();
                let mut rows = Vec::with_capacity(keys.len());
                for (i, image) in images.iter().enumerate() {
                    rows.push(EvaluationRow {
                        key: keys[i].clone(),
                        kind: "sample".into(),
                        run: context.run.clone(),
                        method: checkpoint.method.name().into(),
                        step: checkpoint.step as u64,
                        subject: context.subject(subject).name.clone(),
                        prompt: image.prompt.clone(),
                        seed: image.seed,
                        clip_i: Some(scores[i].clip_i as f32),
                        clip_t: Some(scores[i].clip_t as f32),
                        dino: Some(scores[i].dino as f32),
                        clip_embedding: Some(embeddings.clip[i].clone()),
                        dino_embedding: Some(embeddings.dino[i].clone()),
                        image: pictures.next(),
                        created_us: now_us(),
                        adapter: Some(adapter.clone()),
                    });
                }
                meter.busy(table.append(&rows)).await?;
                meter.add(rows.len());
            }
            if context.stop.requested() {
                continue;
            }
            yield Evaluated { method: checkpoint.method, step: checkpoint.step, adapter, samples };
        }
    }
}

/// Keys of the samples of one planned batch, in every known version.
fn known_keys(
    context: &Context,
    checkpoint: &Checkpoint,
    adapter: &str,
    batch: std::ops::Range<usize>,
) -> Result<Versions<Vec<String>>> {
    let photos: Vec<String> = checkpoint
        .subjects
        .iter()
        .flat_map(|&subject| context.subject(subject).digests.clone())
        .collect();
    Ok(sample_keys(&Sampled {
        method: checkpoint.method.name(),
        model: &learner(context, checkpoint.method)?.digest,
        adapter,
        step: checkpoint.step,
        sampling: &settings(context, checkpoint.method)?,
        photos: &photos,
        images: &context.plan.evaluation().images[batch],
    }))
}

/// What draws the samples of `method`.
fn learner(context: &Context, method: Method) -> Result<&Lazy> {
    match (method, &context.painter) {
        (Method::Supervisor, Some(painter)) => Ok(painter),
        (Method::Supervisor, None) => Err(no_supervisor()),
        _ => Ok(&context.sampler),
    }
}

/// How the samples of `method` are drawn.
fn settings(context: &Context, method: Method) -> Result<config::Sampling> {
    match (method, &context.resolved.proxies) {
        (Method::Supervisor, Some(proxies)) => {
            Ok(config::Sampling::Diffusion(proxies.sampling.clone()))
        }
        (Method::Supervisor, None) => Err(no_supervisor()),
        _ => Ok(context.resolved.student.sampling.clone()),
    }
}

fn no_supervisor() -> Error {
    Error::Invalid {
        what: "a supervisor's samples without a supervisor".into(),
        hint: None,
    }
}

async fn draw(
    context: &Context,
    checkpoint: &Checkpoint,
    requests: Vec<Request>,
    meter: &Meter,
) -> Result<Vec<image::RgbImage>> {
    let sampling = settings(context, checkpoint.method)?;
    let values = checkpoint.values.clone();
    learner(context, checkpoint.method)?
        .get()
        .await?
        .call(meter, move |learner| {
            restore(
                &learner.variables(),
                &values,
                std::path::Path::new("a checkpoint to evaluate"),
            )?;
            learner.generate(&requests, &sampling)
        })
        .await
}
