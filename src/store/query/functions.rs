//! Functions that queries may call beside DataFusion's own.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, StringArray};
use arrow::datatypes::DataType;
use datafusion::common::DataFusionError;
use datafusion::common::cast::as_string_array;
use datafusion::logical_expr::{ColumnarValue, ScalarUDF, Volatility, create_udf};
use serde_json::Value;

/// `json_text(text, 'a.b')`: the value at a path of field names of a JSON text, as text without quotes; null where there
/// is none, or the text is no JSON.
pub(super) fn json_text() -> ScalarUDF {
    create_udf(
        "json_text",
        vec![DataType::Utf8, DataType::Utf8],
        DataType::Utf8,
        Volatility::Immutable,
        Arc::new(|arguments: &[ColumnarValue]| {
            let arrays = ColumnarValue::values_to_arrays(arguments)?;
            let [texts, paths] = arrays.as_slice() else {
                return Err(DataFusionError::Plan(
                    "json_text takes a text and a path".into(),
                ));
            };
            let (texts, paths) = (as_string_array(texts)?, as_string_array(paths)?);
            let values = (0..texts.len()).map(|i| {
                (texts.is_valid(i) && paths.is_valid(i))
                    .then(|| at(texts.value(i), paths.value(i)))
                    .flatten()
            });
            let values: ArrayRef = Arc::new(StringArray::from_iter(values));
            Ok(ColumnarValue::Array(values))
        }),
    )
}

fn at(text: &str, path: &str) -> Option<String> {
    let whole: Value = serde_json::from_str(text).ok()?;
    let found = path
        .split('.')
        .try_fold(&whole, |value, name| value.get(name))?;
    match found {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    }
}
