//! Activations and gated activations, elementwise.

use candle_core::{Result, Tensor};

use super::{Arg, Card, Grid, at, int, kept, maybe_buffer};
use crate::nn::shapes::check_gate;
use crate::nn::vjp::record;

/// Which function; kernels.cu knows them by these numbers.
#[derive(Debug, Clone, Copy)]
pub enum Activation {
    /// `x · sigmoid(x)`
    Silu = 0,
    /// GELU in the tanh approximation.
    Gelu = 1,
    /// GELU with the error function.
    GeluErf = 2,
    /// `x · sigmoid(1.702·x)`
    QuickGelu = 3,
}

impl From<Activation> for Arg {
    fn from(activation: Activation) -> Self {
        Arg::Int(activation as i32)
    }
}

/// A(x).
pub fn activation(x: &Tensor, kind: Activation) -> Result<Tensor> {
    let (card, dtype, count) = (Card::of(x)?, x.dtype(), x.elem_count());
    let x_kept = kept(x)?;
    let y = card.buffer(count, dtype)?;
    let grid = Grid::each(count);
    let args = [Arg::from(&y), at(&x_kept)?, int(count)?, kind.into()];
    // SAFETY: `x` and `y` have `count` elements.
    unsafe { card.launch("activate", dtype, grid, &args) }?;
    record(&[x], y.into_storage(), x.shape(), move |g| {
        let card = Card::of(g)?;
        let dx = card.buffer(count, dtype)?;
        let args = [
            Arg::from(&dx),
            at(&x_kept)?,
            at(g)?,
            int(count)?,
            kind.into(),
        ];
        // SAFETY: `x`, the gradient and `dx` have `count` elements.
        unsafe { card.launch("activate_backward", dtype, grid, &args) }?;
        Ok(vec![dx.tensor(g.shape())])
    })
}

/// A(gate) · up.
pub fn gated(gate: &Tensor, up: &Tensor, kind: Activation) -> Result<Tensor> {
    check_gate(gate, up)?;
    let (card, dtype, count) = (Card::of(gate)?, gate.dtype(), gate.elem_count());
    let (gate_kept, up_kept) = (kept(gate)?, kept(up)?);
    let y = card.buffer(count, dtype)?;
    let grid = Grid::each(count);
    let mut args = vec![Arg::from(&y), at(&gate_kept)?, at(&up_kept)?];
    args.extend([int(count)?, kind.into()]);
    // SAFETY: the gate, the values (of its shape, as was checked) and `y` have `count` elements.
    unsafe { card.launch("gated", dtype, grid, &args) }?;
    let wanted = (gate.track_op(), up.track_op());
    record(&[gate, up], y.into_storage(), gate.shape(), move |g| {
        let card = Card::of(g)?;
        let new = |wanted: bool| wanted.then(|| card.buffer(count, dtype)).transpose();
        let (dgate, dup) = (new(wanted.0)?, new(wanted.1)?);
        let mut args = vec![maybe_buffer(dgate.as_ref()), maybe_buffer(dup.as_ref())];
        args.extend([at(&gate_kept)?, at(&up_kept)?, at(g)?]);
        args.extend([int(count)?, kind.into()]);
        // SAFETY: all have `count` elements, or are not there.
        unsafe { card.launch("gated_backward", dtype, grid, &args) }?;
        let both = [dgate, dup].into_iter().flatten();
        Ok(both.map(|gradient| gradient.tensor(g.shape())).collect())
    })
}
