//! What learners write and read: adapters in PEFT's layout for students and in diffusers' for supervisors, or whole
//! checkpoints. Reading takes either layout, and kohya-like names. Scale is `alpha / rank`; where a layout has no place
//! for alpha, B is written scaled so that alpha = rank.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use serde_json::json;

use super::lora_file::LoraFile;
pub use super::lora_file::{DIFFUSERS_WEIGHTS, PEFT_CONFIG, PEFT_WEIGHTS};
use super::lora_fit::{brief, is_finite};
use super::snapshot;
use crate::console::{escaped, shown};
use crate::files;
use crate::nn::{Adapter, Factors, LoraConfig, Weights};
use crate::{Error, Result};

/// A whole checkpoint's file name.
pub const CHECKPOINT_WEIGHTS: &str = "model.safetensors";

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

    /// Reads a folder (PEFT's or diffusers' layout) or a file; see [`LoraFile::read`]. All layers must be linear and
    /// of one rank, without whole weights beside them. Where they differ in alpha, B is scaled so that alpha = rank
    /// holds for all.
    pub fn read(path: &Path) -> Result<Self> {
        Self::of(LoraFile::read(path)?)
    }

    fn of(file: LoraFile) -> Result<Self> {
        let LoraFile {
            path,
            layers,
            whole,
            targets: _,
        } = file;
        let modules: Vec<String> = layers.keys().cloned().collect();
        let first = layers.values().next().map(|f| (f.a.dims()[0], f.scale));
        // A file of LoRA has at least one layer.
        let (rank, scale) = first.unwrap_or((1, 1.0));
        let mut faults: Vec<String> = layers
            .iter()
            .filter(|(_, f)| f.a.dims().len() != 2 || f.a.dims()[0] != rank)
            .map(|(module, f)| {
                format!(
                    "{module} has a factor of shape {:?}: linear layers of one rank, here {rank}, are taken",
                    f.a.dims()
                )
            })
            .collect();
        faults.extend(whole.keys().map(|name| format!("{name} is a whole weight")));
        if !faults.is_empty() {
            return Err(Error::invalid(
                format!("{}: {}", shown(&path), brief(&faults)),
                "proxytune merge works other adapters into a checkpoint, which sample --model takes",
            ));
        }
        let alike = layers.values().all(|f| f.scale == scale);
        let mut tensors = BTreeMap::new();
        for (module, Factors { a, b, scale }) in layers {
            tensors.insert(format!("{module}.lora_A.weight"), a);
            let b = if alike { b } else { (b * scale)? };
            tensors.insert(format!("{module}.lora_B.weight"), b);
        }
        Ok(Self {
            tensors,
            rank,
            alpha: if alike {
                scale * rank as f64
            } else {
                rank as f64
            },
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

/// What is trained of a model, in the learner's own folder: its adapter, or all its weights. The model was built from
/// `weights`.
///
/// # Errors
/// When a file is missing, cannot be read, holds numbers that are not finite, or anything that has no place in the
/// model.
pub fn read_trained(
    dir: &Path,
    adapter: Option<&Adapter>,
    weights: &Weights,
) -> Result<BTreeMap<String, Tensor>> {
    let Some(adapter) = adapter else {
        return read_whole(dir, weights);
    };
    let file = LoraFile::read(dir)?;
    file.check_fit(&adapter.places())?;
    let file = AdapterFile::of(file)?;
    check_carried(dir, &file, adapter)?;
    let wanted = adapter.config();
    let factor = file.scale() / (wanted.alpha / wanted.rank as f64);
    let scale = |(name, tensor): (String, Tensor)| {
        let scaled = name.ends_with("lora_B.weight") && factor != 1.0;
        Ok((name, if scaled { (tensor * factor)? } else { tensor }))
    };
    file.tensors.into_iter().map(scale).collect()
}

/// Fails unless `adapter` has the layers and the rank of `file`.
fn check_carried(path: &Path, file: &AdapterFile, adapter: &Adapter) -> Result<()> {
    let (layers, rank) = (adapter.layers(), adapter.config().rank);
    let mut faults = Vec::new();
    if file.rank != rank {
        faults.push(format!("its rank is {}, here {rank}", file.rank));
    }
    let own = |module: &&String| !layers.contains_key(*module);
    faults.extend(
        file.modules
            .iter()
            .filter(own)
            .map(|module| format!("{module} is adapted by it, and is no target here")),
    );
    faults.extend(
        layers
            .keys()
            .filter(|layer| !file.modules.contains(layer))
            .map(|layer| format!("{layer} is a target here, and not adapted by it")),
    );
    if faults.is_empty() {
        return Ok(());
    }
    Err(Error::invalid(
        format!(
            "{}: another adapter is wanted: {}",
            shown(path),
            brief(&faults)
        ),
        "set rank and targets to those that the adapter was trained with",
    ))
}

/// The tensors of a whole checkpoint, all of which `weights` knows.
fn read_whole(dir: &Path, weights: &Weights) -> Result<BTreeMap<String, Tensor>> {
    let tensors = read_checkpoint(dir)?;
    let mut known: BTreeSet<String> = weights.names().into_iter().collect();
    known.extend(weights.variables().into_iter().map(|(name, _)| name));
    let mut faults = Vec::new();
    for (name, tensor) in &tensors {
        if !known.contains(name) {
            faults.push(format!("{} is not of this model", escaped(name)));
        } else if !is_finite(tensor)? {
            faults.push(format!("{name} holds numbers that are not finite"));
        }
    }
    if faults.is_empty() {
        return Ok(tensors);
    }
    Err(Error::invalid(
        format!(
            "{}: {}",
            shown(&dir.join(CHECKPOINT_WEIGHTS)),
            brief(&faults)
        ),
        "use the checkpoint that it was trained from",
    ))
}

/// Writes the checkpoint of a model whose own weights were trained: all of `weights`, with `values` in place of those
/// that have the same names.
pub fn write_whole(
    dir: &Path,
    weights: &Weights,
    values: &BTreeMap<String, Tensor>,
    config: &str,
) -> Result<()> {
    let mut whole = snapshot(&weights.variables())?;
    whole.extend(
        values
            .iter()
            .map(|(name, value)| (name.clone(), value.clone())),
    );
    write_checkpoint(dir, &whole, config)
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
