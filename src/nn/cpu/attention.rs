//! Attention whose memory is linear in the sequence: scores exist for one block of queries at a time and are computed
//! again in the backward pass from the saved maximum and sum of each row (much as in Dao et al. 2022, arXiv 2205.14135).
//! Where there are few keys, and a row of scores is not much longer than a query, the probabilities are kept instead.
//!
//! Both passes take exactly the same probabilities. A single log-sum-exp per row, as there, would be rounded to the
//! size of the scores, and a row that has all but settled on one key then loses most of its gradient's digits.

use std::ops::Range;

use candle_core::{Result, Tensor};
use multiversion::multiversion;
use rayon::prelude::*;

use super::gemm::{Matrix, Shared, Threads, multiply};
use super::{
    ALONE_PRODUCTS, Values, adjacent, detached, is_alone, simd, strided_values, tensor, values,
};
use crate::nn::ops::Mask;
use crate::nn::shapes::Attention;
use crate::nn::vjp::record;

/// The most queries of one block.
const BLOCK: usize = 64;

/// Probabilities are kept for as many keys as this times the length of one.
const KEPT: usize = 4;

/// Queries of each block of `n`, the last of which may be smaller. Of two blocks the first is half or a little more, so
/// that the second is not left with a few rows for all the keys: in whole tiles of the products, and in whole vectors
/// where it sees as many keys as it has rows.
fn block_of(n: usize) -> usize {
    const WHOLE: usize = 16;
    match n.div_ceil(BLOCK) {
        2 => n.div_ceil(2).next_multiple_of(WHOLE),
        _ => BLOCK,
    }
}

/// Whether [`attention`] can take this mask: one row of keys for every query, or one for all.
pub fn takes_mask(mask: &Mask, n: usize, m: usize) -> bool {
    match mask {
        Mask::None | Mask::Causal => true,
        Mask::Additive(bias) => {
            super::takes([bias])
                && matches!(bias.dims(), [_, _, rows, keys] if [1, n].contains(rows) && *keys == m)
        }
        Mask::CausalKeys(bias) => {
            super::takes([bias])
                && !bias.track_op()
                && matches!(bias.dims(), [_, 1, 1, keys] if *keys == m)
        }
    }
}

