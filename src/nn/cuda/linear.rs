//! Linear layers, with and without a low-rank addition. A frozen weight gets no gradient.

use candle_core::{DType, Result, Tensor};

use super::{Arg, Buffer, Card, Grid, Matrix, Product, at, int, kept};
use crate::nn::shapes::Linear as Sizes;
use crate::nn::vjp::record;

/// `result = scale · left·right`, or `+=`; (rows, depth) · (depth, columns).
fn multiply(
    card: Card,
    [rows, depth, columns]: [usize; 3],
    left: Matrix,
    right: Matrix,
    (result, adds): (Matrix, bool),
    scale: f64,
) -> Result<()> {
    card.multiply(&Product {
        rows,
        columns,
        depth,
        batch: 1,
        left,
        right,
        result,
        scale: scale as f32,
        adds,
    })
}

/// [`multiply`] with memory of its own for the result.
fn product(
    card: Card,
    sizes: [usize; 3],
    left: Matrix,
    right: Matrix,
    dtype: DType,
    scale: f64,
) -> Result<Buffer> {
    let result = card.buffer(sizes[0] * sizes[2], dtype)?;
    let to = Matrix::of_buffer(&result, sizes[2]);
    multiply(card, sizes, left, right, (to, false), scale)?;
    Ok(result)
}

/// x·Wᵀ + bias.
fn forward(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, sizes: &Sizes) -> Result<Buffer> {
    let Sizes {
        rows,
        inputs,
        outputs,
    } = *sizes;
    let card = Card::of(x)?;
    let (left, right) = (Matrix::of(x, inputs)?, Matrix::of(weight, inputs)?.t());
    let y = product(card, [rows, inputs, outputs], left, right, x.dtype(), 1.0)?;
    let Some(bias) = bias else {
        return Ok(y);
    };
    sizes.check_bias(bias)?;
    let (bias, count) = (kept(bias)?, rows * outputs);
    let args = [Arg::from(&y), at(&bias)?, int(count)?, int(outputs)?];
    // SAFETY: `y` has `count` elements, the bias one for each output, as was checked.
    unsafe { card.launch("add_bias", x.dtype(), Grid::each(count), &args) }?;
    Ok(y)
}

/// The gradient g·W of the input.
fn input_gradient(g: &Tensor, weight: &Tensor, sizes: &Sizes) -> Result<Buffer> {
    let Sizes {
        rows,
        inputs,
        outputs,
    } = *sizes;
    let (left, right) = (Matrix::of(g, outputs)?, Matrix::of(weight, inputs)?);
    let sizes = [rows, outputs, inputs];
    product(Card::of(g)?, sizes, left, right, g.dtype(), 1.0)
}

/// The gradient gᵀ·x of the weight.
fn weight_gradient(g: &Tensor, x: &Tensor, sizes: &Sizes) -> Result<Tensor> {
    let Sizes {
        rows,
        inputs,
        outputs,
    } = *sizes;
    let (left, right) = (Matrix::of(g, outputs)?.t(), Matrix::of(x, inputs)?);
    let gradient = product(
        Card::of(g)?,
        [outputs, rows, inputs],
        left,
        right,
        g.dtype(),
        1.0,
    )?;
    Ok(gradient.tensor((outputs, inputs)))
}

/// Σ over the rows of `g`.
fn bias_gradient(g: &Tensor, sizes: &Sizes) -> Result<Tensor> {
    let card = Card::of(g)?;
    let sums = card.buffer(sizes.outputs, g.dtype())?;
    let none = Arg::At(0);
    let args = [
        Arg::from(&sums),
        none,
        at(g)?,
        none,
        int(sizes.rows)?,
        int(sizes.outputs)?,
    ];
    let grid = Grid::columns(sizes.outputs, 1);
    // SAFETY: `g` is (rows, outputs), the sums have `outputs` elements; there is no second sum.
    unsafe { card.launch("column_sums", g.dtype(), grid, &args) }?;
    Ok(sums.tensor(sizes.outputs))
}

/// See [`crate::nn::ops::linear`].
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let sizes = Sizes::of(x, weight.dims2()?)?;
    let (x_kept, weight_kept) = (kept(x)?, kept(weight)?);
    let y = forward(&x_kept, &weight_kept, bias, &sizes)?;
    let wanted = (
        x.track_op(),
        weight.track_op(),
        bias.is_some_and(Tensor::track_op),
    );
    let inputs: Vec<&Tensor> = [x, weight].into_iter().chain(bias).collect();
    let x_dims = x.dims().to_vec();
    record(&inputs, y.into_storage(), sizes.result(x), move |g| {
        let mut gradients = Vec::new();
        if wanted.0 {
            let dx = input_gradient(g, &weight_kept, &sizes)?;
            gradients.push(dx.tensor(x_dims.clone()));
        }
        if wanted.1 {
            gradients.push(weight_gradient(g, &x_kept, &sizes)?);
        }
        if wanted.2 {
            gradients.push(bias_gradient(g, &sizes)?);
        }
        Ok(gradients)
    })
}

