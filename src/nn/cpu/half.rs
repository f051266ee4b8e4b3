//! Products with matrices in half precision or in blocks of few bits, which are widened to f32 in pieces that stay in a
//! core's cache. The sums run as they do for matrices in f32.

use candle_core::Result;
use multiversion::multiversion;
use rayon::prelude::*;

use super::gemm::{Matrix, Shared, Threads, multiply_into};
use super::{ALONE, PIECE, is_alone, simd};
use crate::nn::{HalfKind, QuantisedMatrix};

/// Elements of one widened panel: 1 MiB in f32.
const PANEL: usize = 1 << 18;

/// What the rows or columns of a panel are multiples of: whole tiles of the matrix kernels.
const STEP: usize = 64;

/// About as many panels as this are there to be shared by threads, if they do not get narrower than [`STEP`].
const PANELS: usize = 16;

/// A matrix that is widened piece by piece.
pub trait Narrow: Sync {
    /// Pieces start and end at multiples of this, or at the ends of rows.
    fn step(&self) -> usize;

    /// `out` = the values from number `start` on.
    fn widen(&self, start: usize, out: &mut [f32]) -> Result<()>;
}

/// Values in half precision.
pub struct Half<'a>(pub &'a [u16], pub HalfKind);

impl Narrow for Half<'_> {
    fn step(&self) -> usize {
        1
    }

    fn widen(&self, start: usize, out: &mut [f32]) -> Result<()> {
        widen_piece(&self.0[start..start + out.len()], self.1, out);
        Ok(())
    }
}

impl Narrow for QuantisedMatrix {
    fn step(&self) -> usize {
        self.block()
    }

    fn widen(&self, start: usize, out: &mut [f32]) -> Result<()> {
        self.unpack(start, out)
    }
}

/// `out = values of bits`, on all threads if there are many.
pub fn widen(bits: &[u16], kind: HalfKind, out: &mut [f32]) {
    if is_alone(out.len(), ALONE) {
        widen_piece(bits, kind, out);
    } else {
        out.par_chunks_mut(PIECE)
            .zip(bits.par_chunks(PIECE))
            .for_each(|(out, bits)| widen_piece(bits, kind, out));
    }
}

/// `out = values of bits`.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
pub fn widen_piece(bits: &[u16], kind: HalfKind, out: &mut [f32]) {
    match kind {
        HalfKind::Bf16 => bits
            .iter()
            .zip(out)
            .for_each(|(b, o)| *o = simd::from_bf16(*b)),
        HalfKind::F16 => bits
            .iter()
            .zip(out)
            .for_each(|(b, o)| *o = simd::from_f16(*b)),
    }
}

/// `out` (weights' rows, x's rows): the inner product of each row of `w` with each row of `x`.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
pub fn thin(x: &[f32], w: &[u16], kind: HalfKind, inputs: usize, out: &mut [f32]) {
    match kind {
        HalfKind::Bf16 => thin_rows(x, w, inputs, out, simd::from_bf16),
        HalfKind::F16 => thin_rows(x, w, inputs, out, simd::from_f16),
    }
}

#[inline(always)]
fn thin_rows(
    x: &[f32],
    w: &[u16],
    inputs: usize,
    out: &mut [f32],
    value: impl Fn(u16) -> f32 + Copy,
) {
    let inputs = inputs.max(1);
    let rows = x.len() / inputs;
    if rows == 1 {
        for (w, out) in w.chunks_exact(inputs).zip(out) {
            *out = simd::sum_widened(x, w, value);
        }
        return;
    }
    let mut row = vec![0.0; inputs];
    for (w, out) in w
        .chunks_exact(inputs)
        .zip(out.chunks_exact_mut(rows.max(1)))
    {
        row.iter_mut().zip(w).for_each(|(r, w)| *r = value(*w));
        for (x, out) in x.chunks_exact(inputs).zip(out) {
            *out = simd::sum_pairs(x, &row, |a, b| a * b);
        }
    }
}