/// See [`crate::nn::ops::attention`]; the mask is one that [`takes_mask`].
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, mask: &Mask) -> Result<Tensor> {
    let call = Call::new(q, k, v, scale, mask)?;
    let Attention { b, h, n, m, d, .. } = call.sizes;
    let kept = [adjacent(q)?, adjacent(k)?, adjacent(v)?];
    let rows = block_of(n);
    let wanted = [q.track_op(), k.track_op(), v.track_op()];
    let keeps = wanted.contains(&true) && m <= KEPT * d;
    let mut y = vec![0.0; b * h * n * d];
    let mut norms = vec![Norm::default(); b * h * n];
    // (b, h, n, m)
    let mut probabilities = match keeps {
        true => vec![0.0; b * h * n * m],
        false => Vec::new(),
    };
    {
        let shared = Shared(probabilities.as_mut_ptr());
        let shared = &shared;
        let [q, k, v] = call.heads(&kept)?;
        let mask = call.mask_values()?;
        let body = |scores: &mut Vec<f32>,
                    head: usize,
                    first: usize,
                    y: &mut [f32],
                    norms: &mut [Norm]| {
            let queries = first..first + norms.len();
            let count = queries.len();
            let keys = call.keys(queries.end);
            let (scores, width) = if keeps {
                let start = (head * n + first) * m;
                // SAFETY: the rows of these queries lie within the vector, and no other block has them.
                let own = unsafe { std::slice::from_raw_parts_mut(shared.0.add(start), count * m) };
                (own, m)
            } else {
                scores.resize(count * keys, 0.0);
                (scores.as_mut_slice(), keys)
            };
            call.scores(&q, &k, head, queries, (scores, width));
            softmax_rows(
                (scores, width),
                keys,
                call.visible(first),
                call.mask_rows(mask.as_deref(), head, first),
                norms,
            );
            multiply(
                1.0,
                Matrix::with_stride(scores, count, keys, width),
                v.matrix(head, 0..keys),
                y,
                d,
                false,
                Threads::One,
            );
        };
        if is_alone(b * h * n * m * d, ALONE_PRODUCTS) {
            let mut scores = Vec::new();
            let heads = y.chunks_mut((n * d).max(1)).zip(norms.chunks_mut(n.max(1)));
            for (head, (y, norms)) in heads.enumerate() {
                let blocks = y.chunks_mut((rows * d).max(1)).zip(norms.chunks_mut(rows));
                for (block, (y, norms)) in blocks.enumerate() {
                    body(&mut scores, head, block * rows, y, norms);
                }
            }
        } else {
            y.par_chunks_mut((n * d).max(1))
                .zip(norms.par_chunks_mut(n.max(1)))
                .enumerate()
                .flat_map(|(head, (y, norms))| {
                    y.par_chunks_mut((rows * d).max(1))
                        .zip(norms.par_chunks_mut(rows))
                        .enumerate()
                        .map(move |(block, out)| (head, block * rows, out))
                })
                .for_each_init(Vec::new, |scores, (head, first, (y, norms))| {
                    body(scores, head, first, y, norms)
                });
        }
    }
    let bias = match mask {
        Mask::Additive(bias) => Some(bias).filter(|bias| bias.track_op()),
        Mask::None | Mask::Causal | Mask::CausalKeys(_) => None,
    };
    let bias_dims = bias.map(|bias| bias.dims().to_vec());
    let inputs: Vec<&Tensor> = [q, k, v].into_iter().chain(bias).collect();
    record(&inputs, y, (b, h, n, d), move |gradient| {
        let g = values(gradient)?;
        let [q, k, v] = call.heads(&kept)?;
        let mask = call.mask_values()?;
        let mut dq = vec![0.0; b * h * n * d];
        let mut dk = vec![0.0; b * h * m * d];
        let mut dv = vec![0.0; b * h * m * d];
        let body = |(scores, slopes): &mut (Vec<f32>, Vec<f32>),
                    head: usize,
                    [dq, dk, dv]: [&mut [f32]; 3]| {
            for first in (0..n).step_by(rows) {
                let queries = first..(first + rows).min(n);
                let keys = call.keys(queries.end);
                let range = head * n + queries.start..head * n + queries.end;
                let g_rows = &g[range.start * d..range.end * d];
                let g_rows = Matrix::new(g_rows, queries.len(), d);
                let place = (head, queries.clone());
                let probabilities = if keeps {
                    let kept = &probabilities[range.start * m..range.end * m];
                    call.products(&v, &g, &place, slopes);
                    differentiate_kept(kept, m, slopes, keys);
                    Matrix::with_stride(kept, queries.len(), keys, m)
                } else {
                    let saved = (norms.as_slice(), &*g);
                    call.slopes(
                        [&q, &k, &v],
                        mask.as_deref(),
                        saved,
                        place,
                        (scores, slopes),
                    );
                    Matrix::new(scores, queries.len(), keys)
                };
                let slopes = Matrix::new(slopes, queries.len(), keys);
                multiply(
                    1.0,
                    probabilities.t(),
                    g_rows,
                    dv,
                    d,
                    first > 0,
                    Threads::One,
                );
                multiply(
                    call.scale,
                    slopes,
                    k.matrix(head, 0..keys),
                    &mut dq[first * d..],
                    d,
                    false,
                    Threads::One,
                );
                multiply(
                    call.scale,
                    slopes.t(),
                    q.matrix(head, queries),
                    dk,
                    d,
                    first > 0,
                    Threads::One,
                );
            }
        };
        let (queries, keys) = ((n * d).max(1), (m * d).max(1));
        if is_alone(b * h * n * m * d, ALONE_PRODUCTS) {
            let mut scratch = Default::default();
            let heads = dq.chunks_mut(queries).zip(dk.chunks_mut(keys));
            let heads = heads.zip(dv.chunks_mut(keys)).enumerate();
            heads.for_each(|(head, ((dq, dk), dv))| body(&mut scratch, head, [dq, dk, dv]));
        } else {
            let heads = dq.par_chunks_mut(queries).zip(dk.par_chunks_mut(keys));
            let heads = heads.zip(dv.par_chunks_mut(keys)).enumerate();
            heads.for_each_init(Default::default, |scratch, (head, ((dq, dk), dv))| {
                body(scratch, head, [dq, dk, dv]);
            });
        }
        let mut gradients = Vec::new();
        for (wanted, gradient, length) in
            [(wanted[0], dq, n), (wanted[1], dk, m), (wanted[2], dv, m)]
        {
            if wanted {
                gradients.push(tensor(gradient, (b, h, length, d))?);
            }
        }
        if let Some(dims) = &bias_dims {
            let saved = (norms.as_slice(), &*g);
            let gradient = call.mask_gradient([&q, &k, &v], mask.as_deref(), saved, dims);
            gradients.push(tensor(gradient, dims.as_slice())?);
        }
        Ok(gradients)
    })
}

