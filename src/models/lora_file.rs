//! LoRA adapters from disk, as peft, diffusers and kohya-like trainers write them, each layer with its own rank and
//! scale.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use serde_json::{Map, Value};
use tokenizers::utils::SysRegex;

use super::lora_fit::{brief, is_finite, kind};
use super::lora_names;
use super::pickle::Pickle;
use crate::config::Family;
use crate::console::{escaped, shown};
use crate::nn::Factors;
use crate::{Error, Result, files};

/// PEFT's file name.
pub const PEFT_WEIGHTS: &str = "adapter_model.safetensors";
/// PEFT's configuration beside the weights.
pub const PEFT_CONFIG: &str = "adapter_config.json";
/// diffusers' file name.
pub const DIFFUSERS_WEIGHTS: &str = "pytorch_lora_weights.safetensors";
/// The name that diffusers' scripts give a file of kohya's layout.
pub const KOHYA_WEIGHTS: &str = "pytorch_lora_weights_kohya.safetensors";
/// PEFT's file name in torch's format.
const PEFT_PICKLE: &str = "adapter_model.bin";
/// The header's entry with the configuration in diffusers' files.
const METADATA: &str = "lora_adapter_metadata";

/// Settings of peft that change what an adapter computes beyond B·A, with what they are called.
const UNSUPPORTED: [(&str, &str); 12] = [
    ("use_dora", "DoRA"),
    ("lora_bias", "biases of B"),
    ("layer_replication", "replicated layers"),
    ("modules_to_save", "whole modules beside the factors"),
    ("trainable_token_indices", "trained tokens"),
    ("target_parameters", "factors of bare parameters"),
    ("use_qalora", "QALoRA"),
    ("alora_invocation_tokens", "activated LoRA"),
    ("arrow_config", "Arrow routing"),
    ("use_bdlora", "block-diagonal factors"),
    ("kasa_config", "KaSA"),
    ("monteclora_config", "MonteCLoRA"),
];

/// An adapter's factors by the path of their layer, as the model names it, whatever the file does.
#[derive(Debug, Clone)]
pub struct LoraFile {
    /// The file that holds the factors.
    pub path: PathBuf,
    /// Never empty.
    pub layers: BTreeMap<String, Factors>,
    /// Whose layers these are, where names or widths tell.
    pub family: Option<Family>,
    /// Whole weights beside the factors, by name: peft stores those of embeddings and heads, as they are or trained.
    /// See [`LoraFile::check_whole`]. What it stores of an adapted layer's own weight is left out: that is always the
    /// base's.
    pub whole: BTreeMap<String, Tensor>,
    /// Ends of the paths of all layers that are adapted, where the configuration lists them.
    pub targets: Option<Vec<String>>,
}

const NO_FACTOR: &str = "is not a factor of LoRA";

/// The tensors of a file by what they are, under the normalised names of their layers.
#[derive(Default)]
struct Parts {
    downs: BTreeMap<String, Tensor>,
    ups: BTreeMap<String, Tensor>,
    alphas: BTreeMap<String, f64>,
    whole: BTreeMap<String, Tensor>,
}

