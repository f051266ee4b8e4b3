//! Numbered scenes and what is made of them: pixels, captions, pairs of pictures of one individual.

use candle_core::{Device, Tensor};
use image::RgbImage;
use rand::Rng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;

use crate::config::prompts::RARE_TOKENS;
use crate::nano::identity::{Class, Identity};
use crate::nano::world::{Accessory, Scene, Setting, Split, render};
use crate::nn::seeded;
use crate::{Result, images};

/// Endless scenes: each follows from its number alone.
pub struct Scenes {
    seed: u64,
    split: Split,
    size: usize,
}

impl Scenes {
    /// Scenes of `split`, drawn `size` pixels wide.
    pub fn new(seed: u64, split: Split, size: usize) -> Self {
        Self { seed, split, size }
    }

    /// The generator for what happens to scene `number` under `name`.
    pub fn generator(&self, name: &str, number: usize) -> ChaCha8Rng {
        seeded(self.seed, &format!("{name} {number}"))
    }

    /// The scene of this number.
    pub fn scene(&self, number: usize) -> Scene {
        Scene::sample(&mut self.generator("scene", number), self.split)
    }

    /// `count` scenes from number `first` on.
    pub fn batch(&self, first: usize, count: usize) -> Vec<Scene> {
        (first..first + count).map(|n| self.scene(n)).collect()
    }

    /// Individual `number`, of `class`, in two situations that have nothing to do with one another.
    pub fn pair(&self, number: usize, class: Class) -> [Scene; 2] {
        let generator = &mut self.generator("pair", number);
        let identity = Identity::sample(class, self.split, generator);
        [(); 2].map(|()| {
            let dressed = class.is_live() && generator.random_bool(0.25);
            let accessory = Accessory::ALL
                .choose(generator)
                .copied()
                .filter(|_| dressed);
            let placed = generator.random_bool(0.9);
            let setting = Setting::ALL.choose(generator).copied().filter(|_| placed);
            Scene::of(identity, setting, accessory, None, generator)
        })
    }

    /// The scenes drawn.
    pub fn draw(&self, scenes: &[Scene]) -> Vec<RgbImage> {
        scenes
            .par_iter()
            .map(|scene| render(scene, self.size as u32))
            .collect()
    }

    /// The scenes drawn, (b, 3, size, size) in [−1, 1].
    pub fn pixels(&self, scenes: &[Scene], device: &Device) -> Result<Tensor> {
        images::to_tensor(&self.draw(scenes), device)
    }
}

/// `caption` without what says nothing about the scene: subject tokens and "a photo of".
pub fn meaning(caption: &str) -> String {
    let bare = ["a photo of ", "a picture of "]
        .iter()
        .find_map(|opening| caption.strip_prefix(opening))
        .unwrap_or(caption);
    let words: Vec<&str> = bare
        .split_whitespace()
        .filter(|word| !RARE_TOKENS.contains(word))
        .collect();
    words.join(" ")
}

/// Standard normal noise.
pub fn normal(shape: &[usize], generator: &mut impl Rng, device: &Device) -> Result<Tensor> {
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|_| StandardNormal.sample(generator))
        .collect();
    Ok(Tensor::from_vec(values, shape, device)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scene_follows_from_its_number_alone() {
        let scenes = Scenes::new(1, Split::Train, 32);
        assert_eq!(scenes.batch(10, 3)[1], scenes.scene(11));
        assert_ne!(scenes.scene(11), scenes.scene(12));
    }

    #[test]
    fn a_pair_shows_one_individual() {
        let [one, other] = Scenes::new(1, Split::HeldOut, 32).pair(3, Class::Teapot);
        assert_eq!(one.identity, other.identity);
        assert!(one.identity.is_reserved());
        assert_ne!(one.seed, other.seed);
    }

    #[test]
    fn tokens_and_openings_do_not_change_the_meaning() {
        assert_eq!(
            meaning("a photo of a red sks dog in the snow"),
            "a red dog in the snow"
        );
        assert_eq!(meaning("a dog"), "a dog");
    }
}
