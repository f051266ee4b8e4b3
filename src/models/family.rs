//! What the house knows of an architecture: one record for each, in its module.

use std::path::{Path, PathBuf};

use image::RgbImage;

use super::checkpoint_files::{self, WeightFiles};
use super::reading::TextReader;
use super::{Learner, LearnerOptions};
use crate::config::Family;
use crate::hub::Published;
use crate::{Error, Result, files};

/// An architecture with its published layout.
pub struct Architecture {
    pub family: Family,
    /// Whether a checkpoint is of this family.
    pub recognises: fn(&Layout) -> bool,
    /// Its models that are known by name.
    pub models: &'static [KnownModel],
    /// The readers of prompts of the checkpoint in a folder, for images of that many pixels a side (its own where `None`);
    /// for learning, which takes a few positions more, or for drawing alone.
    pub readers: fn(&Path, Option<u32>, bool) -> Result<Vec<TextReader>>,
    /// What it takes to learn and draw; `None` for an evaluator.
    pub learner: Option<LearnerParts>,
}

/// What it takes to learn and draw.
pub struct LearnerParts {
    pub open: fn(&LearnerOptions) -> Result<Box<dyn Learner>>,
    /// Side in pixels of the square images of the checkpoint in a folder: what is asked for, or its own.
    pub resolution: fn(&Path, Option<u32>) -> Result<u32>,
    /// Where the weights that adapters change lie in a checkpoint, for images of that many pixels a side.
    pub backbone: fn(&Path, Option<u32>) -> Result<Backbone>,
    /// The text of the backbone's config, where no file of the layout is it.
    pub config: fn(&Path, Option<u32>) -> Result<Option<String>>,
    /// What makes tokens of images; `None` for what reads pixels.
    pub tokenizer: Option<TokenizerParts>,
}

/// What makes tokens of images.
#[derive(Clone, Copy)]
pub struct TokenizerParts {
    pub open: OpenImageTokenizer,
    /// Its folder or file in a checkpoint, and its tokens for an image of that many pixels a side.
    pub files: TokenizerFiles,
}

/// Opens the image tokenizer of the checkpoint in a folder, for images of that many pixels a side.
pub type OpenImageTokenizer =
    fn(&Path, Option<u32>, &candle_core::Device) -> Result<Box<dyn ImageTokenizer>>;

/// Finds them.
pub type TokenizerFiles = fn(&Path, Option<u32>) -> Result<(PathBuf, usize)>;

/// What the tokenizing stage runs on a thread of its own.
pub trait ImageTokenizer: Send {
    /// The tokens of each image, row by row.
    fn encode(&self, images: &[RgbImage]) -> Result<Vec<Vec<u32>>>;
}

/// The weights that adapters change, among the files of a checkpoint.
pub struct Backbone {
    /// Where they lie in a merged checkpoint, empty for its own folder.
    pub folder: &'static str,
    /// Their name there without an ending.
    pub stem: &'static str,
    pub files: WeightFiles,
    pub rest: Rest,
}

/// What a merged checkpoint has beside the weights that adapters change.
pub enum Rest {
    /// Everything else that the folder has.
    Everything,
    /// Parts of a layout that is not kept: files or folders, each with the folder that it goes to; a file goes to the
    /// checkpoint's own.
    Parts(Vec<(PathBuf, &'static str)>),
}

impl Backbone {
    /// The weights called `stem` in `folder` of the checkpoint in `dir`.
    ///
    /// # Errors
    /// When they are missing.
    pub fn in_folder(dir: &Path, folder: &'static str, stem: &'static str) -> Result<Self> {
        Ok(Self {
            folder,
            stem,
            files: WeightFiles::find(&dir.join(folder), stem)?,
            rest: Rest::Everything,
        })
    }
}

impl Backbone {
    /// The weights of the network, diffusers' component `folder`, of the pipeline at `dir`.
    ///
    /// # Errors
    /// When they are missing.
    pub fn of_pipeline(dir: &Path, folder: &'static str) -> Result<Self> {
        Ok(Self {
            folder,
            stem: "diffusion_pytorch_model",
            files: checkpoint_files::Layout::open(dir)?.weights(folder)?,
            rest: Rest::Everything,
        })
    }
}

/// A model that a pipeline file may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KnownModel {
    pub name: &'static str,
    /// Side of its images in pixels; `None` for evaluators.
    pub resolution: Option<usize>,
    /// Directory, relative to the working directory or to the repository the program was built in.
    pub directory: &'static str,
    /// What is published and where; `None` for what ships with proxytune.
    pub hub: Option<&'static Published>,
    /// Files that must be there, relative to the directory. Of a published model, those of proxytune's own layout,
    /// where that is another than the published one.
    pub files: &'static [&'static str],
}