/// `out` (weights' rows, x's rows): the inner product of each row of `w` from row `first` on with each row of `x`.
pub fn thin_packed(
    x: &[f32],
    w: &QuantisedMatrix,
    first: usize,
    inputs: usize,
    out: &mut [f32],
) -> Result<()> {
    let inputs = inputs.max(1);
    let rows = (x.len() / inputs).max(1);
    let mut row = vec![0.0; inputs];
    for (i, out) in out.chunks_exact_mut(rows).enumerate() {
        w.unpack((first + i) * inputs, &mut row)?;
        products(x, &row, out);
    }
    Ok(())
}

/// `out`: the inner product of `w` with each row of `x`.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn products(x: &[f32], w: &[f32], out: &mut [f32]) {
    for (x, out) in x.chunks_exact(w.len()).zip(out) {
        *out = simd::sum_pairs(x, w, |a, b| a * b);
    }
}

/// `out += x·wᵀ` with `x` (rows, inputs), `w` (outputs, inputs) and `out` (rows, outputs).
pub fn add_times_transposed(
    x: &[f32],
    w: &impl Narrow,
    (rows, inputs, outputs): (usize, usize, usize),
    out: &mut [f32],
) -> Result<()> {
    let width = panel(outputs, inputs, 1);
    let x = Matrix::new(x, rows, inputs);
    assert!(out.len() == rows * outputs);
    let shared = Shared(out.as_mut_ptr());
    let shared = &shared;
    (0..outputs.div_ceil(width))
        .into_par_iter()
        .try_for_each_init(Vec::new, |scratch, i| {
            let (from, until) = (i * width, ((i + 1) * width).min(outputs));
            scratch.resize((until - from) * inputs, 0.0);
            w.widen(from * inputs, scratch)?;
            let panel = Matrix::new(scratch, until - from, inputs).t();
            // SAFETY: columns `from..until` of all rows lie within `out`, and no other task writes them.
            unsafe {
                let out = shared.0.add(from);
                multiply_into(1.0, x, panel, out, outputs, true, Threads::One);
            }
            Ok(())
        })
}

/// `g·w` (rows, inputs) with `g` (rows, outputs) and `w` (outputs, inputs).
pub fn times(
    g: &[f32],
    w: &impl Narrow,
    (rows, inputs, outputs): (usize, usize, usize),
) -> Result<Vec<f32>> {
    let g = Matrix::new(g, rows, outputs);
    let mut dx = vec![0.0; rows * inputs];
    // Panels of some columns and, of a long matrix, of some of its rows at a time.
    let width = panel(inputs, outputs.min(PANEL / STEP), w.step());
    let height = (PANEL / width).max(1);
    let shared = Shared(dx.as_mut_ptr());
    let shared = &shared;
    (0..inputs.div_ceil(width))
        .into_par_iter()
        .try_for_each_init(Vec::new, |scratch, i| {
            let (from, until) = (i * width, ((i + 1) * width).min(inputs));
            let columns = until - from;
            for first in (0..outputs).step_by(height) {
                let last = (first + height).min(outputs);
                scratch.resize((last - first) * columns, 0.0);
                let lines = scratch.chunks_exact_mut(columns);
                for (line, row) in lines.zip(first..last) {
                    w.widen(row * inputs + from, line)?;
                }
                let g = g.some_columns(first, last);
                let panel = Matrix::new(scratch, last - first, columns);
                // SAFETY: columns `from..until` of all rows lie within `dx`, and no other task writes them.
                unsafe {
                    let out = shared.0.add(from);
                    multiply_into(1.0, g, panel, out, inputs, first > 0, Threads::One);
                }
            }
            Ok::<(), candle_core::Error>(())
        })?;
    Ok(dx)
}

/// How many of `count` lines of `length` elements make up a panel; a multiple of `step`.
fn panel(count: usize, length: usize, step: usize) -> usize {
    let fits = (PANEL / length.max(1)).min(count.div_ceil(PANELS));
    let step = STEP.max(step);
    fits.next_multiple_of(step).max(step)
}
