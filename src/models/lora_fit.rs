//! Whether all of an adapter has its place in a model. What has none is named, with what kind of file it is: half an
//! adapter, or none, would draw the untouched model without a word.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Tensor};

use super::lora_file::LoraFile;
use crate::console::{escaped, shown};
use crate::nn::Factors;
use crate::{Error, Result};

/// Kinds of faults that are told; of more there is the number.
const TOLD: usize = 24;

/// How adapters are named that other programs write, by a part of the names, and what to do with them.
const KINDS: [(&str, &str); 18] = [
    ("hada_", "this is LoHa of LyCORIS; only LoRA can be applied"),
    ("lokr_", "this is LoKr of LyCORIS; only LoRA can be applied"),
    (".oft_", "this is OFT; only LoRA can be applied"),
    (
        ".lora_mid",
        "this is LoCon with a core tensor; only LoRA can be applied",
    ),
    ("dora_scale", "this is DoRA; only LoRA can be applied"),
    (
        "lora_magnitude_vector",
        "this is DoRA; only LoRA can be applied",
    ),
    (".diff ", DIFFERENCES),
    (".diff_b", DIFFERENCES),
    ("lora_te", TEXT),
    ("text_encoder", TEXT),
    ("text_model.", TEXT),
    (
        "lora_unet_",
        "these are kohya's names, of no layer of SDXL, SD3 or FLUX.1: name the model that it was trained with",
    ),
    (
        "lora_transformer_",
        "these are kohya's names, of no layer of SD3 or FLUX.1: name the model that it was trained with",
    ),
    (
        "single_transformer_blocks.",
        "its layers are those of FLUX: name the model that it was trained with",
    ),
    ("down_blocks.", UNET),
    ("up_blocks.", UNET),
    (
        "transformer_blocks.",
        "its layers are those of a transformer of diffusers, as SD3's: name the model that it was trained with",
    ),
    (
        "self_attn.",
        "its layers are those of a language model of transformers, as Lumina-mGPT's: name the model that it was trained with",
    ),
];
const DIFFERENCES: &str = "these are whole differences, no factors; only LoRA can be applied";
const UNET: &str =
    "its layers are those of the UNet of SD or SDXL: name the model that it was trained with";
const TEXT: &str = "factors of text encoders are among it, which keep their own weights here: train the denoiser alone";

const TRAINED_WITH: &str = "use the checkpoint that the adapter was trained with";

impl LoraFile {
    /// Fails unless every layer has its place: `places` are the model's layers, by the file's names for them, with the
    /// shapes of their weights. Where the file's configuration lists its targets, every layer that it means must have
    /// factors, too.
    ///
    /// # Errors
    /// Names the first layers that do not fit, and what the file seems to be.
    pub fn check_fit(&self, places: &BTreeMap<String, Vec<usize>>) -> Result<()> {
        let mut faults = Vec::new();
        let mut homeless = None;
        for (layer, factors) in &self.layers {
            match places.get(layer) {
                None => {
                    homeless.get_or_insert(layer);
                    faults.push(format!("{}: the model has no such layer", escaped(layer)));
                }
                Some(shape) if *shape != changed(factors) => faults.push(format!(
                    "{}: the adapter is for a weight of shape {:?}, the model's has {shape:?}",
                    escaped(layer),
                    changed(factors)
                )),
                Some(_) => {}
            }
        }
        if !faults.is_empty() {
            let (count, all) = (faults.len(), self.layers.len());
            let what = format!(
                "{}: the adapter does not fit the model: {count} of its {all} layers have no place there\n  {}",
                shown(&self.path),
                brief(&faults)
            );
            let hint = homeless.map_or(TRAINED_WITH.into(), |layer| hint(layer, places));
            return Err(Error::invalid(what, hint));
        }
        let lacking: Vec<String> = places
            .keys()
            .filter(|place| !self.layers.contains_key(*place) && self.is_target(place))
            .map(|place| format!("{place} has no factors in the file"))
            .collect();
        if lacking.is_empty() {
            return Ok(());
        }
        Err(Error::invalid(
            format!(
                "{}: the adapter does not fit the model: its configuration names {} layers more than it has factors for\n  {}",
                shown(&self.path),
                lacking.len(),
                brief(&lacking)
            ),
            "the file is not whole, or of a model with fewer layers",
        ))
    }

