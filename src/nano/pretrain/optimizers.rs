//! What moves the weights: AdamW alone, or Muon for the matrices inside and AdamW for the rest.

use candle_core::Var;
use candle_core::backprop::GradStore;

use super::muon::{self, Muon};
use super::settings::{Optimizer, Training};
use crate::Result;
use crate::training::optimizer::{AdamW, AdamWConfig};

/// The optimizers of one training.
pub struct Optimizers {
    adamw: AdamW,
    muon: Muon,
}

impl Optimizers {
    /// As `training` says, for `variables`.
    pub fn new(variables: Vec<(String, Var)>, training: &Training) -> Result<Self> {
        let (inner, outer) = variables.into_iter().partition(|(name, variable)| {
            training.optimizer == Optimizer::Muon && muon::is_inner(name, variable)
        });
        let config = AdamWConfig {
            beta2: training.beta2,
            weight_decay: training.weight_decay,
            decay_vectors: false,
            max_grad_norm: Some(training.max_grad_norm),
            ..AdamWConfig::default()
        };
        Ok(Self {
            adamw: AdamW::new(outer, config)?,
            muon: Muon::new(inner, training.weight_decay)?,
        })
    }

    /// One step. Returns the gradients' global L2 norm.
    pub fn step(&mut self, gradients: &GradStore, learning_rate: f64) -> Result<f64> {
        let outer = self.adamw.step(gradients, learning_rate)?;
        let inner = self.muon.step(gradients, learning_rate)?;
        Ok(outer.hypot(inner))
    }
}
