//! What learners write and read: adapters in PEFT's layout for students and in diffusers' for supervisors, or whole
//! checkpoints. Reading takes either layout, and kohya-like names. Scale is `alpha / rank`; where a layout has no place for alpha, B is written scaled so that alpha = rank.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use serde_json::json;

use crate::files;
use crate::nn::LoraConfig;
use crate::{Error, Result};

/// PEFT's file names.
pub const PEFT_WEIGHTS: &str = "adapter_model.safetensors";
/// PEFT's configuration beside the weights.
pub const PEFT_CONFIG: &str = "adapter_config.json";
/// A whole checkpoint's file name.
pub const CHECKPOINT_WEIGHTS: &str = "model.safetensors";
/// diffusers' file name.
pub const DIFFUSERS_WEIGHTS: &str = "pytorch_lora_weights.safetensors";

/// An adapter as read from disk: `PATH.lora_A.weight` and `PATH.lora_B.weight`, with the module paths of the model.
#[derive(Debug, Clone)]
pub struct AdapterFile {
    pub tensors: BTreeMap<String, Tensor>,
    /// Rank, read from the tensors.
    pub rank: usize,
    /// Alpha, from the configuration or the header; equal to the rank where neither names it.
    pub alpha: f64,
    /// The adapted module paths.
    pub modules: Vec<String>,
}

impl AdapterFile {
    /// `alpha / rank`.
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    /// Reads a folder (PEFT's or diffusers' layout) or a safetensors file.
    pub fn read(path: &Path) -> Result<Self> {
        let (file, config) = if path.is_dir() {
            let candidates = [PEFT_WEIGHTS, DIFFUSERS_WEIGHTS].map(|name| path.join(name));
            let file = candidates
                .into_iter()
                .find(|file| file.exists())
                .ok_or_else(|| {
                    Error::invalid(
                        format!("{} holds no adapter", path.display()),
                        format!("expected {PEFT_WEIGHTS} or {DIFFUSERS_WEIGHTS} there"),
                    )
                })?;
            (
                file,
                Some(path.join(PEFT_CONFIG)).filter(|config| config.exists()),
            )
        } else {
            let config = path.with_file_name(PEFT_CONFIG);
            (
                path.to_path_buf(),
                (path.ends_with(PEFT_WEIGHTS) && config.exists()).then_some(config),
            )
        };
        let (raw, metadata) = files::read_tensors(&file)?;
        let mut tensors = BTreeMap::new();
        let mut alphas = BTreeMap::new();
        for (name, tensor) in raw {
            let name = normalise(&name);
            match name.strip_suffix(".alpha") {
                Some(module) => {
                    let alpha = tensor
                        .to_dtype(DType::F64)?
                        .flatten_all()?
                        .to_vec1::<f64>()?;
                    alphas.insert(module.to_string(), alpha.first().copied().unwrap_or(0.0));
                }
                None => {
                    tensors.insert(name, tensor.to_dtype(DType::F32)?);
                }
            }
        }
        let fault = |what: String| Error::Checkpoint {
            path: file.clone(),
            faults: vec![what],
        };
        let modules: Vec<String> = tensors
            .keys()
            .filter_map(|name| name.strip_suffix(".lora_A.weight"))
            .map(String::from)
            .collect();
        let rank = match modules.first() {
            Some(module) => tensors[&format!("{module}.lora_A.weight")].dim(0)?,
            None => return Err(fault("no lora_A tensor in it".into())),
        };
        for module in &modules {
            let own = tensors[&format!("{module}.lora_A.weight")].dim(0)?;
            let up = tensors
                .get(&format!("{module}.lora_B.weight"))
                .ok_or_else(|| fault(format!("{module}.lora_B.weight is missing")))?;
            if own != rank || up.dim(1)? != rank {
                return Err(fault(format!(
                    "{module} has rank {own}, others have {rank}"
                )));
            }
        }
        let alpha = match (&config, metadata.get("lora_adapter_metadata")) {
            (Some(config), _) => {
                let text = std::fs::read_to_string(config).map_err(Error::io(config))?;
                json_number(&text, &["lora_alpha"])
                    .ok_or_else(|| fault("no lora_alpha in adapter_config.json".into()))?
            }
            (None, Some(text)) => json_number(
                text,
                &["transformer.lora_alpha", "unet.lora_alpha", "lora_alpha"],
            )
            .unwrap_or(rank as f64),
            (None, None) => rank as f64,
        };
        // kohya's own alpha of each module: folded into B, so that one alpha holds for all.
        for (module, own) in alphas {
            if let Some(up) = tensors.get_mut(&format!("{module}.lora_B.weight")) {
                *up = (&*up * (own / alpha))?;
            }
        }
        Ok(Self {
            tensors,
            rank,
            alpha,
            modules,
        })
    }

