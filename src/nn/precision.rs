//! Frozen weights in half precision. On the CPU a matrix stays in bf16 or f16, mapped from its file where that has
//! the type already, and is widened piece by piece while it is multiplied: all arithmetic is in f32, so the result is
//! that of the rounded weights in f32. Elsewhere half precision is what candle computes in.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use candle_core::safetensors::MmapedSafetensors;
use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use memmap2::Mmap;

use super::cpu::{half::widen, takes};
use super::quantised::QuantisedMatrix;
use crate::config::Dtype;
use crate::{Error, Result};

/// How frozen weights are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// In this type, whatever the checkpoint has.
    In(DType),
    /// Matrices of 2²⁰ elements and more in half precision where the checkpoint has them so, everything else in f32:
    /// nothing is rounded, and a small matrix is not widened again and again.
    AsStored,
}

impl From<DType> for Precision {
    fn from(dtype: DType) -> Self {
        Precision::In(dtype)
    }
}

impl From<Dtype> for Precision {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::Auto => Precision::AsStored,
            Dtype::F32 => Precision::In(DType::F32),
            Dtype::Bf16 => Precision::In(DType::BF16),
            Dtype::F16 => Precision::In(DType::F16),
        }
    }
}

impl Precision {
    /// The type of activations on `device`, for a checkpoint whose matrices are of type `stored`.
    pub(super) fn computes_in(self, stored: Option<DType>, device: &Device) -> DType {
        let half = |dtype: DType| HalfKind::of(dtype).is_some();
        match self {
            Precision::In(dtype) if device.is_cpu() && half(dtype) => DType::F32,
            Precision::In(dtype) => dtype,
            // f16 checkpoints overflow when computed in f16; bf16 has the range of f32.
            Precision::AsStored if !device.is_cpu() && stored.is_some_and(half) => DType::BF16,
            Precision::AsStored => DType::F32,
        }
    }

    /// In which half precision a matrix of so many elements that the checkpoint has as `stored` is kept on `device`, if
    /// in one.
    pub(super) fn half(self, stored: DType, elements: usize, device: &Device) -> Option<HalfKind> {
        const LARGE: usize = 1 << 20;
        if !device.is_cpu() {
            return None;
        }
        match self {
            Precision::In(dtype) => HalfKind::of(dtype),
            Precision::AsStored => HalfKind::of(stored).filter(|_| elements >= LARGE),
        }
    }
}

/// The two types of half precision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HalfKind {
    /// 8 bits of exponent, 7 of mantissa.
    Bf16,
    /// 5 bits of exponent, 10 of mantissa.
    F16,
}

impl HalfKind {
    /// The kind of `dtype`, if it is one.
    pub fn of(dtype: DType) -> Option<Self> {
        match dtype {
            DType::BF16 => Some(HalfKind::Bf16),
            DType::F16 => Some(HalfKind::F16),
            _ => None,
        }
    }

    /// The type itself.
    pub fn dtype(self) -> DType {
        match self {
            HalfKind::Bf16 => DType::BF16,
            HalfKind::F16 => DType::F16,
        }
    }
}

enum Bits {
    Owned(Vec<u16>),
    /// Those of a tensor of mapped files from this number on.
    Mapped(MappedBytes, usize),
}

/// The bytes of a tensor in a mapped file.
pub(super) enum MappedBytes {
    /// Of the tensor of this name.
    Safetensors(Arc<MmapedSafetensors>, String),
    /// These.
    File(Arc<Mmap>, Range<usize>),
}

impl MappedBytes {
    fn get(&self) -> candle_core::Result<&[u8]> {
        match self {
            MappedBytes::Safetensors(files, name) => Ok(files.get(name)?.data()),
            MappedBytes::File(file, range) => Ok(&file[range.clone()]),
        }
    }
}

/// A frozen matrix in half precision on the CPU.
#[derive(Clone)]
pub struct HalfMatrix {
    bits: Arc<Bits>,
    kind: HalfKind,
    rows: usize,
    columns: usize,
}

impl HalfMatrix {
    /// The values of a matrix on the CPU, rounded to `kind`.
    pub fn new(matrix: &Tensor, kind: HalfKind) -> Result<Self> {
        let (rows, columns) = matrix.dims2()?;
        let rounded = matrix.to_dtype(kind.dtype())?.contiguous()?;
        let (storage, layout) = rounded.storage_and_layout();
        let start = layout.start_offset();
        let range = start..start + rows * columns;
        let bits = match &*storage {
            Storage::Cpu(CpuStorage::BF16(all)) => all[range].iter().map(|v| v.to_bits()).collect(),
            Storage::Cpu(CpuStorage::F16(all)) => all[range].iter().map(|v| v.to_bits()).collect(),
            _ => {
                return Err(Error::Invalid {
                    what:
                        "a matrix on another device than the CPU was to be kept in half precision"
                            .into(),
                    hint: None,
                });
            }
        };
        Ok(Self {
            bits: Arc::new(Bits::Owned(bits)),
            kind,
            rows,
            columns,
        })
    }

