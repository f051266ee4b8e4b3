//! Things to wear and use: backpacks, clocks, sneakers, boots, glasses.

use super::canvas::{blob, curve, ellipse, polygon, rounded};
use super::vessels::emblem;
use super::{Canvas, Ink, Skin};
use crate::nano::identity::{Identity, Marking};

const DARK: Ink = Ink::hex(0x26222a);
const SHADE: Ink = Ink([16, 12, 30, 60]);

/// A bag from the front; builds are round-topped, boxy with side pockets, and with a buckled flap.
pub(super) fn backpack(canvas: &mut Canvas, identity: &Identity, skin: &Skin) {
    let [girth, height, pocket, detail] = identity.proportions;
    let (w, top) = (0.62 + 0.06 * girth, -0.74 - 0.06 * height);
    // Straps stand out on both sides, the loop above.
    for side in [-1.0, 1.0] {
        canvas.curve(
            &[
                (side * w * 0.8, -0.4),
                (side * (w + 0.22), 0.1),
                (side * w * 0.8, 0.8),
            ],
            0.13,
            skin.accent.darker(0.35),
        );
    }
    canvas.outline(
        &curve(&[
            (-0.2, top + 0.05),
            (-0.16, top - 0.20),
            (0.16, top - 0.20),
            (0.2, top + 0.05),
        ]),
        0.10,
        skin.accent.darker(0.35),
    );
    let p = 0.30 - 0.07 * pocket;
    match identity.build {
        0 => {
            canvas.cover(
                &blob(&[
                    (-w, 0.9),
                    (-w, 0.0),
                    (-w * 0.8, top + 0.22),
                    (0.0, top),
                    (w * 0.8, top + 0.22),
                    (w, 0.0),
                    (w, 0.9),
                    (0.0, 1.0),
                ]),
                skin,
            );
            canvas.curve(
                &[
                    (-w * 0.86, 0.02),
                    (-w * 0.62, top + 0.36),
                    (0.0, top + 0.18),
                    (w * 0.62, top + 0.36),
                    (w * 0.86, 0.02),
                ],
                0.06,
                DARK.alpha(0.75),
            );
            canvas.fill(&rounded(-w * 0.74, p, w * 0.74, 0.90, 0.16), skin.accent);
            canvas.line(
                &[(-w * 0.56, p + 0.14), (w * 0.56, p + 0.14)],
                0.06,
                DARK.alpha(0.75),
            );
        }
        1 => {
            for side in [-1.0, 1.0] {
                canvas.fill(
                    &rounded(
                        (side * (w + 0.02)) - 0.16,
                        0.30,
                        side * (w + 0.02) + 0.16,
                        0.94,
                        0.1,
                    ),
                    skin.accent.darker(0.15),
                );
            }
            canvas.cover(&rounded(-w, top, w, 1.0, 0.16), skin);
            canvas.line(
                &[(-w * 0.8, top + 0.26), (w * 0.8, top + 0.26)],
                0.06,
                DARK.alpha(0.75),
            );
            canvas.fill(&rounded(-w * 0.7, p, w * 0.7, 0.86, 0.06), skin.accent);
            canvas.rect(-0.05, p, 0.05, p + 0.3, DARK.alpha(0.75));
        }
        _ => {
            canvas.cover(&rounded(-w, top + 0.08, w, 1.0, 0.2), skin);
            canvas.fill(
                &rounded(-w - 0.04, top, w + 0.04, 0.12 + 0.06 * pocket, 0.26),
                skin.accent,
            );
            for side in [-1.0, 1.0] {
                let x = side * w * 0.5;
                canvas.rect(x - 0.07, -0.10, x + 0.07, 0.52, skin.accent.darker(0.4));
                canvas.rect(x - 0.10, 0.30, x + 0.10, 0.44, Ink::hex(0xe8d9a0));
            }
        }
    }
    match identity.marking {
        Marking::Base => canvas.fill(&rounded(-w, 0.84, w, 1.0, 0.06), skin.accent.darker(0.2)),
        Marking::Front => emblem(canvas, identity, skin, 0.0, -0.26 + 0.04 * detail, 0.19),
        _ => {}
    }
    canvas.fill(&rounded(w * 0.72, top + 0.4, w, 0.96, 0.08), SHADE);
}

