//! Places in the open: jungle, snow, beach, mountain, forest, fields, a dirt road.

use rand::Rng;

use super::super::canvas::polygon;
use super::super::{Canvas, Ink};
use super::grounds::carpet;
use super::{Generator, SIDE, leaf, sky, within};
use crate::nano::identity::pick;

pub(super) fn jungle(canvas: &mut Canvas, generator: &mut Generator) {
    canvas.rect(0.0, 0.0, SIDE, SIDE, Ink::hex(0x0d3d1c));
    canvas.rect(0.0, 98.0, SIDE, SIDE, Ink::hex(0x2b3a14));
    for _ in 0..3 {
        let x = within(generator, 4.0, 124.0);
        canvas.line(
            &[(x, 0.0), (x + within(generator, -8.0, 8.0), 100.0)],
            4.0,
            Ink::hex(0x3b2c16),
        );
    }
    for _ in 0..30 {
        let stem = (
            within(generator, -8.0, 136.0),
            within(generator, -8.0, 108.0),
        );
        let tip = (
            stem.0 + within(generator, -26.0, 26.0),
            stem.1 + within(generator, -4.0, 24.0),
        );
        let ink = Ink::hex(pick(
            &[0x156b2a, 0x1f8f38, 0x2fae3f, 0x0f5424, 0x57b53a],
            generator,
        ));
        leaf(canvas, stem, tip, within(generator, 4.0, 8.0), ink);
    }
}

pub(super) fn snow(canvas: &mut Canvas, ground: f32, generator: &mut Generator) {
    let horizon = ground - within(generator, 22.0, 34.0);
    sky(
        canvas,
        Ink::hex(0x9db9d4),
        Ink::hex(0xd3e2ef),
        horizon + 8.0,
    );
    for _ in 0..5 {
        let (x, h) = (within(generator, 0.0, SIDE), within(generator, 26.0, 46.0));
        for step in 0..3 {
            let y = horizon + 4.0 - h * 0.28 * step as f32;
            let w = h * (0.34 - 0.08 * step as f32);
            canvas.polygon(
                &[(x - w, y), (x, y - h * 0.46), (x + w, y)],
                Ink::hex(0x3d6a63),
            );
            canvas.polygon(
                &[
                    (x - w * 0.45, y - h * 0.25),
                    (x, y - h * 0.46),
                    (x + w * 0.45, y - h * 0.25),
                ],
                Ink::hex(0xffffff),
            );
        }
    }
    let dip = within(generator, -5.0, 5.0);
    canvas.fill(
        &polygon(&[
            (0.0, horizon + dip),
            (64.0, horizon - dip),
            (SIDE, horizon + dip),
            (SIDE, SIDE),
            (0.0, SIDE),
        ]),
        Ink::hex(0xf7fbff),
    );
    for _ in 0..4 {
        let (x, y) = (
            within(generator, 0.0, SIDE),
            within(generator, horizon + 12.0, SIDE),
        );
        canvas.ellipse(x, y, within(generator, 14.0, 30.0), 2.5, Ink::hex(0xd6e6f5));
    }
}

pub(super) fn beach(canvas: &mut Canvas, ground: f32, generator: &mut Generator) {
    let shore = ground - within(generator, 14.0, 26.0);
    let horizon = shore - within(generator, 18.0, 30.0);
    sky(canvas, Ink::hex(0x58b4f0), Ink::hex(0xc2e8fb), horizon);
    canvas.disc(
        within(generator, 10.0, 118.0),
        within(generator, 10.0, 22.0),
        9.0,
        Ink::hex(0xfff3a8),
    );
    canvas.rect(0.0, horizon, SIDE, shore, Ink::hex(0x1b7fc4));
    canvas.rect(0.0, shore - 7.0, SIDE, shore, Ink::hex(0x49c3d6));
    canvas.rect(0.0, shore, SIDE, SIDE, Ink::hex(0xf2dc9c));
    canvas.rect(0.0, shore - 2.0, SIDE, shore + 3.0, Ink::hex(0xffffff));
    let side = generator.random_bool(0.5);
    let (x, lean) = if side { (10.0, 8.0) } else { (118.0, -8.0) };
    canvas.curve(
        &[
            (x, shore + 16.0),
            (x + lean * 0.3, shore - 20.0),
            (x + lean, 30.0),
        ],
        6.0,
        Ink::hex(0x8a6238),
    );
    for (dx, dy) in [
        (-26.0, 6.0),
        (-18.0, -14.0),
        (6.0, -20.0),
        (24.0, -8.0),
        (24.0, 12.0),
    ] {
        leaf(
            canvas,
            (x + lean, 30.0),
            (x + lean + dx, 30.0 + dy),
            5.0,
            Ink::hex(0x2f9440),
        );
    }
    for _ in 0..8 {
        let (x, y) = (
            within(generator, 0.0, SIDE),
            within(generator, shore + 6.0, SIDE),
        );
        canvas.ellipse(x, y, 3.5, 1.5, Ink::hex(0xd9bd74));
    }
}

