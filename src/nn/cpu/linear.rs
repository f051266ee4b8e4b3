//! Linear layers, with and without a low-rank addition.

use candle_core::{Result, Tensor};
use multiversion::multiversion;
use rayon::prelude::*;

use super::gemm::{Matrix, Pair, product, scaled_product};
use super::{ALONE, ALONE_PRODUCTS, PIECE, Values, detached, half, is_alone, simd, tensor, values};
use crate::nn::shapes::Linear as Shapes;
use crate::nn::vjp::record;
use crate::nn::{HalfKind, QuantisedMatrix, Weight};

/// Up to this many rows each weight is read once, straight from memory: packing it would take longer.
const THIN: usize = 8;

/// The factors of an adapter, (rank, inputs) and (outputs, rank), and what their product is multiplied with.
pub type Factors<'a> = (&'a Tensor, &'a Tensor, f64);

/// An adapter as a layer's passes read it.
struct Adapter {
    a: Tensor,
    b: Tensor,
    scale: f32,
    rank: usize,
    /// Whether A and B are trained.
    trained: [bool; 2],
}

impl Adapter {
    fn new((a, b, scale): Factors, shape: &Shapes) -> Result<Self> {
        Ok(Self {
            rank: shape.rank(a, b)?,
            a: detached(a)?,
            b: detached(b)?,
            scale: scale as f32,
            trained: [a.track_op(), b.track_op()],
        })
    }

    /// scale·`x`·Aᵀ, (rows, rank).
    fn low(&self, x: &[f32], shape: &Shapes) -> Result<Vec<f32>> {
        let a = values(&self.a)?;
        let x = Matrix::new(x, shape.rows, shape.inputs);
        let a = Matrix::new(&a, self.rank, shape.inputs);
        Ok(scaled_product(self.scale, x, a.t()))
    }

    /// scale·`g`·B, (rows, rank).
    fn low_gradient(&self, g: &[f32], shape: &Shapes) -> Result<Vec<f32>> {
        let b = values(&self.b)?;
        let g = Matrix::new(g, shape.rows, shape.outputs);
        let b = Matrix::new(&b, shape.outputs, self.rank);
        Ok(scaled_product(self.scale, g, b))
    }
}

