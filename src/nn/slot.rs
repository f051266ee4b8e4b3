//! Where the gradients of a result gather: without a copy while there is one, then in a sum of our own.

use std::sync::{Mutex, PoisonError};

use candle_core::{Device, Result, Shape, Tensor};

use super::cpu::{self, add_into};
use super::cuda;

/// Which part of a tensor a view of it shows.
#[derive(Debug, Clone, Copy)]
pub(super) enum Place {
    /// All of it, perhaps in another shape.
    Whole,
    /// Columns `start..start + heads · d` of `width`, as (b, heads, n, d).
    Heads { start: usize, width: usize },
    /// `start..` of `of` along dimension 1.
    Rows { start: usize, of: usize },
}

/// Where the gradient of a result gathers until candle's backward pass comes to its signal.
pub(super) struct Slot {
    sum: Mutex<Option<Sum>>,
    shape: Shape,
}

enum Sum {
    /// The only gradient so far, which others may hold as well.
    One(Tensor),
    /// A sum of our own, in f32 on the CPU.
    Own(Vec<f32>),
    /// A sum of our own on a card.
    Card(cuda::Buffer),
}

impl Slot {
    pub(super) fn new(shape: &Shape) -> Self {
        Self {
            sum: Mutex::new(None),
            shape: shape.clone(),
        }
    }

    /// Adds the gradient of the whole result or of a part.
    pub(super) fn add(&self, gradient: &Tensor, place: Place) -> Result<()> {
        let mut sum = self.sum.lock().unwrap_or_else(PoisonError::into_inner);
        let gradient = gradient.detach();
        if cuda::takes([&gradient]) {
            *sum = Some(self.with_part(sum.take(), gradient, place)?);
            return Ok(());
        }
        *sum = Some(match (sum.take(), place) {
            (None, Place::Whole) => Sum::One(gradient.reshape(&self.shape)?),
            (Some(Sum::One(one)), Place::Whole) if !cpu::takes([&one]) => {
                Sum::One((one + gradient.reshape(&self.shape)?)?)
            }
            (Some(Sum::One(one)), Place::Whole) => {
                let (one, gradient) = (one.contiguous()?, gradient.contiguous()?);
                let (one, gradient) = (cpu::values(&one)?, cpu::values(&gradient)?);
                Sum::Own(cpu::sum(&one, &gradient))
            }
            (some, place) => {
                let mut own = match some {
                    None => vec![0.0; self.shape.elem_count()],
                    Some(Sum::One(one)) => cpu::values(&one.contiguous()?)?.to_vec(),
                    Some(Sum::Own(own)) => own,
                    Some(Sum::Card(_)) => {
                        candle_core::bail!("gradients of one tensor on two devices")
                    }
                };
                Self::add_part(&mut own, &gradient.contiguous()?, place)?;
                Sum::Own(own)
            }
        });
        Ok(())
    }

    /// `sum` and one more gradient, of the whole or of a part, on a card.
    fn with_part(&self, sum: Option<Sum>, gradient: Tensor, place: Place) -> Result<Sum> {
        let own = match (sum, place) {
            (None, Place::Whole) => return Ok(Sum::One(gradient.reshape(&self.shape)?)),
            (Some(Sum::One(one)), Place::Whole) => {
                return Ok(Sum::Card(cuda::layout::sum(&one, &gradient)?));
            }
            (None, place) => {
                let first = cuda::layout::first_part(&gradient, place, &self.shape)?;
                return Ok(Sum::Card(first));
            }
            (Some(Sum::One(one)), _) => cuda::layout::own(&one)?,
            (Some(Sum::Card(own)), _) => own,
            (Some(Sum::Own(_)), _) => candle_core::bail!("gradients of one tensor on two devices"),
        };
        cuda::layout::add_part(&own, &gradient, place)?;
        Ok(Sum::Card(own))
    }

    fn add_part(own: &mut [f32], gradient: &Tensor, place: Place) -> Result<()> {
        let values = cpu::values(gradient)?;
        match place {
            Place::Whole => add_into(own, &values),
            Place::Heads { start, width } => {
                let (_, heads, n, d) = gradient.dims4()?;
                cpu::add_heads(own, &values, (n, width), start, (heads, d));
            }
            Place::Rows { start, of } => {
                let count = gradient.dim(1)?;
                let inner = gradient.dims()[2..].iter().product::<usize>();
                let taken = values.chunks_exact((count * inner).max(1));
                for (own, values) in own.chunks_exact_mut((of * inner).max(1)).zip(taken) {
                    add_into(&mut own[start * inner..][..count * inner], values);
                }
            }
        }
        Ok(())
    }

    /// What has gathered, contiguous.
    pub(super) fn take(&self) -> Result<Tensor> {
        let mut sum = self.sum.lock().unwrap_or_else(PoisonError::into_inner);
        match sum.take() {
            Some(Sum::One(one)) if cuda::takes([&one]) => cuda::kept(&one),
            Some(Sum::One(one)) => one.contiguous(),
            Some(Sum::Card(own)) => Ok(own.tensor(&self.shape)),
            Some(Sum::Own(own)) => Tensor::from_vec(own, self.shape.clone(), &Device::Cpu),
            None => candle_core::bail!("the gradient of a fused operation was taken twice"),
        }
    }
}
