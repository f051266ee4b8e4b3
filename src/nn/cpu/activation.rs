//! Activations and gated activations, elementwise.

use candle_core::{Result, Tensor};
use multiversion::multiversion;

use super::{PIECE, detached, pairs, pieces, simd, tensor, values};
use crate::nn::shapes::check_gate;
use crate::nn::vjp::record;

/// A function of one number with its derivative.
pub trait Activation: Send + Sync + 'static {
    fn value(x: f32) -> f32;
    fn slope(x: f32) -> f32;
    /// Both at once, sharing what they have in common.
    fn both(x: f32) -> (f32, f32);
}

/// `x · sigmoid(factor · x)`.
#[inline(always)]
fn swish(x: f32, factor: f32) -> (f32, f32) {
    let s = simd::sigmoid(factor * x);
    (x * s, s + factor * x * s * (1.0 - s))
}

pub struct Silu;

impl Activation for Silu {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        x * simd::sigmoid(x)
    }
    #[inline(always)]
    fn slope(x: f32) -> f32 {
        swish(x, 1.0).1
    }
    #[inline(always)]
    fn both(x: f32) -> (f32, f32) {
        swish(x, 1.0)
    }
}

pub struct QuickGelu;

impl Activation for QuickGelu {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        x * simd::sigmoid(1.702 * x)
    }
    #[inline(always)]
    fn slope(x: f32) -> f32 {
        swish(x, 1.702).1
    }
    #[inline(always)]
    fn both(x: f32) -> (f32, f32) {
        swish(x, 1.702)
    }
}

/// The tanh approximation: since (1 + tanh u)/2 = sigmoid(2u), it is x · sigmoid(2u) with u = √(2/π)(x + 0.044715x³).
pub struct Gelu;

/// 2·√(2/π).
const TWICE: f32 = 1.595_769;

impl Activation for Gelu {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        x * simd::sigmoid(TWICE * x * (1.0 + 0.044_715 * x * x))
    }
    #[inline(always)]
    fn slope(x: f32) -> f32 {
        Self::both(x).1
    }
    #[inline(always)]
    fn both(x: f32) -> (f32, f32) {
        let s = simd::sigmoid(TWICE * x * (1.0 + 0.044_715 * x * x));
        let inner = TWICE * (1.0 + 0.134_145 * x * x);
        (x * s, s + x * s * (1.0 - s) * inner)
    }
}

/// x · Φ(x).
pub struct GeluErf;

impl Activation for GeluErf {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        x * simd::normal_cdf(x)
    }
    #[inline(always)]
    fn slope(x: f32) -> f32 {
        Self::both(x).1
    }
    #[inline(always)]
    fn both(x: f32) -> (f32, f32) {
        const DENSITY: f32 = 0.398_942_3;
        let p = simd::normal_cdf(x);
        (x * p, p + x * DENSITY * simd::exp(-0.5 * x * x))
    }
}

/// A(x).
pub fn activation<A: Activation>(x: &Tensor) -> Result<Tensor> {
    let kept = detached(x)?;
    let y = {
        let x = values(&kept)?;
        pieces(x.len(), PIECE, |i, y| {
            forward::<A>(&x[i * PIECE..][..y.len()], y)
        })
    };
    record(&[x], y, x.shape(), move |gradient| {
        let (x, g) = (values(&kept)?, values(gradient)?);
        let dx = pieces(x.len(), PIECE, |i, dx| {
            let from = i * PIECE;
            let until = from + dx.len();
            backward::<A>(&x[from..until], &g[from..until], dx);
        });
        Ok(vec![tensor(dx, kept.shape())?])
    })
}

/// A(gate) · up.
pub fn gated<A: Activation>(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    check_gate(gate, up)?;
    let (gate_kept, up_kept) = (detached(gate)?, detached(up)?);
    let y = {
        let (gate, up) = (values(&gate_kept)?, values(&up_kept)?);
        pieces(gate.len(), PIECE, |i, y| {
            let from = i * PIECE;
            let until = from + y.len();
            gated_forward::<A>(&gate[from..until], &up[from..until], y);
        })
    };
    let wanted = (gate.track_op(), up.track_op());
    record(&[gate, up], y, gate.shape(), move |gradient| {
        let (gate, up, g) = (values(&gate_kept)?, values(&up_kept)?, values(gradient)?);
        let size = (g.len(), PIECE);
        let (gate_gradient, up_gradient) = pairs(size, size, |i, dgate, dup| {
            let from = i * PIECE;
            let until = from + dgate.len();
            gated_backward::<A>(
                [&gate[from..until], &up[from..until], &g[from..until]],
                dgate,
                dup,
            );
        });
        let mut gradients = Vec::new();
        if wanted.0 {
            gradients.push(tensor(gate_gradient, gate_kept.shape())?);
        }
        if wanted.1 {
            gradients.push(tensor(up_gradient, gate_kept.shape())?);
        }
        Ok(gradients)
    })
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn forward<A: Activation>(x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = A::value(*x);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn backward<A: Activation>(x: &[f32], g: &[f32], dx: &mut [f32]) {
    for ((dx, x), g) in dx.iter_mut().zip(x).zip(g) {
        *dx = g * A::slope(*x);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn gated_forward<A: Activation>(gate: &[f32], up: &[f32], y: &mut [f32]) {
    for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
        *y = A::value(*gate) * up;
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn gated_backward<A: Activation>([gate, up, g]: [&[f32]; 3], dgate: &mut [f32], dup: &mut [f32]) {
    let outputs = dgate.iter_mut().zip(dup);
    for ((((dgate, dup), gate), up), g) in outputs.zip(gate).zip(up).zip(g) {
        let (value, slope) = A::both(*gate);
        *dgate = g * up * slope;
        *dup = g * value;
    }
}