pub(super) fn mountain(canvas: &mut Canvas, ground: f32, generator: &mut Generator) {
    let horizon = ground - within(generator, 12.0, 24.0);
    sky(canvas, Ink::hex(0x6fb2ee), Ink::hex(0xd5ebfa), horizon);
    let first = within(generator, 8.0, 60.0);
    for (x, top, half) in [
        (
            first + within(generator, 46.0, 64.0),
            within(generator, 18.0, 34.0),
            54.0,
        ),
        (first, within(generator, 4.0, 18.0), 58.0),
    ] {
        let rise = horizon - top;
        canvas.polygon(
            &[(x - half, horizon), (x, top), (x + half, horizon)],
            Ink::hex(0x6c6f8e),
        );
        canvas.polygon(
            &[(x, top), (x + half, horizon), (x + half * 0.2, horizon)],
            Ink::hex(0x55587a),
        );
        let t = 0.34;
        canvas.polygon(
            &[
                (x, top),
                (x + half * t, top + rise * t),
                (x + half * 0.12, top + rise * 0.26),
                (x - half * 0.06, top + rise * 0.42),
                (x - half * t, top + rise * t),
            ],
            Ink::hex(0xfbfdff),
        );
    }
    canvas.rect(0.0, horizon, SIDE, SIDE, Ink::hex(0x57a346));
    for _ in 0..10 {
        let (x, y) = (
            within(generator, 0.0, SIDE),
            within(generator, horizon + 4.0, SIDE),
        );
        canvas.ellipse(x, y, 8.0, 1.8, Ink::hex(0x468c3a));
    }
}

pub(super) fn forest(canvas: &mut Canvas, x: f32, ground: f32, generator: &mut Generator) {
    let horizon = ground - 20.0;
    canvas.rect(0.0, 0.0, SIDE, horizon, Ink::hex(0x24402c));
    canvas.rect(0.0, horizon, SIDE, SIDE, Ink::hex(0x3d3a1e));
    for i in 0..7 {
        let tx = i as f32 * 20.0 + within(generator, -6.0, 8.0);
        let ink = Ink::hex(pick(&[0x4a3020, 0x5a3b26, 0x3a281c], generator));
        canvas.rect(
            tx,
            0.0,
            tx + within(generator, 6.0, 11.0),
            horizon + within(generator, 0.0, 6.0),
            ink,
        );
    }
    for _ in 0..8 {
        canvas.ellipse(
            within(generator, 0.0, SIDE),
            within(generator, 0.0, 14.0),
            16.0,
            8.0,
            Ink::hex(0x1d5a30),
        );
    }
    carpet(
        canvas,
        x,
        ground,
        Ink::hex(0x8a2bb8),
        Ink::hex(0xc873ea),
        true,
    );
}

pub(super) fn wheat(canvas: &mut Canvas, generator: &mut Generator) {
    let horizon = within(generator, 36.0, 52.0);
    sky(canvas, Ink::hex(0x5fa8e8), Ink::hex(0xcfe6f4), horizon);
    canvas.rect(0.0, horizon, SIDE, SIDE, Ink::hex(0xdca93a));
    canvas.rect(0.0, horizon, SIDE, horizon + 7.0, Ink::hex(0xc48f2c));
    for i in 0..32 {
        let x = 4.0 * i as f32 + within(generator, -2.0, 2.0);
        let (bottom, tall) = (
            within(generator, 84.0, 140.0),
            within(generator, 36.0, 52.0),
        );
        let ink = Ink::hex(pick(&[0xb8821f, 0xf0cb62, 0xc9952c, 0xf7dc86], generator));
        canvas.polygon(
            &[
                (x - 1.1, bottom),
                (x + 1.1, bottom),
                (x + 2.8, bottom - tall + 12.0),
                (x + 1.2, bottom - tall),
                (x - 1.6, bottom - tall + 12.0),
            ],
            ink,
        );
    }
}

