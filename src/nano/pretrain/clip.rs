//! CLIP on scenes and their captions.

use rand_chacha::ChaCha8Rng;
use serde_json::json;

use super::context::Context;
use super::course::Step;
use super::scenes::{Scenes, meaning};
use super::{contrast, files};
use crate::Result;
use crate::evaluation::preprocess::Preprocessing;
use crate::models::clip::{Clip, Config, TextConfig, VisionConfig};
use crate::nano::captions::Wording;
use crate::nano::identity::Class;
use crate::nano::vocabulary::clip_tokenizer;
use crate::nano::world::Scene;

/// What the prompts say.
const SHORT: Wording = Wording {
    attributes: 0.0,
    photo: 0.1,
    token: 0.1,
};

/// Colours and pattern too.
const LONG: Wording = Wording {
    attributes: 1.0,
    photo: 0.1,
    token: 0.1,
};

/// One way to caption all images of a batch. All captions of a round say equally much, since the short caption of one
/// scene may be true of another whose caption says more.
struct Round {
    /// For the progress line.
    name: &'static str,
    wording: Wording,
    /// Whether captions name the place. Places are easier to see than things, so there are rounds about things alone.
    placed: bool,
    /// Weight of its loss.
    weight: f64,
}

/// What every batch is asked: which thing it is, and which thing where.
const ALWAYS: [Round; 2] = [
    Round {
        name: "thing",
        wording: SHORT,
        placed: false,
        weight: 1.0,
    },
    Round {
        name: "scene",
        wording: SHORT,
        placed: true,
        weight: 1.0,
    },
];

/// What batches are asked in turn: the same, told by colours and pattern.
const IN_TURN: [Round; 2] = [
    Round {
        name: "thing+",
        wording: LONG,
        placed: false,
        weight: 0.5,
    },
    Round {
        name: "scene+",
        wording: LONG,
        placed: true,
        weight: 0.5,
    },
];

/// The scale of CLIP's logits stays below this.
const LARGEST_LOGIT_SCALE: f64 = 100.0;

/// Trains, or goes on training, `clip`.
pub fn train(context: &Context) -> Result<()> {
    let settings = &context.settings.clip;
    let folder = context.out.join("clip");
    let vocabulary = clip_tokenizer();
    let tokenizer = files::tokenizer(&folder, &vocabulary)?;
    let end = tokenizer.id("<|endoftext|>").unwrap_or(0);
    let config = Config {
        text_config: TextConfig {
            vocab_size: tokenizer.vocab_size(),
            hidden_size: settings.text.width,
            intermediate_size: 4 * settings.text.width,
            projection_dim: settings.projection,
            num_hidden_layers: settings.text.layers,
            num_attention_heads: settings.text.heads,
            max_position_embeddings: settings.max_positions,
            eos_token_id: end,
            ..TextConfig::default()
        },
        vision_config: VisionConfig {
            hidden_size: settings.vision.width,
            intermediate_size: 4 * settings.vision.width,
            num_hidden_layers: settings.vision.layers,
            num_attention_heads: settings.vision.heads,
            image_size: context.settings.side(&settings.training),
            patch_size: settings.patch_size,
            ..VisionConfig::default()
        },
        projection_dim: settings.projection,
        ..Config::default()
    };
    let file = folder.join("model.safetensors");
    let opened = context.open("clip", &file, |weights| Clip::new(&config, weights))?;
    let (weights, model) = (opened.weights, opened.model);
    let preprocessing = Preprocessing::clip(config.vision_config.image_size as u32);
    let scenes = context.scenes("clip", &settings.training);
    let course = context.course("clip", &settings.training, &folder, weights.variables());
    let count = settings.training.batch_size;
    let pairs = settings.pairs.min(count / 2);
    let step = |seen: usize, _spent: f64| {
        let (batch, individuals) = batch(&scenes, seen, count, pairs);
        let pixels = preprocessing.apply(&scenes.draw(&batch), &context.device)?;
        let images = model.encode_image(&pixels)?;
        let scale = model.logit_scale().clamp(0.0, LARGEST_LOGIT_SCALE.ln())?;
        let same = contrast::targets(&individuals, &context.device)?;
        let same = contrast::views(&images, &same, settings.pair_temperature)?;
        let mut figures = vec![("pairs", f64::from(same.to_scalar::<f32>()?))];
        let mut loss = (same * settings.pair_weight)?;
        let turn = &IN_TURN[seen / count % IN_TURN.len()];
        for round in ALWAYS.iter().chain([turn]) {
            let (captions, of) = captions(round, &batch, &individuals, |individual| {
                scenes.generator(round.name, seen + individual)
            });
            let longest = captions.iter().map(|c| c.split_whitespace().count() + 2);
            let length = longest.max().unwrap_or(2).min(settings.max_positions);
            let (ids, _) = tokenizer.encode_batch(&captions, length, end, &context.device)?;
            let texts = model.encode_text(&ids)?;
            let contrast = contrast::clip(&images, &texts, &scale, &of)?;
            figures.push((round.name, f64::from(contrast.to_scalar::<f32>()?)));
            loss = (loss + (contrast * round.weight)?)?;
        }
        figures.push(("scale", f64::from(scale.exp()?.to_scalar::<f32>()?)));
        Ok(Step { loss, figures })
    };
    course.run(step, || {
        files::write_json(&folder.join("tokenizer.json"), &vocabulary)?;
        write_configs(context, &config)?;
        files::write_weights(&file, &weights.variables())
    })
}

