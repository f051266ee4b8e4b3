//! Tokens: what image tokenizers make of proxies.

use arrow::array::{Int64Array, UInt32Array};
use arrow::datatypes::DataType::{Int64, UInt32, Utf8};
use arrow::datatypes::{SchemaRef, UInt32Type};
use arrow::record_batch::RecordBatch;

use super::{Row, SCHEMA_VERSION};
use crate::Result;
use crate::store::columns::{
    self, column, i64s, required, strings, text, u32s, vector, vector_at, vectors,
};

/// The indices that one image tokenizer gives a proxy.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenRow {
    /// The proxy's key.
    pub key: String,
    /// Digest of the pixels that were tokenized.
    pub content: String,
    /// Rows of the token grid.
    pub grid_height: u32,
    /// Columns of the token grid.
    pub grid_width: u32,
    /// Codebook indices, row by row, `grid_height * grid_width` of them.
    pub tokens: Vec<u32>,
    pub run: String,
    pub created_us: i64,
}

impl TokenRow {
    /// `n` tokens per image.
    pub fn schema(n: usize) -> SchemaRef {
        columns::schema(
            SCHEMA_VERSION,
            vec![
                required("key", Utf8, "the proxy's key, hex"),
                required(
                    "content",
                    Utf8,
                    "digest of the pixels that were tokenized, hex",
                ),
                required("grid_height", UInt32, "rows of the token grid"),
                required("grid_width", UInt32, "columns of the token grid"),
                required("tokens", vector(UInt32, n), "codebook indices, row by row"),
                required("run", Utf8, "the run that made it"),
                required("created_us", Int64, "microseconds since 1970, UTC"),
            ],
        )
    }
}

impl Row for TokenRow {
    const KEY: &'static [&'static str] = &["key"];
    const VOLATILE: &'static [&'static str] = &["run", "created_us"];
    const PICTURES: &'static [&'static str] = &[];

    fn key(&self) -> String {
        self.key.clone()
    }

    fn to_batch(rows: &[&Self], schema: &SchemaRef) -> Result<RecordBatch> {
        let tokens = rows.iter().map(|r| Some(r.tokens.as_slice()));
        columns::batch(
            schema,
            vec![
                strings(rows.iter().map(|r| r.key.as_str())),
                strings(rows.iter().map(|r| r.content.as_str())),
                u32s(rows.iter().map(|r| r.grid_height)),
                u32s(rows.iter().map(|r| r.grid_width)),
                vectors::<UInt32Type>(schema, "tokens", tokens)?,
                strings(rows.iter().map(|r| r.run.as_str())),
                i64s(rows.iter().map(|r| r.created_us)),
            ],
        )
    }

    fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>> {
        let (key, content, run) = (
            text(batch, "key")?,
            text(batch, "content")?,
            text(batch, "run")?,
        );
        let grid_height: &UInt32Array = column(batch, "grid_height")?;
        let grid_width: &UInt32Array = column(batch, "grid_width")?;
        let tokens = vector_at::<UInt32Type>(batch, "tokens")?;
        let created: &Int64Array = column(batch, "created_us")?;
        let row = |i| Self {
            key: key(i),
            content: content(i),
            grid_height: grid_height.value(i),
            grid_width: grid_width.value(i),
            tokens: tokens(i).unwrap_or_default(),
            run: run(i),
            created_us: created.value(i),
        };
        Ok((0..batch.num_rows()).map(row).collect())
    }
}
