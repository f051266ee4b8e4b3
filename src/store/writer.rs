//! Appending row by row: rows wait in a buffer and are committed together.

use std::collections::HashSet;
use std::time::Duration;

use futures::{Stream, StreamExt};
use tokio::sync::{Mutex, watch};
use tokio::time::Instant;

use super::dataset::key_digest;
use super::rows::Row;
use super::table::Table;
use crate::{Error, Result};

/// Between two looks at what other processes have committed, while waiting for it.
const LOOK: Duration = Duration::from_millis(200);

/// When buffered rows are committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// At so many buffered rows.
    pub rows: usize,
    /// So long after the first of them.
    pub age: Duration,
}

impl Default for Limits {
    /// 64 rows, 30 s.
    fn default() -> Self {
        Self {
            rows: 64,
            age: Duration::from_secs(30),
        }
    }
}

struct Buffer<R> {
    rows: Vec<R>,
    keys: HashSet<u128>,
    /// When the first of `rows` came.
    since: Option<Instant>,
    /// What each waiting caller still needs; forgotten at every commit, after which the callers ask again.
    wanted: Vec<HashSet<u128>>,
}

/// A buffer before a table. Rows are committed at 64 of them, 30 s after the first, on [`Writer::flush`], or as
/// soon as all that a call of [`Writer::wait_for`] waits for are there.
///
/// A row whose key is in the table or the buffer already is dropped, so writing again what a killed run wrote is
/// harmless. When a commit fails, its rows stay in the buffer. Dropping a writer drops what it has not committed.
pub struct Writer<R> {
    table: Table<R>,
    limits: Limits,
    buffer: Mutex<Buffer<R>>,
    committed: watch::Sender<u64>,
    closed: watch::Sender<bool>,
}

impl<R: Row> Writer<R> {
    /// A writer with the usual limits.
    pub fn new(table: Table<R>) -> Self {
        Self::with_limits(table, Limits::default())
    }

    pub fn with_limits(table: Table<R>, limits: Limits) -> Self {
        Self {
            table,
            limits,
            buffer: Mutex::new(Buffer {
                rows: Vec::new(),
                keys: HashSet::new(),
                since: None,
                wanted: Vec::new(),
            }),
            committed: watch::Sender::new(0),
            closed: watch::Sender::new(false),
        }
    }

    /// The table behind the buffer.
    pub fn table(&self) -> &Table<R> {
        &self.table
    }

    /// How many rows this writer has committed: changes with every commit.
    pub fn committed(&self) -> watch::Receiver<u64> {
        self.committed.subscribe()
    }

    /// Takes `row` and commits the buffer if it is due. Returns false if a row with its key is there already.
    ///
    /// Errors: those of [`Table::append`]; the row is in the buffer then.
    pub async fn push(&self, row: R) -> Result<bool> {
        let mut buffer = self.buffer.lock().await;
        let key = row.key();
        if self.table.contains(&key) || !buffer.keys.insert(key_digest(&key)) {
            return Ok(false);
        }
        buffer.rows.push(row);
        let since = *buffer.since.get_or_insert_with(Instant::now);
        let awaited = buffer
            .wanted
            .iter()
            .any(|keys| keys.is_subset(&buffer.keys));
        if buffer.rows.len() >= self.limits.rows || since.elapsed() >= self.limits.age || awaited {
            self.commit(&mut buffer).await?;
        }
        Ok(true)
    }

    /// Commits what is buffered.
    ///
    /// Errors: those of [`Table::append`].
    pub async fn flush(&self) -> Result<()> {
        self.commit(&mut *self.buffer.lock().await).await
    }

    /// Resolves when the oldest buffered row has waited for its time; never while the buffer is empty.
    pub async fn due(&self) {
        let since = self.buffer.lock().await.since;
        match since {
            Some(since) => tokio::time::sleep_until(since + self.limits.age).await,
            None => std::future::pending().await,
        }
    }

    /// Writes `rows` until they end, each buffer in its time, and commits the last ones.
    ///
    /// Errors: those of [`Table::append`].
    pub async fn write_all(&self, rows: impl Stream<Item = R>) -> Result<()> {
        let mut rows = std::pin::pin!(rows);
        loop {
            tokio::select! {
                row = rows.next() => match row {
                    Some(row) => drop(self.push(row).await?),
                    None => return self.flush().await,
                },
                () = self.due() => self.flush().await?,
            }
        }
    }

    /// Waits until all of `keys` are committed, by this or any other process, and has them committed as soon as the
    /// last of them is buffered here.
    ///
    /// Errors: those of [`Table::append`]; keys that are still missing when the writer is closed.
    pub async fn wait_for(&self, keys: &[String]) -> Result<()> {
        let (mut committed, mut closed) = (self.committed.subscribe(), self.closed.subscribe());
        loop {
            let over = *closed.borrow_and_update();
            {
                let mut buffer = self.buffer.lock().await;
                committed.borrow_and_update();
                let missing = self.table.missing(keys);
                if missing.is_empty() {
                    return Ok(());
                }
                let wanted: HashSet<_> = missing.iter().map(|key| key_digest(key)).collect();
                if wanted.is_subset(&buffer.keys) {
                    return self.commit(&mut buffer).await;
                }
                if over && self.table.refresh().await.is_ok() && self.table.missing(keys).is_empty()
                {
                    return Ok(());
                }
                if over {
                    return Err(Error::Store {
                        what: format!(
                            "{} rows of {} were waited for but never written, {} among them",
                            missing.len(),
                            self.table.path().display(),
                            missing[0],
                        ),
                        hint: None,
                    });
                }
                // One entry for each caller that waits: a look round makes no second one.
                if !buffer.wanted.contains(&wanted) {
                    buffer.wanted.push(wanted);
                }
            }
            // Both senders live as long as `self`, so they only tell of changes.
            tokio::select! {
                _ = committed.changed() => (),
                _ = closed.changed() => (),
                () = tokio::time::sleep(LOOK) => self.table.refresh().await?,
            }
        }
    }

    /// Commits what is buffered and says that nothing more will come: whoever waits in vain gets an error.
    ///
    /// Errors: those of [`Table::append`].
    pub async fn close(&self) -> Result<()> {
        let flushed = self.flush().await;
        self.closed.send_replace(true);
        flushed
    }

    async fn commit(&self, buffer: &mut Buffer<R>) -> Result<()> {
        if buffer.rows.is_empty() {
            return Ok(());
        }
        // Rows leave the buffer only after the commit: an error, or a caller that gives up, loses none of them.
        self.table.append(&buffer.rows).await?;
        let count = buffer.rows.len() as u64;
        buffer.rows.clear();
        buffer.keys.clear();
        buffer.wanted.clear();
        buffer.since = None;
        self.committed.send_modify(|committed| *committed += count);
        Ok(())
    }
}
