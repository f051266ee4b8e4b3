//! Rows of a table.

use candle_core::{DType, Result, Tensor};

use super::half::widen_piece;
use super::{detached, pieces, tensor, values};
use crate::nn::vjp::record;
use crate::nn::{HalfMatrix, QuantisedMatrix};

/// See [`crate::nn::ops::embedding`].
pub fn embedding(weight: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let (count, width) = weight.dims2()?;
    let (ids, shape) = rows(ids, count, width)?;
    let y = {
        let weight = detached(weight)?;
        let weight = values(&weight)?;
        pieces(ids.len() * width, width, |i, y| {
            y.copy_from_slice(&weight[ids[i] as usize * width..][..width]);
        })
    };
    record(&[weight], y, shape, move |gradient| {
        let g = values(gradient)?;
        let mut dw = vec![0.0; count * width];
        // One thread: an id may occur many times, and its rows are to be added in their order.
        for (id, g) in ids.iter().zip(g.chunks_exact(width.max(1))) {
            let row = &mut dw[*id as usize * width..][..width];
            row.iter_mut().zip(g).for_each(|(d, g)| *d += g);
        }
        Ok(vec![tensor(dw, (count, width))?])
    })
}

/// [`embedding`] in a table of half precision.
pub fn half_embedding(weight: &HalfMatrix, ids: &Tensor) -> Result<Tensor> {
    let (count, width) = weight.dims2();
    let (ids, shape) = rows(ids, count, width)?;
    let bits = weight.bits()?;
    let y = pieces(ids.len() * width, width, |i, y| {
        let row = &bits[ids[i] as usize * width..][..width];
        widen_piece(row, weight.kind(), y);
    });
    tensor(y, shape)
}

/// [`embedding`] in a table that is kept in blocks.
pub fn quantised_embedding(weight: &QuantisedMatrix, ids: &Tensor) -> Result<Tensor> {
    let (count, width) = weight.dims2();
    let (ids, shape) = rows(ids, count, width)?;
    let mut y = vec![0.0; ids.len() * width];
    for (id, row) in ids.iter().zip(y.chunks_exact_mut(width.max(1))) {
        weight.unpack(*id as usize * width, row)?;
    }
    tensor(y, shape)
}

/// The numbers of the rows, all below `count`, and the shape of the result.
fn rows(ids: &Tensor, count: usize, width: usize) -> Result<(Vec<u32>, Vec<usize>)> {
    let mut shape = ids.dims().to_vec();
    shape.push(width);
    let ids = ids.flatten_all()?.to_dtype(DType::U32)?.to_vec1::<u32>()?;
    if let Some(id) = ids.iter().find(|id| **id as usize >= count) {
        candle_core::bail!("row {id} of a table of {count}");
    }
    Ok((ids, shape))
}
