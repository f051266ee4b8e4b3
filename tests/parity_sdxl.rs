//! Stable Diffusion XL's schedules, samplers, loss and training step are diffusers', on what `golden/sdxl.py` made, and
//! its learner behaves as every other. The denoiser and the whole pipeline are compared by `verify`.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use proxytune::Result;
use proxytune::config::{DiffusionSampling, Dtype, Memory, Sampling};
use proxytune::diffusion::{
    Ddpm, DiscreteConfig, PredictionType, SamplerKind, TrainingDraw, dpm_solver_2m, euler,
};
use proxytune::models::latent_diffusion::{Conditioning, Framing, network_files};
use proxytune::models::sdxl::{Sdxl, SdxlDenoiser};
use proxytune::models::{Example, Learner, LearnerOptions, Request, TrainingExample, Tuning, open};
use proxytune::nn::{Adapter, LoraConfig, backward, recomputing};
use proxytune::training::TrainingLoop;
use proxytune::training::optimizer::{AdamWConfig, OptimizerConfig};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::support::copy_tree;

/// As diffusers' scripts have it.
const ADAMW: OptimizerConfig = OptimizerConfig::AdamW(AdamWConfig {
    beta1: 0.9,
    beta2: 0.999,
    epsilon: 1e-8,
    weight_decay: 1e-4,
    decay_vectors: true,
});

type Tensors = HashMap<String, Tensor>;

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(path)
}

fn pipeline(name: &str) -> PathBuf {
    golden("text-to-image").join(name).join("model")
}

