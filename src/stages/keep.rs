//! keep: proxies become rows of the store, losslessly, before anything reads them.

use std::sync::Arc;

use async_stream::try_stream;
use futures::{Stream, StreamExt};

use super::{Context, ProxyBatch};
use crate::images::{encode_png, pixel_digest};
use crate::store::{ProxyRow, now_us};
use crate::stream::Meter;
use crate::{Error, Result};

/// Commits each batch of `input` and passes it on: to tokenizing and training, and to scoring. Batches are committed
/// whole, as soon as they come: whoever waits for one gets it without delay, and the store puts small commits together.
pub fn keep(
    context: Arc<Context>,
    supervisors: Vec<String>,
    input: impl Stream<Item = ProxyBatch> + Send,
    meter: Meter,
) -> impl Stream<Item = Result<ProxyBatch>> + Send {
    try_stream! {
        let Some((_, proxies)) = context.resolved.teacher() else { return };
        let settings = serde_json::to_string(&proxies.sampling)
            .map_err(|e| Error::Invalid { what: format!("settings as JSON: {e}"), hint: None })?;
        let table = context.store.proxies().await?;
        let mut input = std::pin::pin!(input);
        while let Some(batch) = input.next().await {
            match &batch.images {
                None => meter.reuse(batch.keys.len()),
                Some(images) => {
                    let planned = context.plan.batch(batch.batch);
                    let subject = context.subject(planned.subject);
                    let members = &context.plan.proxies()[planned.numbers.clone()];
                    let mut rows = Vec::with_capacity(members.len());
                    for ((proxy, key), image) in members.iter().zip(&batch.keys).zip(images.iter()) {
                        rows.push(ProxyRow {
                            key: key.clone(),
                            supervisor: supervisors[planned.subject].clone(),
                            run: context.run.clone(),
                            subject: subject.name.clone(),
                            class: subject.class.clone(),
                            token: subject.token.clone(),
                            number: proxy.index as u64,
                            prompt: proxy.prompt.clone(),
                            seed: proxy.seed,
                            settings: settings.clone(),
                            width: image.width(),
                            height: image.height(),
                            image: encode_png(image)?,
                            content: pixel_digest(image),
                            created_us: now_us(),
                        });
                    }
                    meter.busy(table.append(&rows)).await?;
                    meter.add(rows.len());
                }
            }
            yield batch;
        }
    }
}
