//! Reference images.

use arrow::array::{Int64Array, UInt32Array};
use arrow::datatypes::DataType::{Int64, LargeBinary, UInt32, Utf8};
use arrow::datatypes::SchemaRef;
use arrow::record_batch::RecordBatch;

use super::{Row, SCHEMA_VERSION};
use crate::Result;
use crate::store::columns::{self, bytes, column, i64s, picture, required, strings, text, u32s};

/// A reference image of a subject.
#[derive(Clone, Debug, PartialEq)]
pub struct SubjectRow {
    /// Digest of subject and file bytes.
    pub key: String,
    pub subject: String,
    /// What the subject is, e.g. "dog".
    pub class: String,
    /// The word that stands for the subject in prompts, e.g. "sks".
    pub token: String,
    /// Position among the subject's references, from 0.
    pub index: u32,
    pub file_name: String,
    /// Pixels, after EXIF rotation.
    pub width: u32,
    /// Pixels, after EXIF rotation.
    pub height: u32,
    /// The file as it was found, or a PNG of the same pixels.
    pub image: Vec<u8>,
    pub created_us: i64,
}

impl SubjectRow {
    pub fn schema() -> SchemaRef {
        columns::schema(
            SCHEMA_VERSION,
            vec![
                required("key", Utf8, "digest of subject and file bytes, hex"),
                required("subject", Utf8, "the subject's name"),
                required("class", Utf8, "what the subject is"),
                required(
                    "token",
                    Utf8,
                    "the word that stands for the subject in prompts",
                ),
                required(
                    "index",
                    UInt32,
                    "position among the subject's references, from 0",
                ),
                required("file_name", Utf8, "name of the file it came from"),
                required("width", UInt32, "pixels"),
                required("height", UInt32, "pixels"),
                required("image", LargeBinary, "the picture, encoded"),
                required("created_us", Int64, "microseconds since 1970, UTC"),
            ],
        )
    }
}

impl Row for SubjectRow {
    const KEY: &'static [&'static str] = &["key"];
    const VOLATILE: &'static [&'static str] = &["created_us"];
    const PICTURES: &'static [&'static str] = &["image"];

    fn key(&self) -> String {
        self.key.clone()
    }

    fn to_batch(rows: &[&Self], schema: &SchemaRef) -> Result<RecordBatch> {
        columns::batch(
            schema,
            vec![
                strings(rows.iter().map(|r| r.key.as_str())),
                strings(rows.iter().map(|r| r.subject.as_str())),
                strings(rows.iter().map(|r| r.class.as_str())),
                strings(rows.iter().map(|r| r.token.as_str())),
                u32s(rows.iter().map(|r| r.index)),
                strings(rows.iter().map(|r| r.file_name.as_str())),
                u32s(rows.iter().map(|r| r.width)),
                u32s(rows.iter().map(|r| r.height)),
                bytes(rows.iter().map(|r| r.image.as_slice())),
                i64s(rows.iter().map(|r| r.created_us)),
            ],
        )
    }

    fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>> {
        let (key, subject) = (text(batch, "key")?, text(batch, "subject")?);
        let (class, token) = (text(batch, "class")?, text(batch, "token")?);
        let file_name = text(batch, "file_name")?;
        let index: &UInt32Array = column(batch, "index")?;
        let width: &UInt32Array = column(batch, "width")?;
        let height: &UInt32Array = column(batch, "height")?;
        let created: &Int64Array = column(batch, "created_us")?;
        let image = picture(batch, "image")?;
        let row = |i| Self {
            key: key(i),
            subject: subject(i),
            class: class(i),
            token: token(i),
            index: index.value(i),
            file_name: file_name(i),
            width: width.value(i),
            height: height.value(i),
            image: image(i).unwrap_or_default(),
            created_us: created.value(i),
        };
        Ok((0..batch.num_rows()).map(row).collect())
    }
}
