//! Toys (robot, car, duck) and stuffed animals (bear, rabbit, monkey).

use super::canvas::{blob, ellipse, polygon, rounded};
use super::vessels::emblem;
use super::{Canvas, Ink, Skin};
use crate::nano::identity::{Identity, Marking};

const DARK: Ink = Ink::hex(0x201c22);
const WHITE: Ink = Ink::hex(0xfafafa);
const SHADE: Ink = Ink([16, 12, 30, 60]);

/// Sits facing the viewer with its legs out; builds are round, long and side ears.
pub(super) fn stuffed_animal(canvas: &mut Canvas, identity: &Identity, skin: &Skin) {
    let [girth, height, head, ears] = identity.proportions;
    let (w, hy) = (0.06 * girth, -0.36 - 0.05 * height);
    let (rx, ry) = (0.50 + 0.05 * head, 0.42 + 0.03 * head);
    let pale = skin.body.lighter(0.55);
    let ear = if identity.marking == Marking::Top {
        skin.accent
    } else {
        skin.body.darker(0.12)
    };
    let e = 1.0 + 0.15 * ears;
    for side in [-1.0, 1.0] {
        match identity.build {
            0 => {
                canvas.disc(side * 0.42, hy - 0.36, 0.23 * e, ear);
                canvas.disc(side * 0.42, hy - 0.35, 0.12 * e, pale);
            }
            1 => {
                canvas.ellipse(side * 0.24, hy - 0.40, 0.14, 0.42 * e.min(1.05), ear);
                canvas.ellipse(side * 0.24, hy - 0.38, 0.07, 0.28, Ink::hex(0xf0b4c0));
            }
            _ => {
                canvas.disc(side * (rx + 0.08), hy - 0.02, 0.25 * e, ear);
                canvas.disc(side * (rx + 0.08), hy - 0.02, 0.14 * e, pale);
            }
        }
        // Arms hang to the sides, legs point at the viewer.
        canvas.cover(&ellipse(side * (0.54 + w), 0.32, 0.19, 0.32), skin);
        canvas.fill(
            &ellipse(side * (0.54 + w), 0.32, 0.19, 0.32),
            SHADE.alpha(0.12),
        );
    }
    canvas.cover(&ellipse(0.0, 0.46, 0.50 + w, 0.48), skin);
    let belly = if identity.marking == Marking::Front {
        skin.accent
    } else {
        pale
    };
    canvas.ellipse(0.0, 0.46, 0.28, 0.32, belly);
    for side in [-1.0, 1.0] {
        canvas.cover(&ellipse(side * 0.50, 0.80, 0.26, 0.21), skin);
        canvas.ellipse(
            side * 0.52,
            0.81,
            0.15,
            0.13,
            if identity.marking == Marking::Base {
                skin.accent
            } else {
                pale
            },
        );
    }
    canvas.cover(&ellipse(0.0, hy, rx, ry), skin);
    canvas.ellipse(0.0, hy + 0.15, 0.24, 0.18, pale);
    canvas.ellipse(0.0, hy + 0.08, 0.09, 0.07, DARK);
    for side in [-1.0, 1.0] {
        canvas.disc(side * 0.21, hy - 0.07, 0.075, DARK);
        canvas.disc(side * 0.21 + 0.02, hy - 0.09, 0.025, WHITE);
    }
    // Every stuffed animal wears a bow in its accent: no dog or cat does.
    let y = hy + ry + 0.02;
    canvas.polygon(
        &[(0.0, y), (-0.28, y - 0.15), (-0.28, y + 0.15)],
        skin.accent.darker(0.1),
    );
    canvas.polygon(
        &[(0.0, y), (0.28, y - 0.15), (0.28, y + 0.15)],
        skin.accent.darker(0.1),
    );
    canvas.disc(0.0, y, 0.08, skin.accent.darker(0.35));
}

/// Builds are a robot, a car and a duck.
pub(super) fn toy(canvas: &mut Canvas, identity: &Identity, skin: &Skin) {
    match identity.build {
        0 => robot(canvas, identity, skin),
        1 => car(canvas, identity, skin),
        _ => duck(canvas, identity, skin),
    }
}

