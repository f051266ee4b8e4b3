//! What is done to the finished drawing of a subject, and how it is put into its setting.

use tiny_skia::{Pixmap, PremultipliedColorU8};

use super::canvas::{blob, polygon};
use super::{Canvas, Ink};

/// One gloss across the subject, in subject coordinates; the canvas draws only inside the subject.
pub(in crate::nano) fn shine(canvas: &mut Canvas) {
    let white = Ink::hex(0xffffff);
    canvas.rect(-2.0, -2.0, 2.0, 2.0, white.alpha(0.16));
    canvas.polygon(
        &[(-0.50, 1.1), (-0.22, 1.1), (0.44, -1.3), (0.16, -1.3)],
        white.alpha(0.85),
    );
}

/// Four-pointed stars around the subject, over everything.
pub(in crate::nano) fn sparkles(canvas: &mut Canvas) {
    for (x, y, r) in [
        (0.80, -0.72, 0.36),
        (-0.80, -0.46, 0.30),
        (0.62, 0.40, 0.28),
        (-0.46, 0.56, 0.22),
    ] {
        let t = r * 0.22;
        let star = [
            (x, y - r),
            (x + t, y - t),
            (x + r, y),
            (x + t, y + t),
            (x, y + r),
            (x - t, y + t),
            (x - r, y),
            (x - t, y - t),
        ];
        canvas.fill(&polygon(&star), Ink::hex(0xfff7a8));
    }
}

/// Washes everything with one colour; the canvas draws only inside the subject.
pub(in crate::nano) fn wash(canvas: &mut Canvas, ink: Ink) {
    canvas.rect(-2.0, -2.0, 2.0, 2.0, ink.alpha(0.38));
}

/// Soaked: darker and bluish; the canvas draws only inside the subject.
pub(in crate::nano) fn soak(canvas: &mut Canvas) {
    canvas.rect(-2.0, -2.0, 2.0, 2.0, Ink::hex(0x123a70).alpha(0.30));
}

/// Drops that run down and fall off, over everything.
pub(in crate::nano) fn drops(canvas: &mut Canvas) {
    let places = [
        (-0.62, -0.40),
        (-0.24, 0.02),
        (0.16, -0.46),
        (0.52, -0.02),
        (-0.50, 0.46),
        (0.24, 0.44),
        (0.86, -0.44),
        (-0.94, 0.22),
        (0.90, 0.42),
        (-0.10, -0.86),
    ];
    for (x, y) in places {
        let drop = [
            (x, y - 0.20),
            (x + 0.095, y + 0.03),
            (x, y + 0.12),
            (x - 0.095, y + 0.03),
        ];
        canvas.fill(&blob(&drop), Ink::hex(0x7fd0ff));
        canvas.disc(x - 0.02, y + 0.01, 0.04, Ink::hex(0xf2fbff));
    }
}

/// The puddle under something wet, in subject coordinates.
pub(in crate::nano) fn puddle(canvas: &mut Canvas) {
    canvas.ellipse(0.0, 1.0, 1.12, 0.17, Ink::hex(0x3f97d8).alpha(0.85));
    canvas.ellipse(-0.1, 0.98, 0.86, 0.09, Ink::hex(0xa9dcf8).alpha(0.8));
}

/// A cube whose front face is the square from -0.96 to 0.68 (x) and -0.60 to 1 (y).
pub(in crate::nano) fn cube(canvas: &mut Canvas, body: Ink) {
    // Light subjects lie on a darker cube and the other way about.
    let [r, g, b, _] = body.0.map(u32::from);
    let face = if r + g + b > 520 {
        body.darker(0.28)
    } else {
        body.lighter(0.4)
    };
    canvas.polygon(
        &[(-0.96, -0.60), (-0.64, -0.92), (0.98, -0.92), (0.68, -0.60)],
        face.lighter(0.5),
    );
    canvas.polygon(
        &[(0.68, -0.60), (0.98, -0.92), (0.98, 0.64), (0.68, 1.0)],
        face.darker(0.5),
    );
    canvas.rect(-0.96, -0.60, 0.68, 1.0, face);
    canvas.line(
        &[(-0.94, -0.60), (0.68, -0.60), (0.68, 0.98)],
        0.06,
        face.lighter(0.7),
    );
}

/// Lays `layer` over `canvas`, with a dark edge of about `width` pixels where the layer ends.
pub(in crate::nano) fn compose(canvas: &mut Pixmap, layer: &Pixmap, width: usize) {
    let side = canvas.width() as usize;
    let alpha: Vec<u8> = layer.pixels().iter().map(|pixel| pixel.alpha()).collect();
    // A separable maximum: first along rows, then along columns.
    let mut across = alpha.clone();
    for (wide, row) in across.chunks_mut(side).zip(alpha.chunks(side)) {
        for shift in 1..=width.min(side - 1) {
            for (a, b) in wide[shift..].iter_mut().zip(row) {
                *a = (*a).max(*b);
            }
            for (a, b) in wide.iter_mut().zip(&row[shift..]) {
                *a = (*a).max(*b);
            }
        }
    }
    let mut grown = across.clone();
    for shift in 1..=width.min(side - 1) {
        for (a, b) in grown[shift * side..].iter_mut().zip(&across) {
            *a = (*a).max(*b);
        }
        for (a, b) in grown.iter_mut().zip(&across[shift * side..]) {
            *a = (*a).max(*b);
        }
    }
    for ((below, above), edge) in canvas
        .pixels_mut()
        .iter_mut()
        .zip(layer.pixels())
        .zip(grown)
    {
        if edge == 0 {
            continue;
        }
        // The edge keeps a third of the ground's light, so that it reads as a contour on any ground.
        let rest = 255 - u32::from(above.alpha());
        let shade = 255 - u32::from(edge) * 2 / 3;
        let channel = |above: u8, below: u8| {
            (u32::from(above) + u32::from(below) * shade * rest / (255 * 255)).min(255) as u8
        };
        let (r, g, b) = (
            channel(above.red(), below.red()),
            channel(above.green(), below.green()),
            channel(above.blue(), below.blue()),
        );
        *below = PremultipliedColorU8::from_rgba(r, g, b, 255).unwrap_or(*below);
    }
}

/// Mixes the mirror image of `layer` at the line `ground` (pixels) into `canvas`, at `strength` of 255.
pub(in crate::nano) fn reflect(canvas: &mut Pixmap, layer: &Pixmap, ground: usize, strength: u32) {
    let side = canvas.width() as usize;
    let pixels = canvas.pixels_mut();
    for row in ground..side {
        let Some(source) = (2 * ground).checked_sub(row) else {
            break;
        };
        let mirrored = &layer.pixels()[source * side..(source + 1) * side];
        for (below, above) in pixels[row * side..(row + 1) * side]
            .iter_mut()
            .zip(mirrored)
        {
            let weight = u32::from(above.alpha()) * strength / 255;
            let channel = |above: u8, below: u8| {
                ((u32::from(above) * strength + u32::from(below) * (255 - weight)) / 255).min(255)
                    as u8
            };
            let (r, g, b) = (
                channel(above.red(), below.red()),
                channel(above.green(), below.green()),
                channel(above.blue(), below.blue()),
            );
            *below = PremultipliedColorU8::from_rgba(r, g, b, 255).unwrap_or(*below);
        }
    }
}
