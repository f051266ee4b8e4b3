//! Appending row by row: rows wait in a buffer and are committed together.

use std::collections::HashSet;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::Instant;

use super::index::key_digest;
use super::rows::Row;
use super::table::Table;
use crate::Result;

/// When buffered rows are committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// At so many buffered rows.
    pub rows: usize,
    /// When a row comes so long after the first of them.
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
}

/// A buffer before a table. Rows are committed when one comes that makes them as many as the limit, or that comes so much
/// later than the first, and on [`Writer::flush`].
///
/// A row whose key is in the table or the buffer already is dropped, so writing again what a killed run wrote is
/// harmless. When a commit fails, its rows stay in the buffer. Dropping a writer drops what it has not committed.
pub struct Writer<R> {
    table: Table<R>,
    limits: Limits,
    buffer: Mutex<Buffer<R>>,
}

impl<R: Row> Writer<R> {
    /// A writer before `table`, with an empty buffer.
    pub fn with_limits(table: Table<R>, limits: Limits) -> Self {
        Self {
            table,
            limits,
            buffer: Mutex::new(Buffer {
                rows: Vec::new(),
                keys: HashSet::new(),
                since: None,
            }),
        }
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
        if buffer.rows.len() >= self.limits.rows || since.elapsed() >= self.limits.age {
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

    async fn commit(&self, buffer: &mut Buffer<R>) -> Result<()> {
        if buffer.rows.is_empty() {
            return Ok(());
        }
        // Rows leave the buffer only after the commit: an error, or a caller that gives up, loses none of them.
        self.table.append(&buffer.rows).await?;
        buffer.rows.clear();
        buffer.keys.clear();
        buffer.since = None;
        Ok(())
    }
}
