//! SDXL's U-Net on the nano autoencoder's latents, with the nano CLIP's text tower as both of its text encoders.

use std::path::Path;

use candle_core::{Device, Tensor};
use serde_json::{Value, json};

use super::context::Context;
use super::course::{Notes, Step};
use super::files;
use super::lessons::{Lessons, Texts, furnish, network_file};
use super::settings::Sdxl;
use super::teacher::Teacher;
use crate::diffusion::{Ddpm, DiscreteConfig, TrainingDraw};
use crate::models::latent_diffusion::Framing;
use crate::models::sdxl::{Config, UNet, time_ids};
use crate::{Error, Result};

/// Trains, or goes on training, `sdxl/unet`. Needs `clip` and `sd3/vae`, and the teacher.
pub fn train(context: &Context) -> Result<()> {
    let (settings, device) = (&context.settings.sdxl, &context.device);
    let folder = context.out.join("sdxl");
    let pixels = context.settings.side(&settings.training);
    furnish(context, &folder, pixels, &[("", false), ("_2", true)], None)?;
    let file = network_file(&folder, "unet");
    let notes = Notes::read(&folder.join("unet/training.json"))?;
    let pool = (settings.pool, notes.images);
    let lessons = Lessons::open(
        context,
        ("sdxl", "_2"),
        &folder,
        &settings.training,
        pool,
        None,
    )?;
    let described = unet_json(settings, &lessons);
    let scheduler = scheduler_json(settings)?;
    let config: Config = parsed(&described)?;
    let discrete: DiscreteConfig = parsed(&scheduler)?;
    let schedule = Ddpm::new(&discrete)?;
    let teacher = settings
        .teacher
        .map(|which| Teacher::open(context, which, lessons.side, true))
        .transpose()?;
    let opened = context.open("sdxl", &file, |weights| UNet::new(config.clone(), weights))?;
    let (weights, model) = (opened.weights, opened.model);
    let (unet, trained) = (folder.join("unet"), weights.variables());
    let course = context.course("sdxl", &settings.training, &unet, trained);
    let count = settings.training.batch_size;
    let sizes = time_ids(&vec![Framing::whole(pixels, pixels); count], device)?;
    let step = |seen: usize, _spent: f64| {
        let mut lesson = lessons.lesson(seen, settings.condition_dropout)?;
        let texts = lessons.texts(&lesson.captions)?;
        let (context, pooled) = conditioning(&texts, &lesson.captions, device)?;
        let mut latents = lesson.latents;
        let mut draw = schedule.draw(latents.dims4()?, &mut lesson.generator, device)?;
        if let Some(teacher) = &teacher {
            let levels = schedule.alphas_cumprod();
            let sigmas: Vec<f32> = draw.indices.iter().map(|&i| sigma(levels[i])).collect();
            let both = (&latents, &draw.noise);
            let (clean, noise) = teacher.answer(both, &sigmas, &texts, None)?;
            latents = clean;
            draw = TrainingDraw { noise, ..draw };
        }
        let loss = schedule.loss(&latents, &draw, |noisy, timesteps| {
            model.forward(noisy, timesteps, &context, &pooled, &sizes)
        })?;
        Ok(Step {
            loss,
            figures: Vec::new(),
        })
    };
    course.run(step, || {
        write_configs(&folder, &described, &scheduler)?;
        files::write_weights(&file, &weights.variables())
    })
}

/// The share of noise of rectified flow whose mixture is, but for its length, that of a discrete schedule with `level`
/// of the sample's variance left.
fn sigma(level: f32) -> f32 {
    let (signal, grain) = (level.sqrt(), (1.0 - level).sqrt());
    grain / (signal + grain)
}

/// The states of both encoders side by side and the second's pooled ones; zeros where there is no caption, as SDXL has
/// them.
fn conditioning(texts: &Texts, captions: &[String], device: &Device) -> Result<(Tensor, Tensor)> {
    let kept: Vec<f32> = captions
        .iter()
        .map(|caption| f32::from(!caption.is_empty()))
        .collect();
    let kept = Tensor::from_vec(kept, (captions.len(), 1), device)?;
    let states = &texts.clip.penultimate;
    Ok((
        Tensor::cat(&[states, states], 2)?.broadcast_mul(&kept.unsqueeze(2)?)?,
        texts.clip.pooled.broadcast_mul(&kept)?,
    ))
}

