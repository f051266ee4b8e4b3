//! AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with torch's semantics, gradient clipping by global norm, and
//! learning-rate schedules.

use std::collections::BTreeMap;

use crate::config::LrScheduler;
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Storage, Tensor, Var};
use rayon::prelude::*;

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
    /// Gradients are scaled down so that their global L2 norm is at most this.
    pub max_grad_norm: Option<f64>,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 1e-2,
            decay_vectors: true,
            max_grad_norm: None,
        }
    }
}

/// One trained tensor with its moments, which live where the tensor does.
struct Slot {
    name: String,
    variable: Var,
    moments: Moments,
}

enum Moments {
    Cpu { first: Vec<f32>, second: Vec<f32> },
    Device { first: Tensor, second: Tensor },
}

/// AdamW over named f32 variables. Moments are f32 whatever the model's dtype.
pub struct AdamW {
    config: AdamWConfig,
    slots: Vec<Slot>,
    steps: u64,
}

impl AdamW {
    /// An optimizer with zero moments.
    pub fn new(variables: Vec<(String, Var)>, config: AdamWConfig) -> Result<Self> {
        let slots = variables
            .into_iter()
            .map(|(name, variable)| {
                let moments = if variable.device().is_cpu() {
                    let count = variable.elem_count();
                    Moments::Cpu {
                        first: vec![0.0; count],
                        second: vec![0.0; count],
                    }
                } else {
                    Moments::Device {
                        first: variable.zeros_like()?,
                        second: variable.zeros_like()?,
                    }
                };
                Ok(Slot {
                    name,
                    variable,
                    moments,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            config,
            slots,
            steps: 0,
        })
    }

    /// Steps taken so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// One step. Returns the gradients' global L2 norm before clipping. A tensor without a gradient is an error: it
    /// means that some operation dropped it. If the norm is not finite nothing is changed.
    pub fn step(&mut self, gradients: &GradStore, learning_rate: f64) -> Result<f64> {
        let gradients = self
            .slots
            .iter()
            .map(|slot| match gradients.get(slot.variable.as_tensor()) {
                // Gradients remember the activations that they were computed from; moments must not keep these.
                Some(gradient) => Ok(gradient.detach().to_dtype(DType::F32)?.contiguous()?),
                None => Err(Error::Invalid {
                    what: format!("no gradient reached {}", slot.name),
                    hint: None,
                }),
            })
            .collect::<Result<Vec<Tensor>>>()?;
        // Partial sums per tensor, added in the order of the names: the same on any number of threads.
        let squares = gradients
            .par_iter()
            .map(sum_of_squares)
            .collect::<Result<Vec<f64>>>()?;
        let norm = squares.iter().sum::<f64>().sqrt();
        if !norm.is_finite() {
            return Err(Error::NotFinite {
                what: "the gradient".into(),
                step: self.steps as usize,
            });
        }
        let clip = match self.config.max_grad_norm {
            Some(limit) => (limit / (norm + 1e-6)).min(1.0),
            None => 1.0,
        };
        self.steps += 1;
        let (config, steps) = (self.config, self.steps as i32);
        self.slots
            .par_iter_mut()
            .zip(&gradients)
            .try_for_each(|(slot, gradient)| {
                let decays = config.decay_vectors || slot.variable.rank() >= 2;
                let decay = if decays {
                    1.0 - learning_rate * config.weight_decay
                } else {
                    1.0
                };
                let update = Update {
                    clip,
                    decay,
                    step_size: learning_rate / (1.0 - config.beta1.powi(steps)),
                    second_correction: (1.0 - config.beta2.powi(steps)).sqrt(),
                    config,
                };
                update.apply(slot, gradient)
            })?;
        Ok(norm)
    }

    /// Moments and step count by name, for a checkpoint: `NAME.exp_avg`, `NAME.exp_avg_sq`, `step`.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::new();
        for slot in &self.slots {
            let shape = slot.variable.shape();
            let (first, second) = match &slot.moments {
                Moments::Cpu { first, second } => (
                    Tensor::from_slice(first, shape, &Device::Cpu)?,
                    Tensor::from_slice(second, shape, &Device::Cpu)?,
                ),
                Moments::Device { first, second } => (
                    first.to_device(&Device::Cpu)?,
                    second.to_device(&Device::Cpu)?,
                ),
            };
            state.insert(format!("{}.exp_avg", slot.name), first);
            state.insert(format!("{}.exp_avg_sq", slot.name), second);
        }
        state.insert(
            "step".into(),
            Tensor::from_vec(vec![self.steps as i64], 1, &Device::Cpu)?,
        );
        Ok(state)
    }

    /// Continues from a [`AdamW::state`].
    pub fn load_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let get = |name: String| {
            state.get(&name).ok_or_else(|| {
                Error::invalid(
                    format!("the optimizer state lacks {name}"),
                    "start this run afresh with --new",
                )
            })
        };
        let step = get("step".into())?.to_vec1::<i64>()?;
        for slot in &mut self.slots {
            let first = get(format!("{}.exp_avg", slot.name))?;
            let second = get(format!("{}.exp_avg_sq", slot.name))?;
            if first.shape() != slot.variable.shape() || second.shape() != slot.variable.shape() {
                return Err(Error::invalid(
                    format!("the optimizer state of {} has another shape", slot.name),
                    "start this run afresh with --new",
                ));
            }
            slot.moments = if slot.variable.device().is_cpu() {
                Moments::Cpu {
                    first: first.flatten_all()?.to_vec1()?,
                    second: second.flatten_all()?.to_vec1()?,
                }
            } else {
                let device = slot.variable.device();
                Moments::Device {
                    first: first.to_device(device)?,
                    second: second.to_device(device)?,
                }
            };
        }
        self.steps = step.first().copied().unwrap_or(0) as u64;
        Ok(())
    }
}