impl Parts {
    fn sort(raw: BTreeMap<String, Tensor>) -> Result<(Self, Vec<String>)> {
        let (mut parts, mut faults) = (Self::default(), Vec::new());
        for (original, tensor) in raw {
            let name = spelt(&original);
            let told = escaped(&original).into_owned();
            let factor = [".lora_A.weight", ".lora_B.weight"]
                .into_iter()
                .find_map(|end| Some((name.strip_suffix(end)?, end)));
            let twice = if let Some((layer, end)) = factor {
                if !tensor.dtype().is_float() {
                    faults.push(format!(
                        "{told} holds {}, no factors",
                        tensor.dtype().as_str()
                    ));
                } else if !is_finite(&tensor)? {
                    faults.push(format!("{told} holds numbers that are not finite"));
                }
                let side = match end {
                    ".lora_A.weight" => &mut parts.downs,
                    _ => &mut parts.ups,
                };
                let tensor = tensor.to_dtype(DType::F32)?;
                side.insert(layer.to_string(), tensor).is_some()
            } else if let Some(layer) = name.strip_suffix(".alpha") {
                let alpha = tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?;
                match alpha[..] {
                    [alpha] => parts.alphas.insert(layer.to_string(), alpha).is_some(),
                    _ => {
                        faults.push(format!("{told} has shape {:?}", tensor.dims()));
                        false
                    }
                }
            } else if name.contains(".base_layer.") {
                false
            } else if name.ends_with(".weight") && !name.contains(".lora_") {
                parts.whole.insert(name, tensor).is_some()
            } else {
                faults.push(format!("{told} {NO_FACTOR}"));
                false
            };
            if twice {
                faults.push(format!(
                    "{told} is there a second time, with another prefix"
                ));
            }
        }
        Ok((parts, faults))
    }

    /// The layers with both factors; what does not belong together is added to `faults`.
    fn join(
        mut self,
        settings: &Settings,
        faults: &mut Vec<String>,
    ) -> Result<BTreeMap<String, Factors>> {
        let mut layers = BTreeMap::new();
        for (layer, a) in self.downs {
            let alpha = self.alphas.remove(&layer);
            let told = escaped(&layer).into_owned();
            let Some(b) = self.ups.remove(&layer) else {
                faults.push(format!("{told}.lora_B.weight is missing"));
                continue;
            };
            let rank = a.dims().first().copied().unwrap_or(0);
            let fit = a.rank() >= 2 && a.rank() == b.rank() && b.dims()[1] == rank;
            if rank == 0 || !fit || b.dims()[2..].iter().any(|&side| side != 1) {
                let shapes = (a.dims(), b.dims());
                faults.push(format!("{told} has factors of shapes {shapes:?}"));
                continue;
            }
            match settings.scale(&layer, alpha, rank)? {
                Ok(scale) => drop(layers.insert(layer, Factors { a, b, scale })),
                Err(fault) => faults.push(format!("{told}: {fault}")),
            }
        }
        let lonely = self.ups.into_keys();
        faults.extend(lonely.map(|layer| format!("{}.lora_A.weight is missing", escaped(&layer))));
        let lonely = self.alphas.into_keys();
        faults.extend(lonely.map(|layer| format!("{}.alpha has no factors", escaped(&layer))));
        Ok(layers)
    }
}

impl LoraFile {
    /// Reads a folder (PEFT's or diffusers' layout) or a file. A layer's scale is alpha / rank, or alpha / √rank with
    /// rsLoRA; alpha is that of the layer's own tensor, else of the configuration's `alpha_pattern`, else the
    /// configuration's; the rank where nothing names one.
    ///
    /// # Errors
    /// Names the first things in it that cannot be carried or contradict each other: DoRA's magnitudes, one factor
    /// without the other, numbers that are not finite, a rank that is not the configuration's.
    pub fn read(path: &Path) -> Result<Self> {
        let path = weights_file(path)?;
        let (raw, metadata) = if path.extension().is_some_and(|end| end == "safetensors") {
            files::read_tensors(&path)?
        } else {
            let tensors = Pickle::open(&path)?.read_all()?;
            (tensors.into_iter().collect(), BTreeMap::new())
        };
        let settings = Settings::find(&path, &metadata)?;
        let (parts, mut faults) = Parts::sort(raw)?;
        let mut foreign = faults.iter().filter(|fault| fault.ends_with(NO_FACTOR));
        let foreign = foreign.find_map(|fault| kind(fault));
        faults.splice(0..0, settings.unsupported());
        let whole = parts.whole.clone();
        let layers = parts.join(&settings, &mut faults)?;
        let (layers, family) = lora_names::renamed(layers, &mut faults)?;
        if layers.is_empty() && !whole.is_empty() {
            return Err(Error::invalid(
                format!("{} holds whole weights, no factors of LoRA", shown(&path)),
                "a checkpoint is named with --model; adapters are what LoRA trainers write",
            ));
        }
        if faults.is_empty() && layers.is_empty() {
            faults.push("no lora_A tensor in it".into());
        }
        if !faults.is_empty() {
            let what = format!("{}: {}", shown(&path), brief(&faults));
            let hint = foreign.unwrap_or("save the adapter again with the program that trained it");
            return Err(Error::invalid(what, hint));
        }
        let targets = settings.targets();
        Ok(Self {
            path,
            layers,
            family,
            whole,
            targets,
        })
    }

