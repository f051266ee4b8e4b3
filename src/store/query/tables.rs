//! Lance tables as SQL sees them: each key once, and the columns of the present layout.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hasher};
use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray};
use arrow::datatypes::{DataType, Field, FieldRef, Schema, SchemaRef, UInt64Type};
use arrow::row::{RowConverter, SortField};
use datafusion::catalog::TableProvider;
use datafusion::common::ScalarValue;
use datafusion::common::metadata::FieldMetadata;
use datafusion::datasource::MemTable;
use datafusion::logical_expr::{Expr, cast, col, lit};
use futures::TryStreamExt;
use lance::Dataset;
use lance::datafusion::LanceTableProvider;
use lance::dataset::builder::DatasetBuilder;
use lance::session::Session;

use super::Snapshot;
use super::failure::explained;
use crate::store::columns::{self, broken, width_of};
use crate::store::failure::failed;
use crate::store::layout;
use crate::store::rows::{EvaluationRow, MetricRow, ProxyRow, Row, RunRow, SubjectRow, TokenRow};
use crate::{Error, Result};

/// Bytes of a table that are in memory at once, about.
pub(super) const BATCH_BYTES: u64 = 8 << 20;
pub(super) const ROW_ID: &str = "_rowid";

/// What the rows of a table are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::store) enum TableKind {
    Subjects,
    Proxies,
    Tokens,
    Evaluations,
    Metrics,
    Runs,
    /// Made by somebody else; read as it is.
    Foreign,
}

impl TableKind {
    /// The tables that every store has, if only without rows.
    pub const FIXED: [(&'static str, TableKind); 4] = [
        ("metrics", TableKind::Metrics),
        ("proxies", TableKind::Proxies),
        ("runs", TableKind::Runs),
        ("subjects", TableKind::Subjects),
    ];

    pub fn is_fixed(name: &str) -> bool {
        Self::FIXED.iter().any(|(known, _)| *known == name)
    }

    pub fn of(name: &str) -> Self {
        let fixed = Self::FIXED.iter().find(|(known, _)| *known == name);
        match fixed {
            Some((_, kind)) => *kind,
            None if name.starts_with("tokens_") => TableKind::Tokens,
            None if name.starts_with("evaluations_") => TableKind::Evaluations,
            None => TableKind::Foreign,
        }
    }

    /// What a row is.
    pub fn row(self) -> &'static str {
        match self {
            TableKind::Subjects => "a reference image of a subject",
            TableKind::Proxies => "an image made by a supervisor, with what made it",
            TableKind::Tokens => "the codebook indices that one image tokenizer gives a proxy",
            TableKind::Evaluations => {
                "scores and embeddings of a proxy, sample or reference, by one pair of evaluators"
            }
            TableKind::Metrics => "one number of one step: a point of a curve",
            TableKind::Runs => "a change of a run's status",
            TableKind::Foreign => "unknown: proxytune did not make this table",
        }
    }

    fn key(self) -> &'static [&'static str] {
        match self {
            TableKind::Subjects => SubjectRow::KEY,
            TableKind::Proxies => ProxyRow::KEY,
            TableKind::Tokens => TokenRow::KEY,
            TableKind::Evaluations => EvaluationRow::KEY,
            TableKind::Metrics => MetricRow::KEY,
            TableKind::Runs => RunRow::KEY,
            TableKind::Foreign => &[],
        }
    }

    /// The present layout; lengths of vectors are taken from `found`. None for a table that is not ours, or does not
    /// tell its lengths.
    fn schema(self, found: Option<&Schema>) -> Option<SchemaRef> {
        let width = |name| found.and_then(|found| width_of(found, name).ok());
        match self {
            TableKind::Subjects => Some(SubjectRow::schema()),
            TableKind::Proxies => Some(ProxyRow::schema()),
            TableKind::Tokens => Some(TokenRow::schema(width("tokens")?)),
            TableKind::Evaluations => Some(EvaluationRow::schema(
                width("clip_embedding")?,
                width("dino_embedding")?,
            )),
            TableKind::Metrics => Some(MetricRow::schema()),
            TableKind::Runs => Some(RunRow::schema()),
            TableKind::Foreign => None,
        }
    }
}

