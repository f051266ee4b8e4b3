//! Linear layers, with and without a low-rank addition.

use candle_core::{Result, Tensor};
use multiversion::multiversion;
use rayon::prelude::*;

use super::gemm::{
    Matrix, Term, Threads, multiply, product, product_and, product_on, scaled_product,
};
use super::{ALONE, ALONE_PRODUCTS, Values, detached, half, is_alone, simd, tensor, values};
use crate::nn::shapes::Linear as Shapes;
use crate::nn::vjp::record;
use crate::nn::{HalfKind, Weight};

/// Up to this many rows each weight is read once, straight from memory: packing it would take longer.
const THIN: usize = 8;

/// Up to this many outputs, an adapter's rank as a rule, the gradient of a weight is found transposed.
const LOW: usize = 32;

/// See [`crate::nn::ops::linear`].
pub fn linear(x: &Tensor, weight: &Weight, bias: Option<&Tensor>) -> Result<Tensor> {
    let shape = Shapes::of(x, weight.dims2()?)?;
    let (x_kept, weight_kept) = (detached(x)?, kept(weight)?);
    let y = forward(&x_kept, &weight_kept, bias, &shape, None)?;
    let wanted = (
        x.track_op(),
        trained(weight).is_some(),
        bias.is_some_and(Tensor::track_op),
    );
    let inputs: Vec<&Tensor> = [x].into_iter().chain(trained(weight)).chain(bias).collect();
    let (x_dims, y_dims) = (x.dims().to_vec(), shape.result(x));
    record(&inputs, y, y_dims, move |gradient| {
        let g = values(gradient)?;
        let mut gradients = Vec::new();
        if wanted.0 {
            let dx = input_gradient(&g, &weight_kept, &shape, None)?;
            gradients.push(tensor(dx, x_dims.clone())?);
        }
        if wanted.1 {
            let dw = weight_gradient(&g, &values(&x_kept)?, &shape);
            gradients.push(tensor(dw, (shape.outputs, shape.inputs))?);
        }
        if wanted.2 {
            gradients.push(tensor(column_sums(&g, shape.outputs), shape.outputs)?);
        }
        Ok(gradients)
    })
}

/// The factors of an adapter, as an operation sees them.
pub struct Addition<'a> {
    /// (rank, inputs)
    pub a: &'a Tensor,
    /// (outputs, rank)
    pub b: &'a Tensor,
    pub scale: f64,
    /// Whether W + scale·B·A may be formed where that is less work. The result then rounds by how many rows `x` has.
    pub merge: bool,
}

/// See [`crate::nn::ops::linear_lora`].
pub fn linear_lora(
    x: &Tensor,
    weight: &Weight,
    bias: Option<&Tensor>,
    Addition { a, b, scale, merge }: &Addition,
) -> Result<Tensor> {
    let shape = Shapes::of(x, weight.dims2()?)?;
    let down = Shapes {
        outputs: shape.rank(a, b)?,
        ..shape
    };
    let scale = *scale as f32;
    let (x_kept, weight_kept) = (detached(x)?, kept(weight)?);
    let (a_kept, b_kept) = (detached(a)?, detached(b)?);
    let merged = match weight.tensor() {
        Some(weight) if *merge && is_deep(&shape) => {
            let weight = detached(weight)?;
            let (a, b) = (values(&a_kept)?, values(&b_kept)?);
            let a = Matrix::new(&a, down.outputs, shape.inputs);
            let b = Matrix::new(&b, shape.outputs, down.outputs);
            let sum = product_on(&values(&weight)?, scale, b, a);
            Some(Weight::Tensor(tensor(sum, (shape.outputs, shape.inputs))?))
        }
        _ => None,
    };
    let (y, low) = match &merged {
        Some(merged) => (forward(&x_kept, merged, bias, &shape, None)?, None),
        None => {
            let low = forward(&x_kept, &Weight::Tensor(a_kept.clone()), None, &down, None)?;
            let b = values(&b_kept)?;
            let addition = Term {
                factor: scale,
                a: Matrix::new(&low, shape.rows, down.outputs),
                b: Matrix::new(&b, shape.outputs, down.outputs).t(),
            };
            let y = forward(&x_kept, &weight_kept, bias, &shape, Some(addition))?;
            (y, Some(low))
        }
    };
    let wanted = [
        x.track_op(),
        trained(weight).is_some(),
        bias.is_some_and(Tensor::track_op),
        a.track_op(),
        b.track_op(),
    ];
    let inputs: Vec<&Tensor> = [x]
        .into_iter()
        .chain(trained(weight))
        .chain(bias)
        .chain([*a, *b])
        .collect();
    let (x_dims, y_dims) = (x.dims().to_vec(), shape.result(x));
    record(&inputs, y, y_dims, move |gradient| {
        let g = values(gradient)?;
        let (a, b) = (values(&a_kept)?, values(&b_kept)?);
        let (rows, rank) = (shape.rows, down.outputs);
        let g_matrix = Matrix::new(&g, rows, shape.outputs);
        let low_gradient = match wanted[3] || (wanted[0] && merged.is_none()) {
            true => scaled_product(scale, g_matrix, Matrix::new(&b, shape.outputs, rank)),
            false => Vec::new(),
        };
        let mut gradients = Vec::new();
        if wanted[0] {
            let dx = match &merged {
                Some(merged) => input_gradient(&g, merged, &shape, None)?,
                None => {
                    let addition = Term {
                        factor: 1.0,
                        a: Matrix::new(&low_gradient, rows, rank),
                        b: Matrix::new(&a, rank, shape.inputs),
                    };
                    input_gradient(&g, &weight_kept, &shape, Some(addition))?
                }
            };
            gradients.push(tensor(dx, x_dims.clone())?);
        }
        if wanted[1] {
            let dw = weight_gradient(&g, &values(&x_kept)?, &shape);
            gradients.push(tensor(dw, (shape.outputs, shape.inputs))?);
        }
        if wanted[2] {
            gradients.push(tensor(column_sums(&g, shape.outputs), shape.outputs)?);
        }
        if wanted[3] {
            let da = weight_gradient(&low_gradient, &values(&x_kept)?, &down);
            gradients.push(tensor(da, (rank, shape.inputs))?);
        }
        if wanted[4] {
            let now;
            let low = match &low {
                Some(low) => low,
                None => {
                    now = forward(&x_kept, &Weight::Tensor(a_kept.clone()), None, &down, None)?;
                    &now
                }
            };
            let db = scaled_product(scale, g_matrix.t(), Matrix::new(low, rows, rank));
            gradients.push(tensor(db, (shape.outputs, rank))?);
        }
        Ok(gradients)
    })
}

