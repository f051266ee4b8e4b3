//! Layer norm, root-mean-square norm and group norm.

use candle_core::{DType, Result, Tensor};

use super::{Arg, Card, Grid, adjacent, at, int, kept, maybe, maybe_buffer, row_places};
use crate::nn::shapes;
use crate::nn::vjp::record;

/// `(x − mean) / √(variance + eps)`, or `x / √(mean(x²) + eps)` if not `centred`, over the last dimension; times
/// `weight`, plus `bias`.
pub fn norm(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
    centred: bool,
) -> Result<Tensor> {
    let width = shapes::norm(x, weight.into_iter().chain(bias))?;
    let (card, dtype, rows) = (Card::of(x)?, x.dtype(), x.elem_count() / width);
    let x_kept = adjacent(x)?;
    let weight_kept = weight.map(kept).transpose()?;
    let bias_kept = bias.map(kept).transpose()?;
    let y = card.buffer(rows * width, dtype)?;
    // Mean and 1/deviation of each row.
    let moments = card.buffer(2 * rows, DType::F32)?;
    let mut args = vec![Arg::from(&y), Arg::from(&moments), at(&x_kept)?];
    args.extend([maybe(weight_kept.as_ref())?, maybe(bias_kept.as_ref())?]);
    args.extend([int(rows)?, int(width)?, eps.into(), centred.into()]);
    args.extend(row_places(&x_kept)?);
    // SAFETY: `x` has `rows` rows at these places, `y` too; there are two moments a row, and the parameters are as
    // wide.
    unsafe { card.launch("norm_forward", dtype, Grid::rows(rows, width), &args) }?;
    let wanted = (
        x.track_op(),
        weight.is_some_and(Tensor::track_op),
        bias.is_some_and(Tensor::track_op),
    );
    let inputs: Vec<&Tensor> = [x].into_iter().chain(weight).chain(bias).collect();
    record(&inputs, y.into_storage(), x.shape(), move |g| {
        let card = Card::of(g)?;
        let places = row_places(&x_kept)?;
        let mut gradients = Vec::new();
        if wanted.0 {
            let dx = card.buffer(rows * width, dtype)?;
            let mut args = vec![Arg::from(&dx), at(g)?, at(&x_kept)?];
            args.extend([maybe(weight_kept.as_ref())?, Arg::from(&moments)]);
            args.extend([int(rows)?, int(width)?, centred.into()]);
            args.extend(places);
            // SAFETY: as in the forward pass; `g` and `dx` have the shape of `x`.
            unsafe { card.launch("norm_backward", dtype, Grid::rows(rows, width), &args) }?;
            gradients.push(dx.tensor(g.shape()));
        }
        if wanted.1 || wanted.2 {
            let new = |wanted: bool| wanted.then(|| card.buffer(width, dtype)).transpose();
            let (dweight, dbias) = (new(wanted.1)?, new(wanted.2)?);
            let mut args = vec![
                maybe_buffer(dweight.as_ref()),
                maybe_buffer(dbias.as_ref()),
                at(g)?,
                at(&x_kept)?,
                Arg::from(&moments),
                int(rows)?,
                int(width)?,
            ];
            args.extend(places);
            // SAFETY: as in the forward pass; the sums are as wide as a row.
            unsafe { card.launch("norm_parameters", dtype, Grid::columns(width, 1), &args) }?;
            let both = [dweight, dbias].into_iter().flatten();
            gradients.extend(both.map(|sums| sums.tensor(width)));
        }
        Ok(gradients)
    })
}

/// See [`crate::nn::ops::group_norm`]; followed by SiLU if `silu`.
pub fn group_norm(
    x: &Tensor,
    groups: usize,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
    silu: bool,
) -> Result<Tensor> {
    const THREADS: u32 = 512;
    let (b, c) = shapes::group_norm(x, groups, weight, bias)?;
    let (count, inner) = (x.elem_count(), x.elem_count() / (b * c).max(1));
    let (card, dtype) = (Card::of(x)?, x.dtype());
    let (x_kept, weight_kept, bias_kept) = (kept(x)?, kept(weight)?, kept(bias)?);
    let y = card.buffer(count, dtype)?;
    let moments = card.buffer(2 * b * groups, DType::F32)?;
    let sizes = [int(groups)?, int(c / groups)?, int(inner)?];
    let grid = Grid::blocks(b * groups, (THREADS, 1));
    let mut args = vec![Arg::from(&y), Arg::from(&moments), at(&x_kept)?];
    args.extend([at(&weight_kept)?, at(&bias_kept)?]);
    args.extend(sizes);
    args.extend([Arg::from(eps), silu.into()]);
    // SAFETY: `x` and `y` have `b · groups` groups of these sizes, with two moments each; the parameters were
    // checked.
    unsafe { card.launch("group_norm_forward", dtype, grid, &args) }?;
    let wanted = [x.track_op(), weight.track_op(), bias.track_op()];
    let storage = y.into_storage();
    record(&[x, weight, bias], storage, x.shape(), move |g| {
        let card = Card::of(g)?;
        let mut shared = vec![at(g)?, at(&x_kept)?, at(&weight_kept)?, at(&bias_kept)?];
        shared.push(Arg::from(&moments));
        let mut gradients = Vec::new();
        if wanted[0] {
            let dx = card.buffer(count, dtype)?;
            let mut args = vec![Arg::from(&dx)];
            args.extend(&shared);
            args.extend(sizes);
            args.push(silu.into());
            // SAFETY: as in the forward pass; `g` and `dx` have the shape of `x`.
            unsafe { card.launch("group_norm_backward", dtype, grid, &args) }?;
            gradients.push(dx.tensor(g.shape()));
        }
        if wanted[1] || wanted[2] {
            let new = |wanted: bool| wanted.then(|| card.buffer(c, dtype)).transpose();
            let (dweight, dbias) = (new(wanted[1])?, new(wanted[2])?);
            let mut args = vec![maybe_buffer(dweight.as_ref()), maybe_buffer(dbias.as_ref())];
            args.extend(&shared);
            args.push(int(b)?);
            args.extend(sizes);
            args.push(silu.into());
            let grid = Grid::blocks(c, (THREADS, 1));
            // SAFETY: as in the forward pass; the sums have a value for each channel.
            unsafe { card.launch("group_norm_parameters", dtype, grid, &args) }?;
            let both = [dweight, dbias].into_iter().flatten();
            gradients.extend(both.map(|sums| sums.tensor(c)));
        }
        Ok(gradients)
    })
}
