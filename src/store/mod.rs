//! The store: one directory, one Lance dataset per kind of record.
//!
//! | table | a row is | key |
//! |---|---|---|
//! | `subjects.lance` | a reference image | digest of subject and bytes |
//! | `proxies.lance` | an image made by a supervisor | digest of everything that affects it |
//! | `tokens_<tokenizer>.lance` | the indices a tokenizer gives a proxy | the proxy's |
//! | `evaluations_<evaluators>.lance` | scores and embeddings of an image | digest of its origin |
//! | `metrics.lance` | one number of one step | run, stage, step, name |
//! | `runs.lance` | a change of a run's status | run, time, status |
//!
//! Scores of different evaluators cannot be compared, nor do their embeddings have one length: each pair of
//! evaluators has a table of its own, as each tokenizer has. A table comes into being with its first row.
//!
//! Any number of processes may append to one store; they take turns under a lock of the operating system, so that no
//! key comes in twice. A row exists once it is committed; should a disk's locks fail, readers keep the first row of a
//! key. Beside the tables, `adapters/` holds what supervisors have learnt, `training/` their checkpoints while they
//! learn, `locks/` who works at what, and `store.json` which store it is ([`identity`]). Python's `lance` and DuckDB can open the tables.

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use arrow::datatypes::SchemaRef;
use futures::future::BoxFuture;
use lance::session::Session;
use tokio::sync::Mutex;

mod columns;
mod dataset;
pub mod export;
mod failure;
pub mod identity;
mod index;
mod layout;
mod locks;
pub mod query;
mod removal;
mod rows;
mod table;
mod upkeep;
mod writer;

pub use columns::DESCRIPTION;
pub use identity::StoreRef;
pub use locks::{Claim, Locks};
pub use removal::Removed;
pub(crate) use removal::{one_of, quoted};
pub use rows::{
    EvaluationRow, Method, MetricRow, MetricStage, PictureKind, ProxyRow, Row, RunRow, RunStatus,
    SCHEMA_VERSION, SubjectRow, TokenRow, now_us,
};
pub use table::{Columns, Table};
pub use upkeep::Compacted;
pub use writer::{Limits, Writer};

use crate::{Error, Result};

/// What Lance may keep in memory of one store, in bytes; its own defaults are several GiB.
const INDEX_CACHE: usize = 64 << 20;
const METADATA_CACHE: usize = 64 << 20;
/// Digits of a digest that a table's name carries.
const NAME_DIGITS: usize = 12;

/// Locked while a process uses the store.
const IN_USE: &str = ".in-use.lock";

/// A directory of tables. Handles to one table from one store share what they know of it.
pub struct Store {
    path: PathBuf,
    /// Where the tables are: `path`, or in memory.
    tables: PathBuf,
    /// Empty where none can be written.
    id: String,
    session: Arc<Session>,
    locks: Locks,
    open: Mutex<BTreeMap<String, Arc<dataset::RawTable>>>,
    access: Access,
    /// Says that this process uses the store; none where the directory cannot be written.
    _in_use: Option<File>,
    /// Of a store in memory.
    _folder: Option<TemporaryFolder>,
}

/// Who may have a store open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    /// Any number of processes.
    Shared,
    /// Any number of processes, which create nothing.
    Reading,
    /// One that erases.
    Alone,
}

impl Store {
    /// Opens the store in `path`, a local directory, which is created if absent. While another process erases from it,
    /// this waits, and says so. `memory://` opens a new store whose tables are in memory; its locks and what its
    /// supervisors learn lie in a temporary folder. All of it is gone when the store is dropped.
    ///
    /// Errors: another URL; a directory that cannot be created; a disk without locks.
    pub async fn open(path: impl AsRef<Path>) -> Result<Self> {
        if path.as_ref().to_str() != Some(MEMORY) {
            return Self::open_as(path, Access::Shared).await;
        }
        let folder = TemporaryFolder::new()?;
        let mut store = Self::open_as(&folder.0, Access::Shared).await?;
        // A path without a host: the table's name is all of it.
        store.tables = format!("{MEMORY}/").into();
        store._folder = Some(folder);
        Ok(store)
    }

