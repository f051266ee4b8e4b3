//! A learner with its optimizer: one training step, and what a checkpoint holds.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Tensor;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::checkpoints::Checkpoints;
use super::optimizer::{AdamW, AdamWConfig, learning_rate_factor};
use crate::config::{Sampling, Training, Tuning};
use crate::models::{Learner, Lesson, sampling_file, snapshot};
use crate::nn::{LoraConfig, backward};
use crate::{Error, Result, files, models};

/// What one step did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// Mean loss of the batch.
    pub loss: f64,
    /// Global L2 norm of the gradients before clipping.
    pub grad_norm: f64,
    pub learning_rate: f64,
}

/// A learner that is being trained.
pub struct Trainee {
    learner: Box<dyn Learner>,
    optimizer: AdamW,
    settings: Training,
}

impl Trainee {
    /// A learner at step 0.
    pub fn new(learner: Box<dyn Learner>, settings: &Training) -> Result<Self> {
        let config = AdamWConfig {
            beta1: settings.adam_beta1,
            beta2: settings.adam_beta2,
            epsilon: settings.adam_epsilon,
            weight_decay: settings.weight_decay,
            decay_vectors: settings.decay_vectors,
            max_grad_norm: Some(settings.max_grad_norm),
        };
        let variables = learner.variables();
        if variables.is_empty() {
            return Err(Error::invalid(
                "nothing to train: no layer of the model matches the adapter's targets",
                "set targets to ends of module names, or leave it out for the family's defaults",
            ));
        }
        let optimizer = AdamW::new(variables, config)?;
        Ok(Self {
            learner,
            optimizer,
            settings: settings.clone(),
        })
    }

    /// Step `step` (0-based) on the weighted sum of the mean losses of `batches`; noise, timesteps and dropout are
    /// drawn from `seed`.
    ///
    /// # Errors
    /// When the loss or a gradient is not finite; the weights are then as before.
    pub fn step(
        &mut self,
        step: usize,
        batches: &[(f64, Vec<Lesson>)],
        seed: u64,
    ) -> Result<Progress> {
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        let mut total: Option<Tensor> = None;
        for (weight, batch) in batches {
            let loss = (self.learner.loss(batch, &mut generator)? * *weight)?;
            total = Some(match total {
                Some(total) => (total + loss)?,
                None => loss,
            });
        }
        let loss = total.ok_or_else(|| Error::Invalid {
            what: "a step without a batch".into(),
            hint: None,
        })?;
        let value = f64::from(loss.to_dtype(candle_core::DType::F32)?.to_scalar::<f32>()?);
        if !value.is_finite() {
            return Err(Error::NotFinite {
                what: "the loss".into(),
                step,
            });
        }
        let gradients = backward(&loss)?;
        let settings = &self.settings;
        let factor = learning_rate_factor(
            settings.lr_scheduler,
            step,
            settings.steps,
            settings.warmup_steps,
        );
        let learning_rate = settings.learning_rate * factor;
        let grad_norm = self.optimizer.step(&gradients, learning_rate)?;
        Ok(Progress {
            loss: value,
            grad_norm,
            learning_rate,
        })
    }

    /// The learner, for encoding, drawing and saving.
    pub fn learner(&mut self) -> &mut dyn Learner {
        self.learner.as_mut()
    }

    /// The current values of what is trained.
    pub fn snapshot(&self) -> Result<BTreeMap<String, Tensor>> {
        snapshot(&self.learner.variables())
    }

    /// Publishes what was learnt as the folder `dir`, wholly or not at all, and returns its values. `sampling` is how it
    /// is drawn with where nothing else is said, if that differs from the model's defaults.
    pub fn publish(
        &self,
        dir: &Path,
        sampling: Option<&Sampling>,
    ) -> Result<BTreeMap<String, Tensor>> {
        let values = self.snapshot()?;
        files::write_dir(dir, |aside| {
            self.learner.save(aside, &values)?;
            sampling.map_or(Ok(()), |sampling| sampling_file::write(aside, sampling))
        })?;
        Ok(values)
    }

    /// Writes a checkpoint after `step` steps.
    pub fn save(&self, checkpoints: &Checkpoints, step: usize) -> Result<()> {
        checkpoints.save(step, &self.learner.variables(), &self.optimizer)
    }

    /// Continues from the newest checkpoint; returns its step, 0 if there is none.
    pub fn resume(&mut self, checkpoints: &Checkpoints) -> Result<usize> {
        Ok(checkpoints
            .resume(&self.learner.variables(), &mut self.optimizer)?
            .unwrap_or(0))
    }
}

/// How a learner with these settings is opened.
pub fn tuning(settings: &Training) -> models::Tuning {
    match settings.tuning {
        Tuning::Lora => models::Tuning::Lora(LoraConfig {
            rank: settings.rank,
            alpha: settings.alpha,
            targets: settings.targets.clone(),
        }),
        Tuning::Full => models::Tuning::Full,
    }
}
