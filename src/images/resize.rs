//! Resizing with the arithmetic of Pillow (`src/libImaging/Resample.c`), which the reference pipelines of CLIP, DINO,
//! LlamaGen and DreamBooth use: separable antialiased filters whose support grows with the scale, coefficients in
//! 22-bit fixed point, and an 8-bit picture between the horizontal and the vertical pass. Rows come first, as in Pillow
//! up to 12; Pillow 13 swaps the passes where the height shrinks far more than the width, one level's difference at most.

use std::borrow::Cow;
use std::ops::Range;

use image::{RgbImage, imageops};
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

/// The taps of the output pixels `wanted` out of `to`.
fn taps(from: usize, to: usize, wanted: Range<usize>, filter: Filter) -> Vec<Taps> {
    let scale = from as f64 / to as f64;
    let filter_scale = scale.max(1.0);
    let support = filter.support() * filter_scale;
    wanted
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

/// Of the rows `rows` of `image`, a pixel for each of `taps`.
fn horizontal(image: &RgbImage, rows: Range<usize>, taps: &[Taps]) -> RgbImage {
    let mut out = RgbImage::new(taps.len() as u32, rows.len() as u32);
    let source_row = image.width() as usize * 3;
    out.par_chunks_mut(taps.len() * 3)
        .zip(image.as_raw()[rows.start * source_row..rows.end * source_row].par_chunks(source_row))
        .for_each(|(row, source)| {
            for (pixel, taps) in row.chunks_exact_mut(3).zip(taps) {
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

/// A row for each of `taps`, of an image whose first row they count as `above`.
fn vertical(image: &RgbImage, above: usize, taps: &[Taps]) -> RgbImage {
    let mut out = RgbImage::new(image.width(), taps.len() as u32);
    let row_length = image.width() as usize * 3;
    out.par_chunks_mut(row_length)
        .zip(taps)
        .for_each(|(row, taps)| {
            let mut sums = vec![1i32 << (PRECISION_BITS - 1); row_length];
            let sources = image.chunks_exact(row_length).skip(taps.first - above);
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

/// The columns `x` and rows `y` of `image` at `width` × `height` pixels. No more than these is computed, and no more of
/// `image` looked at than they are made of: a strip that is enlarged by its short side costs what is kept of it.
fn part(
    image: &RgbImage,
    (width, height): (usize, usize),
    x: Range<usize>,
    y: Range<usize>,
    filter: Filter,
) -> RgbImage {
    if x.is_empty() || y.is_empty() {
        return RgbImage::new(x.len() as u32, y.len() as u32);
    }
    let (own_width, own_height) = (image.width() as usize, image.height() as usize);
    let down = (own_height != height).then(|| taps(own_height, height, y.clone(), filter));
    let rows = match down.as_deref() {
        // Both ends of the taps grow from row to row.
        Some(taps) => {
            let end = taps
                .last()
                .map_or(0, |last| last.first + last.weights.len());
            taps.first().map_or(0, |first| first.first)..end
        }
        None => y,
    };
    let above = rows.start;
    let narrow = if own_width != width {
        Cow::Owned(horizontal(image, rows, &taps(own_width, width, x, filter)))
    } else if (x.len(), rows.len()) != (own_width, own_height) {
        let (x, y) = ((x.start, x.len()), (rows.start, rows.len()));
        let cut = imageops::crop_imm(image, x.0 as u32, y.0 as u32, x.1 as u32, y.1 as u32);
        Cow::Owned(cut.to_image())
    } else {
        Cow::Borrowed(image)
    };
    match down {
        Some(taps) => vertical(&narrow, above, &taps),
        None => narrow.into_owned(),
    }
}

/// `image` at exactly `width` × `height` pixels (0 is taken as 1), equal to `PIL.Image.resize((width, height), filter)`.
pub fn resize_exact(image: &RgbImage, width: u32, height: u32, filter: Filter) -> RgbImage {
    let (width, height) = (width.max(1), height.max(1));
    if image.width() == 0 || image.height() == 0 {
        return RgbImage::new(width, height);
    }
    let (width, height) = (width as usize, height as usize);
    part(image, (width, height), 0..width, 0..height, filter)
}

/// Width and height of `image` with its short side `size` pixels long and the other in proportion, rounded down.
pub fn short_side(image: &RgbImage, size: u32) -> (u64, u64) {
    let (width, height) = (u64::from(image.width()), u64::from(image.height()));
    let size = u64::from(size.max(1));
    let long = |long: u64, short: u64| size * long / short.max(1);
    if width <= height {
        (size, long(height, width))
    } else {
        (long(width, height), size)
    }
}

/// `image` with its short side `size` pixels long and the other in proportion, rounded down, as
/// `torchvision.transforms.Resize(size)`.
pub fn resize_short_side(image: &RgbImage, size: u32, filter: Filter) -> RgbImage {
    let (width, height) = short_side(image, size);
    let whole = |side: u64| u32::try_from(side).unwrap_or(u32::MAX);
    resize_exact(image, whole(width), whole(height), filter)
}

/// The middle `width` × `height` pixels of `image`, or as many as it has. An odd margin is split as
/// `torchvision.transforms.CenterCrop` does it: half rounded to even.
pub fn center_crop(image: &RgbImage, width: u32, height: u32) -> RgbImage {
    let x = middle(image.width() as usize, width);
    let y = middle(image.height() as usize, height);
    let (left, top) = (x.start as u32, y.start as u32);
    imageops::crop_imm(image, left, top, x.len() as u32, y.len() as u32).to_image()
}

/// The middle `kept` of `all` pixels, or as many as there are.
fn middle(all: usize, kept: u32) -> Range<usize> {
    let kept = all.min(kept as usize);
    let start = ((all - kept) as f64 / 2.0).round_ties_even() as usize;
    start..start + kept
}

/// [`resize_short_side`] and [`center_crop`], without the pixels that the latter would throw away: they can be millions
/// for each that is kept.
pub fn resize_and_crop(
    image: &RgbImage,
    size: u32,
    filter: Filter,
    (width, height): (u32, u32),
) -> RgbImage {
    if image.width() == 0 || image.height() == 0 {
        return RgbImage::new(size.min(width), size.min(height));
    }
    let (all_width, all_height) = short_side(image, size);
    let all = (all_width as usize, all_height as usize);
    let (x, y) = (middle(all.0, width), middle(all.1, height));
    part(image, all, x, y, filter)
}

/// The middle square of `image` at `size` × `size` pixels: the short side resized with Lanczos, then cropped.
pub fn square(image: &RgbImage, size: u32) -> RgbImage {
    resize_and_crop(image, size, Filter::Lanczos, (size, size))
}

#[cfg(test)]
mod tests {
    use image::Rgb;

    use super::*;

    #[test]
    fn a_part_equals_the_same_part_of_the_whole() {
        let image = RgbImage::from_fn(61, 40, |x, y| {
            Rgb([(x * 7 + y * 3) as u8, (x * y) as u8, (x ^ y) as u8])
        });
        for filter in [
            Filter::Box,
            Filter::Bilinear,
            Filter::Bicubic,
            Filter::Lanczos,
        ] {
            for (side, crop) in [
                (20, (20, 20)),
                (40, (40, 40)),
                (40, (33, 7)),
                (90, (50, 90)),
                (3, (2, 3)),
            ] {
                let whole = center_crop(&resize_short_side(&image, side, filter), crop.0, crop.1);
                assert_eq!(
                    resize_and_crop(&image, side, filter, crop),
                    whole,
                    "{filter:?} {side} {crop:?}"
                );
                let turned = image::imageops::rotate90(&image);
                let whole = center_crop(&resize_short_side(&turned, side, filter), crop.0, crop.1);
                assert_eq!(resize_and_crop(&turned, side, filter, crop), whole);
            }
        }
    }

    #[test]
    fn a_strip_costs_what_is_kept_of_it() {
        let strip = RgbImage::from_fn(1, 1_000_000, |_, y| Rgb([((y + 2500) / 5000) as u8; 3]));
        let kept = resize_and_crop(&strip, 224, Filter::Bicubic, (224, 224));
        assert_eq!(kept.get_pixel(0, 0), kept.get_pixel(223, 223));
        assert_eq!(kept.get_pixel(7, 7).0, [100; 3]);
        let flat = image::imageops::rotate90(&strip);
        assert_eq!(
            resize_and_crop(&flat, 224, Filter::Bicubic, (224, 224)),
            kept
        );
        assert_eq!(square(&strip, 1).dimensions(), (1, 1));
    }
}