    /// Fails where there are whole weights beside the factors, which only a merge can compare with the model's.
    ///
    /// # Errors
    /// With their names.
    pub fn check_alone(&self) -> Result<()> {
        let whole = self.whole.keys();
        let faults: Vec<String> = whole
            .map(|name| format!("{name} is a whole weight"))
            .collect();
        if faults.is_empty() {
            return Ok(());
        }
        Err(Error::invalid(
            format!("{}: {}", shown(&self.path), brief(&faults)),
            "proxytune merge works other adapters into a checkpoint, which is named as the model",
        ))
    }

    fn is_target(&self, place: &str) -> bool {
        self.targets.iter().flatten().any(|target| {
            let rest = place.strip_suffix(target.as_str());
            rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        })
    }
}

/// The shape of the weight that `factors` change.
pub(super) fn changed(factors: &Factors) -> Vec<usize> {
    let mut shape = factors.a.dims().to_vec();
    shape[0] = factors.b.dims()[0];
    shape
}

/// `faults`, a line for all that differ in the numbers of their blocks alone, and how many more there are.
pub(super) fn brief(faults: &[String]) -> String {
    let mut kinds: Vec<(String, &String, usize)> = Vec::new();
    for fault in faults {
        let kind = numberless(fault);
        match kinds.iter_mut().find(|(known, ..)| *known == kind) {
            Some((_, _, more)) => *more += 1,
            None => kinds.push((kind, fault, 0)),
        }
    }
    let told = kinds.iter().take(TOLD).map(|(_, fault, more)| match more {
        0 => fault.to_string(),
        more => format!("{fault} (and {more} more of other blocks)"),
    });
    let mut lines: Vec<String> = told.collect();
    let more: usize = kinds.iter().skip(TOLD).map(|(_, _, more)| more + 1).sum();
    lines.extend((more > 0).then(|| format!("and {more} more")));
    lines.join("\n  ")
}

/// `text` without the numbers of blocks in the name that it begins with.
fn numberless(text: &str) -> String {
    let (name, rest) = text.split_at(text.find([' ', ':']).unwrap_or(text.len()));
    let parts = name.split_inclusive(['.', '_']).map(|part| {
        let (number, end) = part.split_at(part.trim_end_matches(['.', '_']).len());
        let is_number = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
        format!("{}{end}", if is_number { "N" } else { number })
    });
    parts.collect::<String>() + rest
}

/// What a file seems to be in which `name` stands, if that can be told.
pub(super) fn kind(name: &str) -> Option<&'static str> {
    let found = KINDS.iter().find(|(part, _)| name.contains(part));
    found.map(|(_, hint)| *hint)
}

/// What to do about `layer`, which the model does not have.
fn hint(layer: &str, places: &BTreeMap<String, Vec<usize>>) -> String {
    let ends = |long: &str, short: &str| {
        let prefix = long.strip_suffix(short);
        prefix
            .filter(|prefix| prefix.ends_with('.'))
            .map(String::from)
    };
    for place in places.keys() {
        if let Some(prefix) = ends(layer, place) {
            let prefix = escaped(&prefix).into_owned();
            return format!(
                "the model calls this layer {place}: take {prefix} out of the names in the file"
            );
        }
        if let Some(prefix) = ends(place, layer) {
            return format!(
                "the model calls this layer {place}: put {prefix} before the names in the file"
            );
        }
    }
    let alike: BTreeSet<String> = places.keys().map(|place| numberless(place)).collect();
    if alike.contains(&numberless(layer)) {
        return format!("it is of a model with more layers: {TRAINED_WITH}");
    }
    kind(layer).unwrap_or(TRAINED_WITH).to_string()
}