fn parsed<T: serde::de::DeserializeOwned>(value: &Value) -> Result<T> {
    serde_json::from_value(value.clone()).map_err(|e| Error::Invalid {
        what: format!("a config of sdxl: {e}"),
        hint: None,
    })
}

fn unet_json(settings: &Sdxl, lessons: &Lessons) -> Value {
    let names = |with: &str, without: &str| -> Vec<String> {
        let name = |depth: &usize| if *depth > 0 { with } else { without };
        settings.depths.iter().map(name).map(String::from).collect()
    };
    let down = names("CrossAttnDownBlock2D", "DownBlock2D");
    let mut up = names("CrossAttnUpBlock2D", "UpBlock2D");
    up.reverse();
    let heads: Vec<usize> = settings
        .channels
        .iter()
        .map(|width| width / settings.head_dim)
        .collect();
    // A level without transformers has a depth all the same.
    let depths: Vec<usize> = settings.depths.iter().map(|&depth| depth.max(1)).collect();
    json!({
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": settings.size_channels,
        "attention_head_dim": heads,
        "block_out_channels": settings.channels,
        "cross_attention_dim": 2 * lessons.text.hidden_size,
        "down_block_types": down,
        "in_channels": lessons.channels,
        "layers_per_block": settings.layers_per_block,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-5,
        "norm_num_groups": settings.norm_groups,
        "out_channels": lessons.channels,
        "projection_class_embeddings_input_dim":
            lessons.text.projection_dim + 6 * settings.size_channels,
        "sample_size": lessons.side,
        "transformer_layers_per_block": depths,
        "up_block_types": up,
        "use_linear_projection": true,
    })
}

fn scheduler_json(settings: &Sdxl) -> Result<Value> {
    let prediction = serde_json::to_value(settings.prediction).map_err(|e| Error::Invalid {
        what: format!("sdxl.prediction: {e}"),
        hint: None,
    })?;
    Ok(json!({
        "_class_name": "EulerDiscreteScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "interpolation_type": "linear",
        "num_train_timesteps": 1000,
        "prediction_type": prediction,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "use_karras_sigmas": false,
    }))
}

fn write_configs(folder: &Path, unet: &Value, scheduler: &Value) -> Result<()> {
    files::write_json(
        &folder.join("model_index.json"),
        &json!({
            "_class_name": "StableDiffusionXLPipeline",
            "force_zeros_for_empty_prompt": true,
            "scheduler": ["diffusers", "EulerDiscreteScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
            "tokenizer_2": ["transformers", "PreTrainedTokenizerFast"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }),
    )?;
    files::write_json(&folder.join("unet/config.json"), unet)?;
    files::write_json(&folder.join("scheduler/scheduler_config.json"), scheduler)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_of_either_schedule_has_as_much_noise_for_its_signal() {
        for level in [0.9f32, 0.5, 0.01] {
            let sigma = sigma(level);
            let (flow, discrete) = (sigma / (1.0 - sigma), ((1.0 - level) / level).sqrt());
            assert!((flow - discrete).abs() < 1e-4 * discrete, "{level}");
        }
    }

    #[test]
    fn no_caption_is_told_by_zeros() {
        let ones =
            |shape: &[usize]| Tensor::ones(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
        let texts = Texts {
            clip: crate::models::clip::TextOutput {
                penultimate: ones(&[2, 3, 4]),
                pooled: ones(&[2, 5]),
            },
            t5: None,
        };
        let captions = ["a dog".to_string(), String::new()];
        let (context, pooled) = conditioning(&texts, &captions, &Device::Cpu).unwrap();
        assert_eq!(context.dims(), [2, 3, 8]);
        let sums = context.sum((1, 2)).unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(sums, [24.0, 0.0]);
        assert_eq!(pooled.sum(1).unwrap().to_vec1::<f32>().unwrap(), [5.0, 0.0]);
    }
}
