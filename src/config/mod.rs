//! TOML to types, all faults at once, and the resolved file.
//!
//! A pipeline file is read in three steps: `tree` turns text and `--set` overrides into values that know their
//! place; `typed` reads these into structs of options, what was typed; `resolve` fills every default and gives
//! [`Resolved`], what it means. Faults of all steps are collected and reported together.

mod defaults;
mod direct;
mod document;
mod effect;
pub mod limits;
pub mod locate;
pub mod models;
pub mod own_subjects;
pub mod prompts;
mod reader;
mod resolve;
mod resolved;
mod subjects;
mod templates;
mod training;
mod tree;
mod typed;

use std::path::Path;

pub use document::Document;
pub use locate::locate;
pub use models::{Family, Kind, family};
pub use own_subjects::Changes;
pub use prompts::PromptList;
pub(crate) use reader::did_you_mean;
pub use resolve::draws_with;
pub use resolved::*;
pub use templates::prompt_list;
pub use training::training_defaults;

use crate::Result;

/// Reads and resolves the pipeline file at `path` with overrides of the form `a.b=value`.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) with every fault of the file and the overrides, each as
/// `FILE:LINE:COLUMN: what` and `hint: …`; [`Error::Io`](crate::Error::Io) when the file cannot be read.
pub fn load(path: &Path, overrides: &[String]) -> Result<Resolved> {
    Document::open(path, overrides)?.resolve()
}

/// How a model of this family samples where nothing else is said: a diffusion model's settings, or an AR model's.
pub fn sampling_defaults(family: Family) -> Sampling {
    match family.kind() {
        Kind::Autoregressive => Sampling::Autoregressive(defaults::autoregressive_sampling(family)),
        Kind::Diffusion | Kind::Evaluator => {
            Sampling::Diffusion(defaults::diffusion_sampling(family))
        }
    }
}
