//! A table of typed rows.

use std::collections::HashSet;
use std::marker::PhantomData;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use arrow::array::ArrayRef;
use arrow::datatypes::SchemaRef;
use arrow::row::{RowConverter, SortField};
use async_stream::try_stream;
use futures::TryStreamExt;
use futures::stream::BoxStream;
use lance::Dataset;

use super::columns::broken;
use super::dataset::RawTable;
use super::index::key_digest;
use super::rows::Row;
use super::upkeep::Compacted;
use crate::Result;

/// Rows with pictures that are read at once.
const ROWS_WITH_PICTURES: usize = 32;
/// Rows without pictures that are read at once.
const ROWS_WITHOUT_PICTURES: usize = 4096;

/// How long versions stay on disk, when compacting in passing, for the readers that may be at work on them.
const KEEP_VERSIONS: Duration = Duration::from_secs(600);

/// Which columns to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Columns {
    /// All of them.
    All,
    /// All but encoded pictures, which come back empty: much faster where they are large.
    WithoutPictures,
}

impl Columns {
    fn left_out<R: Row>(self) -> &'static [&'static str] {
        match self {
            Columns::All => &[],
            Columns::WithoutPictures => R::PICTURES,
        }
    }
}

/// The rows of one kind. Clones share what is known of the table; readers see the first row of each key.
///
/// What other processes commit shows after [`Table::refresh`].
pub struct Table<R> {
    raw: Arc<RawTable>,
    kind: PhantomData<fn() -> R>,
}

impl<R> Clone for Table<R> {
    fn clone(&self) -> Self {
        Self {
            raw: self.raw.clone(),
            kind: PhantomData,
        }
    }
}

impl<R: Row> Table<R> {
    pub(super) fn new(raw: Arc<RawTable>) -> Self {
        Self {
            raw,
            kind: PhantomData,
        }
    }

    /// The directory of the dataset.
    pub fn path(&self) -> &Path {
        self.raw.path()
    }

    /// The columns; the metadata of each says what it holds.
    pub fn schema(&self) -> SchemaRef {
        self.raw.schema().clone()
    }

    /// The Lance dataset in the version last seen, for queries; none before the first row is committed.
    pub fn dataset(&self) -> Option<Arc<Dataset>> {
        self.raw.dataset()
    }

    /// How many distinct rows there are.
    pub fn count(&self) -> usize {
        self.raw.ask(|index| index.len())
    }

    /// Whether a row with `key` is committed.
    pub fn contains(&self, key: &str) -> bool {
        self.raw.ask(|index| index.contains(key_digest(key)))
    }

    /// Those of `keys` that have no committed row, in their order.
    pub fn missing(&self, keys: &[String]) -> Vec<String> {
        self.raw.ask(|index| {
            let absent = keys.iter().filter(|key| !index.contains(key_digest(key)));
            absent.cloned().collect()
        })
    }

    /// All keys, in the order of their commits.
    ///
    /// Errors: files that cannot be read.
    pub async fn keys(&self) -> Result<Vec<String>> {
        self.raw.texts(self.raw.key()).await
    }

    /// The values of the text column `name`, in the order of the commits of their rows; nothing else is read.
    ///
    /// Errors: files that cannot be read; a column of another kind.
    pub async fn texts(&self, name: &str) -> Result<Vec<String>> {
        self.raw.texts(&[name]).await
    }

    /// Sees what other handles and processes have committed.
    ///
    /// Errors: files that cannot be read.
    pub async fn refresh(&self) -> Result<()> {
        self.raw.refresh().await
    }

    /// Commits those of `rows` whose key is not in the table yet, and returns how many they were. Either all of
    /// them are committed or none; what was committed elsewhere is seen first, and processes that append at once take
    /// turns, so that no key comes in twice. Many small commits are compacted in passing.
    ///
    /// Errors: a full disk, a read-only directory, a vector of the wrong length.
    pub async fn append(&self, rows: &[R]) -> Result<usize> {
        if rows.is_empty() {
            return Ok(0);
        }
        let (change, turn) = self.raw.begin_to_append().await?;
        let mut seen = HashSet::new();
        let fresh: Vec<&R> = self.raw.ask(|index| {
            let fresh = rows.iter().filter(|row| {
                let key = key_digest(&row.key());
                !index.contains(key) && seen.insert(key)
            });
            fresh.collect()
        });
        if !fresh.is_empty() {
            change
                .commit(R::to_batch(&fresh, self.raw.schema())?)
                .await?;
        }
        drop((turn, change));
        if self.raw.wants_compaction()
            && let Err(error) = self.compact(KEEP_VERSIONS).await
        {
            // The rows are safe, only slower to read: no reason to stop a run.
            tracing::warn!("{} was not compacted: {error}", self.path().display());
        }
        Ok(fresh.len())
    }

