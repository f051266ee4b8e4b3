//! How an evaluator wants its pictures: resize, crop, mean and deviation. The choice moves scores, so it has a name
//! that the report prints.

use std::path::Path;

use candle_core::{Device, Tensor};
use image::RgbImage;
use serde_json::Value;

use crate::images::{
    Filter, MAX_PIXELS, center_crop, normalized, resize_and_crop, resize_exact, resize_short_side,
    short_side,
};
use crate::models::limits::SIDE;
use crate::{Error, Result, files};

const CLIP_MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_7];
const CLIP_STD: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];
const IMAGENET_MEAN: [f32; 3] = [0.485, 0.456, 0.406];
const IMAGENET_STD: [f32; 3] = [0.229, 0.224, 0.225];

/// What happens to a picture's size before the crop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resize {
    /// The short side becomes this long, the aspect is kept.
    ShortSide(u32),
    /// Exactly this width and height, whatever the aspect.
    Exact(u32, u32),
}

/// The steps from a picture to an evaluator's input.
#[derive(Debug, Clone, PartialEq)]
pub struct Preprocessing {
    /// For the report, for example `official: short side 256 bicubic, crop 224x224`.
    pub name: String,
    pub resize: Option<Resize>,
    pub filter: Filter,
    /// Width and height of the middle part that is kept.
    pub crop: Option<(u32, u32)>,
    /// Per channel, of values in [0, 1].
    pub mean: [f32; 3],
    pub std: [f32; 3],
}

impl Preprocessing {
    /// CLIP's own (github.com/openai/CLIP, `clip.py`): short side `image_size` bicubic, crop, CLIP's mean and deviation.
    pub fn clip(image_size: u32) -> Self {
        Self {
            name: String::new(),
            resize: Some(Resize::ShortSide(image_size)),
            filter: Filter::Bicubic,
            crop: Some((image_size, image_size)),
            mean: CLIP_MEAN,
            std: CLIP_STD,
        }
        .named("official")
    }

    /// DINO's own (github.com/facebookresearch/dino, `eval_knn.py`; DreamBench++ uses the same): short side 256
    /// bicubic, crop 224, ImageNet's mean and deviation; for another `image_size` the short side keeps that ratio.
    pub fn dino(image_size: u32) -> Self {
        Self {
            name: String::new(),
            resize: Some(Resize::ShortSide(image_size * 256 / 224)),
            filter: Filter::Bicubic,
            crop: Some((image_size, image_size)),
            mean: IMAGENET_MEAN,
            std: IMAGENET_STD,
        }
        .named("official")
    }

    /// As `preprocessor_config.json` in the checkpoint at `directory` says, or `official` when there is no such file.
    /// Fails when the file is not JSON or asks for something unknown.
    pub fn from_checkpoint(directory: &Path, official: Preprocessing) -> Result<Self> {
        let path = directory.join("preprocessor_config.json");
        let Some(text) = files::read_text_if_there(&path, files::SETTINGS)? else {
            return Ok(official);
        };
        parse(&text, &official).map_err(|fault| Error::Checkpoint {
            path,
            faults: vec![fault],
        })
    }

    fn named(mut self, origin: &str) -> Self {
        let resize = match self.resize {
            Some(Resize::ShortSide(side)) => format!("short side {side} {}", self.filter.name()),
            Some(Resize::Exact(w, h)) => format!("squashed to {w}x{h} {}", self.filter.name()),
            None => "as they are".to_string(),
        };
        let crop = match self.crop {
            Some((w, h)) => format!(", crop {w}x{h}"),
            None => String::new(),
        };
        self.name = format!("{origin}: {resize}{crop}");
        self
    }

    /// `images`, of any sizes, as (b, 3, h, w) f32. Fails when the steps lead to different sizes.
    pub fn apply(&self, images: &[RgbImage], device: &Device) -> Result<Tensor> {
        let prepared = images.iter().map(|image| self.prepare(image));
        self.normalize(&prepared.collect::<Result<Vec<_>>>()?, device)
    }

