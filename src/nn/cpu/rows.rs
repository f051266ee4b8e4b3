//! Operations between a sequence (b, n, c) and one vector per image (b, c), dropout, and nearest-neighbour upsampling.

use candle_core::{Result, Tensor};
use multiversion::multiversion;

use super::{detached, pairs, pieces, tensor, values};
use crate::nn::shapes::{sequence, two_sequences};
use crate::nn::vjp::record;

/// See [`crate::nn::ops::modulate`].
pub fn modulate(x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
    let (b, n, c) = sequence(x, &[shift, scale])?;
    let (x_kept, scale_kept) = (detached(x)?, detached(scale)?);
    let y = {
        let shift = detached(shift)?;
        let (x, shift, scale) = (values(&x_kept)?, values(&shift)?, values(&scale_kept)?);
        pieces(x.len(), n * c, |i, y| {
            let image = i * c..(i + 1) * c;
            modulate_rows(
                &x[i * n * c..][..n * c],
                &shift[image.clone()],
                &scale[image],
                y,
            );
        })
    };
    let wanted = [x.track_op(), shift.track_op(), scale.track_op()];
    record(&[x, shift, scale], y, x.shape(), move |gradient| {
        let (x, scale, g) = (values(&x_kept)?, values(&scale_kept)?, values(gradient)?);
        let (dx, sums) = pairs((x.len(), n * c), (b * 2 * c, 2 * c), |i, dx, sums| {
            let piece = i * n * c..(i + 1) * n * c;
            let scale = &scale[i * c..(i + 1) * c];
            modulate_slopes(&x[piece.clone()], &g[piece], scale, (dx, sums));
        });
        let mut gradients = Vec::new();
        if wanted[0] {
            gradients.push(tensor(dx, (b, n, c))?);
        }
        let sums = tensor(sums, (b, 2, c))?;
        for i in 0..2 {
            if wanted[1 + i] {
                gradients.push(sums.get_on_dim(1, i)?.contiguous()?);
            }
        }
        Ok(gradients)
    })
}

/// See [`crate::nn::ops::gated_residual`].
pub fn gated_residual(x: &Tensor, gate: &Tensor, y: &Tensor) -> Result<Tensor> {
    let (b, n, c) = two_sequences(x, y, &[gate])?;
    let (gate_kept, y_kept) = (detached(gate)?, detached(y)?);
    let sum = {
        let x = detached(x)?;
        let (x, gate, y) = (values(&x)?, values(&gate_kept)?, values(&y_kept)?);
        pieces(x.len(), n * c, |i, out| {
            let piece = i * n * c..(i + 1) * n * c;
            let gate = &gate[i * c..(i + 1) * c];
            gate_rows(&x[piece.clone()], gate, &y[piece], out);
        })
    };
    let wanted = [x.track_op(), gate.track_op(), y.track_op()];
    record(&[x, gate, y], sum, x.shape(), move |gradient| {
        let mut gradients = Vec::new();
        if wanted[0] {
            gradients.push(gradient.clone());
        }
        let (gate, y, g) = (values(&gate_kept)?, values(&y_kept)?, values(gradient)?);
        let (dy, dgate) = pairs((y.len(), n * c), (b * c, c), |i, dy, dgate| {
            let piece = i * n * c..(i + 1) * n * c;
            let gate = &gate[i * c..(i + 1) * c];
            gate_slopes(gate, &y[piece.clone()], &g[piece], (dy, dgate));
        });
        if wanted[1] {
            gradients.push(tensor(dgate, (b, c))?);
        }
        if wanted[2] {
            gradients.push(tensor(dy, (b, n, c))?);
        }
        Ok(gradients)
    })
}

/// x times `factors`, which have no gradient: dropout.
pub fn times(x: &Tensor, factors: Vec<f32>) -> Result<Tensor> {
    let y = {
        let x = detached(x)?;
        let x = values(&x)?;
        pieces(x.len(), super::PIECE, |i, y| {
            multiply_pairs(&x[i * super::PIECE..], &factors[i * super::PIECE..], y);
        })
    };
    let shape = x.shape().clone();
    record(&[x], y, x.shape(), move |gradient| {
        let g = values(gradient)?;
        let dx = pieces(g.len(), super::PIECE, |i, dx| {
            multiply_pairs(&g[i * super::PIECE..], &factors[i * super::PIECE..], dx);
        });
        Ok(vec![tensor(dx, &shape)?])
    })
}

