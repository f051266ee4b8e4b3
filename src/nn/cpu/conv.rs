//! Two-dimensional convolution as matrix products over unfolded strips of each image.

use std::ops::Range;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::gemm::{Matrix, Shared, Threads, multiply, multiply_into};
use super::{detached, simd, tensor, values};
use crate::nn::ops::Padding;
use crate::nn::vjp::record;
use multiversion::multiversion;

/// An unfolded strip has at most this many elements (unless one row of pixels has more): it stays in a core's cache.
const STRIP: usize = 1 << 17;

/// A loop over images is split into about this many tasks: each has memory of its own for a strip.
const TASKS: usize = 16;

/// The gradient of the weight is summed over at most this many groups of images.
const GROUPS: usize = 8;

/// Sizes of one convolution: `channels` planes of `height` x `width` to planes of `rows` x `columns`.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Geometry {
    channels: usize,
    height: usize,
    width: usize,
    kernel: usize,
    stride: usize,
    /// Zeros above and on the left.
    before: usize,
    rows: usize,
    columns: usize,
}

impl Geometry {
    /// Rows of the unfolded matrix: one for each weight of an output channel.
    fn depth(&self) -> usize {
        self.channels * self.kernel * self.kernel
    }

    fn input(&self) -> usize {
        self.channels * self.height * self.width
    }

    fn pixels(&self) -> usize {
        self.rows * self.columns
    }

    /// Whether the unfolded image is the image.
    fn is_pointwise(&self) -> bool {
        self.kernel == 1 && self.stride == 1 && self.before == 0 && self.rows == self.height
    }

    /// Output rows of one strip.
    fn strip(&self) -> usize {
        (STRIP / (self.depth() * self.columns).max(1)).clamp(1, self.rows.max(1))
    }

    /// The columns x for which `x · stride + offset − before` lies within the image.
    fn inside(&self, offset: usize, count: usize, limit: usize) -> Range<usize> {
        let from = self
            .before
            .saturating_sub(offset)
            .div_ceil(self.stride)
            .min(count);
        let until = (limit + self.before)
            .saturating_sub(offset)
            .div_ceil(self.stride)
            .min(count);
        from..until.max(from)
    }
}

/// See [`crate::nn::ops::conv2d`].
pub fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    stride: usize,
    padding: Padding,
) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    let (outputs, inputs, kernel, kernel_width) = weight.dims4()?;
    let (before, both) = match padding {
        Padding::Same(n) => (n, 2 * n),
        Padding::RightBottom => (0, 1),
    };
    let fits = c == inputs
        && kernel == kernel_width
        && kernel > 0
        && stride > 0
        && h + both >= kernel
        && w + both >= kernel
        && bias.is_none_or(|bias| bias.dims() == [outputs]);
    if !fits {
        candle_core::bail!(
            "convolution of {:?} with a weight of {:?}, stride {stride}, {padding:?}, bias {:?}",
            x.dims(),
            weight.dims(),
            bias.map(Tensor::dims)
        );
    }
    let geometry = Geometry {
        channels: c,
        height: h,
        width: w,
        kernel,
        stride,
        before,
        rows: (h + both - kernel) / stride + 1,
        columns: (w + both - kernel) / stride + 1,
    };
    let (x_kept, weight_kept) = (detached(x)?, detached(weight)?);
    let y = {
        let bias = bias.map(detached).transpose()?;
        let bias = bias.as_ref().map(values).transpose()?;
        forward(
            &values(&x_kept)?,
            &values(&weight_kept)?,
            bias.as_deref(),
            outputs,
            &geometry,
        )
    };
    let wanted = (
        x.track_op(),
        weight.track_op(),
        bias.is_some_and(Tensor::track_op),
    );
    let inputs: Vec<&Tensor> = [x, weight].into_iter().chain(bias).collect();
    let shape = (b, outputs, geometry.rows, geometry.columns);
    record(&inputs, y, shape, move |gradient| {
        let g = values(gradient)?;
        let mut gradients = Vec::new();
        if wanted.0 {
            let w = values(&weight_kept)?;
            let dx = input_gradient(&g, &w, outputs, b, &geometry);
            gradients.push(tensor(dx, x_kept.shape())?);
        }
        if wanted.1 {
            let dw = weight_gradient(&g, &values(&x_kept)?, outputs, &geometry);
            gradients.push(tensor(dw, weight_kept.shape())?);
        }
        if wanted.2 {
            gradients.push(tensor(channel_sums(&g, outputs, &geometry), outputs)?);
        }
        Ok(gradients)
    })
}