    /// Fails unless each whole weight is the base's own, which `base` gives by name, in the type that it is kept in.
    pub fn check_whole(&self, base: impl Fn(&str) -> Result<Option<Tensor>>) -> Result<()> {
        let mut faults = Vec::new();
        for (name, tensor) in &self.whole {
            let own = match base(name)? {
                // Tied to the embeddings, it is stored under their name alone.
                None if name.ends_with("lm_head.weight") => {
                    base(&name.replace("lm_head", "model.embed_tokens"))?
                }
                own => own,
            };
            let Some(own) = own else {
                faults.push(format!("{name} is a whole weight, which the base lacks"));
                continue;
            };
            if own.dims() != tensor.dims() {
                faults.push(format!(
                    "{name} has shape {:?}, the base's {:?}: resized weights cannot be carried",
                    tensor.dims(),
                    own.dims()
                ));
                continue;
            }
            let wide = |t: &Tensor| t.to_dtype(own.dtype())?.to_dtype(DType::F32);
            let different = wide(tensor)?.ne(&wide(&own)?)?.flatten_all()?;
            if different.elem_count() > 0 && different.max(0)?.to_scalar::<u8>()? > 0 {
                faults.push(format!(
                    "{name} is not the base's: weights trained whole cannot be carried"
                ));
            }
        }
        if faults.is_empty() {
            return Ok(());
        }
        Err(Error::Checkpoint {
            path: self.path.clone(),
            faults,
        })
    }
}

fn weights_file(path: &Path) -> Result<PathBuf> {
    if !path.is_dir() {
        std::fs::metadata(path).map_err(Error::io(path))?;
        return Ok(path.to_path_buf());
    }
    [PEFT_WEIGHTS, DIFFUSERS_WEIGHTS, KOHYA_WEIGHTS, PEFT_PICKLE]
        .map(|name| path.join(name))
        .into_iter()
        .find(|file| file.is_file())
        .ok_or_else(|| {
            Error::invalid(
                format!("{} holds no adapter", shown(path)),
                format!("expected {PEFT_WEIGHTS} or {DIFFUSERS_WEIGHTS} there; a file of another name is named itself"),
            )
        })
}

/// What stands before the names of all layers, by the program that writes it; several may.
const PREFIXES: [&str; 5] = [
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "unet.",
    "transformer.",
];

/// What a factor is called, and what it is called here. diffusers' oldest names have it in the layer's.
const FACTORS: [(&str, &str); 8] = [
    (".processor.to_out_lora.", ".to_out.0.lora."),
    (".processor.to_q_lora.", ".to_q.lora."),
    (".processor.to_k_lora.", ".to_k.lora."),
    (".processor.to_v_lora.", ".to_v.lora."),
    (".lora.down.", ".lora_A."),
    (".lora.up.", ".lora_B."),
    (".lora_down.", ".lora_A."),
    (".lora_up.", ".lora_B."),
];

/// `base_model.model.X.lora_A.default.weight`, `unet.X.lora.down.weight`, `transformer.X.lora_A.weight`,
/// `diffusion_model.X.lora_down.weight` … all become `X.lora_A.weight`.
fn spelt(name: &str) -> String {
    let mut rest = name;
    for prefix in PREFIXES {
        rest = rest.strip_prefix(prefix).unwrap_or(rest);
    }
    FACTORS
        .iter()
        .fold(rest.replace(".default", ""), |name, (from, to)| {
            name.replace(from, to)
        })
}

