//! Water and milk, and how they close around what floats in them.

use super::super::canvas::blob;
use super::super::{Canvas, Ink};
use super::{Generator, SIDE, within};
use crate::nano::identity::pick;

pub(super) fn water(canvas: &mut Canvas, generator: &mut Generator) {
    canvas.rect(0.0, 0.0, SIDE, SIDE, Ink::hex(0x2a7ac8));
    for i in 0..5 {
        canvas.rect(
            0.0,
            26.0 * i as f32,
            SIDE,
            26.0 * i as f32 + 26.0,
            Ink::hex(0x3c93dc).mix(Ink::hex(0x1c5cae), i as f32 / 4.0),
        );
    }
    for _ in 0..16 {
        let (x, y) = (
            within(generator, -6.0, 118.0),
            within(generator, 2.0, 126.0),
        );
        let ink = Ink::hex(pick(&[0x8fd0f4, 0x6bb8ec, 0xb6e4fa], generator));
        canvas.curve(
            &[
                (x, y),
                (x + 6.0, y - 3.0),
                (x + 12.0, y),
                (x + 18.0, y - 3.0),
            ],
            2.4,
            ink,
        );
    }
}

pub(super) fn milk(canvas: &mut Canvas, generator: &mut Generator) {
    canvas.rect(0.0, 0.0, SIDE, SIDE, Ink::hex(0xfdf6e0));
    for i in 0..8 {
        let y = 10.0 + 16.0 * i as f32 + within(generator, -5.0, 5.0);
        let start = within(generator, -24.0, 0.0);
        let wave: Vec<(f32, f32)> = (0..9)
            .map(|j| {
                (
                    start + 20.0 * j as f32,
                    y + if j % 2 == 0 { -4.0 } else { 4.0 },
                )
            })
            .collect();
        canvas.curve(&wave, 4.2, Ink::hex(0xe9d8b0));
    }
}

/// The surface of a liquid over the lower end of something that floats.
pub(super) fn swim(
    canvas: &mut Canvas,
    x: f32,
    ground: f32,
    half_width: f32,
    liquid: Ink,
    foam: Ink,
) {
    let (w, line) = (half_width + 10.0, ground - 9.0);
    canvas.fill(
        &blob(&[
            (x - w, line + 2.0),
            (x - w * 0.5, line - 1.0),
            (x, line + 2.0),
            (x + w * 0.5, line - 1.0),
            (x + w, line + 2.0),
            (x + w * 0.8, ground + 12.0),
            (x - w * 0.8, ground + 12.0),
        ]),
        liquid,
    );
    for (scale, dy) in [(1.0, 1.0), (0.7, 9.0)] {
        let reach = w * scale;
        canvas.curve(
            &[
                (x - reach, line + dy),
                (x - reach * 0.5, line + dy - 3.0),
                (x, line + dy),
                (x + reach * 0.5, line + dy - 3.0),
                (x + reach, line + dy),
            ],
            3.2,
            foam,
        );
    }
}
