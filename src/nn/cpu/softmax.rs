//! Softmax over the last dimension, and the cross-entropy of it.

use candle_core::{DType, Result, Tensor};
use multiversion::multiversion;

use super::{detached, each_piece, pieces, simd, tensor, values};
use crate::nn::vjp::{record, record_with_result};

/// Rows of one piece of work: about this many elements.
fn rows_of_piece(width: usize) -> usize {
    (super::PIECE / width).max(1)
}

/// See [`crate::nn::ops::softmax`].
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    let width = x.dims().last().copied().unwrap_or(1).max(1);
    let piece = rows_of_piece(width) * width;
    let y = {
        let x = detached(x)?;
        let x = values(&x)?;
        pieces(x.len(), piece, |i, y| {
            softmax_rows(&x[i * piece..][..y.len()], width, y);
        })
    };
    record_with_result(&[x], y, x.shape(), move |result, gradient| {
        let result = detached(result)?;
        let (y, g) = (values(&result)?, values(gradient)?);
        let dx = pieces(y.len(), piece, |i, dx| {
            let from = i * piece;
            let until = from + dx.len();
            softmax_slopes(&y[from..until], &g[from..until], width, dx);
        });
        Ok(vec![tensor(dx, result.shape())?])
    })
}

/// See [`crate::nn::ops::cross_entropy`].
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let (n, width) = logits.dims2()?;
    let targets = targets.to_dtype(DType::U32)?.to_vec1::<u32>()?;
    if targets.len() != n || targets.iter().any(|t| *t as usize >= width) {
        candle_core::bail!(
            "{} targets, the largest {:?}, for logits of {:?}",
            targets.len(),
            targets.iter().max(),
            logits.dims()
        );
    }
    let kept = detached(logits)?;
    let piece = rows_of_piece(width.max(1));
    let mut log_sums = vec![0.0; n];
    let losses: Vec<f32> = {
        let x = values(&kept)?;
        let body = |i: usize, out: &mut [f32]| {
            let x = &x[i * piece * width..][..out.len() * width];
            log_sum_rows(x, width, out);
        };
        if !super::is_alone(x.len(), super::ALONE) {
            use rayon::prelude::*;
            log_sums
                .par_chunks_mut(piece)
                .enumerate()
                .for_each(|(i, out)| body(i, out));
        } else {
            each_piece(&mut log_sums, piece, body);
        }
        let of_target = targets
            .iter()
            .enumerate()
            .map(|(i, t)| x[i * width + *t as usize]);
        log_sums.iter().zip(of_target).map(|(l, x)| l - x).collect()
    };
    record(&[logits], losses, n, move |gradient| {
        let (x, g) = (values(&kept)?, values(gradient)?);
        let dx = pieces(x.len(), piece * width, |i, dx| {
            let rows = i * piece..i * piece + dx.len() / width;
            let x = &x[rows.start * width..rows.end * width];
            cross_entropy_slopes(x, &log_sums[rows.clone()], &g[rows.clone()], dx);
            for ((dx, target), g) in dx
                .chunks_exact_mut(width)
                .zip(&targets[rows.clone()])
                .zip(&g[rows])
            {
                dx[*target as usize] -= g;
            }
        });
        Ok(vec![tensor(dx, (n, width))?])
    })
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn softmax_rows(x: &[f32], width: usize, y: &mut [f32]) {
    for (x, y) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
        let highest = simd::max(x);
        for (y, x) in y.iter_mut().zip(x) {
            *y = simd::exp(*x - highest);
        }
        let inverse = 1.0 / simd::sum(y, |v| v);
        for y in y.iter_mut() {
            *y *= inverse;
        }
    }
}

/// dx = y ∘ (g − Σ g·y).
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn softmax_slopes(y: &[f32], g: &[f32], width: usize, dx: &mut [f32]) {
    for ((y, g), dx) in y
        .chunks_exact(width)
        .zip(g.chunks_exact(width))
        .zip(dx.chunks_exact_mut(width))
    {
        let product = simd::sum_pairs(y, g, |y, g| y * g);
        for ((dx, y), g) in dx.iter_mut().zip(y).zip(g) {
            *dx = y * (g - product);
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn log_sum_rows(x: &[f32], width: usize, log_sums: &mut [f32]) {
    for (x, log_sum) in x.chunks_exact(width).zip(log_sums) {
        let highest = simd::max(x);
        *log_sum = highest + simd::sum(x, |v| simd::exp(v - highest)).ln();
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn cross_entropy_slopes(x: &[f32], log_sums: &[f32], g: &[f32], dx: &mut [f32]) {
    let width = x.len() / log_sums.len();
    for (((x, dx), log_sum), g) in x
        .chunks_exact(width)
        .zip(dx.chunks_exact_mut(width))
        .zip(log_sums)
        .zip(g)
    {
        for (dx, x) in dx.iter_mut().zip(x) {
            *dx = g * simd::exp(x - log_sum);
        }
    }
}
