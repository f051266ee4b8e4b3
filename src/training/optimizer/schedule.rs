//! How the learning rate goes.

use crate::config::LrScheduler;

/// The factor on the learning rate of step `step` (0-based) of `steps`, in [0, 1], as transformers' and diffusers'
/// `get_scheduler` give it. The warm-up rises by 1 / `warmup_steps` from 0, so that its first step moves nothing.
pub fn learning_rate_factor(
    scheduler: LrScheduler,
    step: usize,
    steps: usize,
    warmup_steps: usize,
) -> f64 {
    if scheduler != LrScheduler::Constant && step < warmup_steps {
        return step as f64 / warmup_steps as f64;
    }
    let after = step.saturating_sub(warmup_steps) as f64;
    let progress = after / steps.saturating_sub(warmup_steps).max(1) as f64;
    match scheduler {
        LrScheduler::Constant | LrScheduler::ConstantWithWarmup => 1.0,
        LrScheduler::Linear => (1.0 - progress).max(0.0),
        LrScheduler::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress.min(1.0)).cos()),
    }
}
