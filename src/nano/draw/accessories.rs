//! What dogs and cats wear in the prompts for live subjects.

use super::canvas::{blob, curve, ellipse, polygon, rounded};
use super::{Anchors, Canvas, Ink};
use crate::nano::world::Accessory;

const DARK: Ink = Ink::hex(0x17151c);
const WHITE: Ink = Ink::hex(0xfbfbf8);
const GOLD: Ink = Ink::hex(0xf6cf3f);

/// Dresses the subject whose anchors are given, in subject coordinates.
pub(in crate::nano) fn wear(canvas: &mut Canvas, accessory: Accessory, at: &Anchors) {
    let (x, y, r) = at.head;
    // Everything on the head sits on its upper edge, over the ears.
    let top = y - r * 0.80;
    match accessory {
        Accessory::RedHat => {
            let red = Ink::hex(0xd81e24);
            canvas.fill(
                &blob(&[
                    (x - 0.36, top),
                    (x - 0.32, top - 0.34),
                    (x, top - 0.46),
                    (x + 0.32, top - 0.34),
                    (x + 0.36, top),
                ]),
                red,
            );
            canvas.fill(
                &rounded(x - 0.36, top - 0.16, x + 0.36, top - 0.02, 0.02),
                red.darker(0.35),
            );
            canvas.fill(
                &rounded(x - 0.58, top - 0.05, x + 0.58, top + 0.10, 0.07),
                red,
            );
        }
        Accessory::SantaHat => {
            canvas.fill(
                &blob(&[
                    (x - 0.38, top),
                    (x - 0.26, top - 0.36),
                    (x + 0.06, top - 0.52),
                    (x + 0.50, top - 0.30),
                    (x + 0.30, top - 0.24),
                    (x + 0.38, top),
                ]),
                Ink::hex(0xd81e24),
            );
            canvas.fill(
                &rounded(x - 0.46, top - 0.10, x + 0.46, top + 0.12, 0.1),
                WHITE,
            );
            canvas.disc(x + 0.54, top - 0.22, 0.16, WHITE);
        }
        Accessory::RainbowScarf => {
            let (nx, ny, w) = at.neck;
            let colours = [0xe03030, 0xf39a26, 0xf4e040, 0x3fae49, 0x3358d0, 0x8a3cc0];
            for (i, colour) in colours.into_iter().enumerate() {
                let dy = ny - 0.14 + 0.065 * i as f32;
                canvas.curve(
                    &[(nx - w, dy - 0.05), (nx, dy + 0.05), (nx + w, dy - 0.05)],
                    0.085,
                    Ink::hex(colour),
                );
                let hang = nx - w + 0.06 + 0.065 * i as f32;
                canvas.line(
                    &[(hang, ny + 0.16), (hang - 0.04, ny + 0.56)],
                    0.075,
                    Ink::hex(colour),
                );
            }
        }
        Accessory::TopHatAndMonocle => {
            canvas.fill(&rounded(x - 0.32, top - 0.66, x + 0.32, top, 0.04), DARK);
            canvas.rect(
                x - 0.32,
                top - 0.18,
                x + 0.32,
                top - 0.06,
                Ink::hex(0x8d8d98),
            );
            canvas.fill(
                &rounded(x - 0.54, top - 0.05, x + 0.54, top + 0.09, 0.06),
                DARK,
            );
            let (ex, ey) = at.eyes[1];
            canvas.disc(ex, ey, 0.15, Ink::hex(0xdff4ff).alpha(0.45));
            canvas.outline(&ellipse(ex, ey, 0.16, 0.16), 0.065, GOLD);
            canvas.line(
                &[(ex + 0.12, ey + 0.12), (ex + 0.10, ey + 0.55)],
                0.045,
                GOLD,
            );
        }
        Accessory::ChefOutfit => {
            coat(canvas, at, WHITE);
            for (dx, dy) in [(-0.1, -0.1), (0.1, -0.1), (-0.1, 0.12), (0.1, 0.12)] {
                canvas.disc(at.torso.0 + dx, at.torso.1 + dy, 0.055, Ink::hex(0x30303a));
            }
            for (dx, lift) in [(-0.26, 0.36), (0.26, 0.36), (0.0, 0.46)] {
                canvas.disc(x + dx, top - lift, 0.25, WHITE);
            }
            canvas.fill(
                &rounded(x - 0.32, top - 0.36, x + 0.32, top + 0.08, 0.04),
                WHITE,
            );
            canvas.line(
                &[(x - 0.32, top - 0.08), (x + 0.32, top - 0.08)],
                0.05,
                Ink::hex(0xb4b8c0),
            );
        }
        Accessory::FirefighterOutfit => {
            coat(canvas, at, Ink::hex(0x9a6a1c));
            band(canvas, at, -0.05, Ink::hex(0xf2f04a));
            band(canvas, at, 0.45, Ink::hex(0xf2f04a));
            let red = Ink::hex(0xe02a1c);
            canvas.fill(
                &blob(&[
                    (x - 0.38, top + 0.02),
                    (x - 0.30, top - 0.34),
                    (x, top - 0.48),
                    (x + 0.30, top - 0.34),
                    (x + 0.38, top + 0.02),
                ]),
                red,
            );
            canvas.fill(
                &polygon(&[
                    (x - 0.62, top + 0.20),
                    (x - 0.40, top - 0.06),
                    (x + 0.44, top - 0.06),
                    (x + 0.56, top + 0.08),
                ]),
                red.darker(0.2),
            );
            canvas.fill(
                &polygon(&[
                    (x + 0.02, top - 0.08),
                    (x + 0.06, top - 0.38),
                    (x + 0.30, top - 0.30),
                    (x + 0.30, top - 0.08),
                ]),
                GOLD,
            );
        }
        Accessory::PoliceOutfit => {
            let navy = Ink::hex(0x1b2a6b);
            coat(canvas, at, navy);
            canvas.disc(
                at.torso.0 + at.torso.2 * 0.35,
                at.torso.1 - at.torso.3 * 0.1,
                0.12,
                GOLD,
            );
            band(canvas, at, 0.6, DARK);
            canvas.fill(
                &blob(&[
                    (x - 0.52, top - 0.28),
                    (x, top - 0.46),
                    (x + 0.52, top - 0.28),
                    (x + 0.36, top - 0.08),
                    (x - 0.36, top - 0.08),
                ]),
                navy,
            );
            canvas.fill(&rounded(x - 0.36, top - 0.16, x + 0.36, top, 0.04), DARK);
            canvas.fill(
                &rounded(x - 0.20, top - 0.04, x + 0.52, top + 0.08, 0.06),
                DARK,
            );
            canvas.disc(x + 0.08, top - 0.24, 0.10, GOLD);
        }
        Accessory::PinkGlasses => {
            let pink = Ink::hex(0xff3d9e);
            let [(ax, ay), (bx, by)] = at.eyes;
            // In profile one lens is on the near eye, the other before it on the muzzle's root.
            let (ax, bx) = if ax == bx {
                (ax - 0.12, bx + 0.24)
            } else {
                (ax, bx)
            };
            canvas.line(&[(ax, ay - 0.03), (bx, by - 0.03)], 0.09, pink);
            canvas.line(&[(ax, ay - 0.03), (x - r, ay - 0.08)], 0.08, pink);
            for (ex, ey) in [(ax, ay), (bx, by)] {
                canvas.disc(ex, ey, 0.17, Ink::hex(0xffd3ea));
                canvas.outline(&ellipse(ex, ey, 0.17, 0.16), 0.09, pink);
            }
        }
        Accessory::YellowShirt => {
            let yellow = Ink::hex(0xffdf1f);
            coat(canvas, at, yellow);
            let (nx, ny, w) = at.neck;
            canvas.curve(
                &[
                    (nx - w * 0.7, ny - 0.02),
                    (nx, ny + 0.10),
                    (nx + w * 0.7, ny - 0.02),
                ],
                0.08,
                yellow.darker(0.25),
            );
        }
        Accessory::WizardOutfit => {
            let purple = Ink::hex(0x6a22b4);
            coat(canvas, at, purple);
            canvas.fill(
                &polygon(&[
                    (x - 0.36, top + 0.02),
                    (x - 0.04, top - 0.46),
                    (x + 0.16, top - 0.62),
                    (x + 0.12, top - 0.40),
                    (x + 0.36, top + 0.02),
                ]),
                purple,
            );
            canvas.fill(
                &rounded(x - 0.62, top - 0.04, x + 0.62, top + 0.11, 0.07),
                purple.darker(0.25),
            );
            let (tx, ty, rx, ry) = at.torso;
            for (sx, sy) in [
                (x, top - 0.20),
                (tx - rx * 0.45, ty - 0.06),
                (tx + rx * 0.3, ty + ry * 0.35),
                (tx + rx * 0.1, ty - ry * 0.4),
            ] {
                canvas.disc(sx, sy, 0.075, GOLD);
            }
        }
    }
}

/// Cloth over the torso, from the neck down.
fn coat(canvas: &mut Canvas, at: &Anchors, ink: Ink) {
    let (x, y, rx, ry) = at.torso;
    let (nx, ny, w) = at.neck;
    let cloth = [
        (nx - w * 0.8, ny - 0.02),
        (nx + w * 0.9, ny),
        (x + rx * 1.02, y + ry * 0.1),
        (x + rx * 0.95, y + ry),
        (x, y + ry * 1.15),
        (x - rx * 0.98, y + ry),
        (x - rx * 1.04, y - ry * 0.2),
    ];
    canvas.fill(&blob(&cloth), ink);
    canvas.outline(
        &curve(&[
            (x - rx * 0.95, y + ry),
            (x, y + ry * 1.15),
            (x + rx * 0.95, y + ry),
        ]),
        0.05,
        ink.darker(0.3),
    );
}

/// A stripe around the torso at `t` of its lower half.
fn band(canvas: &mut Canvas, at: &Anchors, t: f32, ink: Ink) {
    let (x, y, rx, ry) = at.torso;
    let y = y + t * ry;
    canvas.curve(
        &[(x - rx * 0.95, y), (x, y + 0.08), (x + rx * 0.95, y)],
        0.10,
        ink,
    );
}
