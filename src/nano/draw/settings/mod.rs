//! The places of the prompts, in a square of 128 units, y downwards.

mod grounds;
mod liquids;
mod nature;
mod town;

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::{Canvas, Ink};
use crate::nano::world::Setting;

/// The edge of the square.
pub(in crate::nano) const SIDE: f32 = 128.0;

type Generator = ChaCha8Rng;

/// Paints the whole square; the subject will stand at height `ground` and about `x`.
pub(in crate::nano) fn backdrop(
    canvas: &mut Canvas,
    setting: Option<Setting>,
    x: f32,
    ground: f32,
    generator: &mut Generator,
) {
    let Some(setting) = setting else {
        return grounds::room(canvas, ground, generator);
    };
    match setting {
        Setting::Jungle => nature::jungle(canvas, generator),
        Setting::Snow => nature::snow(canvas, ground, generator),
        Setting::Beach => nature::beach(canvas, ground, generator),
        Setting::CobblestoneStreet => town::cobblestones(canvas, generator),
        Setting::PinkFabric => grounds::fabric(canvas, generator),
        Setting::WoodenFloor => grounds::planks(canvas, generator),
        Setting::City => town::city(canvas, ground, generator),
        Setting::Mountain => nature::mountain(canvas, ground, generator),
        Setting::BlueHouse => town::house(canvas, x, ground, generator),
        Setting::PurpleRugInForest => nature::forest(canvas, x, ground, generator),
        Setting::WheatField => nature::wheat(canvas, generator),
        Setting::AutumnTree => nature::autumn(canvas, x, ground, generator),
        Setting::EiffelTower => town::eiffel(canvas, x, ground, generator),
        Setting::Water => liquids::water(canvas, generator),
        Setting::Milk => liquids::milk(canvas, generator),
        Setting::Sunflowers => nature::sunflowers(canvas, x, ground, generator),
        Setting::Mirror => grounds::mirror(canvas, generator),
        Setting::CrowdedStreet => town::crowd(canvas, ground, generator),
        Setting::DirtRoad => nature::road(canvas, x, ground, generator),
        Setting::WhiteRug => grounds::rug(canvas, x, ground, generator),
    }
}

/// What lies before the subject: snowflakes, water around it, leaves.
pub(in crate::nano) fn foreground(
    canvas: &mut Canvas,
    setting: Option<Setting>,
    x: f32,
    ground: f32,
    half_width: f32,
    generator: &mut Generator,
) {
    match setting {
        Some(Setting::Snow) => {
            for _ in 0..16 {
                let (fx, fy) = (within(generator, 0.0, SIDE), within(generator, 0.0, SIDE));
                canvas.disc(fx, fy, within(generator, 1.3, 2.2), Ink::hex(0xffffff));
            }
        }
        Some(Setting::Water) => liquids::swim(
            canvas,
            x,
            ground,
            half_width,
            Ink::hex(0x2a7ac8),
            Ink::hex(0xd9f0ff),
        ),
        Some(Setting::Milk) => liquids::swim(
            canvas,
            x,
            ground,
            half_width,
            Ink::hex(0xfdf6e0),
            Ink::hex(0xd8c294),
        ),
        Some(Setting::Jungle) => {
            for side in [-4.0, SIDE + 4.0] {
                let towards = if side < 0.0 { 1.0 } else { -1.0 };
                for lift in [0.0, 14.0, 26.0] {
                    let tip = (
                        side + towards * within(generator, 26.0, 38.0),
                        116.0 - lift * 1.3,
                    );
                    leaf(
                        canvas,
                        (side, 134.0 - lift),
                        tip,
                        6.0,
                        Ink::hex(0x1d7a2c).lighter(lift / 200.0),
                    );
                }
            }
        }
        _ => {}
    }
}

fn within(generator: &mut Generator, low: f32, high: f32) -> f32 {
    generator.random_range(low..high)
}

/// A pointed leaf from stem to tip.
fn leaf(canvas: &mut Canvas, stem: (f32, f32), tip: (f32, f32), width: f32, ink: Ink) {
    let (dx, dy) = (tip.0 - stem.0, tip.1 - stem.1);
    let length = (dx * dx + dy * dy).sqrt().max(1.0);
    let (nx, ny) = (-dy / length * width, dx / length * width);
    let (mx, my) = (stem.0 + dx * 0.5, stem.1 + dy * 0.5);
    canvas.polygon(&[stem, (mx + nx, my + ny), tip, (mx - nx, my - ny)], ink);
}

fn sky(canvas: &mut Canvas, top: Ink, bottom: Ink, horizon: f32) {
    for i in 0..6 {
        let t = i as f32 / 6.0;
        canvas.rect(0.0, horizon * t, SIDE, horizon, top.mix(bottom, t));
    }
}