fn load(path: PathBuf) -> Tensors {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

#[track_caller]
fn assert_close(got: &Tensor, want: &Tensor, tolerance: f64, what: &str) {
    assert_eq!(got.dims(), want.dims(), "{what}");
    let norm = |t: &Tensor| -> f64 {
        let t = t.to_dtype(DType::F64).unwrap().sqr().unwrap();
        t.sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt()
    };
    let error = norm(&(got - want).unwrap()) / norm(want).max(1e-12);
    assert!(error < tolerance, "{what}: relative error {error:.2e}");
}

/// The schedules of `golden/scheduler/discrete.safetensors`, by name.
fn schedules() -> (BTreeMap<String, DiscreteConfig>, Tensors) {
    let path = golden("scheduler/discrete.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = header.metadata().clone().unwrap();
    let configs = metadata
        .into_iter()
        .filter(|(name, _)| name != "format")
        .map(|(name, text)| (name, serde_json::from_str(&text).unwrap()))
        .collect();
    (configs, load(path))
}

#[test]
fn levels_of_every_spacing_equal_diffusers() -> Result<()> {
    let (schedules, reference) = schedules();
    assert!(schedules.len() > 8);
    for (name, config) in &schedules {
        let alphas = Ddpm::new(config)?.alphas_cumprod().to_vec();
        let every: Vec<f32> = alphas.iter().copied().step_by(37).collect();
        let every = Tensor::new(every, &Device::Cpu)?;
        let want = &reference[&format!("{name}.alphas_cumprod")];
        assert_close(&every, want, 1e-6, name);
        for steps in [1, 7, 20] {
            let levels = config.levels(steps)?;
            let of = |what: &str| &reference[&format!("{name}.{steps}.{what}")];
            let what = format!("{name} in {steps} steps");
            let timesteps = Tensor::new(levels.timesteps, &Device::Cpu)?;
            assert_close(&timesteps, of("timesteps"), 1e-5, &what);
            let sigmas = Tensor::new(levels.sigmas, &Device::Cpu)?;
            assert_close(&sigmas, of("sigmas"), 1e-5, &what);
        }
        assert!(config.levels(0).is_err());
    }
    Ok(())
}

#[test]
fn samplers_end_where_diffusers_end_for_every_prediction_and_number_of_steps() -> Result<()> {
    let (schedules, reference) = schedules();
    let noise = &reference["noise"];
    let predict = |sample: &Tensor, timestep: f32| {
        Ok((sample.tanh()? * (0.5 + f64::from(timestep) / 2000.0))?)
    };
    for (name, config) in &schedules {
        for steps in [1, 7, 20] {
            let sample = match config.class_name {
                SamplerKind::DPMSolverMultistepScheduler => {
                    dpm_solver_2m(config, steps, noise, predict)?
                }
                _ => euler(
                    &config.levels(steps)?,
                    config.prediction_type,
                    noise,
                    predict,
                )?,
            };
            let want = &reference[&format!("{name}.{steps}.sample")];
            // Where the signal is zero at first, σ is 4096, and f32 leaves four digits of its products.
            let tolerance = if name.contains("zero-snr") {
                1e-3
            } else {
                1e-4
            };
            assert_close(
                &sample,
                want,
                tolerance,
                &format!("{name} in {steps} steps"),
            );
        }
    }
    Ok(())
}

#[test]
fn the_loss_of_every_prediction_with_and_without_min_snr_equals_the_scripts() -> Result<()> {
    let (_, reference) = schedules();
    let draw = TrainingDraw {
        indices: reference["loss.timesteps"]
            .to_vec1::<f32>()?
            .iter()
            .map(|&t| t as usize)
            .collect(),
        noise: reference["loss.noise"].clone(),
    };
    for (prediction, name) in [
        (PredictionType::Epsilon, "epsilon"),
        (PredictionType::VPrediction, "v_prediction"),
        (PredictionType::Sample, "sample"),
    ] {
        let config = serde_json::json!({
            "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": name,
        });
        let config: DiscreteConfig = serde_json::from_value(config).unwrap();
        assert_eq!(config.prediction_type, prediction);
        let plain = Ddpm::new(&config)?;
        let mut weighted = plain.clone();
        weighted.snr_gamma = Some(5.0);
        for (schedule, name) in [(plain, name.to_string()), (weighted, format!("{name}.snr"))] {
            let loss = schedule.loss(&reference["loss.latents"], &draw, |noisy, timesteps| {
                assert_close(noisy, &reference["loss.noisy"], 1e-6, "noisy latents");
                assert_close(timesteps, &reference["loss.timesteps"], 1e-7, "timesteps");
                Ok(reference["loss.output"].clone())
            })?;
            let want = &reference[&format!("loss.{name}")];
            assert_close(&loss.reshape(1)?, want, 1e-5, &name);
        }
    }
    Ok(())
}

/// The model of the training step with its adapter, as diffusers saved it.
fn adapted() -> Result<(Sdxl, Arc<Adapter>)> {
    let directory = pipeline("sdxl-euler");
    let file =
        proxytune::models::lora_file::LoraFile::read(&golden("sdxl-training/epsilon/adapter"))?;
    let adapter = Arc::new(Adapter::from_factors(file.layers, str::to_string));
    let files = network_files::<SdxlDenoiser>(&directory)?;
    let weights = files.open(DType::F32, &Device::Cpu)?;
    let model = Sdxl::open(&directory, &weights.with_adapter(adapter.clone()))?;
    Ok((model, adapter))
}

/// Four pictures of two prompts: latents, conditioning, framings and what is drawn for them.
fn example(
    model: &Sdxl,
    step: &Tensors,
) -> Result<(Tensor, Conditioning, Vec<Framing>, TrainingDraw)> {
    let (mean, logvar) = model.encode_images(&step["pixels"])?;
    let sample = (mean + ((logvar * 0.5)?.exp()? * &step["posterior_noise"])?)?;
    let prompts = ["a sks dog", "a sks dog", "a dog", "a dog"].map(String::from);
    let pairs = |name: &str| -> Result<Vec<[usize; 2]>> {
        let rows = step[name].to_vec2::<f32>()?;
        Ok(rows
            .iter()
            .map(|row| [row[0] as usize, row[1] as usize])
            .collect())
    };
    let framings = pairs("originals")?.into_iter().zip(pairs("crops")?);
    let framings = framings.map(|(original, crop)| Framing {
        original,
        crop,
        target: [16, 24],
    });
    let timesteps = step["timesteps"].to_vec1::<f32>()?;
    Ok((
        model.vae().scale(&sample)?,
        model.encode_prompts(&prompts)?,
        framings.collect(),
        TrainingDraw {
            indices: timesteps.iter().map(|&t| t as usize).collect(),
            noise: step["noise"].clone(),
        },
    ))
}

#[test]
fn a_training_step_with_and_without_prior_preservation_equals_the_scripts() -> Result<()> {
    let step = load(golden("sdxl-training/epsilon/step.safetensors"));
    for (name, prior) in [("alone", None), ("with_prior", Some(0.7))] {
        for recomputes in [false, true] {
            let (model, adapter) = adapted()?;
            let (latents, conditioning, framings, draw) = example(&model, &step)?;
            let half = |range: std::ops::Range<usize>| {
                let latents = latents.narrow(0, range.start, range.len())?;
                let (conditioning, draw) =
                    (conditioning.rows(range.clone())?, draw.rows(range.clone())?);
                recomputing(recomputes, || {
                    model.loss_at(&latents, &conditioning, &framings[range], &draw)
                })
            };
            let mut loss = half(0..2)?;
            if let Some(weight) = prior {
                loss = (loss + (half(2..4)? * weight)?)?;
            }
            let what = format!("loss {name}");
            let want = &step[&format!("{name}.loss")];
            assert_close(&loss.reshape(1)?, want, 1e-4, &what);
            let mut training = TrainingLoop::new(adapter.variables(), &ADAMW, Some(1.0))?;
            training.step(0, 1e-2, 1, |_| Ok(loss.clone()))?;
            assert_eq!(adapter.variables().len(), step.len() / 2 - 4);
            for (key, variable) in adapter.variables() {
                let want = &step[&format!("{name}.{key}")];
                assert_close(variable.as_tensor(), want, 1e-3, &format!("{name} {key}"));
            }
        }
    }
    Ok(())
}

fn opening(model: &str, tuning: Tuning, memory: Memory) -> LearnerOptions {
    LearnerOptions {
        dir: pipeline(model),
        name: "tiny".into(),
        family: proxytune::models::sdxl::FAMILY,
        resolution: None,
        tuning,
        seed: 3,
        device: Device::Cpu,
        dtype: Dtype::F32,
        memory,
        dropout: 0.0,
        condition_dropout: 0.0,
    }
}

fn lora() -> Tuning {
    Tuning::Lora(LoraConfig {
        rank: 2,
        alpha: 3.0,
        targets: proxytune::models::sdxl::FAMILY.training().targets,
    })
}

fn pictures(learner: &dyn Learner) -> Vec<image::RgbImage> {
    let side = learner.resolution();
    (0..3u8)
        .map(|i| {
            image::RgbImage::from_fn(side, side, |x, y| {
                image::Rgb([40 * i + 3 * x as u8, 9 * y as u8, 200 - 5 * (x + y) as u8])
            })
        })
        .collect()
}

/// Loss and gradients of three pairs, of which one has no prompt.
fn learnt(learner: &mut dyn Learner) -> Result<(f32, Vec<Vec<f32>>)> {
    let examples = learner.encode(&pictures(learner))?;
    let pairs: Vec<TrainingExample> = examples
        .into_iter()
        .zip(["a sks dog", "", "a cat"])
        .map(|(example, prompt)| TrainingExample {
            example,
            prompt: prompt.into(),
        })
        .collect();
    let loss = learner.loss(&pairs, &mut ChaCha8Rng::seed_from_u64(5))?;
    let gradients = backward(&loss)?;
    let of = |(name, v): &(String, Var)| {
        let gradient = gradients
            .get(v)
            .unwrap_or_else(|| panic!("{name} has no gradient"));
        Ok(gradient.flatten_all()?.to_vec1::<f32>()?)
    };
    let gradients = learner.variables().iter().map(of).collect::<Result<_>>()?;
    Ok((loss.to_scalar()?, gradients))
}

#[test]
fn an_adapter_learns_is_saved_for_diffusers_and_comes_back() -> Result<()> {
    let mut learner = open(&opening("sdxl-dpm", lora(), Memory::Fast))?;
    let variables = learner.variables();
    // Every attention's four layers, each with two factors; a level with two transformers of two blocks and one in the
    // middle of two.
    assert_eq!(variables.len(), (1 + 2 + 1) * 2 * 2 * 4 * 2);
    let (before, _) = learnt(learner.as_mut())?;
    let mut training = TrainingLoop::new(variables.clone(), &ADAMW, Some(1.0))?;
    let examples = learner.encode(&pictures(learner.as_ref()))?;
    let pairs: Vec<TrainingExample> = examples
        .into_iter()
        .map(|example| TrainingExample {
            example,
            prompt: "a sks dog".into(),
        })
        .collect();
    for _ in 0..10 {
        let loss = learner.loss(&pairs, &mut ChaCha8Rng::seed_from_u64(5))?;
        training.step(0, 1e-2, 1, |_| Ok(loss.clone()))?;
    }
    let (after, _) = learnt(learner.as_mut())?;
    assert!(after < before, "{before} to {after}");

    let place = tempfile::tempdir().unwrap();
    let values = proxytune::models::snapshot(&variables)?;
    learner.save(place.path(), &values)?;
    let written = load(place.path().join("pytorch_lora_weights.safetensors"));
    assert_eq!(written.len(), variables.len());
    assert!(written.keys().all(|name| name.starts_with("unet.")));
    let mut other = open(&opening("sdxl-dpm", lora(), Memory::Fit))?;
    let read = other.read(place.path())?;
    for (name, variable) in other.variables() {
        variable.set(&read[&name])?;
        assert_close(&read[&name], &values[&name], 1e-6, &name);
    }
    // Blocks that run again give equal gradients.
    let (kept, again) = (learnt(learner.as_mut())?, learnt(other.as_mut())?);
    assert!((kept.0 - again.0).abs() < 1e-6 * kept.0.abs());
    let flat = |gradients: Vec<Vec<f32>>| Tensor::new(gradients.concat(), &Device::Cpu);
    assert_close(&flat(again.1)?, &flat(kept.1)?, 1e-4, "gradients");
    Ok(())
}

#[test]
fn all_weights_of_the_denoiser_get_a_gradient() -> Result<()> {
    let mut learner = open(&opening("sdxl-euler", Tuning::Full, Memory::Fast))?;
    let (_, gradients) = learnt(learner.as_mut())?;
    assert!(
        gradients
            .iter()
            .all(|g| { g.iter().all(|v| v.is_finite()) && g.iter().any(|v| *v != 0.0) })
    );
    Ok(())
}

#[test]
fn an_image_depends_on_its_own_seed_and_prompt_and_on_what_it_is_guided_away_from() -> Result<()> {
    for model in ["sdxl-euler", "sdxl-dpm"] {
        let mut learner = open(&opening(model, Tuning::Frozen, Memory::Fast))?;
        let mut draw = |requests: &[(&str, u64)], negative: &str| {
            let requests: Vec<Request> = requests
                .iter()
                .map(|(prompt, seed)| Request {
                    prompt: prompt.to_string(),
                    seed: *seed,
                })
                .collect();
            let sampling = Sampling::Diffusion(DiffusionSampling {
                guidance_scale: 4.0,
                num_inference_steps: 3,
                negative_prompt: negative.into(),
                guidance_start: None,
                guidance_stop: None,
            });
            learner.generate(&requests, &sampling).unwrap()
        };
        let pair = draw(&[("a dog", 1), ("a cat", 2)], "");
        let other = draw(&[("the sks", 9), ("a cat", 2)], "");
        assert_eq!(pair[1], other[1]);
        assert_ne!(pair[0], other[0]);
        assert_ne!(draw(&[("a cat", 2)], "a dog")[0], pair[1]);
        assert_eq!(pair[0].dimensions(), (16, 16));
    }
    Ok(())
}

#[test]
fn no_prompt_is_zeros_or_what_the_encoders_say_of_nothing_as_the_checkpoint_has_it() -> Result<()> {
    for (model, zeros) in [("sdxl-euler", true), ("sdxl-dpm", false)] {
        let directory = pipeline(model);
        let files = network_files::<SdxlDenoiser>(&directory)?;
        let weights = files.open(DType::F32, &Device::Cpu)?;
        let model = Sdxl::open(&directory, &weights)?;
        let none = model.condition("")?;
        let sum = |t: &Tensor| t.abs()?.sum_all()?.to_scalar::<f32>();
        assert_eq!(sum(&none.context)? == 0.0, zeros);
        assert_eq!(sum(&none.pooled)? == 0.0, zeros);
        let empty = model.encode_prompts(&[String::new()])?;
        assert!(sum(&empty.context)? > 0.0);
    }
    Ok(())
}

#[test]
fn the_denoiser_is_told_the_size_of_the_photo() -> Result<()> {
    let mut learner = open(&opening("sdxl-euler", lora(), Memory::Fast))?;
    let examples = learner.encode(&pictures(learner.as_ref()))?;
    let mut loss = |original: [usize; 2]| -> Result<f32> {
        let pairs: Vec<TrainingExample> = examples
            .iter()
            .map(|example| TrainingExample {
                example: example.clone().of_original(original),
                prompt: "a dog".into(),
            })
            .collect();
        let loss = learner.loss(&pairs, &mut ChaCha8Rng::seed_from_u64(5))?;
        Ok(loss.to_scalar()?)
    };
    assert_eq!(loss([16, 16])?, loss([16, 16])?);
    assert_ne!(loss([16, 16])?, loss([400, 300])?);
    assert!(matches!(examples[0], Example::Latents { .. }));
    Ok(())
}

#[test]
fn the_faults_of_all_components_are_reported_at_once() {
    let place = tempfile::tempdir().unwrap();
    let model = place.path().join("model");
    copy_tree(&pipeline("sdxl-euler"), &model);
    let edit = |file: &str, key: &str, value: serde_json::Value| {
        let path = model.join(file);
        let text = std::fs::read_to_string(&path).unwrap();
        let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
        json[key] = value;
        std::fs::write(&path, json.to_string()).unwrap();
    };
    edit(
        "unet/config.json",
        "transformer_layers_per_block",
        serde_json::json!([1, 3]),
    );
    edit("vae/config.json", "latent_channels", 3.into());
    edit("text_encoder_2/config.json", "num_hidden_layers", 3.into());
    let mut opening = opening("sdxl-euler", Tuning::Frozen, Memory::Fast);
    opening.dir = model;
    let error = open(&opening).map(|_| ()).unwrap_err().to_string();
    for part in [
        "mid_block.attentions.0.transformer_blocks.2.attn1.to_q.weight",
        "decoder.conv_in.weight",
        "encoder.layers.2",
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
}
