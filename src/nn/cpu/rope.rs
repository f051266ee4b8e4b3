//! Rotary position embedding of (b, h, n, d) in both pairings.

use candle_core::{Result, Tensor};
use multiversion::multiversion;

use super::{adjacent, detached, pieces, strided_values, tensor, values};
use crate::nn::shapes::check_rope;
use crate::nn::vjp::record;

/// Which two components are turned together.
#[derive(Clone, Copy)]
pub enum Pairing {
    /// (2i, 2i + 1).
    Adjacent,
    /// (i, i + d/2).
    Halves,
}

/// See [`crate::nn::ops::rope_adjacent`] and [`crate::nn::ops::rope_halves`]; `cos` and `sin` must not be tracked.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, pairing: Pairing) -> Result<Tensor> {
    check_rope(x, cos, sin)?;
    let (cos, sin) = (detached(cos)?, detached(sin)?);
    let y = turn(x, &cos, &sin, 1.0, pairing)?;
    record(&[x], y, x.shape(), move |gradient| {
        // A rotation's transpose turns the other way.
        let dx = turn(gradient, &cos, &sin, -1.0, pairing)?;
        Ok(vec![tensor(dx, gradient.shape())?])
    })
}

fn turn(x: &Tensor, cos: &Tensor, sin: &Tensor, sign: f32, pairing: Pairing) -> Result<Vec<f32>> {
    let x = adjacent(x)?;
    let (_, h, n, d) = x.dims4()?;
    let strides = [x.stride()[0], x.stride()[1], x.stride()[2]];
    let count = x.elem_count();
    let (x, cos, sin) = (strided_values(&x)?, values(cos)?, values(sin)?);
    Ok(pieces(count, n * d, |head, y| {
        let start = head / h * strides[0] + head % h * strides[1];
        turn_head(&x[start..], strides[2], [&cos, &sin], sign, pairing, (y, d));
    }))
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn turn_head(
    x: &[f32],
    stride: usize,
    [cos, sin]: [&[f32]; 2],
    sign: f32,
    pairing: Pairing,
    (y, d): (&mut [f32], usize),
) {
    for (row, y) in y.chunks_exact_mut(d).enumerate() {
        let x = &x[row * stride..row * stride + d];
        let angles = row * d / 2..(row + 1) * d / 2;
        let (cos, sin) = (&cos[angles.clone()], &sin[angles]);
        match pairing {
            Pairing::Adjacent => {
                let pairs = y.chunks_exact_mut(2).zip(x.chunks_exact(2));
                for (((y, x), c), s) in pairs.zip(cos).zip(sin) {
                    y[0] = x[0] * c - x[1] * s * sign;
                    y[1] = x[1] * c + x[0] * s * sign;
                }
            }
            Pairing::Halves => {
                let (y0, y1) = y.split_at_mut(d / 2);
                let (x0, x1) = x.split_at(d / 2);
                let pairs = y0.iter_mut().zip(y1).zip(x0).zip(x1);
                for ((((y0, y1), x0), x1), (c, s)) in pairs.zip(cos.iter().zip(sin)) {
                    *y0 = x0 * c - x1 * s * sign;
                    *y1 = x1 * c + x0 * s * sign;
                }
            }
        }
    }
}
