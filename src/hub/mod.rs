//! Checkpoints by name: what is published where, what of it is already on this machine, and how the rest arrives.

mod settings;

pub use settings::Settings;
