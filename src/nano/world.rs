//! Scenes: an individual somewhere, seen from some side in some light; and their pictures.

use image::{Rgb, RgbImage};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use tiny_skia::{Pixmap, Transform};

use super::draw::{Canvas, Ink, accessories, effects, settings, subject};
use super::identity::{Class, Colour, Identity, pick};

pub use super::identity::Split;

/// A place of the DreamBooth prompts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Setting {
    Jungle,
    Snow,
    Beach,
    CobblestoneStreet,
    PinkFabric,
    WoodenFloor,
    City,
    Mountain,
    BlueHouse,
    PurpleRugInForest,
    WheatField,
    AutumnTree,
    EiffelTower,
    Water,
    Milk,
    Sunflowers,
    Mirror,
    CrowdedStreet,
    DirtRoad,
    WhiteRug,
}

impl Setting {
    /// Every setting, in the order of the prompts.
    pub const ALL: [Setting; 20] = [
        Setting::Jungle,
        Setting::Snow,
        Setting::Beach,
        Setting::CobblestoneStreet,
        Setting::PinkFabric,
        Setting::WoodenFloor,
        Setting::City,
        Setting::Mountain,
        Setting::BlueHouse,
        Setting::PurpleRugInForest,
        Setting::WheatField,
        Setting::AutumnTree,
        Setting::EiffelTower,
        Setting::Water,
        Setting::Milk,
        Setting::Sunflowers,
        Setting::Mirror,
        Setting::CrowdedStreet,
        Setting::DirtRoad,
        Setting::WhiteRug,
    ];

    /// What follows the class in a prompt, for example `"in the jungle"`.
    pub fn phrase(self) -> &'static str {
        match self {
            Setting::Jungle => "in the jungle",
            Setting::Snow => "in the snow",
            Setting::Beach => "on the beach",
            Setting::CobblestoneStreet => "on a cobblestone street",
            Setting::PinkFabric => "on top of pink fabric",
            Setting::WoodenFloor => "on top of a wooden floor",
            Setting::City => "with a city in the background",
            Setting::Mountain => "with a mountain in the background",
            Setting::BlueHouse => "with a blue house in the background",
            Setting::PurpleRugInForest => "on top of a purple rug in a forest",
            Setting::WheatField => "with a wheat field in the background",
            Setting::AutumnTree => "with a tree and autumn leaves in the background",
            Setting::EiffelTower => "with the Eiffel Tower in the background",
            Setting::Water => "floating on top of water",
            Setting::Milk => "floating in an ocean of milk",
            Setting::Sunflowers => "on top of green grass with sunflowers around it",
            Setting::Mirror => "on top of a mirror",
            Setting::CrowdedStreet => "on top of the sidewalk in a crowded street",
            Setting::DirtRoad => "on top of a dirt road",
            Setting::WhiteRug => "on top of a white rug",
        }
    }
}

/// Something that live subjects wear in the DreamBooth prompts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accessory {
    RedHat,
    SantaHat,
    RainbowScarf,
    TopHatAndMonocle,
    ChefOutfit,
    FirefighterOutfit,
    PoliceOutfit,
    PinkGlasses,
    YellowShirt,
    WizardOutfit,
}

impl Accessory {
    /// Every accessory, in the order of the prompts.
    pub const ALL: [Accessory; 10] = [
        Accessory::RedHat,
        Accessory::SantaHat,
        Accessory::RainbowScarf,
        Accessory::TopHatAndMonocle,
        Accessory::ChefOutfit,
        Accessory::FirefighterOutfit,
        Accessory::PoliceOutfit,
        Accessory::PinkGlasses,
        Accessory::YellowShirt,
        Accessory::WizardOutfit,
    ];

    /// What follows the class in a prompt, for example `"wearing a red hat"`.
    pub fn phrase(self) -> &'static str {
        match self {
            Accessory::RedHat => "wearing a red hat",
            Accessory::SantaHat => "wearing a santa hat",
            Accessory::RainbowScarf => "wearing a rainbow scarf",
            Accessory::TopHatAndMonocle => "wearing a black top hat and a monocle",
            Accessory::ChefOutfit => "in a chef outfit",
            Accessory::FirefighterOutfit => "in a firefighter outfit",
            Accessory::PoliceOutfit => "in a police outfit",
            Accessory::PinkGlasses => "wearing pink glasses",
            Accessory::YellowShirt => "wearing a yellow shirt",
            Accessory::WizardOutfit => "in a purple wizard outfit",
        }
    }
}

