//! Checkpoints and their notes on disk.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Var};
use serde::Serialize;

use crate::files;
use crate::models::tokenizer::TextTokenizer;
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

/// The tokenizer that `vocabulary` describes. It passes through a file in `folder` that does not stay: what lies there
/// belongs to the checkpoint until new weights are saved.
pub fn tokenizer(folder: &Path, vocabulary: &serde_json::Value) -> Result<TextTokenizer> {
    let aside = folder.join("tokenizer.fresh.json");
    write_json(&aside, vocabulary)?;
    let tokenizer = TextTokenizer::from_file(&aside);
    std::fs::remove_file(&aside).map_err(Error::io(&aside))?;
    tokenizer
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
