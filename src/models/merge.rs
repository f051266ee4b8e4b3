//! A checkpoint with an adapter worked into its weights: W + scale · B·A for every adapted layer, each of its own rank
//! and scale, one tensor at a time.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use candle_core::safetensors::MmapedSafetensors;
use candle_core::{DType, Device, Tensor};
use safetensors::View;
use serde_json::json;

use super::family::{Backbone, Rest};
use super::lora_file::LoraFile;
use super::lora_fit::changed;
use super::registry::architecture;
use super::sampling_file;
use super::tensor_writer::{Entry, TensorWriter, in_order};
use crate::config::Family;
use crate::console::{escaped, shown};
use crate::files;
use crate::nn::{Factors, map_safetensors};
use crate::{Error, Result};

/// What a merge has written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Merged {
    /// Layers that carried the adapter.
    pub layers: usize,
    /// Bytes of the backbone's weights.
    pub bytes: u64,
}

/// Writes the checkpoint in `dir`, of this `family`, with `adapter` worked in, into the folder `out`, which must be
/// empty or absent. Weights have `dtype`, or the type that they have in `dir`. Shards stay shards. What the adapter
/// does not touch is copied. How the adapter is drawn with is noted there, too.
///
/// # Errors
/// When the adapter names layers that the backbone lacks, has other shapes, or holds whole weights that are not the
/// backbone's: before anything is written.
pub fn merge(
    dir: &Path,
    family: Family,
    resolution: Option<u32>,
    adapter: &LoraFile,
    out: &Path,
    dtype: Option<DType>,
) -> Result<Merged> {
    check_empty(out)?;
    let parts = architecture(family)?.learner()?;
    let backbone = (parts.backbone)(dir, resolution)?;
    let others = others(dir, &backbone)?;
    let config = (parts.config)(dir, resolution)?;
    let sources = open(&backbone.files.into_safetensors()?)?;
    let fitting = fit(adapter, &sources)?;
    adapter.check_whole(|name| {
        let source = sources
            .iter()
            .find(|source| source.shapes.contains_key(name));
        let load = |source: &Source| source.file.load(name, &Device::Cpu);
        Ok(source.map(load).transpose()?)
    })?;
    let mut bytes = 0;
    if let Some(parent) = out.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        files::create_dir(parent)?;
    }
    let mut sampling = sampling_file::read(&adapter.path, family)?;
    if sampling.is_none() {
        sampling = sampling_file::read(dir, family)?;
    }
    files::fill_dir(out, |aside| {
        for (from, to) in &others {
            copy(from, &aside.join(to))?;
        }
        if let Some(sampling) = &sampling {
            sampling_file::write(aside, sampling)?;
        }
        if let Some(config) = &config {
            files::write(&aside.join("config.json"), config.as_bytes())?;
        }
        let folder = aside.join(backbone.folder);
        let mut placed = BTreeMap::new();
        for (number, source) in sources.iter().enumerate() {
            let name = match sources.len() {
                1 => format!("{}.safetensors", backbone.stem),
                count => format!(
                    "{}-{:05}-of-{count:05}.safetensors",
                    backbone.stem,
                    number + 1
                ),
            };
            let entries = source.entries(dtype)?;
            bytes += entries.iter().map(Entry::size).sum::<u64>();
            let mut writer = TensorWriter::create(&folder.join(&name), &entries)?;
            for entry in in_order(entries) {
                let tensor = source.file.load(&entry.name, &Device::Cpu)?;
                let tensor = match fitting.get(&entry.name) {
                    Some(factors) => (tensor.to_dtype(DType::F32)? + addition(factors)?)?,
                    None => tensor,
                };
                writer.write(&entry.name, &tensor.to_dtype(entry.dtype)?.data())?;
                placed.insert(entry.name, name.clone());
            }
            writer.finish()?;
        }
        if sources.len() > 1 {
            let index = json!({"metadata": {"total_size": bytes}, "weight_map": placed});
            let path = folder.join(format!("{}.safetensors.index.json", backbone.stem));
            files::write(&path, format!("{index:#}\n").as_bytes())?;
        }
        Ok(())
    })?;
    Ok(Merged {
        layers: fitting.len(),
        bytes,
    })
}