/// `x` (…, inputs) to (…, outputs): x·Wᵀ + bias, and what the adapter with these factors adds to it.
///
/// See [`crate::nn::ops::linear`] and [`crate::nn::ops::linear_lora`].
pub fn linear(
    x: &Tensor,
    weight: &Weight,
    bias: Option<&Tensor>,
    factors: Option<Factors>,
) -> Result<Tensor> {
    let shape = Shapes::of(x, weight.dims2()?)?;
    let Shapes {
        rows,
        inputs,
        outputs,
    } = shape;
    let adapter = factors.map(|factors| Adapter::new(factors, &shape));
    let adapter = adapter.transpose()?;
    let x_kept = detached(x)?;
    let weight_kept = match weight {
        Weight::Tensor(tensor) => Weight::Tensor(detached(tensor)?),
        Weight::Twice { .. } | Weight::Half(_) | Weight::Quantised(_) => weight.clone(),
    };
    let (y, low) = {
        let x = values(&x_kept)?;
        let bias = kept_bias(bias, &shape)?;
        let bias = bias.as_ref().map(values).transpose()?;
        let low = adapter.as_ref().map(|adapter| adapter.low(&x, &shape));
        let low = low.transpose()?;
        let share = adapter.as_ref().zip(low.as_deref());
        (
            forward(&x, &weight_kept, bias.as_deref(), &shape, share)?,
            low,
        )
    };
    let trained = weight.tensor().filter(|tensor| tensor.track_op());
    let wanted = [
        x.track_op(),
        trained.is_some(),
        bias.is_some_and(Tensor::track_op),
    ];
    let factors = factors.map(|(a, b, _)| [a, b]).into_iter().flatten();
    let tensors: Vec<&Tensor> = [x]
        .into_iter()
        .chain(trained)
        .chain(bias)
        .chain(factors)
        .collect();
    let (x_dims, y_dims) = (x.dims().to_vec(), shape.result(x));
    record(&tensors, y, y_dims, move |gradient| {
        let (g, x) = (values(gradient)?, values(&x_kept)?);
        let low_gradient = match &adapter {
            Some(adapter) if adapter.trained[0] || wanted[0] => {
                Some(adapter.low_gradient(&g, &shape)?)
            }
            _ => None,
        };
        let mut gradients = Vec::new();
        if wanted[0] {
            let share = adapter.as_ref().zip(low_gradient.as_deref());
            let dx = input_gradient(&g, &weight_kept, &shape, share)?;
            gradients.push(tensor(dx, x_dims.clone())?);
        }
        let (g, x) = (
            Matrix::new(&g, rows, outputs),
            Matrix::new(&x, rows, inputs),
        );
        if wanted[1] {
            let dw = product(g.t(), x, None, None);
            gradients.push(tensor(dw, (outputs, inputs))?);
        }
        if wanted[2] {
            let sums = column_sums(&values(gradient)?, outputs);
            gradients.push(tensor(sums, outputs)?);
        }
        let Some(adapter) = &adapter else {
            return Ok(gradients);
        };
        let rank = adapter.rank;
        if let (true, Some(low)) = (adapter.trained[0], &low_gradient) {
            let da = product(Matrix::new(low, rows, rank).t(), x, None, None);
            gradients.push(tensor(da, (rank, inputs))?);
        }
        if let (true, Some(low)) = (adapter.trained[1], &low) {
            let db = product(g.t(), Matrix::new(low, rows, rank), None, None);
            gradients.push(tensor(db, (outputs, rank))?);
        }
        Ok(gradients)
    })
}

fn kept_bias(bias: Option<&Tensor>, shape: &Shapes) -> Result<Option<Tensor>> {
    let kept = |bias: &Tensor| shape.check_bias(bias).and_then(|()| detached(bias));
    bias.map(kept).transpose()
}

/// An adapter, and `x` as its A left it (rows, rank); in the backward pass the gradient of that.
type Share<'a> = (&'a Adapter, &'a [f32]);

/// `x`·Wᵀ + bias with the adapter's share.
fn forward(
    x: &[f32],
    weight: &Weight,
    bias: Option<&[f32]>,
    shape: &Shapes,
    share: Option<Share>,
) -> Result<Vec<f32>> {
    let Shapes {
        rows,
        inputs,
        outputs,
    } = *shape;
    let b = share.map(|(adapter, _)| values(&adapter.b)).transpose()?;
    let share = share.zip(b.as_deref()).map(|((adapter, low), b)| Pair {
        a: Matrix::new(low, rows, adapter.rank),
        b: Matrix::new(b, outputs, adapter.rank).t(),
    });
    let w = Readable::of(weight)?;
    if let (Readable::Full(w), true) = (&w, rows > THIN) {
        let turned = match weight {
            Weight::Twice { turned, .. } => Some(values(turned)?),
            Weight::Tensor(_) | Weight::Half(_) | Weight::Quantised(_) => None,
        };
        let w = match &turned {
            Some(turned) => Matrix::new(turned, inputs, outputs),
            None => Matrix::new(w, outputs, inputs).t(),
        };
        return Ok(product(Matrix::new(x, rows, inputs), w, bias, share));
    }
    let mut y = match bias {
        Some(bias) => bias.repeat(rows),
        None => vec![0.0; rows * outputs],
    };
    match w {
        Readable::Half(bits, kind) if rows > THIN => {
            let w = half::Half(bits, kind);
            half::add_times_transposed(x, &w, (rows, inputs, outputs), &mut y)?;
        }
        Readable::Packed(w) if rows > THIN => {
            half::add_times_transposed(x, w, (rows, inputs, outputs), &mut y)?;
        }
        w => add_thin(x, &w, shape, &mut y)?,
    }
    if let Some(share) = share {
        share.add_to(&mut y);
    }
    Ok(y)
}