/// A face with hands at `hour`; builds are an alarm clock with bells, a boxed clock, and a sunburst.
pub(super) fn clock(canvas: &mut Canvas, identity: &Identity, skin: &Skin, hour: f32) {
    let [girth, _, face, detail] = identity.proportions;
    let (r, y) = (0.70 + 0.05 * girth, 0.16);
    match identity.build {
        0 => {
            for side in [-1.0, 1.0] {
                canvas.line(
                    &[(side * 0.40, 0.6), (side * 0.60, 0.95)],
                    0.15,
                    skin.accent.darker(0.3),
                );
                canvas.ellipse(side * 0.48, -0.62, 0.32 + 0.03 * detail, 0.25, skin.accent);
            }
            canvas.line(&[(0.0, -0.6), (0.0, -0.86)], 0.10, DARK);
            canvas.line(&[(-0.12, -0.88), (0.12, -0.88)], 0.10, DARK);
            canvas.cover(&ellipse(0.0, y, r, r), skin);
        }
        1 => {
            for side in [-1.0, 1.0] {
                canvas.line(
                    &[(side * 0.5, 0.85), (side * 0.56, 0.96)],
                    0.15,
                    skin.accent.darker(0.3),
                );
            }
            canvas.fill(&rounded(-0.3, -0.84, 0.3, -0.5, 0.12), skin.accent);
            canvas.cover(&rounded(-r - 0.14, -0.62, r + 0.14, 0.90, 0.16), skin);
        }
        _ => {
            for ray in 0..12 {
                let angle = (ray as f32 + 0.5) / 12.0 * std::f32::consts::TAU;
                let (s, c) = angle.sin_cos();
                canvas.line(
                    &[(0.5 * s, 0.06 + 0.5 * c), (0.90 * s, 0.06 + 0.90 * c)],
                    0.16,
                    skin.accent,
                );
            }
            canvas.cover(&ellipse(0.0, 0.06, r, r), skin);
        }
    }
    let y = if identity.build == 2 { 0.06 } else { y };
    let f = 0.50 + 0.04 * face;
    let (dial, hands) = match identity.marking {
        Marking::Front => (
            skin.accent.lighter(0.25),
            if skin.accent.0[1] > 110 {
                DARK
            } else {
                Ink::hex(0xffffff)
            },
        ),
        _ => (Ink::hex(0xfbf8ee), DARK),
    };
    canvas.disc(0.0, y, f, dial);
    if identity.marking == Marking::Base {
        canvas.outline(&ellipse(0.0, y, f, f), 0.10, skin.accent);
    }
    for quarter in 0..4 {
        let (s, c) = (quarter as f32 * std::f32::consts::FRAC_PI_2).sin_cos();
        canvas.disc(s * f * 0.82, y + c * f * 0.82, 0.06, hands);
    }
    for (turn, length, width) in [(hour / 12.0, 0.30, 0.11), (hour.fract(), 0.42, 0.075)] {
        let (s, c) = (turn * std::f32::consts::TAU).sin_cos();
        canvas.line(&[(0.0, y), (s * length, y - c * length)], width, hands);
    }
    if identity.marking == Marking::Top {
        canvas.disc(0.0, y, 0.12, skin.accent);
    }
}

