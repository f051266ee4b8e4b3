//! Resizing with the arithmetic of Pillow (`src/libImaging/Resample.c`), which the reference pipelines of CLIP, DINO,
//! LlamaGen and DreamBooth use: separable antialiased filters whose support grows with the scale, coefficients in
//! 22-bit fixed point, and an 8-bit picture between the horizontal and the vertical pass. Rows come first, as in Pillow
//! up to 12; Pillow 13 swaps the passes where the height shrinks far more than the width, one level's difference at most.

use image::RgbImage;
use rayon::prelude::*;

const PRECISION_BITS: u32 = 32 - 8 - 2;

/// Pillow's resampling filters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// The mean of the covered pixels.
    Box,
    Bilinear,
    /// Catmull-Rom, a = -0.5.
    Bicubic,
    /// Three lobes.
    Lanczos,
}

impl Filter {
    /// Lower-case name, as in settings and reports.
    pub fn name(self) -> &'static str {
        match self {
            Filter::Box => "box",
            Filter::Bilinear => "bilinear",
            Filter::Bicubic => "bicubic",
            Filter::Lanczos => "lanczos",
        }
    }

    fn support(self) -> f64 {
        match self {
            Filter::Box => 0.5,
            Filter::Bilinear => 1.0,
            Filter::Bicubic => 2.0,
            Filter::Lanczos => 3.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        match self {
            Filter::Box => f64::from(x > -0.5 && x <= 0.5),
            Filter::Bilinear => (1.0 - x.abs()).max(0.0),
            Filter::Bicubic => {
                const A: f64 = -0.5;
                let x = x.abs();
                if x < 1.0 {
                    ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
                } else if x < 2.0 {
                    (((x - 5.0) * x + 8.0) * x - 4.0) * A
                } else {
                    0.0
                }
            }
            Filter::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Filter::Lanczos => 0.0,
        }
    }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 {
        return 1.0;
    }
    let x = x * std::f64::consts::PI;
    x.sin() / x
}

/// The source pixels of one output pixel: the first, and a fixed-point weight for it and each that follows.
struct Taps {
    first: usize,
    weights: Vec<i32>,
}

fn taps(from: usize, to: usize, filter: Filter) -> Vec<Taps> {
    let scale = from as f64 / to as f64;
    let filter_scale = scale.max(1.0);
    let support = filter.support() * filter_scale;
    (0..to)
        .map(|i| {
            let center = (i as f64 + 0.5) * scale;
            let first = (center - support + 0.5).max(0.0) as usize;
            let end = ((center + support + 0.5) as usize).min(from);
            // A reciprocal, as in the original: dividing differs in the last bit.
            let inverse = 1.0 / filter_scale;
            let mut weights: Vec<f64> = (first..end)
                .map(|x| filter.weight((x as f64 - center + 0.5) * inverse))
                .collect();
            let sum: f64 = weights.iter().sum();
            if sum != 0.0 {
                weights.iter_mut().for_each(|w| *w /= sum);
            }
            let one = f64::from(1 << PRECISION_BITS);
            let weights = weights
                .into_iter()
                .map(|w| (w * one + if w < 0.0 { -0.5 } else { 0.5 }) as i32)
                .collect();
            Taps { first, weights }
        })
        .collect()
}

fn to_u8(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

fn horizontal(image: &RgbImage, width: u32, filter: Filter) -> RgbImage {
    let taps = taps(image.width() as usize, width as usize, filter);
    let mut out = RgbImage::new(width, image.height());
    let source_row = image.width() as usize * 3;
    out.par_chunks_mut(width as usize * 3)
        .zip(image.par_chunks(source_row))
        .for_each(|(row, source)| {
            for (pixel, taps) in row.chunks_exact_mut(3).zip(&taps) {
                let mut sums = [1i32 << (PRECISION_BITS - 1); 3];
                for (from, weight) in source[taps.first * 3..].chunks_exact(3).zip(&taps.weights) {
                    for (sum, &value) in sums.iter_mut().zip(from) {
                        *sum += i32::from(value) * weight;
                    }
                }
                for (to, sum) in pixel.iter_mut().zip(sums) {
                    *to = to_u8(sum);
                }
            }
        });
    out
}

fn vertical(image: &RgbImage, height: u32, filter: Filter) -> RgbImage {
    let taps = taps(image.height() as usize, height as usize, filter);
    let mut out = RgbImage::new(image.width(), height);
    let row_length = image.width() as usize * 3;
    out.par_chunks_mut(row_length)
        .zip(&taps)
        .for_each(|(row, taps)| {
            let mut sums = vec![1i32 << (PRECISION_BITS - 1); row_length];
            let sources = image.chunks_exact(row_length).skip(taps.first);
            for (source, weight) in sources.zip(&taps.weights) {
                for (sum, &value) in sums.iter_mut().zip(source) {
                    *sum += i32::from(value) * weight;
                }
            }
            for (to, sum) in row.iter_mut().zip(sums) {
                *to = to_u8(sum);
            }
        });
    out
}

/// `image` at exactly `width` × `height` pixels (0 is taken as 1), equal to `PIL.Image.resize((width, height), filter)`.
pub fn resize_exact(image: &RgbImage, width: u32, height: u32, filter: Filter) -> RgbImage {
    let (width, height) = (width.max(1), height.max(1));
    if image.width() == 0 || image.height() == 0 {
        return RgbImage::new(width, height);
    }
    match (image.width() != width, image.height() != height) {
        (false, false) => image.clone(),
        (true, false) => horizontal(image, width, filter),
        (false, true) => vertical(image, height, filter),
        (true, true) => vertical(&horizontal(image, width, filter), height, filter),
    }
}

/// `image` with its short side `size` pixels long and the other in proportion, rounded down, as
/// `torchvision.transforms.Resize(size)`.
pub fn resize_short_side(image: &RgbImage, size: u32, filter: Filter) -> RgbImage {
    let (width, height) = image.dimensions();
    let long = |long: u32, short: u32| {
        (u64::from(size) * u64::from(long) / u64::from(short.max(1))) as u32
    };
    if width <= height {
        resize_exact(image, size, long(height, width), filter)
    } else {
        resize_exact(image, long(width, height), size, filter)
    }
}

/// The middle `width` × `height` pixels of `image`, or as many as it has. An odd margin is split as
/// `torchvision.transforms.CenterCrop` does it: half rounded to even.
pub fn center_crop(image: &RgbImage, width: u32, height: u32) -> RgbImage {
    let (width, height) = (width.min(image.width()), height.min(image.height()));
    let offset = |margin: u32| (f64::from(margin) / 2.0).round_ties_even() as u32;
    let (x, y) = (
        offset(image.width() - width),
        offset(image.height() - height),
    );
    image::imageops::crop_imm(image, x, y, width, height).to_image()
}

/// The middle square of `image` at `size` × `size` pixels: the short side resized with Lanczos, then cropped.
pub fn square(image: &RgbImage, size: u32) -> RgbImage {
    center_crop(&resize_short_side(image, size, Filter::Lanczos), size, size)
}
