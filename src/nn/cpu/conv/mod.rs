//! Two-dimensional convolution: directly where the machine has the instructions, else as matrix products.

mod direct;
mod kernels;
mod unfolded;

use std::ops::Range;

use candle_core::{Result, Tensor};
use multiversion::multiversion;
use rayon::prelude::*;

use self::kernels::Kernels;
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

    /// What the direct convolution runs on: None where a matrix product serves better.
    fn kernels(&self, images: usize, outputs: usize) -> Option<Kernels> {
        let work = images * outputs * self.pixels() * self.depth();
        (self.kernel > 1 && work > 0)
            .then(|| Kernels::all().next())
            .flatten()
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
    let images = x.len() / geometry.input().max(1);
    match geometry.kernels(images, outputs) {
        Some(kernels) => direct::forward(kernels, x, w, bias, outputs, geometry),
        None => unfolded::forward(x, w, bias, outputs, geometry),
    }
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
    forward(g, &turned, None, channels, &transposed)
}

fn weight_gradient(g: &[f32], x: &[f32], outputs: usize, geometry: &Geometry) -> Vec<f32> {
    let images = x.len() / geometry.input().max(1);
    match geometry.kernels(images, outputs) {
        Some(kernels) => direct::weight_gradient(kernels, g, x, outputs, geometry),
        None => unfolded::weight_gradient(g, x, outputs, geometry),
    }
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;
    use rand_distr::{Distribution, StandardNormal};

    use super::*;

    /// A convolution with random values.
    struct Case {
        geometry: Geometry,
        outputs: usize,
        x: Vec<f32>,
        w: Vec<f32>,
        bias: Vec<f32>,
        gradient: Vec<f32>,
    }

    impl Case {
        fn new(geometry: Geometry, images: usize, outputs: usize) -> Self {
            let mut random = ChaCha8Rng::seed_from_u64(images as u64);
            let mut values = |count: usize| -> Vec<f32> {
                let values = StandardNormal.sample_iter(&mut random);
                values.take(count).collect()
            };
            Self {
                geometry,
                outputs,
                x: values(images * geometry.input()),
                w: values(outputs * geometry.depth()),
                bias: values(outputs),
                gradient: values(images * outputs * geometry.pixels()),
            }
        }

        fn direct(&self, kernels: Kernels) -> [Vec<f32>; 2] {
            let (bias, outputs, geometry) =
                (Some(self.bias.as_slice()), self.outputs, &self.geometry);
            [
                direct::forward(kernels, &self.x, &self.w, bias, outputs, geometry),
                direct::weight_gradient(kernels, &self.gradient, &self.x, outputs, geometry),
            ]
        }

        fn unfolded(&self) -> [Vec<f32>; 2] {
            let (bias, outputs, geometry) =
                (Some(self.bias.as_slice()), self.outputs, &self.geometry);
            [
                unfolded::forward(&self.x, &self.w, bias, outputs, geometry),
                unfolded::weight_gradient(&self.gradient, &self.x, outputs, geometry),
            ]
        }
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|v| v.to_bits()).collect()
    }

    /// Differences of at most 2e-5 of the root of the mean square.
    fn assert_close(found: &[f32], wanted: &[f32], what: &str) {
        assert_eq!(found.len(), wanted.len(), "{what}");
        let squares: f32 = wanted.iter().map(|v| v * v).sum();
        let bound = 2e-5 * (squares / wanted.len() as f32).sqrt().max(1e-2);
        for (i, (a, b)) in found.iter().zip(wanted).enumerate() {
            assert!((a - b).abs() <= bound, "{what}: {a} instead of {b} at {i}");
        }
    }

    fn geometries() -> impl Strategy<Value = Geometry> {
        let windows = prop::sample::select(vec![
            (3, 1, Padding::Same(1)),
            (3, 1, Padding::Same(0)),
            (3, 2, Padding::Same(1)),
            (3, 2, Padding::RightBottom),
            (4, 2, Padding::Same(1)),
            (5, 1, Padding::Same(2)),
            (5, 3, Padding::Same(4)),
            (2, 3, Padding::Same(0)),
        ]);
        let channels = prop::sample::select(vec![1, 3, 5, 32, 48]);
        (channels, 1..20_usize, 1..36_usize, windows).prop_filter_map(
            "a kernel that fits",
            |(channels, height, width, (kernel, stride, padding))| {
                Geometry::new((channels, height, width), kernel, stride, padding)
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..Default::default() })]

        #[test]
        fn the_direct_way_and_the_unfolded_one_agree(
            geometry in geometries(),
            images in 1..4_usize,
            outputs in prop::sample::select(vec![1, 3, 6, 8, 12, 16, 32, 40, 48]),
        ) {
            let case = Case::new(geometry, images, outputs);
            let wanted = case.unfolded();
            let mut first = None;
            for kernels in Kernels::all() {
                let found = case.direct(kernels);
                for (name, i) in [("result", 0), ("gradient of the weight", 1)] {
                    let what = format!("{name}, {kernels:?}, {geometry:?}");
                    assert_close(&found[i], &wanted[i], &what);
                }
                let first = first.get_or_insert_with(|| found.clone());
                for (one, other) in first.iter().zip(&found) {
                    prop_assert_eq!(bits(one), bits(other), "{:?}", kernels);
                }
            }
        }

        #[test]
        fn a_turned_convolution_is_the_gradient_of_the_input(
            geometry in geometries(),
            images in 1..4_usize,
            outputs in 1..40_usize,
        ) {
            let case = Case::new(geometry, images, outputs);
            let found = input_gradient(&case.gradient, &case.w, outputs, images, &geometry);
            let wanted = unfolded::input_gradient(&case.gradient, &case.w, outputs, images, &geometry);
            assert_close(&found, &wanted, &format!("{geometry:?}"));
        }
    }

    #[test]
    fn the_direct_way_gives_the_same_bytes_on_any_number_of_threads() {
        for (channels, outputs, size, images) in [(48, 40, 17, 9), (3, 32, 32, 2), (32, 3, 40, 1)] {
            let planes = (channels, size, size);
            let geometry = Geometry::new(planes, 3, 1, Padding::Same(1)).unwrap();
            let case = Case::new(geometry, images, outputs);
            for kernels in Kernels::all() {
                let on = |threads: usize| {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
                    pool.build().unwrap().install(|| case.direct(kernels))
                };
                let one = on(1).map(|values| bits(&values));
                for threads in [2, 3] {
                    assert_eq!(
                        one,
                        on(threads).map(|values| bits(&values)),
                        "{threads} threads"
                    );
                }
            }
        }
    }
}
