//! The sampling loop of Stable Diffusion 3 on latents.

use candle_core::Tensor;

use super::{Conditioning, Sd3Transformer};
use crate::Result;
use crate::diffusion::{FlowMatchEuler, Spacing, guide};
use crate::nn;

/// Follows the flow from `noise` (b, c, h, w), f32, to latents of the same shape, scaled as the model sees them, in
/// `num_inference_steps` Euler steps. With `negative`, every step predicts without and with the text in one batch of
/// 2b and guides by `guidance_scale`; without it the prediction with the text is taken as it is. Records no graph.
/// Source: `StableDiffusion3Pipeline.__call__`.
pub fn denoise(
    transformer: &Sd3Transformer,
    schedule: &FlowMatchEuler,
    noise: &Tensor,
    conditioning: &Conditioning,
    negative: Option<(&Conditioning, f64)>,
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
        let patch = transformer.config().patch_size.max(1);
        let tokens = (noise.dim(2)? / patch) * (noise.dim(3)? / patch);
        schedule.follow(
            noise,
            num_inference_steps,
            tokens,
            Spacing::Table,
            |latents, sigma| {
                let timestep = Tensor::full(schedule.timestep(sigma), rows, noise.device())?;
                let copies = vec![latents; rows / b.max(1)];
                let input = Tensor::cat(&copies, 0)?.to_dtype(dtype)?;
                let velocity =
                    transformer.forward(&input, &timestep, &both.context, &both.pooled)?;
                match negative {
                    Some((_, guidance_scale)) => {
                        guide(&velocity.to_dtype(noise.dtype())?, guidance_scale)
                    }
                    None => Ok(velocity),
                }
            },
        )
    })
}
