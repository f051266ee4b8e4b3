//! Parts of diffusion models in single files: safetensors as Stability AI, Black Forest Labs and ComfyUI publish them,
//! and GGUF. What a file holds is told by the names of its tensors.

use std::path::{Path, PathBuf};

use crate::files::tensor_headers::{is_gguf, tensors_in};
use crate::{Error, Result, files};

/// The network of a family of models.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// Stable Diffusion XL's U-Net.
    Sdxl,
    /// The transformer of Stable Diffusion 3 and 3.5.
    Sd3,
    /// FLUX.1's transformer.
    Flux,
}

/// A part of a model, which diffusers has in a folder of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The network that denoises.
    Denoiser(Network),
    /// The first CLIP of all families.
    ClipL,
    /// The second CLIP of SDXL and SD3.
    ClipG,
    /// T5's encoder.
    T5,
    /// The autoencoder.
    Vae,
}

/// A part in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartFile {
    pub part: Part,
    pub path: PathBuf,
    /// What the names of its tensors start with there.
    pub prefix: String,
}

/// The parts of one model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parts {
    pub network: Network,
    /// Where it was found: the folder, also where a file was named.
    pub folder: PathBuf,
    pub files: Vec<PartFile>,
}

/// Folders beside the network that hold further parts.
const BESIDE: [&str; 7] = [
    "",
    "text_encoders",
    "clip",
    "vae",
    "unet",
    "diffusion_models",
    "transformer",
];

/// By which tensor a part is known, and what may stand before it in a file.
const SIGNS: [(Part, &[&str], &[&str]); 10] = [
    (
        Part::Denoiser(Network::Sdxl),
        &["label_emb.0.0.weight"],
        NETWORK,
    ),
    (
        Part::Denoiser(Network::Sd3),
        &["joint_blocks.0.x_block.attn.qkv.weight"],
        NETWORK,
    ),
    (
        Part::Denoiser(Network::Flux),
        &["double_blocks.0.img_attn.qkv.weight"],
        NETWORK,
    ),
    (
        Part::Vae,
        &["decoder.conv_in.weight"],
        &["first_stage_model.", "vae.", ""],
    ),
    (
        Part::ClipL,
        CLIP,
        &[
            "conditioner.embedders.0.transformer.",
            "text_encoders.clip_l.transformer.",
            "cond_stage_model.transformer.",
        ],
    ),
    (
        Part::ClipG,
        CLIP,
        &[
            "conditioner.embedders.1.model.",
            "text_encoders.clip_g.transformer.",
            "cond_stage_model.1.transformer.",
        ],
    ),
    (Part::T5, T5, &["text_encoders.t5xxl.transformer.", ""]),
    // Alone in a file both CLIPs have the same names.
    (Part::ClipL, CLIP, &[""]),
    (Part::ClipG, CLIP, &[""]),
    (Part::T5, &["enc.blk.0.attn_q.weight"], &[""]),
];

const NETWORK: &[&str] = &["model.diffusion_model.", ""];
const CLIP: &[&str] = &[
    "text_model.embeddings.token_embedding.weight",
    "token_embedding.weight",
];
const T5: &[&str] = &["encoder.block.0.layer.0.SelfAttention.q.weight"];

/// Width of CLIP-L; CLIP-G has 1280.
const WIDTH_OF_CLIP_L: usize = 768;

/// Whether `path` is a file that may hold a model.
pub fn is_named(path: &Path) -> bool {
    may_hold(path) && path.is_file()
}

fn may_hold(path: &Path) -> bool {
    is_gguf(path) || path.extension().is_some_and(|end| end == "safetensors")
}

impl Part {
    /// What the part is called to people.
    pub fn name(self) -> &'static str {
        match self {
            Part::Denoiser(Network::Sdxl) => "the U-Net",
            Part::Denoiser(_) => "the transformer",
            Part::ClipL => "CLIP-L",
            Part::ClipG => "CLIP-G",
            Part::T5 => "T5's encoder",
            Part::Vae => "the autoencoder",
        }
    }
}

impl Network {
    /// What its family is called to people.
    pub fn family(self) -> &'static str {
        match self {
            Network::Sdxl => "SDXL",
            Network::Sd3 => "SD3",
            Network::Flux => "FLUX",
        }
    }

    /// diffusers' folders of the parts that single files hold for this family, and whether it can do without.
    pub fn components(self) -> &'static [(&'static str, Part, bool)] {
        match self {
            Network::Sdxl => &[
                ("unet", Part::Denoiser(Network::Sdxl), false),
                ("vae", Part::Vae, false),
                ("text_encoder", Part::ClipL, false),
                ("text_encoder_2", Part::ClipG, false),
            ],
            Network::Sd3 => &[
                ("transformer", Part::Denoiser(Network::Sd3), false),
                ("vae", Part::Vae, false),
                ("text_encoder", Part::ClipL, false),
                ("text_encoder_2", Part::ClipG, false),
                ("text_encoder_3", Part::T5, true),
            ],
            Network::Flux => &[
                ("transformer", Part::Denoiser(Network::Flux), false),
                ("vae", Part::Vae, false),
                ("text_encoder", Part::ClipL, false),
                ("text_encoder_2", Part::T5, false),
            ],
        }
    }
}

