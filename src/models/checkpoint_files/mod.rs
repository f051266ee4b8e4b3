//! The weight files of a checkpoint, whatever their kind: safetensors, whole or in shards; GGUF; a part of a single file
//! that holds a whole model under names of its own; or torch's own files, which are converted once and then memory-mapped
//! like the others.

mod deduced;
mod layout;
mod names;

pub use self::layout::Layout;
pub use self::names::Names;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use candle_core::Device;
use serde_json::{Value, json};

use super::pickle::Pickle;
use crate::files::tensor_headers::{is_gguf, tensors_in};
use crate::files::{self, read_json};
use crate::hub::parts::{PartFile, parts_of};
use crate::hub::{Settings, shard_names};
use crate::nn::{Precision, Weights};
use crate::{Error, Result};

/// Torch's files up to this many bytes are read as they are; converting them would save nothing.
const READ_AT_ONCE: u64 = 64 << 20;

/// Tensors by name, with their shapes.
pub type Shapes = Vec<(String, Vec<usize>)>;

/// The weight files of one component.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WeightFiles {
    /// All shards of one checkpoint, or its single file.
    Safetensors(Vec<PathBuf>),
    /// The same in torch's zip format.
    Pickles(Vec<PathBuf>),
    /// A part of a file of safetensors or GGUF, under the names that single files have.
    Part(PartFile),
    /// A GGUF file under the names of diffusers or transformers.
    Gguf(PathBuf),
}

impl WeightFiles {
    /// Finds the weights called `stem` in `folder`: `model` for LlamaGen's and transformers' models (which in torch's
    /// format are `pytorch_model.bin` and `model.pt`), `diffusion_pytorch_model` for diffusers'. Safetensors are
    /// preferred, shards to a single file, and full precision to `.bf16` and `.fp16`; where there are none of them, the
    /// only GGUF file in the folder is taken.
    ///
    /// # Errors
    /// When there are none, or shards that the index names are missing.
    pub fn find(folder: &Path, stem: &str) -> Result<Self> {
        for variant in ["", ".bf16", ".fp16"] {
            let index = folder.join(format!("{stem}.safetensors.index{variant}.json"));
            if index.is_file() {
                return Ok(Self::Safetensors(shards(&index)?));
            }
            let single = folder.join(format!("{stem}{variant}.safetensors"));
            if single.is_file() {
                return Ok(Self::Safetensors(vec![single]));
            }
        }
        let torch = match stem {
            "model" => ["pytorch_model.bin", "model.pt"].as_slice(),
            _ => &["diffusion_pytorch_model.bin"],
        };
        for name in torch {
            let index = folder.join(format!("{name}.index.json"));
            if index.is_file() {
                return Ok(Self::Pickles(shards(&index)?));
            }
            let single = folder.join(name);
            if single.is_file() {
                return Ok(Self::Pickles(vec![single]));
            }
        }
        let packed = files::list(folder)?.into_iter();
        let packed: Vec<PathBuf> = packed
            .map(|(_, path)| path)
            .filter(|path| is_gguf(path))
            .collect();
        match packed.as_slice() {
            [one] => Self::gguf(one),
            [] => Err(fault(folder, format!("{stem}.safetensors is missing"))),
            _ => Err(fault(folder, "holds several GGUF files: leave one of them")),
        }
    }

    /// The GGUF file at `path`, whatever part it holds.
    fn gguf(path: &Path) -> Result<Self> {
        let mut parts = parts_of(path)?.into_iter();
        Ok(parts
            .next()
            .map_or(Self::Gguf(path.to_path_buf()), Self::Part))
    }

    /// The weights in the single file `path`, of either kind.
    pub fn single(path: &Path) -> Self {
        if path.extension().is_some_and(|end| end == "safetensors") {
            Self::Safetensors(vec![path.to_path_buf()])
        } else {
            Self::Pickles(vec![path.to_path_buf()])
        }
    }

    /// The files.
    pub fn paths(&self) -> &[PathBuf] {
        match self {
            Self::Safetensors(files) | Self::Pickles(files) => files,
            Self::Part(PartFile { path, .. }) | Self::Gguf(path) => std::slice::from_ref(path),
        }
    }

    /// All of it as safetensors files under the models' own names: torch's are converted, unless that has been done
    /// before.
    ///
    /// # Errors
    /// When a conversion fails; for GGUF and parts of single files, which are other than that.
    pub fn into_safetensors(self) -> Result<Vec<PathBuf>> {
        match self {
            Self::Safetensors(files) => Ok(files),
            Self::Pickles(files) => {
                let made = Settings::from_env()?.made();
                files.iter().map(|file| converted(file, &made)).collect()
            }
            Self::Part(PartFile { path, .. }) | Self::Gguf(path) => Err(Error::invalid(
                format!("{} is not in diffusers' layout", path.display()),
                "use the model in that layout for this",
            )),
        }
    }

    /// Frozen weights of these files. Small files of torch are read, large ones converted.
    pub fn open(self, precision: impl Into<Precision>, device: &Device) -> Result<Weights> {
        match self {
            Self::Pickles(files) => open_pickles(files, precision, device),
            Self::Safetensors(files) => Weights::from_files(&files, precision, device),
            Self::Gguf(path) => Weights::from_files(&[path], precision, device),
            Self::Part(part) => {
                let names = names_of(&part)?;
                let ours = |name: &str, dims: &[usize]| names.ours(name, dims);
                Weights::from_renamed(&[part.path], Some(&ours), precision, device)
            }
        }
    }

