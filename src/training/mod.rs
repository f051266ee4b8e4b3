//! Training: a learner with its optimizer, and checkpoints.

mod checkpoints;
pub mod optimizer;
mod trainee;

pub use checkpoints::{Checkpoints, Resumed, clear_due, restore};
pub use trainee::{Progress, Trainee, tuning};
