//! The fused operations on a card, in f32, bf16 and f16: each computes its result and its gradients with kernels of
//! our own (`kernels.cu`, compiled when the first of them is asked for) and cuBLAS's matrix products. Small models wait
//! for launches more than for arithmetic, so an operation has as few as it can, and copies nothing between them.
//!
//! Arithmetic is in f32 throughout; what is stored between operations has the type of their tensors. Sums run in a fixed
//! order.

// Without support for cards nobody reads what kernels are given.
#![cfg_attr(not(feature = "cuda"), allow(dead_code))]

pub mod activation;
pub mod attention;
#[cfg(feature = "cuda")]
mod card;
#[cfg(not(feature = "cuda"))]
#[path = "no_card.rs"]
mod card;
pub mod embedding;
pub mod layout;
pub mod linear;
pub mod norm;
pub mod optimizer;
pub mod rope;
pub mod rows;
pub mod softmax;

use candle_core::{DType, Error, Result, Tensor};

pub use card::{Buffer, Card, tensor_of};

use super::context::only_candles;

/// Elements from which on a tensor is left to candle: kernels count in 32 bits.
const MOST: usize = 1 << 31;

/// Whether the fused operations can take these tensors: all of one type, f32, bf16 or f16, on one card, where they are
/// not switched off.
pub fn takes<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> bool {
    let mut first: Option<&Tensor> = None;
    tensors.into_iter().all(|tensor| {
        let like = *first.get_or_insert(tensor);
        tensor.device().is_cuda()
            && matches!(tensor.dtype(), DType::F32 | DType::BF16 | DType::F16)
            && tensor.dtype() == like.dtype()
            && tensor.device().same_device(like.device())
            && tensor.elem_count() < MOST
    }) && first.is_some()
        && !only_candles()
}

/// Whether an adapter's factors go with `x`, which [`takes`]: on its card, in f32 or in its type.
pub fn takes_factors(x: &Tensor, a: &Tensor, b: &Tensor) -> bool {
    takes([a, b])
        && (a.dtype() == DType::F32 || a.dtype() == x.dtype())
        && a.device().same_device(x.device())
}

/// An argument of a kernel.
#[derive(Debug, Clone, Copy)]
pub enum Arg {
    /// Where a tensor is; 0 for none.
    At(u64),
    Int(i32),
    Bits(u32),
    Long(i64),
    Real(f32),
}

impl From<&Buffer> for Arg {
    fn from(buffer: &Buffer) -> Self {
        Arg::At(buffer.at())
    }
}

impl From<f64> for Arg {
    fn from(value: f64) -> Self {
        Arg::Real(value as f32)
    }
}

impl From<bool> for Arg {
    fn from(value: bool) -> Self {
        Arg::Int(i32::from(value))
    }
}

/// `tensor` as an argument.
fn at(tensor: &Tensor) -> Result<Arg> {
    card::at(tensor).map(Arg::At)
}

/// A tensor that there may be, as an argument.
fn maybe(tensor: Option<&Tensor>) -> Result<Arg> {
    tensor.map_or(Ok(Arg::At(0)), at)
}

/// A buffer that there may be, as an argument.
fn maybe_buffer(buffer: Option<&Buffer>) -> Arg {
    buffer.map_or(Arg::At(0), Arg::from)
}

/// A number of elements as an argument.
fn int(count: usize) -> Result<Arg> {
    i32::try_from(count).map(Arg::Int).map_err(Error::wrap)
}

/// Elements from the first of `dims`, which lie `strides` apart, to behind the last.
fn extent(dims: &[usize], strides: &[usize]) -> usize {
    let steps = dims.iter().zip(strides);
    let last: usize = steps.map(|(dim, step)| dim.saturating_sub(1) * step).sum();
    last + 1
}

/// Strides as arguments.
fn strides<const N: usize>(strides: [usize; N]) -> [Arg; N] {
    strides.map(|stride| Arg::Long(stride as i64))
}

/// How many threads run a kernel.
#[derive(Debug, Clone, Copy)]
pub struct Grid {
    blocks: (u32, u32),
    /// Of a block; the first are the lanes of a row where there are rows.
    threads: (u32, u32),
    /// Bytes of shared memory.
    shared: u32,
}

impl Grid {
    /// For `count` elements, each on its own.
    fn each(count: usize) -> Self {
        const BLOCK: usize = 256;
        const MOST_BLOCKS: usize = 4096;
        Self::blocks(count.div_ceil(BLOCK).min(MOST_BLOCKS), (BLOCK as u32, 1))
    }

