//! Convolution without a matrix of patches. An image is unfolded along its columns alone: one copy of each row for each
//! column of the kernel, shifted so that the pixels under all outputs are adjacent. The kernel's rows are then only
//! offsets, the copies stay in a core's cache, and the kernels of [`super::kernels`] read them in place.

use std::ops::Range;

use rayon::prelude::*;

use super::Geometry;
use super::kernels::{Gradients, Kernels, LINES, Products, SLACK, transpose};
use crate::nn::cpu::gemm::Shared;
use crate::nn::cpu::{ALONE_PRODUCTS, add_slices, is_alone};

/// The copies of a strip have about this many elements at most.
const STRIP: usize = 1 << 17;

/// Channels that are copied and summed before the next ones.
const CHANNELS: usize = 32;

/// Work is cut into about this many tasks, each with memory of its own for a strip.
const TASKS: usize = 16;

/// A strip has at least this many pixels, however few tasks that makes.
const PIXELS: usize = 128;

impl Geometry {
    /// Output rows of one strip, if `share` rows are a task's share of the work.
    fn rows_at_once(&self, share: usize) -> usize {
        let line = self.channels.min(CHANNELS) * self.kernel * self.columns;
        let fit = (STRIP / line).saturating_sub(self.kernel - 1) / self.stride;
        let most = fit
            .min(share.max(PIXELS.div_ceil(self.columns)))
            .clamp(1, self.rows);
        self.rows.div_ceil(self.rows.div_ceil(most))
    }
}

/// Where [`spread`] puts `rows` output rows: for each column of the kernel the rows y, y + stride, …, which successive
/// outputs see, from y = 0 on, then those from y = 1 on, and so to the stride or the kernel's end.
struct Layout {
    rows: Range<usize>,
    /// From one channel to the next.
    channel: usize,
    /// From one column of the kernel to the next.
    column: usize,
    /// Where the pixels under each tap begin.
    taps: Vec<usize>,
}

impl Layout {
    fn new(geometry: &Geometry, rows: Range<usize>) -> Self {
        let Geometry {
            kernel,
            stride,
            columns,
            ..
        } = *geometry;
        let mut starts = Vec::new();
        let mut lines = 0;
        for first in 0..stride.min(kernel) {
            starts.push(lines);
            lines += Self::lines(geometry, rows.len(), first);
        }
        let column = lines * columns;
        let taps = (0..kernel * kernel)
            .map(|tap| {
                let (dy, dx) = (tap / kernel, tap % kernel);
                dx * column + (starts[dy % stride] + dy / stride) * columns
            })
            .collect();
        Self {
            rows,
            channel: column * kernel,
            column,
            taps,
        }
    }

    /// Rows of the image that `rows` output rows see from kernel row `first` on, `stride` apart.
    fn lines(geometry: &Geometry, rows: usize, first: usize) -> usize {
        rows + (geometry.kernel - 1 - first) / geometry.stride
    }

    /// Pixels of one output channel.
    fn count(&self, geometry: &Geometry) -> usize {
        self.rows.len() * geometry.columns
    }
}

/// Copies the planes `x` as [`Layout`] says, with zeros for what lies outside.
fn spread(x: &[f32], geometry: &Geometry, layout: &Layout, copies: &mut Vec<f32>) {
    let area = geometry.height * geometry.width;
    copies.resize(x.len() / area * layout.channel + SLACK, 0.0);
    let channels = copies.chunks_exact_mut(layout.channel);
    for (plane, copies) in x.chunks_exact(area).zip(channels) {
        for (dx, mut rest) in copies.chunks_exact_mut(layout.column).enumerate() {
            for first in 0..geometry.stride.min(geometry.kernel) {
                let lines = Layout::lines(geometry, layout.rows.len(), first);
                let (out, more) = rest.split_at_mut(lines * geometry.columns);
                rest = more;
                let row = layout.rows.start * geometry.stride + first;
                shift(plane, geometry, (row, dx), out);
            }
        }
    }
}

