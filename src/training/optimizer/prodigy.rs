//! Prodigy (Mishchenko and Defazio 2023, arXiv 2306.06101, algorithm 4): Adam with a rate `d` that it estimates itself,
//! from how far the weights have come along their gradients. The reference is `prodigyopt` 1.1.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor, Var};
use multiversion::multiversion;
use rayon::prelude::*;

use super::{AdamWConfig, Optimizer, PIECE, Remembered, entry, in_place, read_scalars, with_slice};
use crate::{Error, Result, config};

/// The constants of [`Prodigy`]; the learning rate, which is to be 1, is given to each step.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ProdigyConfig {
    /// Moments and decay.
    pub adamw: AdamWConfig,
    /// What AdamW does not have.
    pub own: config::Prodigy,
}

/// One trained tensor with its two moments, the decaying sum of its gradients, and where it started.
struct Slot {
    name: String,
    variable: Var,
    kept: Remembered<4>,
}

/// The reference's names of these.
const KEPT: [&str; 4] = ["exp_avg", "exp_avg_sq", "s", "p0"];
/// Its names of what all tensors share.
const SHARED: [&str; 4] = ["d", "d_max", "d_numerator", "k"];

/// Prodigy over named f32 variables.
pub struct Prodigy {
    config: ProdigyConfig,
    slots: Vec<Slot>,
    /// The estimate of the rate.
    d: f64,
    d_max: f64,
    numerator: f64,
    steps: u64,
}

impl Prodigy {
    /// An optimizer at rest; where the variables are now is where they start.
    ///
    /// # Errors
    /// When a card has no room for what it remembers.
    pub fn new(variables: Vec<(String, Var)>, config: ProdigyConfig) -> Result<Self> {
        let slots = variables
            .into_iter()
            .map(|(name, variable)| {
                let mut kept = Remembered::zeros(&variable)?;
                let start = variable.as_tensor().detach();
                match &mut kept {
                    Remembered::Cpu([_, _, _, p0]) => *p0 = start.flatten_all()?.to_vec1()?,
                    Remembered::Device([_, _, _, p0]) => *p0 = start.copy()?,
                }
                Ok(Slot {
                    name,
                    variable,
                    kept,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            d: config.own.d0,
            d_max: config.own.d0,
            config,
            slots,
            numerator: 0.0,
            steps: 0,
        })
    }

    /// The next estimate, from the two sums over all tensors.
    fn estimate(&mut self, numerator: f64, denominator: f64) {
        let own = &self.config.own;
        let estimate = own.d_coef * numerator / denominator;
        let d = match self.d == own.d0 {
            true => self.d.max(estimate),
            false => self.d,
        };
        self.d_max = self.d_max.max(estimate);
        self.d = own
            .growth_rate
            .map_or(self.d_max, |rate| self.d_max.min(d * rate));
        self.numerator = numerator;
    }
}

impl Optimizer for Prodigy {
    fn step(&mut self, gradients: &[Tensor], scale: f64, learning_rate: f64) -> Result<()> {
        // As in the reference a step without a rate, which a warm-up begins with, leaves no trace.
        if learning_rate == 0.0 {
            return Ok(());
        }
        let ProdigyConfig { adamw, own } = self.config;
        let next = self.steps as i32 + 1;
        let correction = match own.use_bias_correction {
            true => (1.0 - adamw.beta2.powi(next)).sqrt() / (1.0 - adamw.beta1.powi(next)),
            false => 1.0,
        };
        let (d, rate) = (self.d, self.d * learning_rate * correction);
        let beta3 = own.beta3.unwrap_or_else(|| adamw.beta2.sqrt());
        let weight = if own.safeguard_warmup { d } else { rate };
        let gather = Gather {
            scale,
            coupled_decay: 0.0,
            moments: [adamw.beta1, d * (1.0 - adamw.beta1)],
            squares: [adamw.beta2, d * d * (1.0 - adamw.beta2)],
            sum: [beta3, d / own.d0 * weight],
        };
        let decays = |slot: &Slot, how: bool| match how && adamw.decays(&slot.variable) {
            true => adamw.weight_decay,
            false => 0.0,
        };
        let parts = self
            .slots
            .par_iter_mut()
            .zip(gradients)
            .map(|(slot, gradient)| {
                let coupled_decay = decays(slot, !own.decouple);
                let gather = Gather {
                    coupled_decay,
                    ..gather
                };
                gather.apply(slot, gradient)
            })
            .collect::<Result<Vec<Sums>>>()?;
        let (along, denominator) = total(parts)?;
        // No tensor has ever had a gradient.
        if denominator == 0.0 {
            return Ok(());
        }
        self.estimate(
            beta3 * self.numerator + d / own.d0 * rate * along,
            denominator,
        );
        let epsilon = self.d * adamw.epsilon;
        self.slots.par_iter_mut().try_for_each(|slot| {
            let decay = 1.0 - decays(slot, own.decouple) * rate;
            advance(slot, decay, rate, epsilon)
        })?;
        self.steps += 1;
        Ok(())
    }

    fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::new();
        for slot in &self.slots {
            let of = (slot.name.as_str(), slot.variable.shape());
            slot.kept.save(of, KEPT, &mut state)?;
        }
        let shared = [self.d, self.d_max, self.numerator, self.steps as f64];
        for (name, value) in SHARED.into_iter().zip(shared) {
            let value = Tensor::from_vec(vec![value], 1, &Device::Cpu)?;
            state.insert(name.into(), value);
        }
        Ok(state)
    }

    fn load_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let slots = self.slots.iter();
        let loaded: Vec<Remembered<4>> = slots
            .map(|slot| Remembered::load((slot.name.as_str(), &slot.variable), KEPT, state))
            .collect::<Result<_>>()?;
        let mut shared = [0.0; 4];
        for (name, value) in SHARED.into_iter().zip(&mut shared) {
            let stored = entry(state, name)?.to_vec1::<f64>()?;
            *value = stored.first().copied().unwrap_or_default();
        }
        for (slot, kept) in self.slots.iter_mut().zip(loaded) {
            slot.kept = kept;
        }
        let [d, d_max, numerator, steps] = shared;
        (self.d, self.d_max, self.numerator) = (d, d_max, numerator);
        self.steps = steps as u64;
        Ok(())
    }
}

