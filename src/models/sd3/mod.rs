//! Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206) from a directory in diffusers' layout.

mod block;
mod files;
mod sampling;
mod transformer;

pub use block::JointTransformerBlock;
pub use sampling::denoise;
pub use transformer::{Config, LORA_TARGETS, QkNorm, Sd3Transformer};

use candle_core::Tensor;

use crate::Result;

/// What the denoiser knows of the prompts, one row for each.
#[derive(Debug, Clone)]
pub struct Conditioning {
    /// Token states (b, n, joint_attention_dim).
    pub context: Tensor,
    /// Pooled states (b, pooled_projection_dim).
    pub pooled: Tensor,
}

impl Conditioning {
    /// The rows of all parts, one after another; n must be equal.
    pub fn cat(parts: &[&Conditioning]) -> Result<Self> {
        let contexts: Vec<&Tensor> = parts.iter().map(|part| &part.context).collect();
        let pooled: Vec<&Tensor> = parts.iter().map(|part| &part.pooled).collect();
        Ok(Self {
            context: Tensor::cat(&contexts, 0)?,
            pooled: Tensor::cat(&pooled, 0)?,
        })
    }

    /// The single row of these repeated for `b` samples.
    pub fn repeat(&self, b: usize) -> Result<Self> {
        let parts = vec![self; b];
        Self::cat(&parts)
    }
}
