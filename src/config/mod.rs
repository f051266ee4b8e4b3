//! TOML to types, all faults at once, and the resolved file.
//!
//! A pipeline file is read in three steps: `tree` turns text and `--set` overrides into values that know their
//! place; `typed` reads these into structs of options, what was typed; `resolve` fills every default and gives
//! [`Resolved`], what it means. Faults of all steps are collected and reported together.

mod choices;
mod direct;
mod document;
mod effect;
mod family;
pub mod limits;
pub mod own_subjects;
mod plan_size;
pub mod prompts;
mod reader;
mod resolve;
mod resolved;
mod subjects;
mod surroundings;
mod templates;
mod training;
mod tree;
mod typed;

pub use document::Document;
pub use family::{Family, FamilySettings, Kind, SamplingDefaults, TrainingDefaults};
pub use own_subjects::Changes;
pub use prompts::PromptList;
pub(crate) use reader::did_you_mean;
pub use resolved::*;
pub use surroundings::{Model, Surroundings};
pub use templates::prompt_list;
