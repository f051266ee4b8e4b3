//! A learner in its training loop: one step on examples, and what a checkpoint holds.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Tensor;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::checkpoints::{Checkpoints, Resumed};
use super::optimizer::{OptimizerConfig, learning_rate_factor};
use super::training_loop::{Progress, TrainingLoop};
use crate::config::{Sampling, Training, Tuning};
use crate::models::{Learner, TrainingExample, sampling_file, snapshot};
use crate::nn::LoraConfig;
use crate::{Error, Result, files, models};

/// A learner that is being trained.
pub struct Trainer {
    learner: Box<dyn Learner>,
    training: TrainingLoop,
    settings: Training,
}

impl Trainer {
    /// A learner at step 0.
    ///
    /// # Errors
    /// When nothing of it is trained.
    pub fn new(mut learner: Box<dyn Learner>, settings: &Training) -> Result<Self> {
        learner.set_training(settings);
        let variables = learner.variables();
        if variables.is_empty() {
            return Err(Error::invalid(
                "nothing to train: no layer of the model matches the adapter's targets",
                "set targets to ends of module names, or leave it out for the family's defaults",
            ));
        }
        let optimizer = OptimizerConfig::new(settings);
        Ok(Self {
            learner,
            training: TrainingLoop::new(variables, &optimizer, Some(settings.max_grad_norm))?,
            settings: settings.clone(),
        })
    }

    /// Step `step` (0-based) on the weighted sum of the mean losses of `groups`, each of which is taken in as many parts
    /// of equal size as gradients are accumulated from; noise, timesteps and dropout are drawn from `seed`.
    ///
    /// # Errors
    /// When a group cannot be so divided, or the loss or a gradient is not finite; the weights are then as before.
    pub fn step(
        &mut self,
        step: usize,
        groups: &[(f64, Vec<TrainingExample>)],
        seed: u64,
    ) -> Result<Progress> {
        let Self {
            learner,
            training,
            settings,
        } = self;
        let batches = settings.gradient_accumulation_steps;
        let sizes = groups.iter().map(|(_, examples)| examples.len());
        if groups.is_empty() || !sizes.into_iter().all(|size| divides(batches, size)) {
            return Err(Error::Invalid {
                what: format!("a step whose examples are not {batches} equal batches"),
                hint: None,
            });
        }
        let factor = learning_rate_factor(
            settings.lr_scheduler,
            step,
            settings.steps,
            settings.warmup_steps,
        );
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        training.step(step, settings.learning_rate * factor, batches, |batch| {
            let losses = groups.iter().map(|(weight, examples)| {
                let size = examples.len() / batches;
                let examples = &examples[batch * size..][..size];
                Ok((learner.loss(examples, &mut generator)? * *weight)?)
            });
            let sum = losses.reduce(|sum: Result<Tensor>, loss| Ok((sum? + loss?)?));
            sum.unwrap_or_else(|| {
                Err(Error::Invalid {
                    what: "a step without examples".into(),
                    hint: None,
                })
            })
        })
    }

    /// The learner, for encoding, drawing and saving.
    pub fn learner(&mut self) -> &mut dyn Learner {
        self.learner.as_mut()
    }

    /// The current values of what is trained.
    pub fn snapshot(&self) -> Result<BTreeMap<String, Tensor>> {
        snapshot(self.training.variables())
    }

    /// Publishes what was learnt as the folder `dir`, as [`Trainer::write`] does, and returns its values.
    pub fn publish(
        &self,
        dir: &Path,
        sampling: Option<&Sampling>,
    ) -> Result<BTreeMap<String, Tensor>> {
        let values = self.snapshot()?;
        self.write(dir, &values, sampling)?;
        Ok(values)
    }

    /// Writes `values` of what is trained as the folder `dir`, wholly or not at all, in the layout of what is published.
    /// `sampling` is how it is drawn with where nothing else is said, if that differs from the model's defaults.
    pub fn write(
        &self,
        dir: &Path,
        values: &BTreeMap<String, Tensor>,
        sampling: Option<&Sampling>,
    ) -> Result<()> {
        files::write_dir(dir, |aside| {
            self.learner.save(aside, values)?;
            sampling.map_or(Ok(()), |sampling| sampling_file::write(aside, sampling))
        })
    }

    /// Writes a checkpoint after `step` steps.
    pub fn save(&mut self, checkpoints: &Checkpoints, step: usize) -> Result<()> {
        let variables = self.learner.variables();
        checkpoints.save(step, &variables, self.training.optimizer())
    }

    /// Continues from the newest whole checkpoint.
    pub fn resume(&mut self, checkpoints: &Checkpoints) -> Result<Resumed> {
        let variables = self.learner.variables();
        checkpoints.resume(&variables, self.training.optimizer())
    }
}

/// Whether `size` examples, of which there are some, are `batches` equal parts.
fn divides(batches: usize, size: usize) -> bool {
    batches > 0 && size > 0 && size.is_multiple_of(batches)
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
