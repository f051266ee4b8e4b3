//! AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with torch's semantics.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor, Var};
use multiversion::multiversion;
use rayon::prelude::*;

use super::{Optimizer, PIECE, Remembered, entry, in_place, with_slice};
use crate::Result;
use crate::nn::{card_optimizer, card_takes};

/// The constants of [`AdamW`]; the learning rate is given to each step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the first moment, in [0, 1).
    pub beta1: f64,
    /// Decay of the second moment, in [0, 1).
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay: each step multiplies a weight by `1 − learning_rate · weight_decay`.
    pub weight_decay: f64,
    /// Whether tensors of fewer than two dimensions (norms, biases) decay too, as in torch.
    pub decay_vectors: bool,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 1e-2,
            decay_vectors: true,
        }
    }
}

impl AdamWConfig {
    /// Whether this variable decays.
    pub(super) fn decays(&self, variable: &Var) -> bool {
        self.decay_vectors || variable.rank() >= 2
    }
}

/// One trained tensor with its two moments.
struct Slot {
    name: String,
    variable: Var,
    moments: Remembered<2>,
}

/// torch's names of the moments.
const MOMENTS: [&str; 2] = ["exp_avg", "exp_avg_sq"];

/// AdamW over named f32 variables.
pub struct AdamW {
    config: AdamWConfig,
    slots: Vec<Slot>,
    steps: u64,
}

impl AdamW {
    /// An optimizer with zero moments.
    ///
    /// # Errors
    /// When a card has no room for them.
    pub fn new(variables: Vec<(String, Var)>, config: AdamWConfig) -> Result<Self> {
        let slots = variables
            .into_iter()
            .map(|(name, variable)| {
                Ok(Slot {
                    moments: Remembered::zeros(&variable)?,
                    name,
                    variable,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            config,
            slots,
            steps: 0,
        })
    }
}

impl Optimizer for AdamW {
    fn step(&mut self, gradients: &[Tensor], scale: f64, learning_rate: f64) -> Result<()> {
        self.steps += 1;
        let (config, steps) = (self.config, self.steps as i32);
        let update = Update {
            scale,
            decay: 1.0 - learning_rate * config.weight_decay,
            step_size: learning_rate / (1.0 - config.beta1.powi(steps)),
            second_correction: (1.0 - config.beta2.powi(steps)).sqrt(),
            config,
        };
        if card_takes(self.slots.iter().map(|slot| slot.variable.as_tensor())) {
            return update.apply_on_card(&self.slots, gradients);
        }
        self.slots
            .par_iter_mut()
            .zip(gradients)
            .try_for_each(|(slot, gradient)| {
                let decay = match config.decays(&slot.variable) {
                    true => update.decay,
                    false => 1.0,
                };
                Update { decay, ..update }.apply(slot, gradient)
            })
    }

    fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::new();
        for slot in &self.slots {
            let of = (slot.name.as_str(), slot.variable.shape());
            slot.moments.save(of, MOMENTS, &mut state)?;
        }
        let steps = Tensor::from_vec(vec![self.steps as i64], 1, &Device::Cpu)?;
        state.insert("step".into(), steps);
        Ok(state)
    }

    fn load_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let steps = entry(state, "step")?.to_vec1::<i64>()?;
        let slots = self.slots.iter();
        let loaded: Vec<Remembered<2>> = slots
            .map(|slot| Remembered::load((slot.name.as_str(), &slot.variable), MOMENTS, state))
            .collect::<Result<_>>()?;
        for (slot, moments) in self.slots.iter_mut().zip(loaded) {
            slot.moments = moments;
        }
        self.steps = steps.first().copied().unwrap_or(0) as u64;
        Ok(())
    }
}

#[derive(Clone, Copy)]
struct Update {
    scale: f64,
    decay: f64,
    step_size: f64,
    second_correction: f64,
    config: AdamWConfig,
}

impl Update {
    /// The step of all tensors, which are on one card, in one go.
    fn apply_on_card(&self, slots: &[Slot], gradients: &[Tensor]) -> Result<()> {
        let mut trained = Vec::with_capacity(slots.len());
        for (slot, gradient) in slots.iter().zip(gradients) {
            let Remembered::Device([first, second]) = &slot.moments else {
                continue;
            };
            trained.push(card_optimizer::Trained {
                weights: slot.variable.as_tensor(),
                gradient,
                first,
                second,
                decays: self.config.decays(&slot.variable),
            });
        }
        let step = card_optimizer::Step {
            clip: self.scale,
            decay: self.decay,
            step_size: self.step_size,
            second_correction: self.second_correction,
            epsilon: self.config.epsilon,
            beta1: self.config.beta1,
            beta2: self.config.beta2,
        };
        Ok(card_optimizer::adamw(&trained, &step)?)
    }

    fn apply(&self, slot: &mut Slot, gradient: &Tensor) -> Result<()> {
        match &mut slot.moments {
            Remembered::Cpu([first, second]) => with_slice(gradient, |gradient| {
                in_place(&slot.variable, |weights| {
                    weights
                        .par_chunks_mut(PIECE)
                        .zip(gradient.par_chunks(PIECE))
                        .zip(first.par_chunks_mut(PIECE))
                        .zip(second.par_chunks_mut(PIECE))
                        .for_each(|(((weights, gradient), first), second)| {
                            adamw(self, weights, gradient, first, second);
                        });
                })
            })?,
            Remembered::Device([first, second]) => {
                let config = &self.config;
                let g = (gradient * self.scale)?;
                *first = ((&*first * config.beta1)? + (&g * (1.0 - config.beta1))?)?;
                *second = ((&*second * config.beta2)? + (g.sqr()? * (1.0 - config.beta2))?)?;
                let denominator = ((second.sqrt()? / self.second_correction)? + config.epsilon)?;
                let weight = slot.variable.as_tensor().detach();
                let weight =
                    ((weight * self.decay)? - ((&*first / denominator)? * self.step_size)?)?;
                Ok(slot.variable.set(&weight)?)
            }
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn adamw(
    update: &Update,
    weights: &mut [f32],
    gradient: &[f32],
    first: &mut [f32],
    second: &mut [f32],
) {
    let config = &update.config;
    let (b1, b2) = (config.beta1 as f32, config.beta2 as f32);
    // 1 − β is taken before rounding, as torch does: 1 − 0.999f32 is off by one part in 40,000.
    let (c1, c2) = ((1.0 - config.beta1) as f32, (1.0 - config.beta2) as f32);
    let (scale, decay, epsilon) = (
        update.scale as f32,
        update.decay as f32,
        config.epsilon as f32,
    );
    let (step_size, correction) = (update.step_size as f32, update.second_correction as f32);
    let moments = first.iter_mut().zip(second);
    for ((weight, gradient), (first, second)) in weights.iter_mut().zip(gradient).zip(moments) {
        let g = gradient * scale;
        *first = b1 * *first + c1 * g;
        *second = b2 * *second + c2 * g * g;
        *weight = *weight * decay - step_size * *first / (second.sqrt() / correction + epsilon);
    }
}
