//! LlamaGen (Sun et al. 2024, arXiv 2406.06525): text to image tokens with a GPT, and its VQ image tokenizer.
//! Reference code: <https://github.com/FoundationVision/LlamaGen>.

mod config;
pub mod generate;
pub mod gpt;
mod learner;
pub mod vq;

pub use generate::Sampling;
pub use gpt::Gpt;
pub use learner::{LlamaGen, VqTokenizer, tokenizer_files};
pub use vq::VqModel;

use std::collections::HashMap;
use std::path::Path;

use candle_core::pickle::PthTensors;
use candle_core::{DType, Device, Tensor};

use crate::nn::Weights;
use crate::{Error, Result};

/// Frozen weights of a GPT or VQ checkpoint: `model.safetensors` in `directory` if it is there, else `model.pt` as
/// LlamaGen's training saves it, a dictionary whose `model`, `module` or `state_dict` holds the tensors.
pub fn load_weights(directory: &Path, dtype: DType, device: &Device) -> Result<Weights> {
    let safetensors = directory.join("model.safetensors");
    if safetensors.is_file() {
        return Weights::from_files(&[safetensors], dtype, device);
    }
    let pickle = directory.join("model.pt");
    if !pickle.is_file() {
        return Err(Error::Checkpoint {
            path: directory.to_path_buf(),
            faults: vec!["model.safetensors is missing".into()],
        });
    }
    let tensors = read_pickle(&pickle)?;
    Ok(Weights::from_tensors(tensors, dtype, device))
}

/// All tensors of a LlamaGen `.pt` file by name, on the CPU and in the file's types. Fails when it has none.
pub fn read_pickle(path: &Path) -> Result<HashMap<String, Tensor>> {
    let fault = |what: String| Error::Checkpoint {
        path: path.to_path_buf(),
        faults: vec![what],
    };
    std::fs::metadata(path).map_err(Error::io(path))?;
    // A key that the file lacks is an error to candle, and no key finds nothing in a nested file without an error.
    let found = [Some("model"), Some("module"), Some("state_dict"), None]
        .into_iter()
        .filter_map(|key| PthTensors::new(path, key).ok())
        .find(|tensors| !tensors.tensor_infos().is_empty())
        .ok_or_else(|| fault("no tensors under model, module or state_dict".into()))?;
    let mut tensors = HashMap::new();
    for name in found.tensor_infos().keys() {
        let tensor = found
            .get(name)
            .map_err(|e| fault(format!("{name}: {e}")))?
            .ok_or_else(|| fault(format!("{name} cannot be read")))?;
        tensors.insert(name.clone(), tensor.contiguous()?);
    }
    Ok(tensors)
}
