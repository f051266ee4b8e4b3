//! The sampling loop of Stable Diffusion XL on latents.

use candle_core::Tensor;

use super::{UNet, time_ids};
use crate::Result;
use crate::diffusion::{DiscreteConfig, Guidance, SamplerKind, dpm_solver_2m, euler, guide};
use crate::models::latent_diffusion::{Conditioning, Framing};
use crate::nn;

/// Latents of the shape of `noise` (b, c, h, w), f32, scaled as the model sees them, by the sampler that `schedule`
/// names. With `negative`, every guided step predicts without and with the text in one batch of 2b and guides by the
/// scale; in the others the prediction with the text is taken as it is. Records no graph. Source:
/// `StableDiffusionXLPipeline.__call__`.
pub fn denoise(
    unet: &UNet,
    schedule: &DiscreteConfig,
    noise: &Tensor,
    conditioning: &Conditioning,
    negative: Option<(&Conditioning, Guidance)>,
    framing: Framing,
    num_inference_steps: usize,
) -> Result<Tensor> {
    nn::no_grad(|| {
        let b = noise.dim(0)?;
        let both = match negative {
            Some((negative, _)) => Conditioning::cat(&[negative, conditioning])?,
            None => conditioning.clone(),
        };
        let rows = both.context.dim(0)?;
        let dtype = both.context.dtype();
        let time_ids = time_ids(&vec![framing; rows], noise.device())?;
        let mut steps = 0..num_inference_steps;
        let predict = |sample: &Tensor, timestep: f32| {
            let step = steps.next().unwrap_or_default();
            let guidance = negative.map(|(_, guidance)| guidance);
            let guidance = guidance.filter(|guidance| guidance.guides(step, num_inference_steps));
            let told = match guidance {
                Some(_) => &both,
                None => conditioning,
            };
            let rows = told.context.dim(0)?;
            let time_ids = time_ids.narrow(0, 0, rows)?;
            let timestep = Tensor::full(timestep, rows, noise.device())?;
            let copies = vec![sample; rows / b.max(1)];
            let input = Tensor::cat(&copies, 0)?.to_dtype(dtype)?;
            let output = unet.forward(&input, &timestep, &told.context, &told.pooled, &time_ids)?;
            let output = output.to_dtype(noise.dtype())?;
            match guidance {
                Some(guidance) => guide(&output, guidance.scale),
                None => Ok(output),
            }
        };
        match schedule.class_name {
            SamplerKind::DPMSolverMultistepScheduler => {
                dpm_solver_2m(schedule, num_inference_steps, noise, predict)
            }
            SamplerKind::EulerDiscreteScheduler | SamplerKind::Other => {
                let levels = schedule.levels(num_inference_steps)?;
                euler(&levels, schedule.prediction_type, noise, predict)
            }
        }
    })
}
