//! Sums, parts and joins of activations. candle's own have right gradients too, but pass them through a copy and a sum
//! each; these bring them straight to where they are gathered.

use std::ops::Range;

use candle_core::{DType, Shape, Tensor};

use super::cpu::{self, Values, adjacent, detached, strided_values, takes, values};
use super::cuda;
use super::slot::Place;
use super::vjp;
use crate::Result;

/// `x + y`, of equal shapes.
pub fn add(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    if cuda::takes([x, y]) && x.dims() == y.dims() {
        return Ok(cuda::layout::add(x, y)?);
    }
    if !takes([x, y]) || x.dims() != y.dims() {
        return Ok((x + y)?);
    }
    let sum = {
        let (x, y) = (detached(x)?, detached(y)?);
        cpu::sum(&values(&x)?, &values(&y)?)
    };
    let count = [x, y].into_iter().filter(|t| t.track_op()).count();
    Ok(vjp::record(&[x, y], sum, x.shape(), move |gradient| {
        Ok(vec![gradient.clone(); count])
    })?)
}

/// `x`, which is contiguous, in another shape.
pub fn reshape(x: &Tensor, shape: impl Into<Shape>) -> Result<Tensor> {
    let view = x.reshape(shape.into())?;
    if view.id() != x.id() {
        vjp::show(x, &view, Place::Whole);
    }
    Ok(view)
}

/// The values of `x` one after the other in memory.
pub fn contiguous(x: &Tensor) -> Result<Tensor> {
    match !x.is_contiguous() && cuda::takes([x]) {
        true => Ok(cuda::layout::contiguous_copy(x)?),
        false => Ok(x.contiguous()?),
    }
}

/// `x` in f32.
pub fn to_f32(x: &Tensor) -> Result<Tensor> {
    match x.dtype() != DType::F32 && cuda::takes([x]) {
        true => Ok(cuda::layout::to_f32(x)?),
        false => Ok(x.to_dtype(DType::F32)?),
    }
}

/// `heads` heads of `d` values each, from column `start` of `x` (b, n, c) on: a view (b, heads, n, d). `start` and `c`
/// are multiples of `d`.
pub fn split_heads(x: &Tensor, start: usize, heads: usize, d: usize) -> Result<Tensor> {
    let (b, n, c) = x.dims3()?;
    let view = x
        .reshape((b, n, c / d, d))?
        .narrow(2, start / d, heads)?
        .transpose(1, 2)?;
    vjp::show(x, &view, Place::Heads { start, width: c });
    Ok(view)
}

/// The heads of `x` (b, heads, n, d) side by side: (b, n, heads · d).
pub fn merge_heads(x: &Tensor) -> Result<Tensor> {
    let (b, heads, n, d) = x.dims4()?;
    if cuda::takes([x]) {
        return Ok(cuda::layout::merge_heads(x)?);
    }
    if !takes([x]) {
        let merged = x.transpose(1, 2)?.contiguous()?;
        return Ok(merged.reshape((b, n, heads * d))?);
    }
    let value = turned(&values(&detached(x)?)?, heads, n, d);
    let shape = (b, n, heads * d);
    Ok(vjp::record(&[x], value, shape, move |gradient| {
        let split = turned(&values(gradient)?, n, heads, d);
        Ok(vec![cpu::tensor(split, (b, heads, n, d))?])
    })?)
}

/// `values` (…, n, m, d) as (…, m, n, d).
fn turned(values: &[f32], n: usize, m: usize, d: usize) -> Vec<f32> {
    cpu::pieces(values.len(), n * m * d, |i, out| {
        let values = &values[i * n * m * d..];
        for (j, out) in out.chunks_exact_mut((n * d).max(1)).enumerate() {
            for (k, out) in out.chunks_exact_mut(d.max(1)).enumerate() {
                out.copy_from_slice(&values[(k * m + j) * d..][..d]);
            }
        }
    })
}

/// `start..start + count` along dimension 1 of `x` (b, n, …), contiguous.
pub fn rows(x: &Tensor, start: usize, count: usize) -> Result<Tensor> {
    if cuda::takes([x]) {
        let of = x.dim(1)?;
        let part = x.narrow(1, start, count)?;
        if part.id() != x.id() {
            vjp::show(x, &part, Place::Rows { start, of });
        }
        return contiguous(&part);
    }
    let part = x.narrow(1, start, count)?.contiguous()?;
    if part.id() != x.id() {
        vjp::show(
            x,
            &part,
            Place::Rows {
                start,
                of: x.dim(1)?,
            },
        );
    }
    Ok(part)
}

/// `x` and `y` one after the other along `dim`; their other dimensions are equal.
pub fn join(x: &Tensor, y: &Tensor, dim: usize) -> Result<Tensor> {
    let others = |x: &Tensor| {
        let mut dims = x.dims().to_vec();
        dims.get_mut(dim).map(|d| *d = 0).map(|()| dims)
    };
    let fit = others(x).is_some() && others(x) == others(y);
    if fit && cuda::takes([x, y]) && x.rank() <= 4 {
        return Ok(cuda::layout::join(x, y, dim)?);
    }
    if !fit || !takes([x, y]) || !(x.track_op() || y.track_op()) {
        return Ok(Tensor::cat(&[x, y], dim)?);
    }
    let (first, second) = (x.dim(dim)?, y.dim(dim)?);
    let mut shape = x.dims().to_vec();
    shape[dim] += second;
    let joined = {
        let inner = shape[dim + 1..].iter().product::<usize>();
        let (x, y) = (adjacent(x)?, adjacent(y)?);
        let (x, y) = (Parts::new(&x, dim)?, Parts::new(&y, dim)?);
        let piece = (first + second) * inner;
        cpu::pieces(shape.iter().product(), piece, |i, out| {
            let (one, two) = out.split_at_mut(first * inner);
            x.copy(i, one);
            y.copy(i, two);
        })
    };
    let parts: Vec<(usize, usize)> = [(x, (0, first)), (y, (first, second))]
        .into_iter()
        .filter(|(t, _)| t.track_op())
        .map(|(_, part)| part)
        .collect();
    Ok(vjp::record(&[x, y], joined, shape, move |gradient| {
        parts
            .iter()
            .map(|&(start, count)| gradient.narrow(dim, start, count)?.contiguous())
            .collect()
    })?)
}

/// The parts of a tensor, read in place, that have the same indices before dimension `dim`.
struct Parts<'a> {
    values: Values<'a>,
    dims: &'a [usize],
    strides: &'a [usize],
    dim: usize,
}

impl<'a> Parts<'a> {
    /// Of `x`, whose last dimension is adjacent.
    fn new(x: &'a Tensor, dim: usize) -> candle_core::Result<Self> {
        Ok(Self {
            values: strided_values(x)?,
            dims: x.dims(),
            strides: x.stride(),
            dim,
        })
    }

    /// Copies part `i`.
    fn copy(&self, i: usize, out: &mut [f32]) {
        let last = self.dims.len() - 1;
        let start = self.place(i, 0..self.dim);
        let width = self.dims[last];
        for (row, out) in out.chunks_exact_mut(width.max(1)).enumerate() {
            let at = start + self.place(row, self.dim..last);
            out.copy_from_slice(&self.values[at..][..width]);
        }
    }

    /// Where index `i` of some dimensions, taken as one, lies.
    fn place(&self, mut i: usize, dims: Range<usize>) -> usize {
        let mut place = 0;
        for k in dims.rev() {
            place += i % self.dims[k] * self.strides[k];
            i /= self.dims[k];
        }
        place
    }
}