    /// For rows of `width` elements.
    fn rows(rows: usize, width: usize) -> Self {
        match width {
            0..=512 => Self::blocks(rows.div_ceil(8), (32, 8)),
            513..=4096 => Self::blocks(rows, (128, 1)),
            _ => Self::blocks(rows, (512, 1)),
        }
    }

    /// For columns, each the sum of as many rows as `b` times over.
    fn columns(width: usize, b: usize) -> Self {
        Self {
            blocks: (width.div_ceil(32) as u32, b as u32),
            threads: (32, 16),
            shared: 0,
        }
    }

    fn blocks(blocks: usize, threads: (u32, u32)) -> Self {
        Self {
            blocks: (blocks as u32, 1),
            threads,
            shared: 0,
        }
    }
}

/// A matrix in memory, row after row.
#[derive(Debug, Clone, Copy)]
pub struct Matrix {
    at: u64,
    /// Elements that there are from `at` on.
    count: usize,
    dtype: DType,
    /// From a row to the next.
    stride: usize,
    /// From a matrix of a batch to the next.
    apart: usize,
    /// Whether its transpose is meant.
    turned: bool,
}

impl Matrix {
    /// One matrix with rows of `width` elements.
    fn new(at: u64, count: usize, dtype: DType, width: usize) -> Self {
        Self {
            at,
            count,
            dtype,
            stride: width,
            apart: 0,
            turned: false,
        }
    }

    /// A contiguous tensor as a matrix with rows of `width` elements.
    fn of(tensor: &Tensor, width: usize) -> Result<Self> {
        let count = tensor.elem_count();
        Ok(Self::new(card::at(tensor)?, count, tensor.dtype(), width))
    }

    fn of_buffer(buffer: &Buffer, width: usize) -> Self {
        Self::new(buffer.at(), buffer.count(), buffer.dtype(), width)
    }

    /// Fails unless a batch of matrices of this size lies within the memory.
    fn check(&self, (rows, columns): (usize, usize), batch: usize) -> Result<()> {
        let (rows, columns) = match self.turned {
            true => (columns, rows),
            false => (rows, columns),
        };
        if rows == 0 || columns == 0 || batch == 0 {
            return Ok(());
        }
        let end = (batch - 1) * self.apart + (rows - 1) * self.stride + columns;
        if end > self.count {
            candle_core::bail!(
                "{batch} matrices of {rows} x {columns}, in all {end} elements, in memory of {}",
                self.count
            );
        }
        Ok(())
    }

    fn t(self) -> Self {
        Self {
            turned: !self.turned,
            ..self
        }
    }
}

/// A batch of matrix products: (rows, depth) · (depth, columns).
#[derive(Debug, Clone, Copy)]
pub struct Product {
    rows: usize,
    columns: usize,
    depth: usize,
    batch: usize,
    left: Matrix,
    right: Matrix,
    result: Matrix,
    scale: f32,
    /// Whether it is added to what is there.
    adds: bool,
}

/// `tensor` contiguous and off the tape: what a kernel reads and a backward pass keeps.
pub fn kept(tensor: &Tensor) -> Result<Tensor> {
    match tensor.is_contiguous() {
        true => Ok(tensor.detach()),
        false => layout::copy(tensor),
    }
}

/// `tensor` off the tape with its last dimension adjacent in memory and at most three others, of any strides.
fn adjacent(tensor: &Tensor) -> Result<Tensor> {
    match tensor.stride().last() == Some(&1) && tensor.rank() <= 4 {
        true => Ok(tensor.detach()),
        false => kept(tensor),
    }
}

/// The rows of a tensor, whose last dimension is adjacent: how many there are of the second and of the third dimension
/// from the end, and the strides of all three, as kernels take them.
fn row_places(tensor: &Tensor) -> Result<[Arg; 5]> {
    let (dims, steps) = (tensor.dims(), tensor.stride());
    let lead = dims.len().saturating_sub(1);
    if tensor.is_contiguous() || lead > 3 {
        let width = dims.last().copied().unwrap_or(1);
        let rows = tensor.elem_count() / width.max(1);
        let [s0, s1, s2] = strides([0, 0, width]);
        return Ok([int(1)?, int(rows.max(1))?, s0, s1, s2]);
    }
    let (mut sizes, mut apart) = ([1; 3], [0; 3]);
    sizes[3 - lead..].copy_from_slice(&dims[..lead]);
    apart[3 - lead..].copy_from_slice(&steps[..lead]);
    let [s0, s1, s2] = strides(apart);
    Ok([int(sizes[1])?, int(sizes[2])?, s0, s1, s2])
}
