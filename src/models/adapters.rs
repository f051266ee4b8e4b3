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
/// `weights`. Factors are scaled as those of `adapter` are.
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
    let carried = adapter.layers();
    let ranks = carried
        .iter()
        .map(|(layer, lora)| Ok((layer.clone(), lora.a.dim(0)?)));
    check_carried(&file, &ranks.collect::<Result<_>>()?)?;
    let mut tensors = BTreeMap::new();
    for (layer, Factors { a, b, scale }) in file.layers {
        let factor = carried.get(&layer).map_or(1.0, |lora| scale / lora.scale);
        tensors.insert(format!("{layer}.lora_A.weight"), a);
        let b = if factor == 1.0 { b } else { (b * factor)? };
        tensors.insert(format!("{layer}.lora_B.weight"), b);
    }
    Ok(tensors)
}

/// Fails unless the adapter at `path` can be gone on from by a training as `config` says, on a model with these `layers`,
/// by name with the shapes of their weights.
///
/// # Errors
/// With everything about it that does not fit.
pub fn check_start(
    path: &Path,
    layers: &BTreeMap<String, Vec<usize>>,
    config: &LoraConfig,
) -> Result<()> {
    let file = LoraFile::read(path)?;
    file.check_fit(layers)?;
    let is_target = |layer: &str| {
        let mut targets = config.targets.iter();
        targets.any(|target| LoraConfig::names(target, layer))
    };
    let ranks = layers
        .iter()
        .filter(|(layer, shape)| shape.len() == 2 && is_target(layer))
        .map(|(layer, _)| (layer.clone(), config.rank));
    check_carried(&file, &ranks.collect())
}

/// Fails unless `file` has a layer of that rank for each of `ranks`, and nothing else.
fn check_carried(file: &LoraFile, ranks: &BTreeMap<String, usize>) -> Result<()> {
    let mut faults = Vec::new();
    for (layer, factors) in &file.layers {
        let rank = factors.a.dim(0)?;
        match ranks.get(layer) {
            None => faults.push(format!("{layer} is adapted by it, and is no target here")),
            Some(wanted) if *wanted != rank => {
                faults.push(format!("{layer}: its rank is {rank}, here {wanted}"));
            }
            Some(_) => {}
        }
    }
    faults.extend(
        ranks
            .keys()
            .filter(|layer| !file.layers.contains_key(*layer))
            .map(|layer| format!("{layer} is a target here, and not adapted by it")),
    );
    if faults.is_empty() {
        return file.check_alone();
    }
    Err(Error::invalid(
        format!(
            "{}: another adapter is wanted: {}",
            shown(&file.path),
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
