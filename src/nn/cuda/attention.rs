//! Attention by matrix products over all heads at once, with one kernel for mask and softmax and one for its gradient.
//! The probabilities are kept for the backward pass. Few queries without a graph, as in sampling, take one kernel.

use candle_core::{DType, Result, Tensor};

use super::{
    Arg, Buffer, Card, Grid, Matrix, Product, adjacent, at, extent, int, maybe, strides, takes,
};
use crate::nn::ops::Mask;
use crate::nn::shapes::Attention;
use crate::nn::vjp::record;

/// The most queries that [`few`] answers.
const FEW: usize = 8;

/// Threads of one of its blocks.
const THREADS: usize = 512;

/// The most floats of shared memory that a block has without asking for more.
const SHARED: usize = 12 << 10;

/// Whether [`attention`] can take this mask for queries that are like `q`, and scores of this many elements.
pub fn takes_mask(mask: &Mask, q: &Tensor, k: &Tensor) -> bool {
    let (Ok((b, h, n, _)), Ok((_, _, m, _))) = (q.dims4(), k.dims4()) else {
        return false;
    };
    let fits = |bias: &Tensor| {
        takes([bias])
            && (bias.dtype() == DType::F32 || bias.dtype() == q.dtype())
            && bias.device().same_device(q.device())
    };
    let masked = match mask {
        Mask::None | Mask::Causal => true,
        Mask::Additive(bias) => {
            let dims = bias.dims();
            fits(bias)
                && dims.len() == 4
                && [b, h, n].iter().zip(dims).all(|(n, d)| [1, *n].contains(d))
                && dims[3] == m
        }
        Mask::CausalKeys(bias) => {
            fits(bias)
                && !bias.track_op()
                && matches!(bias.dims(), [images, 1, 1, keys] if [1, b].contains(images) && *keys == m)
        }
    };
    masked && b * h * n * line(m) < super::MOST
}

/// From one row of `m` scores to the next: tensor cores read rows that begin at multiples of 16 bytes.
fn line(m: usize) -> usize {
    m.next_multiple_of(8)
}

/// The sizes and the mask of one call.
struct Call {
    sizes: Attention,
    bias: Option<Tensor>,
}

impl Call {
    fn new(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Mask) -> Result<Self> {
        let sizes = Attention::of(q, k, v, mask)?;
        let bias = match mask {
            Mask::None | Mask::Causal => None,
            Mask::Additive(bias) | Mask::CausalKeys(bias) => Some(adjacent(bias)?),
        };
        Ok(Self { sizes, bias })
    }

    fn rows(&self) -> usize {
        self.sizes.b * self.sizes.h * self.sizes.n
    }

    /// Whether later keys are hidden, whether the mask is of floats, and its strides.
    fn mask_args(&self) -> [Arg; 5] {
        let wide = self
            .bias
            .as_ref()
            .is_none_or(|bias| bias.dtype() == DType::F32);
        let mut steps = [0; 3];
        if let Some(bias) = &self.bias {
            for (step, (dim, stride)) in steps.iter_mut().zip(bias.dims().iter().zip(bias.stride()))
            {
                *step = if *dim == 1 { 0 } else { *stride };
            }
        }
        let [m0, m1, m2] = strides(steps);
        [self.sizes.causal.into(), wide.into(), m0, m1, m2]
    }

    /// `result = scale · left·right` for every head.
    fn multiply(
        &self,
        card: Card,
        [rows, depth, columns]: [usize; 3],
        left: Heads,
        right: Heads,
        result: Heads,
        scale: f64,
    ) -> Result<()> {
        let matrix = |heads: Heads| match heads.apart(self.sizes.b, self.sizes.h) {
            Some(apart) => Ok(heads.matrix(apart)),
            None => candle_core::bail!("heads that lie apart unevenly"),
        };
        card.multiply(&Product {
            rows,
            columns,
            depth,
            batch: self.sizes.b * self.sizes.h,
            left: matrix(left)?,
            right: matrix(right)?,
            result: matrix(result)?,
            scale: scale as f32,
            adds: false,
        })
    }

    /// Scores in new memory.
    fn scores(&self, buffer: &Buffer) -> Heads {
        self.heads(buffer, self.sizes.n, line(self.sizes.m))
    }

    /// Memory for all scores.
    fn scores_buffer(&self, card: Card, dtype: DType) -> Result<Buffer> {
        card.buffer(self.rows() * line(self.sizes.m), dtype)
    }