/// The sizes and the mask of one call.
struct Call {
    sizes: Attention,
    scale: f32,
    bias: Option<Tensor>,
}

/// What is added to the scores of some queries: rows of keys `stride` elements apart, 0 for one row that all share.
#[derive(Clone, Copy)]
struct MaskRows<'a> {
    values: &'a [f32],
    stride: usize,
}

impl Call {
    fn new(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, mask: &Mask) -> Result<Self> {
        let sizes = Attention::of(q, k, v, mask)?;
        let Attention { b, h, n, m, .. } = sizes;
        let bias = match mask {
            Mask::None | Mask::Causal => None,
            Mask::Additive(bias) | Mask::CausalKeys(bias) => {
                let (images, heads, _, _) = bias.dims4()?;
                if ![1, b].contains(&images) || ![1, h].contains(&heads) {
                    candle_core::bail!(
                        "a mask of {:?} for scores of {:?}",
                        bias.dims(),
                        [b, h, n, m]
                    );
                }
                Some(detached(bias)?)
            }
        };
        Ok(Self {
            sizes,
            scale: scale as f32,
            bias,
        })
    }

    fn heads<'a>(&self, kept: &'a [Tensor; 3]) -> Result<[Heads<'a>; 3]> {
        Ok([
            Heads::new(&kept[0])?,
            Heads::new(&kept[1])?,
            Heads::new(&kept[2])?,
        ])
    }

    /// How many keys the queries before `end` can see.
    fn keys(&self, end: usize) -> usize {
        if self.sizes.causal {
            end + self.sizes.m - self.sizes.n
        } else {
            self.sizes.m
        }
    }

    /// How many keys query `first` sees, if each query after it sees one more.
    fn visible(&self, first: usize) -> Option<usize> {
        self.sizes
            .causal
            .then(|| first + 1 + self.sizes.m - self.sizes.n)
    }

    fn mask_values(&self) -> Result<Option<Values<'_>>> {
        self.bias.as_ref().map(values).transpose()
    }

    /// What is added to the scores from query `first` of `head` on.
    fn mask_rows<'a>(
        &self,
        all: Option<&'a [f32]>,
        head: usize,
        first: usize,
    ) -> Option<MaskRows<'a>> {
        let dims = self.bias.as_ref()?.dims();
        let (image, head) = (head / self.sizes.h % dims[0], head % self.sizes.h % dims[1]);
        let start = ((image * dims[1] + head) * dims[2] + first % dims[2]) * self.sizes.m;
        all.map(|all| MaskRows {
            values: &all[start..],
            stride: if dims[2] == 1 { 0 } else { self.sizes.m },
        })
    }

    /// The probabilities of some queries of one head, and the gradients of their scores.
    fn slopes(
        &self,
        [q, k, v]: [&Heads; 3],
        mask: Option<&[f32]>,
        (norms, g): (&[Norm], &[f32]),
        (head, queries): (usize, Range<usize>),
        (probabilities, slopes): (&mut Vec<f32>, &mut Vec<f32>),
    ) {
        let keys = self.keys(queries.end);
        let rows = head * self.sizes.n + queries.start..head * self.sizes.n + queries.end;
        probabilities.resize(queries.len() * keys, 0.0);
        self.scores(q, k, head, queries.clone(), (probabilities, keys));
        self.products(v, g, &(head, queries.clone()), slopes);
        differentiate_rows(
            (probabilities, slopes),
            keys,
            self.visible(queries.start),
            self.mask_rows(mask, head, queries.start),
            &norms[rows],
        );
    }

    /// g·vᵀ for the queries and all the keys that one of them sees.
    fn products(
        &self,
        v: &Heads,
        g: &[f32],
        (head, queries): &(usize, Range<usize>),
        products: &mut Vec<f32>,
    ) {
        let keys = self.keys(queries.end);
        let rows = head * self.sizes.n + queries.start..head * self.sizes.n + queries.end;
        products.resize(queries.len() * keys, 0.0);
        multiply(
            1.0,
            Matrix::new(
                &g[rows.start * self.sizes.d..rows.end * self.sizes.d],
                queries.len(),
                self.sizes.d,
            ),
            v.matrix(*head, 0..keys).t(),
            products,
            keys,
            false,
            Threads::One,
        );
    }

    /// The gradient of an additive mask of shape `dims`, (1 or b, 1 or h, 1 or n, m): the scores' gradients, summed over
    /// what shares a row of it.
    fn mask_gradient(
        &self,
        heads: [&Heads; 3],
        mask: Option<&[f32]>,
        saved: (&[Norm], &[f32]),
        dims: &[usize],
    ) -> Vec<f32> {
        let (n, m) = (self.sizes.n, self.sizes.m);
        let mut sums = vec![0.0; dims.iter().product()];
        sums.par_chunks_mut((dims[2] * m).max(1))
            .enumerate()
            .for_each_init(
                || (Vec::new(), Vec::new()),
                |(probabilities, slopes), (part, sums)| {
                    let (image, own) = (part / dims[1], part % dims[1]);
                    // In the order of their numbers: every head whose scores this part of the mask is added to.
                    let shares = |head: &usize| {
                        head / self.sizes.h % dims[0] == image
                            && head % self.sizes.h % dims[1] == own
                    };
                    for head in (0..self.sizes.b * self.sizes.h).filter(shares) {
                        for first in (0..n).step_by(BLOCK) {
                            let queries = first..(first + BLOCK).min(n);
                            let place = (head, queries);
                            self.slopes(heads, mask, saved, place, (probabilities, slopes));
                            for (i, slopes) in slopes.chunks_exact(m).enumerate() {
                                let row = (first + i) % dims[2];
                                let sums = &mut sums[row * m..(row + 1) * m];
                                sums.iter_mut().zip(slopes).for_each(|(sum, s)| *sum += s);
                            }
                        }
                    }
                },
            );
        sums
    }

    /// scale · q·kᵀ for the queries and all the keys that one of them sees, in rows `width` elements apart.
    fn scores(
        &self,
        q: &Heads,
        k: &Heads,
        head: usize,
        queries: Range<usize>,
        (scores, width): (&mut [f32], usize),
    ) {
        let keys = self.keys(queries.end);
        multiply(
            self.scale,
            q.matrix(head, queries),
            k.matrix(head, 0..keys).t(),
            scores,
            width,
            false,
            Threads::One,
        );
    }
}

