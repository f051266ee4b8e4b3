//! Operations between a sequence (b, n, c) and one vector per image (b, c), dropout, nearest-neighbour upsampling, and
//! random weights.

use candle_core::{DType, Device, Result, Shape, Tensor};

use super::{Arg, Buffer, Card, Grid, adjacent, at, int, kept, maybe_buffer};
use crate::nn::shapes::{sequence, two_sequences};
use crate::nn::vjp::record;

/// How far the rows of `vectors` (b, c) lie apart.
fn apart(vectors: &Tensor) -> Arg {
    Arg::Long(vectors.stride()[0] as i64)
}

/// Σ g and Σ g·x over the rows of each image, (b, c), as far as they are wanted.
fn column_sums(
    g: &Tensor,
    x: &Tensor,
    (plain, scaled): (bool, bool),
) -> Result<[Option<Tensor>; 2]> {
    let (b, n, c) = g.dims3()?;
    let card = Card::of(g)?;
    let new = |wanted: bool| wanted.then(|| card.buffer(b * c, g.dtype())).transpose();
    let sums: [Option<Buffer>; 2] = [new(plain)?, new(scaled)?];
    if plain || scaled {
        let [plain, scaled] = sums.each_ref().map(|sum| maybe_buffer(sum.as_ref()));
        let args = [plain, scaled, at(g)?, at(x)?, int(n)?, int(c)?];
        // SAFETY: `g` and `x` are (b, n, c), each sum is (b, c) or not there.
        unsafe { card.launch("column_sums", g.dtype(), Grid::columns(c, b), &args) }?;
    }
    Ok(sums.map(|sum| sum.map(|sum| sum.tensor((b, c)))))
}

/// x · (1 + scale), plus `shift` where there is one.
fn scaled(x: &Tensor, shift: Option<&Tensor>, scale: &Tensor) -> Result<Buffer> {
    let (_, n, c) = x.dims3()?;
    let (card, count) = (Card::of(x)?, x.elem_count());
    let y = card.buffer(count, x.dtype())?;
    let (shift_at, shift_apart) = match shift {
        Some(shift) => (at(shift)?, apart(shift)),
        None => (Arg::At(0), Arg::Long(0)),
    };
    let mut args = vec![Arg::from(&y), at(x)?, shift_at, at(scale)?];
    args.extend([int(count)?, int(n)?, int(c)?, shift_apart, apart(scale)]);
    // SAFETY: `x` and `y` are (b, n, c), and the vectors have b rows of c that lie so far apart.
    unsafe { card.launch("modulate", x.dtype(), Grid::each(count), &args) }?;
    Ok(y)
}

/// See [`crate::nn::ops::modulate`].
pub fn modulate(x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
    sequence(x, &[shift, scale])?;
    let (x_kept, scale_kept) = (kept(x)?, adjacent(scale)?);
    let y = scaled(&x_kept, Some(&adjacent(shift)?), &scale_kept)?;
    let wanted = [x.track_op(), shift.track_op(), scale.track_op()];
    let storage = y.into_storage();
    record(&[x, shift, scale], storage, x.shape(), move |g| {
        let mut gradients = Vec::new();
        if wanted[0] {
            gradients.push(scaled(g, None, &scale_kept)?.tensor(g.shape()));
        }
        let sums = column_sums(g, &x_kept, (wanted[1], wanted[2]))?;
        gradients.extend(sums.into_iter().flatten());
        Ok(gradients)
    })
}

/// gate · y, plus `x` where there is one.
fn gate(x: Option<&Tensor>, gate: &Tensor, y: &Tensor) -> Result<Buffer> {
    let (_, n, c) = y.dims3()?;
    let (card, count) = (Card::of(y)?, y.elem_count());
    let out = card.buffer(count, y.dtype())?;
    let mut args = vec![Arg::from(&out), super::maybe(x)?, at(gate)?, at(y)?];
    args.extend([int(count)?, int(n)?, int(c)?, apart(gate)]);
    // SAFETY: `x`, `y` and the sum are (b, n, c), and the gates have b rows of c that lie so far apart.
    unsafe { card.launch("gate_residual", y.dtype(), Grid::each(count), &args) }?;
    Ok(out)
}

