//! Stable Diffusion 3's MMDiT on the nano autoencoder's latents, with the nano CLIP's text tower.

use std::cell::RefCell;

use candle_core::Tensor;
use rand::Rng;
use serde_json::json;

use super::context::Context;
use super::course::Step;
use super::pool::Pool;
use super::scenes::normal;
use super::{files, frozen};
use crate::diffusion::{Density, FlowMatchEuler, LossForm, SchedulerConfig, Weighting};
use crate::models::clip::TextConfig;
use crate::models::sd3::{Config, Sd3Transformer};
use crate::models::tokenizer::TextTokenizer;
use crate::nano::captions::caption;
use crate::nano::vocabulary::clip_tokenizer;
use crate::nn::no_grad;
use crate::{Error, Result};

/// Trains, or goes on training, `sd3/transformer`. Needs `clip` and `sd3/vae`.
pub fn train(context: &Context) -> Result<()> {
    let settings = &context.settings.sd3;
    let folder = context.out.join("sd3");
    let device = &context.device;
    let vae = frozen::vae(&folder.join("vae"), device)?;
    if !folder.join("text_encoder/model.safetensors").is_file() {
        copy_text_tower(context)?;
    }
    let (text, text_config) = frozen::clip_text(&folder.join("text_encoder"), device)?;
    let tokenizer = TextTokenizer::from_file(&folder.join("tokenizer/tokenizer.json"))?;
    let side = context.settings.image_size / vae.config().downscale();
    let channels = vae.config().latent_channels;
    let config = Config {
        sample_size: side,
        patch_size: settings.patch_size,
        in_channels: channels,
        out_channels: Some(channels),
        num_layers: settings.layers,
        attention_head_dim: settings.head_dim,
        num_attention_heads: settings.heads,
        joint_attention_dim: text_config.hidden_size,
        caption_projection_dim: settings.heads * settings.head_dim,
        pooled_projection_dim: text_config.projection_dim,
        pos_embed_max_size: side / settings.patch_size,
        ..Config::default()
    };
    let schedule_config = SchedulerConfig {
        shift: settings.shift,
        ..SchedulerConfig::default()
    };
    let schedule = FlowMatchEuler::new(schedule_config.clone())?;
    let file = folder.join("transformer/diffusion_pytorch_model.safetensors");
    let opened = context.open("sd3", &file, |weights| {
        Sd3Transformer::new(config.clone(), weights)
    })?;
    let (weights, model) = (opened.weights, opened.model);

    // The positions are a table, and nothing reads what the last block's text would ask for.
    let idle = format!(
        "transformer_blocks.{}.attn.add_q_proj.",
        settings.layers - 1
    );
    let trained = weights
        .variables()
        .into_iter()
        .filter(|(name, _)| name != "pos_embed.pos_embed" && !name.starts_with(&idle))
        .collect();
    let course = context.course(
        "sd3",
        &settings.training,
        &folder.join("transformer"),
        trained,
    );
    let scenes = context.scenes("sd3");
    let first = course.notes()?.images;
    let pool = RefCell::new(Pool::new(settings.pool, first));
    let count = settings.training.batch_size;
    let latent = channels * side * side;
    let step = |seen: usize, _spent: f64| {
        let generator = &mut scenes.generator("step", seen);
        let mut pool = pool.borrow_mut();
        let chosen = pool.take(&scenes, count, generator, |fresh| {
            let pixels = scenes.pixels(fresh, device)?;
            let (mean, logvar) = no_grad(|| vae.encode(&pixels))?;
            let deviation = (logvar * 0.5)?.exp()?;
            let noise = normal(mean.dims(), &mut scenes.generator("latents", seen), device)?;
            let latents = vae.scale(&(mean + (deviation * noise)?)?)?;
            Ok(latents.flatten_from(1)?.to_vec2::<f32>()?)
        })?;
        let captions: Vec<String> = chosen
            .iter()
            .map(|(scene, _)| {
                if generator.random_bool(settings.condition_dropout) {
                    String::new()
                } else {
                    caption(scene, generator)
                }
            })
            .collect();
        let positions = text_config.max_position_embeddings;
        let (ids, _) =
            tokenizer.encode_batch(&captions, positions, text_config.eos_token_id, device)?;
        let encoded = no_grad(|| text.forward(&ids))?;
        let mut values = Vec::with_capacity(count * latent);
        for (_, latents) in &chosen {
            values.extend_from_slice(latents);
        }
        let latents = Tensor::from_vec(values, (count, channels, side, side), device)?;
        let draw = schedule.draw(
            (count, channels, side, side),
            Density::STANDARD,
            generator,
            device,
        )?;
        let form = (LossForm::Velocity, Weighting::One);
        let loss = schedule.loss(&latents, &draw, form, |noisy, timesteps| {
            model.forward(noisy, timesteps, &encoded.penultimate, &encoded.pooled)
        })?;
        Ok(Step {
            loss,
            figures: Vec::new(),
        })
    };
    course.run(step, || {
        write_configs(context, &config, &schedule_config)?;
        files::write_weights(&file, &weights.variables())
    })
}

/// Puts CLIP's text tower where a diffusion model has its own, as a `CLIPTextModelWithProjection`.
fn copy_text_tower(context: &Context) -> Result<()> {
    let clip = context.out.join("clip");
    let (_, config) = frozen::clip(&clip, &context.device)?;
    let folder = context.out.join("sd3");
    let (tensors, _) = crate::files::read_tensors(&clip.join("model.safetensors"))?;
    let text = tensors
        .into_iter()
        .filter(|(name, _)| name.starts_with("text_"))
        .collect();
    let mut json = super::clip::text_json(&TextConfig {
        projection_dim: config.projection_dim,
        ..config.text_config
    });
    json["architectures"] = json!(["CLIPTextModelWithProjection"]);
    files::write_json(&folder.join("text_encoder/config.json"), &json)?;
    files::write_json(&folder.join("tokenizer/tokenizer.json"), &clip_tokenizer())?;
    crate::files::write_tensors(&folder.join("text_encoder/model.safetensors"), &text, &[])
}

fn write_configs(context: &Context, config: &Config, schedule: &SchedulerConfig) -> Result<()> {
    let folder = context.out.join("sd3");
    let failed = |e: serde_json::Error| Error::Invalid {
        what: format!("a config of sd3: {e}"),
        hint: None,
    };
    let classed = |name: &str, value: serde_json::Value| {
        let mut all = json!({ "_class_name": name });
        if let (Some(all), Some(value)) = (all.as_object_mut(), value.as_object()) {
            all.extend(value.clone());
        }
        all
    };
    files::write_json(
        &folder.join("model_index.json"),
        &json!({
            "_class_name": "StableDiffusion3Pipeline",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
            "text_encoder_2": [null, null],
            "text_encoder_3": [null, null],
            "tokenizer": ["transformers", "CLIPTokenizerFast"],
            "tokenizer_2": [null, null],
            "tokenizer_3": [null, null],
            "transformer": ["diffusers", "SD3Transformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }),
    )?;
    let transformer = serde_json::to_value(config).map_err(failed)?;
    files::write_json(
        &folder.join("transformer/config.json"),
        &classed("SD3Transformer2DModel", transformer),
    )?;
    let scheduler = serde_json::to_value(schedule).map_err(failed)?;
    files::write_json(
        &folder.join("scheduler/scheduler_config.json"),
        &classed("FlowMatchEulerDiscreteScheduler", scheduler),
    )
}
