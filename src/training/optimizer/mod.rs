//! Optimizers: AdamW, Prodigy and Muon, each a file; clipping by the global norm; learning-rate schedules.

mod adamw;
mod muon;
mod prodigy;
mod schedule;

pub use adamw::{AdamW, AdamWConfig};
pub use muon::Muon;
pub use prodigy::{Prodigy, ProdigyConfig};
pub use schedule::learning_rate_factor;

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Shape, Storage, Tensor, Var};
use multiversion::multiversion;
use rayon::prelude::*;

use crate::config;
use crate::nn::{card_optimizer, card_takes};
use crate::{Error, Result};

/// Moves named f32 variables along their gradients.
pub trait Optimizer: Send {
    /// One step at `learning_rate` along `gradients` times `scale`: one for each variable, in their order and of their
    /// shapes, contiguous f32 on their device.
    ///
    /// # Errors
    /// When a gradient is not where its variable is, or has another shape.
    fn step(&mut self, gradients: &[Tensor], scale: f64, learning_rate: f64) -> Result<()>;

    /// All that it remembers, on the CPU, under torch's names: `VARIABLE.exp_avg` and such.
    ///
    /// # Errors
    /// When a card cannot be read.
    fn state(&self) -> Result<BTreeMap<String, Tensor>>;

    /// Continues from what [`Optimizer::state`] gave; after an error everything is as it was.
    ///
    /// # Errors
    /// When something is missing from `state`, or has another shape.
    fn load_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()>;
}

/// Which optimizer, with its constants. The learning rate is given to each step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum OptimizerConfig {
    AdamW(AdamWConfig),
    Prodigy(ProdigyConfig),
    /// Muon with AdamW's decay, and AdamW for what Muon is not for.
    Muon(AdamWConfig),
}

impl OptimizerConfig {
    /// What a training table of a pipeline asks for.
    pub fn new(settings: &config::Training) -> Self {
        let adamw = AdamWConfig {
            beta1: settings.adam_beta1,
            beta2: settings.adam_beta2,
            epsilon: settings.adam_epsilon,
            weight_decay: settings.weight_decay,
            decay_vectors: settings.decay_vectors,
        };
        Self::of_kind(settings.optimizer, adamw, settings.prodigy)
    }

    /// The optimizer of this kind with AdamW's numbers and, where it is Prodigy, its own.
    pub fn of_kind(
        kind: config::Optimizer,
        adamw: AdamWConfig,
        prodigy: Option<config::Prodigy>,
    ) -> Self {
        match kind {
            config::Optimizer::Adamw => Self::AdamW(adamw),
            config::Optimizer::Muon => Self::Muon(adamw),
            config::Optimizer::Prodigy => Self::Prodigy(ProdigyConfig {
                adamw,
                own: prodigy.unwrap_or_default(),
            }),
        }
    }

    /// The optimizer at rest.
    ///
    /// # Errors
    /// When a card has no room for what it remembers.
    pub fn build(&self, variables: Vec<(String, Var)>) -> Result<Box<dyn Optimizer>> {
        Ok(match *self {
            Self::AdamW(config) => Box::new(AdamW::new(variables, config)?),
            Self::Prodigy(config) => Box::new(Prodigy::new(variables, config)?),
            Self::Muon(config) => Box::new(Muon::new(variables, config)?),
        })
    }
}

/// `N` tensors in the shape of a trained one, f32 whatever the model's dtype: on the CPU numbers that change in place.
enum Remembered<const N: usize> {
    Cpu([Vec<f32>; N]),
    Device([Tensor; N]),
}

impl<const N: usize> Remembered<N> {
    fn zeros(variable: &Var) -> Result<Self> {
        if variable.device().is_cpu() {
            let count = variable.elem_count();
            return Ok(Self::Cpu(std::array::from_fn(|_| vec![0.0; count])));
        }
        // Each of its own, as kernels change them in place.
        let zeros: Vec<Tensor> = (0..N)
            .map(|_| variable.zeros_like())
            .collect::<candle_core::Result<_>>()?;
        Ok(Self::Device(std::array::from_fn(|i| zeros[i].clone())))
    }

