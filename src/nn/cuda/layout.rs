//! Copies, sums, parts and joins, and the gathering of gradients.

use candle_core::{DType, Result, Shape, Tensor};

use super::{Arg, Buffer, Card, Grid, at, extent, int, kept, strides};
use crate::nn::slot::Place;
use crate::nn::vjp::record;

/// Four dimensions of a tensor, with leading ones of 1, and where its elements are.
#[derive(Clone, Copy)]
struct Spread {
    at: Arg,
    /// Elements that there are from `at` on.
    count: usize,
    strides: [usize; 4],
}

/// `dims` with ones before them; nothing if there are more than four.
fn four(dims: &[usize]) -> Option<[usize; 4]> {
    let mut all = [1; 4];
    let first = all.len().checked_sub(dims.len())?;
    all[first..].copy_from_slice(dims);
    Some(all)
}

impl Spread {
    fn of(tensor: &Tensor) -> Result<Self> {
        let mut strides = [0; 4];
        let first = strides.len().saturating_sub(tensor.rank());
        strides[first..].copy_from_slice(tensor.stride());
        Ok(Self {
            at: at(tensor)?,
            count: extent(tensor.dims(), tensor.stride()),
            strides,
        })
    }

    /// `dims` one after the other, from element `start` of `buffer` on.
    fn new(buffer: &Buffer, start: usize, strides: [usize; 4]) -> Self {
        let bytes = start * buffer.dtype().size_in_bytes();
        Self {
            at: Arg::At(buffer.at() + bytes as u64),
            count: buffer.count().saturating_sub(start),
            strides,
        }
    }
}

fn contiguous([_, n1, n2, n3]: [usize; 4]) -> [usize; 4] {
    [n1 * n2 * n3, n2 * n3, n3, 1]
}

/// Copies or adds `from` to `to`, both of dimensions `dims`.
fn transfer(
    card: Card,
    dtype: DType,
    dims: [usize; 4],
    to: Spread,
    from: Spread,
    adds: bool,
) -> Result<()> {
    let count: usize = dims.iter().product();
    for place in [&to, &from] {
        if count > 0 && extent(&dims, &place.strides) > place.count {
            candle_core::bail!(
                "{dims:?} elements, {:?} apart, in memory of {}",
                place.strides,
                place.count
            );
        }
    }
    let mut args = vec![to.at, from.at, int(count)?];
    args.extend([int(dims[1])?, int(dims[2])?, int(dims[3])?, adds.into()]);
    args.extend(strides(to.strides));
    args.extend(strides(from.strides));
    // SAFETY: both places hold `dims` elements with their strides.
    unsafe { card.launch("transfer", dtype, Grid::each(count), &args) }
}

/// The values of `tensor` one after the other.
fn copy_buffer(tensor: &Tensor) -> Result<Buffer> {
    let tensor = match tensor.rank() {
        0..=4 => tensor.detach(),
        _ => tensor.detach().contiguous()?.flatten_all()?,
    };
    let dims = four(tensor.dims()).unwrap_or([1; 4]);
    let card = Card::of(&tensor)?;
    let copy = card.buffer(tensor.elem_count(), tensor.dtype())?;
    let to = Spread::new(&copy, 0, contiguous(dims));
    transfer(card, copy.dtype(), dims, to, Spread::of(&tensor)?, false)?;
    Ok(copy)
}

/// A contiguous copy of `tensor`, off the tape.
pub fn copy(tensor: &Tensor) -> Result<Tensor> {
    Ok(copy_buffer(tensor)?.tensor(tensor.shape()))
}

/// See [`crate::nn::layout::contiguous`]; `x` is not.
pub fn contiguous_copy(x: &Tensor) -> Result<Tensor> {
    let copy = copy_buffer(x)?.into_storage();
    record(&[x], copy, x.shape(), |gradient| Ok(vec![gradient.clone()]))
}

/// `x + y`, of equal shapes, in memory of its own.
pub fn sum(x: &Tensor, y: &Tensor) -> Result<Buffer> {
    let (x, y) = (kept(x)?, kept(y)?);
    let (card, count) = (Card::of(&x)?, x.elem_count());
    let sum = card.buffer(count, x.dtype())?;
    let args = [Arg::from(&sum), at(&x)?, at(&y)?, int(count)?];
    // SAFETY: all three have `count` elements.
    unsafe { card.launch("add", x.dtype(), Grid::each(count), &args) }?;
    Ok(sum)
}

/// See [`crate::nn::layout::add`].
pub fn add(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let sum = sum(x, y)?.into_storage();
    let count = [x, y].into_iter().filter(|t| t.track_op()).count();
    record(&[x, y], sum, x.shape(), move |gradient| {
        Ok(vec![gradient.clone(); count])
    })
}

/// See [`crate::nn::layout::merge_heads`].
pub fn merge_heads(x: &Tensor) -> Result<Tensor> {
    let (b, heads, n, d) = x.dims4()?;
    let turned = x.detach().transpose(1, 2)?;
    if !x.track_op() && turned.is_contiguous() {
        return turned.reshape((b, n, heads * d));
    }
    let merged = copy_buffer(&turned)?.into_storage();
    record(&[x], merged, (b, n, heads * d), move |gradient| {
        Ok(vec![gradient.reshape((b, n, heads, d))?.transpose(1, 2)?])
    })
}

