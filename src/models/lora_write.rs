//! LoRA adapters as diffusers, kohya's scripts and ComfyUI, and peft read them, written from any that was read.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::View;
use serde_json::{Map, Value, json};

use super::adapters::{DIFFUSERS_WEIGHTS, PEFT_CONFIG, PEFT_WEIGHTS};
use super::lora_file::{KOHYA_WEIGHTS, LoraFile};
use super::lora_fit::{brief, kind};
use super::lora_names::{self, fused};
use super::tensor_writer::{Entry, TensorWriter, in_order};
use super::{flux, sdxl};
use crate::config::{Family, Kind};
use crate::console::shown;
use crate::nn::Factors;
use crate::{Error, Result, files};

/// How an adapter is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// diffusers' `save_lora_weights`, with alpha worked into B.
    Diffusers,
    /// kohya's scripts' and ComfyUI's, with the names of the models' authors.
    Kohya,
    /// peft's `save_pretrained`: a folder.
    Peft,
}

/// What is written, for which model, and how.
#[derive(Debug, Clone)]
pub struct Written<'a> {
    pub layers: &'a BTreeMap<String, Factors>,
    pub family: Family,
    /// The model's name, where it is known.
    pub base: Option<&'a str>,
    /// Type of the factors; alphas are f32.
    pub dtype: DType,
}

impl LoraFile {
    /// The factors with scales worked into B: each has the scale 1.
    pub fn folded(&self) -> Result<BTreeMap<String, Factors>> {
        let folded = |(layer, factors): (&String, &Factors)| {
            let b = scaled(factors, factors.scale)?;
            let (a, scale) = (factors.a.clone(), 1.0);
            Ok((layer.clone(), Factors { a, b, scale }))
        };
        self.layers.iter().map(folded).collect()
    }
}

/// The layers of several adapters as one that changes a model by the sum of what each does, times its weight: their
/// ranks one after the other.
///
/// # Errors
/// When a layer has different shapes in two of them, by name.
pub fn fuse(adapters: &[(&LoraFile, f64)]) -> Result<BTreeMap<String, Factors>> {
    let mut all: BTreeMap<String, Vec<Factors>> = BTreeMap::new();
    for (file, weight) in adapters {
        for (layer, factors) in &file.layers {
            let scale = factors.scale * weight;
            let (a, b) = (factors.a.clone(), factors.b.clone());
            let parts = all.entry(layer.clone()).or_default();
            parts.push(Factors { a, b, scale });
        }
    }
    let (mut fused, mut faults) = (BTreeMap::new(), Vec::new());
    for (layer, mut parts) in all {
        if parts.len() == 1 {
            fused.extend(parts.pop().map(|part| (layer, part)));
            continue;
        }
        let shapes = |part: &Factors| (part.a.dims()[1..].to_vec(), part.b.dims()[0]);
        if parts.iter().any(|part| shapes(part) != shapes(&parts[0])) {
            faults.push(format!("{layer} has another shape in another file"));
            continue;
        }
        let a: Vec<&Tensor> = parts.iter().map(|part| &part.a).collect();
        let b = parts.iter().map(|part| scaled(part, part.scale));
        let factors = Factors {
            a: Tensor::cat(&a, 0)?,
            b: Tensor::cat(&b.collect::<Result<Vec<_>>>()?, 1)?,
            scale: 1.0,
        };
        fused.insert(layer, factors);
    }
    if faults.is_empty() {
        return Ok(fused);
    }
    Err(Error::invalid(
        format!("the adapters are of different models: {}", brief(&faults)),
        "fuse adapters of one model",
    ))
}

fn scaled(factors: &Factors, scale: f64) -> Result<Tensor> {
    Ok(match scale == 1.0 {
        true => factors.b.clone(),
        false => (&factors.b * scale)?,
    })
}

