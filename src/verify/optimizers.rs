//! Optimizers as components: parameters after each of some steps along given gradients.

use std::collections::HashMap;

use candle_core::{DType, Tensor, Var};
use serde::Deserialize;

use super::reference::Inputs;
use super::runners::{Opened, Output, Place, Runner};
use crate::config;
use crate::nn::Weights;
use crate::training::TrainingLoop;
use crate::training::optimizer::{AdamWConfig, OptimizerConfig, ProdigyConfig};
use crate::{Error, Result};

/// `config.json`: the class and its arguments, where what is left out has the class's default, and the norm to which
/// gradients are clipped before each step.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Arguments {
    #[serde(rename = "_class_name")]
    _class_name: String,
    betas: Option<[f64; 2]>,
    eps: Option<f64>,
    weight_decay: Option<f64>,
    max_grad_norm: Option<f64>,
    beta3: Option<f64>,
    d0: Option<f64>,
    d_coef: Option<f64>,
    growth_rate: Option<f64>,
    decouple: Option<bool>,
    use_bias_correction: Option<bool>,
    safeguard_warmup: Option<bool>,
}

impl Arguments {
    /// AdamW's, and Prodigy's first ones: both classes decay everything, by default at this rate.
    fn adamw(&self, weight_decay: f64) -> AdamWConfig {
        let [beta1, beta2] = self.betas.unwrap_or([0.9, 0.999]);
        AdamWConfig {
            beta1,
            beta2,
            epsilon: self.eps.unwrap_or(1e-8),
            weight_decay: self.weight_decay.unwrap_or(weight_decay),
            decay_vectors: true,
        }
    }
}

/// torch's `AdamW`.
pub(super) fn adamw(place: &Place) -> Opened {
    let arguments: Arguments = place.settings()?;
    let config = OptimizerConfig::AdamW(arguments.adamw(1e-2));
    open(place, config, arguments.max_grad_norm)
}

/// prodigyopt's `Prodigy`, whose defaults are not those of diffusers' scripts.
pub(super) fn prodigy(place: &Place) -> Opened {
    let arguments: Arguments = place.settings()?;
    let own = config::Prodigy {
        beta3: arguments.beta3,
        d0: arguments.d0.unwrap_or(1e-6),
        d_coef: arguments.d_coef.unwrap_or(1.0),
        growth_rate: arguments.growth_rate,
        decouple: arguments.decouple.unwrap_or(true),
        use_bias_correction: arguments.use_bias_correction.unwrap_or(false),
        safeguard_warmup: arguments.safeguard_warmup.unwrap_or(false),
    };
    let adamw = arguments.adamw(0.0);
    let config = OptimizerConfig::Prodigy(ProdigyConfig { adamw, own });
    open(place, config, arguments.max_grad_norm)
}

fn open(place: &Place, optimizer: OptimizerConfig, max_grad_norm: Option<f64>) -> Opened {
    let nothing = Weights::from_tensors(HashMap::new(), DType::F32, &place.device);
    let steps = Steps {
        optimizer,
        max_grad_norm,
    };
    Ok((Box::new(steps), nothing))
}

struct Steps {
    optimizer: OptimizerConfig,
    max_grad_norm: Option<f64>,
}

impl Runner for Steps {
    /// From `parameters.NAME`, `gradients.NAME` of each step, and the `learning_rate` of each.
    fn run(&self, inputs: &Inputs<'_>) -> Result<Vec<Output>> {
        let names = inputs.names("parameters.");
        if names.is_empty() {
            return Err(Error::invalid(
                "the reference file has no input.parameters.NAME",
                "give each parameter as it was before the first step",
            ));
        }
        let rates = inputs.exact("learning_rate")?.flatten_all()?;
        let rates = rates.to_vec1::<f32>()?;
        let (mut variables, mut gradients) = (Vec::new(), Vec::new());
        for name in &names {
            let start = inputs.exact(&format!("parameters.{name}"))?;
            let along = inputs.exact(&format!("gradients.{name}"))?;
            let each: Vec<usize> = [&[rates.len()], start.dims()].concat();
            if along.dims() != each {
                return Err(Error::invalid(
                    format!("input.gradients.{name} has shape {:?}", along.dims()),
                    format!("{each:?} is expected: a gradient for every step"),
                ));
            }
            variables.push((name.clone(), Var::from_tensor(&start)?));
            gradients.push(along);
        }
        let mut training =
            TrainingLoop::new(variables.clone(), &self.optimizer, self.max_grad_norm)?;
        let mut after = vec![Vec::new(); names.len()];
        for (step, rate) in rates.into_iter().enumerate() {
            training.step(step, f64::from(rate), 1, |_| {
                // Its gradients are those that are given.
                let parts = variables.iter().zip(&gradients);
                let parts = parts
                    .map(|((_, variable), all)| (variable.as_tensor() * all.get(step)?)?.sum_all());
                Ok(
                    Tensor::stack(&parts.collect::<candle_core::Result<Vec<_>>>()?, 0)?
                        .sum_all()?,
                )
            })?;
            for (after, (_, variable)) in after.iter_mut().zip(&variables) {
                after.push(variable.as_tensor().copy()?.detach());
            }
        }
        names
            .iter()
            .zip(after)
            .map(|(name, after)| Ok(Output::numbers(&[name], Tensor::stack(&after, 0)?)))
            .collect()
    }
}