fn forward(
    x: &[f32],
    w: &[f32],
    bias: Option<&[f32]>,
    outputs: usize,
    geometry: &Geometry,
) -> Vec<f32> {
    let (depth, pixels) = (geometry.depth(), geometry.pixels());
    let images = x.len() / geometry.input().max(1);
    let mut y = vec![0.0; images * outputs * pixels];
    let strip = geometry.strip();
    let strips = geometry.rows.div_ceil(strip);
    let shared = Shared(y.as_mut_ptr());
    let shared = &shared;
    let body = |unfolded: &mut Vec<f32>, task: usize| {
        let (image, first) = (task / strips, task % strips * strip);
        let last = (first + strip).min(geometry.rows);
        let count = (last - first) * geometry.columns;
        let x = &x[image * geometry.input()..(image + 1) * geometry.input()];
        let columns = if geometry.is_pointwise() {
            let x = &x[first * geometry.columns..];
            Matrix::with_stride(x, depth, count, pixels)
        } else {
            unfold(x, first..last, geometry, unfolded);
            Matrix::new(unfolded, depth, count)
        };
        let weights = Matrix::new(w, outputs, depth);
        let start = image * outputs * pixels + first * geometry.columns;
        // SAFETY: rows `first..last` of all channels of `image` lie within `y`, and no other task writes them.
        unsafe {
            let out = shared.0.add(start);
            multiply_into(1.0, weights, columns, out, pixels, false, Threads::One);
            for (channel, bias) in bias.unwrap_or_default().iter().enumerate() {
                let row = std::slice::from_raw_parts_mut(out.add(channel * pixels), count);
                row.iter_mut().for_each(|v| *v += bias);
            }
        }
    };
    let tasks = images * strips;
    if tasks * outputs * depth * strip * geometry.columns <= super::ALONE_PRODUCTS {
        let mut unfolded = Vec::new();
        (0..tasks).for_each(|task| body(&mut unfolded, task));
    } else {
        (0..tasks)
            .into_par_iter()
            .with_min_len((tasks / TASKS).max(1))
            .for_each_init(Vec::new, body);
    }
    y
}

/// The convolution's transpose: at stride 1 a convolution with the weight turned around, else folded back.
fn input_gradient(
    g: &[f32],
    w: &[f32],
    outputs: usize,
    images: usize,
    geometry: &Geometry,
) -> Vec<f32> {
    let Geometry {
        channels,
        kernel,
        height,
        width,
        ..
    } = *geometry;
    if geometry.stride == 1 && geometry.before < kernel {
        let area = kernel * kernel;
        let mut turned = vec![0.0; w.len()];
        for (o, w) in w.chunks_exact(channels * area).enumerate() {
            for (c, w) in w.chunks_exact(area).enumerate() {
                let to = &mut turned[(c * outputs + o) * area..][..area];
                to.iter_mut().zip(w.iter().rev()).for_each(|(t, w)| *t = *w);
            }
        }
        let transposed = Geometry {
            channels: outputs,
            height: geometry.rows,
            width: geometry.columns,
            before: kernel - 1 - geometry.before,
            rows: height,
            columns: width,
            ..*geometry
        };
        return forward(g, &turned, None, channels, &transposed);
    }
    let (depth, pixels) = (geometry.depth(), geometry.pixels());
    let strip = geometry.strip();
    let mut dx = vec![0.0; images * geometry.input()];
    dx.par_chunks_mut(geometry.input().max(1))
        .zip(g.par_chunks(outputs * pixels))
        .with_min_len((images / TASKS).max(1))
        .for_each_init(Vec::new, |unfolded, (dx, g)| {
            for first in (0..geometry.rows).step_by(strip) {
                let last = (first + strip).min(geometry.rows);
                let count = (last - first) * geometry.columns;
                unfolded.resize(depth * count, 0.0);
                let g = &g[first * geometry.columns..];
                multiply(
                    1.0,
                    Matrix::new(w, outputs, depth).t(),
                    Matrix::with_stride(g, outputs, count, pixels),
                    unfolded,
                    count,
                    false,
                    Threads::One,
                );
                fold(unfolded, first..last, geometry, dx);
            }
        });
    dx
}

