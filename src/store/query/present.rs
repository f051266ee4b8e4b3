//! Answers for people and programs: a table, CSV, JSON lines, Parquet. All but Parquet show pictures and vectors as
//! their sizes.

use std::io::Write;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, StringArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Float32Type, Float64Type, Schema, SchemaRef};
use arrow::json::writer::{LineDelimited, WriterBuilder};
use arrow::record_batch::RecordBatch;
use arrow::util::display::{ArrayFormatter, FormatOptions};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;

use super::Answer;
use super::describe::kind;
use crate::store::columns::broken;
use crate::{Error, Result};

/// How an answer is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Aligned columns; long texts and digests are cut
    #[default]
    Table,
    /// Comma-separated values with a line of names
    Csv,
    /// One JSON object a line
    Jsonl,
    /// Parquet, pictures and vectors included
    Parquet,
}

/// Characters of a text that a table shows.
const CELL: usize = 48;
/// Characters of a digest, and how many of them a table shows.
const DIGEST: usize = 64;
const DIGITS: usize = 12;
/// Digits of a number that a table shows, at most.
const SIGNIFICANT: usize = 6;

/// Writes all rows of `answer`, as they come, and returns how many they were.
///
/// Errors: those of [`Answer::next`]; an output that cannot be written.
pub async fn write(
    mut answer: Answer,
    format: Format,
    out: &mut (impl Write + Send),
) -> Result<usize> {
    let mut count = 0;
    match format {
        Format::Table => {
            let mut table = Table::new(&answer.schema);
            while let Some(batch) = answer.next().await? {
                count += batch.num_rows();
                table.add(&readable(&batch, false)?)?;
            }
            table.write(out).map_err(io)?;
            let rows = if count == 1 { "row" } else { "rows" };
            writeln!(out, "({count} {rows})").map_err(io)?;
        }
        Format::Csv => {
            let mut writer = arrow::csv::WriterBuilder::new()
                .with_header(true)
                .build(out);
            // Names are written with the first batch, and are wanted without rows too.
            let empty = RecordBatch::new_empty(answer.schema.clone());
            writer.write(&readable(&empty, true)?).map_err(arrow)?;
            while let Some(batch) = answer.next().await? {
                count += batch.num_rows();
                writer.write(&readable(&batch, true)?).map_err(arrow)?;
            }
        }
        Format::Jsonl => {
            let mut writer = WriterBuilder::new()
                .with_explicit_nulls(true)
                .build::<_, LineDelimited>(out);
            while let Some(batch) = answer.next().await? {
                count += batch.num_rows();
                writer.write(&readable(&batch, false)?).map_err(arrow)?;
            }
            writer.finish().map_err(arrow)?;
        }
        Format::Parquet => {
            let compression = ZstdLevel::try_new(3)
                .map(Compression::ZSTD)
                .map_err(parquet)?;
            let settings = WriterProperties::builder()
                .set_compression(compression)
                .build();
            let mut writer = ArrowWriter::try_new(out, answer.schema.clone(), Some(settings))
                .map_err(parquet)?;
            while let Some(batch) = answer.next().await? {
                count += batch.num_rows();
                writer.write(&batch).map_err(parquet)?;
                if writer.in_progress_size() > ROW_GROUP_BYTES {
                    writer.flush().map_err(parquet)?;
                }
            }
            writer.close().map_err(parquet)?;
        }
    }
    Ok(count)
}

/// Bytes that a row group of a Parquet file has at most, about: what is held in memory.
const ROW_GROUP_BYTES: usize = 64 << 20;

/// `batch` with pictures and vectors as their sizes. CSV (`flat`) has no lists: they become texts.
fn readable(batch: &RecordBatch, flat: bool) -> Result<RecordBatch> {
    let (mut fields, mut columns) = (Vec::new(), Vec::new());
    for (field, column) in batch.schema().fields().iter().zip(batch.columns()) {
        let shown: Option<ArrayRef> = match column.data_type() {
            DataType::Binary => Some(sizes(column, |i| column.as_binary::<i32>().value(i).len())),
            DataType::LargeBinary => {
                Some(sizes(column, |i| column.as_binary::<i64>().value(i).len()))
            }
            DataType::BinaryView => Some(sizes(column, |i| column.as_binary_view().value(i).len())),
            list @ DataType::FixedSizeList(..) => {
                let text = kind(list);
                let texts = (0..column.len()).map(|i| column.is_valid(i).then_some(text.as_str()));
                Some(Arc::new(StringArray::from_iter(texts)))
            }
            list if flat && list.is_nested() => {
                let options = FormatOptions::default();
                let formatter = ArrayFormatter::try_new(column, &options).map_err(arrow)?;
                let text = |i| column.is_valid(i).then(|| formatter.value(i).to_string());
                Some(Arc::new(StringArray::from_iter(
                    (0..column.len()).map(text),
                )))
            }
            _ => None,
        };
        let column = shown.unwrap_or_else(|| column.clone());
        fields.push(Field::new(field.name(), column.data_type().clone(), true));
        columns.push(column);
    }
    let options = arrow::array::RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    RecordBatch::try_new_with_options(Arc::new(Schema::new(fields)), columns, &options)
        .map_err(arrow)
}

