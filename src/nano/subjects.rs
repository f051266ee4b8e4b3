//! The nine subjects that ship with the project: four live ones and five objects, as in the paper's study, each
//! with five reference images. All of them are reserved identities, so no nano model has seen them.

use std::path::Path;

use image::RgbImage;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use super::identity::{Class, Colour, Identity, Marking, Pattern};
use super::world::{Scene, Setting, render};
use crate::{Error, Result};

/// The edge of the reference images in pixels.
pub const SIZE: u32 = 128;
/// How many reference images each subject has.
pub const IMAGES: usize = 5;

/// A subject by its folder's name.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Subject {
    pub name: &'static str,
    pub identity: Identity,
}

impl Subject {
    /// The scenes of the reference images: undressed, never recoloured, each in another place and pose.
    pub fn scenes(&self) -> Vec<Scene> {
        // Neighbours in the list start at different settings, so that a place does not belong to a subject.
        const PLACES: [Option<Setting>; 9] = [
            None,
            Some(Setting::Beach),
            Some(Setting::WoodenFloor),
            Some(Setting::Mountain),
            Some(Setting::WhiteRug),
            Some(Setting::City),
            Some(Setting::Sunflowers),
            Some(Setting::CobblestoneStreet),
            Some(Setting::DirtRoad),
        ];
        let start = SUBJECTS
            .iter()
            .position(|subject| subject.name == self.name)
            .unwrap_or(0);
        (0..IMAGES)
            .map(|image| {
                let mut generator = ChaCha8Rng::seed_from_u64((100 * start + image) as u64);
                let place = PLACES[(start + 2 * image) % PLACES.len()];
                let mut scene = Scene::of(self.identity, place, None, None, &mut generator);
                scene.view.sitting = image % 2 == 1;
                scene
            })
            .collect()
    }

    /// The reference images, [`SIZE`] x [`SIZE`].
    pub fn images(&self) -> Vec<RgbImage> {
        self.scenes()
            .iter()
            .map(|scene| render(scene, SIZE))
            .collect()
    }
}

/// The shipped subjects, live ones first.
pub const SUBJECTS: [Subject; 9] = [
    subject(
        "dog1",
        Class::Dog,
        (Colour::Black, Colour::White),
        (Pattern::Patchy, Marking::Base),
        0,
        [0.4, 0.5, 0.3, 0.4],
        [0.12, 0.5],
    ),
    subject(
        "dog2",
        Class::Dog,
        (Colour::Brown, Colour::Orange),
        (Pattern::Plain, Marking::Front),
        1,
        [-0.5, 0.6, -0.4, 0.7],
        [0.2, 0.5],
    ),
    subject(
        "cat1",
        Class::Cat,
        (Colour::Black, Colour::Orange),
        (Pattern::Striped, Marking::Top),
        0,
        [-0.2, 0.3, 0.2, 0.4],
        [0.1, 0.4],
    ),
    subject(
        "cat2",
        Class::Cat,
        (Colour::White, Colour::Brown),
        (Pattern::Patchy, Marking::Top),
        1,
        [0.6, 0.0, 0.4, -0.2],
        [0.66, 0.35],
    ),
    subject(
        "backpack1",
        Class::Backpack,
        (Colour::Green, Colour::Orange),
        (Pattern::Dotted, Marking::None),
        1,
        [0.2, 0.4, 0.3, 0.0],
        [0.3, 0.5],
    ),
    subject(
        "sneaker1",
        Class::Sneaker,
        (Colour::White, Colour::Red),
        (Pattern::Striped, Marking::Base),
        1,
        [0.3, 0.2, 0.2, 0.0],
        [0.6, 0.6],
    ),
    subject(
        "teapot1",
        Class::Teapot,
        (Colour::Blue, Colour::White),
        (Pattern::Striped, Marking::Top),
        0,
        [0.5, 0.2, 0.4, 0.3],
        [0.2, 0.5],
    ),
    subject(
        "toy1",
        Class::Toy,
        (Colour::Pink, Colour::Turquoise),
        (Pattern::Banded, Marking::Top),
        0,
        [0.2, 0.0, 0.3, 0.4],
        [0.5, 0.4],
    ),
    subject(
        "vase1",
        Class::Vase,
        (Colour::Red, Colour::Yellow),
        (Pattern::Checkered, Marking::Base),
        0,
        [0.6, 0.1, 0.2, 0.0],
        [0.2, 0.6],
    ),
];

const fn subject(
    name: &'static str,
    class: Class,
    (body, accent): (Colour, Colour),
    (pattern, marking): (Pattern, Marking),
    build: u8,
    proportions: [f32; 4],
    phase: [f32; 2],
) -> Subject {
    Subject {
        name,
        identity: Identity {
            class,
            body,
            accent,
            pattern,
            marking,
            build,
            proportions,
            shade: [0.0, 0.0],
            phase,
        },
    }
}

/// Writes `<folder>/<name>/00.png` to `04.png` for every subject, and `<folder>/subjects.json`, which maps names
/// to classes.
///
/// # Errors
/// Where a folder or file cannot be written.
pub fn write_subjects(folder: &Path) -> Result<()> {
    let mut classes = serde_json::Map::new();
    for subject in SUBJECTS {
        let own = folder.join(subject.name);
        std::fs::create_dir_all(&own).map_err(Error::io(&own))?;
        for (i, image) in subject.images().iter().enumerate() {
            let path = own.join(format!("{i:02}.png"));
            image.save(&path).map_err(|error| Error::Image {
                path: path.clone(),
                reason: error.to_string(),
            })?;
        }
        classes.insert(subject.name.into(), subject.identity.class.word().into());
    }
    let path = folder.join("subjects.json");
    std::fs::write(&path, format!("{:#}\n", serde_json::Value::Object(classes)))
        .map_err(Error::io(&path))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn committed() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("datasets/nano/subjects")
    }

    #[test]
    fn every_shipped_subject_is_reserved() {
        for subject in SUBJECTS {
            assert!(subject.identity.is_reserved(), "{}", subject.name);
        }
        assert_eq!(
            SUBJECTS
                .iter()
                .filter(|subject| subject.identity.class.is_live())
                .count(),
            4
        );
    }

    #[test]
    fn committed_images_are_what_the_subjects_draw() {
        for subject in SUBJECTS {
            for (i, drawn) in subject.images().iter().enumerate() {
                let path = committed().join(subject.name).join(format!("{i:02}.png"));
                let stored = image::open(&path).unwrap().to_rgb8();
                assert_eq!(stored.dimensions(), drawn.dimensions());
                // Another machine's sine may move an edge by a pixel.
                let differing = stored
                    .pixels()
                    .zip(drawn.pixels())
                    .filter(|(a, b)| a != b)
                    .count();
                assert!(
                    differing < 50,
                    "{}: {differing} pixels differ",
                    path.display()
                );
            }
        }
    }

    #[test]
    fn references_differ_in_place_and_are_neither_dressed_nor_recoloured() {
        for subject in SUBJECTS {
            let scenes = subject.scenes();
            for (i, scene) in scenes.iter().enumerate() {
                assert_eq!((scene.accessory, scene.recolour), (None, None));
                assert!(
                    scenes[..i]
                        .iter()
                        .all(|other| other.setting != scene.setting)
                );
            }
        }
    }

    /// Run with `--ignored` after a change of the drawing.
    #[test]
    #[ignore = "writes into datasets/"]
    fn write_the_committed_subjects() {
        write_subjects(&committed()).unwrap();
    }
}