/// The name of a weight of an adapter, `X.lora_A.weight`, X the layer's path in diffusers: other programs' prefixes, words
/// and layers are replaced. What is several layers in one keeps its name.
pub fn normalise(name: &str) -> String {
    let name = spelt(name);
    let parts = [".lora_A.", ".lora_B."];
    let found = parts
        .iter()
        .find_map(|part| Some((name.split_once(part)?, part)));
    let Some(((layer, rest), part)) = found else {
        return name;
    };
    match lora_names::place(layer)
        .map(|place| place.layers)
        .as_deref()
    {
        Some([layer]) => format!("{layer}{part}{rest}"),
        _ => name,
    }
}

/// peft's configuration, from `adapter_config.json` or from the header of a diffusers file; empty where there is none.
struct Settings {
    path: PathBuf,
    entries: Map<String, Value>,
}

impl Settings {
    fn find(file: &Path, metadata: &BTreeMap<String, String>) -> Result<Self> {
        let path = file.with_file_name(PEFT_CONFIG);
        if path.symlink_metadata().is_ok() {
            let entries = files::read_json(&path)?;
            return Ok(Self { path, entries });
        }
        let path = file.to_path_buf();
        let is_peft = [PEFT_WEIGHTS, PEFT_PICKLE]
            .map(|name| file.ends_with(name))
            .contains(&true);
        if is_peft {
            return Err(Error::invalid(
                format!(
                    "{} has no {PEFT_CONFIG} beside it, which says its alpha",
                    shown(file)
                ),
                "copy it from where the adapter was trained",
            ));
        }
        let Some(text) = metadata.get(METADATA) else {
            let entries = Map::new();
            return Ok(Self { path, entries });
        };
        let entries: Map<String, Value> =
            serde_json::from_str(text).map_err(|e| Error::Checkpoint {
                path: path.clone(),
                faults: vec![format!("{METADATA} in its header: {e}")],
            })?;
        // The entries stand under the component's name where a pipeline was saved.
        let entries = entries
            .into_iter()
            .map(|(key, value)| {
                let bare = ["transformer.", "unet."]
                    .iter()
                    .find_map(|prefix| key.strip_prefix(prefix));
                (bare.map_or(key.clone(), String::from), value)
            })
            .collect();
        Ok(Self { path, entries })
    }

    fn unsupported(&self) -> Vec<String> {
        let is_set = |key: &str| match self.entries.get(key) {
            None | Some(Value::Null | Value::Bool(false)) => false,
            Some(Value::Array(items)) => !items.is_empty(),
            Some(Value::Object(items)) => !items.is_empty(),
            Some(_) => true,
        };
        let mut faults: Vec<String> = UNSUPPORTED
            .iter()
            .filter(|(key, _)| is_set(key))
            .map(|(key, what)| format!("{key} is set: {what} cannot be carried"))
            .collect();
        let text = |key: &str| self.entries.get(key).and_then(Value::as_str);
        if let Some(kind) = text("peft_type").filter(|kind| *kind != "LORA") {
            faults.push(format!("peft_type is {kind}: only LORA can be carried"));
        }
        if let Some(bias) = text("bias").filter(|bias| *bias != "none") {
            faults.push(format!("bias is {bias}: trained biases cannot be carried"));
        }
        // Other starts are random numbers alone; these take something away from the base weights.
        let start = text("init_lora_weights").unwrap_or_default();
        if ["pissa", "corda", "olora", "loftq", "lora_ga"]
            .iter()
            .any(|changing| start.starts_with(changing))
        {
            faults.push(format!(
                "init_lora_weights is {start}, which changes the base weights"
            ));
        }
        faults
    }

