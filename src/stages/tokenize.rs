//! tokenize: proxies become VQ tokens, committed for every student with the same tokenizer.

use std::sync::Arc;

use async_stream::try_stream;
use futures::{Stream, StreamExt};
use image::RgbImage;

use super::references::at_side;
use super::{Log, ProxyBatch, ReadyBatch, TokenizerIdentity, ended_early};
use crate::images::{decode_png, pixel_digest};
use crate::models::ImageTokenizer;
use crate::store::{Columns, ProxyRow, Store, TokenRow, now_us};
use crate::stream::{Worker, blocking};
use crate::{Error, Result};

/// Opens an image tokenizer.
pub type OpenTokenizer = Box<dyn Fn() -> Result<Box<dyn ImageTokenizer>> + Send + Sync>;

/// A tokenizer for square images of any size, which it resizes to its own.
pub struct Resizing {
    pub tokenizer: Box<dyn ImageTokenizer>,
    /// Pixels a side.
    pub side: u32,
}

impl ImageTokenizer for Resizing {
    fn encode(&self, images: &[RgbImage]) -> Result<Vec<Vec<u32>>> {
        self.tokenizer.encode(&at_side(images, self.side))
    }
}

/// What the stage needs.
pub struct Tokenize {
    pub store: Arc<Store>,
    /// The student's; `None` for a diffusion student.
    pub tokenizer: Option<TokenizerIdentity>,
    /// Opens it on a thread of its own when it is first needed.
    pub open: Arc<OpenTokenizer>,
    pub log: Log,
}

impl Tokenize {
    /// Tokenizes each batch of `input` as a whole, commits the rows and passes the batch on to training. Without a
    /// tokenizer (a diffusion student reads pixels) batches pass as they are.
    pub fn run(
        self,
        input: impl Stream<Item = ProxyBatch> + Send,
    ) -> impl Stream<Item = Result<ReadyBatch>> + Send {
        try_stream! {
            let Self { store, tokenizer, open, log } = self;
            let meter = &log.meter;
            let mut input = std::pin::pin!(input);
            let mut worker: Option<Worker<Box<dyn ImageTokenizer>>> = None;
            while let Some(batch) = input.next().await {
                if log.stop.requested() {
                    // What is committed is tokenized by the run that goes on.
                    continue;
                }
                let ready = ReadyBatch { batch: batch.batch, keys: batch.keys.clone() };
                let Some(tokenizer) = &tokenizer else {
                    meter.reuse(batch.keys.len());
                    yield ready;
                    continue;
                };
                let table = store.tokens(&tokenizer.digest, tokenizer.count).await?;
                if table.missing(&batch.keys).is_empty() {
                    meter.reuse(batch.keys.len());
                    yield ready;
                    continue;
                }
                let (images, _) = pictures(&store, &batch).await?;
                let worker = match &mut worker {
                    Some(worker) => worker,
                    none => {
                        let open = open.clone();
                        none.insert(Worker::spawn("tokenizer", move || open()).await?)
                    }
                };
                let own = images.clone();
                let tokens = worker.call(meter, move |tokenizer| tokenizer.encode(&own)).await?;
                let grid = tokenizer.count.isqrt() as u32;
                let rows: Vec<TokenRow> = batch
                    .keys
                    .iter()
                    .zip(images.iter())
                    .zip(tokens)
                    .map(|((key, image), tokens)| TokenRow {
                        key: key.clone(),
                        content: pixel_digest(image),
                        grid_height: grid,
                        grid_width: grid,
                        tokens,
                        run: log.run.clone(),
                        created_us: now_us(),
                    })
                    .collect();
                meter.busy(table.append(&rows)).await?;
                meter.add(rows.len());
                yield ready;
            }
        }
    }
}

/// The pixels of a batch with the prompts that they are learnt by: as they came, or from the store.
pub(super) async fn pictures(
    store: &Store,
    batch: &ProxyBatch,
) -> Result<(Arc<Vec<RgbImage>>, Vec<String>)> {
    if let Some(made) = &batch.made {
        let prompts = made.captions.iter().map(|caption| caption.prompt.clone());
        return Ok((made.images.clone(), prompts.collect()));
    }
    let rows = store
        .proxies()
        .await?
        .get(&batch.keys, Columns::All)
        .await?;
    let decode = move || {
        let pictures = rows.into_iter().map(|row| {
            let row = row.ok_or_else(|| ended_early("keep"))?;
            Ok((pixels(&row)?, row.prompt))
        });
        let pictures = pictures.collect::<Result<Vec<_>>>()?;
        let (images, prompts): (Vec<_>, Vec<_>) = pictures.into_iter().unzip();
        Ok((Arc::new(images), prompts))
    };
    blocking("decoding proxies", decode).await
}

