//! Training: the trainer, optimizers, adapter files in and out, checkpoints.

pub mod adapters;
pub mod checkpoints;
pub mod files;
pub mod optimizer;