/// A change of the subject itself in the DreamBooth prompts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recolour {
    Red,
    Purple,
    Shiny,
    Wet,
    CubeShaped,
}

impl Recolour {
    /// Every change, in the order of the prompts.
    pub const ALL: [Recolour; 5] = [
        Recolour::Red,
        Recolour::Purple,
        Recolour::Shiny,
        Recolour::Wet,
        Recolour::CubeShaped,
    ];

    /// What stands before the class in a prompt, for example `"cube shaped"`.
    pub fn word(self) -> &'static str {
        match self {
            Recolour::Red => "red",
            Recolour::Purple => "purple",
            Recolour::Shiny => "shiny",
            Recolour::Wet => "wet",
            Recolour::CubeShaped => "cube shaped",
        }
    }
}

/// How the subject stands in the picture, and in what light.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct View {
    /// Live subjects sit or stand.
    pub sitting: bool,
    /// Whether the subject faces left.
    pub flipped: bool,
    /// Lean in degrees.
    pub tilt: f32,
    /// Height of the subject's box as a share of the picture's.
    pub height: f32,
    /// Where the subject stands: share of the width, from the left.
    pub x: f32,
    /// The line it stands on: share of the height, from the top.
    pub ground: f32,
    /// Factor on all light; 1 is as drawn.
    pub light: f32,
    /// Shift of light from blue to red; 0 is as drawn.
    pub warmth: f32,
    /// What a clock shows, 0 to 12.
    pub hour: f32,
}

/// Everything that determines a picture.
#[derive(Clone, Debug, PartialEq)]
pub struct Scene {
    pub identity: Identity,
    /// `None` is a plain room, for captions such as "a dog".
    pub setting: Option<Setting>,
    pub accessory: Option<Accessory>,
    pub recolour: Option<Recolour>,
    pub view: View,
    /// Determines the details of the place: every place exists in [`VERSIONS`] versions.
    pub seed: u64,
}

impl Scene {
    /// A scene with an individual from `split`. In `Train` no scene shows a reserved combination of colours and
    /// pattern, not even through recolouring.
    pub fn sample(generator: &mut impl Rng, split: Split) -> Scene {
        loop {
            let class = pick(&Class::ALL, generator);
            let identity = Identity::sample(class, split, generator);
            let (setting, accessory, recolour) = situation(class, generator);
            let scene = Scene::of(identity, setting, accessory, recolour, generator);
            if split == Split::HeldOut || !scene.shown().is_reserved() {
                return scene;
            }
        }
    }

    /// A scene of a given individual in a given situation; view and details are drawn from `generator`.
    pub fn of(
        identity: Identity,
        setting: Option<Setting>,
        accessory: Option<Accessory>,
        recolour: Option<Recolour>,
        generator: &mut impl Rng,
    ) -> Scene {
        let dressed = accessory.is_some();
        let mut height = generator.random_range(0.60f32..0.78);
        if dressed {
            // Hats need room above.
            height *= 0.82;
        }
        height *= match identity.class {
            // These fill their box in width but not in height.
            Class::Bowl | Class::Glasses | Class::Sneaker => 1.08,
            _ => 1.0,
        };
        let slack = (0.48 - height / 2.0).max(0.04);
        let ground = generator.random_range(0.84f32..0.92);
        let tilt = if identity.class.is_live() { 4.0 } else { 9.0 };
        let view = View {
            sitting: generator.random_bool(0.5),
            flipped: generator.random_bool(0.5),
            tilt: generator.random_range(-tilt..tilt),
            height,
            x: 0.5 + generator.random_range(-slack..slack),
            ground: if dressed { ground.max(0.88) } else { ground },
            light: generator.random_range(0.86f32..1.08),
            warmth: generator.random_range(-0.05f32..0.05),
            hour: generator.random_range(0.0f32..12.0),
        };
        Scene {
            identity,
            setting,
            accessory,
            recolour,
            view,
            seed: generator.random(),
        }
    }

    /// The individual as the picture shows it: recoloured scenes change the body.
    pub fn shown(&self) -> Identity {
        let body = match self.recolour {
            Some(Recolour::Red) => Colour::Red,
            Some(Recolour::Purple) => Colour::Purple,
            _ => return self.identity,
        };
        let mut shown = self.identity;
        if shown.accent == body {
            shown.accent = shown.body;
        }
        if shown.accent == body {
            shown.accent = Colour::White;
        }
        shown.body = body;
        shown
    }
}

