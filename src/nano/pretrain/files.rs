//! Checkpoints and their notes on disk.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Var};
use serde::Serialize;

use crate::files;
use crate::{Error, Result};

/// Writes `value` as indented JSON.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value).map_err(|e| Error::Invalid {
        what: format!("{}: {e}", path.display()),
        hint: None,
    })?;
    text.push('\n');
    files::write(path, text.as_bytes())
}

/// Writes the current values of `variables` as safetensors in half precision.
pub fn write_weights(path: &Path, variables: &[(String, Var)]) -> Result<()> {
    let tensors = variables
        .iter()
        .map(|(name, variable)| {
            Ok((
                name.clone(),
                variable.as_tensor().detach().to_dtype(DType::F16)?,
            ))
        })
        .collect::<Result<BTreeMap<_, _>>>()?;
    files::write_tensors(path, &tensors, &[])
}
