//! synthesize: sources make proxies, in planned batches that are always made whole. A batch whose proxies are all in
//! the store is passed on as it is.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_stream::try_stream;
use futures::{Stream, StreamExt};

use super::source::ReadySource;
use super::{Checkpoint, LazyLearner, Log, Method, ProxyBatch, ProxyKeys, Subjects, ended_early};
use crate::Result;
use crate::store::{Claim, ProxyRow, Store, Table};
use crate::stream::{Downstream, Outlet};

/// What whoever makes the batch with these keys claims in the store. Batches that share a claim, by chance, are made
/// one after the other.
pub(super) fn batch_claim(keys: &[String]) -> String {
    const DIGITS: usize = 3;
    let first = keys.first().and_then(|key| key.get(..DIGITS));
    format!("batches/{}", first.unwrap_or_default())
}

/// What the stage needs.
pub struct Synthesize {
    pub subjects: Subjects,
    pub keys: ProxyKeys,
    pub store: Arc<Store>,
    /// The supervisors' model with the training steps that each has taken; none where a program brings the images.
    pub supervisor: Option<(LazyLearner, usize)>,
    pub log: Log,
}

impl Synthesize {
    /// Makes the batches of the plan in their order, each as soon as its source has come through `input`. When a
    /// supervisor has made its last, it goes down `evaluated` to be scored itself.
    pub fn run(
        self,
        input: impl Stream<Item = ReadySource> + Send,
        evaluated: Vec<Outlet<Checkpoint>>,
    ) -> impl Stream<Item = Result<ProxyBatch>> + Send {
        try_stream! {
            let Self { subjects, keys: proxy_keys, store, log, .. } = &self;
            let (plan, meter) = (&proxy_keys.plan, &log.meter);
            let table = store.proxies().await?;
            let mut sources: BTreeMap<usize, ReadySource> = BTreeMap::new();
            let mut input = std::pin::pin!(input);
            let last_batch: BTreeMap<usize, usize> =
                (0..plan.batches()).map(|batch| (plan.batch(batch).subject, batch)).collect();
            for number in 0..plan.batches() {
                let subject = plan.batch(number).subject;
                while !sources.contains_key(&subject) {
                    match input.next().await {
                        Some(source) => drop(sources.insert(source.subject, source)),
                        None if log.stop.requested() => return,
                        None => Err(ended_early("synthesize"))?,
                    }
                }
                if log.stop.requested() {
                    return;
                }
                let source = sources[&subject].clone();
                let keys = proxy_keys.of(number, &table);
                let claim = match table.missing(&keys).is_empty() {
                    true => Ok(None),
                    false => tokio::select! {
                        claim = claim_missing(store, &table, &keys) => claim,
                        () = log.stop.wait() => return,
                    },
                };
                let claim = claim?;
                let made = match &claim {
                    None => {
                        meter.reuse(keys.len());
                        None
                    }
                    Some(_) => {
                        let made = source.make(plan, number, &subjects[subject], meter).await?;
                        meter.add(keys.len());
                        Some(made)
                    }
                };
                yield ProxyBatch { batch: number, keys, made, claim };
                let checkpoint = match last_batch.get(&subject) == Some(&number) {
                    true => self.checkpoint(&source).await?,
                    false => None,
                };
                if let Some(checkpoint) = checkpoint {
                    let is_read = evaluated.pass(checkpoint).await;
                    if !is_read {
                        // The evaluation was stopped or has failed, and says so itself.
                        return;
                    }
                }
            }
        }
    }

    /// The supervisor behind `source` as a model to evaluate.
    async fn checkpoint(&self, source: &ReadySource) -> Result<Option<Checkpoint>> {
        let (Some((sampler, step)), Some(adapter)) = (&self.supervisor, source.adapter.clone())
        else {
            return Ok(None);
        };
        let reading = sampler.get().await?;
        let values = reading.call(&self.log.meter, move |learner| learner.read(&adapter));
        Ok(Some(Checkpoint {
            method: Method::Supervisor,
            step: *step,
            subjects: vec![source.subject],
            values: Arc::new(values.await?),
        }))
    }
}

