//! The training loop's one step, which everything that trains takes: supervisors, students, the direct baseline and the
//! pretraining of nano models.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};

use super::optimizer::{Optimizer, OptimizerConfig, clip_factor, sums_of_squares};
use crate::nn::backward;
use crate::{Error, Result};

/// What one step did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// Mean loss of the step's batches.
    pub loss: f64,
    /// Global L2 norm of the gradients before clipping.
    pub grad_norm: f64,
    pub learning_rate: f64,
}

/// Named f32 variables with what moves them.
pub struct TrainingLoop {
    variables: Vec<(String, Var)>,
    optimizer: Box<dyn Optimizer>,
    max_grad_norm: Option<f64>,
}

impl TrainingLoop {
    /// A loop before its first step. Gradients are scaled down so that their global L2 norm is at most `max_grad_norm`.
    ///
    /// # Errors
    /// When there is no memory for what the optimizer remembers.
    pub fn new(
        variables: Vec<(String, Var)>,
        optimizer: &OptimizerConfig,
        max_grad_norm: Option<f64>,
    ) -> Result<Self> {
        Ok(Self {
            optimizer: optimizer.build(variables.clone())?,
            variables,
            max_grad_norm,
        })
    }

    /// Step `step` (0-based, for messages) at `learning_rate`, along the mean of the gradients of `batches` losses: of
    /// scalars, which `loss` computes one after another, so that the activations of only one are held at once.
    ///
    /// # Errors
    /// When a loss or a gradient is not finite, or no gradient reached a variable: some operation dropped it. Nothing
    /// is changed then.
    pub fn step(
        &mut self,
        step: usize,
        learning_rate: f64,
        batches: usize,
        mut loss: impl FnMut(usize) -> Result<Tensor>,
    ) -> Result<Progress> {
        let share = 1.0 / batches.max(1) as f64;
        let (mut mean, mut sums) = (0.0, Vec::new());
        for batch in 0..batches.max(1) {
            let loss = loss(batch)?;
            let value = f64::from(loss.to_dtype(DType::F32)?.to_scalar::<f32>()?);
            if !value.is_finite() {
                return Err(Error::NotFinite {
                    what: "the loss".into(),
                    step,
                });
            }
            mean += value * share;
            let gradients = self.gradients(&backward(&loss)?)?;
            sums = match batch {
                0 => gradients,
                _ => added(&sums, &gradients)?,
            };
        }
        let grad_norm = sums_of_squares(&sums)?.sqrt() * share;
        let clip = clip_factor(grad_norm, self.max_grad_norm, step)?;
        self.optimizer.step(&sums, share * clip, learning_rate)?;
        Ok(Progress {
            loss: mean,
            grad_norm,
            learning_rate,
        })
    }

    /// The gradients of all variables, in their order.
    fn gradients(&self, found: &GradStore) -> Result<Vec<Tensor>> {
        self.variables
            .iter()
            .map(|(name, variable)| match found.get(variable.as_tensor()) {
                // Gradients remember the activations that they were computed from, which must not be kept.
                Some(gradient) => Ok(gradient.detach().to_dtype(DType::F32)?.contiguous()?),
                None => Err(Error::Invalid {
                    what: format!("no gradient reached {name}"),
                    hint: None,
                }),
            })
            .collect()
    }

    /// What is trained.
    pub fn variables(&self) -> &[(String, Var)] {
        &self.variables
    }

    /// What moves it, for checkpoints.
    pub fn optimizer(&mut self) -> &mut dyn Optimizer {
        self.optimizer.as_mut()
    }

    /// What the optimizer remembers, by name.
    ///
    /// # Errors
    /// When a card cannot be read.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        self.optimizer.state()
    }
}

fn added(sums: &[Tensor], gradients: &[Tensor]) -> Result<Vec<Tensor>> {
    let pairs = sums.iter().zip(gradients);
    let sums = pairs.map(|(sum, gradient)| sum + gradient);
    Ok(sums.collect::<candle_core::Result<_>>()?)
}
