//! The surface of a subject: body colour with the pattern on it, fixed to the subject's own coordinates so that
//! it moves with the subject.

use tiny_skia::{
    FilterQuality, Pattern as Texture, Pixmap, PremultipliedColorU8, Shader, SpreadMode, Transform,
};

use super::Ink;
use crate::nano::identity::{Identity, Pattern};

/// The texture covers subject coordinates from `-REACH` to `REACH`.
const REACH: f32 = 1.25;

/// The inks of one individual, and its patterned body colour as a texture.
pub(in crate::nano) struct Skin {
    pub body: Ink,
    pub accent: Ink,
    texture: Option<Pixmap>,
    pixels_per_unit: f32,
}

impl Skin {
    /// The skin of `identity` at a resolution that suits a canvas with this many pixels per unit.
    pub fn new(identity: &Identity, pixels_per_unit: f32) -> Skin {
        let (body, accent) = (identity.body_ink(), identity.accent_ink());
        let resolution = pixels_per_unit.min(256.0);
        let side = (2.0 * REACH * resolution).ceil().max(1.0) as u32;
        let texture = match identity.pattern {
            Pattern::Plain => None,
            _ => Pixmap::new(side, side),
        }
        .map(|mut texture| {
            let (plain, drawn) = (opaque(body), opaque(accent));
            for (row, pixels) in texture.pixels_mut().chunks_mut(side as usize).enumerate() {
                let y = row as f32 / resolution - REACH;
                for (column, pixel) in pixels.iter_mut().enumerate() {
                    let x = column as f32 / resolution - REACH;
                    *pixel = if accented(identity, x, y) {
                        drawn
                    } else {
                        plain
                    };
                }
            }
            texture
        });
        Skin {
            body,
            accent,
            texture,
            pixels_per_unit: resolution,
        }
    }

    pub(super) fn shader(&self) -> Shader<'_> {
        match &self.texture {
            None => {
                let [r, g, b, a] = self.body.0;
                Shader::SolidColor(tiny_skia::Color::from_rgba8(r, g, b, a))
            }
            Some(texture) => {
                let scale = 1.0 / self.pixels_per_unit;
                let transform = Transform::from_row(scale, 0.0, 0.0, scale, -REACH, -REACH);
                Texture::new(
                    texture.as_ref(),
                    SpreadMode::Pad,
                    FilterQuality::Nearest,
                    1.0,
                    transform,
                )
            }
        }
    }
}

/// Whether the pattern paints the point (`x`, `y`) in the accent colour.
fn accented(identity: &Identity, x: f32, y: f32) -> bool {
    let [start, width] = identity.phase;
    match identity.pattern {
        Pattern::Plain => false,
        Pattern::Striped => {
            let period = 0.42 + 0.16 * width;
            // Stripes of animals run around them, those of things slant a little.
            let slant = if identity.class.is_live() { 0.15 } else { 0.5 };
            ((x + slant * y) / period + start).rem_euclid(1.0) < 0.42
        }
        Pattern::Dotted => {
            let period = 0.40 + 0.12 * width;
            let row = (y / period + start).floor();
            let u = (x / period + start + 0.5 * row).rem_euclid(1.0) - 0.5;
            let v = (y / period + start).rem_euclid(1.0) - 0.5;
            u * u + v * v < 0.095
        }
        Pattern::Patchy => {
            // A few large blotches whose edges wander.
            let wander = (x * 3.1 + start * 9.0).sin() + (y * 3.7 + start * 5.0 + x * 1.3).sin();
            wander > 0.55 - 0.4 * width
        }
        Pattern::Checkered => {
            let period = 0.34 + 0.1 * width;
            let (u, v) = ((x / period + start).floor(), (y / period).floor());
            (u + v).rem_euclid(2.0) < 1.0
        }
        Pattern::Banded => {
            let centre = 0.05 + 0.5 * start;
            (y - centre).abs() < 0.13 + 0.08 * width
        }
    }
}

fn opaque(ink: Ink) -> PremultipliedColorU8 {
    let [r, g, b, _] = ink.0;
    tiny_skia::ColorU8::from_rgba(r, g, b, 255).premultiply()
}
