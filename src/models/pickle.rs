//! PyTorch's zip files (`.pt`, `.bin`, `.ckpt`): state dicts, bare or inside a training checkpoint.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use candle_core::pickle::PthTensors;
use safetensors::View;

use super::tensor_writer::{Entry, TensorWriter, in_order};
use crate::{Error, Result};

/// The tensors of one file, which are read when asked for.
pub struct Pickle {
    path: PathBuf,
    tensors: PthTensors,
}

impl Pickle {
    /// Opens the state dict of `path`: what lies under `model`, `module` or `state_dict` where there is such a key,
    /// else the file's own entries. Fails when it holds no tensors, or is of the kind that torch wrote before 1.6.
    pub fn open(path: &Path) -> Result<Self> {
        std::fs::metadata(path).map_err(Error::io(path))?;
        // A key that the file lacks is an error to candle, and no key finds nothing in a nested file without an error.
        let found = [Some("model"), Some("module"), Some("state_dict"), None]
            .into_iter()
            .filter_map(|key| PthTensors::new(path, key).ok())
            .find(|tensors| !tensors.tensor_infos().is_empty());
        match found {
            Some(tensors) => Ok(Self {
                path: path.to_path_buf(),
                tensors,
            }),
            None => Err(fault(
                path,
                "not a zip file of torch with tensors under model, module or state_dict",
            )),
        }
    }

    /// Names, types and shapes, in the order in which [`TensorWriter`] takes them.
    pub fn entries(&self) -> Vec<Entry> {
        let infos = self.tensors.tensor_infos().values();
        in_order(
            infos
                .map(|info| Entry {
                    name: info.name.clone(),
                    dtype: info.dtype,
                    shape: info.layout.dims().to_vec(),
                })
                .collect(),
        )
    }

    /// The tensor `name` on the CPU, in the file's type and contiguous.
    pub fn get(&self, name: &str) -> Result<Tensor> {
        let found = self.tensors.get(name);
        let tensor = found.map_err(|e| fault(&self.path, format!("{name}: {e}")))?;
        let tensor = tensor.ok_or_else(|| fault(&self.path, format!("{name} cannot be read")))?;
        Ok(tensor.contiguous()?)
    }

    /// All tensors by name.
    pub fn read_all(&self) -> Result<HashMap<String, Tensor>> {
        let names = self.tensors.tensor_infos().keys();
        names
            .map(|name| Ok((name.clone(), self.get(name)?)))
            .collect()
    }

    /// Writes all tensors to the safetensors file `path`, one after another.
    pub fn convert(&self, path: &Path) -> Result<()> {
        let entries = self.entries();
        let mut writer = TensorWriter::create(path, &entries)?;
        for entry in &entries {
            writer.write(&entry.name, &self.get(&entry.name)?.data())?;
        }
        writer.finish()
    }
}

fn fault(path: &Path, what: impl Into<String>) -> Error {
    Error::Checkpoint {
        path: path.to_path_buf(),
        faults: vec![what.into()],
    }
}
