//! Rows of a table.

use candle_core::{DType, Result, Tensor};

use super::{Arg, Card, Grid, at, int, kept};
use crate::nn::vjp::record;

/// See [`crate::nn::ops::embedding`]. A row that the table does not have is not a number.
pub fn embedding(weight: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let (count, width) = weight.dims2()?;
    let mut shape = ids.dims().to_vec();
    shape.push(width);
    let ids = ids.to_device(weight.device())?.flatten_all()?;
    let ids = ids.to_dtype(DType::U32)?.contiguous()?;
    let (card, dtype, n) = (Card::of(weight)?, weight.dtype(), ids.elem_count());
    let (table, y) = (kept(weight)?, card.buffer(n * width, dtype)?);
    let mut args = vec![Arg::from(&y), at(&table)?, at(&ids)?];
    args.extend([int(n * width)?, int(count)?, int(width)?]);
    // SAFETY: the table is (count, width), `y` has a row for each of the `n` ids; others are left out.
    unsafe { card.launch("gather", dtype, Grid::each(n * width), &args) }?;
    record(&[weight], y.into_storage(), shape, move |g| {
        let card = Card::of(g)?;
        let dweight = card.zeros(count * width, dtype)?;
        let mut args = vec![Arg::from(&dweight), at(g)?, at(&ids)?];
        args.extend([int(n)?, int(count)?, int(width)?]);
        let grid = Grid::blocks(n, (128, 1));
        // SAFETY: the table's gradient is (count, width), `g` has a row for each of the `n` ids; others are left out.
        unsafe { card.launch("gather_backward", dtype, grid, &args) }?;
        Ok(vec![dweight.tensor((count, width))])
    })
}
