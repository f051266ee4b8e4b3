//! Convolution as matrix products over unfolded strips of each image.

use std::ops::Range;

use rayon::prelude::*;

use super::Geometry;
use crate::nn::cpu::gemm::{Matrix, Shared, Threads, multiply, multiply_into};
use crate::nn::cpu::{ALONE_PRODUCTS, each_piece, is_alone};

/// An unfolded strip has at most this many elements (unless one row of pixels has more): it stays in a core's cache.
const STRIP: usize = 1 << 17;

/// A loop over images is split into about this many tasks: each has memory of its own for a strip.
const TASKS: usize = 16;

/// The gradient of the weight is summed over at most this many groups of images.
const GROUPS: usize = 8;

impl Geometry {
    /// Whether the unfolded image is the image.
    fn is_pointwise(&self) -> bool {
        self.kernel == 1 && self.stride == 1 && self.before == 0 && self.rows == self.height
    }

    /// Output rows of one strip.
    fn strip(&self) -> usize {
        (STRIP / (self.depth() * self.columns).max(1)).clamp(1, self.rows.max(1))
    }
}

pub fn forward(
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
    if is_alone(
        tasks * outputs * depth * strip * geometry.columns,
        ALONE_PRODUCTS,
    ) {
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

/// The convolution's transpose, folded back.
pub fn input_gradient(
    g: &[f32],
    w: &[f32],
    outputs: usize,
    images: usize,
    geometry: &Geometry,
) -> Vec<f32> {
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

pub fn weight_gradient(g: &[f32], x: &[f32], outputs: usize, geometry: &Geometry) -> Vec<f32> {
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
    each_piece(&mut dw, depth, |output, dw| {
        for group in partial.chunks_exact(size.max(1)) {
            let column = group[output..].iter().step_by(outputs);
            dw.iter_mut().zip(column).for_each(|(d, p)| *d += p);
        }
    });
    dw
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
