//! CLIP on scenes and their captions.

use serde_json::json;

use super::context::Context;
use super::course::Step;
use super::scenes::meaning;
use super::{contrast, files};
use crate::Result;
use crate::evaluation::preprocess::Preprocessing;
use crate::models::clip::{Clip, Config, TextConfig, VisionConfig};
use crate::models::tokenizer::TextTokenizer;
use crate::nano::captions::Wording;
use crate::nano::vocabulary::clip_tokenizer;
use crate::nn::Weights;

/// What the captions of a batch say, in turn. All captions of a batch say equally much, since the short caption of one
/// scene may be true of another whose caption says more. Places are easier to see than things: half of the batches
/// are about the things alone.
const BATCHES: [(Wording, About); 4] = [
    (SHORT, About::Subject),
    (SHORT, About::Scene),
    (LONG, About::Subject),
    (LONG, About::Scene),
];

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

/// Whether captions name the place.
#[derive(Clone, Copy, PartialEq)]
enum About {
    Scene,
    Subject,
}

/// The scale of CLIP's logits stays below this.
const LARGEST_LOGIT_SCALE: f64 = 100.0;

/// Trains, or goes on training, `clip`.
pub fn train(context: &Context) -> Result<()> {
    let settings = &context.settings.clip;
    let folder = context.out.join("clip");
    let vocabulary = clip_tokenizer();
    files::write_json(&folder.join("tokenizer.json"), &vocabulary)?;
    let tokenizer = TextTokenizer::from_file(&folder.join("tokenizer.json"))?;
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
            projection_dim: settings.projection,
            num_hidden_layers: settings.vision.layers,
            num_attention_heads: settings.vision.heads,
            image_size: context.settings.image_size,
            patch_size: settings.patch_size,
            ..VisionConfig::default()
        },
        projection_dim: settings.projection,
        ..Config::default()
    };
    write_configs(context, &config)?;
    let file = folder.join("model.safetensors");
    let weights = Weights::trainable(
        &files::existing(&file),
        context.seed("clip"),
        &context.device,
    )?;
    let model = Clip::new(&config, &weights)?;
    weights.finish()?;
    let preprocessing = Preprocessing::clip(context.settings.image_size as u32);
    let scenes = context.scenes("clip");
    let course = context.course("clip", &settings.training, &folder, weights.variables());
    let step = |seen: usize, _spent: f64| {
        let batch = scenes.batch(seen, settings.training.batch_size);
        let generator = &mut scenes.generator("wording", seen);
        let (wording, about) = BATCHES[seen / settings.training.batch_size % BATCHES.len()];
        let captions: Vec<String> = batch
            .iter()
            .map(|scene| {
                let mut said = scene.clone();
                if about == About::Subject {
                    said.setting = None;
                }
                wording.caption(&said, generator)
            })
            .collect();
        let meanings: Vec<String> = captions.iter().map(|caption| meaning(caption)).collect();
        let targets = contrast::targets(&meanings, true, &context.device)?;
        let pixels = preprocessing.apply(&scenes.draw(&batch), &context.device)?;
        let longest = captions
            .iter()
            .map(|c| c.split_whitespace().count() + 2)
            .max()
            .unwrap_or(2);
        let length = longest.min(settings.max_positions);
        let (ids, _) = tokenizer.encode_batch(&captions, length, end, &context.device)?;
        let scale = model.logit_scale().clamp(0.0, LARGEST_LOGIT_SCALE.ln())?;
        let loss = contrast::clip(
            &model.encode_image(&pixels)?,
            &model.encode_text(&ids)?,
            &scale,
            &targets,
        )?;
        let scale = f64::from(scale.exp()?.to_scalar::<f32>()?);
        let name = match (about, wording == LONG) {
            (About::Subject, false) => "thing",
            (About::Scene, false) => "scene",
            (About::Subject, true) => "thing+",
            (About::Scene, true) => "scene+",
        };
        let value = f64::from(loss.to_scalar::<f32>()?);
        Ok(Step {
            loss,
            figures: vec![(name, value), ("scale", scale)],
        })
    };
    course.run(step, || files::write_weights(&file, &weights.variables()))
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
                "projection_dim": vision.projection_dim,
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