/// What a backward pass keeps of a weight.
fn kept(weight: &Weight) -> Result<Weight> {
    match weight {
        Weight::Tensor(tensor) => Ok(Weight::Tensor(detached(tensor)?)),
        Weight::Twice { .. } | Weight::Half(_) => Ok(weight.clone()),
    }
}

fn kept_bias(bias: Option<&Tensor>, shape: &Shapes) -> Result<Option<Tensor>> {
    let kept = |bias: &Tensor| shape.check_bias(bias).and_then(|()| detached(bias));
    bias.map(kept).transpose()
}

/// The weight, if it is trained.
fn trained(weight: &Weight) -> Option<&Tensor> {
    weight.tensor().filter(|tensor| tensor.track_op())
}

/// Whether the two products of an adapter with `rows` rows take over twice the multiplications that forming its
/// weight does. The weight is then less than half as large as the layer's input and result together.
fn is_deep(shape: &Shapes) -> bool {
    shape.rows * (shape.inputs + shape.outputs) > 2 * shape.inputs * shape.outputs
}

fn forward(
    x: &Tensor,
    weight: &Weight,
    bias: Option<&Tensor>,
    shape: &Shapes,
    addition: Option<Term>,
) -> Result<Vec<f32>> {
    let x = values(x)?;
    let w = Readable::of(weight)?;
    let Shapes {
        rows,
        inputs,
        outputs,
    } = *shape;
    let bias = kept_bias(bias, shape)?;
    let bias = bias.as_ref().map(values).transpose()?;
    if let (true, Readable::Full(full)) = (rows > THIN, &w) {
        let x = Matrix::new(&x, rows, inputs);
        let turned = match weight {
            Weight::Twice { turned, .. } => Some(values(turned)?),
            _ => None,
        };
        let w = match &turned {
            Some(turned) => Matrix::new(turned, inputs, outputs),
            None => Matrix::new(full, outputs, inputs).t(),
        };
        return Ok(product_and(x, w, bias.as_deref(), addition));
    }
    let mut y = match &bias {
        Some(bias) => bias.repeat(rows),
        None => vec![0.0; rows * outputs],
    };
    if rows <= THIN {
        let mut columns = vec![0.0; rows * outputs];
        // (outputs, rows), so that pieces of outputs are contiguous.
        let piece = (super::PIECE / inputs.max(1)).max(1);
        // `out` may hold any number of pieces.
        let body = |i: usize, out: &mut [f32]| {
            let from = i * piece;
            let until = from + out.len() / rows.max(1);
            let range = from * inputs..until * inputs;
            match &w {
                Readable::Full(w) => thin(&x, &w[range], inputs, out),
                Readable::Half(bits, kind) => half::thin(&x, &bits[range], *kind, inputs, out),
            }
        };
        if !is_alone(rows * outputs * inputs, ALONE_PRODUCTS) {
            columns
                .par_chunks_mut((piece * rows).max(1))
                .enumerate()
                .for_each(|(i, out)| body(i, out));
        } else {
            body(0, &mut columns);
        }
        for (i, row) in y.chunks_exact_mut(outputs.max(1)).enumerate() {
            for (j, v) in row.iter_mut().enumerate() {
                *v += columns[j * rows + i];
            }
        }
    } else if let Readable::Half(bits, kind) = w {
        let sizes = (rows, inputs, outputs);
        half::times_transposed(&x, bits, kind, sizes, &mut y, bias.is_some());
    }
    Ok(with_addition(y, outputs, addition))
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

/// `y`, rows of `columns`, with what is to be added to it.
fn with_addition(mut y: Vec<f32>, columns: usize, addition: Option<Term>) -> Vec<f32> {
    if let Some(Term { factor, a, b }) = addition {
        multiply(factor, a, b, &mut y, columns, true, Threads::All);
    }
    y
}

fn input_gradient(
    g: &[f32],
    weight: &Weight,
    shape: &Shapes,
    addition: Option<Term>,
) -> Result<Vec<f32>> {
    let w = match Readable::of(weight)? {
        Readable::Full(w) => w,
        Readable::Half(bits, kind) => {
            let sizes = (shape.rows, shape.inputs, shape.outputs);
            let dx = half::times(g, bits, kind, sizes);
            return Ok(with_addition(dx, shape.inputs, addition));
        }
    };
    let g = Matrix::new(g, shape.rows, shape.outputs);
    let w = Matrix::new(&w, shape.outputs, shape.inputs);
    Ok(product_and(g, w, None, addition))
}

fn weight_gradient(g: &[f32], x: &[f32], shape: &Shapes) -> Vec<f32> {
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
