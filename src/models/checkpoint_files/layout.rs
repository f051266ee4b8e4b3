//! Where the parts of a diffusion model lie, seen as diffusers' folders: a pipeline in that layout, or single files with
//! what they lack beside them, as `tokenizer/`, `vae/config.json` and so on in the same layout.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::deduced::{self, Shapes};
use super::names::Names;
use super::{WeightFiles, fault};
use crate::files::tensor_headers::tensors_in;
use crate::files::{SETTINGS, read_json, read_text};
use crate::hub::parts::{Network, Part, PartFile, Parts};
use crate::models::limits::{Limited, read_config};
use crate::{Error, Result};

/// A model of diffusion, wherever its parts lie.
#[derive(Debug, Clone)]
pub struct Layout {
    folder: PathBuf,
    /// In single files; else in folders of diffusers.
    parts: Option<Parts>,
}

impl Layout {
    /// Of the model at `place`: a folder in diffusers' layout, a folder with single files, or such a file.
    ///
    /// # Errors
    /// When single files are damaged, or there is no network among them.
    pub fn open(place: &Path) -> Result<Self> {
        if place.join("model_index.json").exists() {
            return Ok(Self {
                folder: place.to_path_buf(),
                parts: None,
            });
        }
        match Parts::find(place)? {
            Some(parts) => Ok(Self {
                folder: parts.folder.clone(),
                parts: Some(parts),
            }),
            // What reads a folder of diffusers says best what it misses.
            None if place.is_dir() => Ok(Self {
                folder: place.to_path_buf(),
                parts: None,
            }),
            None => Err(Error::invalid(
                format!(
                    "{} holds no network of SDXL, SD3 or FLUX.1",
                    place.display()
                ),
                "name a folder in diffusers' layout, or a single file of safetensors or GGUF",
            )),
        }
    }

    /// Whether the model has diffusers' `component`, or cannot do without: then opening it says what is missing.
    ///
    /// # Errors
    /// When `model_index.json` cannot be read.
    pub fn has(&self, component: &str) -> Result<bool> {
        match &self.parts {
            Some(parts) => {
                let mut components = parts.network.components().iter();
                let known = components.find(|(name, _, _)| *name == component);
                let is_needed = known.is_some_and(|(_, _, can_do_without)| !can_do_without);
                let there = || parts.component(component).is_some();
                Ok(is_needed || self.has_weights(component) || there())
            }
            None => {
                let index: Value = read_json(&self.folder.join("model_index.json"))?;
                // `[null, null]` stands for none.
                let class = index.get(component).and_then(|entry| entry.get(1));
                Ok(class.is_some_and(Value::is_string))
            }
        }
    }

    /// Whether a folder of diffusers has the weights of `component`, though others of the model are in single files.
    fn has_weights(&self, component: &str) -> bool {
        let folder = self.folder.join(component);
        folder.join("config.json").is_file() && WeightFiles::find(&folder, stem(component)).is_ok()
    }

