//! One Lance dataset, spoken to in record batches, without knowledge of what its rows mean, so that what Lance's futures
//! compile to is compiled once and not once per kind of row.
//!
//! A commit is a new manifest, put in place by one hard link: whoever reads sees the version before or after it,
//! and what a killed writer leaves behind is in no manifest. Appends never conflict with appends.
//!
//! Rows carry Lance's stable ids, which grow with every commit and survive compaction, while fragments are sorted
//! by their own ids, which do not. So "the first row of a key" is the one with the smallest row id.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use arrow::array::{Array, Int64Array, StringArray, UInt32Array, UInt64Array};
use arrow::datatypes::SchemaRef;
use arrow::record_batch::RecordBatch;
use futures::TryStreamExt;
use futures::future::BoxFuture;
use lance::Dataset;
use lance::dataset::builder::DatasetBuilder;
use lance::dataset::{
    InsertBuilder, ProjectionRequest, TakeBuilder, WriteDestination, WriteMode, WriteParams,
};
use lance::session::Session;
use lance::table::format::Fragment;

use super::columns::{self, broken};
use super::failure::failed;
use super::index::{Index, fragments_of, key_digest};
use super::layout;
use super::locks::{Claim, Locks};
use super::upkeep::is_large;
use crate::{Error, Result};

/// A version of a table, and the addresses of rows in it.
type Matching = (Arc<Dataset>, Vec<u64>);

const ROW_ID: &str = "_rowid";
const ROW_ADDRESS: &str = "_rowaddr";
/// So many small fragments make a compaction due after a commit; looked at every so many commits.
const MANY_FRAGMENTS: usize = 64;
const COMMITS_BETWEEN_LOOKS: u64 = 8;

/// One version of a table: no dataset before the first row is committed.
#[derive(Default)]
struct Seen {
    dataset: Option<Arc<Dataset>>,
    index: Index,
}

/// A table in a directory, without knowledge of what its rows mean.
pub(super) struct RawTable {
    path: PathBuf,
    schema: SchemaRef,
    key: &'static [&'static str],
    session: Arc<Session>,
    pub(super) locks: Locks,
    seen: RwLock<Seen>,
    /// Held while the table changes through this handle.
    changing: tokio::sync::Mutex<()>,
    /// Commits through this handle.
    commits: AtomicU64,
}

