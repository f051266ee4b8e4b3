//! FLUX.1's transformer on the nano autoencoder's latents, distilled from a guided MMDiT as FLUX.1-dev is from a larger
//! model.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Tensor};
use rand::Rng;
use serde_json::json;

use super::context::Context;
use super::course::{Notes, Step};
use super::lessons::{Lessons, classed, furnish, network_file, projection};
use super::settings::Flux;
use super::teacher::Teacher;
use super::{files, sd3};
use crate::diffusion::{
    Density, FlowMatchEuler, LossForm, SchedulerConfig, TrainingDraw, Weighting,
};
use crate::models::flux::{Condition, Config, FluxTransformer, image_positions, pack, unpack};
use crate::{Error, Result};

/// T5's place among the text encoders.
const T5: usize = 2;

/// Latents per side of a token.
const PACKED: usize = 2;

/// Trains, or goes on training, `flux/transformer`. Needs what `sd35` needs, and the teacher.
pub fn train(context: &Context) -> Result<()> {
    let (settings, device) = (&context.settings.flux, &context.device);
    let folder = context.out.join("flux");
    let pixels = context.settings.side(&settings.training);
    furnish(context, &folder, pixels, &[("", false)], Some(T5))?;
    let file = network_file(&folder, "transformer");
    let notes = Notes::read(&folder.join("transformer/training.json"))?;
    let pool = (settings.pool, notes.images);
    let lessons = Lessons::open(
        context,
        ("flux", ""),
        &folder,
        &settings.training,
        pool,
        Some(T5),
    )?;
    let none = lessons.texts(&[String::new()])?;
    let joint = states(&none.t5)?.dim(2)?;
    let config = config(settings, &lessons, joint);
    let tokens = (lessons.side / PACKED).pow(2);
    // Pictures of this size are sampled at even levels, larger ones at more noise.
    let schedule_config = SchedulerConfig {
        use_dynamic_shifting: true,
        base_shift: 0.0,
        max_shift: 1.15,
        base_image_seq_len: tokens,
        max_image_seq_len: 16 * tokens,
        ..SchedulerConfig::default()
    };
    let schedule = FlowMatchEuler::new(schedule_config.clone())?;
    let teacher = settings
        .teacher
        .map(|which| Teacher::open(context, which, lessons.side, false))
        .transpose()?;
    let start = settings
        .start
        .map(|which| renamed(sd3::weights(context, which)?, &projection(context)?))
        .transpose()?;
    let opened = context.open_or_start("flux", &file, start, |weights| {
        FluxTransformer::new(config.clone(), weights)
    })?;
    let (weights, model) = (opened.weights, opened.model);
    let (transformer, trained) = (folder.join("transformer"), weights.variables());
    let course = context.course("flux", &settings.training, &transformer, trained);
    let [least, most] = settings.guidance;
    let positions = image_positions(lessons.side, lessons.side, device)?;
    let step = |seen: usize, _spent: f64| {
        let mut lesson = lessons.lesson(seen, 0.0)?;
        let texts = lessons.texts(&lesson.captions)?;
        let (shape, generator) = (lesson.latents.dims4()?, &mut lesson.generator);
        let mut draw = schedule.draw(shape, Density::STANDARD, generator, device)?;
        let mut latents = lesson.latents;
        let mut guidance = vec![1f32; shape.0];
        if let Some(teacher) = &teacher {
            guidance.fill_with(|| generator.random_range(least..=most) as f32);
            let table = schedule.training_sigmas();
            let sigmas: Vec<f32> = draw.indices.iter().map(|&index| table[index]).collect();
            let both = (&latents, &draw.noise);
            let (clean, noise) = teacher.answer(both, &sigmas, &texts, Some((&none, &guidance)))?;
            latents = clean;
            draw = TrainingDraw { noise, ..draw };
        }
        let states = states(&texts.t5)?;
        let guidance = Tensor::from_vec(guidance, shape.0, device)?;
        let loss = schedule.loss(
            &latents,
            &draw,
            (LossForm::Velocity, Weighting::One),
            |noisy, timesteps| {
                let condition = Condition {
                    timestep: &schedule.sigma(timesteps)?,
                    guidance: Some(&guidance),
                    encoder_hidden_states: states,
                    pooled_projections: &texts.clip.pooled,
                    txt_ids: &Tensor::zeros((states.dim(1)?, 3), DType::F32, device)?,
                    img_ids: &positions,
                };
                let packed = model.forward(&pack(noisy)?, &condition)?;
                unpack(&packed, lessons.side, lessons.side)
            },
        )?;
        Ok(Step {
            loss,
            figures: Vec::new(),
        })
    };
    course.run(step, || {
        write_configs(&folder, &config, &schedule_config)?;
        files::write_weights(&file, &weights.variables())
    })
}