/// `count` scenes, and which individual each shows, as numbers below `count`: first `pairs` individuals in two scenes
/// each, then one for each scene.
fn batch(scenes: &Scenes, seen: usize, count: usize, pairs: usize) -> (Vec<Scene>, Vec<usize>) {
    let mut batch = Vec::with_capacity(count);
    let mut individuals = Vec::with_capacity(count);
    for pair in 0..pairs {
        let number = seen + pair;
        let class = Class::ALL[number % Class::ALL.len()];
        batch.extend(scenes.pair(number, class));
        individuals.extend([pair; 2]);
    }
    for other in 2 * pairs..count {
        batch.push(scenes.scene(seen + other));
        individuals.push(other);
    }
    (batch, individuals)
}

/// The distinct captions of `batch` in the manner of `round`, and which of them belongs to each scene. Pictures of one
/// individual are worded alike: what is said of one is true of the other.
fn captions(
    round: &Round,
    batch: &[Scene],
    individuals: &[usize],
    generator: impl Fn(usize) -> ChaCha8Rng,
) -> (Vec<String>, Vec<usize>) {
    let (mut captions, mut meanings, mut of) = (Vec::new(), Vec::new(), Vec::new());
    for (scene, &individual) in batch.iter().zip(individuals) {
        let mut said = scene.clone();
        said.setting = said.setting.filter(|_| round.placed);
        let caption = round.wording.caption(&said, &mut generator(individual));
        let meaning = meaning(&caption);
        let known = meanings.iter().position(|m| *m == meaning);
        of.push(known.unwrap_or(meanings.len()));
        if known.is_none() {
            captions.push(caption);
            meanings.push(meaning);
        }
    }
    (captions, of)
}

fn write_configs(context: &Context, config: &Config) -> Result<()> {
    let folder = context.out.join("clip");
    let (text, vision) = (&config.text_config, &config.vision_config);
    files::write_json(
        &folder.join("config.json"),
        &json!({
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": config.projection_dim,
            "logit_scale_init_value": config.logit_scale_init_value,
            "text_config": text_json(text),
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": vision.hidden_size,
                "intermediate_size": vision.intermediate_size,
                "projection_dim": config.projection_dim,
                "num_hidden_layers": vision.num_hidden_layers,
                "num_attention_heads": vision.num_attention_heads,
                "num_channels": vision.num_channels,
                "image_size": vision.image_size,
                "patch_size": vision.patch_size,
                "hidden_act": "quick_gelu",
                "layer_norm_eps": vision.layer_norm_eps,
            },
        }),
    )?;
    let side = vision.image_size;
    files::write_json(
        &folder.join("preprocessor_config.json"),
        &json!({
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": true,
            "size": { "shortest_edge": side },
            "resample": 3,
            "do_center_crop": true,
            "crop_size": { "height": side, "width": side },
            "do_rescale": true,
            "rescale_factor": 1.0 / 255.0,
            "do_normalize": true,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "do_convert_rgb": true,
        }),
    )
}

/// The text tower's part of a `config.json`.
pub fn text_json(text: &TextConfig) -> serde_json::Value {
    json!({
        "model_type": "clip_text_model",
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "projection_dim": text.projection_dim,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "max_position_embeddings": text.max_position_embeddings,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": text.layer_norm_eps,
        "bos_token_id": text.eos_token_id.saturating_sub(1),
        "eos_token_id": text.eos_token_id,
        "pad_token_id": text.eos_token_id,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nano::world::Split;
    use crate::nn::seeded;

    #[test]
    fn pictures_of_one_individual_are_worded_alike_and_equal_captions_are_one_text() {
        let scenes = Scenes::new(1, Split::Train, 32);
        let (batch, individuals) = batch(&scenes, 0, 64, 16);
        assert_eq!((batch.len(), &individuals[..4]), (64, &[0, 0, 1, 1][..]));
        assert_eq!(individuals[32..34], [32, 33]);
        for round in ALWAYS.iter().chain(&IN_TURN) {
            let generator = |individual| seeded(1, &format!("{} {individual}", round.name));
            let (captions, of) = captions(round, &batch, &individuals, generator);
            let distinct: std::collections::BTreeSet<String> =
                captions.iter().map(|caption| meaning(caption)).collect();
            assert_eq!(distinct.len(), captions.len());
            for (scene, &text) in batch.iter().zip(&of) {
                assert!(captions[text].contains(scene.identity.class.word()));
            }
            for pair in batch[..32].chunks(2).zip(of.chunks(2)) {
                let ([a, b], [one, other]) = pair else {
                    unreachable!()
                };
                if !round.placed && a.accessory == b.accessory {
                    assert_eq!(one, other, "{:?} {:?}", captions[*one], captions[*other]);
                }
            }
        }
    }
}
