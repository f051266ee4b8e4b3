//! The autoencoder, the denoiser, the schedule and the loss compute what diffusers computes, gradients included, on
//! the tiny checkpoints that `golden/diffusion.py` made.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use proxytune::Result;
use proxytune::diffusion::{
    FlowMatchEuler, Guidance, LossForm, SchedulerConfig, Spacing, TrainingDraw, Weighting,
};
use proxytune::models::autoencoder::{self, AutoencoderKl};
use proxytune::models::sd3::{
    self, Conditioning, LORA_TARGETS, SampleSettings, Sd3, Sd3Transformer,
};
use proxytune::nn::{self, Adapter, LoraConfig, Weights};
use safetensors::SafeTensors;

type Tensors = HashMap<String, Tensor>;

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(path)
}

fn load(path: PathBuf) -> Result<Tensors> {
    Ok(candle_core::safetensors::load(path, &Device::Cpu)?)
}

/// Relative L2 error.
fn error(got: &Tensor, want: &Tensor) -> Result<f64> {
    assert_eq!(got.dims(), want.dims());
    let norm = |t: &Tensor| -> Result<f64> {
        Ok(t.to_dtype(DType::F64)?
            .sqr()?
            .sum_all()?
            .to_scalar::<f64>()?
            .sqrt())
    };
    Ok(norm(&(got - want)?)? / norm(want)?.max(1e-12))
}

#[track_caller]
fn assert_close(got: &Tensor, want: &Tensor, tolerance: f64, what: &str) {
    let error = error(got, want).unwrap();
    assert!(error < tolerance, "{what}: relative error {error:.2e}");
}

/// Every `grad.NAME` of `reference` against the gradient of the variable of that name: 1e-3 of its own norm, with a
/// floor of 1e-6 of all of them together. Returns how many were compared.
fn assert_gradients(
    reference: &Tensors,
    grads: &GradStore,
    variables: &BTreeMap<String, Var>,
) -> usize {
    let norm = |t: &Tensor| {
        t.sqr()
            .unwrap()
            .sum_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap()
            .sqrt()
    };
    let wanted: Vec<(&str, &Tensor)> = reference
        .iter()
        .filter_map(|(key, tensor)| Some((key.strip_prefix("grad.")?, tensor)))
        .collect();
    let whole = wanted
        .iter()
        .map(|(_, t)| norm(t).powi(2))
        .sum::<f32>()
        .sqrt();
    for (name, want) in &wanted {
        let name = name.strip_prefix("transformer.").unwrap_or(name);
        let variable = variables
            .get(name)
            .unwrap_or_else(|| panic!("no variable {name}"));
        let got = grads
            .get(variable.as_tensor())
            .unwrap_or_else(|| panic!("no gradient reached {name}"));
        assert_eq!(got.dims(), want.dims(), "{name}");
        let difference = norm(&(got - *want).unwrap());
        let allowed = 1e-3 * norm(want) + 1e-6 * whole;
        assert!(
            difference <= allowed,
            "{name}: off by {difference:.2e}, its norm is {:.2e}",
            norm(want)
        );
    }
    wanted.len()
}

/// The adapter of a case with the values, rank and alpha that its file names.
fn read_adapter(path: &Path) -> (LoraConfig, BTreeMap<String, Tensor>) {
    let bytes = std::fs::read(path).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = header.metadata().as_ref().unwrap();
    let settings: serde_json::Value =
        serde_json::from_str(&metadata["lora_adapter_metadata"]).unwrap();
    let config = LoraConfig {
        rank: settings["transformer.r"].as_u64().unwrap() as usize,
        alpha: settings["transformer.lora_alpha"].as_f64().unwrap(),
        targets: LORA_TARGETS.map(String::from).to_vec(),
    };
    let tensors = load(path.to_path_buf())
        .unwrap()
        .into_iter()
        .map(|(name, tensor)| {
            (
                name.strip_prefix("transformer.").unwrap().to_string(),
                tensor,
            )
        })
        .collect();
    (config, tensors)
}