    /// The number that the entry `key` has for `layer`, as peft chooses it: that of the first of `patterns` that is the
    /// end of the layer's path, or all of it; else the entry's own. The inner error is an entry that is no number.
    fn number(
        &self,
        layer: &str,
        patterns: &str,
        key: &str,
    ) -> Result<std::result::Result<Option<f64>, String>> {
        let mut found = self.entries.get(key);
        let listed = self.entries.get(patterns).and_then(Value::as_object);
        for (pattern, value) in listed.into_iter().flatten() {
            let whole = SysRegex::new(&format!(r"^(?:.*\.)?(?:{pattern})$"));
            let whole = whole.map_err(|e| Error::Checkpoint {
                path: self.path.clone(),
                faults: vec![format!("{patterns} {pattern:?}: {e}")],
            })?;
            if whole.find_iter(layer).next().is_some() {
                found = Some(value);
                break;
            }
        }
        Ok(match found.filter(|value| !value.is_null()) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) => Ok(Some(number)),
                None => Err(format!("its configuration says {key} = {value}")),
            },
        })
    }

    /// What B·A of `layer` is multiplied with; `own` is the alpha that stands beside its factors. The inner error says
    /// what does not go together.
    fn scale(
        &self,
        layer: &str,
        own: Option<f64>,
        rank: usize,
    ) -> Result<std::result::Result<f64, String>> {
        let said = self.number(layer, "rank_pattern", "r")?;
        let alpha = self.number(layer, "alpha_pattern", "lora_alpha")?;
        let (said, alpha) = match (said, alpha) {
            (Ok(said), Ok(alpha)) => (said, alpha),
            (Err(fault), _) | (_, Err(fault)) => return Ok(Err(fault)),
        };
        if let Some(said) = said.filter(|said| *said != rank as f64) {
            return Ok(Err(format!(
                "its factors have rank {rank}, its configuration says {said}"
            )));
        }
        // Files in half precision round their own.
        if let (Some(own), Some(alpha)) = (own, alpha)
            && (own - alpha).abs() > 1e-2 * alpha.abs()
        {
            return Ok(Err(format!(
                "its alpha is {own}, its configuration says {alpha}"
            )));
        }
        let alpha = own.or(alpha).unwrap_or(rank as f64);
        let stabilised = self.entries.get("use_rslora").and_then(Value::as_bool);
        let scale = match stabilised.unwrap_or(false) {
            true => alpha / (rank as f64).sqrt(),
            false => alpha / rank as f64,
        };
        // Factors are multiplied in f32. With 0 the model would stay as it is.
        let usable = (scale as f32).is_finite() && scale != 0.0;
        Ok(match usable {
            true => Ok(scale),
            false => Err(format!("its alpha is {alpha}, which scales nothing")),
        })
    }

    /// The listed ends of the paths of all adapted layers, where nothing else chooses among them.
    fn targets(&self) -> Option<Vec<String>> {
        let chosen = ["exclude_modules", "layers_to_transform", "layers_pattern"];
        let is_set = |key: &&str| self.entries.get(*key).is_some_and(|value| !value.is_null());
        if chosen.iter().any(is_set) {
            return None;
        }
        let listed = self.entries.get("target_modules")?.as_array()?;
        let text = |target: &Value| target.as_str().map(String::from);
        listed.iter().map(text).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use serde_json::json;

    /// The scales by layer of an adapter with a layer of rank 4 at each of `layers`.
    fn scales(layers: &[&str], config: Value) -> Result<Vec<(String, f64)>> {
        let directory = tempfile::tempdir().unwrap();
        let zeros = |shape: (usize, usize)| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        let tensors = layers
            .iter()
            .flat_map(|layer| {
                let name = |part| format!("base_model.model.{layer}.{part}.weight");
                [
                    (name("lora_A"), zeros((4, 3))),
                    (name("lora_B"), zeros((5, 4))),
                ]
            })
            .collect();
        files::write_tensors(&directory.path().join(PEFT_WEIGHTS), &tensors, &[]).unwrap();
        files::write(
            &directory.path().join(PEFT_CONFIG),
            config.to_string().as_bytes(),
        )
        .unwrap();
        let file = LoraFile::read(directory.path())?;
        Ok(file
            .layers
            .into_iter()
            .map(|(layer, factors)| (layer, factors.scale))
            .collect())
    }

    #[test]
    fn alpha_patterns_match_the_end_of_a_path_or_all_of_it() {
        let layers = ["layers.0.wo", "layers.0.two", "layers.1.wo", "layers.2.w1"];
        let config = json!({
            "peft_type": "LORA", "lora_alpha": 2,
            "alpha_pattern": {"layers.1.wo": 12, "wo": 8, r"layers\.\d+\.w[13]": 20, "^layers.0.two": 6},
        });
        let found = scales(&layers, config).unwrap();
        let found: Vec<f64> = found.into_iter().map(|(_, scale)| scale).collect();
        assert_eq!(found, [1.5, 2.0, 3.0, 5.0]);
    }

    #[test]
    fn rank_stabilised_adapters_divide_by_the_root_of_the_rank() {
        let found = scales(&["w"], json!({"lora_alpha": 3, "use_rslora": true})).unwrap();
        assert_eq!(found, [("w".to_string(), 1.5)]);
    }

    #[test]
    fn whole_weights_must_be_the_bases() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join(PEFT_WEIGHTS);
        let ones = |count: usize| Tensor::ones((count, 2), DType::F32, &Device::Cpu).unwrap();
        let tensors = [
            ("model.q_proj.lora_A.weight", ones(1)),
            (
                "model.q_proj.lora_B.weight",
                ones(3).narrow(1, 0, 1).unwrap(),
            ),
            ("lm_head.base_layer.weight", ones(9)),
            ("lm_head.weight", (ones(4) * 0.1).unwrap()),
        ];
        let tensors = tensors
            .into_iter()
            .map(|(name, tensor)| (format!("base_model.model.{name}"), tensor));
        files::write_tensors(&path, &tensors.collect(), &[]).unwrap();
        let error = LoraFile::read(&path).err().unwrap().to_string();
        assert!(error.contains("no adapter_config.json"), "{error}");
        files::write(&place.path().join(PEFT_CONFIG), b"{}").unwrap();
        let file = LoraFile::read(&path).unwrap();
        assert_eq!(file.whole.keys().collect::<Vec<_>>(), ["lm_head.weight"]);
        let check = |at: &str, base: Tensor| {
            file.check_whole(|name| Ok((name == at).then(|| base.clone())))
                .map_err(|error| error.to_string())
        };
        let own = (ones(4) * 0.1).unwrap();
        assert_eq!(check("lm_head.weight", own.clone()), Ok(()));
        let rounded = own.to_dtype(DType::BF16).unwrap();
        assert_eq!(check("lm_head.weight", rounded), Ok(()));
        assert_eq!(check("model.embed_tokens.weight", own.clone()), Ok(()));
        for (at, base, fault) in [
            ("lm_head.weight", ones(4), "trained whole"),
            ("lm_head.weight", ones(3), "resized"),
            ("wte.weight", own, "the base lacks"),
        ] {
            let error = check(at, base).unwrap_err();
            assert!(
                error.contains("lm_head.weight") && error.contains(fault),
                "{error}"
            );
        }
    }

    #[test]
    fn what_cannot_be_carried_is_named() {
        let config = json!({"lora_alpha": 3, "use_dora": true, "bias": "all", "peft_type": "LORA"});
        let error = scales(&["w"], config).unwrap_err().to_string();
        assert!(
            error.contains("DoRA") && error.contains("bias is all"),
            "{error}"
        );
        let config = json!({"lora_alpha": 3, "peft_type": "LOHA"});
        let error = scales(&["w"], config).unwrap_err().to_string();
        assert!(error.contains("LOHA"), "{error}");
    }
}