/// See [`crate::nn::ops::upsample_nearest2x`].
pub fn upsample_nearest2x(x: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    let y = {
        let x = detached(x)?;
        let x = values(&x)?;
        pieces(4 * x.len(), 4 * h * w, |plane, y| {
            let x = &x[plane * h * w..(plane + 1) * h * w];
            for (x, y) in x
                .chunks_exact(w.max(1))
                .zip(y.chunks_exact_mut(4 * w.max(1)))
            {
                let (above, below) = y.split_at_mut(2 * w);
                for (x, y) in x.iter().zip(above.chunks_exact_mut(2)) {
                    y.fill(*x);
                }
                below.copy_from_slice(above);
            }
        })
    };
    record(&[x], y, (b, c, 2 * h, 2 * w), move |gradient| {
        let g = values(gradient)?;
        let dx = pieces(b * c * h * w, h * w, |plane, dx| {
            let g = &g[plane * 4 * h * w..(plane + 1) * 4 * h * w];
            for (dx, g) in dx.chunks_exact_mut(w).zip(g.chunks_exact(4 * w)) {
                let (above, below) = g.split_at(2 * w);
                for ((dx, a), b) in dx
                    .iter_mut()
                    .zip(above.chunks_exact(2))
                    .zip(below.chunks_exact(2))
                {
                    *dx = (a[0] + a[1]) + (b[0] + b[1]);
                }
            }
        });
        Ok(vec![tensor(dx, (b, c, h, w))?])
    })
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn modulate_rows(x: &[f32], shift: &[f32], scale: &[f32], y: &mut [f32]) {
    let c = scale.len();
    for (x, y) in x.chunks_exact(c).zip(y.chunks_exact_mut(c)) {
        for (((y, x), scale), shift) in y.iter_mut().zip(x).zip(scale).zip(shift) {
            *y = x * (1.0 + scale) + shift;
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn modulate_slopes(x: &[f32], g: &[f32], scale: &[f32], (dx, sums): (&mut [f32], &mut [f32])) {
    let c = scale.len();
    let (dshift, dscale) = sums.split_at_mut(c);
    for ((x, g), dx) in x
        .chunks_exact(c)
        .zip(g.chunks_exact(c))
        .zip(dx.chunks_exact_mut(c))
    {
        for ((dx, g), scale) in dx.iter_mut().zip(g).zip(scale) {
            *dx = g * (1.0 + scale);
        }
        let sums = dshift.iter_mut().zip(dscale.iter_mut());
        for (((dshift, dscale), g), x) in sums.zip(g).zip(x) {
            *dshift += g;
            *dscale += g * x;
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn gate_rows(x: &[f32], gate: &[f32], y: &[f32], sum: &mut [f32]) {
    let c = gate.len();
    for ((x, y), sum) in x
        .chunks_exact(c)
        .zip(y.chunks_exact(c))
        .zip(sum.chunks_exact_mut(c))
    {
        for (((sum, x), y), gate) in sum.iter_mut().zip(x).zip(y).zip(gate) {
            *sum = x + gate * y;
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn gate_slopes(gate: &[f32], y: &[f32], g: &[f32], (dy, dgate): (&mut [f32], &mut [f32])) {
    let c = gate.len();
    for ((y, g), dy) in y
        .chunks_exact(c)
        .zip(g.chunks_exact(c))
        .zip(dy.chunks_exact_mut(c))
    {
        for ((dy, g), gate) in dy.iter_mut().zip(g).zip(gate) {
            *dy = g * gate;
        }
        for ((dgate, g), y) in dgate.iter_mut().zip(g).zip(y) {
            *dgate += g * y;
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn multiply_pairs(x: &[f32], factors: &[f32], y: &mut [f32]) {
    for ((y, x), f) in y.iter_mut().zip(x).zip(factors) {
        *y = x * f;
    }
}
