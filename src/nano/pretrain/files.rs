//! Checkpoints and their notes on disk: always written aside, synced and renamed, so that a kill leaves the old or the
//! new file and never half of one.

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor, Var};
use serde::Serialize;

use crate::{Error, Result};

/// Writes `bytes` to `path`, making its folder where needed.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
    }
    let mut aside = path.as_os_str().to_owned();
    aside.push(".new");
    let aside = PathBuf::from(aside);
    let mut file = fs::File::create(&aside).map_err(Error::io(&aside))?;
    file.write_all(bytes).map_err(Error::io(&aside))?;
    file.sync_all().map_err(Error::io(&aside))?;
    fs::rename(&aside, path).map_err(Error::io(path))
}

/// Writes `value` as indented JSON.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value).map_err(|e| Error::Invalid {
        what: format!("{}: {e}", path.display()),
        hint: None,
    })?;
    text.push('\n');
    write(path, text.as_bytes())
}

/// Writes the current values of `variables` as safetensors in half precision.
pub fn write_weights(path: &Path, variables: &[(String, Var)]) -> Result<()> {
    let tensors = variables
        .iter()
        .map(|(name, variable)| {
            let value = variable.as_tensor().detach().to_dtype(DType::F16)?;
            Ok((
                name.clone(),
                value.to_device(&candle_core::Device::Cpu)?.contiguous()?,
            ))
        })
        .collect::<Result<HashMap<String, Tensor>>>()?;
    let bytes = safetensors::serialize(&tensors, None).map_err(|e| Error::Invalid {
        what: format!("{}: {e}", path.display()),
        hint: None,
    })?;
    write(path, &bytes)
}

/// The file at `path` as a list of one, or of none if there is no such file: what trainable weights start from.
pub fn existing(path: &Path) -> Vec<PathBuf> {
    if path.is_file() {
        vec![path.to_path_buf()]
    } else {
        Vec::new()
    }
}
