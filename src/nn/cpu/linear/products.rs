//! The products that linear layers are made of.

use candle_core::{Result, Tensor};
use multiversion::multiversion;
use rayon::prelude::*;

use super::adapters::Adapters;
use crate::nn::cpu::gemm::{Matrix, product, product_and};
use crate::nn::cpu::{
    ALONE, ALONE_PRODUCTS, PIECE, Values, detached, half, is_alone, simd, values,
};
use crate::nn::shapes::Linear as Shapes;
use crate::nn::{HalfKind, HalfMatrix, Weight};

/// Up to this many rows each weight is read once, straight from memory: packing it would take longer.
const THIN: usize = 8;

/// Up to this many outputs, an adapter's rank as a rule, the gradient of a weight is found transposed.
const LOW: usize = 32;

/// What adapters add: themselves, and `x` as their A left it (rows, ranks); in the backward pass the gradient of that.
type Share<'a> = (&'a Adapters, &'a [f32]);

/// `x`·Wᵀ + bias with the adapters' share, W being `weights` one below the other.
pub fn forward(
    x: &Tensor,
    weights: &[Weight],
    bias: Option<&Tensor>,
    shape: &Shapes,
    share: Option<Share>,
) -> Result<Vec<f32>> {
    let x = values(x)?;
    let Shapes {
        rows,
        inputs,
        outputs,
    } = *shape;
    let bias = kept_bias(bias, shape)?;
    let bias = bias.as_ref().map(values).transpose()?;
    if let ([weight], true) = (weights, rows > THIN)
        && let Readable::Full(full) = Readable::of(weight)?
    {
        let x = Matrix::new(&x, rows, inputs);
        let turned = match weight {
            Weight::Twice { turned, .. } => Some(values(turned)?),
            _ => None,
        };
        let w = match &turned {
            Some(turned) => Matrix::new(turned, inputs, outputs),
            None => Matrix::new(&full, outputs, inputs).t(),
        };
        return match share {
            Some((adapters, low)) => adapters.product(x, w, bias.as_deref(), low, shape),
            None => Ok(product(x, w, bias.as_deref())),
        };
    }
    let mut y = match &bias {
        Some(bias) => bias.repeat(rows),
        None => vec![0.0; rows * outputs],
    };
    if rows <= THIN {
        add_thin(&x, weights, shape, &mut y)?;
    } else {
        for block in halves(weights) {
            let (from, half) = block?;
            let sizes = (rows, inputs, half.dims2().0);
            let out = (&mut y[from..], outputs);
            half::times_transposed(&x, half.bits()?, half.kind(), sizes, out, bias.is_some());
        }
    }
    if let Some((adapters, low)) = share {
        adapters.add_to(&mut y, low, shape)?;
    }
    Ok(y)
}

fn kept_bias(bias: Option<&Tensor>, shape: &Shapes) -> Result<Option<Tensor>> {
    let kept = |bias: &Tensor| shape.check_bias(bias).and_then(|()| detached(bias));
    bias.map(kept).transpose()
}

/// Each of `weights`, which are all in half precision, with its first output.
fn halves(weights: &[Weight]) -> impl Iterator<Item = Result<(usize, &HalfMatrix)>> {
    let mut next = 0;
    weights.iter().map(move |weight| match weight {
        Weight::Half(half) => {
            let from = next;
            next += half.dims2().0;
            Ok((from, half))
        }
        _ => candle_core::bail!("a weight in f32 among several in one layer"),
    })
}

/// `y += x·Wᵀ` for few rows.
fn add_thin(x: &[f32], weights: &[Weight], shape: &Shapes, y: &mut [f32]) -> Result<()> {
    let Shapes {
        rows,
        inputs,
        outputs,
    } = *shape;
    // (outputs, rows), so that pieces of outputs are contiguous.
    let mut columns = vec![0.0; rows * outputs];
    let piece = (PIECE / inputs.max(1)).max(1);
    let mut rest = columns.as_mut_slice();
    for weight in weights {
        let own;
        (own, rest) = rest.split_at_mut(weight.dims2()?.0 * rows);
        let w = Readable::of(weight)?;
        // `out` may hold any number of pieces.
        let body = |i: usize, out: &mut [f32]| {
            let from = i * piece;
            let until = from + out.len() / rows.max(1);
            let range = from * inputs..until * inputs;
            match &w {
                Readable::Full(w) => thin(x, &w[range], inputs, out),
                Readable::Half(bits, kind) => half::thin(x, &bits[range], *kind, inputs, out),
            }
        };
        if !is_alone(own.len() * inputs, ALONE_PRODUCTS) {
            own.par_chunks_mut((piece * rows).max(1))
                .enumerate()
                .for_each(|(i, out)| body(i, out));
        } else {
            body(0, own);
        }
    }
    for (i, row) in y.chunks_exact_mut(outputs.max(1)).enumerate() {
        for (j, v) in row.iter_mut().enumerate() {
            *v += columns[j * rows + i];
        }
    }
    Ok(())
}

