//! Which models exist by name, and what family a checkpoint belongs to.

use std::path::Path;

use crate::hub::{Published, catalogue};
use crate::{Error, Result};

/// An architecture with its published layout. Decides defaults and which code loads a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// Stable Diffusion XL: U-Net, epsilon prediction.
    Sdxl,
    /// Stable Diffusion 3 and 3.5: MMDiT, rectified flow.
    Sd3,
    /// FLUX.1: double and single stream blocks, rectified flow.
    Flux,
    /// LlamaGen, text to image.
    LlamaGen,
    /// Lumina-mGPT on Chameleon's backbone.
    Lumina,
    /// CLIP, image and text.
    Clip,
    /// DINO's vision transformer.
    Dino,
}

/// What a family can do in a pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Diffusion,
    Autoregressive,
    Evaluator,
}

impl Family {
    /// What the family can do in a pipeline.
    pub fn kind(self) -> Kind {
        match self {
            Family::Sdxl | Family::Sd3 | Family::Flux => Kind::Diffusion,
            Family::LlamaGen | Family::Lumina => Kind::Autoregressive,
            Family::Clip | Family::Dino => Kind::Evaluator,
        }
    }
}

impl std::fmt::Display for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Family::Sdxl => "SDXL",
            Family::Sd3 => "SD3",
            Family::Flux => "FLUX",
            Family::LlamaGen => "LlamaGen",
            Family::Lumina => "Lumina-mGPT",
            Family::Clip => "CLIP",
            Family::Dino => "DINO",
        })
    }
}

/// A model that a pipeline file may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KnownModel {
    pub name: &'static str,
    pub family: Family,
    /// Side of its images in pixels; `None` for evaluators.
    pub resolution: Option<usize>,
    /// Directory, relative to the working directory or to the repository the program was built in.
    pub directory: &'static str,
    /// What is published and where; `None` for what ships with proxytune.
    pub hub: Option<&'static Published>,
    /// Files that must be there, relative to the directory. Of a published model, those of proxytune's own layout,
    /// where that is another than the published one.
    pub files: &'static [&'static str],
}

/// Every model known by name.
pub const KNOWN: &[KnownModel] = &[
    KnownModel {
        name: "nano-sd3",
        family: Family::Sd3,
        resolution: Some(32),
        directory: "datasets/nano/checkpoints/sd3",
        hub: None,
        files: &["model_index.json"],
    },
    KnownModel {
        name: "nano-sd3.5",
        family: Family::Sd3,
        resolution: Some(64),
        directory: "datasets/nano/checkpoints/sd35",
        hub: None,
        files: &["model_index.json"],
    },
    KnownModel {
        name: "nano-sdxl",
        family: Family::Sdxl,
        resolution: Some(32),
        directory: "datasets/nano/checkpoints/sdxl",
        hub: None,
        files: &["model_index.json"],
    },
    KnownModel {
        name: "nano-flux",
        family: Family::Flux,
        resolution: Some(64),
        directory: "datasets/nano/checkpoints/flux",
        hub: None,
        files: &["model_index.json"],
    },
    KnownModel {
        name: "nano-llamagen",
        family: Family::LlamaGen,
        resolution: Some(32),
        directory: "datasets/nano/checkpoints/llamagen",
        hub: None,
        files: &[],
    },
    KnownModel {
        name: "nano-lumina",
        family: Family::Lumina,
        resolution: Some(32),
        directory: "datasets/nano/checkpoints/lumina",
        hub: None,
        files: &["config.json", "model.safetensors", "tokenizer/vqgan.yaml"],
    },
    KnownModel {
        name: "nano-clip",
        family: Family::Clip,
        resolution: None,
        directory: "datasets/nano/checkpoints/clip",
        hub: None,
        files: &["config.json", "model.safetensors"],
    },
    KnownModel {
        name: "nano-dino",
        family: Family::Dino,
        resolution: None,
        directory: "datasets/nano/checkpoints/dino",
        hub: None,
        files: &["config.json", "model.safetensors"],
    },
    KnownModel {
        name: "llamagen-xl",
        family: Family::LlamaGen,
        resolution: Some(512),
        directory: "datasets/checkpoints/llamagen-xl",
        hub: Some(&catalogue::LLAMAGEN_XL),
        files: &[
            "config.json",
            "model.safetensors",
            "vq/config.json",
            "vq/model.safetensors",
            "t5/config.json",
        ],
    },
    KnownModel {
        name: "llamagen-xl-256",
        family: Family::LlamaGen,
        resolution: Some(256),
        directory: "datasets/checkpoints/llamagen-xl-256",
        hub: Some(&catalogue::LLAMAGEN_XL_256),
        files: &[
            "config.json",
            "model.safetensors",
            "vq/config.json",
            "vq/model.safetensors",
            "t5/config.json",
        ],
    },
    KnownModel {
        name: "lumina-mgpt-7b-768",
        family: Family::Lumina,
        resolution: Some(768),
        directory: "datasets/checkpoints/lumina-mgpt-7b-768",
        hub: Some(&catalogue::LUMINA_MGPT_7B_768),
        files: &[],
    },
    KnownModel {
        name: "sdxl",
        family: Family::Sdxl,
        resolution: Some(1024),
        directory: "datasets/checkpoints/sdxl",
        hub: Some(&catalogue::SDXL),
        files: &[],
    },
    KnownModel {
        name: "sd3-medium",
        family: Family::Sd3,
        resolution: Some(512),
        directory: "datasets/checkpoints/sd3-medium",
        hub: Some(&catalogue::SD3_MEDIUM),
        files: &[],
    },
    KnownModel {
        name: "sd3.5-large",
        family: Family::Sd3,
        resolution: Some(512),
        directory: "datasets/checkpoints/sd3.5-large",
        hub: Some(&catalogue::SD35_LARGE),
        files: &[],
    },
    KnownModel {
        name: "flux.1-dev",
        family: Family::Flux,
        resolution: Some(512),
        directory: "datasets/checkpoints/flux.1-dev",
        hub: Some(&catalogue::FLUX_1_DEV),
        files: &[],
    },
    KnownModel {
        name: "clip-vit-base-patch32",
        family: Family::Clip,
        resolution: None,
        directory: "datasets/checkpoints/clip-vit-base-patch32",
        hub: Some(&catalogue::CLIP_VIT_BASE_PATCH32),
        files: &[],
    },
    KnownModel {
        name: "dino-vits16",
        family: Family::Dino,
        resolution: None,
        directory: "datasets/checkpoints/dino-vits16",
        hub: Some(&catalogue::DINO_VITS16),
        files: &[],
    },
];