fn config<T: serde::de::DeserializeOwned>(path: PathBuf) -> T {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

struct Case {
    model: Sd3Transformer,
    weights: Weights,
    inputs: Tensors,
}

/// A denoiser with its adapter; with `train`, all of its own weights are trained as well.
fn open(name: &str, train: bool) -> Result<Case> {
    let folder = golden("sd3-transformer").join(name);
    let (lora, values) = read_adapter(&folder.join("adapter/pytorch_lora_weights.safetensors"));
    let adapter = Arc::new(Adapter::new(lora, 0));
    let files = [folder.join("model/diffusion_pytorch_model.safetensors")];
    let weights = if train {
        Weights::trainable(&files, 0, &Device::Cpu)?
    } else {
        Weights::from_files(&files, DType::F32, &Device::Cpu)?
    };
    let weights = weights.with_adapter(adapter.clone());
    let model = Sd3Transformer::new(config(folder.join("model/config.json")), &weights)?;
    weights.finish()?;
    assert!(weights.unused().is_empty(), "{:?}", weights.unused());
    adapter.load(&values)?;
    let inputs = load(folder.join("reference.safetensors"))?;
    Ok(Case {
        model,
        weights,
        inputs,
    })
}

impl Case {
    fn forward(&self) -> Result<Tensor> {
        let input = |name: &str| &self.inputs[&format!("input.{name}")];
        self.model.forward(
            input("hidden_states"),
            input("timestep"),
            input("encoder_hidden_states"),
            input("pooled_projections"),
        )
    }
}

#[test]
fn the_gradients_of_the_denoisers_own_weights_equal_diffusers() -> Result<()> {
    for name in ["sd3", "sd35"] {
        let case = open(name, true)?;
        let grads = (case.forward()? * &case.inputs["cotangent"])?
            .sum_all()?
            .backward()?;
        let reference = load(
            golden("sd3-transformer")
                .join(name)
                .join("base_gradients.safetensors"),
        )?;
        let variables: BTreeMap<String, Var> = case.weights.variables().into_iter().collect();
        assert!(assert_gradients(&reference, &grads, &variables) > 40);
        for (key, variable) in &variables {
            let has_gradient = grads.get(variable.as_tensor()).is_some();
            assert_eq!(has_gradient, key != "pos_embed.pos_embed", "{key}");
        }
    }
    Ok(())
}

#[test]
fn ten_guided_steps_end_where_diffusers_ends_and_leave_no_graph() -> Result<()> {
    for name in ["sd3", "sd35"] {
        let case = open(name, false)?;
        let sampling = load(
            golden("sd3-transformer")
                .join(name)
                .join("sampling.safetensors"),
        )?;
        let schedule = FlowMatchEuler::new(SchedulerConfig {
            shift: 3.0,
            ..SchedulerConfig::default()
        })?;
        let positive = Conditioning {
            context: case.inputs["input.encoder_hidden_states"].clone(),
            pooled: case.inputs["input.pooled_projections"].clone(),
        };
        let negative = Conditioning {
            context: sampling["negative_context"].clone(),
            pooled: sampling["negative_pooled"].clone(),
        };
        let guided = Some((&negative, Guidance::from(4.5)));
        let latents = sd3::denoise(
            &case.model,
            &schedule,
            &sampling["noise"],
            &positive,
            guided,
            10,
        )?;
        assert_close(&latents, &sampling["latents"], 1e-4, name);
        assert!(!latents.track_op());
    }
    Ok(())
}

#[test]
fn a_new_denoiser_starts_with_diffusers_table_of_positions() -> Result<()> {
    for name in ["sd3", "sd35"] {
        let folder = golden("sd3-transformer").join(name).join("model");
        let weights = Weights::trainable(&[], 3, &Device::Cpu)?;
        let model = Sd3Transformer::new(config(folder.join("config.json")), &weights)?;
        let published = load(folder.join("diffusion_pytorch_model.safetensors"))?;
        let mut names: Vec<String> = published.keys().cloned().collect();
        names.sort();
        let variables: BTreeMap<String, Var> = weights.variables().into_iter().collect();
        assert!(variables.keys().eq(names.iter()), "names equal diffusers'");
        let key = "pos_embed.pos_embed";
        assert_close(variables[key].as_tensor(), &published[key], 1e-6, key);

        // what stands in the variable is what the model computes with: it tells places apart from the start
        let c = model.config();
        let (side, batch) = (4 * c.patch_size, 1);
        let x = Tensor::zeros((batch, c.in_channels, side, side), DType::F32, &Device::Cpu)?;
        variables["proj_out.weight"].set(&variables["proj_out.weight"].ones_like()?)?;
        let context = Tensor::zeros((batch, 2, c.joint_attention_dim), DType::F32, &Device::Cpu)?;
        let pooled = Tensor::zeros((batch, c.pooled_projection_dim), DType::F32, &Device::Cpu)?;
        let scale = Tensor::arange(0f32, 2.0 * c.inner_dim() as f32, &Device::Cpu)?;
        variables["norm_out.linear.bias"].set(&scale)?;
        let y = model.forward(
            &x,
            &Tensor::zeros(1, DType::F32, &Device::Cpu)?,
            &context,
            &pooled,
        )?;
        let y = y.flatten_all()?.to_vec1::<f32>()?;
        assert!(y.iter().any(|v| (v - y[0]).abs() > 1e-3));
    }
    Ok(())
}

#[test]
fn the_autoencoder_and_all_its_gradients_equal_diffusers_both_ways() -> Result<()> {
    for name in ["kl-f2", "kl-f4-quant"] {
        let folder = golden("vae").join(name);
        let files = [folder.join("model/diffusion_pytorch_model.safetensors")];
        let weights = Weights::trainable(&files, 0, &Device::Cpu)?;
        let model = AutoencoderKl::new(config(folder.join("model/config.json")), &weights)?;
        weights.finish()?;
        assert!(weights.unused().is_empty(), "{:?}", weights.unused());
        let variables: BTreeMap<String, Var> = weights.variables().into_iter().collect();

        let encode = load(folder.join("reference.safetensors"))?;
        let extra = load(folder.join("base_gradients_sample.safetensors"))?;
        let (mean, logvar) = model.encode(&encode["input.sample"])?;
        assert_close(&mean, &encode["output"], 1e-4, "mean");
        assert_close(&logvar, &extra["logvar"], 1e-4, "logvar");
        let grads = (mean * &encode["cotangent"])?.sum_all()?.backward()?;
        assert!(assert_gradients(&extra, &grads, &variables) > 20);

        let decode = load(folder.join("reference_decode.safetensors"))?;
        let extra = load(folder.join("base_gradients_latents.safetensors"))?;
        let image = model.decode(&decode["input.latents"])?;
        assert_close(&image, &decode["output"], 1e-4, "image");
        let grads = (image * &decode["cotangent"])?.sum_all()?.backward()?;
        assert!(assert_gradients(&extra, &grads, &variables) > 20);

        let latents = &decode["input.latents"];
        assert_close(
            &model.unscale(&model.scale(latents)?)?,
            latents,
            1e-6,
            "scale and back",
        );
        assert!(
            model
                .encode(&Tensor::zeros((1, 3, 1, 8), DType::F32, &Device::Cpu)?)
                .is_err()
        );
    }
    Ok(())
}

#[test]
fn many_images_are_computed_in_slices_with_the_same_result() -> Result<()> {
    let config = autoencoder::Config {
        block_out_channels: vec![4, 4],
        norm_num_groups: 2,
        mid_block_add_attention: false,
        ..autoencoder::Config::default()
    };
    let model = AutoencoderKl::new(config, &Weights::trainable(&[], 1, &Device::Cpu)?)?;
    let latents = Tensor::randn(0f32, 1.0, (3, 4, 150, 160), &Device::Cpu)?;
    nn::no_grad(|| {
        let all = model.decode(&latents)?;
        let last = model.decode(&latents.narrow(0, 2, 1)?)?;
        assert_close(&all.narrow(0, 2, 1)?, &last, 1e-6, "the last image");
        Ok(())
    })
}

#[test]
fn the_schedule_equals_diffusers_to_the_bit() -> Result<()> {
    let reference = load(golden("scheduler/flow_match.safetensors"))?;
    for shift in [1.0, 3.0, 2.5] {
        let schedule = FlowMatchEuler::new(SchedulerConfig {
            shift,
            ..SchedulerConfig::default()
        })?;
        let want = |name: String| reference[&name].to_vec1::<f32>();
        assert_eq!(
            schedule.training_sigmas(),
            want(format!("training.{shift:?}"))?
        );
        for steps in [1, 4, 28] {
            let sigmas = schedule.sigmas(steps, 0, Spacing::Table)?;
            assert_eq!(sigmas, want(format!("sigmas.{shift:?}.{steps}"))?);
            let timesteps: Vec<f32> = sigmas[..steps]
                .iter()
                .map(|&s| schedule.timestep(s))
                .collect();
            assert_eq!(timesteps, want(format!("timesteps.{shift:?}.{steps}"))?);
        }
        assert!(schedule.sigmas(0, 0, Spacing::Table).is_err());
    }
    Ok(())
}

#[test]
fn a_step_and_both_forms_of_the_loss_equal_diffusers() -> Result<()> {
    let reference = load(golden("scheduler/flow_match.safetensors"))?;
    let schedule = FlowMatchEuler::new(SchedulerConfig {
        shift: 3.0,
        ..SchedulerConfig::default()
    })?;
    let sigmas = schedule.sigmas(28, 0, Spacing::Table)?;
    let (sample, velocity) = (&reference["step.sample"], &reference["step.velocity"]);
    let stepped = schedule.step(velocity, sample, sigmas[11], sigmas[12])?;
    assert_close(&stepped, &reference["step.output"], 1e-6, "step");

    let draw = TrainingDraw {
        indices: reference["loss.indices"]
            .to_vec1::<f32>()?
            .iter()
            .map(|&i| i as usize)
            .collect(),
        noise: reference["loss.noise"].clone(),
    };
    for (form, name) in [
        (LossForm::Preconditioned, "loss.preconditioned"),
        (LossForm::Velocity, "loss.velocity_target"),
    ] {
        let loss = schedule.loss(
            &reference["loss.latents"],
            &draw,
            (form, Weighting::One),
            |noisy, timesteps| {
                assert_close(noisy, &reference["loss.noisy"], 1e-6, "noisy latents");
                assert_close(timesteps, &reference["loss.timesteps"], 1e-7, "timesteps");
                Ok(reference["loss.velocity"].clone())
            },
        )?;
        assert_close(&loss.reshape(1)?, &reference[name], 1e-5, name);
    }
    Ok(())
}

fn open_pipeline(directory: &Path) -> Result<Sd3> {
    let weights = sd3::transformer_files(directory)?.open(DType::F32, &Device::Cpu)?;
    Sd3::open(directory, &weights)
}

/// A copy of the tiny pipeline whose JSON files `edit` may change.
fn copy_pipeline(edit: &dyn Fn(&str, &mut serde_json::Value)) -> tempfile::TempDir {
    fn copy(from: &Path, to: &Path, edit: &dyn Fn(&str, &mut serde_json::Value)) {
        std::fs::create_dir_all(to).unwrap();
        for entry in std::fs::read_dir(from).unwrap() {
            let path = entry.unwrap().path();
            let target = to.join(path.file_name().unwrap());
            if path.is_dir() {
                copy(&path, &target, edit);
            } else if path.extension().is_some_and(|e| e == "json") {
                let mut json = config(path.clone());
                edit(&path.display().to_string(), &mut json);
                std::fs::write(&target, json.to_string()).unwrap();
            } else {
                std::fs::copy(&path, &target).unwrap();
            }
        }
    }
    let directory = tempfile::tempdir().unwrap();
    copy(&golden("sd3-pipeline/tiny"), directory.path(), edit);
    directory
}

#[test]
fn prompts_become_the_conditioning_and_the_images_of_diffusers_pipeline_with_and_without_t5()
-> Result<()> {
    let reference = load(golden("sd3-pipeline/tiny/reference.safetensors"))?;
    let prompts = [
        "a photo of sks dog".to_string(),
        "a cat on the beach a cat on the beach a cat on the beach".to_string(),
    ];
    let without_t5 = copy_pipeline(&|path, json| {
        if path.ends_with("model_index.json") {
            json["text_encoder_3"] = serde_json::json!([null, null]);
            json.as_object_mut().unwrap().remove("tokenizer_3");
        }
    });
    let full = golden("sd3-pipeline/tiny");
    for (name, directory) in [
        ("with_t5", full.as_path()),
        ("without_t5", without_t5.path()),
    ] {
        let model = open_pipeline(directory)?;
        let want = |part: &str| &reference[&format!("{name}.{part}")];
        let conditioning = model.encode_prompts(&prompts)?;
        let context = &conditioning.context;
        assert_eq!(context.dims(), [2, 12 + 256, 28]);
        assert_close(&context.narrow(1, 0, 40)?, want("context"), 1e-4, "context");
        assert_close(
            &context.narrow(1, 40, 228)?.mean(1)?,
            want("rest"),
            1e-4,
            "the rest of it",
        );
        assert_close(&conditioning.pooled, want("pooled"), 1e-4, "pooled");
        let negative = model.encode_prompts(&[String::new()])?;
        let images = model.generate_from(&reference["noise"], &conditioning, &negative, 4, 3.0)?;
        assert_close(&images, want("images"), 1e-4, "images");
    }
    Ok(())
}

#[test]
fn a_transformer_as_wide_as_its_only_text_encoder_sees_that_alone() -> Result<()> {
    let directory = copy_pipeline(&|path, json| {
        if path.ends_with("model_index.json") {
            let index = json.as_object_mut().unwrap();
            index.retain(|key, _| !key.ends_with("_2") && !key.ends_with("_3"));
        }
        if path.ends_with("transformer/config.json") {
            json["joint_attention_dim"] = 16.into();
            json["pooled_projection_dim"] = 14.into();
        }
    });
    let weights = Weights::trainable(&[], 5, &Device::Cpu)?;
    let model = Sd3::open(directory.path(), &weights)?;
    let conditioning = model.encode_prompts(&["a dog".to_string()])?;
    assert_eq!(conditioning.context.dims(), [1, 12, 16]);
    assert_eq!(conditioning.pooled.dims(), [1, 14]);
    Ok(())
}

#[test]
fn an_image_depends_on_its_own_seed_and_prompt_and_not_on_its_batch() -> Result<()> {
    let model = open_pipeline(&golden("sd3-pipeline/tiny"))?;
    let settings = SampleSettings {
        num_inference_steps: 3,
        guidance_scale: 4.0,
        height: 8,
        width: 12,
        negative_prompt: String::new(),
    };
    let prompt = |text: &str| text.to_string();
    let pair = model.generate(&[prompt("a dog"), prompt("a cat")], &[1, 2], &settings)?;
    let other = model.generate(&[prompt("the beach"), prompt("a cat")], &[9, 2], &settings)?;
    let row = |images: &Tensor, i: usize| images.get(i)?.flatten_all()?.to_vec1::<f32>();
    assert_eq!(row(&pair, 1)?, row(&other, 1)?);
    assert_ne!(row(&pair, 0)?, row(&other, 0)?);
    assert_eq!(pair.dims(), [2, 3, 8, 12]);

    assert!(
        model
            .generate(&[prompt("a dog")], &[1, 2], &settings)
            .is_err()
    );
    let uneven = SampleSettings {
        width: 10,
        ..settings
    };
    let error = model
        .generate(&[prompt("a dog")], &[1], &uneven)
        .unwrap_err();
    assert!(
        error
            .hint()
            .is_some_and(|hint| hint.contains("multiples of 4")),
        "{error}"
    );
    Ok(())
}

#[test]
fn an_adapter_learns_from_the_training_loss_and_without_one_there_is_no_graph() -> Result<()> {
    use rand::SeedableRng;
    let directory = golden("sd3-pipeline/tiny");
    let adapter = Arc::new(Adapter::new(
        LoraConfig {
            rank: 4,
            alpha: 4.0,
            targets: LORA_TARGETS.map(String::from).to_vec(),
        },
        0,
    ));
    let files = sd3::transformer_files(&directory)?;
    let weights = files.open(DType::F32, &Device::Cpu)?;
    let model = Sd3::open(&directory, &weights.with_adapter(adapter.clone()))?;
    let images = Tensor::rand(-1f32, 1f32, (2, 3, 12, 12), &Device::Cpu)?;
    let (mean, logvar) = model.encode_images(&images)?;
    let conditioning = model.encode_prompts(&["a dog".to_string()])?.repeat(2)?;
    let loss = || -> Result<Tensor> {
        let mut generator = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        let latents = model.sample_latents(&mean, &logvar, &mut generator)?;
        model.loss(&latents, &conditioning, &mut generator)
    };
    let before = loss()?.to_scalar::<f32>()?;
    assert_eq!(
        before,
        loss()?.to_scalar::<f32>()?,
        "the generator decides everything"
    );
    for _ in 0..20 {
        let grads = loss()?.backward()?;
        for (_, variable) in adapter.variables() {
            if let Some(gradient) = grads.get(variable.as_tensor()) {
                variable.set(&(variable.as_tensor() - (gradient * 0.5)?)?)?;
            }
        }
    }
    let after = loss()?.to_scalar::<f32>()?;
    assert!(after < before, "{before} to {after}");

    let latents = Tensor::zeros((2, 3, 6, 6), DType::F32, &Device::Cpu)?;
    let mut generator = rand_chacha::ChaCha8Rng::seed_from_u64(1);
    let frozen = open_pipeline(&directory)?.loss(&latents, &conditioning, &mut generator)?;
    assert!(!frozen.track_op(), "frozen weights stay off the tape");
    Ok(())
}

#[test]
fn the_faults_of_all_components_are_reported_at_once() {
    let directory = copy_pipeline(&|path, json| {
        if path.ends_with("transformer/config.json") {
            json["num_layers"] = 3.into();
        }
        if path.ends_with("vae/config.json") {
            json["latent_channels"] = 4.into();
        }
    });
    let error = open_pipeline(directory.path())
        .map(|_| ())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("transformer_blocks.2.attn.to_q.weight"),
        "{error}"
    );
    assert!(error.contains("decoder.conv_in.weight"), "{error}");
}
