//! How a model learns: what was typed, over what its family is trained with where nothing is.

use super::defaults;
use super::models::Family;
use super::reader::Faults;
use super::resolve::or;
use super::resolved::*;
use super::tree::Place;
use super::typed::{self, Typed};

/// The training that a family gets when nothing is typed.
pub(super) fn family_training(
    typed: &typed::Training,
    family: Family,
    model: &Place,
    faults: &Faults,
) -> Training {
    let is_known = defaults::training(family).learning_rate.is_some();
    if typed.learning_rate.is_none() && !is_known {
        faults.push(
            model,
            format!("the paper trains {family} with Prodigy, which is not built yet"),
            "set optimizer = \"adamw\" and a learning_rate, such as 1e-4",
        );
    }
    training_defaults(family)
}

/// How a model of this family learns where nothing else is said. The learning rate is 0 where the paper names an
/// optimizer that is not built.
pub fn training_defaults(family: Family) -> Training {
    let defaults = defaults::training(family);
    Training {
        tuning: Tuning::Lora,
        steps: defaults.steps,
        batch_size: defaults.batch_size,
        learning_rate: defaults.learning_rate.unwrap_or_default(),
        optimizer: Optimizer::Adamw,
        adam_beta1: 0.9,
        adam_beta2: defaults.adam_beta2,
        adam_epsilon: 1e-8,
        weight_decay: defaults.weight_decay,
        max_grad_norm: defaults.max_grad_norm,
        lr_scheduler: LrScheduler::Constant,
        warmup_steps: 0,
        rank: defaults::RANK,
        alpha: defaults::RANK as f64,
        targets: defaults::targets(family),
        checkpoint_every: defaults::CHECKPOINT_EVERY,
        memory: Memory::Auto,
    }
}

/// Weights that are all trained are f32.
pub(super) fn check_dtype(
    dtype: &Typed<Dtype>,
    training: &typed::Training,
    role: &str,
    faults: &Faults,
) {
    if let Some(at) = dtype
        && matches!(at.value, Dtype::Bf16 | Dtype::F16)
        && or(&training.tuning, Tuning::Lora) == Tuning::Full
    {
        faults.push(
            &at.place,
            format!("{role}.dtype has no effect with tuning = \"full\": trained weights are f32"),
            "remove the line, or use tuning = \"lora\"",
        );
    }
}

/// What was typed, over `default`.
pub(super) fn training(typed: &typed::Training, default: &Training, faults: &Faults) -> Training {
    let rank = or(&typed.rank, default.rank);
    let alpha = if typed.rank.is_some() {
        rank as f64
    } else {
        default.alpha
    };
    let targets = typed
        .targets
        .as_ref()
        .map(|list| list.value.iter().map(|at| at.value.clone()).collect());
    let training = Training {
        tuning: or(&typed.tuning, default.tuning),
        steps: or(&typed.steps, default.steps),
        batch_size: or(&typed.batch_size, default.batch_size),
        learning_rate: or(&typed.learning_rate, default.learning_rate),
        optimizer: or(&typed.optimizer, default.optimizer),
        adam_beta1: or(&typed.adam_beta1, default.adam_beta1),
        adam_beta2: or(&typed.adam_beta2, default.adam_beta2),
        adam_epsilon: or(&typed.adam_epsilon, default.adam_epsilon),
        weight_decay: or(&typed.weight_decay, default.weight_decay),
        max_grad_norm: or(&typed.max_grad_norm, default.max_grad_norm),
        lr_scheduler: or(&typed.lr_scheduler, default.lr_scheduler),
        warmup_steps: or(&typed.warmup_steps, default.warmup_steps),
        rank,
        alpha: or(&typed.alpha, alpha),
        targets: targets.unwrap_or_else(|| default.targets.clone()),
        checkpoint_every: or(&typed.checkpoint_every, default.checkpoint_every),
        memory: or(&typed.memory, default.memory),
    };
    if let Some(warmup) = &typed.warmup_steps {
        if warmup.value > training.steps {
            faults.push(
                &warmup.place,
                format!(
                    "{} warm-up steps are more than all {} steps",
                    warmup.value, training.steps
                ),
                "lower warmup_steps, or raise steps",
            );
        }
        if warmup.value > 0 && training.lr_scheduler == LrScheduler::Constant {
            faults.push(
                &warmup.place,
                "warmup_steps has no effect with lr_scheduler = \"constant\"",
                "use lr_scheduler = \"constant_with_warmup\"",
            );
        }
    }
    training
}