struct Source {
    file: MmapedSafetensors,
    shapes: BTreeMap<String, Vec<usize>>,
}

impl Source {
    /// What of it is written, in which type. Whole numbers stay what they are.
    fn entries(&self, dtype: Option<DType>) -> Result<Vec<Entry>> {
        self.shapes
            .iter()
            .map(|(name, shape)| {
                let own: DType = self.file.get(name)?.dtype().try_into()?;
                Ok(Entry {
                    name: name.clone(),
                    dtype: dtype.filter(|_| own.is_float()).unwrap_or(own),
                    shape: shape.clone(),
                })
            })
            .collect()
    }
}

fn open(paths: &[PathBuf]) -> Result<Vec<Source>> {
    paths
        .iter()
        .map(|path| {
            let file = map_safetensors(std::slice::from_ref(path))?;
            let views = file.tensors();
            let shapes = views
                .into_iter()
                .map(|(name, view)| (name, view.shape().to_vec()))
                .collect();
            Ok(Source { file, shapes })
        })
        .collect()
}

/// The factors by the name of the weight that they change.
fn fit<'a>(adapter: &'a LoraFile, sources: &[Source]) -> Result<BTreeMap<String, &'a Factors>> {
    let places = sources
        .iter()
        .flat_map(|source| &source.shapes)
        .filter(|(_, shape)| shape.len() > 1)
        .filter_map(|(name, shape)| {
            let layer = name.strip_suffix(".weight")?;
            Some((layer.to_string(), shape.clone()))
        });
    adapter.check_fit(&places.collect())?;
    let weight = |(layer, factors): (&String, &'a Factors)| (format!("{layer}.weight"), factors);
    Ok(adapter.layers.iter().map(weight).collect())
}

/// scale · B·A in the shape of the weight, f32; of a convolution, whose B has a kernel of one pixel, too.
fn addition(factors: &Factors) -> Result<Tensor> {
    let (a, b) = (factors.a.flatten_from(1)?, factors.b.flatten_from(1)?);
    Ok((b.matmul(&a)? * factors.scale)?.reshape(changed(factors))?)
}

/// The files that are copied, each with its path in the merged checkpoint.
fn others(dir: &Path, backbone: &Backbone) -> Result<Vec<(PathBuf, PathBuf)>> {
    let Rest::Parts(parts) = &backbone.rest else {
        let inside = dir.join(backbone.folder);
        let others = below(dir)?.into_iter().filter(|(from, _)| {
            let name = from.file_name().unwrap_or_default().to_string_lossy();
            let of_backbone = from.parent() == Some(&inside) && name.starts_with(backbone.stem);
            !backbone.files.paths().contains(from) && !of_backbone
        });
        return Ok(others.collect());
    };
    let mut others = Vec::new();
    for (from, folder) in parts {
        if from.is_dir() {
            others.extend(in_folder(folder, below(from)?));
        } else if let Some(name) = from.file_name() {
            others.push((from.clone(), PathBuf::from(name)));
        }
    }
    Ok(others)
}

fn in_folder(
    folder: &str,
    files: Vec<(PathBuf, PathBuf)>,
) -> impl Iterator<Item = (PathBuf, PathBuf)> {
    files
        .into_iter()
        .map(move |(from, to)| (from, Path::new(folder).join(to)))
}

