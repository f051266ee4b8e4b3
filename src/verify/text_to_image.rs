//! A whole pipeline: prompts and noise to latents and images.

use std::path::Path;

use serde::de::DeserializeOwned;

use super::reference::Inputs;
use super::runners::{Opened, Output, Place, Runner};
use crate::diffusion::Guidance;
use crate::hub::parts::Parts;
use crate::models::flux::FluxDenoiser;
use crate::models::latent_diffusion::{Denoiser, LatentDiffusion, network_files};
use crate::models::registry::family_of;
use crate::models::sd3::Mmdit;
use crate::models::sdxl::SdxlDenoiser;
use crate::models::{flux, sd3, sdxl};
use crate::{Error, Result, nn};

/// The file that says which pipeline a folder holds.
pub(super) const INDEX: &str = "model_index.json";

/// Whether a pipeline lies at `place`.
pub(super) fn is_in(place: &Path) -> bool {
    place.join(INDEX).is_file() || Parts::find(place).is_ok_and(|parts| parts.is_some())
}

pub(super) fn open(place: &Place) -> Opened {
    match family_of(&place.folder)? {
        Some(family) if family == sdxl::FAMILY => of::<SdxlDenoiser>(place),
        Some(family) if family == sd3::FAMILY => of::<Mmdit>(place),
        Some(family) if family == flux::FAMILY => of::<FluxDenoiser>(place),
        _ => Err(Error::invalid(
            format!(
                "{} is no pipeline that is known here",
                place.folder.display()
            ),
            "StableDiffusionXLPipeline, StableDiffusion3Pipeline and FluxPipeline are, and single files of their families",
        )),
    }
}

fn of<D: Denoiser + 'static>(place: &Place) -> Opened {
    let weights = place.open(network_files::<D>(&place.folder)?)?;
    let model = LatentDiffusion::<D>::open(&place.folder, &weights)?;
    Ok((Box::new(model), weights))
}

impl<D: Denoiser> Runner for LatentDiffusion<D> {
    fn run(&self, inputs: &Inputs<'_>) -> Result<Vec<Output>> {
        let (height, width): (usize, usize) = (needed(inputs, "height")?, needed(inputs, "width")?);
        let f = self.vae().config().downscale();
        let given = inputs.exact("latents")?;
        let noise = self.denoiser.taken_over(&given, height / f, width / f)?;
        let (b, _, h, w) = noise.dims4()?;
        if (height / f, width / f) != (h, w) {
            return Err(Error::invalid(
                format!(
                    "input.latents of shape {:?} for {width}×{height} pixels",
                    given.dims()
                ),
                format!("(b, channels, height / {f}, width / {f}) is expected"),
            ));
        }
        let prompts: Vec<String> = needed(inputs, "prompt")?;
        let negatives: Option<Vec<String>> = inputs.setting("negative_prompt")?;
        let counts = [Some(prompts.len()), negatives.as_ref().map(Vec::len)];
        if counts.into_iter().flatten().any(|count| count != b) {
            return Err(Error::invalid(
                format!("{counts:?} prompts and negative prompts for {b} latents"),
                "give one of each for each row of input.latents, or no negative ones",
            ));
        }
        let length = inputs.setting("max_sequence_length")?;
        let (conditioning, negative) = nn::no_grad(|| -> Result<_> {
            let negative = match &negatives {
                Some(prompts) => self.denoiser.encode(prompts, length)?,
                None => self.denoiser.unconditional(length)?,
            };
            Ok((self.denoiser.encode(&prompts, length)?, negative))
        })?;
        let guidance = Guidance {
            scale: needed(inputs, "guidance_scale")?,
            start: inputs.setting("guidance_start")?.unwrap_or(0.0),
            stop: inputs.setting("guidance_stop")?.unwrap_or(1.0),
        };
        let latents = self.denoise(
            &noise,
            &conditioning,
            &negative,
            needed(inputs, "num_inference_steps")?,
            guidance,
        )?;
        let image = self.decode(&latents)?.affine(0.5, 0.5)?;
        Ok(vec![
            Output::numbers(&["latents"], self.denoiser.handed_over(&latents)?),
            Output::numbers(&["image"], image),
        ])
    }
}

fn needed<T: DeserializeOwned>(inputs: &Inputs<'_>, name: &str) -> Result<T> {
    inputs.setting(name)?.ok_or_else(|| {
        Error::invalid(
            format!("the reference file's metadata has no {name}"),
            "prompt, height, width, num_inference_steps and guidance_scale are needed, as JSON",
        )
    })
}
