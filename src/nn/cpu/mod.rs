//! The fused operations on the CPU in f32: each computes its result and its gradients itself, on all threads of the
//! current rayon pool. Work is cut into pieces by shape alone and sums run in a fixed order, so that results are equal
//! to the byte whatever the number of threads.

pub mod activation;
pub mod attention;
pub mod conv;
pub mod embedding;
pub mod gemm;
pub mod group_norm;
pub mod half;
pub mod linear;
pub mod norm;
pub mod rope;
pub mod rows;
pub mod simd;
pub mod softmax;

use std::ops::{Deref, Range};

use candle_core::{CpuStorage, DType, Device, Result, Shape, Storage, StorageRef, Tensor};
use multiversion::multiversion;
use rayon::prelude::*;

use crate::nn::context::{is_crowded, only_candles};

/// Whether the fused operations can take these tensors: all in f32 on the CPU, where they are not switched off.
pub fn takes<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> bool {
    !only_candles()
        && tensors
            .into_iter()
            .all(|t| t.dtype() == DType::F32 && t.device().is_cpu())
}

/// The values of a contiguous tensor, for reading.
pub struct Values<'a> {
    storage: StorageRef<'a>,
    range: Range<usize>,
}

impl Deref for Values<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.range.clone()],
            // `values` and `strided_values` return an error instead of such a guard.
            _ => &[],
        }
    }
}

/// The values of `tensor`, which must be contiguous.
pub fn values(tensor: &Tensor) -> Result<Values<'_>> {
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(_)), Some((start, end))) => Ok(Values {
            range: start..end,
            storage,
        }),
        _ => candle_core::bail!(
            "a fused operation met a tensor that is not contiguous f32 on the CPU"
        ),
    }
}

/// The storage of `tensor` from its first element on, to be read with its strides.
pub fn strided_values(tensor: &Tensor) -> Result<Values<'_>> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(CpuStorage::F32(all)) => Ok(Values {
            range: layout.start_offset()..all.len(),
            storage,
        }),
        _ => candle_core::bail!("a fused operation met a tensor that is not f32 on the CPU"),
    }
}

/// `tensor` contiguous and off the tape: what a kernel reads and a backward pass keeps.
pub fn detached(tensor: &Tensor) -> Result<Tensor> {
    tensor.detach().contiguous()
}

/// `tensor` off the tape with its last dimension adjacent in memory; the others may have any stride.
pub fn adjacent(tensor: &Tensor) -> Result<Tensor> {
    if tensor.stride().last() == Some(&1) {
        Ok(tensor.detach())
    } else {
        detached(tensor)
    }
}

/// A tensor on the CPU.
pub fn tensor(values: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(values, shape.into(), &Device::Cpu)
}

/// Elements below which one thread does the work alone: waking another takes longer.
const ALONE: usize = 1 << 15;

/// Multiplications below which one thread does a sum of products alone.
const ALONE_PRODUCTS: usize = 1 << 19;

/// Whether one thread does the work alone: there is too little of it to wake another, or others have work of their own.
fn is_alone(work: usize, least: usize) -> bool {
    work <= least || is_crowded()
}

/// Elements of one piece of elementwise work.
pub const PIECE: usize = 1 << 13;

/// Calls `body(i, piece)` for the pieces of `out` with `length` elements each (the last may be shorter), in parallel.
pub fn each_piece(out: &mut [f32], length: usize, body: impl Fn(usize, &mut [f32]) + Sync + Send) {
    let length = length.max(1);
    if is_alone(out.len(), ALONE) {
        for (i, piece) in out.chunks_mut(length).enumerate() {
            body(i, piece);
        }
    } else {
        out.par_chunks_mut(length)
            .enumerate()
            .for_each(|(i, piece)| body(i, piece));
    }
}

/// What `body(i, piece)` makes of zeros: `count` elements in pieces of `length` (the last may be shorter), in parallel.
/// A piece is cleared when it is its turn, so that the nearest cache has it then.
pub fn pieces(
    count: usize,
    length: usize,
    body: impl Fn(usize, &mut [f32]) + Sync + Send,
) -> Vec<f32> {
    pairs((count, length), (0, 0), |i, piece, _| body(i, piece)).0
}

