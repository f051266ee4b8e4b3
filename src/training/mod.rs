//! Training: optimizers, the trainer, adapter files in and out.

pub mod optimizer;
