//! The records: what each table holds, column by column. Times are microseconds since 1970 (UTC); digests are
//! lower-case hex; pictures are encoded files.

use arrow::datatypes::SchemaRef;
use arrow::record_batch::RecordBatch;

use crate::Result;

mod evaluation;
mod metric;
mod proxy;
mod run;
mod subject;
mod token;
mod words;

pub use evaluation::EvaluationRow;
pub use metric::MetricRow;
pub use proxy::ProxyRow;
pub use run::RunRow;
pub use subject::SubjectRow;
pub use token::TokenRow;
pub use words::{Method, MetricStage, PictureKind, RunStatus};

/// The layout that this program writes. It grows by one with every change of a table's columns or of their meaning.
///
/// | layout | what changed |
/// |---|---|
/// | 1 | the first |
/// | 2 | evaluations say which adapter drew a sample |
///
/// Tables of older layouts are brought up to this one when they are opened; those of newer ones are refused.
pub const SCHEMA_VERSION: u32 = 2;

/// Microseconds since 1970 (UTC), for `created_us` and `event_us`.
pub fn now_us() -> i64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_micros() as i64)
}

/// One kind of record. A table keeps the first row of each key.
pub trait Row: Clone + Send + Sync + 'static {
    /// The columns that together identify a row, texts or integers.
    const KEY: &'static [&'static str];
    /// Columns that tell when and in which run a row was made: left out of [`crate::store::Table::digest`].
    const VOLATILE: &'static [&'static str];
    /// Columns of encoded pictures, which can be left out when reading.
    const PICTURES: &'static [&'static str];

    /// The values of the `KEY` columns, joined by `/`.
    fn key(&self) -> String;

    /// `rows` as Arrow columns in the order of `schema`.
    ///
    /// Errors: a vector whose length differs from the schema's.
    fn to_batch(rows: &[&Self], schema: &SchemaRef) -> Result<RecordBatch>;

    /// The rows of `batch`; columns of `PICTURES` may be absent, and are then empty.
    ///
    /// Errors: a column that is absent or of another type.
    fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>>;
}
