//! A whole pipeline: prompts and noise to latents and images.

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::reference::Inputs;
use super::runners::{Opened, Output, Place, Runner};
use crate::diffusion::Guidance;
use crate::files::read_json;
use crate::models::checkpoint_files::WeightFiles;
use crate::models::flux::FluxDenoiser;
use crate::models::latent_diffusion::{Denoiser, LatentDiffusion};
use crate::models::sd3::Mmdit;
use crate::models::sdxl::SdxlDenoiser;
use crate::{Error, Result, nn};

/// The file that says which pipeline a folder holds.
pub(super) const INDEX: &str = "model_index.json";

pub(super) fn open(place: &Place) -> Opened {
    let path = place.folder.join(INDEX);
    let index: Value = read_json(&path)?;
    match index.get("_class_name").and_then(Value::as_str) {
        Some("StableDiffusionXLPipeline") => of::<SdxlDenoiser>(place),
        Some("StableDiffusion3Pipeline") => of::<Mmdit>(place),
        Some("FluxPipeline") => of::<FluxDenoiser>(place),
        class => Err(Error::invalid(
            format!("{} is of {}", path.display(), class.unwrap_or("no class")),
            "StableDiffusionXLPipeline, StableDiffusion3Pipeline and FluxPipeline are known here",
        )),
    }
}

fn of<D: Denoiser + 'static>(place: &Place) -> Opened {
    let folder = place.folder.join(D::COMPONENT);
    let weights = place.open(WeightFiles::find(&folder, "diffusion_pytorch_model")?)?;
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