/// Σ gradient · (start − weight) and Σ |s| of one tensor: known on the CPU, still to be read from a card.
enum Sums {
    Here(f64, f64),
    There(Tensor, Tensor),
}

/// Both sums over all tensors, added in their order.
fn total(parts: Vec<Sums>) -> Result<(f64, f64)> {
    let (mut along, mut denominator) = (0.0, 0.0);
    let mut there = Vec::new();
    for part in parts {
        match part {
            Sums::Here(a, b) => {
                along += a;
                denominator += b;
            }
            Sums::There(a, b) => there.extend([a, b]),
        }
    }
    if !there.is_empty() {
        for pair in read_scalars(there)?.chunks(2) {
            along += pair[0];
            denominator += pair[1];
        }
    }
    Ok((along, denominator))
}

/// What a step does before the rate is known: pairs of what is kept of a sum, and what a gradient is added with.
#[derive(Clone, Copy)]
struct Gather {
    scale: f64,
    coupled_decay: f64,
    moments: [f64; 2],
    squares: [f64; 2],
    sum: [f64; 2],
}

impl Gather {
    fn apply(&self, slot: &mut Slot, gradient: &Tensor) -> Result<Sums> {
        if gradient.shape() != slot.variable.shape() {
            return Err(Error::Invalid {
                what: format!("the gradient of {} has another shape", slot.name),
                hint: None,
            });
        }
        let weights = slot.variable.as_tensor();
        match &mut slot.kept {
            Remembered::Cpu([first, second, sum, start]) => with_slice(gradient, |gradient| {
                with_slice(weights, |weights| {
                    let pieces: Vec<(f64, f64)> = weights
                        .par_chunks(PIECE)
                        .zip(gradient.par_chunks(PIECE))
                        .zip(first.par_chunks_mut(PIECE))
                        .zip(second.par_chunks_mut(PIECE))
                        .zip(sum.par_chunks_mut(PIECE))
                        .zip(start.par_chunks(PIECE))
                        .map(|(((((weights, gradient), first), second), sum), start)| {
                            gather(self, (weights, start, gradient), first, second, sum)
                        })
                        .collect();
                    // In their order: the same on any number of threads.
                    let add = |a: (f64, f64), b: &(f64, f64)| (a.0 + b.0, a.1 + b.1);
                    let (along, size) = pieces.iter().fold((0.0, 0.0), add);
                    Sums::Here(along, size)
                })
            })?,
            Remembered::Device([first, second, sum, start]) => {
                let weights = weights.detach();
                let g = ((gradient * self.scale)? + (&weights * self.coupled_decay)?)?;
                let decayed = |kept: &Tensor, [keep, add]: [f64; 2], new: &Tensor| {
                    (kept * keep)? + (new * add)?
                };
                *first = decayed(first, self.moments, &g)?;
                *second = decayed(second, self.squares, &g.sqr()?)?;
                *sum = decayed(sum, self.sum, &g)?;
                let along = (g * (&*start - weights)?)?.sum_all()?;
                Ok(Sums::There(along, sum.abs()?.sum_all()?))
            }
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn gather(
    step: &Gather,
    (weights, start, gradient): (&[f32], &[f32], &[f32]),
    first: &mut [f32],
    second: &mut [f32],
    sum: &mut [f32],
) -> (f64, f64) {
    let (scale, decay) = (step.scale as f32, step.coupled_decay as f32);
    let [b1, c1] = step.moments.map(|value| value as f32);
    let [b2, c2] = step.squares.map(|value| value as f32);
    let [b3, c3] = step.sum.map(|value| value as f32);
    let (mut along, mut size) = (0.0, 0.0);
    let kept = first.iter_mut().zip(second).zip(sum);
    let given = weights.iter().zip(start).zip(gradient);
    for (((weight, start), gradient), ((first, second), sum)) in given.zip(kept) {
        let g = gradient * scale + weight * decay;
        along += f64::from(g) * f64::from(start - weight);
        *first = b1 * *first + c1 * g;
        *second = b2 * *second + c2 * g * g;
        *sum = b3 * *sum + c3 * g;
        size += f64::from(sum.abs());
    }
    (along, size)
}

/// Moves the weights, which are multiplied with `decay` before.
fn advance(slot: &mut Slot, decay: f64, rate: f64, epsilon: f64) -> Result<()> {
    match &slot.kept {
        Remembered::Cpu([first, second, ..]) => in_place(&slot.variable, |weights| {
            weights
                .par_chunks_mut(PIECE)
                .zip(first.par_chunks(PIECE))
                .zip(second.par_chunks(PIECE))
                .for_each(|((weights, first), second)| {
                    let (decay, rate, epsilon) = (decay as f32, rate as f32, epsilon as f32);
                    for ((weight, first), second) in weights.iter_mut().zip(first).zip(second) {
                        *weight = *weight * decay - rate * first / (second.sqrt() + epsilon);
                    }
                });
        }),
        Remembered::Device([first, second, ..]) => {
            let weights = (slot.variable.as_tensor().detach() * decay)?;
            let step = ((first / (second.sqrt()? + epsilon)?)? * rate)?;
            Ok(slot.variable.set(&(weights - step)?)?)
        }
    }
}
