//! Softmax over the last dimension, and the cross-entropy of it.

use candle_core::{DType, Result, Tensor};

use super::{Arg, Card, Grid, at, int, kept};
use crate::nn::vjp::{record, record_with_result};

/// See [`crate::nn::ops::softmax`].
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    let width = x.dims().last().copied().unwrap_or(1).max(1);
    let (card, dtype, rows) = (Card::of(x)?, x.dtype(), x.elem_count() / width);
    let (x_kept, y) = (kept(x)?, card.buffer(rows * width, dtype)?);
    let grid = Grid::rows(rows, width);
    let args = [Arg::from(&y), at(&x_kept)?, int(rows)?, int(width)?];
    // SAFETY: `x` and `y` are (rows, width).
    unsafe { card.launch("softmax_forward", dtype, grid, &args) }?;
    let storage = y.into_storage();
    record_with_result(&[x], storage, x.shape(), move |y, g| {
        let card = Card::of(g)?;
        let dx = card.buffer(rows * width, dtype)?;
        let args = [Arg::from(&dx), at(y)?, at(g)?, int(rows)?, int(width)?];
        // SAFETY: all three are (rows, width).
        unsafe { card.launch("softmax_backward", dtype, grid, &args) }?;
        Ok(vec![dx.tensor(g.shape())])
    })
}

/// See [`crate::nn::ops::cross_entropy`]. The loss of a target that is no column is not a number.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let (n, width) = logits.dims2()?;
    if targets.dims() != [n] {
        candle_core::bail!(
            "targets {:?} for logits {:?}",
            targets.dims(),
            logits.dims()
        );
    }
    let (card, dtype) = (Card::of(logits)?, logits.dtype());
    let kept_logits = kept(logits)?;
    let targets = targets
        .to_device(logits.device())?
        .to_dtype(DType::U32)?
        .contiguous()?;
    let losses = card.buffer(n, DType::F32)?;
    let log_sums = card.buffer(n, DType::F32)?;
    let grid = Grid::rows(n, width);
    let mut args = vec![Arg::from(&losses), Arg::from(&log_sums), at(&kept_logits)?];
    args.extend([at(&targets)?, int(n)?, int(width)?]);
    // SAFETY: the logits are (n, width), and there are n targets, losses and sums; targets are checked there.
    unsafe { card.launch("cross_entropy_forward", dtype, grid, &args) }?;
    record(&[logits], losses.into_storage(), n, move |g| {
        let card = Card::of(g)?;
        let dx = card.buffer(n * width, dtype)?;
        let mut args = vec![Arg::from(&dx), at(&kept_logits)?, Arg::from(&log_sums)];
        args.extend([at(g)?, at(&targets)?, int(n)?, int(width)?]);
        // SAFETY: as in the forward pass; `dx` has the shape of the logits.
        unsafe { card.launch("cross_entropy_backward", dtype, grid, &args) }?;
        Ok(vec![dx.tensor((n, width))])
    })
}
