//! Round things that hold something: teapots, vases, bowls, cans, candles.

use super::canvas::{blob, curve, ellipse, polygon, rounded, turned};
use super::{Canvas, Ink, Skin};
use crate::nano::identity::{Identity, Marking};

const METAL: Ink = Ink::hex(0xc9ced6);
const SHADE: Ink = Ink([16, 12, 30, 60]);
const GLINT: Ink = Ink([255, 255, 255, 120]);

/// Body, spout to the right, handle to the left, lid; builds are round, squat and tall.
pub(super) fn teapot(canvas: &mut Canvas, identity: &Identity, skin: &Skin) {
    let [girth, height, lid, detail] = identity.proportions;
    let (rx, top) = match identity.build {
        0 => (0.56, -0.22),
        1 => (0.64, 0.02),
        _ => (0.46, -0.46),
    };
    let (rx, top) = (rx + 0.05 * girth, top - 0.06 * height);
    let middle = (top + 0.92) / 2.0;
    let handle = curve(&[
        (-rx * 0.72, top + 0.20),
        (-0.86, top + 0.10),
        (-0.95, middle),
        (-0.80, middle + 0.28),
        (-rx * 0.86, middle + 0.24),
    ]);
    canvas.outline(&handle, 0.13 + 0.02 * detail, skin.accent);
    let tip = top + 0.04 - 0.1 * detail;
    let spout = [
        (rx * 0.7, middle + 0.30),
        (rx * 0.8, middle - 0.05),
        (0.80, middle - 0.12),
        (0.82, tip),
        (1.0, tip - 0.02),
        (0.97, middle + 0.12),
        (0.74, middle + 0.34),
    ];
    canvas.cover(&blob(&spout), skin);
    canvas.line(&[(0.83, tip), (0.99, tip - 0.02)], 0.07, skin.accent);
    canvas.cover(
        &turned(&[
            (0.0, top),
            (rx * 0.66, top + 0.06),
            (rx, middle),
            (rx * 0.80, 0.84),
            (rx * 0.5, 0.94),
        ]),
        skin,
    );
    canvas.fill(
        &rounded(-rx * 0.62, 0.86, rx * 0.62, 1.0, 0.05),
        skin.accent,
    );
    let cap = if identity.marking == Marking::Top {
        skin.accent
    } else {
        skin.body.darker(0.18)
    };
    canvas.ellipse(0.0, top + 0.05, rx * 0.64, 0.13 + 0.05 * lid, cap);
    canvas.disc(0.0, top - 0.15 - 0.05 * lid, 0.11, skin.accent);
    emblem(canvas, identity, skin, 0.0, middle + 0.08, 0.24);
    canvas.ellipse(-rx * 0.45, middle - 0.16, 0.08, 0.2, GLINT);
}