/// The (n, d) matrices of a tensor (b, h, n, d).
struct Heads<'a> {
    values: Values<'a>,
    h: usize,
    d: usize,
    strides: [usize; 3],
}

impl<'a> Heads<'a> {
    fn new(x: &'a Tensor) -> Result<Self> {
        let (_, h, _, d) = x.dims4()?;
        let strides = [x.stride()[0], x.stride()[1], x.stride()[2]];
        Ok(Self {
            values: strided_values(x)?,
            h,
            d,
            strides,
        })
    }

    fn matrix(&self, head: usize, rows: Range<usize>) -> Matrix<'_> {
        let start = head / self.h * self.strides[0]
            + head % self.h * self.strides[1]
            + rows.start * self.strides[2];
        Matrix::with_stride(&self.values[start..], rows.len(), self.d, self.strides[2])
    }
}

/// The scores of row `row` that can be seen, with the mask added to them. The mask's rows are as long as all keys, the
/// scores' only as long as those that one of their block sees.
#[inline(always)]
fn masked<'a>(
    row: usize,
    scores: &'a mut [f32],
    visible: Option<usize>,
    mask: Option<MaskRows>,
) -> &'a mut [f32] {
    let keys = scores.len();
    let count = visible.map_or(keys, |first| (first + row).min(keys));
    let (seen, hidden) = scores.split_at_mut(count);
    hidden.fill(0.0);
    if let Some(mask) = mask {
        let own = seen[count - 1];
        for (s, m) in seen.iter_mut().zip(&mask.values[row * mask.stride..]) {
            *s += m;
        }
        if visible.is_some() {
            seen[count - 1] = own;
        }
    }
    seen
}

