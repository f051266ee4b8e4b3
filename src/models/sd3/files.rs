//! The files of a diffusers directory: `model_index.json` and one folder for each component.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

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

/// The safetensors files of a component's folder: all shards of the index where there is one, else the single file,
/// else the single half-precision file. `stem` is `diffusion_pytorch_model` or `model`.
pub(super) fn weight_files(folder: &Path, stem: &str) -> Result<Vec<PathBuf>> {
    for variant in ["", ".fp16"] {
        let index = folder.join(format!("{stem}.safetensors.index{variant}.json"));
        if index.is_file() {
            let json: Value = read_json(&index)?;
            let map = json.get("weight_map").and_then(Value::as_object);
            let names: BTreeSet<&str> = map
                .ok_or_else(|| fault(&index, "has no weight_map"))?
                .values()
                .filter_map(Value::as_str)
                .collect();
            return Ok(names.into_iter().map(|name| folder.join(name)).collect());
        }
        let single = folder.join(format!("{stem}{variant}.safetensors"));
        if single.is_file() {
            return Ok(vec![single]);
        }
    }
    Err(fault(folder, format!("{stem}.safetensors is missing")))
}