impl RawTable {
    /// Opens the dataset at `path`, which need not exist yet.
    ///
    /// Errors: another layout than `schema`; files that cannot be read.
    pub fn open<'a>(
        path: PathBuf,
        schema: SchemaRef,
        key: &'static [&'static str],
        session: Arc<Session>,
        locks: Locks,
    ) -> BoxFuture<'a, Result<Self>> {
        Box::pin(async move {
            let table = Self {
                path,
                schema,
                key,
                session,
                locks,
                seen: RwLock::default(),
                changing: tokio::sync::Mutex::new(()),
                commits: AtomicU64::new(0),
            };
            table.refresh().await?;
            Ok(table)
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn seen(&self) -> RwLockReadGuard<'_, Seen> {
        self.seen.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The version that was last seen.
    pub fn dataset(&self) -> Option<Arc<Dataset>> {
        self.seen().dataset.clone()
    }

    /// What `question` finds in the index of the version last seen.
    pub fn ask<T>(&self, question: impl FnOnce(&Index) -> T) -> T {
        question(&self.seen().index)
    }

    /// The version last seen, and the addresses in it of the first rows of `keys`.
    pub fn locate(&self, keys: &[u128]) -> Option<(Arc<Dataset>, Vec<Option<u64>>)> {
        let seen = self.seen();
        let addresses = keys.iter().map(|key| seen.index.address(*key)).collect();
        Some((seen.dataset.clone()?, addresses))
    }

    /// Takes up what was committed elsewhere.
    pub fn refresh<'a>(&'a self) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let _changing = self.changing.lock().await;
            self.take_up_latest().await
        })
    }

    /// Takes up the latest version and keeps other changes through this handle away until the guard is dropped.
    pub fn begin<'a>(&'a self) -> BoxFuture<'a, Result<Change<'a>>> {
        Box::pin(async move {
            let guard = self.changing.lock().await;
            self.take_up_latest().await?;
            Ok(Change {
                table: self,
                _guard: guard,
            })
        })
    }

    /// The same, and keeps appends of all other handles and processes away too: between looking which keys are there
    /// and committing the others, nobody commits them.
    pub fn begin_to_append<'a>(&'a self) -> BoxFuture<'a, Result<(Change<'a>, Claim)>> {
        Box::pin(async move {
            let guard = self.changing.lock().await;
            let turn = self.locks.turn(&self.lock_name("append")).await?;
            self.take_up_latest().await?;
            let change = Change {
                table: self,
                _guard: guard,
            };
            Ok((change, turn))
        })
    }

    pub(super) fn lock_name(&self, act: &str) -> String {
        let table = self.path.file_stem().unwrap_or_default().to_string_lossy();
        format!("tables/{table}.{act}")
    }

    /// Whether a compaction is worth its while, after a commit.
    pub fn wants_compaction(&self) -> bool {
        // Should one fail, the next commits need not all try again.
        let number = self.commits.fetch_add(1, Relaxed);
        number.is_multiple_of(COMMITS_BETWEEN_LOOKS)
            && self.dataset().is_some_and(|dataset| {
                dataset.fragments().iter().filter(|f| !is_large(f)).count() >= MANY_FRAGMENTS
            })
    }

    async fn take_up_latest(&self) -> Result<()> {
        let latest = match self.dataset() {
            None => match self.load().await? {
                None => return Ok(()),
                Some(found) if layout::lacks(&self.path, &self.schema, &found)?.is_none() => found,
                Some(_) => {
                    let _turn = self.locks.turn(&self.lock_name("upgrade")).await?;
                    match self.load_upgraded().await? {
                        None => return Ok(()),
                        Some(upgraded) => upgraded,
                    }
                }
            },
            Some(seen) => {
                let mut latest = Dataset::clone(&seen);
                let checked = Box::pin(latest.checkout_latest()).await;
                checked.map_err(|e| failed("read", &self.path, e))?;
                if latest.version_id() == seen.version_id() {
                    return Ok(());
                }
                latest
            }
        };
        self.take_up(Arc::new(latest)).await
    }

    /// The dataset as it lies on disk; none where there is no directory, or none of its versions was committed.
    async fn load(&self) -> Result<Option<Dataset>> {
        let loading = DatasetBuilder::from_uri(self.uri()?).with_session(self.session.clone());
        match Box::pin(loading.load()).await {
            Ok(dataset) => Ok(Some(dataset)),
            Err(lance::Error::DatasetNotFound { .. } | lance::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(failed("open", &self.path, e)),
        }
    }

    /// The dataset in the present layout. The caller holds the lock to upgrade.
    async fn load_upgraded(&self) -> Result<Option<Dataset>> {
        let Some(mut dataset) = self.load().await? else {
            return Ok(None);
        };
        if let Some(lacking) = layout::lacks(&self.path, &self.schema, &dataset)? {
            layout::upgrade(&self.path, &mut dataset, lacking).await?;
        }
        Ok(Some(dataset))
    }

    fn uri(&self) -> Result<&str> {
        let text = self.path.to_str();
        text.ok_or_else(|| {
            Error::invalid(
                "the store's path is not UTF-8",
                "choose another directory with --store",
            )
        })
    }

    /// Makes `dataset` the version that readers see, with the index brought up to it: of what was appended or
    /// compacted only the new fragments are read, and everything only when rows were deleted.
    pub(super) async fn take_up(&self, dataset: Arc<Dataset>) -> Result<()> {
        let unseen: Vec<Fragment> = self.ask(|index| {
            let now = fragments_of(&dataset);
            let is_new = |f: &&Fragment| index.fragments.get(&f.id) != now.get(&f.id);
            dataset.fragments().iter().filter(is_new).cloned().collect()
        });
        let mut rows = self.keyed_rows(&dataset, unseen).await?;
        let present = rows.iter().map(|(_, id, _)| *id).collect();
        let rebuild = self.ask(|index| index.has_lost(&dataset, &present));
        if rebuild {
            let all = dataset.fragments().as_ref().clone();
            rows = self.keyed_rows(&dataset, all).await?;
        }
        let mut seen = self.seen.write().unwrap_or_else(PoisonError::into_inner);
        if rebuild {
            seen.index = Index::default();
        }
        for (key, id, address) in rows {
            seen.index.insert(key, id, address);
        }
        seen.index.fragments = fragments_of(&dataset);
        seen.dataset = Some(dataset);
        Ok(())
    }

    /// Digest of key, id and address of every row of `fragments`.
    async fn keyed_rows(
        &self,
        dataset: &Dataset,
        fragments: Vec<Fragment>,
    ) -> Result<Vec<(u128, u64, u64)>> {
        let mut rows = Vec::new();
        if fragments.is_empty() {
            return Ok(rows);
        }
        let mut scan = dataset.scan();
        scan.with_fragments(fragments)
            .with_row_id()
            .with_row_address();
        scan.project(self.key)
            .map_err(|e| failed("read", &self.path, e))?;
        self.each_batch(&mut scan, |batch| {
            let (ids, addresses) = (ids(batch, ROW_ID)?, ids(batch, ROW_ADDRESS)?);
            let keys = self
                .texts_of(batch, self.key)?
                .into_iter()
                .map(|key| key_digest(&key));
            rows.extend(
                keys.enumerate()
                    .map(|(i, key)| (key, ids.value(i), addresses.value(i))),
            );
            Ok(())
        })
        .await?;
        Ok(rows)
    }

    async fn each_batch(
        &self,
        scan: &mut lance::dataset::scanner::Scanner,
        mut take: impl FnMut(&RecordBatch) -> Result<()>,
    ) -> Result<()> {
        let failed = |e| failed("read", &self.path, e);
        let mut batches = Box::pin(scan.try_into_stream()).await.map_err(failed)?;
        while let Some(batch) = batches.try_next().await.map_err(failed)? {
            take(&batch)?;
        }
        Ok(())
    }

    /// What names the rows.
    pub fn key(&self) -> &'static [&'static str] {
        self.key
    }

    /// The values of `columns` of `batch` as texts, with slashes between them, row by row.
    fn texts_of(&self, batch: &RecordBatch, columns: &[&str]) -> Result<Vec<String>> {
        let mut keys = vec![String::new(); batch.num_rows()];
        for (position, name) in columns.iter().enumerate() {
            let column = batch.column_by_name(name);
            let column = column
                .ok_or_else(|| broken(format!("column {name} is missing")))?
                .as_any();
            for (row, key) in keys.iter_mut().enumerate() {
                if position > 0 {
                    key.push('/');
                }
                if let Some(texts) = column.downcast_ref::<StringArray>() {
                    key.push_str(texts.value(row));
                } else if let Some(numbers) = column.downcast_ref::<UInt64Array>() {
                    key.push_str(&numbers.value(row).to_string());
                } else if let Some(numbers) = column.downcast_ref::<Int64Array>() {
                    key.push_str(&numbers.value(row).to_string());
                } else if let Some(numbers) = column.downcast_ref::<UInt32Array>() {
                    key.push_str(&numbers.value(row).to_string());
                } else {
                    return Err(broken(format!("column {name} cannot be read as a text")));
                }
            }
        }
        Ok(keys)
    }

    /// The values of `columns` as texts, with slashes between them, of the first rows of keys, in the order of their
    /// commits.
    pub fn texts<'a>(&'a self, columns: &'a [&'a str]) -> BoxFuture<'a, Result<Vec<String>>> {
        Box::pin(async move {
            let Some(dataset) = self.dataset() else {
                return Ok(Vec::new());
            };
            let mut scan = dataset.scan();
            scan.with_row_id();
            scan.project(columns)
                .map_err(|e| failed("read", &self.path, e))?;
            let mut keys = BTreeMap::new();
            self.each_batch(&mut scan, |batch| {
                keys.extend(
                    ids(batch, ROW_ID)?
                        .values()
                        .iter()
                        .copied()
                        .zip(self.texts_of(batch, columns)?),
                );
                Ok(())
            })
            .await?;
            self.ask(|index| keys.retain(|id, _| index.addresses.contains_key(id)));
            Ok(keys.into_values().collect())
        })
    }

    /// The version last seen, and the addresses in it of the first rows that satisfy `filter` (SQL over the
    /// columns), in the order of their commits.
    pub fn matching<'a>(
        &'a self,
        filter: Option<&'a str>,
    ) -> BoxFuture<'a, Result<Option<Matching>>> {
        Box::pin(async move {
            let dataset = {
                let seen = self.seen();
                let Some(dataset) = &seen.dataset else {
                    return Ok(None);
                };
                if filter.is_none() {
                    return Ok(Some((
                        dataset.clone(),
                        seen.index.addresses.values().copied().collect(),
                    )));
                }
                dataset.clone()
            };
            let mut scan = dataset.scan();
            scan.with_row_id().with_row_address();
            scan.project::<&str>(&[])
                .map_err(|e| failed("read", &self.path, e))?;
            scan.filter(filter.unwrap_or("true"))
                .map_err(|e| failed("filter", &self.path, e))?;
            let mut found = BTreeMap::new();
            self.each_batch(&mut scan, |batch| {
                let (ids, addresses) = (ids(batch, ROW_ID)?, ids(batch, ROW_ADDRESS)?);
                found.extend(
                    ids.values()
                        .iter()
                        .copied()
                        .zip(addresses.values().iter().copied()),
                );
                Ok(())
            })
            .await?;
            // Row ids outlive versions, so it does not matter if the index has moved on meanwhile.
            self.ask(|index| found.retain(|id, _| index.addresses.contains_key(id)));
            Ok(Some((dataset, found.into_values().collect())))
        })
    }

    /// The rows of `dataset` at `addresses`, in that order, without the columns of `without`.
    pub fn take<'a>(
        &'a self,
        dataset: &'a Arc<Dataset>,
        addresses: Vec<u64>,
        without: &'a [&'a str],
    ) -> BoxFuture<'a, Result<RecordBatch>> {
        Box::pin(async move {
            let asked = addresses.len();
            let names: Vec<&str> = self
                .schema
                .fields()
                .iter()
                .map(|f| f.name().as_str())
                .collect();
            let names = names.into_iter().filter(|name| !without.contains(name));
            let wanted = ProjectionRequest::from_columns(names, dataset.schema());
            let taken = async {
                let plan = Arc::new(wanted.into_projection_plan(dataset.clone())?);
                let take = TakeBuilder::try_new_from_addresses(dataset.clone(), addresses, plan)?;
                take.execute().await
            };
            let batch = Box::pin(taken)
                .await
                .map_err(|e| failed("read", &self.path, e))?;
            if batch.num_rows() != asked {
                let found = batch.num_rows();
                return Err(broken(format!(
                    "{}: {found} of {asked} rows could be read",
                    self.path.display()
                )));
            }
            Ok(batch)
        })
    }

    fn write_params(&self, mode: WriteMode) -> WriteParams {
        WriteParams {
            mode,
            session: Some(self.session.clone()),
            enable_stable_row_ids: true,
            skip_auto_cleanup: true,
            ..WriteParams::default()
        }
    }

    /// Commits `batch` as the first of the table. Lance would let the slower of two creators overwrite the table of
    /// the faster one: the turn to append keeps them apart.
    async fn create(&self, batch: RecordBatch) -> Result<Arc<Dataset>> {
        let params = self.write_params(WriteMode::Create);
        let insert = InsertBuilder::new(self.uri()?).with_params(&params);
        let inserted = Box::pin(insert.execute(vec![batch])).await;
        inserted
            .map(Arc::new)
            .map_err(|e| failed("create", &self.path, e))
    }

    async fn append_to(&self, dataset: Arc<Dataset>, batch: RecordBatch) -> Result<Arc<Dataset>> {
        let params = self.write_params(WriteMode::Append);
        let insert = InsertBuilder::new(WriteDestination::Dataset(dataset)).with_params(&params);
        let inserted = Box::pin(insert.execute(vec![batch])).await;
        inserted
            .map(Arc::new)
            .map_err(|e| failed("append to", &self.path, e))
    }
}

/// The right to change a table; the latest version has been taken up.
pub(super) struct Change<'a> {
    pub(super) table: &'a RawTable,
    _guard: tokio::sync::MutexGuard<'a, ()>,
}

impl Change<'_> {
    /// Commits `batch`. After an error nothing of it is in the table, unless what failed was the reading afterwards.
    pub fn commit<'a>(&'a self, batch: RecordBatch) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let latest = match self.table.dataset() {
                None => self.table.create(batch).await?,
                Some(dataset) => self.table.append_to(dataset, batch).await?,
            };
            self.table.take_up(latest).await
        })
    }
}

fn ids<'a>(batch: &'a RecordBatch, name: &str) -> Result<&'a UInt64Array> {
    columns::column(batch, name)
}