/// `y += x·Wᵀ` for few rows.
fn add_thin(x: &[f32], w: &Readable, shape: &Shapes, y: &mut [f32]) -> Result<()> {
    let Shapes {
        rows,
        inputs,
        outputs,
    } = *shape;
    // (outputs, rows), so that pieces of outputs are contiguous.
    let mut columns = vec![0.0; rows * outputs];
    let piece = (PIECE / inputs.max(1)).max(1);
    // `out` may hold any number of pieces.
    let body = |i: usize, out: &mut [f32]| -> Result<()> {
        let from = i * piece;
        let until = from + out.len() / rows.max(1);
        let range = from * inputs..until * inputs;
        match w {
            Readable::Full(w) => thin(x, &w[range], inputs, out),
            Readable::Half(bits, kind) => half::thin(x, &bits[range], *kind, inputs, out),
            Readable::Packed(w) => half::thin_packed(x, w, from, inputs, out)?,
        }
        Ok(())
    };
    if is_alone(columns.len() * inputs, ALONE_PRODUCTS) {
        body(0, &mut columns)?;
    } else {
        columns
            .par_chunks_mut((piece * rows).max(1))
            .enumerate()
            .try_for_each(|(i, out)| body(i, out))?;
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
    Packed(&'a QuantisedMatrix),
}

impl<'a> Readable<'a> {
    fn of(weight: &'a Weight) -> Result<Self> {
        match weight {
            Weight::Tensor(weight) | Weight::Twice { weight, .. } => {
                Ok(Readable::Full(values(weight)?))
            }
            Weight::Half(half) => Ok(Readable::Half(half.bits()?, half.kind())),
            Weight::Quantised(packed) => Ok(Readable::Packed(packed)),
        }
    }
}

/// g·W with the adapter's share, `g` being (rows, outputs).
fn input_gradient(
    g: &[f32],
    weight: &Weight,
    shape: &Shapes,
    share: Option<Share>,
) -> Result<Vec<f32>> {
    let Shapes {
        rows,
        inputs,
        outputs,
    } = *shape;
    let a = share.map(|(adapter, _)| values(&adapter.a)).transpose()?;
    let share = share.zip(a.as_deref()).map(|((adapter, low), a)| Pair {
        a: Matrix::new(low, rows, adapter.rank),
        b: Matrix::new(a, adapter.rank, inputs),
    });
    match Readable::of(weight)? {
        Readable::Full(w) => {
            let (g, w) = (
                Matrix::new(g, rows, outputs),
                Matrix::new(&w, outputs, inputs),
            );
            Ok(product(g, w, None, share))
        }
        Readable::Half(bits, kind) => {
            let dx = half::times(g, &half::Half(bits, kind), (rows, inputs, outputs))?;
            Ok(with_share(dx, share))
        }
        Readable::Packed(w) => {
            let dx = half::times(g, w, (rows, inputs, outputs))?;
            Ok(with_share(dx, share))
        }
    }
}

fn with_share(mut dx: Vec<f32>, share: Option<Pair>) -> Vec<f32> {
    if let Some(share) = share {
        share.add_to(&mut dx);
    }
    dx
}

/// Σ over rows of `g` (rows, `width`): each column from the first row to the last.
fn column_sums(g: &[f32], width: usize) -> Vec<f32> {
    const COLUMNS: usize = 128;
    let mut sums = vec![0.0; width];
    let body = |(i, sums): (usize, &mut [f32])| add_columns(g, width, i * COLUMNS, sums);
    if is_alone(g.len(), ALONE) {
        sums.chunks_mut(COLUMNS).enumerate().for_each(body);
    } else {
        sums.par_chunks_mut(COLUMNS).enumerate().for_each(body);
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
