//! Layer norm and root-mean-square norm over the last dimension: the same operation with and without the mean.

use candle_core::{Result, Tensor};
use multiversion::multiversion;

use super::{add_rows, detached, pairs, simd, tensor, values};
use crate::nn::shapes;
use crate::nn::vjp::record;

/// Rows of one piece of work, and of one partial sum of the weights' gradients.
const ROWS: usize = 64;

/// `(x − mean) / √(variance + eps)`, or `x / √(mean(x²) + eps)` if not `centred`; times `weight`, plus `bias`.
pub fn norm(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
    centred: bool,
) -> Result<Tensor> {
    let width = shapes::norm(x, weight.into_iter().chain(bias))?;
    let kept = detached(x)?;
    let weight_kept = weight.map(detached).transpose()?;
    let rows = x.elem_count() / width;
    // With mean and 1/deviation of each row.
    let (y, moments) = {
        let x = values(&kept)?;
        let weight = weight_kept.as_ref().map(values).transpose()?;
        let bias_kept = bias.map(detached).transpose()?;
        let bias = bias_kept.as_ref().map(values).transpose()?;
        pairs(
            (x.len(), ROWS * width),
            (2 * rows, ROWS * 2),
            |i, y, moments| {
                let x = &x[i * ROWS * width..][..y.len()];
                forward(
                    x,
                    weight.as_deref(),
                    bias.as_deref(),
                    eps as f32,
                    centred,
                    (y, moments),
                );
            },
        )
    };
    let wanted = (
        x.track_op(),
        weight.is_some_and(Tensor::track_op),
        bias.is_some_and(Tensor::track_op),
    );
    let inputs: Vec<&Tensor> = [x].into_iter().chain(weight).chain(bias).collect();
    record(&inputs, y, x.shape(), move |gradient| {
        let (x, g) = (values(&kept)?, values(gradient)?);
        let weight = weight_kept.as_ref().map(values).transpose()?;
        // Sums that nobody wants are not taken.
        let of_parameters = match wanted.1 || wanted.2 {
            true => 2 * width,
            false => 0,
        };
        let (dx, partial) = pairs(
            (x.len(), ROWS * width),
            (rows.div_ceil(ROWS) * of_parameters, of_parameters),
            |i, dx, partial| {
                let piece = i * ROWS * width..i * ROWS * width + dx.len();
                let moments = &moments[i * ROWS * 2..][..dx.len() / width * 2];
                backward(
                    &x[piece.clone()],
                    &g[piece],
                    weight.as_deref(),
                    moments,
                    centred,
                    (dx, partial),
                );
            },
        );
        let mut gradients = Vec::new();
        if wanted.0 {
            gradients.push(tensor(dx, kept.shape())?);
        }
        let sums = add_rows(&partial, 2 * width);
        if wanted.1 {
            gradients.push(tensor(sums[..width].to_vec(), width)?);
        }
        if wanted.2 {
            gradients.push(tensor(sums[width..].to_vec(), width)?);
        }
        Ok(gradients)
    })
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn forward(
    x: &[f32],
    weight: Option<&[f32]>,
    bias: Option<&[f32]>,
    eps: f32,
    centred: bool,
    (y, moments): (&mut [f32], &mut [f32]),
) {
    let width = 2 * x.len() / moments.len();
    for ((x, y), moments) in x
        .chunks_exact(width)
        .zip(y.chunks_exact_mut(width))
        .zip(moments.chunks_exact_mut(2))
    {
        let mean = if centred {
            simd::sum(x, |v| v) / width as f32
        } else {
            0.0
        };
        let variance = simd::sum(x, |v| (v - mean) * (v - mean)) / width as f32;
        let inverse = 1.0 / (variance + eps).sqrt();
        moments.copy_from_slice(&[mean, inverse]);
        match (weight, bias) {
            (Some(weight), Some(bias)) => {
                for (((y, x), w), b) in y.iter_mut().zip(x).zip(weight).zip(bias) {
                    *y = (x - mean) * inverse * w + b;
                }
            }
            (Some(weight), None) => {
                for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                    *y = (x - mean) * inverse * w;
                }
            }
            (None, bias) => {
                for (y, x) in y.iter_mut().zip(x) {
                    *y = (x - mean) * inverse;
                }
                for (y, b) in y.iter_mut().zip(bias.unwrap_or_default()) {
                    *y += b;
                }
            }
        }
    }
}

/// With x̂ the normalised row and h = g · weight: dx = (h − [mean(h)] − x̂ · mean(h · x̂)) / deviation. The gradients of
/// weight and bias, Σ g·x̂ and Σ g, are added to the two halves of `partial`, if it is not empty.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn backward(
    x: &[f32],
    g: &[f32],
    weight: Option<&[f32]>,
    moments: &[f32],
    centred: bool,
    (dx, partial): (&mut [f32], &mut [f32]),
) {
    let width = 2 * x.len() / moments.len();
    let (weight_sum, bias_sum) = partial.split_at_mut(partial.len() / 2);
    let mut normal = vec![0.0; width];
    for (((x, g), dx), moments) in x
        .chunks_exact(width)
        .zip(g.chunks_exact(width))
        .zip(dx.chunks_exact_mut(width))
        .zip(moments.chunks_exact(2))
    {
        let (mean, inverse) = (moments[0], moments[1]);
        for (n, x) in normal.iter_mut().zip(x) {
            *n = (x - mean) * inverse;
        }
        let sums = weight_sum.iter_mut().zip(bias_sum.iter_mut());
        for (((ws, bs), n), g) in sums.zip(&normal).zip(g) {
            *ws += g * n;
            *bs += g;
        }
        match weight {
            Some(weight) => {
                for ((dx, g), w) in dx.iter_mut().zip(g).zip(weight) {
                    *dx = g * w;
                }
            }
            None => dx.copy_from_slice(g),
        }
        let first = if centred {
            simd::sum(dx, |v| v) / width as f32
        } else {
            0.0
        };
        let second = simd::sum_pairs(dx, &normal, |h, n| h * n) / width as f32;
        for (dx, n) in dx.iter_mut().zip(&normal) {
            *dx = (*dx - first - n * second) * inverse;
        }
    }
}
