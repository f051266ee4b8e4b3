//! Two-dimensional convolution as matrix products.

mod unfolded;

use std::ops::Range;

use candle_core::{Result, Tensor};
use multiversion::multiversion;
use rayon::prelude::*;

use super::{detached, simd, tensor, values};
use crate::nn::ops::Padding;
use crate::nn::vjp::record;

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
    /// None where the kernel does not fit into the padded planes.
    fn new(
        (channels, height, width): (usize, usize, usize),
        kernel: usize,
        stride: usize,
        padding: Padding,
    ) -> Option<Self> {
        let (before, both) = match padding {
            Padding::Same(n) => (n, 2 * n),
            Padding::RightBottom => (0, 1),
        };
        let outputs = |size: usize| {
            let last = (size + both).checked_sub(kernel)?;
            Some(last.checked_div(stride)? + 1)
        };
        Some(Self {
            channels,
            height,
            width,
            kernel,
            stride,
            before,
            rows: outputs(height)?,
            columns: outputs(width)?,
        })
        .filter(|_| kernel > 0)
    }

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

    /// The outputs i of `count` for which `i · stride + offset − before` is a pixel of `limit`.
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
    let fits =
        c == inputs && kernel == kernel_width && bias.is_none_or(|bias| bias.dims() == [outputs]);
    let Some(geometry) = Geometry::new((c, h, w), kernel, stride, padding).filter(|_| fits) else {
        candle_core::bail!(
            "convolution of {:?} with a weight of {:?}, stride {stride}, {padding:?}, bias {:?}",
            x.dims(),
            weight.dims(),
            bias.map(Tensor::dims)
        );
    };
    let (x_kept, weight_kept) = (detached(x)?, detached(weight)?);
    let y = {
        let bias = bias.map(detached).transpose()?;
        let bias = bias.as_ref().map(values).transpose()?;
        unfolded::forward(
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
            let dw = unfolded::weight_gradient(&g, &values(&x_kept)?, outputs, &geometry);
            gradients.push(tensor(dw, weight_kept.shape())?);
        }
        if wanted.2 {
            gradients.push(tensor(channel_sums(&g, outputs, &geometry), outputs)?);
        }
        Ok(gradients)
    })
}

/// The convolution's transpose: at stride 1 a convolution with the weight turned around.
fn input_gradient(
    g: &[f32],
    w: &[f32],
    outputs: usize,
    images: usize,
    geometry: &Geometry,
) -> Vec<f32> {
    let Geometry {
        channels, kernel, ..
    } = *geometry;
    if geometry.stride > 1 || geometry.before >= kernel {
        return unfolded::input_gradient(g, w, outputs, images, geometry);
    }
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
        rows: geometry.height,
        columns: geometry.width,
        ..*geometry
    };
    unfolded::forward(g, &turned, None, channels, &transposed)
}

fn channel_sums(g: &[f32], outputs: usize, geometry: &Geometry) -> Vec<f32> {
    let pixels = geometry.pixels();
    let mut sums = vec![0.0; outputs];
    let body = |(channel, sum): (usize, &mut f32)| *sum = channel_sum(g, channel, outputs, pixels);
    if !super::is_alone(g.len(), super::ALONE) {
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
