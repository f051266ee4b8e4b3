//! `sheet.png`: one line per prompt, and beside each other what every model made of it.

use image::RgbImage;

use crate::images::Canvas;
use crate::images::fitted;

/// What the sheet shows.
#[derive(Debug, Clone, Default)]
pub struct Sheet {
    pub title: String,
    /// A line below the title; may be empty.
    pub subtitle: String,
    /// Labels of the model columns, for example supervisor, direct, proxy-tuned. The references stand before them.
    pub columns: Vec<String>,
    /// One for each subject.
    pub blocks: Vec<Block>,
}

/// The part of one subject.
#[derive(Debug, Clone, Default)]
pub struct Block {
    /// For example `dog6, "a sks dog"`.
    pub heading: String,
    /// The subject's photos: one per line from the top, the rest left out.
    pub references: Vec<RgbImage>,
    pub rows: Vec<Row>,
}

/// One prompt and seed.
#[derive(Debug, Clone, Default)]
pub struct Row {
    pub prompt: String,
    /// One for each column of the sheet; what a model did not make is an empty frame.
    pub images: Vec<Option<RgbImage>>,
}

const PAPER: [u8; 3] = [255, 255, 255];
const INK: [u8; 3] = [28, 30, 38];
const FAINT: [u8; 3] = [112, 117, 130];
const RULE: [u8; 3] = [224, 226, 232];
const EMPTY: [u8; 3] = [246, 247, 249];

const MARGIN: u32 = 40;
const GAP: u32 = 10;
/// Between the references and what models made.
const WIDE_GAP: u32 = 28;
const PROMPT_WIDTH: u32 = 220;
const LINE_GAP: u32 = 6;

impl Sheet {
    /// Draws the sheet: cells of at least 128 and at most 256 pixels, small pictures enlarged by whole factors with
    /// sharp pixels, larger ones reduced.
    pub fn draw(&self) -> RgbImage {
        let cell = self.cell();
        let columns = self.columns.len() as u32;
        let references_x = MARGIN + PROMPT_WIDTH + GAP;
        let column_x = |index: u32| references_x + cell + WIDE_GAP + index * (cell + GAP);
        let width = column_x(columns) - GAP + MARGIN;
        let inner = width - 2 * MARGIN;

        let title = Canvas::wrap(&self.title, 4, inner);
        let subtitle = Canvas::wrap(&self.subtitle, 2, inner);
        let title_height = title.len() as u32 * (Canvas::text_height(4) + 2 * LINE_GAP)
            + subtitle.len() as u32 * (Canvas::text_height(2) + LINE_GAP);
        let labels: Vec<Vec<String>> = std::iter::once("references")
            .chain(self.columns.iter().map(String::as_str))
            .map(|label| Canvas::wrap(label, 2, cell))
            .collect();
        let label_lines = labels.iter().map(Vec::len).max().unwrap_or(1) as u32;
        let label_height = label_lines * (Canvas::text_height(2) + LINE_GAP) + GAP;
        let heading_height = Canvas::text_height(3) + 2 * GAP;
        let block_height = |block: &Block| {
            let rows = block.rows.len() as u32;
            heading_height + label_height + rows * (cell + GAP) + MARGIN / 2
        };
        let blocks_height: u32 = self.blocks.iter().map(block_height).sum();
        let height = MARGIN + title_height + GAP + blocks_height + MARGIN / 2;

        let mut canvas = Canvas::new(width, height, PAPER);
        let mut y = MARGIN;
        y = lines(&mut canvas, &title, MARGIN, y, 4, INK);
        y = lines(&mut canvas, &subtitle, MARGIN, y, 2, FAINT) + GAP;
        for block in &self.blocks {
            canvas.fill(MARGIN, y, inner, 2, RULE);
            canvas.text(&block.heading, MARGIN, y + 2 * GAP - 4, 3, INK);
            y += heading_height;
            for (index, label) in labels.iter().enumerate() {
                let x = match index {
                    0 => references_x,
                    index => column_x(index as u32 - 1),
                };
                // Labels stand on the pictures: short ones are pushed down.
                let rise = label.len() as u32 * (Canvas::text_height(2) + LINE_GAP) + GAP;
                lines(&mut canvas, label, x, y + label_height - rise, 2, FAINT);
            }
            y += label_height;
            for (index, row) in block.rows.iter().enumerate() {
                let text = Canvas::wrap(&row.prompt, 2, PROMPT_WIDTH - GAP);
                let text_height = text.len() as u32 * (Canvas::text_height(2) + LINE_GAP);
                let text_y = y + cell.saturating_sub(text_height) / 2;
                lines(&mut canvas, &text, MARGIN, text_y, 2, INK);
                if let Some(reference) = block.references.get(index) {
                    place(&mut canvas, reference, references_x, y, cell);
                }
                for (column, image) in (0..columns).zip(&row.images) {
                    match image {
                        Some(image) => place(&mut canvas, image, column_x(column), y, cell),
                        None => canvas.fill(column_x(column), y, cell, cell, EMPTY),
                    }
                }
                y += cell + GAP;
            }
            y += MARGIN / 2;
        }
        canvas.into_image()
    }

    /// Side of a cell: a whole multiple of the largest generated picture where that is possible.
    fn cell(&self) -> u32 {
        let largest = self
            .blocks
            .iter()
            .flat_map(|block| &block.rows)
            .flat_map(|row| row.images.iter().flatten())
            .map(|image| image.width().max(image.height()))
            .max()
            .unwrap_or(128)
            .max(1);
        if largest >= 128 {
            largest.min(256)
        } else {
            largest * 128u32.div_ceil(largest)
        }
    }
}

fn lines(canvas: &mut Canvas, text: &[String], x: u32, y: u32, scale: u32, ink: [u8; 3]) -> u32 {
    // Large letters want more room below.
    let line_gap = LINE_GAP * (scale / 2).max(1);
    let mut y = y;
    for line in text {
        canvas.text(line, x, y, scale, ink);
        y += Canvas::text_height(scale) + line_gap;
    }
    y
}

fn place(canvas: &mut Canvas, image: &RgbImage, x: u32, y: u32, cell: u32) {
    let picture = fitted(image, cell);
    canvas.paste(
        &picture,
        x + (cell - picture.width()) / 2,
        y + (cell - picture.height()) / 2,
    );
}
