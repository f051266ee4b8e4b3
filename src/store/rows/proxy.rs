//! Proxies.

use arrow::array::{Int64Array, UInt32Array, UInt64Array};
use arrow::datatypes::DataType::{Int64, LargeBinary, UInt32, UInt64, Utf8};
use arrow::datatypes::SchemaRef;
use arrow::record_batch::RecordBatch;

use super::{Row, SCHEMA_VERSION};
use crate::Result;
use crate::store::columns::{
    self, bytes, column, i64s, picture, required, strings, text, u32s, u64s,
};

/// An image made by a supervisor, with everything that made it.
#[derive(Clone, Debug, PartialEq)]
pub struct ProxyRow {
    /// Digest of everything that affects the image, prompt and seed included.
    pub key: String,
    /// Digest of the supervisor: photos, base checkpoint, adapter settings, adapter.
    pub supervisor: String,
    pub run: String,
    pub subject: String,
    pub class: String,
    pub token: String,
    /// The proxy's number in the plan, from 0.
    pub number: u64,
    pub prompt: String,
    pub seed: u64,
    /// The sampling settings, JSON.
    pub settings: String,
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// PNG.
    pub image: Vec<u8>,
    /// Digest of the pixels.
    pub content: String,
    pub created_us: i64,
}

impl ProxyRow {
    pub fn schema() -> SchemaRef {
        columns::schema(
            SCHEMA_VERSION,
            vec![
                required(
                    "key",
                    Utf8,
                    "digest of everything that affects the image, hex",
                ),
                required(
                    "supervisor",
                    Utf8,
                    "digest of the supervisor that made it, hex",
                ),
                required("run", Utf8, "the run that made it"),
                required("subject", Utf8, "the subject's name"),
                required("class", Utf8, "what the subject is"),
                required(
                    "token",
                    Utf8,
                    "the word that stands for the subject in prompts",
                ),
                required("number", UInt64, "the proxy's number in the plan, from 0"),
                required("prompt", Utf8, "the prompt it was made from"),
                required("seed", UInt64, "the seed of its noise"),
                required("settings", Utf8, "the sampling settings, JSON"),
                required("width", UInt32, "pixels"),
                required("height", UInt32, "pixels"),
                required("image", LargeBinary, "the picture, PNG"),
                required("content", Utf8, "digest of the pixels, hex"),
                required("created_us", Int64, "microseconds since 1970, UTC"),
            ],
        )
    }
}

impl Row for ProxyRow {
    const KEY: &'static [&'static str] = &["key"];
    const VOLATILE: &'static [&'static str] = &["run", "created_us"];
    const PICTURES: &'static [&'static str] = &["image"];

    fn key(&self) -> String {
        self.key.clone()
    }

    fn to_batch(rows: &[&Self], schema: &SchemaRef) -> Result<RecordBatch> {
        columns::batch(
            schema,
            vec![
                strings(rows.iter().map(|r| r.key.as_str())),
                strings(rows.iter().map(|r| r.supervisor.as_str())),
                strings(rows.iter().map(|r| r.run.as_str())),
                strings(rows.iter().map(|r| r.subject.as_str())),
                strings(rows.iter().map(|r| r.class.as_str())),
                strings(rows.iter().map(|r| r.token.as_str())),
                u64s(rows.iter().map(|r| r.number)),
                strings(rows.iter().map(|r| r.prompt.as_str())),
                u64s(rows.iter().map(|r| r.seed)),
                strings(rows.iter().map(|r| r.settings.as_str())),
                u32s(rows.iter().map(|r| r.width)),
                u32s(rows.iter().map(|r| r.height)),
                bytes(rows.iter().map(|r| r.image.as_slice())),
                strings(rows.iter().map(|r| r.content.as_str())),
                i64s(rows.iter().map(|r| r.created_us)),
            ],
        )
    }

    fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>> {
        let (key, supervisor, run) = (
            text(batch, "key")?,
            text(batch, "supervisor")?,
            text(batch, "run")?,
        );
        let (subject, class, token) = (
            text(batch, "subject")?,
            text(batch, "class")?,
            text(batch, "token")?,
        );
        let (prompt, settings, content) = (
            text(batch, "prompt")?,
            text(batch, "settings")?,
            text(batch, "content")?,
        );
        let number: &UInt64Array = column(batch, "number")?;
        let seed: &UInt64Array = column(batch, "seed")?;
        let width: &UInt32Array = column(batch, "width")?;
        let height: &UInt32Array = column(batch, "height")?;
        let created: &Int64Array = column(batch, "created_us")?;
        let image = picture(batch, "image")?;
        let row = |i| Self {
            key: key(i),
            supervisor: supervisor(i),
            run: run(i),
            subject: subject(i),
            class: class(i),
            token: token(i),
            number: number.value(i),
            prompt: prompt(i),
            seed: seed.value(i),
            settings: settings(i),
            width: width.value(i),
            height: height.value(i),
            image: image(i).unwrap_or_default(),
            content: content(i),
            created_us: created.value(i),
        };
        Ok((0..batch.num_rows()).map(row).collect())
    }
}
