//! Which architectures there are, and which models by name.

use std::path::{Path, PathBuf};

use super::family::{Architecture, KnownModel, Layout};
use super::{chameleon, clip, flux, llamagen, locate, sd3, sdxl, vit};
use crate::config::limits::TEXT_BYTES;
use crate::config::{Family, Model, Surroundings};
use crate::hub::RepoId;
use crate::hub::parts::{self, Network, Parts};
use crate::{Error, Result, files};

/// Every architecture.
pub static ARCHITECTURES: [&Architecture; 7] = [
    &sdxl::ARCHITECTURE,
    &sd3::ARCHITECTURE,
    &flux::ARCHITECTURE,
    &llamagen::ARCHITECTURE,
    &chameleon::ARCHITECTURE,
    &clip::ARCHITECTURE,
    &vit::ARCHITECTURE,
];

/// The architecture of `family`.
///
/// # Errors
/// When [`ARCHITECTURES`] lacks it.
pub fn architecture(family: Family) -> Result<&'static Architecture> {
    let mut all = ARCHITECTURES.iter();
    all.find(|architecture| architecture.family == family)
        .copied()
        .ok_or_else(|| Error::Invalid {
            what: format!("no architecture is {family}"),
            hint: None,
        })
}

/// Every model known by name: what ships first.
pub fn known_models() -> impl Iterator<Item = (Family, &'static KnownModel)> {
    let of_all = |ships: bool| {
        ARCHITECTURES.iter().flat_map(move |architecture| {
            let models = architecture.models.iter();
            let models = models.filter(move |model| model.hub.is_none() == ships);
            models.map(|model| (architecture.family, model))
        })
    };
    of_all(true).chain(of_all(false))
}

/// The known model called `name`.
pub fn known(name: &str) -> Option<&'static KnownModel> {
    known_models().find_map(|(_, model)| (model.name == name).then_some(model))
}

/// The family of the model called `name`, or of the checkpoint in the directory or repository `name`.
///
/// # Errors
/// When `name` is neither known nor a checkpoint on this machine whose layout tells its family.
pub fn family(name: &str) -> Result<Family> {
    if let Some((family, _)) = known_models().find(|(_, model)| model.name == name) {
        return Ok(family);
    }
    let directory = &match locate::look_for(name)?.folder {
        Some(folder) => folder,
        None => return Err(locate::absent_repository(name)),
    };
    family_of(directory)?.ok_or_else(|| {
        Error::invalid(
            format!("{name}: the layout tells no known model family"),
            "a checkpoint directory has a model_index.json (diffusers), or a config.json with model_type \
             (transformers) or cls_token_num (LlamaGen), or LlamaGen's t2i_*.pt, or a single file of SDXL, SD3 or \
             FLUX.1 (safetensors or GGUF)",
        )
    })
}

/// The family that the layout of the checkpoint in `directory` tells; a single file tells it too.
///
/// # Errors
/// When a file that would tell it cannot be read.
pub fn family_of(directory: &Path) -> Result<Option<Family>> {
    let layout = Layout::read(directory)?;
    let mut all = ARCHITECTURES.iter();
    let found = all.find(|architecture| (architecture.recognises)(&layout));
    if let Some(architecture) = found {
        return Ok(Some(architecture.family));
    }
    Ok(Parts::find(directory)?.map(|parts| match parts.network {
        Network::Sdxl => sdxl::FAMILY,
        Network::Sd3 => sd3::FAMILY,
        Network::Flux => flux::FAMILY,
    }))
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
    let Ok(Some(folder)) = locate::look_for(name).map(|found| found.folder) else {
        return false;
    };
    let tokenizers = ["t5", "tokenizer", ""].map(|part| folder.join(part).join("tokenizer.json"));
    tokenizers.iter().any(|file| {
        let read = crate::files::read_json::<Tokenizer>(file);
        read.is_ok_and(|tokenizer| tokenizer.model.r#type == "WordLevel")
    })
}

/// The models and files of this machine.
#[derive(Debug, Clone, Copy, Default)]
pub struct Registry;

impl Surroundings for Registry {
    fn model(&self, name: &str) -> Result<Model> {
        Ok(Model {
            family: family(name)?,
            resolution: known(name).and_then(|model| model.resolution),
        })
    }

    fn models(&self) -> Vec<(&'static str, Family)> {
        known_models()
            .map(|(family, model)| (model.name, family))
            .collect()
    }

    fn names_a_place(&self, name: &str) -> bool {
        let is_file = parts::is_named(Path::new(name));
        self.is_dir(Path::new(name)) || RepoId::parse(name).is_some() && !is_file
    }

    fn evaluators(&self, student: Option<&str>) -> [&'static str; 2] {
        evaluators(student)
    }

    fn text(&self, path: &Path) -> Result<Option<String>> {
        files::text::read_if_there(path, TEXT_BYTES)
    }

    fn digest(&self, path: &Path) -> Result<String> {
        files::digest_of(path)
    }

    fn entries(&self, path: &Path) -> Result<Vec<PathBuf>> {
        let entries = std::fs::read_dir(path).map_err(Error::io(path))?;
        let paths = entries.map(|entry| Ok(entry.map_err(Error::io(path))?.path()));
        paths.collect()
    }

    fn is_dir(&self, path: &Path) -> bool {
        path.is_dir()
    }

    fn threads(&self) -> usize {
        std::thread::available_parallelism().map_or(1, usize::from)
    }
}
