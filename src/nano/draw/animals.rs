//! Dogs and cats, standing or sitting, facing right.

use super::canvas::{blob, ellipse, polygon, rounded};
use super::{Anchors, Canvas, Ink, Skin};
use crate::nano::identity::{Identity, Marking};

const DARK: Ink = Ink::hex(0x1c181c);
const FAR: Ink = Ink([20, 14, 24, 80]);

/// Dogs are seen from the side, with a long muzzle; builds are floppy, pointed and long hanging ears.
pub(super) fn dog(canvas: &mut Canvas, identity: &Identity, skin: &Skin, sitting: bool) -> Anchors {
    let [girth, height, head, ears] = identity.proportions;
    let (head_r, top) = (0.37 + 0.05 * head, -0.05 * height);
    let (hx, hy) = if sitting {
        (0.22, -0.52 + top)
    } else {
        (0.50, -0.44 + top)
    };
    let torso = if sitting {
        // The tail lies behind on the ground.
        canvas.cover_curve(&[(-0.45, 0.86), (-0.78, 0.80), (-0.92, 0.50)], 0.17, skin);
        let w = 0.08 * girth;
        let back = [
            (hx - 0.22, hy + 0.1),
            (-0.28 - w, 0.10),
            (-0.58 - w, 0.55),
            (-0.55 - w, 0.92),
            (-0.1, 1.0),
            (0.36, 0.92),
            (0.42 + w, 0.35),
            (hx + 0.25, hy + 0.2),
        ];
        canvas.cover(&blob(&back), skin);
        leg(canvas, identity, skin, 0.28, 0.25, 0.12, 1.0);
        canvas.fill(&ellipse(-0.25, 0.74, 0.34, 0.27), FAR.alpha(0.14));
        paw(canvas, identity, skin, -0.12, 0.92, 0.22);
        if identity.marking == Marking::Front {
            canvas.ellipse(hx + 0.12, 0.14, 0.19, 0.30, skin.accent);
        }
        (0.02, 0.32, 0.46 + w, 0.42)
    } else {
        let (belly, shorter) = (0.62 + 0.10 * height, 0.05 * girth);
        canvas.cover_curve(&[(-0.62, 0.12), (-0.84, -0.12), (-0.86, -0.46)], 0.17, skin);
        for x in [-0.36, 0.30] {
            leg(canvas, identity, skin, x, 0.3, 0.10, 1.0);
            canvas.fill(&rounded(x - 0.11, 0.3, x + 0.11, 1.0, 0.08), FAR);
        }
        let trunk = [
            (-0.70, 0.14),
            (-0.40, -0.04 - shorter),
            (0.12, -0.04 - shorter),
            (hx - 0.08, hy + 0.02),
            (hx + 0.22, hy + 0.3),
            (0.50, 0.36),
            (0.26, belly + 0.02),
            (-0.42, belly - 0.06 + shorter),
            (-0.70, 0.46),
        ];
        canvas.cover(&blob(&trunk), skin);
        for x in [-0.56, 0.12] {
            leg(canvas, identity, skin, x + 0.02, 0.3, 0.12, 1.0);
        }
        if identity.marking == Marking::Front {
            canvas.ellipse(0.36, 0.26, 0.19, 0.24, skin.accent);
        }
        (-0.12, 0.26, 0.56, 0.40 + shorter)
    };

    let muzzle = if identity.marking == Marking::Base {
        skin.accent
    } else {
        skin.body.lighter(0.22)
    };
    let ear = match identity.marking {
        Marking::Top => skin.accent,
        _ => skin.body.darker(0.32),
    };
    let size = 1.0 + 0.22 * ears;
    if identity.build == 1 {
        canvas.polygon(
            &[
                (hx - 0.02, hy - 0.22),
                (hx + 0.16, hy - 0.36 - 0.34 * size),
                (hx + 0.26, hy - 0.18),
            ],
            ear.darker(0.2),
        );
    }
    canvas.cover(&ellipse(hx, hy, head_r, head_r * 0.92), skin);
    canvas.fill(
        &rounded(
            hx + 0.08,
            hy - 0.06,
            hx + 0.30 + head_r * 0.5,
            hy + 0.26,
            0.16,
        ),
        muzzle,
    );
    canvas.ellipse(hx + 0.28 + head_r * 0.5, hy, 0.105, 0.09, DARK);
    canvas.line(
        &[(hx + 0.16, hy + 0.19), (hx + 0.34, hy + 0.17)],
        0.035,
        DARK.alpha(0.7),
    );
    match identity.build {
        0 => canvas.fill(
            &blob(&[
                (hx - 0.30, hy - 0.30),
                (hx - 0.06, hy - 0.34),
                (hx - 0.04, hy + 0.10 * size),
                (hx - 0.26, hy + 0.26 * size),
                (hx - 0.42, hy),
            ]),
            ear,
        ),
        1 => canvas.polygon(
            &[
                (hx - 0.34, hy - 0.14),
                (hx - 0.24, hy - 0.38 - 0.36 * size),
                (hx + 0.06, hy - 0.28),
            ],
            ear,
        ),
        _ => canvas.fill(
            &ellipse(hx - 0.28, hy + 0.16 * size, 0.16, 0.48 * size),
            ear,
        ),
    }
    let eye = (hx + 0.13, hy - 0.13);
    canvas.disc(eye.0, eye.1, 0.075, DARK);
    canvas.disc(eye.0 + 0.03, eye.1 - 0.03, 0.025, Ink::hex(0xffffff));
    Anchors {
        head: (hx, hy, head_r),
        eyes: [eye, eye],
        neck: (hx - 0.08, hy + head_r * 0.95, 0.30),
        torso,
    }
}