/// A shoe with its toe to the right; builds are low, high and running with a thick sole.
pub(super) fn sneaker(canvas: &mut Canvas, identity: &Identity, skin: &Skin) {
    let [girth, height, sole, detail] = identity.proportions;
    let ankle = match identity.build {
        0 => 0.06,
        1 => -0.50,
        _ => -0.06,
    } - 0.06 * height;
    let s = if identity.build == 2 { 0.30 } else { 0.20 } + 0.03 * sole;
    let toe = 0.34 - 0.05 * girth;
    let upper = [
        (-0.92, 0.9),
        (-0.90, ankle + 0.10),
        (-0.80, ankle - 0.06),
        (-0.48, ankle + 0.04),
        (-0.18, ankle + 0.02),
        (0.20, toe - 0.06),
        (0.66, toe + 0.08),
        (0.94, 0.66),
        (0.96, 0.9),
    ];
    canvas.cover(&blob(&upper), skin);
    canvas.ellipse(-0.48, ankle + 0.04, 0.28, 0.08, DARK);
    // Tongue, toe cap and heel in the accent.
    canvas.line(
        &[(-0.20, ankle - 0.04), (0.14, toe - 0.10)],
        0.16,
        skin.accent,
    );
    let cap = if identity.marking == Marking::Front {
        skin.accent
    } else {
        Ink::hex(0xf4f2ec)
    };
    canvas.fill(
        &blob(&[(0.58, 0.86), (0.62, toe + 0.18), (0.92, 0.62), (0.98, 0.86)]),
        cap,
    );
    if identity.marking == Marking::Top {
        canvas.fill(
            &rounded(-0.93, ankle + 0.02, -0.62, 0.84, 0.08),
            skin.accent,
        );
    }
    for lace in 0..3 {
        let t = lace as f32 / 3.0;
        let (x, y) = (-0.12 + 0.36 * t, ankle + 0.10 + (toe - ankle) * t);
        canvas.line(
            &[(x - 0.10, y + 0.08), (x + 0.12, y - 0.04)],
            0.065,
            Ink::hex(0xffffff),
        );
    }
    match identity.build {
        0 => canvas.curve(
            &[(-0.62, 0.62), (-0.24, 0.68), (0.22, 0.44)],
            0.12,
            skin.accent,
        ),
        1 => {
            canvas.disc(-0.52, ankle + 0.40, 0.18, Ink::hex(0xf7f3e8));
            canvas.disc(-0.52, ankle + 0.40, 0.12, skin.accent);
        }
        _ => {
            for x in [-0.40, -0.16, 0.08] {
                canvas.line(
                    &[(x, 0.66), (x + 0.14, 0.30)],
                    0.09 + 0.01 * detail,
                    skin.accent,
                );
            }
        }
    }
    let ink = if identity.marking == Marking::Base {
        skin.accent
    } else {
        Ink::hex(0xf8f7f2)
    };
    canvas.fill(&rounded(-0.97, 1.0 - s, 1.0, 1.0, 0.09), ink);
    canvas.line(&[(-0.92, 0.98), (0.92, 0.98)], 0.05, DARK.alpha(0.6));
}

/// A shaft and a foot, toe to the right; builds have laces, a fur cuff, and a buckle with a high heel.
pub(super) fn boot(canvas: &mut Canvas, identity: &Identity, skin: &Skin) {
    let [girth, height, foot, detail] = identity.proportions;
    let (w, top) = (0.08 * girth, -0.90 - 0.06 * height);
    let right = 0.16 + w;
    let heel = if identity.build == 2 { 0.26 } else { 0.14 };
    let toe = 0.82 + 0.06 * foot;
    let sole = 1.0 - heel * 0.5;
    let shaft = [
        (-0.56 - w, top),
        (right, top),
        (right - 0.02, 0.10),
        (right + 0.20, 0.30),
        (toe - 0.12, 0.42),
        (toe, 0.66),
        (toe, sole),
        (-0.58, sole),
        (-0.54 - w * 0.5, 0.2),
    ];
    canvas.cover(&polygon(&shaft), skin);
    canvas.disc(toe - 0.14, sole - 0.20, 0.20, skin.body.darker(0.1));
    let ground = if identity.marking == Marking::Base {
        skin.accent
    } else {
        Ink::hex(0x3b2a22)
    };
    canvas.fill(
        &rounded(-0.60, sole - 0.08, toe + 0.05, sole + 0.04, 0.04),
        ground,
    );
    canvas.rect(-0.60, sole - 0.04, -0.60 + 0.42, 1.0, ground);
    if identity.build != 2 {
        canvas.rect(0.12, sole, toe, 1.0, ground);
    }
    match identity.build {
        0 => {
            for i in 0..4 {
                let y = top + 0.36 + 0.24 * i as f32;
                canvas.line(
                    &[(right - 0.36, y + 0.04), (right - 0.04, y - 0.04)],
                    0.08,
                    skin.accent.lighter(0.15),
                );
            }
            canvas.fill(
                &rounded(-0.60 - w, top - 0.06, right + 0.04, top + 0.12, 0.06),
                skin.accent,
            );
        }
        1 => {
            for i in 0..6 {
                let t = i as f32 / 5.0;
                canvas.disc(
                    -0.54 - w + t * (right + 0.52 + w),
                    top + 0.04,
                    0.19 + 0.02 * detail,
                    skin.accent.lighter(0.25),
                );
            }
        }
        _ => {
            canvas.polygon(
                &[
                    (-0.56 - w, top),
                    (right, top),
                    (right - 0.1, top + 0.3),
                    (-0.2, top + 0.12),
                    (-0.5 - w, top + 0.3),
                ],
                skin.accent,
            );
            canvas.rect(-0.55, 0.10, right + 0.04, 0.28, skin.accent);
            canvas.outline(
                &rounded(-0.26, 0.06, -0.02, 0.32, 0.03),
                0.06,
                Ink::hex(0xf0d878),
            );
        }
    }
    match identity.marking {
        Marking::Top => canvas.rect(-0.55 - w, top + 0.22, right, top + 0.42, skin.accent),
        Marking::Front => emblem(canvas, identity, skin, -0.22, -0.22, 0.18),
        _ => {}
    }
    canvas.polygon(
        &[
            (-0.56 - w, top + 0.1),
            (-0.40 - w, top + 0.1),
            (-0.36, sole - 0.1),
            (-0.56, sole - 0.1),
        ],
        SHADE,
    );
}