struct Update {
    clip: f64,
    decay: f64,
    step_size: f64,
    second_correction: f64,
    config: AdamWConfig,
}

impl Update {
    fn apply(&self, slot: &mut Slot, gradient: &Tensor) -> Result<()> {
        match &mut slot.moments {
            Moments::Cpu { first, second } => {
                let (b1, b2) = (self.config.beta1 as f32, self.config.beta2 as f32);
                let (clip, decay, epsilon) = (
                    self.clip as f32,
                    self.decay as f32,
                    self.config.epsilon as f32,
                );
                let (step_size, correction) =
                    (self.step_size as f32, self.second_correction as f32);
                let weights = with_slice(slot.variable.as_tensor(), |weights| {
                    with_slice(gradient, |gradient| {
                        let moments = first.iter_mut().zip(second.iter_mut());
                        weights
                            .iter()
                            .zip(gradient)
                            .zip(moments)
                            .map(|((weight, gradient), (first, second))| {
                                let g = gradient * clip;
                                *first = b1 * *first + (1.0 - b1) * g;
                                *second = b2 * *second + (1.0 - b2) * g * g;
                                weight * decay
                                    - step_size * *first / (second.sqrt() / correction + epsilon)
                            })
                            .collect::<Vec<f32>>()
                    })
                })??;
                slot.variable.set(&Tensor::from_vec(
                    weights,
                    slot.variable.shape(),
                    &Device::Cpu,
                )?)?;
            }
            Moments::Device { first, second } => {
                let config = &self.config;
                let g = (gradient * self.clip)?;
                *first = ((&*first * config.beta1)? + (&g * (1.0 - config.beta1))?)?;
                *second = ((&*second * config.beta2)? + (g.sqr()? * (1.0 - config.beta2))?)?;
                let denominator = ((second.sqrt()? / self.second_correction)? + config.epsilon)?;
                let weight = slot.variable.as_tensor().detach();
                let weight =
                    ((weight * self.decay)? - ((&*first / denominator)? * self.step_size)?)?;
                slot.variable.set(&weight)?;
            }
        }
        Ok(())
    }
}

/// Calls `body` with the values of a contiguous f32 tensor on the CPU.
fn with_slice<T>(tensor: &Tensor, body: impl FnOnce(&[f32]) -> T) -> Result<T> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(values) => {
            let values = values.as_slice::<f32>()?;
            let start = layout.start_offset();
            Ok(body(&values[start..start + layout.shape().elem_count()]))
        }
        _ => Err(Error::Invalid {
            what: "a tensor is not where its optimizer state is".into(),
            hint: None,
        }),
    }
}

fn sum_of_squares(tensor: &Tensor) -> Result<f64> {
    if tensor.device().is_cpu() {
        with_slice(tensor, |values| {
            values
                .chunks(4096)
                .map(|chunk| f64::from(chunk.iter().map(|v| v * v).sum::<f32>()))
                .sum()
        })
    } else {
        Ok(f64::from(tensor.sqr()?.sum_all()?.to_scalar::<f32>()?))
    }
}

/// The factor on the learning rate at `step` (0-based) of `steps`, in [0, 1], as the trainers of diffusers and
/// transformers compute it.
pub fn learning_rate_factor(
    scheduler: LrScheduler,
    step: usize,
    steps: usize,
    warmup_steps: usize,
) -> f64 {
    if scheduler != LrScheduler::Constant && step < warmup_steps {
        return (step + 1) as f64 / warmup_steps as f64;
    }
    let after = step.saturating_sub(warmup_steps) as f64;
    let progress = after / steps.saturating_sub(warmup_steps).max(1) as f64;
    match scheduler {
        LrScheduler::Constant | LrScheduler::ConstantWithWarmup => 1.0,
        LrScheduler::Linear => (1.0 - progress).max(0.0),
        LrScheduler::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress.min(1.0)).cos()),
    }
}