    /// Opens the store in `path`, which is there, to read from it: what is no store is not made one.
    ///
    /// Errors: there is no store; a URL; a disk without locks.
    pub async fn open_existing(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_as(path, Access::Reading).await
    }

    /// Opens the store in `path` for erasing, which is possible while no other process has it open; those that come
    /// later wait.
    ///
    /// Errors: there is no store; another process uses it; a directory that cannot be written.
    pub async fn open_alone(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_as(path, Access::Alone).await
    }

    async fn open_as(path: impl AsRef<Path>, access: Access) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        if path.to_str().is_some_and(|text| text.contains("://")) {
            return Err(Error::invalid(
                format!("{} is a URL; a store is a local directory", path.display()),
                "name a directory with --store; a bucket must be mounted first",
            ));
        }
        match access {
            Access::Shared => tokio::fs::create_dir_all(&path)
                .await
                .map_err(Error::io(&path))?,
            Access::Reading | Access::Alone if !identity::is_store(&path) => {
                return Err(identity::no_store(&path));
            }
            Access::Reading | Access::Alone => {}
        }
        let path = tokio::fs::canonicalize(&path)
            .await
            .map_err(Error::io(&path))?;
        let in_use = in_use(&path, access).await?;
        let locks = Locks::new(&path);
        let id = match (access, identity::id_of(&path)?) {
            (_, Some(id)) => id,
            // Where nothing can be written there is none, and nothing to mistake for another.
            (Access::Shared, None) if in_use.is_some() => identity::identify(&path, &locks).await?,
            (_, None) => String::new(),
        };
        Ok(Self {
            locks,
            tables: path.clone(),
            path,
            id,
            access,
            _in_use: in_use,
            _folder: None,
            session: Arc::new(Session::new(INDEX_CACHE, METADATA_CACHE, Arc::default())),
            open: Mutex::default(),
        })
    }

    /// The directory, absolute.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Which store this is, as `keeper`, an absolute folder, notes it.
    pub fn reference(&self, keeper: &Path) -> StoreRef {
        StoreRef::new(&self.id, &self.path, keeper)
    }

    /// Who works at what in this store.
    pub fn locks(&self) -> &Locks {
        &self.locks
    }

    /// The names of the tables that exist, sorted, without `.lance`.
    ///
    /// Errors: a directory that cannot be read.
    pub fn table_names<'a>(&'a self) -> BoxFuture<'a, Result<Vec<String>>> {
        Box::pin(async move {
            if self.tables != self.path {
                let open = self.open.lock().await;
                let filled = open.iter().filter(|(_, table)| table.dataset().is_some());
                return Ok(filled.map(|(name, _)| name.clone()).collect());
            }
            let mut entries = tokio::fs::read_dir(&self.path)
                .await
                .map_err(Error::io(&self.path))?;
            let mut names = Vec::new();
            while let Some(entry) = entries.next_entry().await.map_err(Error::io(&self.path))? {
                let name = entry.file_name();
                names.extend(
                    name.to_str()
                        .and_then(|n| n.strip_suffix(".lance"))
                        .map(str::to_string),
                );
            }
            names.sort_unstable();
            Ok(names)
        })
    }

    /// The reference images.
    ///
    /// Errors, here and below: a table of another schema version; files that cannot be read.
    pub async fn subjects(&self) -> Result<Table<SubjectRow>> {
        self.table("subjects".into(), SubjectRow::schema()).await
    }

    /// The proxies of all supervisors.
    pub async fn proxies(&self) -> Result<Table<ProxyRow>> {
        self.table("proxies".into(), ProxyRow::schema()).await
    }

    /// What the tokenizer of this digest gives: `n` tokens per image.
    pub async fn tokens(&self, tokenizer_digest: &str, n: usize) -> Result<Table<TokenRow>> {
        let name = format!("tokens_{}", short(tokenizer_digest)?);
        self.table(name, TokenRow::schema(n)).await
    }

    /// What the evaluators of this digest give; their embeddings have `clip` and `dino` values.
    pub async fn evaluations(
        &self,
        evaluators_digest: &str,
        clip: usize,
        dino: usize,
    ) -> Result<Table<EvaluationRow>> {
        let name = format!("evaluations_{}", short(evaluators_digest)?);
        self.table(name, EvaluationRow::schema(clip, dino)).await
    }

    /// Loss curves and the like.
    pub async fn metrics(&self) -> Result<Table<MetricRow>> {
        self.table("metrics".into(), MetricRow::schema()).await
    }

    /// The runs and what became of them.
    pub async fn runs(&self) -> Result<Table<RunRow>> {
        self.table("runs".into(), RunRow::schema()).await
    }

    /// Where each run stands: its latest row, by run.
    pub fn latest_runs<'a>(&'a self) -> BoxFuture<'a, Result<BTreeMap<String, RunRow>>> {
        Box::pin(async move {
            let rows = self.runs().await?.rows(None, Columns::All).await?;
            Ok(rows.into_iter().map(|row| (row.run.clone(), row)).collect())
        })
    }

    async fn table<R: Row>(&self, name: String, schema: SchemaRef) -> Result<Table<R>> {
        let mut open = self.open.lock().await;
        if let Some(raw) = open.get(&name)
            && raw.schema() == &schema
        {
            return Ok(Table::new(raw.clone()));
        }
        let path = self.tables.join(format!("{name}.lance"));
        let raw = Arc::new(
            dataset::RawTable::open(
                path,
                schema,
                R::KEY,
                self.session.clone(),
                self.locks.clone(),
            )
            .await?,
        );
        open.insert(name, raw.clone());
        Ok(Table::new(raw))
    }
}