    /// A contiguous (b, h, rows, width) in new memory.
    fn heads(&self, buffer: &Buffer, rows: usize, width: usize) -> Heads {
        Heads {
            at: buffer.at(),
            count: buffer.count(),
            dtype: buffer.dtype(),
            strides: [self.sizes.h * rows * width, rows * width, width],
            turned: false,
        }
    }
}

/// The matrices of a tensor (b, h, n, d).
#[derive(Clone, Copy)]
struct Heads {
    at: u64,
    /// Elements that there are from `at` on.
    count: usize,
    dtype: DType,
    strides: [usize; 3],
    turned: bool,
}

impl Heads {
    fn of(x: &Tensor) -> Result<Self> {
        let steps = x.stride();
        Ok(Self {
            at: super::card::at(x)?,
            count: extent(x.dims(), steps),
            dtype: x.dtype(),
            strides: [steps[0], steps[1], steps[2]],
            turned: false,
        })
    }

    fn t(self) -> Self {
        Self {
            turned: !self.turned,
            ..self
        }
    }

    /// How far all the matrices lie apart, if each does from the next.
    fn apart(&self, b: usize, h: usize) -> Option<usize> {
        let [image, head, _] = self.strides;
        match (b, h) {
            (1, _) => Some(head),
            (_, 1) => Some(image),
            _ if image == h * head => Some(head),
            _ => None,
        }
    }

    fn matrix(&self, apart: usize) -> Matrix {
        Matrix {
            at: self.at,
            count: self.count,
            dtype: self.dtype,
            stride: self.strides[2],
            apart,
            turned: self.turned,
        }
    }
}

/// `x` as one batch of matrix products can read it.
fn readable(x: &Tensor) -> Result<Tensor> {
    let x = adjacent(x)?;
    let (b, h, n, d) = x.dims4()?;
    let is_dense = n == 1 || x.stride()[2] >= d;
    match is_dense && Heads::of(&x)?.apart(b, h).is_some() {
        true => Ok(x),
        false => super::layout::copy(&x),
    }
}

/// See [`crate::nn::ops::attention`]; the mask is one that [`takes_mask`].
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, mask: &Mask) -> Result<Tensor> {
    let call = Call::new(q, k, v, mask)?;
    let Attention { b, h, n, m, d, .. } = call.sizes;
    let bias = match mask {
        Mask::Additive(bias) => Some(bias).filter(|bias| bias.track_op()),
        Mask::None | Mask::Causal | Mask::CausalKeys(_) => None,
    };
    let wanted = [q.track_op(), k.track_op(), v.track_op()];
    let is_recorded = wanted.contains(&true) || bias.is_some();
    let (q_kept, k_kept, v_kept) = (readable(q)?, readable(k)?, readable(v)?);
    if !is_recorded && n <= FEW && m + d + THREADS <= SHARED {
        return few(&call, [&q_kept, &k_kept, &v_kept], scale);
    }
    let (card, dtype) = (Card::of(&q_kept)?, q.dtype());
    let scores = call.scores_buffer(card, DType::F32)?;
    call.multiply(
        card,
        [n, d, m],
        Heads::of(&q_kept)?,
        Heads::of(&k_kept)?.t(),
        call.scores(&scores),
        scale,
    )?;
    let probabilities = softmax(&call, card, scores, dtype)?;
    let y = card.buffer(call.rows() * d, dtype)?;
    call.multiply(
        card,
        [n, m, d],
        call.scores(&probabilities),
        Heads::of(&v_kept)?,
        call.heads(&y, n, d),
        1.0,
    )?;
    let bias_like = bias.map(Tensor::detach);
    let inputs: Vec<&Tensor> = [q, k, v].into_iter().chain(bias).collect();
    record(&inputs, y.into_storage(), (b, h, n, d), move |gradient| {
        let card = Card::of(gradient)?;
        let g = Heads::of(gradient)?;
        let kept = call.scores(&probabilities);
        let mut gradients = Vec::new();
        let new = |rows: usize| card.buffer(b * h * rows * d, dtype);
        let slopes = match wanted[0] || wanted[1] || bias_like.is_some() {
            true => Some(slopes(&call, g, &v_kept, &probabilities)?),
            false => None,
        };
        for (i, (other, rows, columns)) in
            [(&k_kept, n, m), (&q_kept, m, n)].into_iter().enumerate()
        {
            let (true, Some(slopes)) = (wanted[i], &slopes) else {
                continue;
            };
            let left = call.scores(slopes);
            let left = if i == 0 { left } else { left.t() };
            let dx = new(rows)?;
            let to = call.heads(&dx, rows, d);
            call.multiply(card, [rows, columns, d], left, Heads::of(other)?, to, scale)?;
            gradients.push(dx.tensor((b, h, rows, d)));
        }
        if wanted[2] {
            let dv = new(m)?;
            let to = call.heads(&dv, m, d);
            call.multiply(card, [m, n, d], kept.t(), g, to, 1.0)?;
            gradients.push(dv.tensor((b, h, m, d)));
        }
        if let (Some(bias), Some(slopes)) = (&bias_like, slopes) {
            let slopes = slopes.tensor((b, h, n, line(m))).narrow(3, 0, m)?;
            gradients.push(bias_gradient(slopes, bias)?);
        }
        Ok(gradients)
    })
}

