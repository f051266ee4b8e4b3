//! Named tensors in files of safetensors.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::{TENSORS, read, write};
use crate::{Error, Result};

/// Writes `tensors` as safetensors with `metadata` in the header (beside `format: pt`, which readers expect).
pub fn write_tensors(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    metadata: &[(&str, String)],
) -> Result<()> {
    let mut header: HashMap<String, String> =
        HashMap::from([("format".to_string(), "pt".to_string())]);
    header.extend(
        metadata
            .iter()
            .map(|(key, value)| (key.to_string(), value.clone())),
    );
    let tensors = tensors
        .iter()
        .map(|(name, tensor)| Ok((name.clone(), tensor.to_device(&Device::Cpu)?.contiguous()?)))
        .collect::<Result<Vec<_>>>()?;
    let bytes = safetensors::serialize(
        tensors.iter().map(|(name, tensor)| (name, tensor)),
        Some(header),
    )
    .map_err(|e| Error::Checkpoint {
        path: path.to_path_buf(),
        faults: vec![e.to_string()],
    })?;
    write(path, &bytes)
}

/// Values of a tensor that are hashed at once: as many bytes as the hash takes at its full speed.
const HASHED_AT_ONCE: usize = 1 << 16;

/// Digest of named tensors: names, shapes and f32 values.
pub fn values_digest(tensors: &BTreeMap<String, Tensor>) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    for (name, tensor) in tensors {
        hasher.update(&(name.len() as u64).to_le_bytes());
        hasher.update(name.as_bytes());
        for dim in tensor.dims() {
            hasher.update(&(*dim as u64).to_le_bytes());
        }
        let values = tensor.flatten_all()?.to_dtype(DType::F32)?;
        let mut bytes = Vec::new();
        for values in values.to_vec1::<f32>()?.chunks(HASHED_AT_ONCE) {
            bytes.clear();
            bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            hasher.update(&bytes);
        }
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// All tensors of a safetensors file, and its header's metadata.
pub fn read_tensors(path: &Path) -> Result<(BTreeMap<String, Tensor>, BTreeMap<String, String>)> {
    let bytes = read(path, TENSORS).map_err(Error::io(path))?;
    let fault = |e: String| Error::Checkpoint {
        path: path.to_path_buf(),
        faults: vec![e],
    };
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes)
        .map_err(|e| fault(format!("not a safetensors file: {e}")))?;
    let metadata = header
        .metadata()
        .clone()
        .unwrap_or_default()
        .into_iter()
        .collect();
    let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)?
        .into_iter()
        .collect();
    Ok((tensors, metadata))
}
