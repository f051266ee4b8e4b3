//! Scenes in words, by the templates of the DreamBooth prompts.

use rand::Rng;

use super::identity::{Identity, pick};
use super::world::{Recolour, Scene};
use crate::config::prompts::RARE_TOKENS;

/// Captions have at most this many words, so that 24 positions hold them with their special tokens.
pub const MAX_WORDS: usize = 21;

/// How often captions say more than the prompts do; probabilities, 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Wording {
    /// Colours and pattern: "a brown striped dog". They are what carries identity in text.
    pub attributes: f64,
    /// "a photo of" in front.
    pub photo: f64,
    /// A subject token, drawn without regard to the scene, so that models know these words as words that may
    /// stand before a class and say nothing yet.
    pub token: f64,
}

impl Default for Wording {
    fn default() -> Self {
        Wording {
            attributes: 0.35,
            photo: 0.12,
            token: 0.12,
        }
    }
}

/// A caption in the default wording.
pub fn caption(scene: &Scene, generator: &mut impl Rng) -> String {
    Wording::default().caption(scene, generator)
}

/// What the prompts would say: class, setting, accessory and recolouring, no more.
pub fn plain_caption(scene: &Scene) -> String {
    assemble("", scene, &[], None)
}

impl Wording {
    /// The scene in words. Whether colours, a token or "a photo of" appear is drawn from `generator`; if the
    /// caption would then exceed [`MAX_WORDS`], it says only what the prompts would.
    pub fn caption(&self, scene: &Scene, generator: &mut impl Rng) -> String {
        let photo = if generator.random_bool(self.photo) {
            pick(&["a photo of ", "a picture of "], generator)
        } else {
            ""
        };
        let attributes = if generator.random_bool(self.attributes) {
            attributes(&scene.shown(), scene.recolour, generator)
        } else {
            Vec::new()
        };
        let token = generator
            .random_bool(self.token)
            .then(|| pick(&RARE_TOKENS, generator));
        let caption = assemble(photo, scene, &attributes, token);
        if caption.split_whitespace().count() <= MAX_WORDS {
            caption
        } else {
            plain_caption(scene)
        }
    }
}

fn assemble(photo: &str, scene: &Scene, attributes: &[&str], token: Option<&str>) -> String {
    let change = scene.recolour.map(Recolour::word);
    let mut words: Vec<&str> = change
        .into_iter()
        .chain(attributes.iter().copied())
        .chain(token)
        .collect();
    words.push(scene.identity.class.word());
    let subject = words.join(" ");
    let article = if subject.starts_with('o') { "an" } else { "a" };
    let mut caption = format!("{photo}{article} {subject}");
    let phrases = [
        scene.accessory.map(|accessory| accessory.phrase()),
        scene.setting.map(|setting| setting.phrase()),
    ];
    for phrase in phrases.into_iter().flatten() {
        caption.push(' ');
        caption.push_str(phrase);
    }
    caption
}

/// Some of "brown", "and white", "striped". A recolouring has named the body's colour already.
fn attributes(
    shown: &Identity,
    recolour: Option<Recolour>,
    generator: &mut impl Rng,
) -> Vec<&'static str> {
    let mut words = Vec::new();
    if !matches!(recolour, Some(Recolour::Red | Recolour::Purple)) {
        words.push(shown.body.word());
    }
    if generator.random_bool(0.5) {
        words.extend(["and", shown.accent.word()]);
    }
    words.extend(shown.pattern.word().filter(|_| generator.random_bool(0.7)));
    words
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::SeedableRng;

    use super::*;
    use crate::nano::vocabulary::words;
    use crate::nano::world::Split;

    #[test]
    fn captions_use_only_known_words_and_fit() {
        let known: BTreeSet<String> = words().into_iter().collect();
        let mut generator = ChaCha8Rng::seed_from_u64(1);
        let wordy = Wording {
            attributes: 0.7,
            photo: 0.5,
            token: 0.5,
        };
        for _ in 0..5_000 {
            let scene = Scene::sample(&mut generator, Split::Train);
            for text in [
                caption(&scene, &mut generator),
                wordy.caption(&scene, &mut generator),
            ] {
                let spoken: Vec<&str> = text.split_whitespace().collect();
                assert!(spoken.len() <= MAX_WORDS, "{text}");
                for word in spoken {
                    assert!(known.contains(&word.to_lowercase()), "{word} in {text:?}");
                }
            }
        }
    }

    #[test]
    fn plain_captions_are_the_prompts_without_their_token() {
        use crate::config::PromptList;
        use crate::config::prompts::fill_without_token;

        let mut generator = ChaCha8Rng::seed_from_u64(2);
        let spoken: BTreeSet<String> =
            std::iter::repeat_with(|| Scene::sample(&mut generator, Split::Train))
                .take(20_000)
                .map(|scene| plain_caption(&scene))
                .collect();
        for class in ["dog", "teapot"] {
            for template in PromptList::DreamBooth.templates(class) {
                let prompt = fill_without_token(&template, class);
                assert!(spoken.contains(&prompt), "{prompt}");
            }
        }
    }
}
