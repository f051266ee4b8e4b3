//! Putting pictures and labels on one large picture.

use image::{Rgb, RgbImage, imageops};

use super::font;
use super::resize::{Filter, resize_exact};

/// A picture to draw on.
pub struct Canvas {
    image: RgbImage,
}

impl Canvas {
    /// A canvas of one colour.
    pub fn new(width: u32, height: u32, background: [u8; 3]) -> Self {
        Self {
            image: RgbImage::from_pixel(width, height, Rgb(background)),
        }
    }

    /// Puts `picture` with its top left corner at (`x`, `y`); what lies outside is cut off.
    pub fn paste(&mut self, picture: &RgbImage, x: u32, y: u32) {
        imageops::replace(&mut self.image, picture, i64::from(x), i64::from(y));
    }

    /// Fills a rectangle; what lies outside is cut off.
    pub fn fill(&mut self, x: u32, y: u32, width: u32, height: u32, colour: [u8; 3]) {
        for row in y..(y + height).min(self.image.height()) {
            for column in x..(x + width).min(self.image.width()) {
                self.image.put_pixel(column, row, Rgb(colour));
            }
        }
    }

    /// Writes one line with its top left corner at (`x`, `y`), each font pixel `scale` pixels wide.
    pub fn text(&mut self, text: &str, x: u32, y: u32, scale: u32, colour: [u8; 3]) {
        let mut pen = x;
        for character in text.chars() {
            for column in font::columns(character) {
                for row in (0..font::HEIGHT).filter(|row| column >> row & 1 == 1) {
                    self.fill(pen, y + row * scale, scale, scale, colour);
                }
                pen += scale;
            }
            pen += scale;
        }
    }

    /// Width of `text` in pixels at `scale`.
    pub fn text_width(text: &str, scale: u32) -> u32 {
        font::width(text) * scale
    }

    /// Height of one line in pixels at `scale`, without space between lines.
    pub fn text_height(scale: u32) -> u32 {
        font::HEIGHT * scale
    }

    /// `text` broken between words into lines at most `width` pixels wide; a word that is wider stands alone.
    pub fn wrap(text: &str, scale: u32, width: u32) -> Vec<String> {
        let mut lines: Vec<String> = Vec::new();
        for word in text.split_whitespace() {
            match lines.last_mut() {
                Some(line) if Self::text_width(&format!("{line} {word}"), scale) <= width => {
                    line.push(' ');
                    line.push_str(word);
                }
                _ => lines.push(word.to_string()),
            }
        }
        lines
    }

    /// The finished picture.
    pub fn into_image(self) -> RgbImage {
        self.image
    }
}

/// `image` made to fit a square of `side` pixels: a small one enlarged by a whole factor with its pixels left sharp, a
/// large one reduced with Lanczos; the aspect is kept.
pub(crate) fn fitted(image: &RgbImage, side: u32) -> RgbImage {
    let (width, height) = image.dimensions();
    let long = width.max(height).max(1);
    if long <= side {
        let factor = side / long;
        return imageops::resize(
            image,
            width * factor,
            height * factor,
            imageops::FilterType::Nearest,
        );
    }
    let scaled = |length: u32| (u64::from(length) * u64::from(side) / u64::from(long)) as u32;
    resize_exact(image, scaled(width), scaled(height), Filter::Lanczos)
}

/// `images` in rows of `columns` (at least 1), each fitted into a square of `side` pixels, `gap` pixels apart, on
/// white. Pixels are kept as they are when `side` is a multiple of the pictures' size.
pub fn grid(images: &[RgbImage], columns: u32, side: u32, gap: u32) -> RgbImage {
    let columns = columns.clamp(1, images.len().max(1) as u32);
    let rows = (images.len() as u32).div_ceil(columns).max(1);
    let length = |count: u32| count * side + (count - 1) * gap;
    let mut canvas = Canvas::new(length(columns), length(rows), [255; 3]);
    for (index, image) in images.iter().enumerate() {
        let (row, column) = (index as u32 / columns, index as u32 % columns);
        let picture = fitted(image, side);
        canvas.paste(
            &picture,
            column * (side + gap) + (side - picture.width()) / 2,
            row * (side + gap) + (side - picture.height()) / 2,
        );
    }
    canvas.into_image()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_wraps_between_words_and_a_long_word_stands_alone() {
        let lines = Canvas::wrap("a dog on extraordinarily wet grass", 1, 40);
        assert_eq!(
            lines,
            ["a dog", "on", "extraordinarily", "wet", "grass"].map(String::from)
        );
        for line in lines.iter().filter(|l| l.contains(' ')) {
            assert!(Canvas::text_width(line, 1) <= 40);
        }
    }

    #[test]
    fn a_grid_holds_each_picture_unchanged_when_the_size_fits() {
        let pictures: Vec<RgbImage> = (0..3u8)
            .map(|i| RgbImage::from_pixel(2, 2, Rgb([i * 60; 3])))
            .collect();
        let grid = grid(&pictures, 2, 4, 1);
        assert_eq!(grid.dimensions(), (9, 9));
        assert_eq!(grid.get_pixel(3, 3).0, [0; 3]);
        assert_eq!(grid.get_pixel(4, 0).0, [255; 3]);
        assert_eq!(grid.get_pixel(5, 0).0, [60; 3]);
        assert_eq!(grid.get_pixel(0, 5).0, [120; 3]);
    }

    #[test]
    fn unknown_characters_become_question_marks() {
        assert_eq!(Canvas::text_width("é", 2), Canvas::text_width("?", 2));
    }
}
