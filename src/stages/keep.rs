//! keep: proxies become rows of the store, losslessly, before anything reads them.

use std::sync::Arc;

use async_stream::try_stream;
use futures::{Stream, StreamExt};
use tokio::time::{Instant, sleep_until};

use super::disk::Disk;
use super::{Log, Made, ProxyBatch, Subjects};
use crate::Result;
use crate::images::{encode_png, pixel_digest};
use crate::plan::Plan;
use crate::store::{Limits, ProxyRow, Store, now_us};
use crate::stream::blocking;

/// When batches are committed, and what is watched meanwhile.
#[derive(Clone)]
pub struct CommitPolicy {
    /// Batches wait for each other up to here; they are always committed whole.
    pub limits: Limits,
    /// The disk, where it is watched.
    pub disk: Option<Disk>,
}

impl CommitPolicy {
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

/// What the stage needs.
pub struct Keep {
    pub plan: Arc<Plan>,
    pub subjects: Subjects,
    /// The key of what makes each subject's images.
    pub sources: Vec<String>,
    pub store: Arc<Store>,
    pub policy: CommitPolicy,
    pub log: Log,
}

impl Keep {
    /// Commits the batches of `input` and passes them on, in their order, without their claims: whoever wants them finds
    /// them in the store now.
    pub fn run(
        self,
        input: impl Stream<Item = ProxyBatch> + Send,
    ) -> impl Stream<Item = Result<ProxyBatch>> + Send {
        try_stream! {
            let (policy, meter) = (&self.policy, &self.log.meter);
            let table = self.store.proxies().await?;
            let mut input = std::pin::pin!(input);
            let mut buffer = Buffer::default();
            loop {
                let due = buffer.since.map(|since| since + policy.limits.age);
                let next = tokio::select! {
                    next = input.next() => Some(next),
                    () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => None,
                };
                let ended = matches!(next, Some(None));
                if let Some(Some(batch)) = next {
                    match &batch.made {
                        None => meter.reuse(batch.keys.len()),
                        Some(made) => {
                            let rows = meter.busy(self.rows(&batch, made)).await?;
                            buffer.rows.extend(rows);
                        }
                    }
                    buffer.batches.push(batch);
                    buffer.since.get_or_insert_with(Instant::now);
                    if !buffer.rows.is_empty() && buffer.rows.len() < policy.limits.rows {
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
                if let Some(disk) = &policy.disk {
                    disk.after_commit(&rows)?;
                }
                if ended {
                    break;
                }
            }
        }
    }

    /// The rows of a batch that has just been made. Pictures are encoded on a thread for such work.
    async fn rows(&self, batch: &ProxyBatch, made: &Made) -> Result<Vec<ProxyRow>> {
        let planned = self.plan.batch(batch.batch);
        let subject = self.subjects[planned.subject].clone();
        let source = self.sources[planned.subject].clone();
        let (plan, run) = (self.plan.clone(), self.log.run.clone());
        let (keys, made, numbers) = (batch.keys.clone(), made.clone(), planned.numbers.clone());
        let encode = move || {
            let members = plan.proxies()[numbers].iter().zip(&keys);
            let pictures = made.images.iter().zip(made.captions.iter());
            members
                .zip(pictures)
                .map(|((proxy, key), (image, caption))| {
                    Ok(ProxyRow {
                        key: key.clone(),
                        supervisor: source.clone(),
                        run: run.clone(),
                        subject: subject.name.clone(),
                        class: subject.class.clone(),
                        token: subject.token.clone(),
                        number: proxy.index as u64,
                        prompt: caption.prompt.clone(),
                        seed: proxy.seed,
                        settings: caption.settings.clone(),
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
}

/// What has come and is not committed yet.
#[derive(Default)]
struct Buffer {
    rows: Vec<ProxyRow>,
    batches: Vec<ProxyBatch>,
    /// When the first of `batches` came.
    since: Option<Instant>,
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use futures::stream;

    use super::super::fakes::{Fakes, all, next};
    use super::*;
    use crate::store::Columns;

    #[tokio::test]
    async fn batches_are_rows_before_they_come_out_in_their_order() {
        let fakes = Fakes::new(&[]).await;
        let table = fakes.store.proxies().await.unwrap();
        let mut batches = fakes.batches();
        let claim = fakes.store.locks().try_claim("batches/a").unwrap();
        batches[0].claim = claim.map(Arc::new);
        let stage = fakes.keep().await.run(stream::iter(batches));
        let mut stage = std::pin::pin!(stage);
        for number in 0..fakes.plan.batches() {
            let batch = next(&mut stage).await.unwrap().unwrap();
            assert_eq!(batch.batch, number);
            assert!(batch.claim.is_none() && table.missing(&batch.keys).is_empty());
            assert_eq!(table.count(), 4 * (number + 1));
        }
        assert!(next(&mut stage).await.is_none());
        // Whoever waits for the batch gets it now.
        assert!(
            fakes
                .store
                .locks()
                .try_claim("batches/a")
                .unwrap()
                .is_some()
        );
        let rows = table.rows(None, Columns::WithoutPictures).await.unwrap();
        let told = |row: &ProxyRow| (row.supervisor.clone(), row.subject.clone(), row.number);
        assert_eq!(told(&rows[5]), ("supervisor 1".into(), "cat1".into(), 1));
    }

    #[tokio::test]
    async fn batches_wait_for_one_another_up_to_the_limit_and_what_is_left_at_the_end_is_committed()
    {
        let fakes = Fakes::new(&["proxies.count=10"]).await;
        let mut keep = fakes.keep().await;
        keep.policy.limits = Limits {
            rows: 8,
            age: Duration::from_secs(3600),
        };
        let table = fakes.store.proxies().await.unwrap();
        let stage = keep.run(stream::iter(fakes.batches()));
        let mut stage = std::pin::pin!(stage);
        let mut counts = Vec::new();
        while let Some(batch) = next(&mut stage).await {
            counts.push((batch.unwrap().batch, table.count()));
        }
        // Batches of 4, 4, 4, 4, 2 and 2.
        let expected = [(0, 8), (1, 8), (2, 16), (3, 16), (4, 20), (5, 20)];
        assert_eq!(counts, expected);
    }

    #[tokio::test]
    async fn what_is_in_the_store_passes_and_a_full_disk_ends_it() {
        let fakes = Fakes::new(&[]).await;
        let kept = fakes.kept().await;
        let stage = fakes.keep().await;
        let meter = stage.log.meter.clone();
        assert_eq!(all(stage.run(stream::iter(kept))).await.unwrap().len(), 6);
        assert_eq!((meter.progress().0, meter.fresh()), (24, 0));
        let mut stage = fakes.again(&[]).keep().await;
        let fleet = fakes.board.meter("fleet", "proxies");
        stage.policy.disk = Some(Disk::new(Path::new("store"), 1 << 30, |_| Ok(1), fleet));
        let error = all(stage.run(stream::iter(fakes.batches())))
            .await
            .unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("the disk of store has 1 bytes left"),
            "{error}"
        );
    }
}
