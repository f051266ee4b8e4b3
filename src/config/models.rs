//! Which models exist by name, what family a checkpoint directory belongs to, and where its files lie.

use std::path::{Path, PathBuf};

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
    /// Where it is published on the Hugging Face hub; `None` for what ships with proxytune.
    pub hub: Option<&'static str>,
    /// Files that must be there, relative to the directory.
    pub files: &'static [&'static str],
}

/// Every model known by name. Names and files: the models' own repositories.
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
        name: "nano-llamagen",
        family: Family::LlamaGen,
        resolution: Some(32),
        directory: "datasets/nano/checkpoints/llamagen",
        hub: None,
        files: &[],
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
        hub: Some("peizesun/llamagen_t2i"),
        files: &["t2i_XL_stage2_512.pt", "vq_ds16_t2i.pt"],
    },
    KnownModel {
        name: "lumina-mgpt-7b-768",
        family: Family::Lumina,
        resolution: Some(768),
        directory: "datasets/checkpoints/lumina-mgpt-7b-768",
        hub: Some("Alpha-VLLM/Lumina-mGPT-7B-768"),
        files: &["config.json", "model.safetensors.index.json"],
    },
    KnownModel {
        name: "sdxl",
        family: Family::Sdxl,
        resolution: Some(1024),
        directory: "datasets/checkpoints/sdxl",
        hub: Some("stabilityai/stable-diffusion-xl-base-1.0"),
        files: &[
            "model_index.json",
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
            "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors",
            "text_encoder/model.safetensors",
            "text_encoder_2/model.safetensors",
        ],
    },
    KnownModel {
        name: "sd3-medium",
        family: Family::Sd3,
        resolution: Some(512),
        directory: "datasets/checkpoints/sd3-medium",
        hub: Some("stabilityai/stable-diffusion-3-medium-diffusers"),
        files: &[
            "model_index.json",
            "transformer/config.json",
            "transformer/diffusion_pytorch_model.safetensors",
            "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors",
            "text_encoder/model.safetensors",
            "text_encoder_2/model.safetensors",
        ],
    },
    KnownModel {
        name: "sd3.5-large",
        family: Family::Sd3,
        resolution: Some(512),
        directory: "datasets/checkpoints/sd3.5-large",
        hub: Some("stabilityai/stable-diffusion-3.5-large"),
        files: &[
            "model_index.json",
            "transformer/config.json",
            "transformer/diffusion_pytorch_model.safetensors.index.json",
            "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors",
            "text_encoder/model.safetensors",
            "text_encoder_2/model.safetensors",
        ],
    },
    KnownModel {
        name: "flux.1-dev",
        family: Family::Flux,
        resolution: Some(512),
        directory: "datasets/checkpoints/flux.1-dev",
        hub: Some("black-forest-labs/FLUX.1-dev"),
        files: &[
            "model_index.json",
            "transformer/config.json",
            "transformer/diffusion_pytorch_model.safetensors.index.json",
            "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors",
            "text_encoder/model.safetensors",
        ],
    },
    KnownModel {
        name: "clip-vit-base-patch32",
        family: Family::Clip,
        resolution: None,
        directory: "datasets/checkpoints/clip-vit-base-patch32",
        hub: Some("openai/clip-vit-base-patch32"),
        files: &["config.json", "model.safetensors", "tokenizer.json"],
    },
    KnownModel {
        name: "dino-vits16",
        family: Family::Dino,
        resolution: None,
        directory: "datasets/checkpoints/dino-vits16",
        hub: Some("facebook/dino-vits16"),
        files: &["config.json", "model.safetensors"],
    },
];

/// The known model called `name`.
pub fn known(name: &str) -> Option<&'static KnownModel> {
    KNOWN.iter().find(|model| model.name == name)
}