/// Like [`pieces`] with two results, (elements, elements of a piece) each. The first says how much work there is; the
/// second has no more pieces.
pub fn pairs(
    one: (usize, usize),
    two: (usize, usize),
    body: impl Fn(usize, &mut [f32], &mut [f32]) + Sync + Send,
) -> (Vec<f32>, Vec<f32>) {
    let count = one.0.div_ceil(one.1.max(1));
    if count == 0 {
        return (Vec::new(), vec![0.0; two.0]);
    }
    let (mut first, mut second) = (Room::new(one), Room::new(two));
    assert!(
        second.elements <= count * second.length,
        "{two:?} in as few pieces as {one:?}"
    );
    // SAFETY: this is the only call for piece `i`.
    let piece = |i: usize| unsafe { body(i, first.piece(i), second.piece(i)) };
    if is_alone(one.0, ALONE) {
        (0..count).for_each(piece);
    } else {
        (0..count).into_par_iter().for_each(piece);
    }
    // SAFETY: the pieces are all there is, and each was cleared.
    unsafe { (first.filled(), second.filled()) }
}

/// A vector in the making.
struct Room {
    place: gemm::Shared,
    values: Vec<f32>,
    elements: usize,
    /// Elements of a piece.
    length: usize,
}

impl Room {
    fn new((elements, length): (usize, usize)) -> Self {
        let mut values = Vec::with_capacity(elements);
        Self {
            place: gemm::Shared(values.as_mut_ptr()),
            values,
            elements,
            length: length.max(1),
        }
    }

    /// Piece `i`, cleared.
    ///
    /// # Safety
    /// Nobody else may have the same piece.
    #[expect(clippy::mut_from_ref, reason = "each piece is given out once")]
    unsafe fn piece(&self, i: usize) -> &mut [f32] {
        let from = (i * self.length).min(self.elements);
        let count = self.length.min(self.elements - from);
        // SAFETY: the piece lies within the vector's room, and is written before it is read.
        unsafe {
            let place = self.place.0.add(from);
            place.write_bytes(0, count);
            std::slice::from_raw_parts_mut(place, count)
        }
    }

    /// The vector.
    ///
    /// # Safety
    /// Every piece must have been cleared, and none may still be written.
    unsafe fn filled(&mut self) -> Vec<f32> {
        let mut values = std::mem::take(&mut self.values);
        // SAFETY: there is room for as many, all of them written.
        unsafe { values.set_len(self.elements) }
        values
    }
}

/// `sum += values`, element by element.
pub fn add_into(sum: &mut [f32], values: &[f32]) {
    each_piece(sum, PIECE, |i, sum| add_slices(sum, &values[i * PIECE..]));
}

/// `x + y`, element by element.
pub fn sum(x: &[f32], y: &[f32]) -> Vec<f32> {
    pieces(x.len(), PIECE, |i, sum| {
        sum_slices(sum, &x[i * PIECE..], &y[i * PIECE..])
    })
}

/// Adds `values` (b, heads, n, d) to the columns `start..start + heads · d` of `sum` (b, n, width).
pub fn add_heads(
    sum: &mut [f32],
    values: &[f32],
    (n, width): (usize, usize),
    start: usize,
    (heads, d): (usize, usize),
) {
    let rows = |(row, sum): (usize, &mut [f32])| {
        let (b, position) = (row / n.max(1), row % n.max(1));
        for (h, sum) in sum[start..][..heads * d]
            .chunks_exact_mut(d.max(1))
            .enumerate()
        {
            let from = ((b * heads + h) * n + position) * d;
            add_slices(sum, &values[from..from + d]);
        }
    };
    if is_alone(sum.len(), ALONE) {
        sum.chunks_exact_mut(width.max(1))
            .enumerate()
            .for_each(rows);
    } else {
        sum.par_chunks_exact_mut(width.max(1))
            .enumerate()
            .for_each(rows);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn sum_slices(sum: &mut [f32], x: &[f32], y: &[f32]) {
    for ((s, x), y) in sum.iter_mut().zip(x).zip(y) {
        *s = x + y;
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn add_slices(sum: &mut [f32], values: &[f32]) {
    for (s, v) in sum.iter_mut().zip(values) {
        *s += v;
    }
}

/// Adds up `partial` (count, width), row after row.
pub fn add_rows(partial: &[f32], width: usize) -> Vec<f32> {
    let mut total = vec![0.0; width];
    for row in partial.chunks_exact(width.max(1)) {
        for (t, v) in total.iter_mut().zip(row) {
            *t += v;
        }
    }
    total
}
