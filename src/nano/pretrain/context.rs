//! What every training needs: the settings, where things lie, where they compute, and how long they may.

use std::path::{Path, PathBuf};

use candle_core::{Device, Var};

use super::course::{Budget, Course};
use super::scenes::Scenes;
use super::settings::{Settings, Training};
use crate::nano::identity::Split;

/// One call of `pretrain`.
pub struct Context {
    pub settings: Settings,
    /// The folder of the checkpoints.
    pub out: PathBuf,
    pub device: Device,
    /// Instead of each model's own number of images.
    pub budget: Option<Budget>,
    /// Processor, threads and device, for the notes.
    pub machine: String,
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

    /// The endless numbered scenes that `model` learns from.
    pub fn scenes(&self, model: &str) -> Scenes {
        let seed = self.seed(&format!("scenes of {model}"));
        Scenes::new(seed, Split::Train, self.settings.image_size)
    }

    /// Scenes with individuals that no training sees, for measurements.
    pub fn unseen(&self, purpose: &str) -> Scenes {
        let seed = self.seed(&format!("unseen scenes: {purpose}"));
        Scenes::new(seed, Split::HeldOut, self.settings.image_size)
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
            notes: folder.join("training.json"),
            trained,
        }
    }
}