    /// `prepared` pictures ([`Self::prepare`]) as (b, 3, h, w) f32. Fails when the sizes differ.
    pub fn normalize(&self, prepared: &[RgbImage], device: &Device) -> Result<Tensor> {
        normalized(prepared, self.mean, self.std, device)
    }

    /// `image`, of any size, at the size of the model's input. Fails where nothing is cropped and a strip would become
    /// larger than any photo.
    pub fn prepare(&self, image: &RgbImage) -> Result<RgbImage> {
        Ok(match (self.resize, self.crop) {
            (Some(Resize::ShortSide(side)), Some(crop)) => {
                resize_and_crop(image, side, self.filter, crop)
            }
            (Some(Resize::ShortSide(side)), None) => {
                let (width, height) = short_side(image, side);
                if width * height > MAX_PIXELS {
                    return Err(Error::invalid(
                        format!("a picture that would be resized to {width}×{height} pixels"),
                        "take strips out of the folder, or give the evaluator a crop_size",
                    ));
                }
                resize_short_side(image, side, self.filter)
            }
            (Some(Resize::Exact(width, height)), crop) => {
                let resized = resize_exact(image, width, height, self.filter);
                match crop {
                    Some((width, height)) => center_crop(&resized, width, height),
                    None => resized,
                }
            }
            (None, Some((width, height))) => center_crop(image, width, height),
            (None, None) => image.clone(),
        })
    }
}

/// Reads the fields that transformers' image processors write; what is absent keeps the value of `official`.
fn parse(text: &str, official: &Preprocessing) -> Result<Preprocessing, String> {
    let config: Value = serde_json::from_str(text).map_err(|e| format!("not JSON: {e}"))?;
    let enabled = |key: &str| config.get(key).and_then(Value::as_bool).unwrap_or(true);
    // A bare number is the short side for CLIP's processor and both sides for ViT's.
    let squashes = ["image_processor_type", "feature_extractor_type"]
        .iter()
        .filter_map(|key| config.get(key).and_then(Value::as_str))
        .any(|kind| kind.starts_with("ViT"));
    let resize = match config.get("size") {
        _ if !enabled("do_resize") => None,
        None | Some(Value::Null) => official.resize,
        Some(size) => Some(match (sides(size), size.get("shortest_edge")) {
            (_, Some(side)) => Resize::ShortSide(number(side, "size.shortest_edge")?),
            (Some((w, h)), None) if size.is_object() || squashes => Resize::Exact(w, h),
            (Some((side, _)), None) => Resize::ShortSide(side),
            (None, None) => return Err(format!("size {size} is not understood")),
        }),
    };
    let crop = match config.get("crop_size") {
        _ if config.get("do_center_crop") == Some(&Value::Bool(false)) => None,
        // ViT's processor has no crop at all.
        None | Some(Value::Null) if matches!(resize, Some(Resize::Exact(..))) => None,
        None | Some(Value::Null) => official.crop,
        Some(size) => Some(sides(size).ok_or(format!("crop_size {size} is not understood"))?),
    };
    let filter = match config.get("resample").and_then(Value::as_u64) {
        None => official.filter,
        Some(1) => Filter::Lanczos,
        Some(2) => Filter::Bilinear,
        Some(3) => Filter::Bicubic,
        Some(4) => Filter::Box,
        Some(other) => {
            return Err(format!(
                "resample {other} is not supported (1 Lanczos, 2 bilinear, 3 bicubic, 4 box)"
            ));
        }
    };
    if let Some(factor) = config.get("rescale_factor").and_then(Value::as_f64)
        && (factor * 255.0 - 1.0).abs() > 1e-3
    {
        return Err(format!(
            "rescale_factor {factor} is not supported, only 1/255"
        ));
    }
    let (mean, std) = if enabled("do_normalize") {
        (
            triple(&config, "image_mean", official.mean)?,
            triple(&config, "image_std", official.std)?,
        )
    } else {
        ([0.0; 3], [1.0; 3])
    };
    if let (Some(Resize::ShortSide(side)), Some((w, h))) = (resize, crop)
        && side < w.max(h)
    {
        return Err(format!(
            "crop_size {w}x{h} is larger than the short side, {side}"
        ));
    }
    Ok(Preprocessing {
        name: String::new(),
        resize,
        filter,
        crop,
        mean,
        std,
    }
    .named("preprocessor_config.json"))
}

