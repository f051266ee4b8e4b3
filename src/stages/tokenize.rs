//! tokenize: proxies become VQ tokens, committed for every student with the same tokenizer.

use std::sync::Arc;

use async_stream::try_stream;
use futures::{Stream, StreamExt};
use image::RgbImage;

use super::references::at_side;
use super::{Context, ProxyBatch, ReadyBatch, ended_early};
use crate::images::{decode_png, pixel_digest};
use crate::models::ImageTokenizer;
use crate::store::{Columns, TokenRow, now_us};
use crate::stream::{Meter, Worker, blocking};
use crate::{Error, Result};

/// Opens the tokenizer on a thread of its own when it is first needed.
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

/// Tokenizes each batch of `input` as a whole, commits the rows and passes the batch on to training. Without a
/// tokenizer (a diffusion student reads pixels) batches pass as they are.
pub fn tokenize(
    context: Arc<Context>,
    open: Arc<OpenTokenizer>,
    input: impl Stream<Item = ProxyBatch> + Send,
    meter: Meter,
) -> impl Stream<Item = Result<ReadyBatch>> + Send {
    try_stream! {
        let mut input = std::pin::pin!(input);
        let mut worker: Option<Worker<Box<dyn ImageTokenizer>>> = None;
        while let Some(batch) = input.next().await {
            if context.stop.requested() {
                // What is committed is tokenized by the run that goes on.
                continue;
            }
            let ready = ReadyBatch { batch: batch.batch, keys: batch.keys.clone() };
            let Some(tokenizer) = &context.tokenizer else {
                meter.reuse(batch.keys.len());
                yield ready;
                continue;
            };
            let table = context.store.tokens(&tokenizer.digest, tokenizer.count).await?;
            if table.missing(&batch.keys).is_empty() {
                meter.reuse(batch.keys.len());
                yield ready;
                continue;
            }
            let images = pixels(&context, &batch).await?;
            let worker = match &mut worker {
                Some(worker) => worker,
                none => {
                    let open = open.clone();
                    none.insert(Worker::spawn("tokenizer", move || open()).await?)
                }
            };
            let own = images.clone();
            let tokens = worker.call(&meter, move |tokenizer| tokenizer.encode(&own)).await?;
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
                    run: context.run.clone(),
                    created_us: now_us(),
                })
                .collect();
            meter.busy(table.append(&rows)).await?;
            meter.add(rows.len());
            yield ready;
        }
    }
}

/// The pixels of a batch: as they came, or from the store.
pub(super) async fn pixels(context: &Context, batch: &ProxyBatch) -> Result<Arc<Vec<RgbImage>>> {
    if let Some(images) = &batch.images {
        return Ok(images.clone());
    }
    let rows = context
        .store
        .proxies()
        .await?
        .get(&batch.keys, Columns::All)
        .await?;
    let decode = move || {
        let images = rows.into_iter().map(|row| {
            let row = row.ok_or_else(|| ended_early("keep"))?;
            let image = decode_png(&row.image, &row.key)?;
            if pixel_digest(&image) != row.content {
                return Err(Error::Store {
                    what: format!(
                        "the pixels of proxy {} are not those that were made",
                        row.key
                    ),
                    hint: Some(
                        "the store's files were changed from outside: use a new store".into(),
                    ),
                });
            }
            Ok(image)
        });
        images.collect::<Result<Vec<_>>>().map(Arc::new)
    };
    blocking("decoding proxies", decode).await
}