    /// Adds each to `state`, as `variable.NAME`.
    fn save(
        &self,
        (variable, shape): (&str, &Shape),
        names: [&str; N],
        state: &mut BTreeMap<String, Tensor>,
    ) -> Result<()> {
        for (i, name) in names.into_iter().enumerate() {
            let tensor = match self {
                Self::Cpu(values) => Tensor::from_slice(&values[i], shape, &Device::Cpu)?,
                Self::Device(tensors) => tensors[i].to_device(&Device::Cpu)?,
            };
            state.insert(format!("{variable}.{name}"), tensor);
        }
        Ok(())
    }

    /// What [`Remembered::save`] put into `state`.
    fn load(
        (name, variable): (&str, &Var),
        names: [&str; N],
        state: &BTreeMap<String, Tensor>,
    ) -> Result<Self> {
        let mut loaded = Self::zeros(variable)?;
        for (i, part) in names.into_iter().enumerate() {
            let tensor = remembered(state, name, part, variable.shape())?;
            match &mut loaded {
                Self::Cpu(values) => values[i] = tensor.flatten_all()?.to_vec1()?,
                Self::Device(tensors) => tensors[i] = tensor.to_device(variable.device())?,
            }
        }
        Ok(loaded)
    }
}

/// `variable.name` of `state`, which must have this shape.
fn remembered<'a>(
    state: &'a BTreeMap<String, Tensor>,
    variable: &str,
    name: &str,
    shape: &Shape,
) -> Result<&'a Tensor> {
    let tensor = entry(state, &format!("{variable}.{name}"))?;
    if tensor.shape() != shape {
        return Err(Error::invalid(
            format!("the optimizer state of {variable} has another shape"),
            "start this run afresh with --new",
        ));
    }
    Ok(tensor)
}

fn entry<'a>(state: &'a BTreeMap<String, Tensor>, name: &str) -> Result<&'a Tensor> {
    state.get(name).ok_or_else(|| {
        Error::invalid(
            format!("the optimizer state lacks {name}"),
            "start this run afresh with --new",
        )
    })
}

/// What gradients of the global L2 norm `norm` are multiplied with so that it is at most `limit`, as torch's
/// `clip_grad_norm_` has it.
///
/// # Errors
/// When `norm` is not finite; `step` is told.
pub fn clip_factor(norm: f64, limit: Option<f64>, step: usize) -> Result<f64> {
    if !norm.is_finite() {
        return Err(Error::NotFinite {
            what: "the gradient".into(),
            step,
        });
    }
    Ok(limit.map_or(1.0, |limit| (limit / (norm + 1e-6)).min(1.0)))
}

/// Elements of one piece of work. Sums are taken piece by piece, so this number is part of the result.
const PIECE: usize = 1 << 14;

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

/// Calls `body` with the values of a variable on the CPU, to change them in place.
fn in_place(variable: &Var, body: impl FnMut(&mut [f32])) -> Result<()> {
    struct Change<F>(Mutex<F>);
    impl<F: FnMut(&mut [f32])> InplaceOp1 for Change<F> {
        fn name(&self) -> &'static str {
            "optimizer step"
        }

        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
            let (CpuStorage::F32(all), Some((start, end))) = (storage, layout.contiguous_offsets())
            else {
                candle_core::bail!("a trained tensor is not contiguous f32");
            };
            let mut body = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            body(&mut all[start..end]);
            Ok(())
        }
    }
    Ok(variable.inplace_op1(&Change(Mutex::new(body)))?)
}

/// The sum of the squares of all of `tensors`, which are f32.
///
/// # Errors
/// When a card cannot be read.
pub fn sums_of_squares(tensors: &[Tensor]) -> Result<f64> {
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
        let scalars = there.iter().map(|tensor| tensor.sqr()?.sum_all());
        sums.extend(read_scalars(
            scalars.collect::<candle_core::Result<Vec<_>>>()?,
        )?);
    }
    Ok(sums.iter().sum())
}

/// The values of scalars on one device, which is waited for once and not for each.
fn read_scalars(scalars: Vec<Tensor>) -> Result<Vec<f64>> {
    let values = Tensor::stack(&scalars, 0)?.to_dtype(DType::F32)?;
    let values = values.to_vec1::<f32>()?;
    Ok(values.into_iter().map(f64::from).collect())
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
