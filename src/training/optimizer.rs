//! AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with torch's semantics, gradient clipping by global norm, and
//! learning-rate schedules.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use crate::config::LrScheduler;
use crate::nn::{card_optimizer, card_takes};
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Storage, Tensor, Var};
use multiversion::multiversion;
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

impl AdamWConfig {
    fn decays(&self, slot: &Slot) -> bool {
        self.decay_vectors || slot.variable.rank() >= 2
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
        let norm = self.squares(gradients)?.sqrt();
        let clip = clip_factor(norm, self.config.max_grad_norm, self.steps)?;
        self.step_clipped(gradients, learning_rate, clip)?;
        Ok(norm)
    }

    fn gradients(&self, gradients: &GradStore) -> Result<Vec<Tensor>> {
        self.slots
            .iter()
            .map(|slot| match gradients.get(slot.variable.as_tensor()) {
                // Gradients remember the activations that they were computed from; moments must not keep these.
                Some(gradient) => Ok(gradient.detach().to_dtype(DType::F32)?.contiguous()?),
                None => Err(Error::Invalid {
                    what: format!("no gradient reached {}", slot.name),
                    hint: None,
                }),
            })
            .collect()
    }

    /// The sum of the squares of all gradients.
    ///
    /// # Errors
    /// When a tensor has no gradient.
    pub fn squares(&self, gradients: &GradStore) -> Result<f64> {
        sums_of_squares(&self.gradients(gradients)?)
    }

    /// One step on the gradients times `clip`: for a norm that is taken over more than these tensors.
    ///
    /// # Errors
    /// When a tensor has no gradient.
    pub fn step_clipped(
        &mut self,
        gradients: &GradStore,
        learning_rate: f64,
        clip: f64,
    ) -> Result<()> {
        let gradients = self.gradients(gradients)?;
        self.steps += 1;
        let (config, steps) = (self.config, self.steps as i32);
        let update = Update {
            clip,
            decay: 1.0 - learning_rate * config.weight_decay,
            step_size: learning_rate / (1.0 - config.beta1.powi(steps)),
            second_correction: (1.0 - config.beta2.powi(steps)).sqrt(),
            config,
        };
        if card_takes(self.slots.iter().map(|slot| slot.variable.as_tensor())) {
            return update.apply_on_card(&self.slots, &gradients);
        }
        self.slots
            .par_iter_mut()
            .zip(&gradients)
            .try_for_each(|(slot, gradient)| {
                let decay = match config.decays(slot) {
                    true => update.decay,
                    false => 1.0,
                };
                Update { decay, ..update }.apply(slot, gradient)
            })
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

    /// Continues from a [`AdamW::state`]; after an error everything is as it was.
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
        let mut loaded = Vec::with_capacity(self.slots.len());
        for slot in &self.slots {
            let first = get(format!("{}.exp_avg", slot.name))?;
            let second = get(format!("{}.exp_avg_sq", slot.name))?;
            if first.shape() != slot.variable.shape() || second.shape() != slot.variable.shape() {
                return Err(Error::invalid(
                    format!("the optimizer state of {} has another shape", slot.name),
                    "start this run afresh with --new",
                ));
            }
            loaded.push(if slot.variable.device().is_cpu() {
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
            });
        }
        for (slot, moments) in self.slots.iter_mut().zip(loaded) {
            slot.moments = moments;
        }
        self.steps = step.first().copied().unwrap_or(0) as u64;
        Ok(())
    }
}

/// What gradients of the global L2 norm `norm` are multiplied with so that it is at most `limit`, as torch's
/// `clip_grad_norm_` has it.
///
/// # Errors
/// When `norm` is not finite; `step` is told.
pub fn clip_factor(norm: f64, limit: Option<f64>, step: u64) -> Result<f64> {
    if !norm.is_finite() {
        return Err(Error::NotFinite {
            what: "the gradient".into(),
            step: step as usize,
        });
    }
    Ok(limit.map_or(1.0, |limit| (limit / (norm + 1e-6)).min(1.0)))
}

