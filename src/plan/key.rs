//! Digests that say what made something: work is addressed by them, so that nothing is made twice and an edited
//! setting never finds old results.

use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use super::{EvaluationPlan, Plan, Proxy, Schedule};
use crate::config::{DiffusionSampling, Resolved, Subject, Supervisor};
use crate::{Error, Result};

/// Digests named fields. Names and values are preceded by their lengths, so that no two lists of fields look alike.
#[derive(Debug, Clone)]
pub struct Digest(blake3::Hasher);

impl Digest {
    /// A digest of a thing of this kind. The kind's name changes when the way of making the thing changes.
    pub fn new(kind: &str) -> Self {
        Digest(blake3::Hasher::new())
            .part(b"proxytune")
            .part(kind.as_bytes())
    }

    /// Adds a field.
    pub fn field(self, name: &str, value: impl AsRef<[u8]>) -> Self {
        self.part(name.as_bytes()).part(value.as_ref())
    }

    /// Adds a whole number.
    pub fn number(self, name: &str, value: u64) -> Self {
        self.field(name, value.to_le_bytes())
    }

    /// The digest in hex, 64 characters.
    pub fn finish(&self) -> String {
        self.0.finalize().to_hex().to_string()
    }

    fn part(mut self, bytes: &[u8]) -> Self {
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
        self
    }
}

/// Digest of the photos of a subject, from the digests of their bytes in the order in which the plan numbers them.
pub fn photos_digest(photos: &[String]) -> String {
    let digest = Digest::new("photos 1").number("count", photos.len() as u64);
    photos
        .iter()
        .fold(digest, |digest, photo| digest.field("photo", photo))
        .finish()
}

/// Above this size only a file's beginning and end are read.
const READ_WHOLE: u64 = 1 << 30;
/// How much of each, in bytes. A safetensors file begins with the names, types and shapes of all its tensors.
const READ_PART: u64 = 16 << 20;

/// Digest of a checkpoint: all files under `directory`, or the one file that it names, with their relative paths, sizes and contents. Of a file of
/// 1 GiB and more, the first and last 16 MiB stand for the content. Hidden files and what is no part of a checkpoint
/// (pictures, texts for readers) do not count.
///
/// # Errors
/// When the folder or a file in it cannot be read, or there is no file.
pub fn checkpoint_digest(directory: &Path) -> Result<String> {
    let mut files = Vec::new();
    let directory = match (
        directory.is_file(),
        directory.parent(),
        directory.file_name(),
    ) {
        (true, Some(parent), Some(name)) => {
            files.push(PathBuf::from(name));
            parent
        }
        _ => {
            list(directory, Path::new(""), &mut files)?;
            directory
        }
    };
    files.sort();
    if files.is_empty() {
        return Err(Error::Checkpoint {
            path: directory.to_path_buf(),
            faults: vec!["there are no files".to_string()],
        });
    }
    let mut digest = Digest::new("checkpoint 1");
    for file in files {
        let path = directory.join(&file);
        let name = file
            .components()
            .map(|part| part.as_os_str().to_string_lossy())
            .collect::<Vec<_>>()
            .join("/");
        let (size, content) = content(&path).map_err(Error::io(&path))?;
        digest = digest
            .field("file", name)
            .number("size", size)
            .field("content", content);
    }
    Ok(digest.finish())
}

fn list(root: &Path, inside: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    const COUNT: [&str; 10] = [
        "json",
        "safetensors",
        "pt",
        "pth",
        "ckpt",
        "bin",
        "yaml",
        "txt",
        "model",
        "vocab",
    ];
    let folder = root.join(inside);
    for entry in std::fs::read_dir(&folder).map_err(Error::io(&folder))? {
        let entry = entry.map_err(Error::io(&folder))?;
        let path = inside.join(entry.file_name());
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        // through links, as the hub's cache consists of them
        let metadata = std::fs::metadata(root.join(&path)).map_err(Error::io(root.join(&path)))?;
        let counts = path
            .extension()
            .is_some_and(|end| COUNT.iter().any(|count| end == *count));
        if metadata.is_dir() {
            list(root, &path, files)?;
        } else if counts {
            files.push(path);
        }
    }
    Ok(())
}

fn content(path: &Path) -> std::io::Result<(u64, [u8; 32])> {
    let mut file = crate::files::open(path)?;
    let size = file.metadata()?.len();
    let mut hasher = blake3::Hasher::new();
    if size < READ_WHOLE {
        // A file that grows meanwhile does not keep this from ending.
        hasher.update_reader((&mut file).take(size))?;
    } else {
        hasher.update_reader((&mut file).take(READ_PART))?;
        file.seek(SeekFrom::End(-(READ_PART as i64)))?;
        hasher.update_reader(&mut file)?;
    }
    Ok((size, *hasher.finalize().as_bytes()))
}

