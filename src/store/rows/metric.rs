//! Loss curves and the like.

use arrow::array::{Float64Array, Int64Array, UInt64Array};
use arrow::datatypes::DataType::{Float64, Int64, UInt64, Utf8};
use arrow::datatypes::SchemaRef;
use arrow::record_batch::RecordBatch;

use super::words::words;
use super::{MetricStage, Row, SCHEMA_VERSION};
use crate::Result;
use crate::store::columns::{self, column, f64s, i64s, required, strings, text, u64s};

/// One number of one step: a point of a curve.
#[derive(Clone, Debug, PartialEq)]
pub struct MetricRow {
    pub run: String,
    pub stage: MetricStage,
    pub step: u64,
    /// E.g. "loss", "learning_rate".
    pub name: String,
    pub value: f64,
    pub created_us: i64,
}

impl MetricRow {
    pub fn schema() -> SchemaRef {
        columns::schema(
            SCHEMA_VERSION,
            vec![
                required("run", Utf8, "the run"),
                required("stage", Utf8, "the stage"),
                required("step", UInt64, "the step, from 0"),
                required("name", Utf8, "what was measured"),
                required("value", Float64, "the value"),
                required("created_us", Int64, "microseconds since 1970, UTC"),
            ],
        )
    }
}

impl Row for MetricRow {
    const KEY: &'static [&'static str] = &["run", "stage", "step", "name"];
    const VOLATILE: &'static [&'static str] = &["run", "created_us"];
    const PICTURES: &'static [&'static str] = &[];

    fn key(&self) -> String {
        format!("{}/{}/{}/{}", self.run, self.stage, self.step, self.name)
    }

    fn to_batch(rows: &[&Self], schema: &SchemaRef) -> Result<RecordBatch> {
        let stages: Vec<String> = rows.iter().map(|r| r.stage.to_string()).collect();
        columns::batch(
            schema,
            vec![
                strings(rows.iter().map(|r| r.run.as_str())),
                strings(stages.iter().map(String::as_str)),
                u64s(rows.iter().map(|r| r.step)),
                strings(rows.iter().map(|r| r.name.as_str())),
                f64s(rows.iter().map(|r| r.value)),
                i64s(rows.iter().map(|r| r.created_us)),
            ],
        )
    }

    fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>> {
        let (run, name) = (text(batch, "run")?, text(batch, "name")?);
        let stage: Vec<MetricStage> = words(batch, "stage")?;
        let step: &UInt64Array = column(batch, "step")?;
        let value: &Float64Array = column(batch, "value")?;
        let created: &Int64Array = column(batch, "created_us")?;
        let row = |i: usize| Self {
            run: run(i),
            stage: stage[i].clone(),
            step: step.value(i),
            name: name(i),
            value: value.value(i),
            created_us: created.value(i),
        };
        Ok((0..batch.num_rows()).map(row).collect())
    }
}