/// Whether all numbers of `tensor` are finite.
pub(super) fn is_finite(tensor: &Tensor) -> Result<bool> {
    let values = tensor
        .to_dtype(DType::F32)?
        .flatten_all()?
        .to_vec1::<f32>()?;
    Ok(values.iter().all(|value| value.is_finite()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    /// A file with factors for weights of shape (6, 4) at `layers`.
    fn file(layers: &[&str]) -> LoraFile {
        let zeros = |shape: (usize, usize)| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        let factors = || Factors {
            a: zeros((2, 4)),
            b: zeros((6, 2)),
            scale: 1.0,
        };
        LoraFile {
            path: "lora.safetensors".into(),
            layers: layers
                .iter()
                .map(|layer| (layer.to_string(), factors()))
                .collect(),
            family: None,
            whole: BTreeMap::new(),
            targets: None,
        }
    }

    fn places() -> BTreeMap<String, Vec<usize>> {
        let layers =
            (0..2).flat_map(|i| ["wo", "wqkv"].map(|part| format!("layers.{i}.attention.{part}")));
        layers.map(|layer| (layer, vec![6, 4])).collect()
    }

    #[test]
    fn what_has_no_place_is_named_with_the_kind_of_file_that_it_is() {
        assert!(
            file(&["layers.0.attention.wo"])
                .check_fit(&places())
                .is_ok()
        );
        for (layer, expected) in [
            ("layers.7.attention.wo", "of a model with more layers"),
            ("gpt.layers.0.attention.wo", "take gpt. out of the names"),
            ("0.attention.wo", "put layers. before the names"),
            ("lora_unet_mid_block_something", "kohya's names"),
            ("transformer_blocks.0.attn.to_q", "as SD3's"),
            ("single_transformer_blocks.0.attn.to_q", "FLUX"),
            ("down_blocks.0.attentions.0.to_q", "UNet"),
            ("model.layers.0.self_attn.q_proj", "Lumina"),
            (
                "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
                "text encoders",
            ),
            ("something.else", "trained with"),
        ] {
            let error = file(&["layers.0.attention.wo", layer])
                .check_fit(&places())
                .unwrap_err();
            let (what, hint) = (error.to_string(), error.hint().unwrap());
            assert!(
                what.contains(&format!("{layer}: the model has no such layer")),
                "{what}"
            );
            assert!(what.contains("1 of its 2 layers"), "{what}");
            assert!(hint.contains(expected), "{layer}: {hint}");
        }
    }

    #[test]
    fn faults_of_all_blocks_are_told_once_with_their_number_and_of_kinds_the_first_few() {
        let names: Vec<String> = (10..30)
            .map(|i| format!("layers.{i}.attention.wo"))
            .chain([String::from("something.else")])
            .collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let error = file(&names).check_fit(&places()).unwrap_err().to_string();
        assert!(error.contains("21 of its 21 layers"), "{error}");
        for line in [
            "layers.10.attention.wo: the model has no such layer (and 19 more of other blocks)",
            "something.else: the model has no such layer",
        ] {
            assert!(error.lines().any(|told| told.trim() == line), "{error}");
        }
        let kinds: Vec<String> = ('a'..='z').map(|c| format!("{c}: 1 of 2")).collect();
        let told = brief(&kinds);
        assert_eq!(told.lines().count(), TOLD + 1);
        assert!(told.ends_with("and 2 more"), "{told}");
    }

    #[test]
    fn another_shape_and_a_target_without_factors_do_not_fit() {
        let mut wider = places();
        wider.insert("layers.1.attention.wo".into(), vec![6, 8]);
        let error = file(&["layers.1.attention.wo"])
            .check_fit(&wider)
            .unwrap_err();
        assert!(
            error
                .to_string()
                .contains("for a weight of shape [6, 4], the model's has [6, 8]"),
            "{error}"
        );
        let shallow = LoraFile {
            targets: Some(vec!["wo".into(), "of_no_layer".into()]),
            ..file(&["layers.0.attention.wo"])
        };
        let error = shallow.check_fit(&places()).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("layers.1.attention.wo has no factors"),
            "{error}"
        );
        assert!(error.hint().unwrap().contains("fewer layers"));
    }
}
