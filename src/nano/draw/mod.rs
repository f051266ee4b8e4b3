//! How things look. Everything is drawn on a [`Canvas`] in coordinates of its own: a setting in a square of
//! 128 units, a subject in a box from -1 to 1 that stands on its lower edge.

pub(super) mod accessories;
pub(super) mod animals;
mod canvas;
pub(super) mod effects;
mod figures;
pub(super) mod settings;
pub(super) mod skin;
mod things;
mod vessels;

pub(super) use canvas::{Canvas, Ink};
pub(super) use skin::Skin;

use super::identity::{Class, Identity};

/// Points of a live subject where accessories go, in subject coordinates.
#[derive(Clone, Copy, Debug)]
pub(super) struct Anchors {
    /// Centre and radius of the head.
    pub head: (f32, f32, f32),
    /// The eyes; in profile both are the same.
    pub eyes: [(f32, f32); 2],
    /// Centre and half width of the neck.
    pub neck: (f32, f32, f32),
    /// Centre and radii of the part of the body that a shirt covers.
    pub torso: (f32, f32, f32, f32),
}

/// Draws a subject in its box; live subjects say where accessories go.
pub(super) fn subject(
    canvas: &mut Canvas,
    identity: &Identity,
    sitting: bool,
    hour: f32,
) -> Option<Anchors> {
    let skin = Skin::new(identity, canvas.pixels_per_unit());
    match identity.class {
        Class::Dog => return Some(animals::dog(canvas, identity, &skin, sitting)),
        Class::Cat => return Some(animals::cat(canvas, identity, &skin, sitting)),
        Class::Backpack => things::backpack(canvas, identity, &skin),
        Class::StuffedAnimal => figures::stuffed_animal(canvas, identity, &skin),
        Class::Bowl => vessels::bowl(canvas, identity, &skin),
        Class::Can => vessels::can(canvas, identity, &skin),
        Class::Candle => vessels::candle(canvas, identity, &skin),
        Class::Clock => things::clock(canvas, identity, &skin, hour),
        Class::Sneaker => things::sneaker(canvas, identity, &skin),
        Class::Toy => figures::toy(canvas, identity, &skin),
        Class::Boot => things::boot(canvas, identity, &skin),
        Class::Glasses => things::glasses(canvas, identity, &skin),
        Class::Teapot => vessels::teapot(canvas, identity, &skin),
        Class::Vase => vessels::vase(canvas, identity, &skin),
    }
    None
}