/// See [`crate::nn::layout::join`]; both have at most four dimensions.
pub fn join(x: &Tensor, y: &Tensor, dim: usize) -> Result<Tensor> {
    let (first, second) = (x.dim(dim)?, y.dim(dim)?);
    let mut shape = x.dims().to_vec();
    shape[dim] = first + second;
    let (Some(all), Some(x_dims), Some(y_dims)) = (four(&shape), four(x.dims()), four(y.dims()))
    else {
        candle_core::bail!("a join of tensors of more than four dimensions");
    };
    let steps = contiguous(all);
    let mut rest = (all, y_dims);
    let place = 4 - shape.len() + dim;
    (rest.0[place], rest.1[place]) = (0, 0);
    if rest.0 != rest.1 {
        candle_core::bail!("{:?} joined to {:?}", y.dims(), x.dims());
    }
    let card = Card::of(x)?;
    let joined = card.buffer(shape.iter().product(), x.dtype())?;
    for (part, dims, start) in [(x, x_dims, 0), (y, y_dims, first * steps[place])] {
        let to = Spread::new(&joined, start, steps);
        transfer(card, x.dtype(), dims, to, Spread::of(part)?, false)?;
    }
    let parts: Vec<(usize, usize)> = [(x, (0, first)), (y, (first, second))]
        .into_iter()
        .filter(|(t, _)| t.track_op())
        .map(|(_, part)| part)
        .collect();
    record(&[x, y], joined.into_storage(), shape, move |gradient| {
        parts
            .iter()
            .map(|&(start, count)| gradient.narrow(dim, start, count))
            .collect()
    })
}

/// See [`crate::nn::layout::to_f32`]; `x` is in half precision.
pub fn to_f32(x: &Tensor) -> Result<Tensor> {
    let (card, count, dtype) = (Card::of(x)?, x.elem_count(), x.dtype());
    let (x_kept, wide) = (kept(x)?, card.buffer(count, DType::F32)?);
    let args = [Arg::from(&wide), at(&x_kept)?, int(count)?];
    // SAFETY: both have `count` elements.
    unsafe { card.launch("to_float", dtype, Grid::each(count), &args) }?;
    record(&[x], wide.into_storage(), x.shape(), move |gradient| {
        let card = Card::of(gradient)?;
        let narrow = card.buffer(count, dtype)?;
        let args = [Arg::from(&narrow), at(gradient)?, int(count)?];
        // SAFETY: both have `count` elements.
        unsafe { card.launch("from_float", dtype, Grid::each(count), &args) }?;
        Ok(vec![narrow.tensor(gradient.shape())])
    })
}

/// The values of `one` in memory of their own, for others to be added to.
pub fn own(one: &Tensor) -> Result<Buffer> {
    copy_buffer(one)
}

/// The gradient of a tensor of `shape`, of which nothing is known yet but that of a part.
pub fn first_part(gradient: &Tensor, place: Place, shape: &Shape) -> Result<Buffer> {
    let (card, dtype, count) = (Card::of(gradient)?, gradient.dtype(), shape.elem_count());
    // A part with as many elements is all of it.
    let is_all = gradient.elem_count() == count;
    let sum = match is_all {
        true => card.buffer(count, dtype)?,
        false => card.zeros(count, dtype)?,
    };
    put(&sum, gradient, place, !is_all)?;
    Ok(sum)
}

/// Adds the gradient of a part to `sum`, that of the whole tensor.
pub fn add_part(sum: &Buffer, gradient: &Tensor, place: Place) -> Result<()> {
    put(sum, gradient, place, true)
}

/// Writes or adds the gradient of a part to `sum`.
fn put(sum: &Buffer, gradient: &Tensor, place: Place, adds: bool) -> Result<()> {
    let gradient = match gradient.rank() {
        0..=4 => gradient.clone(),
        _ => kept(gradient)?,
    };
    let (gradient, start, to) = match place {
        Place::Whole => {
            let flat = kept(&gradient)?.flatten_all()?;
            (flat, 0, [0, 0, 0, 1])
        }
        Place::Heads { start, width } => {
            let (_, _, n, d) = gradient.dims4()?;
            (gradient, start, [n * width, d, width, 1])
        }
        Place::Rows { start, of } => {
            let (b, count) = (gradient.dim(0)?, gradient.dim(1)?);
            let inner = gradient.elem_count() / (b * count).max(1);
            let rows = match gradient.rank() {
                3 => gradient,
                _ => kept(&gradient)?.reshape((b, count, inner))?,
            };
            (rows, start * inner, [0, of * inner, inner, 1])
        }
    };
    let Some(dims) = four(gradient.dims()) else {
        candle_core::bail!("a gradient of more than four dimensions");
    };
    let to = Spread::new(sum, start, to);
    let (card, from) = (Card::of(&gradient)?, Spread::of(&gradient)?);
    transfer(card, sum.dtype(), dims, to, from, adds)
}