/// Key of a supervisor: the photos ([`photos_digest`]), the base checkpoint ([`checkpoint_digest`]), the subject as
/// prompts name it, the seed, and all of `supervisor` but what cannot affect it.
///
/// # Errors
/// When the settings cannot be written as JSON.
pub fn supervisor_key(
    photos: &str,
    base: &str,
    subject: &Subject,
    supervisor: &Supervisor,
    seed: u64,
) -> Result<String> {
    let mut settings = json(supervisor)?;
    forget_what_has_no_effect(&mut settings);
    // the base checkpoint's digest says it better
    remove(&mut settings, "model");
    let digest = Digest::new("supervisor 1")
        .field("photos", photos)
        .field("base", base)
        .field("subject", &subject.name)
        .field("class", &subject.class)
        .field("token", &subject.token)
        .field("device", supervisor.device.kind())
        .field("settings", settings.to_string())
        .number("seed", seed);
    Ok(digest.finish())
}

/// Keys of the proxies of batch `batch` of `plan`, in the order of their numbers: the supervisor ([`supervisor_key`]),
/// how it samples, the prompts and seeds of the whole batch, as batches are remade whole, and the place in it. The
/// number of the batch has no part in it, so that more subjects or more proxies leave whole batches as they are.
///
/// # Errors
/// When the settings cannot be written as JSON.
pub fn proxy_keys(
    plan: &Plan,
    batch: usize,
    supervisor: &str,
    sampling: &DiffusionSampling,
) -> Result<Vec<String>> {
    let members = &plan.proxies()[plan.batch(batch).numbers.clone()];
    let mut digest = Digest::new("proxy 1")
        .field("supervisor", supervisor)
        .field("sampling", json(sampling)?.to_string())
        .number("members", members.len() as u64);
    for Proxy { prompt, seed, .. } in members {
        digest = digest.field("prompt", prompt).number("seed", *seed);
    }
    let places = 0..members.len() as u64;
    Ok(places
        .map(|place| digest.clone().number("place", place).finish())
        .collect())
}

/// Key of a pair of evaluators, from the folders of their checkpoints: scores and embeddings of one key can be compared.
///
/// # Errors
/// Those of [`checkpoint_digest`].
pub fn evaluators_key(clip: &Path, dino: &Path) -> Result<String> {
    Ok(Digest::new("evaluators 1")
        .field("clip", checkpoint_digest(clip)?)
        .field("dino", checkpoint_digest(dino)?)
        .finish())
}

/// Key of a reference image, from its subject's name and the digest of its bytes.
pub fn reference_key(subject: &str, photo: &str) -> String {
    Digest::new("reference")
        .field("subject", subject)
        .field("photo", photo)
        .finish()
}

/// Digest of a plan with the settings that affect the result.
pub(super) fn plan_digest(
    resolved: &Resolved,
    subjects: &[(String, usize)],
    proxies: &[Proxy],
    student: &Schedule,
    evaluation: &EvaluationPlan,
) -> Result<String> {
    let mut settings = json(resolved)?;
    remove(&mut settings, "channels");
    // its digest says it better
    if let Some(student) = settings.get_mut("student") {
        remove(student, "init");
    }
    forget_what_has_no_effect(&mut settings);
    let mut digest = Digest::new("plan 1").field("settings", settings.to_string());
    for (name, photos) in subjects {
        digest = digest
            .field("subject", name)
            .number("photos", *photos as u64);
    }
    for proxy in proxies {
        digest = digest
            .number("subject", proxy.subject as u64)
            .field("prompt", &proxy.prompt)
            .number("seed", proxy.seed);
    }
    let uses: Vec<u8> = student
        .items()
        .iter()
        .flat_map(|item| (*item as u64).to_le_bytes())
        .collect();
    digest = digest.field("lessons", uses);
    for image in &evaluation.images {
        digest = digest
            .field("evaluation", &image.prompt)
            .number("seed", image.seed);
    }
    Ok(digest.finish())
}

/// Removes, at any depth, how often checkpoints are written, what is kept for backward passes, and a `dtype` that is
/// the checkpoint's own (whose digest goes into the same keys); of a device its kind stays, as the number of a card
/// does not matter.
fn forget_what_has_no_effect(settings: &mut Value) {
    let Value::Object(fields) = settings else {
        return;
    };
    fields.shift_remove("checkpoint_every");
    fields.shift_remove("memory");
    if fields.get("dtype").is_some_and(|dtype| dtype == "auto") {
        fields.shift_remove("dtype");
    }
    if let Some(Value::String(device)) = fields.get_mut("device") {
        let kind = device.split(':').next().unwrap_or_default().to_string();
        *device = kind;
    }
    fields.values_mut().for_each(forget_what_has_no_effect);
}

fn remove(settings: &mut Value, field: &str) {
    if let Value::Object(fields) = settings {
        fields.shift_remove(field);
    }
}

fn json(settings: &impl Serialize) -> Result<Value> {
    serde_json::to_value(settings).map_err(|error| {
        Error::invalid(
            format!("settings cannot be written as JSON: {error}"),
            "use file names that are valid UTF-8",
        )
    })
}