fn robot(canvas: &mut Canvas, identity: &Identity, skin: &Skin) {
    let [girth, height, head, arms] = identity.proportions;
    let (w, h) = (0.44 + 0.05 * girth, 0.40 + 0.05 * head);
    let limb = skin.accent.darker(0.1);
    canvas.line(&[(0.0, -0.7), (0.0, -0.92)], 0.07, DARK);
    canvas.disc(0.0, -0.92, 0.09, skin.accent);
    for side in [-1.0, 1.0] {
        canvas.line(
            &[(side * w, 0.0), (side * (w + 0.24), 0.22 + 0.1 * arms)],
            0.15,
            limb,
        );
        canvas.disc(side * (w + 0.26), 0.30 + 0.1 * arms, 0.13, limb);
        canvas.rect(side * 0.22 - 0.12, 0.5, side * 0.22 + 0.12, 0.95, limb);
        canvas.fill(
            &rounded(side * 0.24 - 0.19, 0.86, side * 0.24 + 0.19, 1.0, 0.05),
            if identity.marking == Marking::Base {
                skin.body
            } else {
                DARK
            },
        );
    }
    canvas.cover(&rounded(-w, -0.16 - 0.05 * height, w, 0.60, 0.06), skin);
    if identity.marking == Marking::Front {
        emblem(canvas, identity, skin, 0.0, 0.22, 0.18);
    } else {
        canvas.fill(&rounded(-0.24, 0.06, 0.24, 0.40, 0.03), Ink::hex(0xdfe6ea));
        for (i, ink) in [0xe04a3a, 0xf2c63c, 0x4ab35a].into_iter().enumerate() {
            canvas.disc(-0.15 + 0.15 * i as f32, 0.23, 0.06, Ink::hex(ink));
        }
    }
    canvas.cover(&rounded(-h, -0.74, h, -0.20, 0.06), skin);
    if identity.marking == Marking::Top {
        canvas.rect(-h, -0.74, h, -0.58, skin.accent);
    }
    for side in [-1.0, 1.0] {
        canvas.disc(side * 0.18, -0.47, 0.12, Ink::hex(0xfff6b0));
        canvas.disc(side * 0.18, -0.47, 0.05, DARK);
    }
    canvas.line(&[(-0.16, -0.28), (0.16, -0.28)], 0.05, DARK);
}

fn car(canvas: &mut Canvas, identity: &Identity, skin: &Skin) {
    let [girth, height, wheels, cabin] = identity.proportions;
    let r = 0.25 + 0.03 * wheels;
    let (deck, roof) = (0.22 - 0.05 * girth, -0.32 - 0.07 * height);
    let top = if identity.marking == Marking::Top {
        skin.accent
    } else {
        skin.body.darker(0.12)
    };
    let slant = 0.06 * cabin;
    canvas.polygon(
        &[
            (-0.62, deck + 0.05),
            (-0.42 + slant, roof),
            (0.24 + slant, roof),
            (0.52, deck + 0.05),
        ],
        top,
    );
    canvas.polygon(
        &[
            (-0.48, deck),
            (-0.34 + slant, roof + 0.1),
            (-0.10, roof + 0.1),
            (-0.10, deck),
        ],
        Ink::hex(0xcdeaf5),
    );
    canvas.polygon(
        &[
            (0.0, deck),
            (0.0, roof + 0.1),
            (0.18 + slant, roof + 0.1),
            (0.38, deck),
        ],
        Ink::hex(0xcdeaf5),
    );
    canvas.cover(&rounded(-0.96, deck, 0.98, 0.80, 0.18), skin);
    if identity.marking == Marking::Front {
        emblem(canvas, identity, skin, -0.02, 0.48, 0.17);
    }
    canvas.rect(
        -0.96,
        0.66,
        0.98,
        0.80,
        if identity.marking == Marking::Base {
            skin.accent
        } else {
            skin.body.darker(0.35)
        },
    );
    canvas.disc(0.88, 0.42, 0.09, Ink::hex(0xfff2a0));
    for x in [-0.52, 0.52] {
        canvas.disc(x, 1.0 - r, r, DARK);
        canvas.disc(x, 1.0 - r, r * 0.55, skin.accent);
        canvas.disc(x, 1.0 - r, r * 0.2, WHITE);
    }
}

fn duck(canvas: &mut Canvas, identity: &Identity, skin: &Skin) {
    let [girth, height, head, wing] = identity.proportions;
    let (w, hy) = (0.06 * girth, -0.36 - 0.06 * height);
    let r = 0.36 + 0.04 * head;
    let body = [
        (-0.92, -0.02),
        (-0.62, 0.20),
        (-0.1, 0.10),
        (0.44, 0.08),
        (0.74 + w, 0.42),
        (0.56, 0.86),
        (0.0, 1.0),
        (-0.56, 0.90),
        (-0.86, 0.48),
    ];
    canvas.cover(&blob(&body), skin);
    canvas.fill(
        &polygon(&[(0.60, hy - 0.08), (0.98, hy + 0.04), (0.60, hy + 0.16)]),
        Ink::hex(0xf08a1e),
    );
    canvas.cover(&ellipse(0.32, hy, r, r), skin);
    if identity.marking == Marking::Top {
        canvas.fill(
            &blob(&[
                (0.0, hy - 0.14),
                (0.14, hy - r),
                (0.50, hy - r),
                (0.62, hy - 0.16),
                (0.32, hy - 0.22),
            ]),
            skin.accent,
        );
    }
    canvas.fill(
        &blob(&[
            (-0.52, 0.36),
            (-0.1, 0.28 - 0.04 * wing),
            (0.26, 0.42),
            (0.0, 0.70),
            (-0.36, 0.66),
        ]),
        skin.accent,
    );
    canvas.disc(0.44, hy - 0.06, 0.09, DARK);
    canvas.disc(0.47, hy - 0.09, 0.03, WHITE);
    match identity.marking {
        Marking::Base => canvas.fill(
            &blob(&[
                (-0.7, 0.80),
                (0.0, 0.86),
                (0.66, 0.76),
                (0.5, 0.92),
                (0.0, 1.0),
                (-0.54, 0.92),
            ]),
            skin.accent,
        ),
        Marking::Front => canvas.curve(
            &[(0.04, 0.08), (0.34, 0.16), (0.60, 0.06)],
            0.16,
            skin.accent,
        ),
        _ => {}
    }
}