/// A weight's values, for reading.
enum Readable<'a> {
    Full(Values<'a>),
    Half(&'a [u16], HalfKind),
}

impl<'a> Readable<'a> {
    fn of(weight: &'a Weight) -> Result<Self> {
        match weight {
            Weight::Tensor(weight) | Weight::Twice { weight, .. } => {
                Ok(Readable::Full(values(weight)?))
            }
            Weight::Half(half) => Ok(Readable::Half(half.bits()?, half.kind())),
        }
    }
}

/// g·W with the adapters' share, `g` being (rows, outputs).
pub fn input_gradient(
    g: &[f32],
    weights: &[Weight],
    shape: &Shapes,
    share: Option<Share>,
) -> Result<Vec<f32>> {
    let g = Matrix::new(g, shape.rows, shape.outputs);
    if let [weight] = weights
        && let Readable::Full(w) = Readable::of(weight)?
    {
        let w = Matrix::new(&w, shape.outputs, shape.inputs);
        return match share {
            Some((adapters, low)) => {
                adapters.with_input_pair(low, shape, |pair| product_and(g, w, None, Some(pair)))
            }
            None => Ok(product(g, w, None)),
        };
    }
    let mut dx = vec![0.0; shape.rows * shape.inputs];
    for block in halves(weights) {
        let (from, half) = block?;
        let outputs = half.dims2().0;
        let g = g.some_columns(from, from + outputs);
        let sizes = (shape.rows, shape.inputs, outputs);
        half::times(g, half.bits()?, half.kind(), sizes, &mut dx, from > 0);
    }
    if let Some((adapters, low)) = share {
        adapters.with_input_pair(low, shape, |pair| pair.add_to(&mut dx))?;
    }
    Ok(dx)
}

pub fn weight_gradient(g: &[f32], x: &[f32], shape: &Shapes) -> Vec<f32> {
    let g = Matrix::new(g, shape.rows, shape.outputs);
    let x = Matrix::new(x, shape.rows, shape.inputs);
    if shape.outputs > LOW || shape.inputs < 2 * shape.outputs {
        return product(g.t(), x, None);
    }
    // Few rows: as few columns they keep the smaller matrix in the nearest cache. Each element is the same sum.
    let turned = product(x.t(), g, None);
    let mut dw = vec![0.0; turned.len()];
    for (i, row) in turned.chunks_exact(shape.outputs).enumerate() {
        for (v, line) in row.iter().zip(dw.chunks_exact_mut(shape.inputs)) {
            line[i] = *v;
        }
    }
    dw
}

/// Σ over rows of `g` (rows, `width`): each column from the first row to the last.
pub fn column_sums(g: &[f32], width: usize) -> Vec<f32> {
    const COLUMNS: usize = 128;
    let mut sums = vec![0.0; width];
    let body = |(i, sums): (usize, &mut [f32])| add_columns(g, width, i * COLUMNS, sums);
    if !is_alone(g.len(), ALONE) {
        sums.par_chunks_mut(COLUMNS).enumerate().for_each(body);
    } else {
        sums.chunks_mut(COLUMNS).enumerate().for_each(body);
    }
    sums
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn add_columns(g: &[f32], width: usize, from: usize, sums: &mut [f32]) {
    for row in g.chunks_exact(width) {
        for (s, v) in sums.iter_mut().zip(&row[from..]) {
            *s += v;
        }
    }
}

/// `out` (weights' rows, x's rows): the inner product of each row of `w` with each row of `x`.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn thin(x: &[f32], w: &[f32], inputs: usize, out: &mut [f32]) {
    let rows = x.len() / inputs.max(1);
    for (w, out) in w
        .chunks_exact(inputs.max(1))
        .zip(out.chunks_exact_mut(rows.max(1)))
    {
        for (x, out) in x.chunks_exact(inputs.max(1)).zip(out) {
            *out = simd::sum_pairs(x, w, |a, b| a * b);
        }
    }
}
