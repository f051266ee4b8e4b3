//! Between rows and Arrow: the few column types that the tables use, each with one way in and one way out.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, FixedSizeListArray, Float32Array, Float64Array, Int64Array, LargeBinaryArray,
    PrimitiveArray, StringArray, UInt32Array, UInt64Array,
};
use arrow::buffer::NullBuffer;
use arrow::datatypes::{ArrowPrimitiveType, DataType, Field, Schema, SchemaRef};
use arrow::record_batch::RecordBatch;

use crate::{Error, Result};

/// The metadata key of a column under which its meaning and unit stand.
pub const DESCRIPTION: &str = "description";
/// The metadata key of a table under which the number of its layout stands.
pub const SCHEMA_VERSION: &str = "proxytune.schema_version";
/// The metadata key of a column under which the first layout that has it stands; a column without it is in all.
pub const SINCE: &str = "proxytune.since";

/// A column that always has a value. `description` says what it holds, with its unit.
pub(in crate::store) fn required(name: &str, kind: DataType, description: &str) -> Field {
    Field::new(name, kind, false)
        .with_metadata([(DESCRIPTION.to_string(), description.to_string())].into())
}

/// A column that may be null.
pub(in crate::store) fn nullable(name: &str, kind: DataType, description: &str) -> Field {
    required(name, kind, description).with_nullable(true)
}

/// `field` as a column that older tables than those of layout `version` lack; there it reads as null.
pub(in crate::store) fn since(version: u32, field: Field) -> Field {
    let mut metadata = field.metadata().clone();
    metadata.insert(SINCE.to_string(), version.to_string());
    field.with_metadata(metadata).with_nullable(true)
}

/// `width` numbers per row, stored side by side: what nearest-neighbour search wants.
pub(in crate::store) fn vector(item: DataType, width: usize) -> DataType {
    DataType::FixedSizeList(item_field(item), width as i32)
}

/// A table's columns together with the number of its layout.
pub(in crate::store) fn schema(version: u32, fields: Vec<Field>) -> SchemaRef {
    Arc::new(Schema::new_with_metadata(
        fields,
        [(SCHEMA_VERSION.to_string(), version.to_string())].into(),
    ))
}

fn item_field(item: DataType) -> Arc<Field> {
    Arc::new(Field::new("item", item, true))
}

/// Puts `columns`, in the order of `schema`, together.
pub(in crate::store) fn batch(schema: &SchemaRef, columns: Vec<ArrayRef>) -> Result<RecordBatch> {
    RecordBatch::try_new(schema.clone(), columns).map_err(|e| broken(e.to_string()))
}

pub(in crate::store) fn strings<'a>(values: impl Iterator<Item = &'a str>) -> ArrayRef {
    Arc::new(StringArray::from_iter_values(values))
}

pub(in crate::store) fn maybe_strings<'a>(
    values: impl Iterator<Item = Option<&'a str>>,
) -> ArrayRef {
    Arc::new(StringArray::from_iter(values))
}

pub(in crate::store) fn u32s(values: impl Iterator<Item = u32>) -> ArrayRef {
    Arc::new(UInt32Array::from_iter_values(values))
}

pub(in crate::store) fn u64s(values: impl Iterator<Item = u64>) -> ArrayRef {
    Arc::new(UInt64Array::from_iter_values(values))
}

pub(in crate::store) fn i64s(values: impl Iterator<Item = i64>) -> ArrayRef {
    Arc::new(Int64Array::from_iter_values(values))
}

pub(in crate::store) fn f64s(values: impl Iterator<Item = f64>) -> ArrayRef {
    Arc::new(Float64Array::from_iter_values(values))
}

pub(in crate::store) fn maybe_f32s(values: impl Iterator<Item = Option<f32>>) -> ArrayRef {
    Arc::new(Float32Array::from_iter(values))
}

pub(in crate::store) fn bytes<'a>(values: impl Iterator<Item = &'a [u8]>) -> ArrayRef {
    Arc::new(LargeBinaryArray::from_iter_values(values))
}

pub(in crate::store) fn maybe_bytes<'a>(
    values: impl Iterator<Item = Option<&'a [u8]>>,
) -> ArrayRef {
    Arc::new(LargeBinaryArray::from_iter(values))
}

