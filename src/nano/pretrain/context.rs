//! What every training needs: the settings, where things lie, where they compute, and how long they may.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor, Var};

use super::course::{Budget, Course};
use super::curves::Curves;
use super::scenes::Scenes;
use super::settings::{Settings, Training};
use crate::config;
use crate::console;
use crate::nano::identity::Split;
use crate::nn::Weights;
use crate::{Error, Result};

/// One call of `pretrain`.
pub struct Context {
    pub settings: Settings,
    /// The folder of the checkpoints.
    pub out: PathBuf,
    pub device: Device,
    /// The same device by its name.
    pub named_device: config::Device,
    /// Instead of each model's own number of images.
    pub budget: Option<Budget>,
    /// Processor, threads and device, for the notes.
    pub machine: String,
    /// Where curves are logged beside the notes.
    pub curves: Option<Curves>,
}

/// A model about to be trained.
pub struct Opened<M> {
    pub weights: Weights,
    pub model: M,
    /// Tensors that start afresh although there is a checkpoint: it has them in another shape, or not at all.
    pub afresh: BTreeSet<String>,
}

impl Context {
    /// The seed of the fresh weights of `model`.
    pub fn seed(&self, model: &str) -> u64 {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.settings.seed.to_le_bytes());
        hasher.update(model.as_bytes());
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
        u64::from_le_bytes(bytes)
    }

    /// The model that `build` makes of the checkpoint `file` of `name`. What the file holds in another shape starts
    /// afresh, and so does everything if there is no file.
    pub fn open<M>(
        &self,
        name: &str,
        file: &Path,
        build: impl Fn(&Weights) -> Result<M>,
    ) -> Result<Opened<M>> {
        let seed = self.seed(name);
        let fresh = |files: &[PathBuf]| -> Result<(Weights, M)> {
            let weights = Weights::trainable(files, seed, &self.device)?;
            let model = build(&weights)?;
            weights.finish()?;
            Ok((weights, model))
        };
        let (weights, model) = fresh(&[])?;
        let wanted = weights.variables();
        let (mut stored, _) = match file.is_file() {
            true => crate::files::read_tensors(file)?,
            false => Default::default(),
        };
        let fits = |name: &str, variable: &Var| {
            let tensor = stored.get(name);
            tensor.is_some_and(|tensor| tensor.shape() == variable.shape())
        };
        let afresh: BTreeSet<String> = wanted
            .iter()
            .filter(|(name, variable)| !fits(name, variable))
            .map(|(name, _)| name.clone())
            .collect();
        let (weights, model) = if afresh.is_empty() {
            fresh(&[file.to_path_buf()])?
        } else if afresh.len() == wanted.len() {
            (weights, model)
        } else {
            console::print(format!("{name}: {} start afresh", listed(&afresh)))?;
            stored.retain(|name, _| !afresh.contains(name));
            let fitting = file.with_extension("fitting.safetensors");
            crate::files::write_tensors(&fitting, &stored, &[])?;
            let opened = fresh(std::slice::from_ref(&fitting));
            std::fs::remove_file(&fitting).map_err(Error::io(&fitting))?;
            opened?
        };
        Ok(Opened {
            weights,
            model,
            afresh,
        })
    }

    /// The model that `build` makes of the checkpoint `file` of `name` as [`Context::open`] does; where there is none
    /// yet, of what `start` has in the right shape.
    pub fn open_or_start<M>(
        &self,
        name: &str,
        file: &Path,
        start: Option<BTreeMap<String, Tensor>>,
        build: impl Fn(&Weights) -> Result<M>,
    ) -> Result<Opened<M>> {
        let Some(tensors) = start.filter(|_| !file.is_file()) else {
            return self.open(name, file, build);
        };
        let aside = file.with_extension("start.safetensors");
        crate::files::write_tensors(&aside, &tensors, &[])?;
        let opened = self.open(name, &aside, build);
        std::fs::remove_file(&aside).map_err(Error::io(&aside))?;
        opened
    }

    /// The endless numbered scenes that `model` learns from.
    pub fn scenes(&self, model: &str, training: &Training) -> Scenes {
        let seed = self.seed(&format!("scenes of {model}"));
        Scenes::new(seed, Split::Train, self.settings.side(training))
    }

    /// Scenes with individuals that no training sees, for measurements, as a model with `training` sees them.
    pub fn unseen(&self, purpose: &str, training: &Training) -> Scenes {
        let seed = self.seed(&format!("unseen scenes: {purpose}"));
        Scenes::new(seed, Split::HeldOut, self.settings.side(training))
    }

    /// The course of `name`, with its notes in `folder`.
    pub fn course<'a>(
        &'a self,
        name: &'a str,
        training: &'a Training,
        folder: &Path,
        trained: Vec<(String, Var)>,
    ) -> Course<'a> {
        Course {
            name,
            training,
            budget: self.budget.unwrap_or(Budget::Images(training.images)),
            machine: &self.machine,
            curves: self.curves.as_ref(),
            notes: folder.join("training.json"),
            trained,
        }
    }
}

/// A few of `names`, and how many more there are.
fn listed(names: &BTreeSet<String>) -> String {
    let few: Vec<&str> = names.iter().take(3).map(String::as_str).collect();
    match names.len() - few.len() {
        0 => few.join(", "),
        more => format!("{} and {more} more", few.join(", ")),
    }
}
