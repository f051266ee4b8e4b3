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

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor, Var};

    use super::*;
    use crate::nn::{backward, ops};

    fn random(shape: &[usize]) -> Tensor {
        Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap()
    }

    fn numbers(x: &Tensor) -> Vec<f32> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// The gradients of sum(weights · f(x, y)) for x (2, 3, 8) and y (2, 5, 8), with our functions and with candle's.
    fn compare(f: impl Fn(&Tensor, &Tensor, bool) -> Tensor) {
        let (x, y) = (random(&[2, 3, 8]), random(&[2, 5, 8]));
        let of = |ours: bool| {
            let x = Var::from_tensor(&x).unwrap();
            let y = Var::from_tensor(&y).unwrap();
            // Results of fused operations, so that gradients meet in slots.
            let (a, b) = (ops::silu(&x).unwrap(), ops::silu(&y).unwrap());
            let z = f(&a, &b, ours);
            let weights = Tensor::arange(0f32, z.elem_count() as f32, &Device::Cpu);
            let weights = weights.unwrap().reshape(z.shape()).unwrap();
            let loss = (&z * weights).unwrap().sum_all().unwrap();
            let plain = loss.backward().unwrap();
            let ours = backward(&loss).unwrap();
            let both = [x.as_tensor(), y.as_tensor()].map(|v| {
                let (one, two) = (
                    numbers(plain.get(v).unwrap()),
                    numbers(ours.get(v).unwrap()),
                );
                assert_eq!(one, two, "candle's backward and ours");
                one
            });
            (numbers(&z), both)
        };
        let (ours, candles) = (of(true), of(false));
        assert_eq!(ours.0, candles.0);
        for (ours, candles) in ours.1.iter().zip(&candles.1) {
            for (a, b) in ours.iter().zip(candles) {
                assert!((a - b).abs() <= 1e-5 * b.abs().max(1.0), "{a} and {b}");
            }
        }
    }

    #[test]
    fn sums_parts_and_joins_have_candles_values_and_gradients() {
        // A tensor that is used in many ways at once: by our functions, by fused operations and by candle's own.
        compare(|x, y, ours| {
            let long = match ours {
                true => join(x, y, 1).unwrap(),
                false => Tensor::cat(&[x, y], 1).unwrap(),
            };
            let part = |start, count| match ours {
                true => rows(&long, start, count).unwrap(),
                false => long.narrow(1, start, count).unwrap().contiguous().unwrap(),
            };
            let (one, two) = (part(0, 4), part(4, 4));
            let sum = match ours {
                true => add(&one, &two).unwrap(),
                false => (&one + &two).unwrap(),
            };
            let again = ops::silu(&one).unwrap();
            (sum + (again * &two).unwrap()).unwrap()
        });
    }

    #[test]
    fn views_are_joined_along_any_dimension() {
        for dim in 0..4 {
            let [x, y] = [2, 3].map(|n| {
                let mut shape = [4, 3, 5, 6];
                shape[dim] = n;
                // Heads as an attention has them, within something wider.
                let [b, h, n, d] = shape;
                let wide = random(&[b, n, h + 2, d]);
                let view = wide.narrow(2, 1, h).unwrap().transpose(1, 2).unwrap();
                (wide, view)
            });
            let tracked = Var::from_tensor(&x.0).unwrap();
            let h = x.1.dim(1).unwrap();
            let view = tracked.narrow(2, 1, h).unwrap().transpose(1, 2).unwrap();
            let joined = join(&view, &y.1, dim).unwrap();
            let wanted = Tensor::cat(&[&view, &y.1], dim).unwrap();
            assert_eq!(joined.dims(), wanted.dims());
            assert_eq!(numbers(&joined), numbers(&wanted));
            let of = |joined: Tensor| {
                let weights = Tensor::arange(0f32, joined.elem_count() as f32, &Device::Cpu);
                let weights = weights.unwrap().reshape(joined.shape()).unwrap();
                let loss = (joined * weights).unwrap().sum_all().unwrap();
                numbers(backward(&loss).unwrap().get(&tracked).unwrap())
            };
            assert_eq!(of(joined), of(wanted));
        }
    }

    #[test]
    fn heads_have_candles_values_and_gradients() {
        compare(|x, y, ours| {
            let heads = |x: &Tensor, start: usize, heads: usize| match ours {
                true => split_heads(x, start, heads, 2).unwrap(),
                false => {
                    let (b, n, _) = x.dims3().unwrap();
                    let part = x.narrow(2, start, 2 * heads).unwrap();
                    part.reshape((b, n, heads, 2))
                        .unwrap()
                        .transpose(1, 2)
                        .unwrap()
                }
            };
            // Keys overlap with queries, and candle takes one view as well.
            let (q, k, v) = (heads(x, 0, 2), heads(y, 2, 2), heads(y, 4, 2));
            let z = ops::attention(&q, &k, &v, 0.7, &ops::Mask::None).unwrap();
            let z = (z + &q).unwrap();
            match ours {
                true => merge_heads(&z).unwrap(),
                false => z
                    .transpose(1, 2)
                    .unwrap()
                    .contiguous()
                    .unwrap()
                    .reshape((2, 3, 4))
                    .unwrap(),
            }
        });
    }
}