impl Parts {
    /// The parts of the model at `place`, a file that holds a network of diffusion or a folder with one such file. Other
    /// parts are taken from files beside it (in the folder, or in `text_encoders`, `clip` and `vae` below), the largest
    /// where several hold the same, else from the file itself. `None` where there is no such network, or the folder is
    /// one of diffusers' layout.
    ///
    /// # Errors
    /// When a file cannot be read, or the folder has several networks.
    pub fn find(place: &Path) -> Result<Option<Self>> {
        let named = place.is_file().then_some(place);
        if named.is_none() && place.join("model_index.json").exists() {
            return Ok(None);
        }
        let folder = &named.map_or(place.to_path_buf(), folder_of);
        let mut found: Vec<PartFile> = Vec::new();
        let mut candidates = Vec::new();
        for below in BESIDE {
            for (_, path) in files::list(&folder.join(below))? {
                if is_named(&path) {
                    candidates.push(path);
                }
            }
        }
        let size = |path: &Path| std::fs::metadata(path).map_or(0, |file| file.len());
        candidates.sort_by_key(|path| std::cmp::Reverse(size(path)));
        for path in &candidates {
            found.extend(parts_of(path)?);
        }
        let is_network = |file: &&PartFile| matches!(file.part, Part::Denoiser(_));
        let networks: Vec<&PartFile> = found.iter().filter(is_network).collect();
        let network = match named {
            Some(place) => networks.into_iter().find(|file| is_same(&file.path, place)),
            None if networks.len() > 1 => return Err(several(place, &networks)),
            None => networks.into_iter().next(),
        };
        let Some(network) = network.cloned() else {
            return Ok(None);
        };
        let Part::Denoiser(kind) = network.part else {
            return Ok(None);
        };
        let holds_networks: Vec<PathBuf> = found
            .iter()
            .filter(is_network)
            .map(|file| file.path.clone())
            .collect();
        // What lies in a file of its own goes before what the network's file holds; other networks' files give nothing.
        let alone = found
            .iter()
            .filter(|file| !holds_networks.contains(&file.path));
        let inside = found.iter().filter(|file| file.path == network.path);
        let mut files = vec![network.clone()];
        for file in alone.chain(inside) {
            if !files.iter().any(|taken| taken.part == file.part) {
                files.push(file.clone());
            }
        }
        Ok(Some(Self {
            network: kind,
            folder: folder.to_path_buf(),
            files,
        }))
    }

    /// The file with diffusers' `component` of the model, if it is there.
    pub fn component(&self, component: &str) -> Option<&PartFile> {
        let mut components = self.network.components().iter();
        let (_, part, _) = components.find(|(name, _, _)| *name == component)?;
        self.files.iter().find(|file| file.part == *part)
    }
}

/// Where a model is whose network is the file at `path`: its folder, or the one around where that is for networks alone.
fn folder_of(path: &Path) -> PathBuf {
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let is_beside = !name.is_empty() && BESIDE.contains(&&*name);
    match (is_beside, folder.parent()) {
        (true, Some(around)) if around != Path::new("") => around.to_path_buf(),
        (true, Some(_)) => PathBuf::from("."),
        _ => folder.to_path_buf(),
    }
}

/// Whether both paths are of one file.
fn is_same(one: &Path, other: &Path) -> bool {
    one == other
        || one
            .canonicalize()
            .is_ok_and(|one| other.canonicalize().is_ok_and(|other| one == other))
}

fn several(folder: &Path, networks: &[&PartFile]) -> Error {
    let names = networks.iter().filter_map(|file| file.path.file_name());
    let names: Vec<_> = names.map(|name| name.to_string_lossy()).collect();
    Error::invalid(
        format!(
            "{} holds several models: {}",
            folder.display(),
            names.join(", ")
        ),
        "name the file itself as the model",
    )
}

/// The parts in the file at `path`; none where it is of something else.
///
/// # Errors
/// When it is damaged.
pub fn parts_of(path: &Path) -> Result<Vec<PartFile>> {
    let tensors = tensors_in(path)?;
    let at = |name: String| {
        let index = tensors
            .binary_search_by(|(known, _)| known.cmp(&name))
            .ok()?;
        Some(&tensors[index].1)
    };
    let mut found: Vec<PartFile> = Vec::new();
    for (part, signs, prefixes) in SIGNS {
        if found.iter().any(|other| other.part == part) {
            continue;
        }
        let here = prefixes.iter().find_map(|prefix| {
            let shapes = signs.iter().map(|sign| at(format!("{prefix}{sign}")));
            Some((prefix, shapes.flatten().next()?))
        });
        let Some((prefix, shape)) = here else {
            continue;
        };
        let alone = prefix.is_empty() && matches!(part, Part::ClipL | Part::ClipG);
        if alone && part != which_clip(path, shape) {
            continue;
        }
        found.push(PartFile {
            part,
            path: path.to_path_buf(),
            prefix: prefix.to_string(),
        });
    }
    Ok(found)
}

/// Which CLIP a file holds alone: by its name, else by the width of its table.
fn which_clip(path: &Path, table: &[usize]) -> Part {
    let name = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .to_lowercase();
    let says = |word: &str| {
        name.contains(&format!("clip_{word}")) || name.contains(&format!("clip-{word}"))
    };
    let width = table.last().copied().unwrap_or(0);
    match (says("l"), says("g")) {
        (true, false) => Part::ClipL,
        (false, true) => Part::ClipG,
        _ if width > WIDTH_OF_CLIP_L => Part::ClipG,
        _ => Part::ClipL,
    }
}
