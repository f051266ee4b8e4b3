//! keep: proxies become rows of the store, losslessly, before anything reads them.

use std::sync::Arc;

use async_stream::try_stream;
use futures::{Stream, StreamExt};
use tokio::time::{Instant, sleep_until};

use super::disk::Disk;
use super::{Context, ProxyBatch};
use crate::images::{encode_png, pixel_digest};
use crate::store::{Limits, ProxyRow, now_us};
use crate::stream::{Meter, blocking};
use crate::{Error, Result};

/// When batches are committed, and what is watched meanwhile.
#[derive(Clone)]
pub struct Keeping {
    /// Batches wait for each other up to here; they are always committed whole.
    pub limits: Limits,
    /// The disk, where it is watched.
    pub disk: Option<Disk>,
}

impl Keeping {
    /// Each batch as soon as it comes, because somebody waits for it.
    pub fn at_once() -> Self {
        Self {
            limits: Limits {
                rows: 1,
                ..Limits::default()
            },
            disk: None,
        }
    }
}

/// Commits the batches of `input` and passes them on, in their order, without their claims: whoever wants them finds
/// them in the store now.
pub fn keep(
    context: Arc<Context>,
    supervisors: Vec<String>,
    input: impl Stream<Item = ProxyBatch> + Send,
    meter: Meter,
    keeping: Keeping,
) -> impl Stream<Item = Result<ProxyBatch>> + Send {
    try_stream! {
        let Some((_, proxies)) = context.resolved.teacher() else { return };
        let settings = serde_json::to_string(&proxies.sampling)
            .map_err(|e| Error::Invalid { what: format!("settings as JSON: {e}"), hint: None })?;
        let table = context.store.proxies().await?;
        let mut input = std::pin::pin!(input);
        let mut buffer = Buffer::default();
        loop {
            let due = buffer.since.map(|since| since + keeping.limits.age);
            let next = tokio::select! {
                next = input.next() => Some(next),
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => None,
            };
            let ended = matches!(next, Some(None));
            if let Some(Some(batch)) = next {
                match &batch.images {
                    None => meter.reuse(batch.keys.len()),
                    Some(_) => {
                        let rows = meter.busy(rows(&context, &supervisors, &settings, &batch)).await?;
                        buffer.rows.extend(rows);
                    }
                }
                buffer.batches.push(batch);
                buffer.since.get_or_insert_with(Instant::now);
                if !buffer.rows.is_empty() && buffer.rows.len() < keeping.limits.rows {
                    continue;
                }
            }
            let Buffer { rows, batches, .. } = std::mem::take(&mut buffer);
            meter.busy(table.append(&rows)).await?;
            meter.add(rows.len());
            for mut batch in batches {
                batch.claim = None;
                yield batch;
            }
            if let Some(disk) = &keeping.disk {
                disk.after_commit(&rows)?;
            }
            if ended {
                break;
            }
        }
    }
}

/// What has come and is not committed yet.
#[derive(Default)]
struct Buffer {
    rows: Vec<ProxyRow>,
    batches: Vec<ProxyBatch>,
    /// When the first of `batches` came.
    since: Option<Instant>,
}

/// The rows of a batch that has just been made. Pictures are encoded on a thread for such work.
async fn rows(
    context: &Arc<Context>,
    supervisors: &[String],
    settings: &str,
    batch: &ProxyBatch,
) -> Result<Vec<ProxyRow>> {
    let (context, batch, settings) = (context.clone(), batch.clone(), settings.to_string());
    let supervisor = supervisors[context.plan.batch(batch.batch).subject].clone();
    let encode = move || {
        let planned = context.plan.batch(batch.batch);
        let subject = context.subject(planned.subject);
        let members = &context.plan.proxies()[planned.numbers.clone()];
        let images = batch.images.iter().flat_map(|images| images.iter());
        let made = members.iter().zip(&batch.keys).zip(images);
        made.map(|((proxy, key), image)| {
            Ok(ProxyRow {
                key: key.clone(),
                supervisor: supervisor.clone(),
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
            })
        })
        .collect()
    };
    blocking("encoding pictures", encode).await
}
