//! synthesize: supervisors make proxies, in planned batches that are always made whole. A batch whose proxies are all
//! in the store is passed on as it is.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_stream::try_stream;
use futures::{Stream, StreamExt};

use super::{Checkpoint, Context, Method, ProxyBatch, Supervisor, ended_early};
use crate::models::{Request, Sampling};
use crate::plan::proxy_keys;
use crate::stream::{Meter, Outlet};
use crate::training::restore;
use crate::{Error, Result};

/// Makes the batches of the plan in their order, each as soon as its supervisor has come through `input`. When a
/// supervisor has made its last, it goes down `evaluated` to be scored itself.
pub fn synthesize(
    context: Arc<Context>,
    input: impl Stream<Item = Supervisor> + Send,
    evaluated: Outlet<Checkpoint>,
    meter: Meter,
) -> impl Stream<Item = Result<ProxyBatch>> + Send {
    try_stream! {
        let (Some((settings, proxies)), Some(painter)) = (context.resolved.teacher(), context.painter.clone()) else {
            return;
        };
        let table = context.store.proxies().await?;
        let sampling = Sampling::diffusion(&proxies.sampling);
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
            let keys = proxy_keys(&context.plan, number, &supervisor.key, &proxies.sampling)?;
            if table.missing(&keys).is_empty() {
                meter.reuse(keys.len());
                yield ProxyBatch { batch: number, keys, images: None };
            } else {
                let requests: Vec<Request> = context.plan.proxies()[batch.numbers.clone()]
                    .iter()
                    .map(|proxy| Request { prompt: proxy.prompt.clone(), seed: proxy.seed })
                    .collect();
                let (adapter, sampling) = (supervisor.adapter.clone(), sampling.clone());
                let images = painter
                    .get()
                    .await?
                    .call(&meter, move |learner| {
                        restore(&learner.variables(), &learner.read(&adapter)?, &adapter)?;
                        learner.generate(&requests, &sampling)
                    })
                    .await?;
                meter.add(keys.len());
                yield ProxyBatch { batch: number, keys, images: Some(Arc::new(images)) };
            }
            if last_batch.get(&batch.subject) == Some(&number) {
                let adapter = supervisor.adapter.clone();
                let values =
                    painter.get().await?.call(&meter, move |learner| learner.read(&adapter)).await?;
                let checkpoint = Checkpoint {
                    method: Method::Supervisor,
                    step: settings.training.steps,
                    subjects: vec![batch.subject],
                    values: Arc::new(values),
                };
                if evaluated.send(checkpoint).await.is_err() {
                    Err(Error::Invalid { what: "the evaluation ended early".into(), hint: None })?;
                }
            }
        }
    }
}