/// The pixels of a proxy.
fn pixels(row: &ProxyRow) -> Result<RgbImage> {
    let image = decode_png(&row.image, &row.key)?;
    if pixel_digest(&image) != row.content {
        return Err(Error::Store {
            what: format!(
                "the pixels of proxy {} are not those that were made",
                row.key
            ),
            hint: Some("the store's files were changed from outside: use a new store".into()),
        });
    }
    Ok(image)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::SeqCst;

    use futures::stream;

    use super::super::fakes::{Fakes, all, next, picture};
    use super::*;

    async fn stage(fakes: &Fakes) -> Tokenize {
        let (identity, open) = fakes.tokenizer();
        Tokenize {
            store: fakes.store.clone(),
            tokenizer: Some(identity),
            open,
            log: fakes.log("tokenize").await,
        }
    }

    #[tokio::test]
    async fn pixels_from_the_store_and_those_just_made_become_the_same_tokens_in_order() {
        let fakes = Fakes::new(&[]).await;
        let mut batches = fakes.kept().await;
        batches[1] = fakes.batch(1);
        let ready = all(stage(&fakes).await.run(stream::iter(batches)))
            .await
            .unwrap();
        let numbers: Vec<usize> = ready.iter().map(|batch| batch.batch).collect();
        assert_eq!(numbers, [0, 1, 2, 3, 4, 5]);
        let identity = fakes.tokenizer().0;
        let table = fakes
            .store
            .tokens(&identity.digest, identity.count)
            .await
            .unwrap();
        for batch in ready {
            let planned = &fakes.plan.proxies()[fakes.plan.batch(batch.batch).numbers.clone()];
            let rows = table.get(&batch.keys, Columns::All).await.unwrap();
            for (row, proxy) in rows.into_iter().zip(planned) {
                let row = row.unwrap();
                assert_eq!(
                    row.tokens[0],
                    u32::from(picture(proxy.seed).get_pixel(0, 0).0[0])
                );
                assert_eq!((row.grid_height, row.grid_width), (2, 2));
            }
        }
        assert_eq!(fakes.work.encoded.load(SeqCst), 24);
        // A second run opens no tokenizer.
        let again = fakes.again(&[]);
        let batches = stream::iter(fakes.batches());
        assert_eq!(
            all(stage(&again).await.run(batches)).await.unwrap().len(),
            6
        );
        assert_eq!(again.work.encoded.load(SeqCst), 0);
    }

    #[tokio::test]
    async fn a_diffusion_student_gets_batches_as_they_are() {
        let fakes = Fakes::new(&[]).await;
        let mut stage = stage(&fakes).await;
        stage.tokenizer = None;
        let ready = all(stage.run(stream::iter(fakes.batches()))).await.unwrap();
        assert_eq!(ready[5].keys, fakes.batch(5).keys);
        assert_eq!(fakes.work.encoded.load(SeqCst), 0);
    }

    #[tokio::test]
    async fn after_a_stop_it_takes_what_comes_and_passes_nothing_on() {
        let fakes = Fakes::new(&[]).await;
        let taken = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let count = taken.clone();
        let input = stream::iter(fakes.batches()).inspect(move |_| {
            count.fetch_add(1, SeqCst);
        });
        let stage = stage(&fakes).await.run(input);
        let mut stage = std::pin::pin!(stage);
        assert!(next(&mut stage).await.unwrap().is_ok());
        fakes.stop.request();
        assert!(next(&mut stage).await.is_none());
        assert_eq!(
            (taken.load(SeqCst), fakes.work.encoded.load(SeqCst)),
            (6, 4)
        );
    }

    #[tokio::test]
    async fn a_proxy_that_is_not_there_or_not_what_was_made_ends_it() {
        let fakes = Fakes::new(&[]).await;
        let mut lost = fakes.batch(0);
        lost.made = None;
        let error = all(stage(&fakes).await.run(stream::iter([lost.clone()])))
            .await
            .unwrap_err();
        assert!(error.to_string().starts_with("keep: "), "{error}");
        let table = fakes.store.proxies().await.unwrap();
        fakes.kept().await;
        let row = table
            .get(&lost.keys[..1], Columns::All)
            .await
            .unwrap()
            .remove(0)
            .unwrap();
        let changed = ProxyRow {
            content: "other".into(),
            ..row
        };
        assert!(
            pixels(&changed)
                .unwrap_err()
                .to_string()
                .contains("not those that were made")
        );
    }
}