/// The factors of an adapter in the type of the activations.
struct Factors {
    /// (rank, inputs)
    a: Matrix,
    /// (outputs, rank)
    b: Matrix,
    /// What holds them: themselves, or both rounded.
    _held: (Tensor, Tensor, Option<Buffer>),
}

impl Factors {
    // Methods, so that a closure that asks for a factor keeps what holds it.
    fn a(&self) -> Matrix {
        self.a
    }

    fn b(&self) -> Matrix {
        self.b
    }

    fn new(a: &Tensor, b: &Tensor, dtype: DType) -> Result<Self> {
        let (a, b) = (kept(a)?, kept(b)?);
        let (rank, inputs) = a.dims2()?;
        if a.dtype() == dtype {
            return Ok(Self {
                a: Matrix::of(&a, inputs)?,
                b: Matrix::of(&b, rank)?,
                _held: (a, b, None),
            });
        }
        let (first, count) = (a.elem_count(), a.elem_count() + b.elem_count());
        let card = Card::of(&a)?;
        let both = card.buffer(count, dtype)?;
        let args = [Arg::from(&both), at(&a)?, at(&b)?, int(first)?, int(count)?];
        // SAFETY: the two have `count` elements together, the first `first` of them.
        unsafe { card.launch("from_floats", dtype, Grid::each(count), &args) }?;
        let second = both.at() + (first * dtype.size_in_bytes()) as u64;
        Ok(Self {
            a: Matrix::of_buffer(&both, inputs),
            b: Matrix::new(second, b.elem_count(), dtype, rank),
            _held: (a, b, Some(both)),
        })
    }
}

/// See [`crate::nn::ops::linear_lora`]. The factors are in f32 or in the type of `x`.
pub fn linear_lora(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    (a, b): (&Tensor, &Tensor),
    scale: f64,
) -> Result<Tensor> {
    let sizes = Sizes::of(x, weight.dims2()?)?;
    let Sizes {
        rows,
        inputs,
        outputs,
    } = sizes;
    let rank = sizes.rank(a, b)?;
    let (card, dtype, factors_dtype) = (Card::of(x)?, x.dtype(), a.dtype());
    let (x_kept, weight_kept) = (kept(x)?, kept(weight)?);
    let factors = Factors::new(a, b, dtype)?;
    let left = Matrix::of(&x_kept, inputs)?;
    let low = product(
        card,
        [rows, inputs, rank],
        left,
        factors.a().t(),
        dtype,
        1.0,
    )?;
    let y = forward(&x_kept, &weight_kept, bias, &sizes)?;
    multiply(
        card,
        [rows, rank, outputs],
        Matrix::of_buffer(&low, rank),
        factors.b().t(),
        (Matrix::of_buffer(&y, outputs), true),
        scale,
    )?;
    let wanted = [
        x.track_op(),
        weight.track_op(),
        bias.is_some_and(Tensor::track_op),
        a.track_op(),
        b.track_op(),
    ];
    let tracked: Vec<&Tensor> = [x, weight].into_iter().chain(bias).chain([a, b]).collect();
    let x_dims = x.dims().to_vec();
    record(&tracked, y.into_storage(), sizes.result(x), move |g| {
        let card = Card::of(g)?;
        let g_matrix = Matrix::of(g, outputs)?;
        let low_gradient = match wanted[0] || wanted[3] {
            true => {
                let sizes = [rows, outputs, rank];
                Some(product(card, sizes, g_matrix, factors.b(), dtype, scale)?)
            }
            false => None,
        };
        let low_matrix = low_gradient
            .as_ref()
            .map(|low| Matrix::of_buffer(low, rank));
        let mut gradients = Vec::new();
        if let (true, Some(low)) = (wanted[0], low_matrix) {
            let dx = input_gradient(g, &weight_kept, &sizes)?;
            let to = (Matrix::of_buffer(&dx, inputs), true);
            multiply(card, [rows, rank, inputs], low, factors.a(), to, 1.0)?;
            gradients.push(dx.tensor(x_dims.clone()));
        }
        if wanted[1] {
            gradients.push(weight_gradient(g, &x_kept, &sizes)?);
        }
        if wanted[2] {
            gradients.push(bias_gradient(g, &sizes)?);
        }
        if let (true, Some(left)) = (wanted[3], low_matrix) {
            let right = Matrix::of(&x_kept, inputs)?;
            let sizes = [rank, rows, inputs];
            let da = product(card, sizes, left.t(), right, factors_dtype, 1.0)?;
            gradients.push(da.tensor((rank, inputs)));
        }
        if wanted[4] {
            let right = Matrix::of_buffer(&low, rank);
            let sizes = [outputs, rows, rank];
            let db = product(card, sizes, g_matrix.t(), right, factors_dtype, scale)?;
            gradients.push(db.tensor((outputs, rank)));
        }
        Ok(gradients)
    })
}