/// The dataset in `path` as it lies on disk; none where none of its versions was committed.
pub(super) async fn open(path: &Path, session: &Arc<Session>) -> Result<Option<Dataset>> {
    let uri = path.to_str().ok_or_else(|| {
        Error::invalid(
            "the store's path is not UTF-8",
            "choose another directory with --store",
        )
    })?;
    let loading = DatasetBuilder::from_uri(uri).with_session(session.clone());
    match Box::pin(loading.load()).await {
        Ok(dataset) => Ok(Some(dataset)),
        Err(lance::Error::DatasetNotFound { .. } | lance::Error::NotFound { .. }) => Ok(None),
        Err(e) => Err(failed("open", path, e)),
    }
}

/// The table `name` of `snapshot`, with Lance's ids of its rows if `row_ids`. An older layout is read with nulls in the
/// columns that it lacks; nothing is written.
///
/// Errors: a newer layout, or a foreign one under a name of ours; files that cannot be read.
pub(super) async fn provider(
    snapshot: &Snapshot,
    name: &str,
    row_ids: bool,
) -> Result<Arc<dyn TableProvider>> {
    let (kind, path) = (
        TableKind::of(name),
        snapshot.path.join(format!("{name}.lance")),
    );
    let explain = |e| explained(e, Some(snapshot));
    let Some(dataset) = snapshot.dataset(name).await? else {
        let schema = kind
            .schema(None)
            .unwrap_or_else(|| Arc::new(Schema::empty()));
        let empty = MemTable::try_new(schema, vec![Vec::new()]).map_err(explain)?;
        return Ok(Arc::new(empty));
    };
    let found: Schema = dataset.schema().into();
    let ours = kind.schema(Some(&found));
    let lacking = match &ours {
        Some(ours) => layout::lacks(&path, ours, &dataset)?.unwrap_or_default(),
        None if kind == TableKind::Foreign => Vec::new(),
        None => {
            return Err(broken(format!(
                "{}: its vectors have no length",
                path.display()
            )));
        }
    };
    let hidden = match kind.key() {
        [] => Vec::new(),
        key => duplicates(&dataset, key)
            .await
            .map_err(|e| failed("read", &path, e))?,
    };
    let table = |with_row_id| {
        LanceTableProvider::new(dataset.clone(), with_row_id, false)
            .with_batch_size_bytes(BATCH_BYTES)
    };
    let counted = |field: &&FieldRef| kind != TableKind::Foreign && is_count(field);
    if hidden.is_empty() && lacking.is_empty() && !found.fields().iter().any(|f| counted(&f)) {
        return Ok(Arc::new(table(row_ids)));
    }
    let mut frame = snapshot
        .context
        .read_table(Arc::new(table(row_ids || !hidden.is_empty())))
        .map_err(explain)?;
    if !hidden.is_empty() {
        let ids: Vec<Expr> = hidden.into_iter().map(lit).collect();
        frame = frame
            .filter(col(ROW_ID).in_list(ids, true))
            .map_err(explain)?;
    }
    let shown: Vec<Expr> = found
        .fields()
        .iter()
        .map(|field| match counted(&field) {
            true => as_type(ident(field.name()), field, DataType::Int64),
            false => ident(field.name()),
        })
        .chain(lacking.iter().map(|field| null(field)))
        .chain(row_ids.then(|| ident(ROW_ID)))
        .collect();
    Ok(frame.select(shown).map_err(explain)?.into_view())
}

/// A column by exactly this name, whatever its case.
fn ident(name: &str) -> Expr {
    datafusion::logical_expr::ident(name)
}

/// Whether `field` counts something. SQL knows signed numbers alone: `step / 50` of an unsigned one is no whole number
/// there, and `step - 1` may be none at all. Seeds take all 64 bits, and nobody reckons with them.
fn is_count(field: &Field) -> bool {
    matches!(field.data_type(), DataType::UInt32 | DataType::UInt64) && field.name() != "seed"
}

fn null(field: &Field) -> Expr {
    as_type(lit(ScalarValue::Null), field, field.data_type().clone())
}

/// `expression` as a column like `field`, but of the type `kind`.
fn as_type(expression: Expr, field: &Field, kind: DataType) -> Expr {
    let metadata = FieldMetadata::from(field.metadata().clone());
    cast(expression, kind).alias_with_metadata(field.name(), Some(metadata))
}

