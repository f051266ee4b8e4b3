//! A contact sheet: chosen pictures in rows, each with a line or two below it.

use image::RgbImage;

use crate::images::{Canvas, fitted};

const PAPER: [u8; 3] = [255, 255, 255];
const INK: [u8; 3] = [28, 30, 38];
const FAINT: [u8; 3] = [112, 117, 130];
const MARGIN: u32 = 32;
const GAP: u32 = 16;
const LINE_GAP: u32 = 4;
/// Lines below a picture; the rest is cut.
const LINES: usize = 5;

/// A picture and what stands below it.
#[derive(Debug, Clone)]
pub struct Cell {
    pub image: RgbImage,
    /// Wrapped to the picture's width.
    pub caption: String,
    /// In a fainter colour below the caption, wrapped too.
    pub note: String,
}

/// `cells` in rows of `columns` (at least 1) below `title`: squares of at least 128 and at most 256 pixels, small
/// pictures enlarged by whole factors with sharp pixels, larger ones reduced.
pub fn contact_sheet(title: &str, cells: &[Cell], columns: u32) -> RgbImage {
    let columns = columns.clamp(1, cells.len().max(1) as u32);
    let rows = (cells.len() as u32).div_ceil(columns);
    let side = side(cells);
    let line = Canvas::text_height(2) + LINE_GAP;
    let texts: Vec<Vec<(String, [u8; 3])>> = cells.iter().map(|cell| below(cell, side)).collect();
    let lines = texts.iter().map(Vec::len).max().unwrap_or(0) as u32;
    let row_height = side + LINE_GAP + lines * line + GAP;
    let width = 2 * MARGIN + columns * (side + GAP) - GAP;
    let heading = Canvas::wrap(title, 3, width - 2 * MARGIN);
    let heading_line = Canvas::text_height(3) + 2 * LINE_GAP;
    let top = MARGIN + heading.len() as u32 * heading_line + GAP;
    let mut canvas = Canvas::new(width, top + rows * row_height + MARGIN - GAP, PAPER);
    for (index, text) in (0u32..).zip(&heading) {
        canvas.text(text, MARGIN, MARGIN + index * heading_line, 3, INK);
    }
    for ((index, cell), texts) in (0u32..).zip(cells).zip(&texts) {
        let x = MARGIN + (index % columns) * (side + GAP);
        let y = top + (index / columns) * row_height;
        let picture = fitted(&cell.image, side);
        canvas.paste(
            &picture,
            x + (side - picture.width()) / 2,
            y + (side - picture.height()) / 2,
        );
        for (place, (text, ink)) in (0u32..).zip(texts) {
            canvas.text(text, x, y + side + LINE_GAP + place * line, 2, *ink);
        }
    }
    canvas.into_image()
}

/// The lines below a picture of `width` pixels, each with its colour.
fn below(cell: &Cell, width: u32) -> Vec<(String, [u8; 3])> {
    let notes = Canvas::wrap(&cell.note, 2, width);
    let captions = Canvas::wrap(&cell.caption, 2, width);
    let room = LINES.saturating_sub(notes.len());
    let captions = captions.into_iter().take(room).map(|text| (text, INK));
    captions
        .chain(notes.into_iter().map(|text| (text, FAINT)))
        .collect()
}

/// Side of a cell: a whole multiple of the largest picture where that is possible.
fn side(cells: &[Cell]) -> u32 {
    let longest = cells
        .iter()
        .map(|cell| cell.image.width().max(cell.image.height()));
    let longest = longest.max().unwrap_or(128).max(1);
    match longest {
        128.. => longest.min(256),
        small => small * 128u32.div_ceil(small),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::Rgb;

    #[test]
    fn each_picture_stands_in_its_place_with_sharp_pixels() {
        let cell = |red| {
            Cell {
            image: RgbImage::from_pixel(32, 32, Rgb([red, 0, 0])),
            caption: "a very long caption that takes more lines than there are below a cell as small as this one is"
                .into(),
            note: "0.5".into(),
        }
        };
        let cells: Vec<Cell> = [10, 20, 30].map(cell).to_vec();
        let sheet = contact_sheet("three", &cells, 2);
        assert_eq!(sheet.width(), 2 * MARGIN + 2 * 128 + GAP);
        let reds = |x: u32| -> Vec<u8> {
            let column = (0..sheet.height()).map(|y| sheet.get_pixel(x, y).0);
            let mut reds: Vec<u8> = column
                .filter(|p| p[1] == 0 && p[2] == 0)
                .map(|p| p[0])
                .collect();
            reds.dedup();
            reds
        };
        assert_eq!(reds(MARGIN + 5), [10, 30]);
        assert_eq!(reds(MARGIN + 128 + GAP + 127), [20]);
    }
}