    /// Trainable weights that start from these files; see [`Weights::trainable`].
    pub fn open_trainable(self, seed: u64, device: &Device) -> Result<Weights> {
        match self {
            Self::Safetensors(_) | Self::Pickles(_) => {
                Weights::trainable(&self.into_safetensors()?, seed, device)
            }
            Self::Gguf(path) => Weights::trainable(&[path], seed, device),
            Self::Part(part) => {
                let names = names_of(&part)?;
                let ours = |name: &str, dims: &[usize]| names.ours(name, dims);
                Weights::trainable_renamed(&[part.path], Some(&ours), seed, device)
            }
        }
    }

    /// Names and shapes of all tensors, as models call them; `None` for torch's files, which would have to be converted.
    ///
    /// # Errors
    /// When a file is damaged.
    pub fn shapes(&self) -> Result<Option<Shapes>> {
        let mut shapes = Vec::new();
        match self {
            Self::Pickles(_) => return Ok(None),
            Self::Safetensors(files) => {
                for file in files {
                    shapes.extend(tensors_in(file)?);
                }
            }
            Self::Gguf(path) => shapes = tensors_in(path)?,
            Self::Part(part) => {
                let names = names_of(part)?;
                for (name, dims) in tensors_in(&part.path)? {
                    let ours = names.ours(&name, &dims).into_iter();
                    shapes.extend(ours.map(|(name, cut)| (name, cut.shape(&dims))));
                }
            }
        }
        Ok(Some(shapes))
    }
}

fn names_of(part: &PartFile) -> Result<Names> {
    Ok(Names::of(part.part, &part.prefix, &tensors_in(&part.path)?))
}

/// Frozen weights of torch's `files`: small ones are read, large ones converted.
fn open_pickles(
    files: Vec<PathBuf>,
    precision: impl Into<Precision>,
    device: &Device,
) -> Result<Weights> {
    let mut bytes = 0;
    for file in &files {
        bytes += std::fs::metadata(file).map_err(Error::io(file))?.len();
    }
    if bytes > READ_AT_ONCE {
        let files = WeightFiles::Pickles(files).into_safetensors()?;
        return Weights::from_files(&files, precision, device);
    }
    let mut tensors = std::collections::HashMap::new();
    for file in &files {
        tensors.extend(Pickle::open(file)?.read_all()?);
    }
    Ok(Weights::from_tensors(tensors, precision, device))
}

/// Frozen weights called `stem` in `folder`; see [`WeightFiles::find`].
pub fn open(
    folder: &Path,
    stem: &str,
    precision: impl Into<Precision>,
    device: &Device,
) -> Result<Weights> {
    WeightFiles::find(folder, stem)?.open(precision, device)
}

/// The files that an index of shards names, all of them there.
pub fn shards(index: &Path) -> Result<Vec<PathBuf>> {
    let files: Vec<PathBuf> = shard_names(index)?
        .iter()
        .map(|name| index.with_file_name(name))
        .collect();
    let missing: Vec<String> = files
        .iter()
        .filter(|file| !file.is_file())
        .map(|file| format!("{} is missing", file.display()))
        .collect();
    if missing.is_empty() {
        return Ok(files);
    }
    Err(Error::Checkpoint {
        path: index.to_path_buf(),
        faults: missing,
    })
}

/// The safetensors file that was made of torch's file `source`, in a folder of its own below `made`. It is made when
/// it is not there yet, and made again when `source` has another size or time; whoever comes meanwhile waits.
pub fn converted(source: &Path, made: &Path) -> Result<PathBuf> {
    let whole = source.canonicalize().map_err(Error::io(source))?;
    let metadata = std::fs::metadata(&whole).map_err(Error::io(source))?;
    let modified = metadata.modified().map_err(Error::io(source))?;
    let since = modified.duration_since(UNIX_EPOCH).unwrap_or_default();
    let origin = json!({
        "source": whole.to_string_lossy(),
        "size": metadata.len(),
        "modified_ns": since.as_nanos().to_string(),
    });
    let digest = blake3::hash(whole.to_string_lossy().as_bytes()).to_hex();
    let folder = made.join("converted").join(&digest[..16]);
    files::create_dir(&folder)?;
    let lock = File::create(folder.join("lock")).map_err(Error::io(&folder))?;
    lock.lock().map_err(Error::io(&folder))?;
    let (target, record) = (folder.join("model.safetensors"), folder.join("source.json"));
    let known = read_json::<Value>(&record).ok();
    if known.as_ref() == Some(&origin) && target.is_file() {
        return Ok(target);
    }
    tracing::info!(
        "converting {} to safetensors, once: {}",
        source.display(),
        target.display()
    );
    // Without its record a file that is half-way replaced counts as none.
    files::remove_file(&record)?;
    Pickle::open(&whole)?.convert(&target)?;
    files::write(&record, format!("{origin:#}\n").as_bytes())?;
    Ok(target)
}

fn fault(path: &Path, what: impl Into<String>) -> Error {
    Error::Checkpoint {
        path: path.to_path_buf(),
        faults: vec![what.into()],
    }
}