fn states(t5: &Option<Tensor>) -> Result<&Tensor> {
    t5.as_ref().ok_or_else(|| Error::Invalid {
        what: "FLUX without a T5".into(),
        hint: None,
    })
}

fn config(settings: &Flux, lessons: &Lessons, joint: usize) -> Config {
    Config {
        in_channels: lessons.channels * PACKED * PACKED,
        num_layers: settings.layers,
        num_single_layers: settings.single_layers,
        attention_head_dim: settings.head_dim,
        num_attention_heads: settings.heads,
        joint_attention_dim: joint,
        pooled_projection_dim: lessons.text.projection_dim,
        guidance_embeds: true,
        sample_size: Some(lessons.side),
        axes_dims_rope: settings.axes.to_vec(),
        ..Config::default()
    }
}

/// The weights of an MMDiT that cuts patches of 2×2 latents, by FLUX's names and in its order of latents: both have the
/// same blocks for image and text, but for the last. FLUX reads the pooled state before its `projection`.
fn renamed(
    mut weights: BTreeMap<String, Tensor>,
    projection: &Tensor,
) -> Result<BTreeMap<String, Tensor>> {
    let pooled = "time_text_embed.text_embedder.linear_1.weight";
    if let Some(weight) = weights.remove(pooled) {
        let weight = weight.to_dtype(DType::F32)?.matmul(projection)?;
        weights.insert(pooled.into(), weight);
    }
    if let Some(weight) = weights.remove("pos_embed.proj.weight") {
        weights.insert("x_embedder.weight".into(), weight.flatten_from(1)?);
    }
    if let Some(bias) = weights.remove("pos_embed.proj.bias") {
        weights.insert("x_embedder.bias".into(), bias);
    }
    // An MMDiT gives the latents of a patch with their channels last, FLUX with them first.
    for name in ["proj_out.weight", "proj_out.bias"] {
        if let Some(tensor) = weights.remove(name) {
            let rows = tensor.dim(0)?;
            let turned = match rows.is_multiple_of(PACKED * PACKED) {
                true => tensor
                    .reshape((PACKED * PACKED, rows / (PACKED * PACKED), ()))?
                    .transpose(0, 1)?
                    .contiguous()?
                    .reshape(tensor.dims())?,
                false => tensor,
            };
            weights.insert(name.into(), turned);
        }
    }
    Ok(weights)
}

fn write_configs(folder: &Path, config: &Config, schedule: &SchedulerConfig) -> Result<()> {
    files::write_json(
        &folder.join("model_index.json"),
        &json!({
            "_class_name": "FluxPipeline",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
            "tokenizer_2": ["transformers", "PreTrainedTokenizerFast"],
            "transformer": ["diffusers", "FluxTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }),
    )?;
    files::write_json(
        &folder.join("transformer/config.json"),
        &classed("FluxTransformer2DModel", config)?,
    )?;
    files::write_json(
        &folder.join("scheduler/scheduler_config.json"),
        &classed("FlowMatchEulerDiscreteScheduler", schedule)?,
    )
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn an_mmdits_last_layer_gives_fluxs_order_of_latents() {
        // Two channels: rows of the MMDiT are (place, channel), of FLUX (channel, place).
        let rows = Tensor::arange(0f32, 8f32, &Device::Cpu).unwrap();
        let weights = BTreeMap::from([("proj_out.bias".to_string(), rows)]);
        let projection = Tensor::ones((1, 1), DType::F32, &Device::Cpu).unwrap();
        let turned = renamed(weights, &projection).unwrap();
        let turned = turned["proj_out.bias"].to_vec1::<f32>().unwrap();
        assert_eq!(turned, [0., 2., 4., 6., 1., 3., 5., 7.]);
    }
}