/// The family of the model called `name`, or of the checkpoint in the directory `name`.
///
/// # Errors
/// When `name` is neither known nor a directory whose layout tells its family.
pub fn family(name: &str) -> Result<Family> {
    if let Some(model) = known(name) {
        return Ok(model.family);
    }
    let directory = Path::new(name);
    if !directory.is_dir() {
        return Err(Error::invalid(
            format!("{name:?} is neither a known model nor a directory"),
            format!("known models: {}", known_names().join(", ")),
        ));
    }
    let read = |file: &str| -> Option<serde_json::Value> {
        let text = std::fs::read_to_string(directory.join(file)).ok()?;
        serde_json::from_str(&text).ok()
    };
    let pipeline = read("model_index.json");
    let config = read("config.json").or_else(|| read("gpt/config.json"));
    let class = text_at(&pipeline, "_class_name");
    let model_type = text_at(&config, "model_type");
    let has = |key: &str| config.as_ref().is_some_and(|json| json.get(key).is_some());
    match (class, model_type) {
        (Some("StableDiffusionXLPipeline"), _) => Ok(Family::Sdxl),
        (Some("StableDiffusion3Pipeline"), _) => Ok(Family::Sd3),
        (Some("FluxPipeline"), _) => Ok(Family::Flux),
        (_, Some("chameleon")) => Ok(Family::Lumina),
        (_, Some("clip")) => Ok(Family::Clip),
        (_, Some("vit")) => Ok(Family::Dino),
        _ if has("cls_token_num") => Ok(Family::LlamaGen),
        _ => Err(Error::invalid(
            format!("{name}: the layout tells no known model family"),
            "a checkpoint directory has a model_index.json (diffusers), or a config.json with model_type \
             (transformers) or cls_token_num (LlamaGen)",
        )),
    }
}

fn text_at<'a>(json: &'a Option<serde_json::Value>, key: &str) -> Option<&'a str> {
    json.as_ref()?.get(key)?.as_str()
}

/// The directory of the model called `name`, with all its files there. A name that is not known is taken as a
/// directory. Known models are looked for in the working directory, then above the program's own file.
///
/// # Errors
/// When files are missing: which, where they belong, and where they come from.
pub fn locate(name: &str) -> Result<PathBuf> {
    let Some(model) = known(name) else {
        let directory = PathBuf::from(name);
        return if directory.is_dir() {
            Ok(directory)
        } else {
            Err(Error::invalid(
                format!("{name:?} is neither a known model nor a directory"),
                format!("known models: {}", known_names().join(", ")),
            ))
        };
    };
    let program = std::env::current_exe().ok();
    let above = program.iter().flat_map(|path| path.ancestors().skip(1));
    std::iter::once(Path::new(""))
        .chain(above)
        .map(|base| base.join(model.directory))
        .find(|directory| directory.is_dir() && missing(model, directory).is_empty())
        .ok_or_else(|| absent(model))
}

fn missing(model: &KnownModel, directory: &Path) -> Vec<&'static str> {
    let is_missing = |file: &&&str| !directory.join(file).is_file();
    model.files.iter().filter(is_missing).copied().collect()
}

fn absent(model: &KnownModel) -> Error {
    let files = match missing(model, Path::new(model.directory)).as_slice() {
        [] => "everything".to_string(),
        files => files.join(", "),
    };
    let hint = match model.hub {
        None => "start in the repository that the program was built in: these files ship with it; or make them \
                 again with: proxytune pretrain pipelines/nano-pretrain.toml"
            .to_string(),
        Some(hub) => format!(
            "get the files from https://huggingface.co/{hub} and place them in {}, or set model to a directory \
             that has them",
            model.directory
        ),
    };
    Error::invalid(
        format!(
            "model {}: missing in {}: {files}",
            model.name, model.directory
        ),
        hint,
    )
}

/// All names in [`KNOWN`], in its order.
pub fn known_names() -> Vec<&'static str> {
    KNOWN.iter().map(|model| model.name).collect()
}
