//! The files of a diffusers directory: `model_index.json` and one folder for each component.

use std::path::Path;

use serde_json::Value;

use crate::Result;
use crate::files::read_json;

/// Whether `model_index.json` of `directory` names `component` with a class; `[null, null]` stands for none.
pub(super) fn has_component(directory: &Path, component: &str) -> Result<bool> {
    let index: Value = read_json(&directory.join("model_index.json"))?;
    let class = index.get(component).and_then(|entry| entry.get(1));
    Ok(class.is_some_and(Value::is_string))
}
