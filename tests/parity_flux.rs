//! FLUX.1 against diffusers: one training step with an adapter, with and without class images. Its transformer and its
//! whole pipeline are compared by `verify`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use proxytune::Result;
use proxytune::diffusion::TrainingDraw;
use proxytune::models::flux::{Flux, FluxDenoiser, pack, unpack};
use proxytune::models::latent_diffusion::{Framing, network_files};
use proxytune::models::lora_file::LoraFile;
use proxytune::nn::{Adapter, recomputing};
use proxytune::training::TrainingLoop;
use proxytune::training::optimizer::{AdamWConfig, OptimizerConfig};

use crate::support::golden::{difference, load};

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(path)
}

fn adapted() -> Result<(Flux, Arc<Adapter>)> {
    let directory = golden("text-to-image/flux/model");
    let file = LoraFile::read(&golden("flux-training/dev/adapter"))?;
    let adapter = Arc::new(Adapter::from_factors(file.layers, str::to_string));
    let files = network_files::<FluxDenoiser>(&directory)?;
    let weights = files.open(DType::F32, &Device::Cpu)?;
    let model = Flux::open(&directory, &weights.with_adapter(adapter.clone()))?;
    Ok((model, adapter))
}

#[test]
fn a_training_step_with_and_without_prior_preservation_equals_the_scripts() -> Result<()> {
    let step = load(golden("flux-training/dev/step.safetensors"));
    let adamw = OptimizerConfig::AdamW(AdamWConfig {
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 1e-4,
        decay_vectors: true,
    });
    let indices: Vec<usize> = step["indices"]
        .to_dtype(DType::F32)?
        .to_vec1::<f32>()?
        .into_iter()
        .map(|index| index as usize)
        .collect();
    for (name, prior) in [("alone", None), ("with_prior", Some(0.7))] {
        for recomputes in [false, true] {
            let (model, adapter) = adapted()?;
            let (mean, logvar) = model.encode_images(&step["pixels"])?;
            let sample = (mean + ((logvar * 0.5)?.exp()? * &step["posterior_noise"])?)?;
            let latents = model.vae().scale(&sample)?;
            let prompts = ["a sks dog", "a sks dog", "a dog", "a dog"].map(String::from);
            let conditioning = model.encode_prompts(&prompts)?;
            let draw = TrainingDraw {
                indices: indices.clone(),
                noise: step["noise"].clone(),
            };
            let half = |range: std::ops::Range<usize>| -> Result<Tensor> {
                let latents = latents.narrow(0, range.start, range.len())?;
                let framings = vec![Framing::whole(16, 24); range.len()];
                let (conditioning, draw) = (conditioning.rows(range.clone())?, draw.rows(range)?);
                recomputing(recomputes, || {
                    model.loss_at(&latents, &conditioning, &framings, &draw)
                })
            };
            let mut loss = half(0..2)?;
            if let Some(weight) = prior {
                loss = (loss + (half(2..4)? * weight)?)?;
            }
            let off = difference(&loss.reshape(1)?, &step[&format!("{name}.loss")]);
            assert!(off < 1e-4, "loss {name}: {off:e}");
            let mut training = TrainingLoop::new(adapter.variables(), &adamw, Some(1.0))?;
            training.step(0, 1e-2, 1, |_| Ok(loss.clone()))?;
            let variables = adapter.variables();
            assert_eq!(variables.len(), step.len() / 2 - 3);
            for (key, variable) in variables {
                let off = difference(variable.as_tensor(), &step[&format!("{name}.{key}")]);
                assert!(off < 1e-3, "{name} {key}: {off:e}");
            }
        }
    }
    Ok(())
}

#[test]
fn packed_latents_are_unpacked_to_what_they_were() -> Result<()> {
    let latents = Tensor::arange(0f32, 2. * 3. * 4. * 6., &Device::Cpu)?.reshape((2, 3, 4, 6))?;
    let packed = pack(&latents)?;
    assert_eq!(packed.dims(), [2, 6, 12]);
    // The four latents of the first patch, channel by channel.
    let first: Vec<f32> = packed.get(0)?.get(0)?.to_vec1()?;
    assert_eq!(first[..4], [0., 1., 6., 7.]);
    assert_eq!(difference(&unpack(&packed, 4, 6)?, &latents), 0.0);
    assert!(pack(&latents.narrow(2, 0, 3)?).is_err());
    Ok(())
}