impl Written<'_> {
    /// Writes the file or folder `out`, wholly or not at all; of diffusers' and kohya's layouts a file where `out` ends in
    /// `.safetensors`, else a folder. Returns the file with the factors.
    ///
    /// # Errors
    /// When something is there already; when the layout has no place for a layer, with the names of all such.
    pub fn write(&self, layout: Layout, out: &Path) -> Result<PathBuf> {
        if out.symlink_metadata().is_ok() {
            return Err(Error::invalid(
                format!("{} is there already", shown(out)),
                "name a file or folder that is not; nothing is replaced",
            ));
        }
        self.check(layout)?;
        let is_file = out.extension().is_some_and(|end| end == "safetensors");
        if layout == Layout::Peft && is_file {
            return Err(Error::invalid(
                format!("{} names a file", shown(out)),
                format!("peft reads a folder, with {PEFT_WEIGHTS} and {PEFT_CONFIG}: name one"),
            ));
        }
        let name = match layout {
            Layout::Diffusers => DIFFUSERS_WEIGHTS,
            Layout::Kohya => KOHYA_WEIGHTS,
            Layout::Peft => PEFT_WEIGHTS,
        };
        let title = out.file_stem().unwrap_or_default().to_string_lossy();
        let (tensors, metadata) = match layout {
            Layout::Diffusers => (self.diffusers()?, BTreeMap::new()),
            Layout::Kohya => self.kohya(&title)?,
            Layout::Peft => (self.peft()?, BTreeMap::new()),
        };
        if is_file {
            write_tensors(out, &tensors, metadata)?;
            return Ok(out.to_path_buf());
        }
        if let Some(parent) = out.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            files::create_dir(parent)?;
        }
        files::write_dir(out, |aside| {
            write_tensors(&aside.join(name), &tensors, metadata)?;
            if layout == Layout::Peft {
                let config = format!("{:#}\n", self.peft_config());
                files::write(&aside.join(PEFT_CONFIG), config.as_bytes())?;
            }
            Ok(())
        })?;
        Ok(out.join(name))
    }

    /// Fails unless the layout has a place for every layer.
    fn check(&self, layout: Layout) -> Result<()> {
        if layout != Layout::Peft && self.family.kind() != Kind::Diffusion {
            return Err(Error::invalid(
                format!("adapters of {} are peft's", self.family),
                "use --to peft",
            ));
        }
        let mut faults = Vec::new();
        for (layer, factors) in self.layers {
            let theirs = lora_names::of_authors(self.family, layer);
            let is_named = match layout {
                Layout::Kohya => theirs.is_some(),
                Layout::Diffusers | Layout::Peft => lora_names::is_of(self.family, layer),
            };
            let is_part = theirs.is_some_and(|(_, _, count)| count > 1);
            if !is_named {
                faults.push(format!("{layer}: {} has no such layer", self.family));
            } else if is_part && factors.a.dims().len() != 2 {
                faults.push(format!("{layer}: is no linear layer"));
            }
        }
        let hint = faults.iter().find_map(|fault| kind(fault));
        if faults.is_empty() {
            return Ok(());
        }
        Err(Error::invalid(
            format!("the adapter cannot be carried: {}", brief(&faults)),
            hint.unwrap_or("name the model that it was trained with by --model"),
        ))
    }

    fn is_unet(&self) -> bool {
        self.family == sdxl::FAMILY
    }

    fn factor(&self, tensor: &Tensor) -> Result<Tensor> {
        Ok(tensor.to_dtype(self.dtype)?)
    }

    fn diffusers(&self) -> Result<BTreeMap<String, Tensor>> {
        let component = match self.is_unet() {
            true => "unet",
            false => "transformer",
        };
        let mut tensors = BTreeMap::new();
        for (layer, factors) in self.layers {
            let name = |part: &str| format!("{component}.{layer}.{part}.weight");
            tensors.insert(name("lora_A"), self.factor(&factors.a)?);
            let b = scaled(factors, factors.scale)?;
            tensors.insert(name("lora_B"), self.factor(&b)?);
        }
        Ok(tensors)
    }

    fn peft(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut tensors = BTreeMap::new();
        for (layer, factors) in self.layers {
            let name = |part: &str| format!("base_model.model.{layer}.{part}.weight");
            tensors.insert(name("lora_A"), self.factor(&factors.a)?);
            tensors.insert(name("lora_B"), self.factor(&factors.b)?);
        }
        Ok(tensors)
    }

    /// `adapter_config.json`: rank and alpha of the first layer, and patterns for the others that differ.
    fn peft_config(&self) -> Value {
        let rank = |factors: &Factors| factors.a.dims()[0];
        let alpha = |factors: &Factors| factors.scale * rank(factors) as f64;
        let first = self.layers.values().next();
        let (r, lora_alpha) = first.map_or((1, 1.0), |first| (rank(first), alpha(first)));
        let (mut ranks, mut alphas) = (Map::new(), Map::new());
        for (layer, factors) in self.layers {
            let whole = format!("^{}", layer.replace('.', r"\."));
            if rank(factors) != r {
                ranks.insert(whole.clone(), rank(factors).into());
            }
            if alpha(factors) != lora_alpha {
                alphas.insert(whole, alpha(factors).into());
            }
        }
        let names: Vec<&String> = self.layers.keys().collect();
        // A layer outside all blocks may be called like the end of others' paths, which a list would mean, too.
        let targets = match names.iter().any(|name| !name.contains('.')) {
            true => {
                let whole: Vec<String> = names.iter().map(|n| n.replace('.', r"\.")).collect();
                json!(format!("^(?:{})$", whole.join("|")))
            }
            false => json!(names),
        };
        json!({
            "peft_type": "LORA",
            "task_type": null,
            "base_model_name_or_path": self.base,
            "r": r,
            "lora_alpha": lora_alpha,
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
            "lora_dropout": 0.0,
            "target_modules": targets,
            "bias": "none",
            "inference_mode": true,
        })
    }

    /// kohya's tensors, what lies in one layer there joined, and the header's entries.
    fn kohya(&self, title: &str) -> Result<(BTreeMap<String, Tensor>, BTreeMap<String, String>)> {
        let mut joined: BTreeMap<String, Vec<Option<Factors>>> = BTreeMap::new();
        for (layer, factors) in self.layers {
            // `check` has looked.
            let Some((name, at, count)) = lora_names::of_authors(self.family, layer) else {
                continue;
            };
            let turned = !self.is_unet() && fused::is_turned(layer, factors);
            let factors = match turned {
                true => fused::halves_exchanged(factors)?,
                false => factors.clone(),
            };
            let parts = joined.entry(name).or_insert_with(|| vec![None; count]);
            parts[at] = Some(factors);
        }
        let mut tensors = BTreeMap::new();
        let (mut rank, mut alpha) = (0, 0.0);
        for (name, parts) in joined {
            let factors = match &parts[..] {
                [Some(one)] => one.clone(),
                parts => fused::join(&parts.iter().map(Option::as_ref).collect::<Vec<_>>())?,
            };
            let own = factors.a.dims()[0];
            let own_alpha = factors.scale * own as f64;
            if own > rank {
                (rank, alpha) = (own, own_alpha);
            }
            let name = |part: &str| format!("lora_unet_{name}.{part}");
            tensors.insert(name("lora_down.weight"), self.factor(&factors.a)?);
            tensors.insert(name("lora_up.weight"), self.factor(&factors.b)?);
            let own_alpha = Tensor::new(own_alpha as f32, &Device::Cpu)?;
            tensors.insert(name("alpha"), own_alpha);
        }
        Ok((tensors, self.kohya_header(title, rank, alpha)))
    }

    /// What kohya's scripts write of every file, without which ComfyUI, Forge and others do not know whose it is.
    fn kohya_header(&self, title: &str, rank: usize, alpha: f64) -> BTreeMap<String, String> {
        let (version, module, architecture, implementation) = if self.is_unet() {
            (
                "sdxl_base_v1-0",
                "networks.lora",
                "stable-diffusion-xl-v1-base",
                "https://github.com/Stability-AI/generative-models",
            )
        } else if self.family == flux::FAMILY {
            (
                "flux1",
                "networks.lora_flux",
                "flux-1-dev",
                "https://github.com/black-forest-labs/flux",
            )
        } else {
            (
                "sd3",
                "networks.lora_sd3",
                "stable-diffusion-3",
                "diffusers",
            )
        };
        let entries = [
            ("ss_v2", "False".to_string()),
            ("ss_base_model_version", version.into()),
            ("ss_network_module", module.into()),
            ("ss_network_dim", rank.to_string()),
            ("ss_network_alpha", alpha.to_string()),
            ("ss_network_args", "{}".into()),
            ("modelspec.sai_model_spec", "1.0.1".into()),
            ("modelspec.architecture", format!("{architecture}/lora")),
            ("modelspec.implementation", implementation.into()),
            ("modelspec.title", title.into()),
            ("modelspec.resolution", "1024x1024".into()),
        ];
        let entries = entries.into_iter();
        entries.map(|(key, value)| (key.into(), value)).collect()
    }
}

fn write_tensors(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    metadata: BTreeMap<String, String>,
) -> Result<()> {
    let entries: Vec<Entry> = tensors
        .iter()
        .map(|(name, tensor)| Entry {
            name: name.clone(),
            dtype: tensor.dtype(),
            shape: tensor.dims().to_vec(),
        })
        .collect();
    let mut writer = TensorWriter::with_metadata(path, &entries, metadata)?;
    for entry in in_order(entries) {
        let tensor = tensors[&entry.name].contiguous()?;
        writer.write(&entry.name, &tensor.data())?;
    }
    writer.finish()
}