    /// What `model_index.json` says beside the components; nothing in single files.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn index<T: DeserializeOwned + Default>(&self) -> Result<T> {
        match self.parts {
            Some(_) => Ok(T::default()),
            None => read_json(&self.folder.join("model_index.json")),
        }
    }

    /// The config of `component`: its `config.json`, or what the shapes of its tensors and the family say.
    ///
    /// # Errors
    /// When it cannot be read, a number in it is out of its bounds, or the component is missing.
    pub fn config<T: DeserializeOwned + Limited>(&self, component: &str) -> Result<T> {
        match self.deduced(component)? {
            Some((config, path)) => self.typed::<T>(config, &path)?.limited(&path),
            None => read_config(&self.config_file(component)),
        }
    }

    /// The text of `config.json` of `component`, or what stands for it.
    ///
    /// # Errors
    /// As [`Layout::config`].
    pub fn config_text(&self, component: &str) -> Result<String> {
        match self.deduced(component)? {
            Some((config, _)) => Ok(format!("{config:#}\n")),
            None => read_text(&self.config_file(component), SETTINGS),
        }
    }

    fn config_file(&self, component: &str) -> PathBuf {
        self.folder.join(component).join("config.json")
    }

    /// The config of a `component` that has none, with the file that it is of.
    fn deduced(&self, component: &str) -> Result<Option<(Value, PathBuf)>> {
        let Some(parts) = self
            .parts
            .as_ref()
            .filter(|_| !self.config_file(component).is_file())
        else {
            return Ok(None);
        };
        let file = self.part(parts, component)?;
        let tensors = tensors_in(&file.path)?;
        let names = Names::of(file.part, &file.prefix, &tensors);
        let config = Shapes::new(&tensors, &names).config(file.part, parts.network);
        Ok(Some((config, file.path.clone())))
    }

    fn typed<T: DeserializeOwned>(&self, value: Value, path: &Path) -> Result<T> {
        serde_json::from_value(value)
            .map_err(|e| fault(path, format!("its shapes say no config: {e}")))
    }

    /// The config of the scheduler: its file, or what the family is published with.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn scheduler<T: DeserializeOwned>(&self) -> Result<T> {
        let path = self.folder.join("scheduler/scheduler_config.json");
        match &self.parts {
            Some(parts) if !path.is_file() => self.typed(deduced::scheduler(parts.network), &path),
            _ => read_json(&path),
        }
    }

    /// The weight files of `component`.
    ///
    /// # Errors
    /// When there are none: what is missing, and where it comes from.
    pub fn weights(&self, component: &str) -> Result<WeightFiles> {
        match &self.parts {
            Some(parts) if !self.has_weights(component) => {
                let file = self.part(parts, component)?;
                Ok(WeightFiles::Part(file.clone()))
            }
            _ => WeightFiles::find(&self.folder.join(component), stem(component)),
        }
    }

    fn part<'a>(&self, parts: &'a Parts, component: &str) -> Result<&'a PartFile> {
        parts.component(component).ok_or_else(|| {
            let mut components = parts.network.components().iter();
            let part = components.find(|(name, _, _)| *name == component);
            let name = part.map_or(component, |(_, part, _)| part.name());
            let from = part.map_or("", |(_, part, _)| published(parts.network, *part));
            Error::invalid(
                format!(
                    "{}: {name} of {} is missing",
                    self.folder.display(),
                    parts.network.family()
                ),
                format!("place {from} beside the model, or {component}/ as diffusers has it"),
            )
        })
    }

    /// The folder of the tokenizer called `name`: `tokenizer`, `tokenizer_2` or `tokenizer_3`.
    ///
    /// # Errors
    /// In single files, when it is missing: where it comes from.
    pub fn tokenizer(&self, name: &str) -> Result<PathBuf> {
        let folder = self.folder.join(name);
        match &self.parts {
            Some(parts) if !folder.is_dir() => Err(Error::invalid(
                format!(
                    "{} is missing: single files hold no tokenizer",
                    folder.display()
                ),
                format!(
                    "copy {name}/ (vocab.json and merges.txt, or tokenizer.json, and tokenizer_config.json) from {}",
                    repository(parts.network)
                ),
            )),
            _ => Ok(folder),
        }
    }
}

/// What the weight files of a component of a pipeline are called.
fn stem(component: &str) -> &'static str {
    match component.starts_with("text_encoder") {
        true => "model",
        false => "diffusion_pytorch_model",
    }
}

/// Where the diffusers layout of a family is published.
fn repository(family: Network) -> &'static str {
    match family {
        Network::Flux => "black-forest-labs/FLUX.1-dev",
        Network::Sd3 => "stabilityai/stable-diffusion-3-medium-diffusers",
        _ => "stabilityai/stable-diffusion-xl-base-1.0",
    }
}

/// A file with a part that others have not inside, and where it is published.
fn published(family: Network, part: Part) -> &'static str {
    match (part, family) {
        (Part::Vae, Network::Flux) => "ae.safetensors (black-forest-labs/FLUX.1-dev)",
        (Part::Vae, Network::Sd3) => {
            "the autoencoder (vae/ of stabilityai/stable-diffusion-3-medium-diffusers)"
        }
        (Part::Vae, _) => "sdxl_vae.safetensors (stabilityai/sdxl-vae)",
        (Part::ClipL, _) => "clip_l.safetensors (comfyanonymous/flux_text_encoders)",
        (Part::ClipG, _) => {
            "clip_g.safetensors (stabilityai/stable-diffusion-3-medium, text_encoders/)"
        }
        (Part::T5, _) => {
            "t5xxl_fp16.safetensors (comfyanonymous/flux_text_encoders) or a GGUF of it (city96/t5-v1_1-xxl-encoder-gguf)"
        }
        (Part::Denoiser(_), _) => "the network",
    }
}