/// All files below `root` with their paths in it, through links; hidden ones are left out, and so are links to a folder
/// around them, pipes and devices.
fn below(root: &Path) -> Result<Vec<(PathBuf, PathBuf)>> {
    let place = |path: &Path| std::fs::canonicalize(path).map_err(Error::io(path));
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(inside) = folders.pop() {
        let folder = root.join(&inside);
        for entry in std::fs::read_dir(&folder).map_err(Error::io(&folder))? {
            let name = entry.map_err(Error::io(&folder))?.file_name();
            let (path, inside) = (folder.join(&name), inside.join(&name));
            if name.to_string_lossy().starts_with('.') {
                continue;
            }
            if path.is_file() {
                found.push((path, inside));
            } else if path.is_dir() && !place(&folder)?.starts_with(place(&path)?) {
                folders.push(inside);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Copies what is in a file alone: a second name for it would let edits of the one change the other, and rights of a
/// hub's cache are not those of a folder of one's own.
fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(parent) = to.parent() {
        files::create_dir(parent)?;
    }
    let mut source = files::open(from).map_err(Error::io(from))?;
    let mut target = File::create_new(to).map_err(Error::io(to))?;
    std::io::copy(&mut source, &mut target).map_err(Error::io(to))?;
    Ok(())
}

/// Fails unless `out` is absent, or a folder without anything but what a disk's own root has.
fn check_empty(out: &Path) -> Result<()> {
    let hint = "name a new folder with --out";
    if !out.is_dir() {
        return match out.symlink_metadata() {
            Ok(_) => Err(Error::invalid(format!("{} is no folder", shown(out)), hint)),
            Err(_) => Ok(()),
        };
    }
    let entries = files::list(out)?;
    match entries.iter().find(|(name, _)| name != "lost+found") {
        None => Ok(()),
        Some((name, _)) => Err(Error::invalid(
            format!("{} is not empty: {} is there", shown(out), escaped(name)),
            hint,
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_of_any_rank_scale_and_kernel_are_merged_and_whole_weights_compared() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name);
        let full = |value: f32, shape: &[usize]| Tensor::full(value, shape, &Device::Cpu).unwrap();
        let save = |file: &Path, tensors: &[(&str, Tensor)]| {
            let tensors = tensors
                .iter()
                .map(|(name, tensor)| (name.to_string(), tensor.clone()));
            files::write_tensors(file, &tensors.collect(), &[]).unwrap();
        };
        let base = [
            ("one.weight", full(1.0, &[2, 3])),
            ("two.weight", full(1.0, &[4, 3])),
            ("conv.weight", full(1.0, &[2, 3, 2, 2])),
            ("lm_head.weight", full(5.0, &[4, 2])),
        ];
        save(&at("base/model.safetensors"), &base);
        files::write(&at("base/config.json"), b"{}").unwrap();
        let adapter = [
            ("one.lora_A.weight", full(0.5, &[1, 3])),
            ("one.lora_B.weight", full(1.0, &[2, 1])),
            ("two.lora_A.weight", full(0.5, &[4, 3])),
            ("two.lora_B.weight", full(1.0, &[4, 4])),
            ("conv.lora_A.weight", full(0.5, &[2, 3, 2, 2])),
            ("conv.lora_B.weight", full(1.0, &[2, 2, 1, 1])),
            ("lm_head.weight", full(5.0, &[4, 2])),
        ];
        save(&at("adapter/adapter_model.safetensors"), &adapter);
        let config = json!({"lora_alpha": 2, "alpha_pattern": {"two": 8}});
        let file = at("adapter/adapter_config.json");
        files::write(&file, config.to_string().as_bytes()).unwrap();
        let run = |out: &str| {
            let adapter = LoraFile::read(&at("adapter"))?;
            merge(
                &at("base"),
                crate::models::chameleon::FAMILY,
                None,
                &adapter,
                &at(out),
                None,
            )
        };
        assert_eq!(run("out").unwrap().layers, 3);
        let (merged, _) = files::read_tensors(&at("out/model.safetensors")).unwrap();
        // 1 + alpha/rank · rank · 0.5
        for (name, value) in [("one", 2.0), ("two", 5.0), ("conv", 2.0), ("lm_head", 5.0)] {
            let weight = &merged[&format!("{name}.weight")];
            let values = weight.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert!(values.iter().all(|v| *v == value), "{name}: {values:?}");
        }
        let mut trained = adapter;
        trained[6].1 = full(5.1, &[4, 2]);
        save(&at("adapter/adapter_model.safetensors"), &trained);
        let error = run("no").unwrap_err().to_string();
        assert!(
            error.contains("lm_head.weight is not the base's"),
            "{error}"
        );
    }
}