/// The probabilities of scaled scores; where they are stored in f32, in the same memory.
fn softmax(call: &Call, card: Card, scores: Buffer, dtype: DType) -> Result<Buffer> {
    let (rows, m) = (call.rows(), call.sizes.m);
    let own = match dtype {
        DType::F32 => None,
        _ => Some(call.scores_buffer(card, dtype)?),
    };
    let bias = maybe(call.bias.as_ref())?;
    let to = own.as_ref().unwrap_or(&scores);
    let mut args = vec![Arg::from(to), Arg::from(&scores), bias, int(rows)?];
    args.extend([
        int(call.sizes.h)?,
        int(call.sizes.n)?,
        int(m)?,
        int(line(m))?,
    ]);
    args.extend(call.mask_args());
    // SAFETY: scores and probabilities have `rows` lines; the mask's strides are 0 where it is shared.
    unsafe { card.launch("attend_forward", dtype, Grid::rows(rows, m), &args) }?;
    Ok(own.unwrap_or(scores))
}

/// The gradient of the scores with scale and mask, (b, h, n, m), of that of the result.
fn slopes(call: &Call, g: Heads, v: &Tensor, probabilities: &Buffer) -> Result<Buffer> {
    let (rows, n, m, d) = (call.rows(), call.sizes.n, call.sizes.m, call.sizes.d);
    let (card, dtype) = (Card::of(v)?, v.dtype());
    let products = call.scores_buffer(card, DType::F32)?;
    let to = call.scores(&products);
    call.multiply(card, [n, d, m], g, Heads::of(v)?.t(), to, 1.0)?;
    let own = match dtype {
        DType::F32 => None,
        _ => Some(call.scores_buffer(card, dtype)?),
    };
    let to = own.as_ref().unwrap_or(&products);
    let args = [
        Arg::from(to),
        Arg::from(probabilities),
        Arg::from(&products),
        int(rows)?,
        int(m)?,
        int(line(m))?,
    ];
    // SAFETY: all three have `rows` lines of scores.
    unsafe { card.launch("attend_backward", dtype, Grid::rows(rows, m), &args) }?;
    Ok(own.unwrap_or(products))
}

/// The slopes summed over what shares a part of the mask.
fn bias_gradient(slopes: Tensor, bias: &Tensor) -> Result<Tensor> {
    let mut sum = slopes.to_dtype(DType::F32)?;
    for (i, dim) in bias.dims().iter().enumerate() {
        if *dim != sum.dim(i)? {
            sum = sum.sum_keepdim(i)?;
        }
    }
    sum.to_dtype(bias.dtype())
}

/// Attention of few queries, without a graph.
fn few(call: &Call, [q, k, v]: [&Tensor; 3], scale: f64) -> Result<Tensor> {
    let Attention { b, h, n, m, d, .. } = call.sizes;
    let (card, rows) = (Card::of(q)?, call.rows());
    let y = card.buffer(rows * d, q.dtype())?;
    let bias = maybe(call.bias.as_ref())?;
    let mut args = vec![Arg::from(&y), at(q)?, at(k)?, at(v)?, bias];
    args.extend([int(h)?, int(n)?, int(m)?, int(d)?, scale.into()]);
    let [causal, wide, m0, m1, m2] = call.mask_args();
    args.extend([causal, wide]);
    for x in [q, k, v] {
        let steps = x.stride();
        args.extend(strides([steps[0], steps[1], steps[2]]));
    }
    args.extend([m0, m1, m2]);
    let mut grid = Grid::blocks(rows, (THREADS as u32, 1));
    grid.shared = ((m + d + THREADS) * size_of::<f32>()) as u32;
    // SAFETY: the strides are those of the tensors, whose shapes were checked, and the shared memory has room for a
    // row.
    unsafe { card.launch("attend_rows", q.dtype(), grid, &args) }?;
    Ok(y.tensor((b, h, n, d)))
}