fn weight_gradient(g: &[f32], x: &[f32], outputs: usize, geometry: &Geometry) -> Vec<f32> {
    let (depth, pixels) = (geometry.depth(), geometry.pixels());
    let images = x.len() / geometry.input().max(1);
    let size = outputs * depth;
    let each = images.div_ceil(GROUPS).max(1);
    let groups = images.div_ceil(each).max(1);
    let threads = if groups == 1 {
        Threads::All
    } else {
        Threads::One
    };
    let strip = geometry.strip();
    let mut partial = vec![0.0; groups * size];
    partial
        .par_chunks_mut(size.max(1))
        .enumerate()
        .for_each_init(Vec::new, |unfolded, (group, dw)| {
            let mut accumulate = false;
            for image in group * each..((group + 1) * each).min(images) {
                let x = &x[image * geometry.input()..(image + 1) * geometry.input()];
                let g = &g[image * outputs * pixels..(image + 1) * outputs * pixels];
                for first in (0..geometry.rows).step_by(strip) {
                    let last = (first + strip).min(geometry.rows);
                    let count = (last - first) * geometry.columns;
                    let columns = if geometry.is_pointwise() {
                        let x = &x[first * geometry.columns..];
                        Matrix::with_stride(x, depth, count, pixels)
                    } else {
                        unfold(x, first..last, geometry, unfolded);
                        Matrix::new(unfolded, depth, count)
                    };
                    let g = &g[first * geometry.columns..];
                    let g = Matrix::with_stride(g, outputs, count, pixels);
                    // Transposed, so that the kernels pack the small gradient and not the large strip.
                    multiply(1.0, columns, g.t(), dw, outputs, accumulate, threads);
                    accumulate = true;
                }
            }
        });
    let mut dw = vec![0.0; size];
    super::each_piece(&mut dw, depth, |output, dw| {
        for group in partial.chunks_exact(size.max(1)) {
            let column = group[output..].iter().step_by(outputs);
            dw.iter_mut().zip(column).for_each(|(d, p)| *d += p);
        }
    });
    dw
}