/// A vector per row; a missing one is null.
///
/// Errors: a vector whose length is not the column's.
pub(in crate::store) fn vectors<'a, T>(
    schema: &SchemaRef,
    name: &str,
    values: impl Iterator<Item = Option<&'a [T::Native]>>,
) -> Result<ArrayRef>
where
    T: ArrowPrimitiveType,
{
    let width = width_of(schema, name)?;
    let (mut flat, mut valid) = (Vec::new(), Vec::new());
    for value in values {
        match value {
            Some(value) if value.len() == width => flat.extend_from_slice(value),
            Some(value) => {
                return Err(broken(format!(
                    "column {name} holds {width} values per row, but a row has {}",
                    value.len()
                )));
            }
            None => flat.resize(flat.len() + width, T::Native::default()),
        }
        valid.push(value.is_some());
    }
    let items = PrimitiveArray::<T>::from_iter_values(flat);
    let list = FixedSizeListArray::try_new(
        item_field(T::DATA_TYPE),
        width as i32,
        Arc::new(items),
        Some(NullBuffer::from(valid)),
    );
    Ok(Arc::new(list.map_err(|e| broken(e.to_string()))?))
}

/// How many values a row of the vector column `name` holds.
pub(in crate::store) fn width_of(schema: &Schema, name: &str) -> Result<usize> {
    match schema.field_with_name(name).map(Field::data_type) {
        Ok(DataType::FixedSizeList(_, width)) => Ok(*width as usize),
        _ => Err(broken(format!("there is no vector column {name}"))),
    }
}

/// The column `name` of `batch` as the Arrow array type `A`.
pub(in crate::store) fn column<'a, A: Array + 'static>(
    batch: &'a RecordBatch,
    name: &str,
) -> Result<&'a A> {
    batch
        .column_by_name(name)
        .and_then(|c| c.as_any().downcast_ref::<A>())
        .ok_or_else(|| broken(format!("column {name} is missing or of another type")))
}

/// The text of column `name`, row by row.
pub(in crate::store) fn text<'a>(
    batch: &'a RecordBatch,
    name: &str,
) -> Result<impl Fn(usize) -> String + 'a> {
    let values: &StringArray = column(batch, name)?;
    Ok(|i| values.value(i).to_string())
}

/// The text of column `name`, row by row; none where it is null.
pub(in crate::store) fn maybe_text<'a>(
    batch: &'a RecordBatch,
    name: &str,
) -> Result<impl Fn(usize) -> Option<String> + 'a> {
    let values: &StringArray = column(batch, name)?;
    Ok(|i| values.is_valid(i).then(|| values.value(i).to_string()))
}

/// The encoded picture of column `name`, row by row; none where it is null, or was left out when reading.
pub(in crate::store) fn picture<'a>(
    batch: &'a RecordBatch,
    name: &str,
) -> Result<impl Fn(usize) -> Option<Vec<u8>> + 'a> {
    let values: Option<&LargeBinaryArray> = match batch.column_by_name(name) {
        Some(_) => Some(column(batch, name)?),
        None => None,
    };
    Ok(move |i| {
        values
            .filter(|v| v.is_valid(i))
            .map(|v| v.value(i).to_vec())
    })
}

/// The vector of column `name`, row by row; none where it is null.
pub(in crate::store) fn vector_at<'a, T: ArrowPrimitiveType>(
    batch: &'a RecordBatch,
    name: &str,
) -> Result<impl Fn(usize) -> Option<Vec<T::Native>> + 'a> {
    let lists: &FixedSizeListArray = column(batch, name)?;
    let items: &PrimitiveArray<T> = lists
        .values()
        .as_any()
        .downcast_ref()
        .ok_or_else(|| broken(format!("column {name} holds values of another type")))?;
    let width = lists.value_length() as usize;
    Ok(move |i| {
        let start = lists.value_offset(i) as usize;
        lists
            .is_valid(i)
            .then(|| items.values()[start..start + width].to_vec())
    })
}

/// A fault that only a program error or a damaged table can cause.
pub(in crate::store) fn broken(what: String) -> Error {
    Error::Store { what, hint: None }
}