/// The name of a store whose tables are in memory.
const MEMORY: &str = "memory://";

/// A folder of this process that is removed when the value is dropped.
struct TemporaryFolder(PathBuf);

impl TemporaryFolder {
    fn new() -> Result<Self> {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Relaxed);
        let name = format!("proxytune-{}-{}-{number}", std::process::id(), now_us());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).map_err(Error::io(&path))?;
        Ok(Self(path))
    }
}

impl Drop for TemporaryFolder {
    fn drop(&mut self) {
        // What is left of it is the system's to clear.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Holds the lock of the store in `store` for as long as the file lives; it dies with the process, however that ends.
/// None where the directory cannot be written.
async fn in_use(store: &Path, access: Access) -> Result<Option<File>> {
    let path = store.join(IN_USE);
    let locking = tokio::task::spawn_blocking(move || hold(&path, access));
    locking.await.map_err(|e| columns::broken(e.to_string()))?
}

fn hold(path: &Path, access: Access) -> Result<Option<File>> {
    // NFS gives shared locks on files that are open for reading, and exclusive ones on those open for writing.
    let open = File::options()
        .create(true)
        .read(true)
        .append(true)
        .open(path);
    let store = path.with_file_name("");
    match access {
        Access::Shared | Access::Reading => {
            // Who cannot write here cannot erase here either, and reading needs no right to write.
            let Ok(file) = open.or_else(|_| crate::files::open(path)) else {
                return Ok(None);
            };
            let locked = match file.try_lock_shared() {
                Err(TryLockError::WouldBlock) => {
                    let store = store.display();
                    tracing::warn!("{store}: waits until nobody erases from it any more");
                    file.lock_shared()
                }
                Err(TryLockError::Error(e)) => Err(e),
                Ok(()) => Ok(()),
            };
            locked.map_err(|e| locks::without_locks(path, e))?;
            Ok(Some(file))
        }
        Access::Alone => {
            let file = open.map_err(Error::io(path))?;
            match file.try_lock() {
                Ok(()) => Ok(Some(file)),
                Err(TryLockError::Error(e)) => Err(locks::without_locks(path, e)),
                Err(TryLockError::WouldBlock) => Err(Error::Store {
                    what: format!("{} is in use", store.display()),
                    hint: Some(
                        "stop the runs, watches and queries that use it, then try again".into(),
                    ),
                }),
            }
        }
    }
}

/// The part of a digest that names a table.
fn short(digest: &str) -> Result<&str> {
    let digits = digest
        .get(..NAME_DIGITS)
        .filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()));
    digits.ok_or_else(|| Error::Store {
        what: format!("{digest:?} is no digest: at least {NAME_DIGITS} hex digits are needed"),
        hint: None,
    })
}