fn channel_sums(g: &[f32], outputs: usize, geometry: &Geometry) -> Vec<f32> {
    let pixels = geometry.pixels();
    let mut sums = vec![0.0; outputs];
    let body = |(channel, sum): (usize, &mut f32)| *sum = channel_sum(g, channel, outputs, pixels);
    if g.len() > super::ALONE {
        sums.par_iter_mut().enumerate().for_each(body);
    } else {
        sums.iter_mut().enumerate().for_each(body);
    }
    sums
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma"))]
fn channel_sum(g: &[f32], channel: usize, channels: usize, pixels: usize) -> f32 {
    let mut total = 0.0;
    for image in g.chunks_exact(channels * pixels) {
        total += simd::sum(&image[channel * pixels..(channel + 1) * pixels], |v| v);
    }
    total
}

/// Writes the patches under output rows `rows` of one image: (depth, pixels of these rows).
fn unfold(x: &[f32], rows: Range<usize>, geometry: &Geometry, unfolded: &mut Vec<f32>) {
    let Geometry {
        height,
        width,
        kernel,
        stride,
        before,
        columns,
        ..
    } = *geometry;
    let count = rows.len() * columns;
    unfolded.resize(geometry.depth() * count, 0.0);
    for (line, out) in unfolded.chunks_exact_mut(count.max(1)).enumerate() {
        let (channel, dy, dx) = (
            line / (kernel * kernel),
            line / kernel % kernel,
            line % kernel,
        );
        let plane = &x[channel * height * width..(channel + 1) * height * width];
        let inside = geometry.inside(dx, columns, width);
        if stride == 1 && columns == width {
            shift(plane, rows.clone(), geometry, (dy, inside, dx), out);
            continue;
        }
        for (out, row) in out.chunks_exact_mut(columns).zip(rows.clone()) {
            let y = row * stride + dy;
            if y < before || y - before >= height || inside.is_empty() {
                out.fill(0.0);
                continue;
            }
            let source = &plane[(y - before) * width..(y - before + 1) * width];
            let from = inside.start * stride + dx - before;
            out[..inside.start].fill(0.0);
            out[inside.end..].fill(0.0);
            let source = source[from..].iter().step_by(stride);
            let out = &mut out[inside.clone()];
            out.iter_mut().zip(source).for_each(|(o, s)| *o = *s);
        }
    }
}

/// One line of [`unfold`] at stride 1 and equal widths: the plane, shifted, in one copy; what came over the edges is
/// overwritten with zeros.
fn shift(
    plane: &[f32],
    rows: Range<usize>,
    geometry: &Geometry,
    (dy, inside, dx): (usize, Range<usize>, usize),
    out: &mut [f32],
) {
    let (width, before) = (geometry.width, geometry.before);
    // The output rows that read from the image.
    let until = (geometry.height + before).saturating_sub(dy);
    let first = rows.start.max(before.saturating_sub(dy)).min(rows.end);
    let last = rows.end.min(until).max(first);
    let (head, rest) = out.split_at_mut((first - rows.start) * width);
    let (out, tail) = rest.split_at_mut((last - first) * width);
    head.fill(0.0);
    tail.fill(0.0);
    if out.is_empty() || inside.is_empty() {
        out.fill(0.0);
        return;
    }
    // The first and the last element that are inside lie within the plane; between them all is adjacent.
    let skip = inside.start;
    let length = out.len() - skip - (width - inside.end);
    let from = (first + dy - before) * width + skip + dx - before;
    out[skip..skip + length].copy_from_slice(&plane[from..from + length]);
    if inside.len() < width {
        for row in out.chunks_exact_mut(width) {
            row[..inside.start].fill(0.0);
            row[inside.end..].fill(0.0);
        }
    }
}

/// The transpose of [`unfold`]: adds every patch back to where it came from.
fn fold(unfolded: &[f32], rows: Range<usize>, geometry: &Geometry, x: &mut [f32]) {
    let Geometry {
        height,
        width,
        kernel,
        stride,
        before,
        columns,
        ..
    } = *geometry;
    let count = rows.len() * columns;
    for (line, patch) in unfolded.chunks_exact(count.max(1)).enumerate() {
        let (channel, dy, dx) = (
            line / (kernel * kernel),
            line / kernel % kernel,
            line % kernel,
        );
        let plane = &mut x[channel * height * width..(channel + 1) * height * width];
        let inside = geometry.inside(dx, columns, width);
        for (patch, row) in patch.chunks_exact(columns).zip(rows.clone()) {
            let y = row * stride + dy;
            if y < before || y - before >= height || inside.is_empty() {
                continue;
            }
            let target = &mut plane[(y - before) * width..(y - before + 1) * width];
            let from = inside.start * stride + dx - before;
            let target = target[from..].iter_mut().step_by(stride);
            target
                .zip(&patch[inside.clone()])
                .for_each(|(t, p)| *t += p);
        }
    }
}
