//! score: proxies are scored as they arrive, and the references' own embeddings kept beside them.

use std::sync::Arc;

use async_stream::try_stream;
use futures::{Stream, StreamExt};

use super::tokenize::pixels;
use super::{Context, ProxyBatch};
use crate::config::prompts::fill_without_token;
use crate::evaluation::embed::Embeddings;
use crate::evaluation::metrics::Scores;
use crate::plan::reference_key;
use crate::store::{Columns, EvaluationRow, Table, now_us};
use crate::stream::Meter;
use crate::{Error, Result};

/// The table of this run's evaluators.
pub(super) async fn table(context: &Context) -> Result<Table<EvaluationRow>> {
    let evaluator = &context.evaluator;
    context
        .store
        .evaluations(&evaluator.digest, evaluator.clip, evaluator.dino)
        .await
}

/// The embeddings of a subject's references, from the store or made now.
pub(super) async fn references(
    context: &Context,
    subject: usize,
    meter: &Meter,
) -> Result<Embeddings> {
    let table = table(context).await?;
    let subject = context.subject(subject).clone();
    let key = |photo: &String| reference_key(&subject.name, photo);
    let keys: Vec<String> = subject.digests.iter().map(key).collect();
    let found = table.get(&keys, Columns::All).await?;
    let (mut clip, mut dino) = (Vec::new(), Vec::new());
    for row in found.into_iter().flatten() {
        clip.extend(row.clip_embedding);
        dino.extend(row.dino_embedding);
    }
    if clip.len() == keys.len() && dino.len() == keys.len() {
        return Ok(Embeddings { clip, dino });
    }
    let own = subject.clone();
    let made = context
        .evaluator
        .get()
        .await?
        .call(meter, move |evaluator| evaluator.embed(&own.images))
        .await?;
    let rows: Vec<EvaluationRow> = keys
        .iter()
        .zip(made.clip.iter().zip(&made.dino))
        .map(|(key, (clip, dino))| EvaluationRow {
            key: key.clone(),
            kind: "reference".into(),
            run: context.run.clone(),
            method: String::new(),
            step: 0,
            subject: subject.name.clone(),
            prompt: String::new(),
            seed: 0,
            clip_i: None,
            clip_t: None,
            dino: None,
            clip_embedding: Some(clip.clone()),
            dino_embedding: Some(dino.clone()),
            image: None,
            created_us: now_us(),
            adapter: None,
        })
        .collect();
    table.append(&rows).await?;
    Ok(made)
}

/// Embeds and scores `images` of one subject against its references; `texts` are their prompts without the token.
pub(super) async fn score(
    context: &Context,
    subject: usize,
    images: Arc<Vec<image::RgbImage>>,
    texts: Vec<String>,
    meter: &Meter,
) -> Result<(Embeddings, Vec<Scores>)> {
    let references = references(context, subject, meter).await?;
    context
        .evaluator
        .get()
        .await?
        .call(meter, move |evaluator| {
            let embeddings = evaluator.embed(&images)?;
            let scores = evaluator.score(&references, &embeddings, &texts)?;
            Ok((embeddings, scores))
        })
        .await
}

/// Scores each batch of `input`; yields how many proxies have scores.
pub fn score_proxies(
    context: Arc<Context>,
    input: impl Stream<Item = ProxyBatch> + Send,
    meter: Meter,
) -> impl Stream<Item = Result<usize>> + Send {
    try_stream! {
        let table = table(&context).await?;
        let mut input = std::pin::pin!(input);
        while let Some(batch) = input.next().await {
            if context.stop.requested() {
                // What is committed is scored by the run that goes on.
                continue;
            }
            if table.missing(&batch.keys).is_empty() {
                meter.reuse(batch.keys.len());
                yield batch.keys.len();
                continue;
            }
            let images = pixels(&context, &batch).await?;
            let planned = context.plan.batch(batch.batch);
            let subject = context.subject(planned.subject);
            let members = &context.plan.proxies()[planned.numbers.clone()];
            let Some((_, proxies)) = context.resolved.teacher() else {
                Err(Error::Invalid { what: "proxies without a supervisor".into(), hint: None })?;
                return;
            };
            let texts = members
                .iter()
                .map(|proxy| fill_without_token(&proxies.prompts[proxy.index % proxies.prompts.len()], &subject.class))
                .collect();
            let (embeddings, scores) = score(&context, planned.subject, images, texts, &meter).await?;
            let rows: Vec<EvaluationRow> = members
                .iter()
                .zip(&batch.keys)
                .zip(embeddings.clip.into_iter().zip(embeddings.dino))
                .zip(scores)
                .map(|(((proxy, key), (clip, dino)), scores)| EvaluationRow {
                    key: key.clone(),
                    kind: "proxy".into(),
                    run: context.run.clone(),
                    method: "supervisor".into(),
                    step: 0,
                    subject: subject.name.clone(),
                    prompt: proxy.prompt.clone(),
                    seed: proxy.seed,
                    clip_i: Some(scores.clip_i as f32),
                    clip_t: Some(scores.clip_t as f32),
                    dino: Some(scores.dino as f32),
                    clip_embedding: Some(clip),
                    dino_embedding: Some(dino),
                    image: None,
                    created_us: now_us(),
                    adapter: None,
                })
                .collect();
            meter.busy(table.append(&rows)).await?;
            meter.add(rows.len());
            yield rows.len();
        }
    }
}
