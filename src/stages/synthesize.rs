//! synthesize: supervisors make proxies, in planned batches that are always made whole. A batch whose proxies are all
//! in the store is passed on as it is.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use async_stream::try_stream;
use futures::{Stream, StreamExt};
use image::RgbImage;

use super::{Checkpoint, Context, Lazy, Method, ProxyBatch, Supervisor, ended_early};
use crate::Result;
use crate::config::Sampling;
use crate::models::Request;
use crate::stream::{Downstream, Meter, Outlet};
use crate::training::restore;

/// What whoever makes the batch with these keys claims in the store. Batches that share a claim, by chance, are made
/// one after the other.
pub(super) fn batch_claim(keys: &[String]) -> String {
    const DIGITS: usize = 3;
    let first = keys.first().and_then(|key| key.get(..DIGITS));
    format!("batches/{}", first.unwrap_or_default())
}

/// Every prompt that whoever draws proxies, and is scored, will be asked for.
fn prompts(context: &Context, negative: &str) -> Vec<String> {
    let proxies = context.plan.proxies().iter();
    let scored = context.plan.evaluation().images.iter();
    let mut distinct = BTreeSet::from([negative]);
    distinct.extend(proxies.map(|proxy| proxy.prompt.as_str()));
    distinct.extend(scored.map(|image| image.prompt.as_str()));
    distinct.into_iter().map(String::from).collect()
}

/// Draws batch `number` of the plan.
pub(super) async fn draw(
    context: &Context,
    painter: &Lazy,
    supervisor: &Supervisor,
    number: usize,
    meter: &Meter,
) -> Result<Vec<RgbImage>> {
    let Some((_, proxies)) = context.resolved.teacher() else {
        return Ok(Vec::new());
    };
    let numbers = context.plan.batch(number).numbers.clone();
    let requests: Vec<Request> = context.plan.proxies()[numbers]
        .iter()
        .map(|proxy| Request {
            prompt: proxy.prompt.clone(),
            seed: proxy.seed,
        })
        .collect();
    let sampling = Sampling::Diffusion(proxies.sampling.clone());
    let foreseen = prompts(context, &proxies.sampling.negative_prompt);
    let adapter = supervisor.adapter.clone();
    painter
        .get()
        .await?
        .call(meter, move |learner| {
            restore(&learner.variables(), &learner.read(&adapter)?, &adapter)?;
            learner.foresee(&foreseen)?;
            learner.generate(&requests, &sampling)
        })
        .await
}

/// Makes the batches of the plan in their order, each as soon as its supervisor has come through `input`. When a
/// supervisor has made its last, it goes down `evaluated` to be scored itself.
pub fn synthesize(
    context: Arc<Context>,
    input: impl Stream<Item = Supervisor> + Send,
    evaluated: Vec<Outlet<Checkpoint>>,
    meter: Meter,
) -> impl Stream<Item = Result<ProxyBatch>> + Send {
    try_stream! {
        let (Some((settings, _)), Some(painter)) = (context.resolved.teacher(), context.painter.clone()) else {
            return;
        };
        let table = context.store.proxies().await?;
        let mut supervisors: BTreeMap<usize, Supervisor> = BTreeMap::new();
        let mut input = std::pin::pin!(input);
        let last_batch: BTreeMap<usize, usize> =
            (0..context.plan.batches()).map(|batch| (context.plan.batch(batch).subject, batch)).collect();
        for number in 0..context.plan.batches() {
            let batch = context.plan.batch(number).clone();
            while !supervisors.contains_key(&batch.subject) {
                match input.next().await {
                    Some(supervisor) => drop(supervisors.insert(supervisor.subject, supervisor)),
                    None if context.stop.requested() => return,
                    None => Err(ended_early("synthesize"))?,
                }
            }
            if context.stop.requested() {
                return;
            }
            let supervisor = supervisors[&batch.subject].clone();
            let keys = context.proxy_keys(number, &table);
            let claim = match table.missing(&keys).is_empty() {
                true => None,
                false => {
                    // Another process may be making the very same batch: then it is in the store when it lets go.
                    let name = batch_claim(&keys);
                    let claim = tokio::select! {
                        claim = context.store.locks().claim(&name) => claim,
                        () = context.stop.wait() => return,
                    };
                    let claim = claim?;
                    table.refresh().await?;
                    (!table.missing(&keys).is_empty()).then(|| Arc::new(claim))
                }
            };
            let images = match &claim {
                None => {
                    meter.reuse(keys.len());
                    None
                }
                Some(_) => {
                    let images = draw(&context, &painter, &supervisor, number, &meter).await?;
                    meter.add(keys.len());
                    Some(Arc::new(images))
                }
            };
            yield ProxyBatch { batch: number, keys, images, claim };
            if last_batch.get(&batch.subject) == Some(&number) {
                let adapter = supervisor.adapter.clone();
                let values =
                    painter.get().await?.call(&meter, move |learner| learner.read(&adapter)).await?;
                let checkpoint = Checkpoint {
                    method: Method::Supervisor,
                    step: settings.steps(),
                    subjects: vec![batch.subject],
                    values: Arc::new(values),
                };
                if !evaluated.pass(checkpoint).await {
                    // The evaluation was stopped or has failed, and says so itself.
                    return;
                }
            }
        }
    }
}
