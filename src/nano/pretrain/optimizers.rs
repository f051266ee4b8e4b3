//! What moves the weights: AdamW alone, or Muon for the matrices inside and AdamW for the rest.

use candle_core::Var;
use candle_core::backprop::GradStore;

use super::muon::{self, Muon};
use super::settings::{Optimizer, Training};
use crate::Result;
use crate::training::optimizer::{AdamW, AdamWConfig, clip_factor};

/// The optimizers of one training.
pub struct Optimizers {
    adamw: AdamW,
    muon: Muon,
    max_grad_norm: f64,
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
            ..AdamWConfig::default()
        };
        Ok(Self {
            adamw: AdamW::new(outer, config)?,
            muon: Muon::new(inner, training.weight_decay)?,
            max_grad_norm: training.max_grad_norm,
        })
    }

    /// One step on gradients whose norm over both sets is at most `max_grad_norm`. Returns their global L2 norm before
    /// that. If it is not finite nothing is changed.
    pub fn step(&mut self, gradients: &GradStore, learning_rate: f64) -> Result<f64> {
        let squares = self.adamw.squares(gradients)? + self.muon.squares(gradients)?;
        let norm = squares.sqrt();
        let clip = clip_factor(norm, Some(self.max_grad_norm), self.adamw.steps())?;
        self.adamw.step_clipped(gradients, learning_rate, clip)?;
        self.muon.step(gradients, learning_rate, clip)?;
        Ok(norm)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};

    use super::*;
    use crate::Error;

    fn two() -> (Var, Var, Optimizers) {
        let device = &Device::Cpu;
        let matrix = Var::ones((16, 16), DType::F32, device).unwrap();
        let vector = Var::ones(16, DType::F32, device).unwrap();
        let training = Training {
            images: 1,
            batch_size: 1,
            learning_rate: 0.1,
            warmup_images: 0,
            beta2: 0.99,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            optimizer: Optimizer::Muon,
        };
        let variables = vec![
            ("inner.weight".to_string(), matrix.clone()),
            ("norm".to_string(), vector.clone()),
        ];
        let optimizers = Optimizers::new(variables, &training).unwrap();
        (matrix, vector, optimizers)
    }

    fn values(variable: &Var) -> Vec<f32> {
        variable.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn one_norm_is_taken_over_both_sets() {
        let (matrix, vector, mut optimizers) = two();
        let sum = |v: &Var, scale: f64| (v.as_tensor().sum_all().unwrap() * scale).unwrap();
        let loss = (sum(&matrix, 3.0) + sum(&vector, 4.0)).unwrap();
        let norm = optimizers.step(&loss.backward().unwrap(), 0.1).unwrap();
        assert!((norm - (256.0 * 9.0 + 16.0 * 16.0f64).sqrt()).abs() < 1e-3);
        let first = &optimizers.adamw.state().unwrap()["norm.exp_avg"];
        let first = first.to_vec1::<f32>().unwrap()[0];
        assert!(
            (f64::from(first) - 0.1 * 4.0 / norm).abs() < 1e-6,
            "{first}"
        );
    }

    #[test]
    fn neither_set_moves_when_one_has_no_finite_gradient() {
        let (matrix, vector, mut optimizers) = two();
        let bad = Tensor::full(f32::INFINITY, (16, 16), &Device::Cpu).unwrap();
        let bad = (matrix.as_tensor() * bad).unwrap().sum_all().unwrap();
        let loss = (bad + vector.as_tensor().sum_all().unwrap()).unwrap();
        let error = optimizers.step(&loss.backward().unwrap(), 0.1).unwrap_err();
        assert!(matches!(error, Error::NotFinite { .. }), "{error}");
        assert!(
            values(&matrix)
                .iter()
                .chain(&values(&vector))
                .all(|v| *v == 1.0)
        );
    }
}