/// Copies the rows `row`, `row + stride`, … of a padded plane, from column `dx` on.
fn shift(plane: &[f32], geometry: &Geometry, (row, dx): (usize, usize), out: &mut [f32]) {
    let Geometry {
        height,
        width,
        stride,
        before,
        columns,
        ..
    } = *geometry;
    let lines = out.len() / columns;
    let inside = geometry.inside(dx, columns, width);
    let rows = geometry.inside(row, lines, height);
    if inside.is_empty() || rows.is_empty() {
        out.fill(0.0);
        return;
    }
    out[..rows.start * columns].fill(0.0);
    out[rows.end * columns..].fill(0.0);
    let from = (rows.start * stride + row - before) * width + inside.start * stride + dx - before;
    let out = &mut out[rows.start * columns..rows.end * columns];
    if stride == 1 && columns == width {
        // All in one copy; what came over the edges is overwritten.
        let until = out.len() - (columns - inside.end);
        let count = until - inside.start;
        out[inside.start..until].copy_from_slice(&plane[from..from + count]);
        for out in out.chunks_exact_mut(columns) {
            out[..inside.start].iter_mut().for_each(|v| *v = 0.0);
            out[inside.end..].iter_mut().for_each(|v| *v = 0.0);
        }
        return;
    }
    let sources = plane[from..].chunks(stride * width);
    for (out, source) in out.chunks_exact_mut(columns).zip(sources) {
        out[..inside.start].iter_mut().for_each(|v| *v = 0.0);
        out[inside.end..].iter_mut().for_each(|v| *v = 0.0);
        let out = &mut out[inside.clone()];
        match stride {
            1 => out.copy_from_slice(&source[..out.len()]),
            2 => every_second(source, out),
            _ => {
                let source = source.iter().step_by(stride);
                out.iter_mut().zip(source).for_each(|(o, s)| *o = *s);
            }
        }
    }
}

/// Written so that it becomes shuffles of registers.
fn every_second(source: &[f32], out: &mut [f32]) {
    let (pairs, last) = source.as_chunks::<2>();
    let whole = out.len().min(pairs.len());
    let (out, end) = out.split_at_mut(whole);
    for (out, [first, _]) in out.iter_mut().zip(pairs) {
        *out = *first;
    }
    end.iter_mut().zip(last).for_each(|(o, s)| *o = *s);
}

/// Weights (outputs, depth) in blocks of (depth, width), zeros where the last has fewer.
fn pack(kernels: Kernels, weights: &[f32], outputs: usize, depth: usize) -> Vec<f32> {
    let mut packed = Vec::new();
    for (first, width) in kernels.weight_blocks(outputs) {
        packed.resize((first + width) * depth, 0.0);
        let shape = (width.min(outputs - first), depth);
        let to = (&mut packed[first * depth..], width);
        transpose(kernels, (&weights[first * depth..], depth), shape, to);
    }
    packed
}

/// (images, channels, height, width) to (images, outputs, rows, columns).
pub fn forward(
    kernels: Kernels,
    x: &[f32],
    weights: &[f32],
    bias: Option<&[f32]>,
    outputs: usize,
    geometry: &Geometry,
) -> Vec<f32> {
    let (area, pixels) = (geometry.height * geometry.width, geometry.pixels());
    let (taps, depth) = (geometry.kernel * geometry.kernel, geometry.depth());
    let images = x.len() / geometry.input();
    let weights = pack(kernels, weights, outputs, depth);
    let zeros = vec![0.0; outputs];
    let bias = bias.unwrap_or(&zeros);
    let strip = geometry.rows_at_once((images * geometry.rows).div_ceil(TASKS));
    let strips = geometry.rows.div_ceil(strip);
    let tasks = images * strips;
    let length = images * outputs * pixels;
    let mut y = Vec::with_capacity(length);
    let shared = &Shared(y.as_mut_ptr());
    let body = |copies: &mut Vec<f32>, task: usize| {
        let (image, first) = (task / strips, task % strips * strip);
        let layout = Layout::new(geometry, first..(first + strip).min(geometry.rows));
        let x = &x[image * geometry.input()..(image + 1) * geometry.input()];
        for (part, x) in x.chunks(CHANNELS * area).enumerate() {
            spread(x, geometry, &layout, copies);
            let products = Products {
                pixels: copies,
                channels: x.len() / area,
                channel: layout.channel,
                taps: &layout.taps,
                weights: &weights,
                depth,
                skipped: part * CHANNELS * taps,
                bias: (part == 0).then_some(bias),
                outputs,
                count: layout.count(geometry),
                stride: pixels,
            };
            // SAFETY: these rows of all channels of `image` lie within `y`, and no other task writes them.
            unsafe {
                let out = shared
                    .0
                    .add(image * outputs * pixels + first * geometry.columns);
                products.run(kernels, out);
            }
        }
    };
    if is_alone(length * depth, ALONE_PRODUCTS) {
        let mut copies = Vec::new();
        (0..tasks).for_each(|task| body(&mut copies, task));
    } else {
        (0..tasks)
            .into_par_iter()
            .with_min_len((tasks / TASKS).max(1))
            .for_each_init(Vec::new, body);
    }
    // SAFETY: the tasks have written every strip of every image.
    unsafe { y.set_len(length) };
    y
}

