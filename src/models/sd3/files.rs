//! The files of a diffusers directory: `model_index.json` and one folder for each component.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{Error, Result};

/// Reads JSON into `T`; a file that is missing, unreadable or of another kind is named.
pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    serde_json::from_str(&text).map_err(|e| fault(path, e))
}

fn fault(path: &Path, what: impl std::fmt::Display) -> Error {
    Error::Checkpoint {
        path: path.to_path_buf(),
        faults: vec![what.to_string()],
    }
}

/// Whether `model_index.json` of `directory` names `component` with a class; `[null, null]` stands for none.
pub(super) fn has_component(directory: &Path, component: &str) -> Result<bool> {
    let index: Value = read_json(&directory.join("model_index.json"))?;
    let class = index.get(component).and_then(|entry| entry.get(1));
    Ok(class.is_some_and(Value::is_string))
}
