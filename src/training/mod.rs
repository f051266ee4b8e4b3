//! Training: a learner with its optimizer, and checkpoints.

pub mod checkpoints;
pub mod optimizer;
mod trainee;

pub use trainee::{Progress, Trainee, tuning};