    /// The configuration with which a model carries exactly this adapter.
    pub fn config(&self) -> LoraConfig {
        LoraConfig {
            rank: self.rank,
            alpha: self.alpha,
            targets: self.modules.clone(),
        }
    }
}

/// `base_model.model.X.lora_A.default.weight`, `unet.X.lora.down.weight`, `transformer.X.lora_A.weight` … all become
/// `X.lora_A.weight`.
pub fn normalise(name: &str) -> String {
    let mut rest = name;
    for prefix in ["base_model.model.", "unet.", "transformer."] {
        rest = rest.strip_prefix(prefix).unwrap_or(rest);
    }
    let mut name = rest.replace(".default", "");
    for (from, to) in [
        (".lora.down.", ".lora_A."),
        (".lora.up.", ".lora_B."),
        (".lora_down.", ".lora_A."),
        (".lora_up.", ".lora_B."),
    ] {
        name = name.replace(from, to);
    }
    name
}

fn json_number(text: &str, keys: &[&str]) -> Option<f64> {
    let value: serde_json::Value = serde_json::from_str(text).ok()?;
    keys.iter().find_map(|key| value.get(key)?.as_f64())
}

/// Writes `tensors` (names as in [`crate::nn::Adapter::variables`]) in PEFT's layout into the folder `dir`.
pub fn write_peft(
    dir: &Path,
    tensors: &BTreeMap<String, Tensor>,
    config: &LoraConfig,
    base: &str,
) -> Result<()> {
    let renamed = tensors
        .iter()
        .map(|(name, t)| (format!("base_model.model.{name}"), t.clone()))
        .collect();
    files::write_tensors(&dir.join(PEFT_WEIGHTS), &renamed, &[])?;
    let json = json!({
        "peft_type": "LORA",
        "task_type": null,
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "target_modules": config.targets,
        "bias": "none",
        "inference_mode": true,
    });
    files::write(&dir.join(PEFT_CONFIG), format!("{json:#}\n").as_bytes())
}

/// Writes `tensors` in diffusers' layout into the folder `dir`; `component` is `transformer` or `unet`. B is scaled so
/// that alpha = rank, which every loader assumes.
pub fn write_diffusers(
    dir: &Path,
    tensors: &BTreeMap<String, Tensor>,
    config: &LoraConfig,
    component: &str,
) -> Result<PathBuf> {
    let scale = config.alpha / config.rank as f64;
    let renamed = tensors
        .iter()
        .map(|(name, tensor)| {
            let tensor = if name.ends_with("lora_B.weight") {
                (tensor * scale)?
            } else {
                tensor.clone()
            };
            Ok((format!("{component}.{name}"), tensor))
        })
        .collect::<Result<BTreeMap<_, _>>>()?;
    let path = dir.join(DIFFUSERS_WEIGHTS);
    files::write_tensors(&path, &renamed, &[])?;
    Ok(path)
}

/// The values of the adapter at `path` for a model that carries one of configuration `wanted`: scaled where the two
/// differ in `alpha / rank`.
pub fn read_for(path: &Path, wanted: &LoraConfig) -> Result<BTreeMap<String, Tensor>> {
    let file = AdapterFile::read(path)?;
    let factor = (file.alpha / file.rank as f64) / (wanted.alpha / wanted.rank as f64);
    let scale = |(name, tensor): (String, Tensor)| {
        let scaled = name.ends_with("lora_B.weight") && factor != 1.0;
        Ok((name, if scaled { (tensor * factor)? } else { tensor }))
    };
    file.tensors.into_iter().map(scale).collect()
}

/// Writes a whole checkpoint, `model.safetensors` beside `config.json`, into the folder `dir`.
pub fn write_checkpoint(
    dir: &Path,
    tensors: &BTreeMap<String, Tensor>,
    config: &str,
) -> Result<()> {
    files::write_tensors(&dir.join(CHECKPOINT_WEIGHTS), tensors, &[])?;
    files::write(&dir.join("config.json"), config.as_bytes())
}

/// The tensors of a folder that [`write_checkpoint`] wrote.
pub fn read_checkpoint(dir: &Path) -> Result<BTreeMap<String, Tensor>> {
    Ok(files::read_tensors(&dir.join(CHECKPOINT_WEIGHTS))?.0)
}