    /// The matrix (rows, columns) of type `kind` that lies in `bytes` from value `first` on, without copying it; `None`
    /// where it does not lie at an even address.
    pub(super) fn mapped(
        bytes: MappedBytes,
        first: usize,
        kind: HalfKind,
        (rows, columns): (usize, usize),
    ) -> Result<Option<Self>> {
        let there = bytes.get()?;
        let is_even = (there.as_ptr() as usize).is_multiple_of(align_of::<u16>());
        if !is_even || there.len() < 2 * (first + rows * columns) {
            return Ok(None);
        }
        Ok(Some(Self {
            bits: Arc::new(Bits::Mapped(bytes, first)),
            kind,
            rows,
            columns,
        }))
    }

    /// bf16 or f16.
    pub fn kind(&self) -> HalfKind {
        self.kind
    }

    /// (rows, columns).
    pub fn dims2(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    /// Whether the values lie in a mapped file.
    pub fn is_mapped(&self) -> bool {
        matches!(*self.bits, Bits::Mapped(..))
    }

    /// The bits of all values, row by row.
    pub(super) fn bits(&self) -> candle_core::Result<&[u16]> {
        match &*self.bits {
            Bits::Owned(bits) => Ok(bits),
            Bits::Mapped(bytes, first) => {
                // SAFETY: every bit pattern is a u16.
                let (before, bits, _) = unsafe { bytes.get()?.align_to::<u16>() };
                let range = *first..first + self.rows * self.columns;
                match bits.get(range) {
                    Some(bits) if before.is_empty() => Ok(bits),
                    _ => candle_core::bail!("a matrix does not lie in its file as it did before"),
                }
            }
        }
    }

    /// The matrix in f32, (rows, columns).
    pub fn to_tensor(&self) -> Result<Tensor> {
        let bits = self.bits()?;
        let mut values = vec![0.0; bits.len()];
        widen(bits, self.kind, &mut values);
        Ok(Tensor::from_vec(
            values,
            (self.rows, self.columns),
            &Device::Cpu,
        )?)
    }
}

impl std::fmt::Debug for HalfMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} {} x {}", self.kind, self.rows, self.columns)
    }
}

/// The weight of a linear layer, or a table of vectors.
#[derive(Debug, Clone)]
pub enum Weight {
    /// Frozen or trained, of any type and on any device.
    Tensor(Tensor),
    /// Frozen, in f32 on the CPU, kept in both ways in which products read it in place.
    Twice {
        /// (outputs, inputs)
        weight: Tensor,
        /// (inputs, outputs)
        turned: Tensor,
    },
    /// Frozen, on the CPU.
    Half(HalfMatrix),
    /// Frozen, in blocks of few bits.
    Quantised(QuantisedMatrix),
}

impl From<Tensor> for Weight {
    fn from(tensor: Tensor) -> Self {
        Weight::Tensor(tensor)
    }
}

impl Weight {
    /// (rows, columns).
    pub fn dims2(&self) -> candle_core::Result<(usize, usize)> {
        match self {
            Weight::Tensor(weight) | Weight::Twice { weight, .. } => weight.dims2(),
            Weight::Half(half) => Ok(half.dims2()),
            Weight::Quantised(packed) => Ok(packed.dims2()),
        }
    }

    /// As a tensor: itself, or widened or unpacked to f32.
    pub fn to_tensor(&self) -> Result<Cow<'_, Tensor>> {
        match self {
            Weight::Tensor(weight) | Weight::Twice { weight, .. } => Ok(Cow::Borrowed(weight)),
            Weight::Half(half) => Ok(Cow::Owned(half.to_tensor()?)),
            Weight::Quantised(packed) => Ok(Cow::Owned(packed.to_tensor()?)),
        }
    }

    /// The tensor that it is, unless it is kept in fewer bits.
    pub fn tensor(&self) -> Option<&Tensor> {
        match self {
            Weight::Tensor(weight) | Weight::Twice { weight, .. } => Some(weight),
            Weight::Half(_) | Weight::Quantised(_) => None,
        }
    }

    /// Frozen and used again and again by a linear layer: [`Weight::Twice`] where it can be.
    pub(super) fn turned(self) -> Result<Self> {
        match self {
            Weight::Tensor(weight) if !weight.track_op() && takes([&weight]) => {
                let turned = weight.t()?.contiguous()?;
                Ok(Weight::Twice {
                    weight: weight.contiguous()?,
                    turned,
                })
            }
            other => Ok(other),
        }
    }
}