/// See [`crate::nn::ops::gated_residual`].
pub fn gated_residual(x: &Tensor, gates: &Tensor, y: &Tensor) -> Result<Tensor> {
    two_sequences(x, y, &[gates])?;
    let (gates_kept, y_kept) = (adjacent(gates)?, kept(y)?);
    let sum = gate(Some(&kept(x)?), &gates_kept, &y_kept)?;
    let wanted = [x.track_op(), gates.track_op(), y.track_op()];
    let storage = sum.into_storage();
    record(&[x, gates, y], storage, x.shape(), move |g| {
        let mut gradients = Vec::new();
        if wanted[0] {
            gradients.push(g.clone());
        }
        let [_, dgates] = column_sums(g, &y_kept, (false, wanted[1]))?;
        gradients.extend(dgates);
        if wanted[2] {
            gradients.push(gate(None, &gates_kept, g)?.tensor(g.shape()));
        }
        Ok(gradients)
    })
}

/// Each element of `x` zero with probability `p`, the others divided by 1 − p; plus `onto` where there is one. Which
/// are zero follows from `seed` and their places.
pub fn dropout(x: &Tensor, onto: Option<&Tensor>, p: f64, seed: u64) -> Result<Tensor> {
    if onto.is_some_and(|onto| onto.dims() != x.dims()) {
        candle_core::bail!("{:?} added to {:?}", x.dims(), onto.map(Tensor::dims));
    }
    let drop = move |x: &Tensor, onto: Option<&Tensor>| -> Result<Buffer> {
        let (card, count) = (Card::of(x)?, x.elem_count());
        let y = card.buffer(count, x.dtype())?;
        let threshold = Arg::Bits((p * (1u64 << 32) as f64) as u32);
        let mut args = vec![Arg::from(&y), at(x)?, super::maybe(onto)?, int(count)?];
        args.extend([
            Arg::Long(seed.cast_signed()),
            threshold,
            (1.0 / (1.0 - p)).into(),
        ]);
        // SAFETY: all have `count` elements, or are not there.
        unsafe { card.launch("dropout", x.dtype(), Grid::each(count), &args) }?;
        Ok(y)
    };
    let onto_kept = onto.map(kept).transpose()?;
    let y = drop(&kept(x)?, onto_kept.as_ref())?.into_storage();
    let wanted = (x.track_op(), onto.is_some_and(Tensor::track_op));
    let inputs: Vec<&Tensor> = [x].into_iter().chain(onto).collect();
    record(&inputs, y, x.shape(), move |g| {
        let mut gradients = Vec::new();
        if wanted.0 {
            gradients.push(drop(g, None)?.tensor(g.shape()));
        }
        if wanted.1 {
            gradients.push(g.clone());
        }
        Ok(gradients)
    })
}

/// See [`crate::nn::ops::upsample_nearest2x`].
pub fn upsample_nearest2x(x: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    let (card, dtype, count) = (Card::of(x)?, x.dtype(), x.elem_count());
    let (x_kept, y) = (kept(x)?, card.buffer(4 * count, dtype)?);
    let mut args = vec![Arg::from(&y), at(&x_kept)?, int(4 * count)?];
    args.extend([int(h)?, int(w)?]);
    // SAFETY: `y` has `4 · count` elements in planes of 2h x 2w, `x` a quarter of them.
    unsafe { card.launch("upsample", dtype, Grid::each(4 * count), &args) }?;
    let storage = y.into_storage();
    record(&[x], storage, (b, c, 2 * h, 2 * w), move |g| {
        let card = Card::of(g)?;
        let dx = card.buffer(count, dtype)?;
        let args = [Arg::from(&dx), at(g)?, int(count)?, int(h)?, int(w)?];
        // SAFETY: `dx` has `count` elements in planes of h x w, `g` four times as many.
        unsafe { card.launch("upsample_backward", dtype, Grid::each(count), &args) }?;
        Ok(vec![dx.tensor((b, c, h, w))])
    })
}

/// A tensor in f32 of N(0, `deviation`²), which follows from `seed`.
pub fn normal(shape: &Shape, deviation: f64, seed: u64, device: &Device) -> Result<Tensor> {
    let (card, count) = (Card::new(device)?, shape.elem_count());
    let values = card.buffer(count, DType::F32)?;
    let seed = Arg::Long(seed.cast_signed());
    let args = [Arg::from(&values), int(count)?, seed, deviation.into()];
    // SAFETY: there is room for `count` values.
    unsafe { card.launch("normal", DType::F32, Grid::each(count), &args) }?;
    Ok(values.tensor(shape))
}
