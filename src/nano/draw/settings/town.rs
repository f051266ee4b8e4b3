//! Places people built: city, house, tower, streets.

use rand::Rng;

use super::super::canvas::blob;
use super::super::{Canvas, Ink};
use super::{Generator, SIDE, sky, within};
use crate::nano::identity::pick;

pub(super) fn city(canvas: &mut Canvas, ground: f32, generator: &mut Generator) {
    let horizon = ground - within(generator, 14.0, 24.0);
    sky(canvas, Ink::hex(0x6f8fb8), Ink::hex(0xf0cfae), horizon);
    let mut x = within(generator, -10.0, 0.0);
    while x < SIDE {
        let (w, top) = (within(generator, 14.0, 24.0), within(generator, 4.0, 52.0));
        let wall = Ink::hex(pick(&[0x4c5568, 0x5d6577, 0x3d4557, 0x6b6f80], generator));
        canvas.rect(x, top, x + w - 1.5, horizon, wall);
        let mut wy = top + 5.0;
        while wy < horizon - 6.0 {
            for column in 0..2 {
                if generator.random_bool(0.7) {
                    let wx = x + w * (0.16 + 0.4 * column as f32);
                    canvas.rect(wx, wy, wx + w * 0.22, wy + 4.5, Ink::hex(0xfbe28a));
                }
            }
            wy += 10.0;
        }
        x += w;
    }
    canvas.rect(0.0, horizon, SIDE, SIDE, Ink::hex(0x585a60));
    canvas.rect(0.0, horizon, SIDE, horizon + 5.0, Ink::hex(0xa7a8ab));
    let dash = within(generator, -20.0, 0.0);
    for i in 0..5 {
        let x = dash + 34.0 * i as f32;
        canvas.rect(x, 119.0, x + 18.0, 122.0, Ink::hex(0xf2f0e6));
    }
}

pub(super) fn house(canvas: &mut Canvas, x: f32, ground: f32, generator: &mut Generator) {
    let horizon = ground - within(generator, 10.0, 18.0);
    sky(canvas, Ink::hex(0xa8dcf5), Ink::hex(0xeef8fc), horizon);
    canvas.rect(0.0, horizon, SIDE, SIDE, Ink::hex(0x7cc04e));
    // The house stands on the side that the subject leaves free.
    let centre = if x > 64.0 {
        within(generator, 30.0, 44.0)
    } else {
        within(generator, 84.0, 98.0)
    };
    let (w, eaves) = (within(generator, 34.0, 40.0), within(generator, 34.0, 42.0));
    let blue = Ink::hex(0x2456c8);
    canvas.rect(centre - w, eaves, centre + w, horizon + 3.0, blue);
    canvas.polygon(
        &[
            (centre - w - 7.0, eaves),
            (centre, 6.0),
            (centre + w + 7.0, eaves),
        ],
        Ink::hex(0x9c2f2a),
    );
    for dx in [-22.0, 22.0] {
        canvas.rect(
            centre + dx - 9.0,
            eaves + 8.0,
            centre + dx + 9.0,
            eaves + 26.0,
            Ink::hex(0xffffff),
        );
        canvas.rect(
            centre + dx - 6.5,
            eaves + 10.5,
            centre + dx + 6.5,
            eaves + 23.5,
            Ink::hex(0xf8e9a0),
        );
    }
    canvas.rect(
        centre - 7.0,
        eaves + 26.0,
        centre + 7.0,
        horizon + 3.0,
        Ink::hex(0xf4f1ea),
    );
}

pub(super) fn eiffel(canvas: &mut Canvas, x: f32, ground: f32, generator: &mut Generator) {
    let horizon = ground - within(generator, 8.0, 16.0);
    sky(canvas, Ink::hex(0xf2b8a0), Ink::hex(0xfbe6cf), horizon);
    canvas.rect(0.0, horizon, SIDE, SIDE, Ink::hex(0x86a860));
    canvas.rect(0.0, horizon - 5.0, SIDE, horizon, Ink::hex(0x4d7a48));
    let tx = if x > 64.0 {
        within(generator, 24.0, 40.0)
    } else {
        within(generator, 88.0, 104.0)
    };
    let iron = Ink::hex(0x4d3a36);
    let half = |t: f32| 2.0 + 30.0 * t * t * t.sqrt();
    let rise = |t: f32| 2.0 + (horizon - 2.0) * t;
    let steps = [0.0f32, 0.2, 0.4, 0.55, 0.7, 0.85, 1.0];
    let right = steps.iter().map(|&t| (tx + half(t), rise(t)));
    let left = steps.iter().rev().map(|&t| (tx - half(t), rise(t)));
    let outline: Vec<(f32, f32)> = right.chain(left).collect();
    canvas.polygon(&outline, iron);
    canvas.fill(
        &blob(&[
            (tx - 17.0, horizon + 1.0),
            (tx - 10.0, rise(0.82)),
            (tx, rise(0.77)),
            (tx + 10.0, rise(0.82)),
            (tx + 17.0, horizon + 1.0),
        ]),
        Ink::hex(0xfbe6cf),
    );
    canvas.polygon(
        &[
            (tx - 5.0, rise(0.68)),
            (tx, rise(0.5)),
            (tx + 5.0, rise(0.68)),
        ],
        Ink::hex(0xfadcc4),
    );
    for t in [0.46, 0.72] {
        canvas.rect(
            tx - half(t) - 4.0,
            rise(t) - 2.0,
            tx + half(t) + 4.0,
            rise(t) + 2.5,
            iron,
        );
    }
}