/// The known model called `name`.
pub fn known(name: &str) -> Option<&'static KnownModel> {
    KNOWN.iter().find(|model| model.name == name)
}

/// The family of the model called `name`, or of the checkpoint in the directory or repository `name`.
///
/// # Errors
/// When `name` is neither known nor a checkpoint on this machine whose layout tells its family.
pub fn family(name: &str) -> Result<Family> {
    if let Some(model) = known(name) {
        return Ok(model.family);
    }
    let directory = &match super::locate::look_for(name)?.folder {
        Some(folder) => folder,
        None => return Err(super::locate::absent_repository(name)),
    };
    family_of(directory)?.ok_or_else(|| {
        Error::invalid(
            format!("{name}: the layout tells no known model family"),
            "a checkpoint directory has a model_index.json (diffusers), or a config.json with model_type \
             (transformers) or cls_token_num (LlamaGen), or LlamaGen's t2i_*.pt",
        )
    })
}

/// The family that the layout of the checkpoint in `directory` tells.
///
/// # Errors
/// When a file that would tell it cannot be read.
pub(super) fn family_of(directory: &Path) -> Result<Option<Family>> {
    let read = |file: &str| -> Result<Option<serde_json::Value>> {
        let path = directory.join(file);
        path.exists()
            .then(|| crate::files::read_json(&path))
            .transpose()
    };
    let pipeline = read("model_index.json")?;
    let config = match read("config.json")? {
        None => read("gpt/config.json")?,
        config => config,
    };
    let class = text_at(&pipeline, "_class_name");
    let model_type = text_at(&config, "model_type");
    let has = |key: &str| config.as_ref().is_some_and(|json| json.get(key).is_some());
    Ok(match (class, model_type) {
        (Some("StableDiffusionXLPipeline"), _) => Some(Family::Sdxl),
        (Some("StableDiffusion3Pipeline"), _) => Some(Family::Sd3),
        (Some("FluxPipeline"), _) => Some(Family::Flux),
        (_, Some("chameleon")) => Some(Family::Lumina),
        (_, Some("clip")) => Some(Family::Clip),
        (_, Some("vit")) => Some(Family::Dino),
        _ if has("cls_token_num") => Some(Family::LlamaGen),
        (None, None) if has_published_llamagen(directory) => Some(Family::LlamaGen),
        _ => None,
    })
}

/// LlamaGen publishes its files without a config: `t2i_XL_stage1_256.pt` and such.
fn has_published_llamagen(directory: &Path) -> bool {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .any(|name| name.starts_with("t2i_") && name.ends_with(".pt"))
}

/// The names of the CLIP and the DINO that score what the model called `drawer` draws, or images of which nothing is
/// known, where nothing else is said: the nano evaluators, or for other models the published ones.
pub fn evaluators(drawer: Option<&str>) -> [&'static str; 2] {
    if drawer.is_none_or(is_nano) {
        ["nano-clip", "nano-dino"]
    } else {
        ["clip-vit-base-patch32", "dino-vits16"]
    }
}

/// Whether the model called `name` knows the drawn world alone, of which the evaluators for photographs say nothing: a
/// nano model by name, or a checkpoint whose text tokenizer has whole words, as those trained by `pretrain` have and
/// the published ones, which have pieces of words, have not.
pub fn is_nano(name: &str) -> bool {
    #[derive(serde::Deserialize)]
    struct Tokenizer {
        model: Model,
    }
    #[derive(serde::Deserialize)]
    struct Model {
        r#type: String,
    }
    if known(name).is_some() {
        return name.starts_with("nano-");
    }
    let Ok(Some(folder)) = super::locate::look_for(name).map(|found| found.folder) else {
        return false;
    };
    let tokenizers = ["t5", "tokenizer", ""].map(|part| folder.join(part).join("tokenizer.json"));
    tokenizers.iter().any(|file| {
        let read = crate::files::read_json::<Tokenizer>(file);
        read.is_ok_and(|tokenizer| tokenizer.model.r#type == "WordLevel")
    })
}

fn text_at<'a>(json: &'a Option<serde_json::Value>, key: &str) -> Option<&'a str> {
    json.as_ref()?.get(key)?.as_str()
}

/// All names in [`KNOWN`], in its order.
pub fn known_names() -> Vec<&'static str> {
    KNOWN.iter().map(|model| model.name).collect()
}