/// What tells the family of the checkpoint in a folder.
pub struct Layout {
    folder: PathBuf,
    pipeline: Option<serde_json::Value>,
    config: Option<serde_json::Value>,
}

impl Layout {
    /// Reads what is there of `model_index.json` and `config.json` (or `gpt/config.json`).
    ///
    /// # Errors
    /// When one of them cannot be read.
    pub fn read(folder: &Path) -> Result<Self> {
        let read = |file: &str| -> Result<Option<serde_json::Value>> {
            let path = folder.join(file);
            path.exists().then(|| files::read_json(&path)).transpose()
        };
        let config = match read("config.json")? {
            None => read("gpt/config.json")?,
            config => config,
        };
        Ok(Self {
            folder: folder.to_path_buf(),
            pipeline: read("model_index.json")?,
            config,
        })
    }

    /// Whether it is diffusers' layout of this pipeline.
    pub fn is_pipeline(&self, class: &str) -> bool {
        text_at(&self.pipeline, "_class_name") == Some(class)
    }

    /// Whether its config is that of transformers for this type, and no pipeline's.
    pub fn is_model_type(&self, model_type: &str) -> bool {
        text_at(&self.config, "model_type") == Some(model_type)
    }

    /// Whether its config has the field `key`.
    pub fn has(&self, key: &str) -> bool {
        let config = self.config.as_ref();
        config.is_some_and(|json| json.get(key).is_some())
    }

    /// Whether nothing tells what it is but the names of its files, of which one is so.
    pub fn has_bare_file(&self, is: fn(&str) -> bool) -> bool {
        let entries = std::fs::read_dir(&self.folder).into_iter().flatten();
        let mut names = entries
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned());
        self.pipeline.is_none()
            && text_at(&self.config, "model_type").is_none()
            && names.any(|name| is(&name))
    }
}

fn text_at<'a>(json: &'a Option<serde_json::Value>, key: &str) -> Option<&'a str> {
    json.as_ref()?.get(key)?.as_str()
}

impl Architecture {
    /// What it takes to learn and draw with it.
    ///
    /// # Errors
    /// When it is an evaluator.
    pub fn learner(&self) -> Result<&LearnerParts> {
        self.learner.as_ref().ok_or_else(|| {
            let learners = super::registry::ARCHITECTURES.iter();
            let learners = learners.filter(|other| other.learner.is_some());
            let names: Vec<&str> = learners.map(|other| other.family.name()).collect();
            Error::invalid(
                format!("{} cannot be trained here", self.family),
                format!("families that can: {}", names.join(", ")),
            )
        })
    }

    /// Side in pixels of the square images that its checkpoint in `dir` draws and learns from: what is `asked` for, or its
    /// own.
    ///
    /// # Errors
    /// When it cannot have that side, or a part that tells is missing.
    pub fn resolution(&self, dir: &Path, asked: Option<u32>) -> Result<u32> {
        let own = (self.learner()?.resolution)(dir, asked)?;
        match asked {
            Some(asked) if asked != own => Err(Error::invalid(
                format!("the model draws images of {own} pixels, not of {asked}"),
                "leave resolution out, or name the checkpoint for another size",
            )),
            _ => Ok(own),
        }
    }
}