/// Claims the batch with these keys; none where another process that was making it has committed it meanwhile.
async fn claim_missing(
    store: &Store,
    table: &Table<ProxyRow>,
    keys: &[String],
) -> Result<Option<Arc<Claim>>> {
    let claim = store.locks().claim(&batch_claim(keys)).await?;
    table.refresh().await?;
    Ok((!table.missing(keys).is_empty()).then(|| Arc::new(claim)))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::SeqCst;

    use futures::stream;

    use super::super::Subject;
    use super::super::fakes::{FakeSource, Fakes, all, next, picture, supervisors};
    use super::super::source::{ImageSource, SourceImage, WantedBatch};
    use super::*;
    use crate::stream::{Meter, channel};

    async fn stage(fakes: &Fakes, sampler: Option<LazyLearner>) -> Synthesize {
        Synthesize {
            subjects: fakes.subjects.clone(),
            keys: fakes.keys(),
            store: fakes.store.clone(),
            supervisor: sampler.map(|sampler| (sampler, 4)),
            log: fakes.log("synthesize").await,
        }
    }

    #[tokio::test]
    async fn batches_come_in_the_order_of_the_plan_whichever_supervisor_is_ready_first() {
        let fakes = Fakes::new(&[]).await;
        let sampler = fakes.sampler();
        let mut sources = supervisors(&fakes, &sampler);
        sources.reverse();
        let meters = ["a", "b"].map(|name| fakes.board.meter(name, "items"));
        let (outlet, checkpoints) = channel(&fakes.board, "checkpoints", 2, &meters[0], &meters[1]);
        let stage = stage(&fakes, Some(sampler)).await;
        let batches = all(stage.run(stream::iter(sources), vec![outlet]))
            .await
            .unwrap();
        let numbers: Vec<usize> = batches.iter().map(|batch| batch.batch).collect();
        assert_eq!(numbers, (0..fakes.plan.batches()).collect::<Vec<_>>());
        for batch in &batches {
            let planned = &fakes.plan.proxies()[fakes.plan.batch(batch.batch).numbers.clone()];
            let made = batch.made.as_ref().unwrap();
            for ((image, caption), proxy) in made.images.iter().zip(&*made.captions).zip(planned) {
                assert_eq!(
                    (image, &caption.prompt),
                    (&picture(proxy.seed), &proxy.prompt)
                );
            }
        }
        assert_eq!(fakes.work.drawn.load(SeqCst), 24);
        // Each supervisor is evaluated when its last proxies are made.
        let evaluated: Vec<Checkpoint> = checkpoints.collect().await;
        let told = |c: &Checkpoint| (c.method, c.step, c.subjects.clone());
        let expected = [0, 1].map(|subject| (Method::Supervisor, 4, vec![subject]));
        assert_eq!(evaluated.iter().map(told).collect::<Vec<_>>(), expected);
    }

    #[tokio::test]
    async fn what_the_store_has_is_not_made_again() {
        let fakes = Fakes::new(&[]).await;
        fakes.kept().await;
        let sampler = fakes.sampler();
        let sources = supervisors(&fakes, &sampler);
        let stage = stage(&fakes, None).await;
        let batches = all(stage.run(stream::iter(sources), Vec::new()))
            .await
            .unwrap();
        assert_eq!(batches.len(), fakes.plan.batches());
        assert!(
            batches
                .iter()
                .all(|batch| batch.made.is_none() && batch.claim.is_none())
        );
        assert_eq!(fakes.work.of_learners(), [0; 4]);
    }

    #[tokio::test]
    async fn a_stop_ends_it_before_the_next_batch() {
        let fakes = Fakes::new(&[]).await;
        let sampler = fakes.sampler();
        let sources = supervisors(&fakes, &sampler);
        let stage = stage(&fakes, Some(sampler))
            .await
            .run(stream::iter(sources), Vec::new());
        let mut stage = std::pin::pin!(stage);
        assert_eq!(next(&mut stage).await.unwrap().unwrap().batch, 0);
        fakes.stop.request();
        assert!(next(&mut stage).await.is_none());
        assert_eq!(fakes.work.drawn.load(SeqCst), 4);
    }

    #[tokio::test]
    async fn the_error_of_a_broken_model_or_of_a_missing_supervisor_comes_out() {
        let fakes = Fakes::new(&[]).await;
        let sampler = fakes.sampler();
        let sources = supervisors(&fakes, &sampler);
        fakes.work.fails_after.store(6, SeqCst);
        let broken = stage(&fakes, None)
            .await
            .run(stream::iter(sources.clone()), Vec::new());
        let mut broken = std::pin::pin!(broken);
        assert!(next(&mut broken).await.unwrap().is_ok());
        let error = next(&mut broken).await.unwrap().unwrap_err();
        assert_eq!(error.to_string(), "the model is broken");
        assert!(next(&mut broken).await.is_none());
        fakes.work.fails_after.store(0, SeqCst);
        let fakes = fakes.again(&[]);
        let only = stream::iter(sources.into_iter().take(1));
        let error = all(stage(&fakes, None).await.run(only, Vec::new()))
            .await
            .unwrap_err();
        assert!(error.to_string().starts_with("synthesize: "), "{error}");
    }

    /// Gives `count` images of 8 by `height` pixels.
    struct Poor {
        count: usize,
        height: u32,
    }

    impl ImageSource for Poor {
        fn key(&self, _: &Subject) -> String {
            "poor".into()
        }

        fn images<'a>(
            &'a self,
            _: &'a WantedBatch,
            _: &'a Meter,
        ) -> stream::BoxStream<'a, Result<SourceImage>> {
            let image = SourceImage {
                image: image::RgbImage::new(8, self.height),
                prompt: "a dog".into(),
                settings: "{}".into(),
            };
            stream::iter(vec![image; self.count]).map(Ok).boxed()
        }
    }

    #[tokio::test]
    async fn a_source_captions_its_images_itself_and_must_give_all_of_them_as_squares() {
        let fakes = Fakes::new(&[]).await;
        let source = Arc::new(FakeSource(fakes.work.clone()));
        let ready = |subject| ReadySource {
            subject,
            images: source.clone(),
            adapter: None,
        };
        let stage = stage(&fakes, None).await;
        let batches = all(stage.run(stream::iter([0, 1].map(ready)), Vec::new()))
            .await
            .unwrap();
        let captions = &batches[2].made.as_ref().unwrap().captions;
        assert_eq!(captions[1].prompt, "a sks dog number 5");
        // Their claims: nobody keeps them here.
        drop(batches);

        for (poor, fault) in [
            (
                Poor {
                    count: 1,
                    height: 8,
                },
                "1 of 4 images",
            ),
            (
                Poor {
                    count: 4,
                    height: 6,
                },
                "an image of 8 x 6 pixels",
            ),
        ] {
            let poor = ReadySource {
                images: Arc::new(poor),
                ..ready(0)
            };
            let stage = self::stage(&fakes, None).await;
            let error = all(stage.run(stream::iter([poor]), Vec::new()))
                .await
                .unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("the source of dog1 gave {fault}")
            );
        }
    }
}