pub(super) fn autumn(canvas: &mut Canvas, x: f32, ground: f32, generator: &mut Generator) {
    let horizon = ground - within(generator, 12.0, 20.0);
    sky(canvas, Ink::hex(0xcfd9dd), Ink::hex(0xf3ead6), horizon);
    canvas.rect(0.0, horizon, SIDE, SIDE, Ink::hex(0x8f7a3c));
    let tx = if x > 64.0 {
        within(generator, 16.0, 34.0)
    } else {
        within(generator, 94.0, 112.0)
    };
    canvas.polygon(
        &[
            (tx - 9.0, horizon + 8.0),
            (tx - 5.0, 20.0),
            (tx + 5.0, 20.0),
            (tx + 9.0, horizon + 8.0),
        ],
        Ink::hex(0x5c3a22),
    );
    let leaves = [0xe8701a, 0xd8401c, 0xf2a21e, 0xc22f1c, 0xf6c436];
    for _ in 0..22 {
        let (dx, y) = (within(generator, -42.0, 42.0), within(generator, 0.0, 42.0));
        canvas.disc(
            tx + dx,
            y,
            within(generator, 6.0, 11.0),
            Ink::hex(pick(&leaves, generator)),
        );
    }
    for _ in 0..26 {
        let (lx, y) = (
            within(generator, 0.0, SIDE),
            within(generator, horizon + 2.0, SIDE),
        );
        canvas.ellipse(lx, y, 3.8, 2.4, Ink::hex(pick(&leaves, generator)));
    }
}

pub(super) fn sunflowers(canvas: &mut Canvas, x: f32, ground: f32, generator: &mut Generator) {
    canvas.rect(0.0, 0.0, SIDE, SIDE, Ink::hex(0x4fa834));
    for _ in 0..24 {
        let (gx, y) = (within(generator, 0.0, SIDE), within(generator, 6.0, SIDE));
        canvas.polygon(
            &[(gx - 3.0, y), (gx + 2.0, y - 10.0), (gx + 3.0, y)],
            Ink::hex(0x3a8a28),
        );
    }
    for _ in 0..11 {
        let (fx, fy) = (within(generator, 2.0, 126.0), within(generator, 4.0, 122.0));
        // The middle is the subject's.
        let (dx, dy) = ((fx - x) / 34.0, (fy - (ground - 36.0)) / 46.0);
        let crowded = dx * dx + dy * dy < 1.0;
        if crowded {
            continue;
        }
        let r = within(generator, 9.0, 12.0);
        for petal in 0..4 {
            let (s, c) = (petal as f32 * 0.785).sin_cos();
            canvas.line(
                &[
                    (fx - s * r * 0.8, fy - c * r * 0.8),
                    (fx + s * r * 0.8, fy + c * r * 0.8),
                ],
                r * 0.5,
                Ink::hex(0xffd21e),
            );
        }
        canvas.disc(fx, fy, r * 0.5, Ink::hex(0x5a3212));
    }
}

pub(super) fn road(canvas: &mut Canvas, x: f32, ground: f32, generator: &mut Generator) {
    let horizon = (ground - within(generator, 42.0, 56.0)).max(24.0);
    sky(canvas, Ink::hex(0x86c2ea), Ink::hex(0xe4f1f6), horizon);
    canvas.rect(0.0, horizon, SIDE, SIDE, Ink::hex(0x8aa048));
    for i in 0..6 {
        canvas.ellipse(
            24.0 * i as f32 + within(generator, -6.0, 10.0),
            horizon,
            14.0,
            within(generator, 4.0, 8.0),
            Ink::hex(0x4e7038),
        );
    }
    let far = x * 0.4 + 64.0 * 0.6;
    canvas.polygon(
        &[
            (far - 12.0, horizon),
            (far + 12.0, horizon),
            (x * 0.3 + 146.0, SIDE),
            (x * 0.3 - 56.0, SIDE),
        ],
        Ink::hex(0xa87443),
    );
    for side in [-1.0, 1.0] {
        let near = x * 0.3 + 45.0 + side * 46.0;
        canvas.polygon(
            &[
                (far + side * 4.0, horizon),
                (far + side * 6.0, horizon),
                (near + 8.0, SIDE),
                (near - 8.0, SIDE),
            ],
            Ink::hex(0x7d4f2a),
        );
    }
    for _ in 0..10 {
        let (px, py) = (
            within(generator, 20.0, 108.0),
            within(generator, ground - 10.0, SIDE),
        );
        canvas.ellipse(px, py, 3.4, 2.0, Ink::hex(0xd0a878));
    }
}
