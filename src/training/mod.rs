//! Training: a learner in its training loop, optimizers, and checkpoints.

mod checkpoints;
pub mod optimizer;
mod trainer;
mod training_loop;

pub use checkpoints::{Checkpoints, Resumed, clear_due, restore};
pub use trainer::{Trainer, tuning};
pub use training_loop::{Progress, TrainingLoop};