/// How often a caption names a place, an accessory, a change of the subject, or nothing.
fn situation(
    class: Class,
    generator: &mut impl Rng,
) -> (Option<Setting>, Option<Accessory>, Option<Recolour>) {
    let place = pick(&Setting::ALL, generator);
    let kind: f32 = generator.random();
    let (accessory, recolour) = if class.is_live() && kind < 0.32 {
        (Some(pick(&Accessory::ALL, generator)), None)
    } else if kind > 0.82 {
        (None, Some(pick(&Recolour::ALL, generator)))
    } else {
        (None, None)
    };
    // Dressed or changed subjects are mostly named without a place, as in the prompts.
    let placed = match (accessory, recolour) {
        (None, None) => 0.88,
        _ => 0.35,
    };
    (
        generator.random_bool(placed).then_some(place),
        accessory,
        recolour,
    )
}

/// How many versions of each place there are. Where every leaf and cobble of every picture was another, most of what
/// the small models could learn went into telling leaves from leaves.
pub const VERSIONS: u64 = 4;

/// Pictures are drawn this many times as wide and averaged down.
const OVERSAMPLING: u32 = 4;

/// Draws `scene` as a square of `size` x `size` pixels (at least 1). Equal scenes give equal bytes.
pub fn render(scene: &Scene, size: u32) -> RgbImage {
    let size = size.max(1);
    match draw(scene, size * OVERSAMPLING) {
        Some(canvas) => average(&canvas.pixmap, size, &scene.view),
        // Only a size beyond what memory can address gets here.
        None => RgbImage::new(size, size),
    }
}

fn draw(scene: &Scene, side: u32) -> Option<Canvas> {
    let view = &scene.view;
    let (x, ground) = (view.x * settings::SIDE, view.ground * settings::SIDE);
    let unit = view.height * settings::SIDE / 2.0;
    let mut generator = ChaCha8Rng::seed_from_u64(scene.seed % VERSIONS);
    let mut canvas = Canvas::new(side, settings::SIDE)?;
    settings::backdrop(&mut canvas, scene.setting, x, ground, &mut generator);

    let layer = || Canvas::new(side, settings::SIDE);
    let stand = Transform::from_translate(x, ground - unit)
        .pre_scale(if view.flipped { -unit } else { unit }, unit)
        .pre_concat(Transform::from_rotate_at(view.tilt, 0.0, 1.0));
    let upright = Transform::from_translate(x, ground - unit).pre_scale(unit, unit);

    let floats = matches!(scene.setting, Some(Setting::Water | Setting::Milk));
    if !floats {
        canvas.ellipse(
            x,
            ground + 0.5,
            unit * 0.86,
            unit * 0.11,
            Ink::hex(0x0a0814).alpha(0.38),
        );
    }
    let edge = (side as usize).div_ceil(48);
    let shown = scene.shown();
    let cubed = scene.recolour == Some(Recolour::CubeShaped);
    let mut figure = layer()?;
    figure.place(stand);
    if cubed {
        // The subject lies on the front face of the cube.
        figure.place(Transform::from_translate(-0.14, 0.20).pre_scale(0.74, 0.74));
    }
    let anchors = subject(&mut figure, &shown, view.sitting, view.hour);
    if let (Some(accessory), Some(anchors)) = (scene.accessory, anchors) {
        accessories::wear(&mut figure, accessory, &anchors);
    }
    let mut figure = if cubed {
        let mut cube = layer()?;
        cube.place(stand);
        effects::cube(&mut cube, shown.body_ink());
        effects::compose(&mut cube.pixmap, &figure.pixmap, edge);
        cube
    } else {
        figure
    };
    figure.only_inside();
    match scene.recolour {
        Some(Recolour::Shiny) => effects::shine(&mut figure),
        Some(Recolour::Wet) => effects::soak(&mut figure),
        Some(Recolour::Red | Recolour::Purple) => effects::wash(&mut figure, shown.body_ink()),
        Some(Recolour::CubeShaped) | None => {}
    }
    if scene.setting == Some(Setting::Mirror) {
        let line = (ground / settings::SIDE * side as f32) as usize;
        effects::reflect(&mut canvas.pixmap, &figure.pixmap, line, 150);
    }
    canvas = over(canvas, upright, |canvas| {
        if scene.recolour == Some(Recolour::Wet) && !floats {
            effects::puddle(canvas);
        }
    });
    effects::compose(&mut canvas.pixmap, &figure.pixmap, edge);
    settings::foreground(
        &mut canvas,
        scene.setting,
        x,
        ground,
        unit * 0.8,
        &mut generator,
    );
    Some(over(canvas, upright, |canvas| match scene.recolour {
        Some(Recolour::Shiny) => effects::sparkles(canvas),
        Some(Recolour::Wet) => effects::drops(canvas),
        _ => {}
    }))
}