/// The gradient of the weight from that of the result.
pub fn weight_gradient(
    kernels: Kernels,
    gradient: &[f32],
    x: &[f32],
    outputs: usize,
    geometry: &Geometry,
) -> Vec<f32> {
    let Geometry { channels, rows, .. } = *geometry;
    let (area, pixels) = (geometry.height * geometry.width, geometry.pixels());
    let (taps, depth) = (geometry.kernel * geometry.kernel, geometry.depth());
    let images = x.len() / geometry.input();
    let blocks: Vec<_> = kernels.gradient_blocks(outputs).collect();
    let width: usize = blocks.iter().map(|(_, width)| width).sum();
    let parts = channels.div_ceil(CHANNELS);
    let lines = |part: usize| {
        let channels = (channels - part * CHANNELS).min(CHANNELS);
        (channels * taps).next_multiple_of(LINES)
    };
    let size = width * lines(0);
    // Each task sums over a group of images for some channels.
    let each = images.div_ceil((TASKS / parts).max(1));
    let groups = images.div_ceil(each);
    let strip = geometry.rows_at_once(rows);
    let mut partial = vec![0.0; groups * parts * size];
    let body = |(copies, turned): &mut (Vec<f32>, Vec<f32>), (task, sums): (usize, &mut [f32])| {
        let (group, part) = (task / parts, task % parts);
        for image in group * each..((group + 1) * each).min(images) {
            let from = image * channels + part * CHANNELS;
            let until = (from + CHANNELS).min((image + 1) * channels);
            let gradient = &gradient[image * outputs * pixels..(image + 1) * outputs * pixels];
            for first in (0..rows).step_by(strip) {
                let layout = Layout::new(geometry, first..(first + strip).min(rows));
                let count = layout.count(geometry);
                spread(&x[from * area..until * area], geometry, &layout, copies);
                let mut starts: Vec<usize> = (0..until - from)
                    .flat_map(|c| layout.taps.iter().map(move |tap| (c, tap)))
                    .map(|(c, tap)| c * layout.channel + tap)
                    .collect();
                starts.resize(lines(part), 0);
                turned.resize(width * count, 0.0);
                for &(output, width) in &blocks {
                    let from = &gradient[output * pixels + first * geometry.columns..];
                    let shape = (width.min(outputs - output), count);
                    let to = (&mut turned[output * count..], width);
                    transpose(kernels, (from, pixels), shape, to);
                }
                let gradients = Gradients {
                    pixels: copies,
                    lines: &starts,
                    gradient: turned,
                    outputs,
                    count,
                };
                gradients.run(kernels, sums);
            }
        }
    };
    partial
        .par_chunks_mut(size)
        .enumerate()
        .for_each_init(|| (Vec::new(), Vec::new()), body);
    let mut dw = vec![0.0; outputs * depth];
    // All blocks but the last have one width.
    dw.par_chunks_mut(blocks[0].1 * depth)
        .zip(&blocks)
        .for_each(|(dw, &(output, width))| {
            for part in 0..parts {
                let range = output * lines(part)..(output + width) * lines(part);
                let mut total = vec![0.0; range.len()];
                for sums in partial[part * size..].chunks(parts * size) {
                    add_slices(&mut total, &sums[range.clone()]);
                }
                let first = part * CHANNELS * taps;
                let shape = ((depth - first).min(CHANNELS * taps), dw.len() / depth);
                let to = (&mut dw[first..], depth);
                transpose(kernels, (&total, width), shape, to);
            }
        });
    dw
}
