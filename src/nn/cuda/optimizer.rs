//! AdamW and the norm of gradients over all tensors at once.

use candle_core::{DType, Device, Result, Tensor};

use super::{Arg, Card, Grid, at, int};

/// One trained tensor: all in f32, contiguous and on one card.
pub struct Trained<'a> {
    pub weights: &'a Tensor,
    pub gradient: &'a Tensor,
    pub first: &'a Tensor,
    pub second: &'a Tensor,
    pub decays: bool,
}

/// The numbers of a step.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// What gradients are multiplied with.
    pub clip: f64,
    /// What the weights that decay are multiplied with.
    pub decay: f64,
    /// The learning rate over 1 − β₁ᵗ.
    pub step_size: f64,
    /// √(1 − β₂ᵗ).
    pub second_correction: f64,
    pub epsilon: f64,
    pub beta1: f64,
    pub beta2: f64,
}

/// Blocks of one tensor at most.
const BLOCKS: usize = 64;

const THREADS: usize = 256;

/// Blocks for the largest of tensors with these many elements, for each of them.
fn grid(counts: impl ExactSizeIterator<Item = usize>) -> Grid {
    let tensors = counts.len() as u32;
    let blocks = counts.max().unwrap_or(0).div_ceil(4 * THREADS);
    Grid {
        blocks: (blocks.clamp(1, BLOCKS) as u32, tensors),
        threads: (THREADS as u32, 1),
        shared: 0,
    }
}

/// The table of tensors that the kernels read.
fn table(rows: Vec<[i64; 6]>, device: &Device) -> Result<Tensor> {
    let count = rows.len();
    Tensor::from_vec(rows.into_flattened(), (count, 6), device)
}

/// Fails unless all are as the kernels read them.
fn check(tensors: &[Tensor], like: &Tensor) -> Result<()> {
    let fits = |t: &Tensor| {
        t.dtype() == DType::F32 && t.is_contiguous() && t.device().same_device(like.device())
    };
    match like.device().is_cuda() && tensors.iter().all(fits) {
        true => Ok(()),
        false => candle_core::bail!("a trained tensor is not contiguous f32 on one card"),
    }
}

fn number(tensor: &Tensor) -> Result<i64> {
    match at(tensor)? {
        Arg::At(at) => Ok(at.cast_signed()),
        _ => candle_core::bail!("a tensor is nowhere"),
    }
}

/// One step of AdamW, in place.
///
/// # Errors
/// When a gradient or a moment does not go with its weights, or something is not in f32 on one card.
pub fn adamw(trained: &[Trained], step: &Step) -> Result<()> {
    let Some(first) = trained.first() else {
        return Ok(());
    };
    let tensors = |t: &Trained| [t.weights, t.gradient, t.first, t.second].map(Tensor::clone);
    let all: Vec<Tensor> = trained.iter().flat_map(tensors).collect();
    check(&all, first.weights)?;
    for t in trained {
        for other in [t.gradient, t.first, t.second] {
            if other.dims() != t.weights.dims() {
                candle_core::bail!("{:?} for weights of {:?}", other.dims(), t.weights.dims());
            }
        }
    }
    let rows = trained
        .iter()
        .map(|t| {
            Ok([
                number(t.weights)?,
                number(t.gradient)?,
                number(t.first)?,
                number(t.second)?,
                t.weights.elem_count() as i64,
                i64::from(t.decays),
            ])
        })
        .collect::<Result<Vec<_>>>()?;
    let table = table(rows, first.weights.device())?;
    let mut args = vec![at(&table)?];
    args.extend([step.clip, step.decay, step.step_size].map(Arg::from));
    args.extend([step.second_correction, step.epsilon].map(Arg::from));
    args.extend([step.beta1, step.beta2].map(Arg::from));
    // 1 − β is taken before rounding, as torch does.
    args.extend([1.0 - step.beta1, 1.0 - step.beta2].map(Arg::from));
    let grid = grid(trained.iter().map(|t| t.weights.elem_count()));
    // SAFETY: the table has a row for each block line, of tensors that were checked.
    unsafe { Card::of(&table)?.launch("adamw", DType::F32, grid, &args) }
}

/// The sum of the squares of all `tensors`, in f32 on one card.
pub fn squares(tensors: &[&Tensor]) -> Result<f64> {
    let Some(first) = tensors.first() else {
        return Ok(0.0);
    };
    let kept = tensors
        .iter()
        .map(|tensor| super::kept(tensor))
        .collect::<Result<Vec<_>>>()?;
    check(&kept, first)?;
    let rows = kept
        .iter()
        .map(|t| Ok([0, number(t)?, 0, 0, t.elem_count() as i64, 0]))
        .collect::<Result<Vec<_>>>()?;
    let table = table(rows, first.device())?;
    let card = Card::of(&table)?;
    let grid = grid(kept.iter().map(Tensor::elem_count));
    let count = grid.blocks.0 as usize * kept.len();
    let (parts, sum) = (card.buffer(count, DType::F64)?, card.buffer(1, DType::F64)?);
    let args = [Arg::from(&parts), at(&table)?];
    // SAFETY: the table has a row for each block line, and there is a part for each block.
    unsafe { card.launch("squares", DType::F32, grid, &args) }?;
    let args = [Arg::from(&sum), Arg::from(&parts), int(count)?];
    let one = Grid::blocks(1, (THREADS as u32, 1));
    // SAFETY: there are `count` parts and one sum.
    unsafe { card.launch("total", DType::F32, one, &args) }?;
    sum.tensor(()).to_scalar()
}