/// A turned profile; builds are an amphora with handles, a bottle, and a tulip with flowers in it.
pub(super) fn vase(canvas: &mut Canvas, identity: &Identity, skin: &Skin) {
    let [girth, height, neck, detail] = identity.proportions;
    let w = 1.0 + 0.16 * girth;
    let n = 0.16 + 0.04 * neck;
    let shoulder = 0.02 - 0.12 * height;
    let profile = match identity.build {
        0 => vec![
            (0.30 * w, -0.96),
            (n, -0.80),
            (n + 0.02, -0.58),
            (0.52 * w, shoulder - 0.12),
            (0.44 * w, 0.45),
            (0.22 * w, 0.90),
            (0.30 * w, 1.0),
        ],
        1 => vec![
            (0.20, -0.98),
            (n * 0.8, -0.86),
            (n * 0.8, -0.30),
            (0.30 * w, shoulder),
            (0.62 * w, 0.48),
            (0.46 * w, 0.94),
            (0.2, 1.0),
        ],
        _ => vec![
            (0.46 * w, -0.34),
            (0.34 * w, -0.16),
            (0.44 * w, 0.30 + shoulder),
            (0.40 * w, 0.66),
            (0.20 * w, 0.92),
            (0.28 * w, 1.0),
        ],
    };
    match identity.build {
        0 => {
            for side in [-1.0, 1.0] {
                let handle = [
                    (side * n, -0.70),
                    (side * 0.50 * w, -0.62),
                    (side * 0.50 * w, shoulder - 0.16),
                ];
                canvas.curve(&handle, 0.10, skin.accent);
            }
        }
        1 => {}
        _ => {
            for (x, y) in [(-0.34, -0.66), (0.36, -0.70), (0.0, -0.86)] {
                canvas.line(&[(x * 0.3, -0.2), (x, y)], 0.06, Ink::hex(0x3a7d34));
                for (dx, dy) in [(-0.12, 0.0), (0.12, 0.0), (0.0, -0.12), (0.0, 0.12)] {
                    canvas.disc(x + dx, y + dy, 0.11 + 0.02 * detail, skin.accent);
                }
                canvas.disc(x, y, 0.08, Ink::hex(0xf6dc55));
            }
        }
    }
    canvas.cover(&turned(&profile), skin);
    let (rim, lip) = (profile[0].1, profile[0].0);
    let edge = if identity.marking == Marking::Top {
        0.16
    } else {
        0.08
    };
    canvas.fill(
        &rounded(-lip, rim - 0.02, lip, rim + edge, 0.05),
        skin.accent,
    );
    if identity.marking == Marking::Base {
        canvas.fill(&rounded(-0.32 * w, 0.80, 0.32 * w, 1.0, 0.05), skin.accent);
    }
    emblem(canvas, identity, skin, 0.0, 0.28, 0.22);
    canvas.ellipse(-0.24 * w, 0.2, 0.07, 0.26, GLINT);
}

/// A half round with something in it; builds hold berries, soup with chopsticks, and fruit.
pub(super) fn bowl(canvas: &mut Canvas, identity: &Identity, skin: &Skin) {
    let [girth, depth, foot, detail] = identity.proportions;
    let (w, top) = (0.92 + 0.06 * girth, 0.06 - 0.10 * depth);
    canvas.ellipse(0.0, top, w, 0.22, skin.body.darker(0.35));
    let berry = |canvas: &mut Canvas, x: f32, y: f32, r: f32, ink: Ink| {
        canvas.disc(x, y, r, ink.darker(0.25));
        canvas.disc(x - 0.02, y - 0.03, r * 0.8, ink);
        canvas.disc(x - r * 0.3, y - r * 0.35, r * 0.25, GLINT);
    };
    match identity.build {
        0 => {
            let r = 0.17 + 0.02 * detail;
            for (x, y) in [
                (-0.30, -0.30),
                (0.05, -0.38),
                (0.36, -0.26),
                (-0.58, -0.10),
                (-0.18, -0.14),
                (0.20, -0.12),
                (0.60, -0.08),
            ] {
                berry(canvas, x, top + y + 0.06, r, skin.accent);
            }
        }
        1 => {
            canvas.ellipse(
                0.0,
                top,
                w * 0.88,
                0.17,
                skin.accent.mix(Ink::hex(0xf3dfa8), 0.35),
            );
            for x in [0.0, 0.22] {
                canvas.line(
                    &[(x - 0.1, top + 0.04), (x + 0.62, top - 0.82)],
                    0.075,
                    Ink::hex(0x8a4b24),
                );
            }
        }
        _ => {
            let r = 0.30 + 0.03 * detail;
            for (x, ink) in [
                (-0.42, Ink::hex(0xd8392e)),
                (0.44, Ink::hex(0x86b83a)),
                (0.02, Ink::hex(0xf0a22e)),
            ] {
                berry(canvas, x, top - 0.16, r, ink);
            }
        }
    }
    // The near wall covers the lower half of what is inside.
    let wall = [
        (-w, top),
        (-w * 0.5, top + 0.15),
        (0.0, top + 0.2),
        (w * 0.5, top + 0.15),
        (w, top),
        (w * 0.86, top + 0.45),
        (w * 0.42, 0.90),
        (-w * 0.42, 0.90),
        (-w * 0.86, top + 0.45),
    ];
    canvas.cover(&polygon(&wall), skin);
    let f = 0.40 + 0.06 * foot;
    canvas.fill(
        &rounded(-f, 0.86, f, 1.0, 0.04),
        if identity.marking == Marking::Base {
            skin.accent
        } else {
            skin.body.darker(0.25)
        },
    );
    let rim = [
        (-w, top),
        (-w * 0.5, top + 0.15),
        (0.0, top + 0.2),
        (w * 0.5, top + 0.15),
        (w, top),
    ];
    canvas.curve(
        &rim,
        if identity.marking == Marking::Top {
            0.16
        } else {
            0.08
        },
        if identity.marking == Marking::Top {
            skin.accent
        } else {
            skin.body.lighter(0.3)
        },
    );
    emblem(canvas, identity, skin, 0.0, top + 0.5, 0.2);
    canvas.ellipse(-w * 0.55, top + 0.42, 0.08, 0.16, GLINT);
}