/// Draws on `canvas` in the coordinates that `transform` gives, then returns to its own.
fn over(mut canvas: Canvas, transform: Transform, paint: impl FnOnce(&mut Canvas)) -> Canvas {
    let own = canvas.transform;
    canvas.place(transform);
    paint(&mut canvas);
    canvas.transform = own;
    canvas
}

/// The mean of each square of pixels, lit as `view` says.
fn average(pixmap: &Pixmap, size: u32, view: &View) -> RgbImage {
    let (factor, side) = (OVERSAMPLING as usize, pixmap.width() as usize);
    let light = [
        view.light * (1.0 + view.warmth),
        view.light,
        view.light * (1.0 - view.warmth),
    ];
    let share = 1.0 / (factor * factor) as f32;
    let data = pixmap.data();
    RgbImage::from_fn(size, size, |x, y| {
        let mut sums = [0u32; 3];
        for row in 0..factor {
            let start = ((y as usize * factor + row) * side + x as usize * factor) * 4;
            for pixel in data[start..start + factor * 4].chunks_exact(4) {
                for (sum, &value) in sums.iter_mut().zip(pixel) {
                    *sum += u32::from(value);
                }
            }
        }
        let channel = |i: usize| (sums[i] as f32 * share * light[i]).round().min(255.0) as u8;
        Rgb([channel(0), channel(1), channel(2)])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scenes(split: Split, seed: u64) -> impl Iterator<Item = Scene> {
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        std::iter::repeat_with(move || Scene::sample(&mut generator, split))
    }

    #[test]
    fn equal_scenes_give_equal_bytes() {
        for (scene, again) in scenes(Split::Train, 1)
            .zip(scenes(Split::Train, 1))
            .take(100)
        {
            assert_eq!(scene, again);
            assert_eq!(render(&scene, 32).as_raw(), render(&again, 32).as_raw());
        }
    }

    #[test]
    fn training_never_shows_a_reserved_identity() {
        for scene in scenes(Split::Train, 2).take(20_000) {
            assert!(!scene.identity.is_reserved(), "{scene:?}");
            assert!(!scene.shown().is_reserved(), "{scene:?}");
        }
    }

    #[test]
    fn held_out_scenes_show_only_reserved_identities() {
        assert!(
            scenes(Split::HeldOut, 3)
                .take(2_000)
                .all(|scene| scene.identity.is_reserved())
        );
    }

    #[test]
    fn every_class_setting_accessory_and_recolouring_occurs() {
        let drawn: Vec<Scene> = scenes(Split::Train, 4).take(5_000).collect();
        for class in Class::ALL {
            assert!(drawn.iter().any(|scene| scene.identity.class == class));
        }
        for setting in Setting::ALL {
            assert!(drawn.iter().any(|scene| scene.setting == Some(setting)));
        }
        for accessory in Accessory::ALL {
            assert!(drawn.iter().any(|scene| scene.accessory == Some(accessory)));
        }
        for recolour in Recolour::ALL {
            assert!(drawn.iter().any(|scene| scene.recolour == Some(recolour)));
        }
    }

    #[test]
    fn a_larger_picture_shows_the_same_scene() {
        for scene in scenes(Split::Train, 5).take(20) {
            let (small, large) = (render(&scene, 32), render(&scene, 64));
            let mut difference = 0.0;
            for (x, y, pixel) in small.enumerate_pixels() {
                for channel in 0..3 {
                    let square = [(0, 0), (1, 0), (0, 1), (1, 1)];
                    let mean: f32 = square
                        .iter()
                        .map(|(dx, dy)| {
                            f32::from(large.get_pixel(2 * x + dx, 2 * y + dy)[channel]) / 4.0
                        })
                        .sum();
                    difference += (mean - f32::from(pixel[channel])).abs() / (32.0 * 32.0 * 3.0);
                }
            }
            assert!(
                difference < 4.0,
                "mean difference {difference} of {scene:?}"
            );
        }
    }
}