pub(super) fn crowd(canvas: &mut Canvas, ground: f32, generator: &mut Generator) {
    let kerb = ground - within(generator, 14.0, 20.0);
    canvas.rect(0.0, 0.0, SIDE, kerb, Ink::hex(0xb4674e));
    for i in 0..4 {
        let x = 36.0 * i as f32 + within(generator, -12.0, 4.0);
        canvas.rect(x, 4.0, x + 22.0, 26.0, Ink::hex(0x3c4658));
        canvas.rect(
            x - 4.0,
            30.0,
            x + 26.0,
            36.0,
            Ink::hex(pick(&[0xe8e2cf, 0x2f8a6e, 0xd84a4a], generator)),
        );
    }
    let mut x = within(generator, -4.0, 6.0);
    while x < SIDE + 6.0 {
        let top = within(generator, 26.0, 42.0);
        let clothes = Ink::hex(pick(
            &[
                0xd43d3d, 0x2f5fc0, 0x36a05a, 0xe8b23a, 0x7a45a8, 0xeeeeee, 0x2a2a34,
            ],
            generator,
        ));
        canvas.rect(
            x - 5.0,
            kerb - 16.0,
            x - 1.0,
            kerb + 3.0,
            Ink::hex(0x2a2c3c),
        );
        canvas.rect(
            x + 1.0,
            kerb - 16.0,
            x + 5.0,
            kerb + 3.0,
            Ink::hex(0x2a2c3c),
        );
        canvas.fill(
            &blob(&[
                (x, top + 8.0),
                (x + 7.5, top + 14.0),
                (x + 6.0, kerb - 12.0),
                (x - 6.0, kerb - 12.0),
                (x - 7.5, top + 14.0),
            ]),
            clothes,
        );
        canvas.disc(
            x,
            top + 4.0,
            5.6,
            Ink::hex(pick(&[0xf0c8a4, 0xc98d62, 0x7d5236], generator)),
        );
        x += within(generator, 11.0, 16.0);
    }
    canvas.rect(0.0, kerb, SIDE, SIDE, Ink::hex(0xcfcdc6));
    canvas.rect(0.0, kerb, SIDE, kerb + 3.0, Ink::hex(0x8f8d88));
    for i in 0..5 {
        let x = 32.0 * i as f32;
        canvas.line(
            &[(x, kerb + 3.0), (x + (x - 64.0) * 0.4, SIDE)],
            2.0,
            Ink::hex(0x99978f),
        );
    }
    canvas.rect(0.0, ground + 6.0, SIDE, ground + 8.0, Ink::hex(0x99978f));
}

pub(super) fn cobblestones(canvas: &mut Canvas, generator: &mut Generator) {
    canvas.rect(0.0, 0.0, SIDE, SIDE, Ink::hex(0x3f3b3c));
    let mut y = within(generator, -6.0, 0.0);
    let mut height = 11.0;
    while y < SIDE {
        let mut x = within(generator, -14.0, 0.0);
        while x < SIDE {
            let width = height * within(generator, 1.1, 1.7);
            let ink = Ink::hex(pick(
                &[0x8d8783, 0x9c9792, 0x77736f, 0xaaa49c, 0x857a70],
                generator,
            ));
            let (w, h) = (width / 2.0 - 1.2, height / 2.0 - 1.2);
            let (cx, cy) = (x + width / 2.0, y + height / 2.0);
            let stone = [
                (cx - w, cy - h * 0.5),
                (cx - w * 0.6, cy - h),
                (cx + w * 0.6, cy - h),
                (cx + w, cy - h * 0.4),
                (cx + w, cy + h * 0.5),
                (cx + w * 0.6, cy + h),
                (cx - w * 0.6, cy + h),
                (cx - w, cy + h * 0.4),
            ];
            canvas.polygon(&stone, ink);
            x += width;
        }
        y += height;
        height *= 1.08;
    }
}