/// A metal cylinder with a printed wall; builds are slim, wide, and opened with the lid up.
pub(super) fn can(canvas: &mut Canvas, identity: &Identity, skin: &Skin) {
    let [girth, height, rim, _] = identity.proportions;
    let (w, top) = match identity.build {
        0 => (0.42, -0.86),
        1 => (0.60, -0.50),
        _ => (0.52, -0.56),
    };
    let (w, top) = (w + 0.05 * girth, top - 0.06 * height);
    let r = 0.13 + 0.02 * rim;
    if identity.build == 2 {
        canvas.fill(
            &ellipse(0.08, top - 0.28, w * 0.86, 0.26),
            METAL.darker(0.1),
        );
        canvas.fill(
            &ellipse(0.08, top - 0.28, w * 0.66, 0.18),
            METAL.lighter(0.35),
        );
    }
    canvas.fill(
        &rounded(-w * 0.9, top, w * 0.9, 1.0, 0.1),
        METAL.darker(0.12),
    );
    canvas.cover(&rounded(-w, top + 0.14, w, 0.90, 0.07), skin);
    for (x0, x1, ink) in [(w * 0.62, w, SHADE), (-w * 0.8, -w * 0.5, GLINT)] {
        canvas.rect(x0, top + 0.14, x1, 0.9, ink);
    }
    match identity.marking {
        Marking::None => {}
        Marking::Base => canvas.rect(-w, 0.58, w, 0.80, skin.accent),
        Marking::Top => canvas.rect(-w, top + 0.24, w, top + 0.46, skin.accent),
        Marking::Front => {
            canvas.ellipse(0.0, (top + 1.0) / 2.0, w * 0.62, 0.36, Ink::hex(0xf5f2ea));
            canvas.ellipse(0.0, (top + 1.0) / 2.0, w * 0.42, 0.24, skin.accent);
        }
    }
    canvas.ellipse(0.0, top + 0.06, w * 0.92, r, METAL);
    if identity.build == 2 {
        canvas.ellipse(0.0, top + 0.07, w * 0.74, r * 0.7, skin.accent.darker(0.45));
    } else {
        canvas.ellipse(0.0, top + 0.06, w * 0.76, r * 0.72, METAL.darker(0.28));
        canvas.ellipse(0.06, top + 0.05, w * 0.26, r * 0.4, METAL.lighter(0.6));
    }
}

