//! Chameleon's transformer, trained from nothing as Lumina-mGPT is tuned: prompts and images in one vocabulary.

use std::cell::RefCell;

use rand::Rng;
use serde_json::json;

use super::context::Context;
use super::course::Step;
use super::files;
use super::pool::Pool;
use crate::models::chameleon::files::open_image_tokenizer;
use crate::models::chameleon::{Backbone, Config, Dropout, Format, Sequence, Vocabulary};
use crate::nano::captions::caption;
use crate::nano::vocabulary::chameleon_tokenizer;
use crate::nn::no_grad;
use crate::{Error, Result};

/// Trains, or goes on training, `lumina`. Needs `lumina/tokenizer`.
///
/// # Errors
/// When the image tokenizer has not been trained, or a file cannot be read or written.
pub fn train(context: &Context) -> Result<()> {
    let (settings, device) = (&context.settings.chameleon, &context.device);
    let folder = context.out.join("lumina");
    if !folder.join("tokenizer").is_dir() {
        return Err(Error::invalid(
            format!("{} is not there", folder.join("tokenizer").display()),
            "train the model that this one stands on first: vqgan comes before chameleon",
        ));
    }
    let vq = open_image_tokenizer(&folder, device)?;
    let (side, codes) = (
        context.settings.side(&settings.training),
        vq.config().n_embed,
    );
    let tokenizer = chameleon_tokenizer(codes, side / settings.patch_size);
    let text = files::tokenizer(&folder, &tokenizer)?;
    let config = Config {
        vocab_size: text.vocab_size(),
        hidden_size: settings.width,
        intermediate_size: settings.feed_forward,
        num_hidden_layers: settings.layers,
        num_attention_heads: settings.heads,
        num_key_value_heads: Some(settings.heads),
        max_position_embeddings: settings.positions,
        patch_size: settings.patch_size,
        image_size: side,
        ..Config::default()
    };
    let vocabulary = Vocabulary::of(&text, &config, codes)?;
    let downsampling = vq.config().downsampling();
    let format = Format::new(vocabulary, (side, side), settings.patch_size, downsampling)?;

    let file = folder.join("model.safetensors");
    let opened = context.open("chameleon", &file, |weights| {
        Backbone::new(&config, weights)
    })?;
    let (weights, model) = (opened.weights, opened.model);
    let course = context.course(
        "chameleon",
        &settings.training,
        &folder,
        weights.variables(),
    );
    let scenes = context.scenes("chameleon", &settings.training);
    let pool = RefCell::new(Pool::new(settings.pool, course.notes()?.images));
    let count = settings.training.batch_size;
    let step = |seen: usize, _spent: f64| {
        let generator = &mut scenes.generator("step", seen);
        let chosen = pool.borrow_mut().take(&scenes, count, generator, |fresh| {
            let pixels = scenes.pixels(fresh, device)?;
            Ok(no_grad(|| vq.encode(&pixels))?.to_vec2::<u32>()?)
        })?;
        let batch = chosen
            .iter()
            .map(|(scene, codes)| {
                let answer = format.answer(codes)?;
                if generator.random_bool(settings.condition_dropout) {
                    return Ok(Sequence {
                        tokens: answer,
                        labelled: 1,
                    });
                }
                let prompt = format.prompt(&text, &caption(scene, generator))?;
                Ok(Sequence {
                    labelled: prompt.len(),
                    tokens: [prompt, answer].concat(),
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let p = settings.dropout;
        Ok(Step {
            loss: model.loss(&batch, Some(Dropout { p, generator }))?,
            figures: Vec::new(),
        })
    };
    course.run(step, || {
        files::write_json(&folder.join("tokenizer.json"), &tokenizer)?;
        files::write_json(&folder.join("config.json"), &described(&config))?;
        files::write_weights(&file, &weights.variables())
    })
}

/// `config.json` as transformers 4 and 5 both read it, with what they do not know at the end.
fn described(c: &Config) -> serde_json::Value {
    json!({
        "architectures": ["ChameleonForConditionalGeneration"],
        "model_type": "chameleon",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.kv_heads(),
        "hidden_act": "silu",
        "max_position_embeddings": c.max_position_embeddings,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "attention_bias": c.attention_bias,
        "mlp_bias": c.mlp_bias,
        "swin_norm": c.swin_norm,
        "tie_word_embeddings": c.tie_word_embeddings,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "patch_size": c.patch_size,
        "image_size": c.image_size,
    })
}