/// Cats show their face, with pointed ears and whiskers; builds are a thin, a bushy and a short tail.
pub(super) fn cat(canvas: &mut Canvas, identity: &Identity, skin: &Skin, sitting: bool) -> Anchors {
    let [girth, height, head, ears] = identity.proportions;
    let (head_r, w) = (0.40 + 0.04 * head, 0.07 * girth);
    let (hx, hy) = if sitting {
        (0.0, -0.36 - 0.06 * height)
    } else {
        (0.42, -0.26 - 0.06 * height)
    };
    let tail = [0.12, 0.24, 0.20][usize::from(identity.build % 3)];
    let tail_end = |canvas: &mut Canvas, x: f32, y: f32| {
        if identity.marking == Marking::Top {
            canvas.disc(x, y, tail * 0.62, skin.accent);
        }
    };
    let torso = if sitting {
        match identity.build {
            2 => canvas.cover_curve(&[(0.36, 0.84), (0.66, 0.76)], tail, skin),
            _ => canvas.cover_curve(
                &[(0.30, 0.90), (0.78, 0.86), (0.86, 0.42), (0.66, 0.08)],
                tail,
                skin,
            ),
        }
        tail_end(canvas, 0.66, if identity.build == 2 { 0.76 } else { 0.10 });
        let half = [
            (0.0, -0.2),
            (0.26, -0.05),
            (0.42 + w, 0.45),
            (0.50 + w, 0.85),
            (0.30, 1.0),
        ];
        canvas.cover(&super::canvas::turned(&half), skin);
        if identity.marking == Marking::Front {
            canvas.ellipse(0.0, 0.26, 0.20, 0.30, skin.accent);
        }
        for x in [-0.14, 0.14] {
            canvas.line(&[(x, 0.5), (x, 0.9)], 0.03, FAR.alpha(0.5));
            paw(canvas, identity, skin, x, 0.93, 0.15);
        }
        (0.0, 0.36, 0.42 + w, 0.40)
    } else {
        match identity.build {
            2 => canvas.cover_curve(&[(-0.66, 0.20), (-0.82, -0.02)], tail, skin),
            _ => canvas.cover_curve(
                &[(-0.62, 0.28), (-0.86, 0.02), (-0.72, -0.36), (-0.84, -0.72)],
                tail,
                skin,
            ),
        }
        if identity.build == 2 {
            tail_end(canvas, -0.82, -0.02);
        } else {
            tail_end(canvas, -0.84, -0.70);
        }
        for x in [-0.40, 0.24] {
            leg(canvas, identity, skin, x, 0.4, 0.09, 1.0);
            canvas.fill(&rounded(x - 0.10, 0.4, x + 0.10, 1.0, 0.08), FAR);
        }
        let trunk = [
            (-0.68, 0.28),
            (-0.40, 0.08 - w),
            (0.20, 0.06 - w),
            (0.56, 0.12),
            (0.54, 0.52),
            (0.24, 0.64 + w),
            (-0.44, 0.60 + w),
            (-0.68, 0.52),
        ];
        canvas.cover(&blob(&trunk), skin);
        for x in [-0.56, 0.42] {
            leg(canvas, identity, skin, x, 0.4, 0.10, 1.0);
        }
        if identity.marking == Marking::Front {
            canvas.ellipse(0.38, 0.34, 0.17, 0.22, skin.accent);
        }
        (-0.08, 0.34, 0.58, 0.32 + w)
    };

    let size = 1.0 + 0.25 * ears;
    for side in [-1.0, 1.0] {
        let ear = |shrink: f32| {
            let x = |t: f32| hx + side * t;
            let lift = 0.50 * size * (1.0 - shrink);
            polygon(&[
                (x(0.38 - 0.1 * shrink), hy - 0.05),
                (x(0.34), hy - 0.22 - lift),
                (x(0.04 + 0.14 * shrink), hy - 0.26),
            ])
        };
        let outer = ear(0.0);
        match identity.marking {
            Marking::Top => canvas.fill(&outer, skin.accent),
            _ => canvas.cover(&outer, skin),
        }
        canvas.fill(&ear(0.35), Ink::hex(0xe9a0a8).mix(skin.body, 0.25));
    }
    canvas.cover(&ellipse(hx, hy, head_r * 1.1, head_r * 0.88), skin);
    let light = if identity.marking == Marking::Base {
        skin.accent
    } else {
        skin.body.lighter(0.35)
    };
    canvas.ellipse(hx, hy + 0.17, 0.19, 0.13, light);
    let iris = Ink::hex([0xb8e04a, 0xf4d23c, 0x7fd4f0][usize::from(identity.build % 3)]);
    let eyes = [(hx - 0.18, hy - 0.05), (hx + 0.18, hy - 0.05)];
    for (x, y) in eyes {
        canvas.ellipse(x, y, 0.115, 0.105, DARK);
        canvas.ellipse(x, y, 0.09, 0.085, iris);
        canvas.ellipse(x, y, 0.035, 0.08, DARK);
    }
    canvas.polygon(
        &[
            (hx - 0.06, hy + 0.09),
            (hx + 0.06, hy + 0.09),
            (hx, hy + 0.16),
        ],
        Ink::hex(0xd86a78),
    );
    for side in [-1.0, 1.0] {
        for lift in [-0.03, 0.06] {
            canvas.line(
                &[
                    (hx + side * 0.20, hy + 0.15 + lift * 0.4),
                    (hx + side * 0.56, hy + 0.12 + lift * 2.0),
                ],
                0.028,
                Ink::hex(0xf4f4f4).alpha(0.85),
            );
        }
    }
    Anchors {
        head: (hx, hy, head_r),
        eyes,
        neck: (
            hx - if sitting { 0.0 } else { 0.04 },
            hy + head_r * 0.86,
            0.32,
        ),
        torso,
    }
}

/// A leg of half width `r` from `top` to `foot`, in a sock if the individual has them.
fn leg(canvas: &mut Canvas, identity: &Identity, skin: &Skin, x: f32, top: f32, r: f32, foot: f32) {
    canvas.cover(&rounded(x - r, top, x + r, foot, 0.08), skin);
    paw(canvas, identity, skin, x + 0.03, foot - 0.08, r + 0.03);
}

fn paw(canvas: &mut Canvas, identity: &Identity, skin: &Skin, x: f32, y: f32, r: f32) {
    match identity.marking {
        Marking::Base => {
            canvas.fill(
                &rounded(x - r, y - 0.14, x + r, y + 0.08, 0.07),
                skin.accent,
            );
        }
        _ => canvas.cover(&ellipse(x, y, r, 0.085), skin),
    }
}
