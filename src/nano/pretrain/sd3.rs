//! The MMDiT of Stable Diffusion 3 and 3.5 on the nano autoencoder's latents, with the nano CLIP's text tower and, in
//! 3.5, LlamaGen's T5.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Tensor;
use serde_json::{Value, json};

use super::context::Context;
use super::course::Step;
use super::lessons::{Lessons, classed, furnish, network_file};
use super::settings::{Mmdit, Sd3};
use super::{files, frozen};
use crate::Result;
use crate::diffusion::{Density, FlowMatchEuler, LossForm, SchedulerConfig, Weighting};
use crate::models::clip::TextConfig;
use crate::models::sd3::{Config, QkNorm, Sd3Transformer};
use crate::nano::vocabulary::clip_tokenizer;

/// T5's place among the text encoders.
const T5: usize = 3;

/// Trains, or goes on training, `sd3/transformer` or `sd35/transformer`. Needs `clip` and `sd3/vae`, and with `t5` also
/// `llamagen/t5`.
pub fn train(context: &Context, which: Mmdit) -> Result<()> {
    let (name, settings) = (which.name(), which.of(&context.settings));
    let folder = context.out.join(name);
    let t5 = settings.t5.then_some(T5);
    if !context
        .out
        .join("sd3/text_encoder/model.safetensors")
        .is_file()
    {
        copy_text_tower(context)?;
    }
    let pixels = context.settings.side(&settings.training);
    furnish(context, &folder, pixels, &[("", true)], t5)?;
    let file = network_file(&folder, "transformer");
    let notes = super::course::Notes::read(&folder.join("transformer/training.json"))?;
    let pool = (settings.pool, notes.images);
    let lessons = Lessons::open(context, (name, ""), &folder, &settings.training, pool, t5)?;
    let config = config(settings, &lessons);
    let schedule_config = SchedulerConfig {
        shift: settings.shift,
        ..SchedulerConfig::default()
    };
    let schedule = FlowMatchEuler::new(schedule_config.clone())?;
    let start = settings.start.map(|start| weights(context, start));
    let opened = context.open_or_start(name, &file, start.transpose()?, |weights| {
        Sd3Transformer::new(config.clone(), weights)
    })?;
    let (weights, model) = (opened.weights, opened.model);

    // The positions are a table, and nothing reads what the last block's text would ask for.
    let last = format!("transformer_blocks.{}.attn.", settings.layers - 1);
    let idle = ["add_q_proj.", "norm_added_q."].map(|part| format!("{last}{part}"));
    let trained = weights
        .variables()
        .into_iter()
        .filter(|(name, _)| {
            name != "pos_embed.pos_embed" && !idle.iter().any(|idle| name.starts_with(idle))
        })
        .collect();
    let transformer = folder.join("transformer");
    let course = context.course(name, &settings.training, &transformer, trained);
    let step = |seen: usize, _spent: f64| {
        let mut lesson = lessons.lesson(seen, settings.condition_dropout)?;
        let texts = lessons.texts(&lesson.captions)?;
        let (latents, states) = (&lesson.latents, texts.joint()?);
        let (shape, device) = (latents.dims4()?, &context.device);
        let draw = schedule.draw(shape, Density::STANDARD, &mut lesson.generator, device)?;
        let loss = schedule.loss(
            latents,
            &draw,
            (LossForm::Velocity, Weighting::One),
            |noisy, timesteps| model.forward(noisy, timesteps, &states, &texts.clip.pooled),
        )?;
        Ok(Step {
            loss,
            figures: Vec::new(),
        })
    };
    course.run(step, || {
        write_configs(&folder, settings, &config, &schedule_config)?;
        files::write_weights(&file, &weights.variables())
    })
}

fn config(settings: &Sd3, lessons: &Lessons) -> Config {
    Config {
        sample_size: lessons.side,
        patch_size: settings.patch_size,
        in_channels: lessons.channels,
        out_channels: Some(lessons.channels),
        num_layers: settings.layers,
        attention_head_dim: settings.head_dim,
        num_attention_heads: settings.heads,
        joint_attention_dim: lessons.text.hidden_size,
        caption_projection_dim: settings.heads * settings.head_dim,
        pooled_projection_dim: lessons.text.projection_dim,
        pos_embed_max_size: lessons.side / settings.patch_size,
        qk_norm: settings.qk_norm.then_some(QkNorm::RmsNorm),
        ..Config::default()
    }
}

/// The weights of the trained MMDiT `which`.
///
/// # Errors
/// When it has not been trained.
pub(super) fn weights(context: &Context, which: Mmdit) -> Result<BTreeMap<String, Tensor>> {
    let file = network_file(&context.out.join(which.name()), "transformer");
    Ok(crate::files::read_tensors(&file)?.0)
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

fn write_configs(
    folder: &Path,
    settings: &Sd3,
    config: &Config,
    schedule: &SchedulerConfig,
) -> Result<()> {
    let t5 = |class: [&str; 2]| match settings.t5 {
        true => json!(class),
        false => Value::from([Value::Null, Value::Null].to_vec()),
    };
    files::write_json(
        &folder.join("model_index.json"),
        &json!({
            "_class_name": "StableDiffusion3Pipeline",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
            "text_encoder_2": [null, null],
            "text_encoder_3": t5(["transformers", "T5EncoderModel"]),
            "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
            "tokenizer_2": [null, null],
            "tokenizer_3": t5(["transformers", "PreTrainedTokenizerFast"]),
            "transformer": ["diffusers", "SD3Transformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }),
    )?;
    files::write_json(
        &folder.join("transformer/config.json"),
        &classed("SD3Transformer2DModel", config)?,
    )?;
    files::write_json(
        &folder.join("scheduler/scheduler_config.json"),
        &classed("FlowMatchEulerDiscreteScheduler", schedule)?,
    )
}
