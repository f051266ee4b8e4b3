//! The sampling loop of Stable Diffusion 3 on latents.

use candle_core::Tensor;

use super::{Conditioning, Sd3Transformer};
use crate::Result;
use crate::diffusion::{FlowMatchEuler, Guidance, Spacing, guide};
use crate::nn;

/// Follows the flow from `noise` (b, c, h, w), f32, to latents of the same shape, scaled as the model sees them, in
/// `num_inference_steps` Euler steps. With `negative`, every guided step predicts without and with the text in one batch of
/// 2b and guides by the scale; in the others the prediction with the text is taken as it is. Records no graph.
/// Source: `StableDiffusion3Pipeline.__call__`.
pub fn denoise(
    transformer: &Sd3Transformer,
    schedule: &FlowMatchEuler,
    noise: &Tensor,
    conditioning: &Conditioning,
    negative: Option<(&Conditioning, Guidance)>,
    num_inference_steps: usize,
) -> Result<Tensor> {
    nn::no_grad(|| {
        let b = noise.dim(0)?;
        let both = match negative {
            Some((negative, _)) => Conditioning::cat(&[negative, conditioning])?,
            None => conditioning.clone(),
        };
        let dtype = both.context.dtype();
        let patch = transformer.config().patch_size.max(1);
        let tokens = (noise.dim(2)? / patch) * (noise.dim(3)? / patch);
        let mut steps = 0..num_inference_steps;
        schedule.follow(
            noise,
            num_inference_steps,
            tokens,
            Spacing::Table,
            |latents, sigma| {
                let step = steps.next().unwrap_or_default();
                let guidance = negative.map(|(_, guidance)| guidance);
                let guidance =
                    guidance.filter(|guidance| guidance.guides(step, num_inference_steps));
                let told = match guidance {
                    Some(_) => &both,
                    None => conditioning,
                };
                let rows = told.context.dim(0)?;
                let timestep = Tensor::full(schedule.timestep(sigma), rows, noise.device())?;
                let copies = vec![latents; rows / b.max(1)];
                let input = Tensor::cat(&copies, 0)?.to_dtype(dtype)?;
                let velocity =
                    transformer.forward(&input, &timestep, &told.context, &told.pooled)?;
                match guidance {
                    Some(guidance) => guide(&velocity.to_dtype(noise.dtype())?, guidance.scale),
                    None => Ok(velocity),
                }
            },
        )
    })
}
