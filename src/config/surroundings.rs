//! What a pipeline file refers to outside of itself.

use std::path::{Path, PathBuf};

use super::family::Family;
use crate::Result;

/// What is known of a model by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Model {
    pub family: Family,
    /// Side of its images in pixels where nothing else is said; the checkpoint tells where `None`.
    pub resolution: Option<usize>,
}

/// What a pipeline file refers to outside of itself: models, files, the machine. A [`Document`](super::Document) asks
/// this and nothing else.
pub trait Surroundings: Sync {
    /// What the model called `name` is.
    ///
    /// # Errors
    /// When there is none, or it is not here to tell.
    fn model(&self, name: &str) -> Result<Model>;

    /// Every model that is known by name.
    fn models(&self) -> Vec<(&'static str, Family)>;

    /// Whether `name` is a folder or a repository of the hub, and no misspelt name of a model.
    fn names_a_place(&self, name: &str) -> bool;

    /// The CLIP and the DINO that score what the model called `student` draws, where nothing else is said.
    fn evaluators(&self, student: Option<&str>) -> [&'static str; 2];

    /// The text of the file at `path`, `None` where there is no such file.
    ///
    /// # Errors
    /// When it cannot be read.
    fn text(&self, path: &Path) -> Result<Option<String>>;

    /// A digest of all files in the folder at `path`.
    ///
    /// # Errors
    /// When they cannot be read.
    fn digest(&self, path: &Path) -> Result<String>;

    /// What is in the folder at `path`.
    ///
    /// # Errors
    /// When it cannot be listed.
    fn entries(&self, path: &Path) -> Result<Vec<PathBuf>>;

    /// Whether `path` is a folder.
    fn is_dir(&self, path: &Path) -> bool;

    /// Threads that this machine computes with.
    fn threads(&self) -> usize;
}
