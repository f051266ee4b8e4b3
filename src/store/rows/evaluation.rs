//! Scores and embeddings.

use arrow::array::{Array, Float32Array, Int64Array, UInt64Array};
use arrow::datatypes::DataType::{Float32, Int64, LargeBinary, UInt64, Utf8};
use arrow::datatypes::{Float32Type, SchemaRef};
use arrow::record_batch::RecordBatch;

use super::words::{maybe_words, words};
use super::{Method, PictureKind, Row, SCHEMA_VERSION};
use crate::Result;
use crate::store::columns::{
    self, column, i64s, maybe_bytes, maybe_f32s, maybe_strings, maybe_text, nullable, picture,
    required, since, strings, text, u64s, vector, vector_at, vectors,
};

/// The scores and embeddings that one pair of evaluators gives an image.
#[derive(Clone, Debug, PartialEq)]
pub struct EvaluationRow {
    /// Digest of the image's origin; the proxy's key for proxies.
    pub key: String,
    pub kind: PictureKind,
    pub run: String,
    /// What drew it; none of references.
    pub method: Option<Method>,
    /// The training step whose checkpoint drew it.
    pub step: u64,
    pub subject: String,
    pub prompt: String,
    pub seed: u64,
    /// Mean cosine to the references, in -1..=1.
    pub clip_i: Option<f32>,
    /// Cosine to the prompt, in -1..=1.
    pub clip_t: Option<f32>,
    /// Mean cosine to the references, in -1..=1.
    pub dino: Option<f32>,
    /// The image's CLIP embedding.
    pub clip_embedding: Option<Vec<f32>>,
    /// The image's DINO embedding.
    pub dino_embedding: Option<Vec<f32>>,
    /// PNG, for samples; proxies and references have theirs elsewhere.
    pub image: Option<Vec<u8>>,
    pub created_us: i64,
    /// Digest of the trained values that drew a sample; none for proxies and references, and for samples drawn
    /// before layout 2.
    pub adapter: Option<String>,
}

impl EvaluationRow {
    /// Embeddings of `clip` and `dino` values.
    pub fn schema(clip: usize, dino: usize) -> SchemaRef {
        columns::schema(
            SCHEMA_VERSION,
            vec![
                required(
                    "key",
                    Utf8,
                    "digest of the image's origin, hex; the proxy's key for proxies",
                ),
                required("kind", Utf8, "proxy, sample or reference"),
                required("run", Utf8, "the run that scored it"),
                required(
                    "method",
                    Utf8,
                    "supervisor, direct, student, untouched; empty for references",
                ),
                required("step", UInt64, "the training step whose checkpoint drew it"),
                required("subject", Utf8, "the subject's name"),
                required("prompt", Utf8, "the prompt it was made from"),
                required("seed", UInt64, "the seed it was made from"),
                nullable(
                    "clip_i",
                    Float32,
                    "CLIP-I: mean cosine to the references, -1 to 1",
                ),
                nullable("clip_t", Float32, "CLIP-T: cosine to the prompt, -1 to 1"),
                nullable(
                    "dino",
                    Float32,
                    "DINO: mean cosine to the references, -1 to 1",
                ),
                nullable(
                    "clip_embedding",
                    vector(Float32, clip),
                    "the image's CLIP embedding",
                ),
                nullable(
                    "dino_embedding",
                    vector(Float32, dino),
                    "the image's DINO embedding",
                ),
                nullable("image", LargeBinary, "the picture, PNG; samples only"),
                required("created_us", Int64, "microseconds since 1970, UTC"),
                since(
                    2,
                    nullable(
                        "adapter",
                        Utf8,
                        "digest of the trained values that drew it, hex; samples only",
                    ),
                ),
            ],
        )
    }
}

impl Row for EvaluationRow {
    const KEY: &'static [&'static str] = &["key"];
    const VOLATILE: &'static [&'static str] = &["run", "created_us"];
    const PICTURES: &'static [&'static str] = &["image"];

    fn key(&self) -> String {
        self.key.clone()
    }

    fn to_batch(rows: &[&Self], schema: &SchemaRef) -> Result<RecordBatch> {
        let clip = rows.iter().map(|r| r.clip_embedding.as_deref());
        let dino = rows.iter().map(|r| r.dino_embedding.as_deref());
        columns::batch(
            schema,
            vec![
                strings(rows.iter().map(|r| r.key.as_str())),
                strings(rows.iter().map(|r| r.kind.name())),
                strings(rows.iter().map(|r| r.run.as_str())),
                strings(rows.iter().map(|r| r.method.map_or("", Method::name))),
                u64s(rows.iter().map(|r| r.step)),
                strings(rows.iter().map(|r| r.subject.as_str())),
                strings(rows.iter().map(|r| r.prompt.as_str())),
                u64s(rows.iter().map(|r| r.seed)),
                maybe_f32s(rows.iter().map(|r| r.clip_i)),
                maybe_f32s(rows.iter().map(|r| r.clip_t)),
                maybe_f32s(rows.iter().map(|r| r.dino)),
                vectors::<Float32Type>(schema, "clip_embedding", clip)?,
                vectors::<Float32Type>(schema, "dino_embedding", dino)?,
                maybe_bytes(rows.iter().map(|r| r.image.as_deref())),
                i64s(rows.iter().map(|r| r.created_us)),
                maybe_strings(rows.iter().map(|r| r.adapter.as_deref())),
            ],
        )
    }

    fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>> {
        let (key, run) = (text(batch, "key")?, text(batch, "run")?);
        let kind = words(batch, "kind")?;
        let method = maybe_words(batch, "method")?;
        let (subject, prompt) = (text(batch, "subject")?, text(batch, "prompt")?);
        let step: &UInt64Array = column(batch, "step")?;
        let seed: &UInt64Array = column(batch, "seed")?;
        let score = |name| -> Result<_> {
            let values: &Float32Array = column(batch, name)?;
            Ok(|i| values.is_valid(i).then(|| values.value(i)))
        };
        let (clip_i, clip_t, dino) = (score("clip_i")?, score("clip_t")?, score("dino")?);
        let clip_embedding = vector_at::<Float32Type>(batch, "clip_embedding")?;
        let dino_embedding = vector_at::<Float32Type>(batch, "dino_embedding")?;
        let image = picture(batch, "image")?;
        let created: &Int64Array = column(batch, "created_us")?;
        let adapter = maybe_text(batch, "adapter")?;
        let row = |i: usize| Self {
            key: key(i),
            kind: kind[i],
            run: run(i),
            method: method[i],
            step: step.value(i),
            subject: subject(i),
            prompt: prompt(i),
            seed: seed.value(i),
            clip_i: clip_i(i),
            clip_t: clip_t(i),
            dino: dino(i),
            clip_embedding: clip_embedding(i),
            dino_embedding: dino_embedding(i),
            image: image(i),
            created_us: created.value(i),
            adapter: adapter(i),
        };
        Ok((0..batch.num_rows()).map(row).collect())
    }
}