    /// The rows of `keys`, in that order; none for a key without a committed row.
    ///
    /// Errors: files that cannot be read.
    pub async fn get(&self, keys: &[String], columns: Columns) -> Result<Vec<Option<R>>> {
        let version = || self.raw.dataset().map(|dataset| dataset.version_id());
        let seen = version();
        match self.try_get(keys, columns).await {
            Ok(rows) => Ok(rows),
            Err(error) => {
                // Another process may have compacted the table and removed the version that this handle knows.
                self.raw.refresh().await?;
                match version() == seen {
                    true => Err(error),
                    false => self.try_get(keys, columns).await,
                }
            }
        }
    }

    async fn try_get(&self, keys: &[String], columns: Columns) -> Result<Vec<Option<R>>> {
        let keys: Vec<u128> = keys.iter().map(|key| key_digest(key)).collect();
        let Some((dataset, addresses)) = self.raw.locate(&keys) else {
            return Ok(vec![None; keys.len()]);
        };
        let mut distinct: Vec<u64> = addresses.iter().flatten().copied().collect();
        distinct.sort_unstable();
        distinct.dedup();
        if distinct.is_empty() {
            return Ok(vec![None; keys.len()]);
        }
        let batch = self
            .raw
            .take(&dataset, distinct.clone(), columns.left_out::<R>())
            .await?;
        let rows = R::from_batch(&batch)?;
        let row =
            |address: Option<u64>| Some(rows[distinct.binary_search(&address?).ok()?].clone());
        Ok(addresses.into_iter().map(row).collect())
    }

    /// The rows that satisfy `filter` (SQL over the columns, e.g. `subject = 'dog6' AND number < 10`), in the order
    /// of their commits, as of now.
    ///
    /// Errors, within the stream: a filter that cannot be understood, files that cannot be read.
    pub fn scan(&self, filter: Option<&str>, columns: Columns) -> BoxStream<'static, Result<R>> {
        let (raw, filter) = (self.raw.clone(), filter.map(str::to_string));
        Box::pin(try_stream! {
            if let Some((dataset, addresses)) = raw.matching(filter.as_deref()).await? {
                let heavy = columns == Columns::All && !R::PICTURES.is_empty();
                let at_once = if heavy { ROWS_WITH_PICTURES } else { ROWS_WITHOUT_PICTURES };
                for chunk in addresses.chunks(at_once) {
                    let batch = raw.take(&dataset, chunk.to_vec(), columns.left_out::<R>()).await?;
                    for row in R::from_batch(&batch)? {
                        yield row;
                    }
                }
            }
        })
    }

    /// All rows that satisfy `filter`, as [`Table::scan`] gives them.
    pub async fn rows(&self, filter: Option<&str>, columns: Columns) -> Result<Vec<R>> {
        self.scan(filter, columns).try_collect().await
    }

    /// Puts many small fragments together and removes versions from disk that were out of date for longer than `keep`:
    /// cheap when there is little to do. Readers of other processes work on the version they know for at least `keep`.
    ///
    /// Errors: a full disk, a read-only directory.
    pub async fn compact(&self, keep: Duration) -> Result<Compacted> {
        self.raw.begin().await?.compact(keep).await
    }

    /// A digest of the set of rows, whatever their order, without the columns that tell when and in which run they
    /// were made: two stores with equal digests hold equal rows.
    ///
    /// Errors: files that cannot be read.
    pub async fn digest(&self) -> Result<String> {
        let Some((dataset, addresses)) = self.raw.matching(None).await? else {
            return Ok(blake3::hash(&[]).to_hex().to_string());
        };
        let mut digests = Vec::with_capacity(addresses.len());
        for chunk in addresses.chunks(ROWS_WITH_PICTURES) {
            let batch = self.raw.take(&dataset, chunk.to_vec(), R::VOLATILE).await?;
            let kinds = batch
                .schema()
                .fields()
                .iter()
                .map(|f| SortField::new(f.data_type().clone()))
                .collect();
            let columns: Vec<ArrayRef> = batch.columns().to_vec();
            let rows =
                RowConverter::new(kinds).and_then(|converter| converter.convert_columns(&columns));
            let rows = rows.map_err(|e| broken(e.to_string()))?;
            digests.extend(
                rows.iter()
                    .map(|row| *blake3::hash(row.as_ref()).as_bytes()),
            );
        }
        digests.sort_unstable();
        Ok(blake3::hash(digests.as_flattened()).to_hex().to_string())
    }
}
