//! A trained MMDiT whose predictions another diffusion model learns. What the data say at a noise level is scattered
//! widely around its mean, which is what a model is to learn; a teacher gives the mean at once.

use candle_core::{DType, Tensor};

use super::context::Context;
use super::frozen;
use super::lessons::{Texts, projection};
use super::settings::Mmdit;
use crate::models::sd3::Sd3Transformer;
use crate::nn::no_grad;
use crate::{Error, Result};

/// Timesteps of the schedule.
const TIMESTEPS: f64 = 1000.0;

/// The teacher.
pub struct Teacher {
    transformer: Sd3Transformer,
    /// Projects the pooled state where the texts have it as it is.
    projection: Option<Tensor>,
}

impl Teacher {
    /// The MMDiT `which`, for latents of `side` and texts whose pooled state is `projected` or not.
    ///
    /// # Errors
    /// When it has not been trained, or on latents of another size.
    pub fn open(context: &Context, which: Mmdit, side: usize, projected: bool) -> Result<Self> {
        let folder = context.out.join(which.name()).join("transformer");
        let transformer = frozen::mmdit(&folder, &context.device)?;
        let own = transformer.config().sample_size;
        if own != side {
            return Err(Error::invalid(
                format!("the teacher {} knows latents {own} wide", which.name()),
                format!("give both the same image_size: the student's are {side} wide"),
            ));
        }
        let projection = match projected {
            true => None,
            false => Some(projection(context)?.t()?.contiguous()?),
        };
        Ok(Self {
            transformer,
            projection,
        })
    }

    /// `latents` and `noise` (b, c, h, w) as the teacher makes them out in their mixture at `sigmas`: the two whose
    /// mixture is the same, and whose difference is the teacher's velocity. `guided` are the texts of no prompt, one row,
    /// and a guidance scale for each sample.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn answer(
        &self,
        (latents, noise): (&Tensor, &Tensor),
        sigmas: &[f32],
        texts: &Texts,
        guided: Option<(&Texts, &[f32])>,
    ) -> Result<(Tensor, Tensor)> {
        let (b, device) = (latents.dim(0)?, latents.device());
        let timesteps = (Tensor::from_slice(sigmas, b, device)? * TIMESTEPS)?;
        let sigmas = Tensor::from_slice(sigmas, (b, 1, 1, 1), device)?;
        let rest = sigmas.affine(-1.0, 1.0)?;
        let noisy = (latents.broadcast_mul(&rest)? + noise.broadcast_mul(&sigmas)?)?;
        let (states, pooled) = (texts.joint()?, self.pooled(texts)?);
        let velocity = no_grad(|| -> Result<Tensor> {
            let Some((none, scales)) = guided else {
                return self
                    .transformer
                    .forward(&noisy, &timesteps, &states, &pooled);
            };
            let doubled = |x: &Tensor| Tensor::cat(&[x, x], 0);
            let both = self.transformer.forward(
                &doubled(&noisy)?,
                &doubled(&timesteps)?,
                &Tensor::cat(&[&states, &none.joint()?.repeat((b, 1, 1))?], 0)?,
                &Tensor::cat(&[&pooled, &self.pooled(none)?.repeat((b, 1))?], 0)?,
            )?;
            let (with, without) = (both.narrow(0, 0, b)?, both.narrow(0, b, b)?);
            let scales = Tensor::from_slice(scales, (b, 1, 1, 1), device)?;
            Ok((&without + (with - &without)?.broadcast_mul(&scales)?)?)
        })?;
        let velocity = velocity.to_dtype(DType::F32)?.detach();
        Ok((
            (&noisy - velocity.broadcast_mul(&sigmas)?)?,
            (&noisy + velocity.broadcast_mul(&rest)?)?,
        ))
    }

    fn pooled(&self, texts: &Texts) -> Result<Tensor> {
        let pooled = &texts.clip.pooled;
        match &self.projection {
            None => Ok(pooled.clone()),
            Some(projection) => Ok(pooled.matmul(projection)?),
        }
    }
}
