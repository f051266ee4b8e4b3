//! The autoencoder, the denoiser, the schedule and the loss compute what diffusers computes, gradients included, on
//! the tiny checkpoints that `golden/diffusion.py` made.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use proxytune::Result;
use proxytune::diffusion::{FlowMatchEuler, LossForm, SchedulerConfig, TrainingDraw};
use proxytune::models::autoencoder::{self, AutoencoderKl};
use proxytune::models::sd3::{self, Conditioning, LORA_TARGETS, Sd3Transformer};
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
        let got = match grads.get(variable.as_tensor()) {
            Some(gradient) => gradient.clone(),
            None => variable.as_tensor().zeros_like().unwrap(),
        };
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
    adapter: Arc<Adapter>,
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
        adapter,
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
fn the_denoiser_and_the_gradients_of_its_adapter_equal_diffusers() -> Result<()> {
    for name in ["sd3", "sd35"] {
        let case = open(name, false)?;
        let output = case.forward()?;
        assert_close(&output, &case.inputs["output"], 1e-4, name);
        let grads = (output * &case.inputs["cotangent"])?
            .sum_all()?
            .backward()?;
        let variables: BTreeMap<String, Var> = case.adapter.variables().into_iter().collect();
        let compared = assert_gradients(&case.inputs, &grads, &variables);
        assert_eq!(
            compared,
            variables.len(),
            "{name}: every factor has a reference"
        );
    }
    Ok(())
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
        assert!(
            grads
                .get(variables["pos_embed.pos_embed"].as_tensor())
                .is_none()
        );
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
        let guided = Some((&negative, 4.5));
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
                .encode(&Tensor::zeros((1, 3, 7, 8), DType::F32, &Device::Cpu)?)
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
            let sigmas = schedule.sigmas(steps)?;
            assert_eq!(sigmas, want(format!("sigmas.{shift:?}.{steps}"))?);
            let timesteps: Vec<f32> = sigmas[..steps]
                .iter()
                .map(|&s| schedule.timestep(s))
                .collect();
            assert_eq!(timesteps, want(format!("timesteps.{shift:?}.{steps}"))?);
        }
        assert!(schedule.sigmas(0).is_err());
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
    let sigmas = schedule.sigmas(28)?;
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
            form,
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