/// Frames with two lenses and temples; builds are round, square and cat-eyed.
pub(super) fn glasses(canvas: &mut Canvas, identity: &Identity, skin: &Skin) {
    let [girth, height, tint, detail] = identity.proportions;
    let width = 0.19 + 0.03 * girth;
    let (rx, ry, y) = (0.38, 0.36 + 0.05 * height, 0.42);
    let lens_ink = match identity.marking {
        Marking::Front | Marking::Base => skin.accent.mix(DARK, 0.15),
        _ => DARK.mix(skin.accent, 0.35 + 0.1 * tint),
    };
    for side in [-1.0, 1.0] {
        // The temples rise behind the lenses as if the glasses stood open on a table.
        let hinge = (side * 0.90, y - ry * 0.5);
        let ink = if identity.marking == Marking::Top {
            skin.accent
        } else {
            skin.body.darker(0.3)
        };
        canvas.line(&[hinge, (side * 0.74, y - ry - 0.34)], 0.13, ink);
    }
    canvas.cover_curve(
        &[(-0.2, y - 0.08), (0.0, y - 0.2), (0.2, y - 0.08)],
        0.15,
        skin,
    );
    for side in [-1.0, 1.0] {
        let x = side * 0.50;
        let lens = match identity.build {
            0 => ellipse(x, y, rx, ry),
            1 => rounded(x - rx, y - ry * 0.85, x + rx, y + ry * 0.9, 0.12),
            _ => blob(&[
                (x + side * 0.46, y - ry * 1.1),
                (x + side * 0.36, y + ry * 0.4),
                (x, y + ry),
                (x - side * 0.34, y + ry * 0.3),
                (x - side * 0.30, y - ry * 0.6),
            ]),
        };
        canvas.fill(&lens, lens_ink);
        canvas.line(
            &[(x - 0.16, y + 0.10), (x + 0.02, y - 0.14)],
            0.07 + 0.01 * detail,
            Ink::hex(0xffffff).alpha(0.75),
        );
        canvas.cover_outline(&lens, width, skin);
        if identity.marking == Marking::Base {
            canvas.curve(
                &[
                    (x - 0.24, y + ry * 0.9),
                    (x, y + ry),
                    (x + 0.24, y + ry * 0.9),
                ],
                width * 0.8,
                skin.accent,
            );
        }
        if identity.build == 2 {
            canvas.disc(x + side * 0.38, y - ry * 0.86, 0.10, skin.accent);
        }
    }
}
