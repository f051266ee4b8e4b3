//! Group norm of (b, c, …), alone or followed by SiLU.

use candle_core::{Result, Tensor};
use multiversion::multiversion;

use super::activation::{Activation, Silu};
use super::{add_rows, detached, pairs, simd, tensor, values};
use crate::nn::shapes;
use crate::nn::vjp::record;

/// See [`crate::nn::ops::group_norm`] and, if `activated`, [`crate::nn::ops::group_norm_silu`].
pub fn group_norm(
    x: &Tensor,
    groups: usize,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
    activated: bool,
) -> Result<Tensor> {
    let (b, c) = shapes::group_norm(x, groups, weight, bias)?;
    let pixels = (x.elem_count() / (b * c).max(1)).max(1);
    let channels = c / groups;
    let size = channels * pixels;
    let kept = detached(x)?;
    let (weight_kept, bias_kept) = (detached(weight)?, detached(bias)?);
    let (y, moments) = {
        let (x, weight, bias) = (values(&kept)?, values(&weight_kept)?, values(&bias_kept)?);
        pairs((x.len(), size), (2 * b * groups, 2), |i, y, moments| {
            let first = i % groups * channels;
            let parameters = Parameters {
                weight: &weight[first..first + channels],
                bias: &bias[first..first + channels],
            };
            forward(
                &x[i * size..(i + 1) * size],
                parameters,
                eps as f32,
                activated,
                (y, moments),
            );
        })
    };
    let wanted = (x.track_op(), weight.track_op(), bias.track_op());
    record(&[x, weight, bias], y, x.shape(), move |gradient| {
        let (x, g) = (values(&kept)?, values(gradient)?);
        let (weight, bias) = (values(&weight_kept)?, values(&bias_kept)?);
        // With the gradients of weight and bias for each image and channel.
        let (dx, partial) = pairs(
            (x.len(), size),
            (2 * b * c, 2 * channels),
            |i, dx, partial| {
                let first = i % groups * channels;
                let parameters = Parameters {
                    weight: &weight[first..first + channels],
                    bias: &bias[first..first + channels],
                };
                let piece = i * size..(i + 1) * size;
                backward(
                    [&x[piece.clone()], &g[piece]],
                    parameters,
                    &moments[2 * i..2 * i + 2],
                    activated,
                    (dx, partial),
                );
            },
        );
        let sums = add_rows(&partial, 2 * c);
        let mut gradients = Vec::new();
        if wanted.0 {
            gradients.push(tensor(dx, kept.shape())?);
        }
        for (wanted, offset) in [(wanted.1, 0), (wanted.2, 1)] {
            if wanted {
                let one: Vec<f32> = sums.iter().copied().skip(offset).step_by(2).collect();
                gradients.push(tensor(one, c)?);
            }
        }
        Ok(gradients)
    })
}

/// The weights and biases of one group's channels.
#[derive(Clone, Copy)]
struct Parameters<'a> {
    weight: &'a [f32],
    bias: &'a [f32],
}

/// Sums over millions of values lose digits in f32: blocks of this length are added up in f64.
const BLOCK: usize = 4096;

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn forward(
    x: &[f32],
    parameters: Parameters,
    eps: f32,
    activated: bool,
    (y, moments): (&mut [f32], &mut [f32]),
) {
    let mut total = 0.0;
    for block in x.chunks(BLOCK) {
        total += simd::sum(block, |v| v) as f64;
    }
    let mean = (total / x.len() as f64) as f32;
    let mut total = 0.0;
    for block in x.chunks(BLOCK) {
        total += simd::sum(block, |v| (v - mean) * (v - mean)) as f64;
    }
    let inverse = 1.0 / ((total / x.len() as f64) as f32 + eps).sqrt();
    moments.copy_from_slice(&[mean, inverse]);
    let pixels = x.len() / parameters.weight.len();
    for (((x, y), w), b) in x
        .chunks_exact(pixels)
        .zip(y.chunks_exact_mut(pixels))
        .zip(parameters.weight)
        .zip(parameters.bias)
    {
        let (w, b) = (inverse * w, b - mean * inverse * w);
        if activated {
            for (y, x) in y.iter_mut().zip(x) {
                *y = Silu::value(x * w + b);
            }
        } else {
            for (y, x) in y.iter_mut().zip(x) {
                *y = x * w + b;
            }
        }
    }
}

/// `partial` gets (Σ h·x̂, Σ h) for each channel, where h is the gradient of the norm's result.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn backward(
    [x, g]: [&[f32]; 2],
    parameters: Parameters,
    moments: &[f32],
    activated: bool,
    (dx, partial): (&mut [f32], &mut [f32]),
) {
    let (mean, inverse) = (moments[0], moments[1]);
    let pixels = x.len() / parameters.weight.len();
    let (mut first, mut second) = (0.0, 0.0);
    for (((((x, g), h), partial), w), b) in x
        .chunks_exact(pixels)
        .zip(g.chunks_exact(pixels))
        .zip(dx.chunks_exact_mut(pixels))
        .zip(partial.chunks_exact_mut(2))
        .zip(parameters.weight)
        .zip(parameters.bias)
    {
        if activated {
            let (scale, shift) = (inverse * w, b - mean * inverse * w);
            for ((h, x), g) in h.iter_mut().zip(x).zip(g) {
                *h = g * Silu::slope(x * scale + shift);
            }
        } else {
            h.copy_from_slice(g);
        }
        let (mut product, mut sum) = (0.0, 0.0);
        for (h, x) in h.chunks(BLOCK).zip(x.chunks(BLOCK)) {
            product += simd::sum_pairs(h, x, |h, x| h * (x - mean)) as f64;
            sum += simd::sum(h, |v| v) as f64;
        }
        let product = product * inverse as f64;
        partial.copy_from_slice(&[product as f32, sum as f32]);
        first += sum * *w as f64;
        second += product * *w as f64;
    }
    let first = (first / x.len() as f64) as f32;
    let second = (second / x.len() as f64) as f32;
    for ((x, dx), w) in x
        .chunks_exact(pixels)
        .zip(dx.chunks_exact_mut(pixels))
        .zip(parameters.weight)
    {
        for (dx, x) in dx.iter_mut().zip(x) {
            *dx = (*dx * w - first - (x - mean) * inverse * second) * inverse;
        }
    }
}
