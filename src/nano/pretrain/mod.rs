//! The training of the nano checkpoints from drawn scenes alone, in the layouts in which the families are published.
//!
//! Each file trains one model, and goes on from its checkpoint where there is one, with fresh moments and a warm-up:
//! nothing else is kept. [`clip`], [`dino`], [`vq`] and [`vae`] need nothing; [`gpt`] and [`chameleon`] need their VQ
//! tokenizer, [`sd3`] the autoencoder and CLIP's text tower. The newer diffusion models take the autoencoder and the
//! text encoders over, and begin with an MMDiT that is there or learn from it.

mod average;
pub mod chameleon;
mod checks;
pub mod clip;
pub mod context;
mod contrast;
pub mod course;
mod curves;
pub mod dino;
mod files;
pub mod flux;
mod frozen;
pub mod gpt;
mod lessons;
mod pool;
mod scenes;
pub mod sd3;
pub mod sdxl;
pub mod settings;
mod teacher;
pub mod vae;
pub mod vq;

pub use context::Context;
pub use contrast::area_under_curve;
pub use course::Budget;
pub use curves::Curves;
pub use settings::Settings;

use self::settings::Mmdit;
use crate::Result;

/// What can be trained, in an order that satisfies every need.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Model {
    Clip,
    Dino,
    Vq,
    Vae,
    Gpt,
    Sd3,
    Vqgan,
    Chameleon,
    Sd35,
    Flux,
    Sdxl,
}

impl Model {
    /// Every model, in order.
    pub const ALL: [Model; 11] = [
        Model::Clip,
        Model::Dino,
        Model::Vq,
        Model::Vae,
        Model::Gpt,
        Model::Sd3,
        Model::Vqgan,
        Model::Chameleon,
        Model::Sd35,
        Model::Flux,
        Model::Sdxl,
    ];

    /// The model's name on the command line and in the settings.
    pub fn name(self) -> &'static str {
        match self {
            Model::Clip => "clip",
            Model::Dino => "dino",
            Model::Vq => "vq",
            Model::Vae => "vae",
            Model::Gpt => "gpt",
            Model::Sd3 => "sd3",
            Model::Vqgan => "vqgan",
            Model::Chameleon => "chameleon",
            Model::Sd35 => "sd35",
            Model::Flux => "flux",
            Model::Sdxl => "sdxl",
        }
    }

    /// Trains the model for the context's budget.
    pub fn train(self, context: &Context) -> Result<()> {
        match self {
            Model::Clip => clip::train(context),
            Model::Dino => dino::train(context),
            Model::Vq => vq::train(context),
            Model::Vae => vae::train(context),
            Model::Gpt => gpt::train(context),
            Model::Sd3 => sd3::train(context, Mmdit::Sd3),
            Model::Vqgan => vq::train_chameleon(context),
            Model::Chameleon => chameleon::train(context),
            Model::Sd35 => sd3::train(context, Mmdit::Sd35),
            Model::Flux => flux::train(context),
            Model::Sdxl => sdxl::train(context),
        }
    }
}

/// The peak signal-to-noise ratio in dB of values in [−1, 1] with mean squared error `error`.
pub fn psnr(error: f64) -> f64 {
    10.0 * (4.0 / error.max(1e-12)).log10()
}