/// Width and height of `n` or `{"height": h, "width": w}`.
fn sides(size: &Value) -> Option<(u32, u32)> {
    let side = |value: &Value| pixels(value);
    match size {
        Value::Number(_) => side(size).map(|s| (s, s)),
        _ => Some((side(size.get("width")?)?, side(size.get("height")?)?)),
    }
}

/// A side that images may be brought to.
fn pixels(value: &Value) -> Option<u32> {
    let side = value.as_u64()?.try_into().ok()?;
    SIDE.contains(&(side as usize)).then_some(side)
}

fn number(value: &Value, key: &str) -> Result<u32, String> {
    pixels(value).ok_or(format!("{key} {value} is not a size in pixels"))
}

fn triple(config: &Value, key: &str, default: [f32; 3]) -> Result<[f32; 3], String> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(default),
        Some(value) => serde_json::from_value(value.clone())
            .map_err(|_| format!("{key} {value} is not three numbers")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_of_clip_and_of_vit_are_understood_in_their_old_and_new_forms() {
        let official = Preprocessing::clip(224);
        let old = r#"{"crop_size":224,"do_center_crop":true,"do_resize":true,"feature_extractor_type":"CLIPFeatureExtractor",
            "image_mean":[0.5,0.4,0.3],"image_std":[0.1,0.2,0.3],"resample":3,"size":224}"#;
        let parsed = parse(old, &official).unwrap();
        assert_eq!(parsed.resize, Some(Resize::ShortSide(224)));
        assert_eq!(parsed.crop, Some((224, 224)));
        assert_eq!(parsed.mean, [0.5, 0.4, 0.3]);
        let new = r#"{"crop_size":{"height":32,"width":32},"size":{"shortest_edge":36}}"#;
        let parsed = parse(new, &official).unwrap();
        assert_eq!(parsed.resize, Some(Resize::ShortSide(36)));
        assert_eq!(parsed.crop, Some((32, 32)));
        assert_eq!(parsed.mean, CLIP_MEAN);
        let vit = r#"{"feature_extractor_type":"ViTFeatureExtractor","resample":2,"size":224}"#;
        let parsed = parse(vit, &Preprocessing::dino(224)).unwrap();
        assert_eq!(parsed.resize, Some(Resize::Exact(224, 224)));
        assert_eq!(parsed.crop, None);
        assert_eq!(parsed.filter, Filter::Bilinear);
        assert_eq!(
            parsed.name,
            "preprocessor_config.json: squashed to 224x224 bilinear"
        );
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        let official = Preprocessing::clip(224);
        for text in [
            "not json",
            r#"{"size":"large"}"#,
            r#"{"resample":0}"#,
            r#"{"image_mean":[1,2]}"#,
            r#"{"size":0}"#,
            r#"{"size":{"shortest_edge":4294967295},"crop_size":32}"#,
            r#"{"size":{"height":32,"width":100000}}"#,
            r#"{"rescale_factor":1.0}"#,
            r#"{"size":{"shortest_edge":16},"crop_size":32}"#,
        ] {
            assert!(parse(text, &official).is_err(), "{text}");
        }
    }

    #[test]
    fn without_a_file_the_official_steps_hold_and_keep_their_ratio() {
        let directory = tempfile::tempdir().unwrap();
        let dino = Preprocessing::from_checkpoint(directory.path(), Preprocessing::dino(224));
        assert_eq!(
            dino.unwrap().name,
            "official: short side 256 bicubic, crop 224x224"
        );
        assert_eq!(Preprocessing::dino(28).resize, Some(Resize::ShortSide(32)));
        let wide = RgbImage::new(90, 60);
        let input = Preprocessing::clip(32)
            .apply(&[wide], &Device::Cpu)
            .unwrap();
        assert_eq!(input.dims(), [1, 3, 32, 32]);
    }
}
