//! How an adapter's run drew the samples that it was evaluated by: `sampling.json` beside the weights, which other
//! readers ignore. Whoever draws with the adapter draws so, too, unless told otherwise.

use std::path::Path;

use crate::config::{AutoregressiveSampling, DiffusionSampling, Family, Kind, Sampling};
use crate::console::shown;
use crate::files::{SETTINGS, read_text_if_there};
use crate::{Error, Result, files};

/// The file's name.
pub const SAMPLING: &str = "sampling.json";

/// Notes `sampling` in the folder `dir` of an adapter or a checkpoint.
pub fn write(dir: &Path, sampling: &Sampling) -> Result<()> {
    let text = serde_json::to_string_pretty(sampling).map_err(|e| Error::Invalid {
        what: format!("{SAMPLING}: {e}"),
        hint: None,
    })?;
    files::write(&dir.join(SAMPLING), format!("{text}\n").as_bytes())
}

/// What [`write`] noted in the folder `place`, or in that of the file `place`; `None` where nothing is.
///
/// # Errors
/// When the file cannot be read, is none of a model of this `family`, or has a number out of range.
pub fn read(place: &Path, family: Family) -> Result<Option<Sampling>> {
    let folder = match place.is_dir() {
        true => place,
        false => place.parent().unwrap_or(place),
    };
    let path = folder.join(SAMPLING);
    let fault = |what: String| {
        Error::invalid(
            format!("{}: {what}", shown(&path)),
            "is it the adapter of another kind of model? Else delete the file: pictures are then drawn with the model's defaults",
        )
    };
    let Some(text) = read_text_if_there(&path, SETTINGS)? else {
        return Ok(None);
    };
    let sampling = match family.kind() {
        Kind::Autoregressive => {
            serde_json::from_str::<AutoregressiveSampling>(&text).map(Sampling::Autoregressive)
        }
        Kind::Diffusion | Kind::Clip | Kind::Dino => {
            serde_json::from_str::<DiffusionSampling>(&text).map(Sampling::Diffusion)
        }
    };
    let sampling = sampling.map_err(|e| fault(e.to_string()))?;
    match is_usable(&sampling) {
        true => Ok(Some(sampling)),
        false => Err(fault("a number is out of range".into())),
    }
}

/// The ranges of pipeline files.
fn is_usable(sampling: &Sampling) -> bool {
    let guided = |scale: f64| scale >= 1.0 && scale.is_finite();
    match sampling {
        Sampling::Diffusion(sampling) => {
            let start = sampling.guidance_start.unwrap_or(0.0);
            let stop = sampling.guidance_stop.unwrap_or(1.0);
            guided(sampling.guidance_scale)
                && sampling.num_inference_steps > 0
                && 0.0 <= start
                && start < stop
                && stop <= 1.0
        }
        Sampling::Autoregressive(sampling) => {
            guided(sampling.guidance_scale)
                && sampling.top_p > 0.0
                && sampling.top_p <= 1.0
                && sampling.temperature >= 0.0
                && sampling.temperature.is_finite()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_noted_is_read_beside_the_folder_or_its_file_and_nothing_is_no_fault() {
        let place = tempfile::tempdir().unwrap();
        let weights = place.path().join("adapter_model.safetensors");
        assert_eq!(
            read(place.path(), crate::models::llamagen::FAMILY).unwrap(),
            None
        );
        let mut noted = crate::models::llamagen::FAMILY.sampling();
        if let Sampling::Autoregressive(sampling) = &mut noted {
            (sampling.guidance_scale, sampling.top_k) = (2.0, 100);
        }
        write(place.path(), &noted).unwrap();
        for at in [place.path(), &weights] {
            assert_eq!(
                read(at, crate::models::llamagen::FAMILY).unwrap(),
                Some(noted.clone())
            );
        }
        let error = read(place.path(), crate::models::sd3::FAMILY).unwrap_err();
        assert!(error.to_string().contains(SAMPLING), "{error}");
        let bad = r#"{"guidance_scale": 0.5, "top_k": 0, "top_p": 1, "temperature": 1}"#;
        std::fs::write(place.path().join(SAMPLING), bad).unwrap();
        let error = read(place.path(), crate::models::llamagen::FAMILY).unwrap_err();
        assert!(error.to_string().contains("out of range"), "{error}");
    }
}
