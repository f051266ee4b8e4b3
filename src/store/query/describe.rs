//! What there is to ask: tables, views and columns, with units, rows and sizes.

use std::path::Path;

use arrow::datatypes::DataType;

use super::tables::TableKind;
use super::views::{self, VIEWS};
use super::{Snapshot, failure::explained};
use crate::store::columns::DESCRIPTION;
use crate::{Error, Result};
use futures::future::BoxFuture;

/// A table or view.
#[derive(Debug, Clone, PartialEq)]
pub struct TableInfo {
    pub name: String,
    /// What a row is.
    pub row: String,
    /// Rows, duplicates not hidden, and bytes on disk with all kept versions; none for views.
    pub size: Option<(u64, u64)>,
    /// The table that it is another name of.
    pub alias_of: Option<String>,
    pub columns: Vec<ColumnInfo>,
}

/// A column.
#[derive(Debug, Clone, PartialEq)]
pub struct ColumnInfo {
    pub name: String,
    /// "text", "u64", "32 x f32", "bytes" and so on.
    pub kind: String,
    /// What it holds, with its unit; may be empty.
    pub description: String,
}

impl Snapshot {
    /// The tables, then the views, in the order of their names.
    ///
    /// Errors: a table of a newer layout; files that cannot be read.
    pub fn tables<'a>(&'a self) -> BoxFuture<'a, Result<Vec<TableInfo>>> {
        Box::pin(async move {
            let mut tables = Vec::new();
            for name in &self.names {
                let Some(dataset) = self.dataset(name).await? else {
                    continue;
                };
                let path = self.path.join(format!("{name}.lance"));
                let rows = dataset.count_rows(None).await;
                let rows =
                    rows.map_err(|e| crate::store::failure::failed("count", &path, e))? as u64;
                let bytes = bytes_below(&path).map_err(Error::io(&path))?;
                tables.push(TableInfo {
                    row: TableKind::of(name).row().to_string(),
                    size: Some((rows, bytes)),
                    alias_of: None,
                    columns: self.columns(name, &[]).await?,
                    name: name.clone(),
                });
            }
            for view in VIEWS {
                // A view of nothing has no columns to tell of.
                let Ok(columns) = self.columns(view.name, view.columns).await else {
                    continue;
                };
                tables.push(TableInfo {
                    name: view.name.to_string(),
                    row: view.row.to_string(),
                    size: None,
                    alias_of: views::alias(self, view.name).await?,
                    columns,
                });
            }
            Ok(tables)
        })
    }

    async fn columns(&self, name: &str, described: &[(&str, &str)]) -> Result<Vec<ColumnInfo>> {
        self.ensure(name).await?;
        let provider = self.context.table_provider(name).await;
        let schema = provider.map_err(|e| explained(e, Some(self)))?.schema();
        let columns = schema.fields().iter().map(|field| {
            let own = described.iter().find(|(name, _)| name == field.name());
            let stored = || field.metadata().get(DESCRIPTION).map_or("", String::as_str);
            ColumnInfo {
                name: field.name().clone(),
                kind: kind(field.data_type()),
                description: own.map_or_else(stored, |(_, text)| text).to_string(),
            }
        });
        Ok(columns.collect())
    }
}

/// `tables` as people read it.
pub fn tables_text(tables: &[TableInfo]) -> String {
    let mut text = String::new();
    for table in tables {
        let size = match table.size {
            Some((rows, bytes)) => format!("{rows} rows, {}", size_text(bytes)),
            None => "view".to_string(),
        };
        if let Some(whole) = &table.alias_of {
            text += &format!("{}  (view)\n  another name of {whole}\n\n", table.name);
            continue;
        }
        text += &format!("{}  ({size})\n  a row is {}\n", table.name, table.row);
        let width = |of: fn(&ColumnInfo) -> &str| {
            let widths = table
                .columns
                .iter()
                .map(|column| of(column).chars().count());
            widths.max().unwrap_or(0)
        };
        let (names, kinds) = (width(|c| &c.name), width(|c| &c.kind));
        for column in &table.columns {
            let line = format!(
                "    {:names$}  {:kinds$}  {}",
                column.name, column.kind, column.description
            );
            text += line.trim_end();
            text.push('\n');
        }
        text.push('\n');
    }
    text += "functions beside DataFusion's: json_text(text, 'a.b'), the value at a path of a JSON text\n";
    text
}

/// A type as people read it.
pub(super) fn kind(kind: &DataType) -> String {
    match kind {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => "text".into(),
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView => "bytes".into(),
        DataType::UInt32 => "u32".into(),
        DataType::UInt64 => "u64".into(),
        DataType::Int64 => "i64".into(),
        DataType::Float32 => "f32".into(),
        DataType::Float64 => "f64".into(),
        DataType::FixedSizeList(item, width) => {
            format!("{width} x {}", self::kind(item.data_type()))
        }
        other => other.to_string(),
    }
}

fn size_text(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}

fn bytes_below(dir: &Path) -> std::io::Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        // Files of old versions may be removed meanwhile.
        let Ok(metadata) = entry.metadata() else {
            continue;
        };
        bytes += match metadata.is_dir() {
            true => bytes_below(&entry.path())?,
            false => metadata.len(),
        };
    }
    Ok(bytes)
}