#[derive(Clone, Copy)]
struct Update {
    clip: f64,
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
            let Moments::Device { first, second } = &slot.moments else {
                continue;
            };
            trained.push(card_optimizer::Trained {
                weights: slot.variable.as_tensor(),
                gradient,
                first,
                second,
                decays: self.config.decays(slot),
            });
        }
        let step = card_optimizer::Step {
            clip: self.clip,
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
            Moments::Cpu { first, second } => {
                with_slice(gradient, |gradient| {
                    let step = Step {
                        update: self,
                        gradient,
                        moments: Mutex::new((first, second)),
                    };
                    slot.variable.inplace_op1(&step)
                })??;
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

/// Elements of one piece of work. Sums are taken piece by piece, so this number is part of the result.
const PIECE: usize = 1 << 14;

/// Clipping, moments, decay and the step of one tensor on the CPU, in one pass and in place.
struct Step<'a> {
    update: &'a Update,
    gradient: &'a [f32],
    moments: Mutex<(&'a mut Vec<f32>, &'a mut Vec<f32>)>,
}

impl InplaceOp1 for Step<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (CpuStorage::F32(all), Some((start, end))) = (storage, layout.contiguous_offsets())
        else {
            candle_core::bail!("a trained tensor is not contiguous f32");
        };
        let mut moments = self.moments.lock().unwrap_or_else(PoisonError::into_inner);
        let (first, second) = &mut *moments;
        all[start..end]
            .par_chunks_mut(PIECE)
            .zip(self.gradient.par_chunks(PIECE))
            .zip(first.par_chunks_mut(PIECE))
            .zip(second.par_chunks_mut(PIECE))
            .for_each(|(((weights, gradient), first), second)| {
                adamw(self.update, weights, gradient, first, second);
            });
        Ok(())
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
    let (clip, decay, epsilon) = (
        update.clip as f32,
        update.decay as f32,
        config.epsilon as f32,
    );
    let (step_size, correction) = (update.step_size as f32, update.second_correction as f32);
    let moments = first.iter_mut().zip(second);
    for ((weight, gradient), (first, second)) in weights.iter_mut().zip(gradient).zip(moments) {
        let g = gradient * clip;
        *first = b1 * *first + c1 * g;
        *second = b2 * *second + c2 * g * g;
        *weight = *weight * decay - step_size * *first / (second.sqrt() / correction + epsilon);
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

/// The sum of the squares of all of `tensors`, which are f32.
pub(crate) fn sums_of_squares(tensors: &[Tensor]) -> Result<f64> {
    let (here, there): (Vec<&Tensor>, Vec<&Tensor>) =
        tensors.iter().partition(|tensor| tensor.device().is_cpu());
    // Partial sums of pieces, added in their order: the same on any number of threads.
    let mut sums = here
        .par_iter()
        .map(|tensor| {
            let values = tensor.contiguous()?;
            with_slice(&values, |values| {
                let pieces: Vec<f64> = values.par_chunks(PIECE).map(squares).collect();
                pieces.iter().sum()
            })
        })
        .collect::<Result<Vec<f64>>>()?;
    if card_takes(there.iter().copied()) {
        sums.push(card_optimizer::squares(&there)?);
    } else if !there.is_empty() {
        // A card is waited for once, not for each tensor.
        let scalars = there.iter().map(|tensor| tensor.sqr()?.sum_all());
        let scalars = scalars.collect::<candle_core::Result<Vec<_>>>()?;
        let scalars = Tensor::stack(&scalars, 0)?.to_vec1::<f32>()?;
        sums.extend(scalars.into_iter().map(f64::from));
    }
    Ok(sums.iter().sum())
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn squares(values: &[f32]) -> f64 {
    let mut lanes = [0f64; 8];
    for values in values.chunks(lanes.len()) {
        for (lane, v) in lanes.iter_mut().zip(values) {
            *lane += f64::from(*v) * f64::from(*v);
        }
    }
    lanes.iter().sum()
}

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