/// The ids of the rows of `dataset` whose `key` an earlier row has: what two processes wrote at the same moment.
///
/// One pass over the key columns compares hashes alone; only where two are equal, a second one compares keys.
async fn duplicates(dataset: &Dataset, key: &[&str]) -> lance::Result<Vec<u64>> {
    let mut hashes = Vec::new();
    each_key(dataset, key, |hash, _, _| hashes.push(hash)).await?;
    hashes.sort_unstable();
    let twice: HashSet<u64> = hashes
        .windows(2)
        .filter(|pair| pair[0] == pair[1])
        .map(|pair| pair[0])
        .collect();
    if twice.is_empty() {
        return Ok(Vec::new());
    }
    let mut suspects = Vec::new();
    each_key(dataset, key, |hash, id, key| {
        if twice.contains(&hash) {
            suspects.push((id, key.to_vec()));
        }
    })
    .await?;
    suspects.sort_unstable();
    let mut seen = HashSet::new();
    suspects.retain(|(_, key)| !seen.insert(key.clone()));
    Ok(suspects.into_iter().map(|(id, _)| id).collect())
}

/// Calls `take` with the hash, the row id and the encoded key of each row.
async fn each_key(
    dataset: &Dataset,
    key: &[&str],
    mut take: impl FnMut(u64, u64, &[u8]) + Send,
) -> lance::Result<()> {
    let mut scan = dataset.scan();
    scan.with_row_id().scan_in_order(false);
    scan.project(key)?;
    let mut batches = Box::pin(scan.try_into_stream()).await?;
    while let Some(batch) = batches.try_next().await? {
        let ids = batch[ROW_ID].as_primitive::<UInt64Type>();
        let columns: Vec<ArrayRef> = key.iter().map(|name| batch[*name].clone()).collect();
        let kinds = columns
            .iter()
            .map(|column| SortField::new(column.data_type().clone()));
        let rows = RowConverter::new(kinds.collect())?.convert_columns(&columns)?;
        for (row, id) in rows.iter().zip(ids.values()) {
            let mut hasher = DefaultHasher::new();
            hasher.write(row.as_ref());
            take(hasher.finish(), *id, row.as_ref());
        }
    }
    Ok(())
}

/// The settings of all runs, one a row, from their resolved files.
///
/// Errors: files that cannot be read.
pub(super) async fn settings(snapshot: &Snapshot) -> Result<Arc<dyn TableProvider>> {
    let (mut runs, mut names, mut values) = (Vec::new(), Vec::new(), Vec::new());
    for batch in snapshot
        .sql("SELECT run, resolved FROM latest_runs ORDER BY event_us")
        .await?
        .all()
        .await?
    {
        let (run, resolved) = (
            columns::text(&batch, "run")?,
            columns::text(&batch, "resolved")?,
        );
        for i in 0..batch.num_rows() {
            // A file that cannot be parsed was written by another program: it has no settings to show.
            let parsed: toml::Table = toml::from_str(&resolved(i)).unwrap_or_default();
            let mut found = Vec::new();
            flatten("", &parsed, &mut found);
            for (name, value) in found {
                runs.push(run(i));
                names.push(name);
                values.push(value);
            }
        }
    }
    let texts = |texts: &[String]| columns::strings(texts.iter().map(String::as_str));
    let field = |name| Field::new(name, DataType::Utf8, false);
    let schema = Arc::new(Schema::new(vec![
        field("run"),
        field("setting"),
        field("value"),
    ]));
    let batch = columns::batch(&schema, vec![texts(&runs), texts(&names), texts(&values)])?;
    let table = MemTable::try_new(schema, vec![vec![batch]]);
    Ok(Arc::new(table.map_err(|e| explained(e, Some(snapshot)))?))
}

/// The leaves of `table` with their paths, in the order of the file.
fn flatten(path: &str, table: &toml::Table, found: &mut Vec<(String, String)>) {
    for (name, value) in table {
        let path = match path {
            "" => name.clone(),
            path => format!("{path}.{name}"),
        };
        match value {
            toml::Value::Table(table) => flatten(&path, table, found),
            toml::Value::String(text) => found.push((path, text.clone())),
            other => found.push((path, other.to_string())),
        }
    }
}
