//! Where weights come from, and how they are kept there.

use std::collections::HashMap;
use std::sync::Mutex;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};

use super::precision::{HalfKind, HalfMatrix};
use super::tensor_files::TensorFiles;
use super::weights::lock;
use crate::Result;

pub(super) enum Source {
    Files(TensorFiles),
    Memory(Mutex<HashMap<String, Held>>),
    Nothing,
    /// Nothing, and what is drawn is packed so.
    Blocks(GgmlDType),
}

/// A tensor in memory, as it is kept.
pub(super) enum Held {
    Tensor(Tensor),
    /// Rounded when it was asked for as a matrix.
    Half(HalfMatrix),
}

impl Held {
    pub(super) fn dims(&self) -> Vec<usize> {
        match self {
            Held::Tensor(tensor) => tensor.dims().to_vec(),
            Held::Half(half) => {
                let (rows, columns) = half.dims2();
                vec![rows, columns]
            }
        }
    }
}

/// A matrix of `files` in half precision: in place where it has that type already, else a rounded copy.
pub(super) fn read_half(files: &TensorFiles, name: &str, kind: HalfKind) -> Result<HalfMatrix> {
    match files.half(name, kind)? {
        Some(mapped) => Ok(mapped),
        None => HalfMatrix::new(&files.load(name, &Device::Cpu)?, kind),
    }
}

/// The matrix `name` of tensors in memory, if it is to be kept in half precision: rounded at the first call.
pub(super) fn half_in(
    tensors: &mut HashMap<String, Held>,
    name: &str,
    kept: impl Fn(DType) -> Option<HalfKind>,
) -> Result<Option<HalfMatrix>> {
    let rounded = match tensors.get(name) {
        Some(Held::Half(half)) => return Ok(Some(half.clone())),
        Some(Held::Tensor(tensor)) => match kept(tensor.dtype()) {
            Some(kind) => HalfMatrix::new(tensor, kind)?,
            None => return Ok(None),
        },
        None => return Ok(None),
    };
    tensors.insert(name.to_string(), Held::Half(rounded.clone()));
    Ok(Some(rounded))
}

/// All numbers that a checkpoint has.
pub(super) fn elements_in(source: &Source) -> usize {
    let product = |dims: &[usize]| {
        dims.iter()
            .fold(1usize, |all, dim| all.saturating_mul(*dim))
    };
    let add = |all: usize, more: usize| all.saturating_add(more);
    match source {
        Source::Files(files) => files.shapes().map(|dims| product(&dims)).fold(0, add),
        Source::Memory(tensors) => {
            let tensors = lock(tensors);
            tensors
                .values()
                .map(|held| product(&held.dims()))
                .fold(0, add)
        }
        Source::Nothing | Source::Blocks(_) => 0,
    }
}

/// The type of the first matrix by name: what the checkpoint is stored in.
pub(super) fn stored_dtype(source: &Source) -> Option<DType> {
    match source {
        Source::Files(files) => files.dtype(),
        Source::Memory(tensors) => {
            let tensors = lock(tensors);
            let matrices = tensors.iter().filter_map(|(name, held)| match held {
                Held::Tensor(tensor) if tensor.rank() == 2 => Some((name, tensor.dtype())),
                Held::Tensor(_) | Held::Half(_) => None,
            });
            matrices
                .min_by_key(|(name, _)| *name)
                .map(|(_, dtype)| dtype)
        }
        Source::Nothing | Source::Blocks(_) => None,
    }
}
