//! The mild geometric augmentations of the Proxy-Tuning paper, Table 7: the baseline that trains on varied references
//! instead of proxies.

use image::{Rgb, RgbImage};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::resize::{Filter, resize_exact};

const FLIP_PROBABILITY: f64 = 0.05;
const MAX_DEGREES: f64 = 5.0;
const CROP_SHARE: std::ops::RangeInclusive<f64> = 0.9..=1.0;

/// A varied copy of `image`, of the same size: flipped left to right (probability 0.05) and top to bottom (0.05),
/// turned by -5° to 5° about its middle, and cropped to 0.9 to 1.0 of its area at a random place, then resized back
/// with Lanczos.
///
/// The paper gives the numbers alone. Here the crop keeps the aspect (the share is that of the area, as in
/// torchvision's `RandomResizedCrop`), and a turned picture is continued by its mirror image, because black corners
/// would be learnt as part of the subject. Six numbers are drawn in any case, so that one choice never shifts another.
pub fn augment(image: &RgbImage, generator: &mut ChaCha8Rng) -> RgbImage {
    let mirrored = generator.random_bool(FLIP_PROBABILITY);
    let upturned = generator.random_bool(FLIP_PROBABILITY);
    let degrees = generator.random_range(-MAX_DEGREES..=MAX_DEGREES);
    let share = generator.random_range(CROP_SHARE).sqrt();
    let (left, top) = (generator.random::<f64>(), generator.random::<f64>());

    let mut varied = image.clone();
    if mirrored {
        image::imageops::flip_horizontal_in_place(&mut varied);
    }
    if upturned {
        image::imageops::flip_vertical_in_place(&mut varied);
    }
    let varied = rotated(&varied, degrees.to_radians());
    let (width, height) = varied.dimensions();
    let part = |side: u32| ((f64::from(side) * share).round() as u32).clamp(1, side.max(1));
    let (crop_width, crop_height) = (part(width), part(height));
    let place = |margin: u32, at: f64| (f64::from(margin) * at).round() as u32;
    let crop = image::imageops::crop_imm(
        &varied,
        place(width.saturating_sub(crop_width), left),
        place(height.saturating_sub(crop_height), top),
        crop_width,
        crop_height,
    )
    .to_image();
    resize_exact(&crop, width, height, Filter::Lanczos)
}

/// `image` turned by `angle` radians about its middle, bilinear, continued by its mirror image.
fn rotated(image: &RgbImage, angle: f64) -> RgbImage {
    let (width, height) = image.dimensions();
    let (middle_x, middle_y) = (f64::from(width) / 2.0, f64::from(height) / 2.0);
    let (sin, cos) = angle.sin_cos();
    let pixel = |x: i64, y: i64| image.get_pixel(reflected(x, width), reflected(y, height)).0;
    RgbImage::from_fn(width, height, |x, y| {
        let (dx, dy) = (f64::from(x) + 0.5 - middle_x, f64::from(y) + 0.5 - middle_y);
        let from_x = cos * dx + sin * dy + middle_x - 0.5;
        let from_y = cos * dy - sin * dx + middle_y - 0.5;
        let (x0, y0) = (from_x.floor(), from_y.floor());
        let (fx, fy) = (from_x - x0, from_y - y0);
        let (x0, y0) = (x0 as i64, y0 as i64);
        let corners = [
            (pixel(x0, y0), (1.0 - fx) * (1.0 - fy)),
            (pixel(x0 + 1, y0), fx * (1.0 - fy)),
            (pixel(x0, y0 + 1), (1.0 - fx) * fy),
            (pixel(x0 + 1, y0 + 1), fx * fy),
        ];
        Rgb(std::array::from_fn(|channel| {
            let sum: f64 = corners
                .iter()
                .map(|(rgb, share)| f64::from(rgb[channel]) * share)
                .sum();
            sum.round() as u8
        }))
    })
}

/// `at` folded back into 0..side at the borders: -1 is 0, `side` is `side - 1`.
fn reflected(at: i64, side: u32) -> u32 {
    let side = i64::from(side);
    let folded = at.rem_euclid(2 * side);
    folded.min(2 * side - 1 - folded) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    fn picture() -> RgbImage {
        RgbImage::from_fn(40, 30, |x, y| {
            Rgb([(x * 6) as u8, (y * 8) as u8, ((x + y) * 3) as u8])
        })
    }

    #[test]
    fn the_same_generator_gives_the_same_picture_and_another_one_another() {
        let draw = |seed| augment(&picture(), &mut ChaCha8Rng::seed_from_u64(seed));
        assert_eq!(draw(3), draw(3));
        assert_ne!(draw(3), draw(4));
        assert_eq!(draw(3).dimensions(), (40, 30));
    }

    #[test]
    fn no_turn_changes_nothing_and_a_small_turn_leaves_no_black_corner() {
        assert_eq!(rotated(&picture(), 0.0), picture());
        let white = RgbImage::from_pixel(16, 16, Rgb([255; 3]));
        assert_eq!(rotated(&white, 0.08), white);
    }

    #[test]
    fn one_in_twenty_is_flipped() {
        // Left half dark, right half light: a flip swaps them, a turn of 5° does not.
        let halves = RgbImage::from_fn(32, 32, |x, _| Rgb([if x < 16 { 0 } else { 255 }; 3]));
        let mut generator = ChaCha8Rng::seed_from_u64(1);
        let flipped = (0..1000)
            .filter(|_| augment(&halves, &mut generator).get_pixel(2, 16).0[0] > 128)
            .count();
        assert!((25..80).contains(&flipped), "{flipped} of 1000");
    }
}
