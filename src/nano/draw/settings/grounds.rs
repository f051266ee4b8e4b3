//! Floors and what lies on them: rooms, fabric, planks, a mirror, rugs.

use super::super::{Canvas, Ink};
use super::{Generator, SIDE, within};
use crate::nano::identity::pick;

/// The walls and floors in which a caption without a setting takes place.
pub(super) fn room(canvas: &mut Canvas, ground: f32, generator: &mut Generator) {
    let walls = [0xd9d3c7, 0xc3cbd3, 0xc9d3c2, 0xd8c8c6, 0xb6b9c0, 0xe6e2da];
    let wall = Ink::hex(pick(&walls, generator));
    let floor = wall.darker(within(generator, 0.14, 0.26));
    let edge = ground - within(generator, 10.0, 22.0);
    canvas.rect(0.0, 0.0, SIDE, SIDE, wall);
    canvas.rect(0.0, edge, SIDE, SIDE, floor);
    canvas.rect(0.0, edge - 3.0, SIDE, edge, wall.lighter(0.35));
}

pub(super) fn fabric(canvas: &mut Canvas, generator: &mut Generator) {
    let pink = Ink::hex(pick(&[0xf59ac0, 0xf48ab4, 0xf8a8c8], generator));
    canvas.rect(0.0, 0.0, SIDE, SIDE, pink);
    let lean = within(generator, -30.0, 30.0);
    for i in 0..6 {
        let x = -20.0 + 30.0 * i as f32 + within(generator, -8.0, 8.0);
        let fold = |dx: f32| {
            [
                (x + dx - lean, -4.0),
                (x + dx + 12.0, 44.0),
                (x + dx - 8.0, 88.0),
                (x + dx + lean, 132.0),
            ]
        };
        canvas.curve(&fold(0.0), 6.0, pink.darker(0.16));
        canvas.curve(&fold(7.0), 4.5, pink.lighter(0.45));
    }
}

pub(super) fn planks(canvas: &mut Canvas, generator: &mut Generator) {
    let wood = Ink::hex(pick(&[0xa9652c, 0x9c5a28, 0xb87434], generator));
    canvas.rect(0.0, 0.0, SIDE, SIDE, wood.darker(0.5));
    let mut y = within(generator, -12.0, 0.0);
    let mut height = 12.0;
    while y < SIDE {
        let tone = wood.mix(Ink::hex(0xd89a54), within(generator, 0.0, 0.4));
        canvas.rect(0.0, y, SIDE, y + height - 2.2, tone);
        let grain = y + height * within(generator, 0.3, 0.6);
        canvas.line(
            &[
                (within(generator, -10.0, 60.0), grain),
                (within(generator, 70.0, 140.0), grain),
            ],
            1.6,
            tone.darker(0.2),
        );
        let seam = within(generator, 0.0, SIDE);
        canvas.rect(seam, y, seam + 2.4, y + height, wood.darker(0.5));
        y += height;
        height *= 1.12;
    }
}

pub(super) fn mirror(canvas: &mut Canvas, generator: &mut Generator) {
    // Seen from above: the glass fills the picture but for its gilded frame.
    canvas.rect(0.0, 0.0, SIDE, SIDE, Ink::hex(0xd9b44a));
    let edge = within(generator, 9.0, 20.0);
    canvas.rect(7.0, edge, SIDE - 7.0, SIDE, Ink::hex(0xa9d3dc));
    let start = within(generator, -20.0, 20.0);
    for (offset, width) in [
        (start, 12.0),
        (start + 22.0, 5.0),
        (start + 66.0, 14.0),
        (start + 90.0, 5.0),
    ] {
        let inside = |x: f32| x.clamp(7.0, SIDE - 7.0);
        let (top, bottom) = (offset + 40.0, offset);
        canvas.polygon(
            &[
                (inside(top), edge),
                (inside(top + width), edge),
                (inside(bottom + width), SIDE),
                (inside(bottom), SIDE),
            ],
            Ink::hex(0xeffbfd),
        );
    }
}

/// A rug under the subject, with a border; round or square.
pub(super) fn carpet(canvas: &mut Canvas, x: f32, ground: f32, ink: Ink, border: Ink, round: bool) {
    let x = 64.0 + (x - 64.0) * 0.6;
    if round {
        canvas.ellipse(x, ground + 2.0, 58.0, 20.0, border);
        canvas.ellipse(x, ground + 2.0, 53.0, 16.5, ink);
    } else {
        let (top, bottom) = (ground - 34.0, SIDE - 2.0);
        canvas.polygon(
            &[
                (x - 50.0, top),
                (x + 50.0, top),
                (x + 64.0, bottom),
                (x - 64.0, bottom),
            ],
            border,
        );
        canvas.polygon(
            &[
                (x - 46.0, top + 4.0),
                (x + 46.0, top + 4.0),
                (x + 57.0, bottom - 5.0),
                (x - 57.0, bottom - 5.0),
            ],
            ink,
        );
    }
}

pub(super) fn rug(canvas: &mut Canvas, x: f32, ground: f32, generator: &mut Generator) {
    let wall = Ink::hex(pick(&[0x55707a, 0x6d7f6a, 0x7a6a62], generator));
    let edge = ground - 44.0;
    canvas.rect(0.0, 0.0, SIDE, edge, wall);
    canvas.rect(0.0, edge, SIDE, SIDE, Ink::hex(0x5d3d2b));
    canvas.rect(0.0, edge - 4.0, SIDE, edge, wall.lighter(0.5));
    carpet(
        canvas,
        x,
        ground,
        Ink::hex(0xfbfaf6),
        Ink::hex(0xd2cdc0),
        false,
    );
    let x = 64.0 + (x - 64.0) * 0.6;
    for i in 0..6 {
        let t = i as f32 / 5.0;
        canvas.ellipse(
            x - 46.0 + 92.0 * t,
            ground + 8.0 + 4.0 * (t * 9.0).sin(),
            6.0,
            1.8,
            Ink::hex(0xe4e0d6),
        );
    }
}