/// What turns a row's scores into probabilities: e^(s − highest) · inverse.
#[derive(Debug, Clone, Copy, Default)]
struct Norm {
    highest: f32,
    /// 1 / Σ e^(s − highest).
    inverse: f32,
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn softmax_rows(
    (scores, width): (&mut [f32], usize),
    keys: usize,
    visible: Option<usize>,
    mask: Option<MaskRows>,
    norms: &mut [Norm],
) {
    for (i, (row, norm)) in scores.chunks_exact_mut(width).zip(norms).enumerate() {
        let row = masked(i, &mut row[..keys], visible, mask);
        // Rows are short: what is left after the last whole block is made one, of scores that add nothing.
        let (blocks, rest) = row.as_chunks_mut::<{ simd::LANES }>();
        let mut last = [f32::NEG_INFINITY; simd::LANES];
        last[..rest.len()].copy_from_slice(rest);
        let highest = simd::max(blocks.as_flattened()).max(simd::max(&last));
        let mut lanes = [0.0; simd::LANES];
        for block in blocks.iter_mut().chain([&mut last]) {
            for (s, lane) in block.iter_mut().zip(&mut lanes) {
                *s = simd::exp(*s - highest);
                *lane += *s;
            }
        }
        let inverse = 1.0 / simd::fold(lanes);
        for block in blocks.iter_mut().chain([&mut last]) {
            for s in block {
                *s *= inverse;
            }
        }
        rest.copy_from_slice(&last[..rest.len()]);
        *norm = Norm { highest, inverse };
    }
}

/// Turns scores into probabilities P and `slopes`, which holds S = g·vᵀ, into the gradient of the scores:
/// P ∘ (S − rowsum(P ∘ S)). The sum equals that of g ∘ y, but rounds as S does, so that what cancels cancels.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn differentiate_rows(
    (scores, slopes): (&mut [f32], &mut [f32]),
    keys: usize,
    visible: Option<usize>,
    mask: Option<MaskRows>,
    norms: &[Norm],
) {
    for (i, (row, slopes)) in scores
        .chunks_exact_mut(keys)
        .zip(slopes.chunks_exact_mut(keys))
        .enumerate()
    {
        let row = masked(i, row, visible, mask);
        let Norm { highest, inverse } = norms[i];
        let (slopes, hidden) = slopes.split_at_mut(row.len());
        hidden.fill(0.0);
        for s in row.iter_mut() {
            *s = simd::exp(*s - highest) * inverse;
        }
        let product = simd::sum_pairs(row, slopes, |p, s| p * s);
        for (p, slope) in row.iter().zip(slopes) {
            *slope = *p * (*slope - product);
        }
    }
}

/// [`differentiate_rows`] with probabilities that were kept, in rows `width` elements apart.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn differentiate_kept(probabilities: &[f32], width: usize, slopes: &mut [f32], keys: usize) {
    let rows = probabilities.chunks_exact(width);
    for (row, slopes) in rows.zip(slopes.chunks_exact_mut(keys)) {
        let row = &row[..keys];
        let product = simd::sum_pairs(row, slopes, |p, s| p * s);
        for (p, slope) in row.iter().zip(slopes) {
            *slope = *p * (*slope - product);
        }
    }
}