fn sizes(column: &ArrayRef, size: impl Fn(usize) -> usize) -> ArrayRef {
    let texts = (0..column.len()).map(|i| column.is_valid(i).then(|| format!("{} bytes", size(i))));
    Arc::new(StringArray::from_iter(texts))
}

/// Rows on their way to the terminal.
struct Table {
    names: Vec<String>,
    numeric: Vec<bool>,
    rows: Vec<Vec<String>>,
}

impl Table {
    fn new(schema: &SchemaRef) -> Self {
        let fields = schema.fields().iter();
        Self {
            names: fields.clone().map(|field| cell(field.name())).collect(),
            numeric: fields.map(|field| field.data_type().is_numeric()).collect(),
            rows: Vec::new(),
        }
    }

    fn add(&mut self, batch: &RecordBatch) -> Result<()> {
        let options = FormatOptions::default();
        let start = self.rows.len();
        self.rows.resize(start + batch.num_rows(), Vec::new());
        for column in batch.columns() {
            let floats = match column.data_type() {
                DataType::Float32 | DataType::Float64 => {
                    Some(cast(column, &DataType::Float64).map_err(arrow)?)
                }
                _ => None,
            };
            let single = column.as_primitive_opt::<Float32Type>().is_some();
            let formatter = ArrayFormatter::try_new(column, &options).map_err(arrow)?;
            for (i, row) in self.rows[start..].iter_mut().enumerate() {
                row.push(match &floats {
                    _ if column.is_null(i) => String::new(),
                    Some(floats) => number(floats.as_primitive::<Float64Type>().value(i), single),
                    None => cell(&formatter.value(i).to_string()),
                });
            }
        }
        Ok(())
    }

    fn write(&self, out: &mut impl Write) -> std::io::Result<()> {
        let width = |column: usize| {
            let cells = self.rows.iter().map(|row| &row[column]);
            let widths = cells
                .chain([&self.names[column]])
                .map(|cell| cell.chars().count());
            widths.max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.names.len()).map(width).collect();
        let mut line = |cells: &[String]| {
            let mut text = String::new();
            for ((cell, width), numeric) in cells.iter().zip(&widths).zip(&self.numeric) {
                text += &match numeric {
                    true => format!("{cell:>width$}  "),
                    false => format!("{cell:<width$}  "),
                };
            }
            writeln!(out, "{}", text.trim_end())
        };
        line(&self.names)?;
        let rules: Vec<String> = widths.iter().map(|width| "-".repeat(*width)).collect();
        line(&rules)?;
        self.rows.iter().try_for_each(|row| line(row))
    }
}

/// The first line of `text`, cut; of a digest, as many digits as tell one from another.
fn cell(text: &str) -> String {
    if text.len() == DIGEST && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return format!("{}…", &text[..DIGITS]);
    }
    let line = text.lines().next().unwrap_or_default();
    let cut = line.len() < text.trim_end().len() || line.chars().count() > CELL;
    match cut {
        true => line.chars().take(CELL - 1).chain(['…']).collect(),
        false => line.to_string(),
    }
}

/// A number with at most [`SIGNIFICANT`] digits, without trailing zeros.
fn number(value: f64, single: bool) -> String {
    let whole = match single {
        true => (value as f32).to_string(),
        false => value.to_string(),
    };
    let magnitude = value.abs();
    if whole.len() <= SIGNIFICANT + 2 || !value.is_finite() {
        return whole;
    }
    if !(1e-4..1e15).contains(&magnitude) && magnitude != 0.0 {
        return format!("{value:.*e}", SIGNIFICANT - 1);
    }
    let before_the_point = magnitude.log10().floor() as i32 + 1;
    let places = (SIGNIFICANT as i32 - before_the_point).clamp(0, 8) as usize;
    let text = format!("{value:.places$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_string(),
        false => text,
    }
}

fn io(source: std::io::Error) -> Error {
    Error::Io {
        path: "the answer".into(),
        source,
    }
}

fn arrow(error: arrow::error::ArrowError) -> Error {
    match error {
        arrow::error::ArrowError::IoError(_, source) => io(source),
        other => broken(format!("the answer cannot be written: {other}")),
    }
}

fn parquet(error: parquet::errors::ParquetError) -> Error {
    broken(format!("the answer cannot be written: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_six_significant_digits_at_most() {
        let shown = [
            0.731_234_567_8,
            0.5,
            1_234.567_89,
            2.0,
            0.000_012_345_678,
            1e18,
            0.0,
            f64::NAN,
        ];
        let texts: Vec<String> = shown.iter().map(|value| number(*value, false)).collect();
        assert_eq!(
            texts,
            [
                "0.731235",
                "0.5",
                "1234.57",
                "2",
                "1.23457e-5",
                "1.00000e18",
                "0",
                "NaN"
            ]
        );
        assert_eq!(number(f64::from(0.1_f32), true), "0.1");
    }

    #[test]
    fn long_texts_and_further_lines_are_cut_with_a_mark() {
        assert_eq!(cell("a dog"), "a dog");
        assert_eq!(cell(&"0123456789abcdef".repeat(4)), "0123456789ab…");
        assert_eq!(cell("seed = 7\nmodel = 3"), "seed = 7…");
        assert_eq!(cell(&"é".repeat(60)).chars().count(), CELL);
    }
}
