//! How good the nano checkpoints are, on scenes with individuals that no training saw.

use super::{Context, Model};
use crate::Result;

/// Prints the measures of `models`.
pub fn all(context: &Context, models: &[Model]) -> Result<()> {
    for model in models {
        match model {
            Model::Vq => {
                let (psnr, used) = super::vq::measure(context, 500)?;
                println!("vq: {psnr:.2} dB on 500 unseen scenes, {used} codes used");
            }
            Model::Vae => println!("vae: {:.2} dB on 500 unseen scenes", super::vae::measure(context, 500)?),
            _ => {}
        }
    }
    Ok(())
}