/// Wax with a flame; builds are a thick pillar, a taper in a holder, and wax in a glass.
pub(super) fn candle(canvas: &mut Canvas, identity: &Identity, skin: &Skin) {
    let [girth, height, flame, detail] = identity.proportions;
    let (w, top) = match identity.build {
        0 => (0.44 + 0.06 * girth, -0.20 - 0.1 * height),
        1 => (0.20 + 0.03 * girth, -0.36 - 0.08 * height),
        _ => (0.58 + 0.05 * girth, 0.06 - 0.08 * height),
    };
    let f = 1.0 + 0.12 * flame;
    canvas.fill(
        &blob(&[
            (0.0, top - 0.78 * f),
            (0.19 * f, top - 0.28),
            (0.0, top - 0.10),
            (-0.19 * f, top - 0.28),
        ]),
        Ink::hex(0xf58a1f),
    );
    canvas.fill(
        &blob(&[
            (0.0, top - 0.56 * f),
            (0.10 * f, top - 0.24),
            (0.0, top - 0.12),
            (-0.10 * f, top - 0.24),
        ]),
        Ink::hex(0xfff0a0),
    );
    canvas.line(&[(0.0, top), (0.0, top - 0.16)], 0.06, Ink::hex(0x33241c));
    match identity.build {
        0 => {
            canvas.cover(&rounded(-w, top, w, 1.0, 0.08), skin);
            canvas.ellipse(0.0, top + 0.03, w, 0.10, skin.body.lighter(0.45));
            for (x, drop) in [(-0.72, 0.36), (0.5, 0.22 + 0.1 * detail), (0.82, 0.5)] {
                canvas.line(
                    &[(x * w, top + 0.04), (x * w, top + drop)],
                    0.12,
                    skin.body.lighter(0.45),
                );
            }
        }
        1 => {
            canvas.cover(&rounded(-w, top, w, 0.70, 0.05), skin);
            canvas.line(
                &[(w * 0.6, top + 0.05), (w * 0.6, top + 0.3)],
                0.10,
                skin.body.lighter(0.45),
            );
            canvas.ellipse(0.0, 0.68, 0.36, 0.12, skin.accent.lighter(0.2));
            canvas.outline(&ellipse(0.62, 0.82, 0.18, 0.13), 0.09, skin.accent);
            canvas.fill(
                &blob(&[
                    (-0.62, 0.82),
                    (0.0, 0.78),
                    (0.62, 0.82),
                    (0.42, 1.0),
                    (-0.42, 1.0),
                ]),
                skin.accent,
            );
        }
        _ => {
            canvas.fill(
                &rounded(-w - 0.08, top - 0.20, w + 0.08, 1.0, 0.14),
                Ink::hex(0xe4f2f6).alpha(0.55),
            );
            canvas.cover(&rounded(-w, top + 0.08, w, 0.93, 0.10), skin);
            canvas.ellipse(0.0, top + 0.10, w, 0.09, skin.body.lighter(0.45));
            canvas.line(&[(-w - 0.02, top - 0.1), (-w - 0.02, 0.8)], 0.06, GLINT);
        }
    }
    match identity.marking {
        Marking::Base if identity.build != 1 => canvas.rect(-w, 0.72, w, 0.92, skin.accent),
        Marking::Top => canvas.rect(-w, top + 0.22, w, top + 0.38, skin.accent),
        Marking::Front if identity.build != 1 => emblem(canvas, identity, skin, 0.0, 0.48, 0.24),
        _ => {}
    }
    canvas.rect(
        w * 0.5,
        top + 0.1,
        w,
        if identity.build == 1 { 0.62 } else { 0.9 },
        SHADE,
    );
}

/// The sign of individuals that are marked on the front: a heart-like pair of discs on a light ground.
pub(super) fn emblem(
    canvas: &mut Canvas,
    identity: &Identity,
    skin: &Skin,
    x: f32,
    y: f32,
    r: f32,
) {
    if identity.marking == Marking::Front {
        canvas.disc(x, y, r * 1.25, Ink::hex(0xf7f3e8));
        canvas.disc(x, y, r * 0.9, skin.accent);
    }
}
