//! Runs and what became of them.

use arrow::array::Int64Array;
use arrow::datatypes::DataType::{Int64, Utf8};
use arrow::datatypes::SchemaRef;
use arrow::record_batch::RecordBatch;

use super::words::words;
use super::{Row, RunStatus, SCHEMA_VERSION};
use crate::Result;
use crate::store::columns::{self, column, i64s, required, strings, text};

/// A change of a run's status. The latest row of a run says where it stands.
#[derive(Clone, Debug, PartialEq)]
pub struct RunRow {
    pub run: String,
    /// The pipeline file as it was written.
    pub pipeline: String,
    /// The pipeline with every setting resolved.
    pub resolved: String,
    pub plan_digest: String,
    /// Versions of the program, its checkpoints and formats, JSON.
    pub versions: String,
    pub status: RunStatus,
    pub event_us: i64,
}

impl RunRow {
    pub fn schema() -> SchemaRef {
        columns::schema(
            SCHEMA_VERSION,
            vec![
                required("run", Utf8, "the run"),
                required(
                    "pipeline",
                    Utf8,
                    "the pipeline file as it was written, TOML",
                ),
                required(
                    "resolved",
                    Utf8,
                    "the pipeline with every setting resolved, TOML",
                ),
                required("plan_digest", Utf8, "digest of the plan, hex"),
                required("versions", Utf8, "program, checkpoints and formats, JSON"),
                required("status", Utf8, "where the run stands since event_us"),
                required("event_us", Int64, "microseconds since 1970, UTC"),
            ],
        )
    }
}

impl Row for RunRow {
    const KEY: &'static [&'static str] = &["run", "event_us", "status"];
    const VOLATILE: &'static [&'static str] = &["run", "event_us"];
    const PICTURES: &'static [&'static str] = &[];

    fn key(&self) -> String {
        format!("{}/{}/{}", self.run, self.event_us, self.status.name())
    }

    fn to_batch(rows: &[&Self], schema: &SchemaRef) -> Result<RecordBatch> {
        columns::batch(
            schema,
            vec![
                strings(rows.iter().map(|r| r.run.as_str())),
                strings(rows.iter().map(|r| r.pipeline.as_str())),
                strings(rows.iter().map(|r| r.resolved.as_str())),
                strings(rows.iter().map(|r| r.plan_digest.as_str())),
                strings(rows.iter().map(|r| r.versions.as_str())),
                strings(rows.iter().map(|r| r.status.name())),
                i64s(rows.iter().map(|r| r.event_us)),
            ],
        )
    }

    fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>> {
        let (run, pipeline, resolved) = (
            text(batch, "run")?,
            text(batch, "pipeline")?,
            text(batch, "resolved")?,
        );
        let (plan_digest, versions) = (text(batch, "plan_digest")?, text(batch, "versions")?);
        let status = words(batch, "status")?;
        let event: &Int64Array = column(batch, "event_us")?;
        let row = |i: usize| Self {
            run: run(i),
            pipeline: pipeline(i),
            resolved: resolved(i),
            plan_digest: plan_digest(i),
            versions: versions(i),
            status: status[i],
            event_us: event.value(i),
        };
        Ok((0..batch.num_rows()).map(row).collect())
    }
}
