//! The hub's cache as `huggingface_hub` lays it out: `models--owner--name/{blobs,refs,snapshots}`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::Settings;
use super::names::{is_file_name, is_id, is_repository_path, is_revision};
use super::published::{is_index, shards_named};
use crate::files::{list, read_json};
use crate::{Error, Result};

/// A repository of models at one of its revisions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepoId {
    /// `owner/name`.
    pub id: String,
    /// A branch, a tag or a commit.
    pub revision: String,
}

impl RepoId {
    /// The default branch.
    pub fn main(id: &str) -> Self {
        Self {
            id: id.to_string(),
            revision: "main".to_string(),
        }
    }

    /// Reads `owner/name` or `owner/name@revision`; `None` for anything else, such as a path.
    pub fn parse(text: &str) -> Option<Self> {
        let (id, revision) = text.split_once('@').unwrap_or((text, "main"));
        let is_part = |part: &str| {
            let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !part.is_empty() && part.chars().all(allowed) && !part.starts_with('.')
        };
        let (owner, name) = id.split_once('/')?;
        (is_part(owner) && is_part(name) && is_revision(revision)).then(|| Self {
            id: id.to_string(),
            revision: revision.to_string(),
        })
    }

    /// Its folder in the cache.
    pub fn folder(&self, settings: &Settings) -> PathBuf {
        let name = format!("models--{}", self.id.replace('/', "--"));
        settings.cache.join(name)
    }
}

impl std::fmt::Display for RepoId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.revision.as_str() {
            "main" => f.write_str(&self.id),
            revision => write!(f, "{}@{revision}", self.id),
        }
    }
}

/// The files of a repository that are in the cache, at one commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    pub folder: PathBuf,
}

impl Snapshot {
    /// The snapshot that the cache has for this revision, whole or not.
    pub fn find(settings: &Settings, repo: &RepoId) -> Option<Self> {
        let root = repo.folder(settings);
        if !is_revision(&repo.revision) {
            return None;
        }
        let commit = match crate::files::read_text(
            &root.join("refs").join(&repo.revision),
            crate::files::SETTINGS,
        ) {
            Ok(commit) => Some(commit.trim().to_string()).filter(|commit| is_id(commit))?,
            Err(_) => repo.revision.clone(),
        };
        let folder = root.join("snapshots").join(commit);
        folder.is_dir().then_some(Self { folder })
    }

    /// Where the file `path` of the repository lies, if it is there.
    pub(super) fn file(&self, path: &str) -> Option<PathBuf> {
        let at = is_repository_path(path).then(|| self.folder.join(path))?;
        at.is_file().then_some(at)
    }

    /// All links in it.
    ///
    /// # Errors
    /// When a folder cannot be read.
    pub(super) fn links(&self) -> Result<Vec<PathBuf>> {
        let mut folders = vec![self.folder.clone()];
        let mut found = Vec::new();
        while let Some(folder) = folders.pop() {
            for (_, path) in list(&folder)? {
                let kind = path.symlink_metadata().map_err(Error::io(&path))?;
                if kind.is_dir() {
                    folders.push(path);
                } else if kind.is_symlink() {
                    found.push(path);
                }
            }
        }
        Ok(found)
    }

    /// Whether it has what its own files say belongs to it: weights, all shards of every index, and the folder of
    /// every component of a diffusers pipeline; and no link that leads nowhere.
    pub fn seems_complete(&self) -> bool {
        let links = self.links();
        if !links.is_ok_and(|links| links.iter().all(|link| link.exists())) {
            return false;
        }
        let index = read_json::<Value>(&self.folder.join("model_index.json")).ok();
        let Some(components) = index.as_ref().and_then(Value::as_object) else {
            return has_whole_weights(&self.folder);
        };
        components
            .iter()
            .filter(|(name, class)| {
                let named = class.get(1).is_some_and(Value::is_string);
                let optional = ["safety_checker", "feature_extractor", "image_encoder"];
                named && !optional.contains(&name.as_str())
            })
            .all(|(name, _)| {
                let folder = self.folder.join(name);
                let light = name.starts_with("tokenizer") || name == "scheduler";
                is_file_name(name) && folder.is_dir() && (light || has_whole_weights(&folder))
            })
    }
}

/// Whether `folder` itself has weights, and all shards that its indices name.
fn has_whole_weights(folder: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return false;
    };
    let names: Vec<String> = entries
        .flatten()
        .filter(|entry| entry.path().is_file())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    let is_weights = |name: &String| {
        [".safetensors", ".bin", ".pt", ".pth", ".ckpt"]
            .iter()
            .any(|end| name.ends_with(end))
    };
    names.iter().any(is_weights)
        && names.iter().filter(|name| is_index(name)).all(|name| {
            let shards = shards_named(name, &folder.join(name));
            shards.is_ok_and(|shards| shards.iter().all(|shard| folder.join(shard).is_file()))
        })
}

/// Whether `path` is a file of settings, an index or a tokenizer: small.
pub(super) fn is_settings(path: &str) -> bool {
    let ends = [".json", ".txt", ".model", ".yaml"];
    ends.iter().any(|end| path.ends_with(end))
}

/// Which files of a repository with these `paths` loading may want: settings, tokenizers, and of each component's
/// weights the first kind of safetensors, whole or in shards, full precision or half, or torch's own.
pub fn choose(paths: &[String]) -> Vec<String> {
    let is_pipeline = paths.iter().any(|path| path == "model_index.json");
    // In one pass: a listing may have as many folders as files.
    let mut folders: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for path in paths {
        let (folder, name) = path.rsplit_once('/').unwrap_or(("", path.as_str()));
        folders.entry(folder).or_default().push(name.to_string());
    }
    let mut chosen = Vec::new();
    for (folder, names) in folders {
        let mut picked: Vec<String> = names
            .iter()
            .filter(|name| is_settings(name) && !is_index(name))
            .cloned()
            .collect();
        // Beside the components of a pipeline lie whole checkpoints in other layouts.
        if !(is_pipeline && folder.is_empty()) {
            picked.extend(choose_weights(&names));
        }
        chosen.extend(picked.into_iter().map(|name| match folder {
            "" => name,
            folder => format!("{folder}/{name}"),
        }));
    }
    chosen
}

fn choose_weights(names: &[String]) -> Vec<String> {
    let kinds: [&[&str]; 6] = [
        &[
            "model.safetensors.index.json",
            "diffusion_pytorch_model.safetensors.index.json",
        ],
        &["model.safetensors", "diffusion_pytorch_model.safetensors"],
        &[
            "model.safetensors.index.fp16.json",
            "diffusion_pytorch_model.safetensors.index.fp16.json",
        ],
        &[
            "model.fp16.safetensors",
            "diffusion_pytorch_model.fp16.safetensors",
        ],
        &["pytorch_model.bin.index.json"],
        &["pytorch_model.bin", "diffusion_pytorch_model.bin"],
    ];
    let there = |kind: &&&[&str]| kind.iter().any(|name| names.iter().any(|n| n == name));
    match kinds.iter().find(there) {
        Some(kind) => {
            let is_chosen = |name: &&String| kind.contains(&name.as_str());
            names.iter().filter(is_chosen).cloned().collect()
        }
        None => {
            let is_weights = |name: &&String| {
                [".safetensors", ".pt", ".pth", ".ckpt"]
                    .iter()
                    .any(|end| name.ends_with(end))
            };
            names.iter().filter(is_weights).cloned().collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_with_a_folder_for_each_file_is_chosen_from_at_once() {
        let paths: Vec<String> = (0..200_000).map(|n| format!("{n}/config.json")).collect();
        let begun = std::time::Instant::now();
        assert_eq!(choose(&paths).len(), paths.len());
        assert!(begun.elapsed().as_secs() < 5);
    }

    #[test]
    fn hub_ids_are_told_from_paths_and_names() {
        let repo = RepoId::parse("owner/some-model_1.5").unwrap();
        assert_eq!(
            (repo.id.as_str(), repo.revision.as_str()),
            ("owner/some-model_1.5", "main")
        );
        let repo = RepoId::parse("owner/model@refs/pr/3").unwrap();
        assert_eq!(repo.revision, "refs/pr/3");
        assert_eq!(repo.to_string(), "owner/model@refs/pr/3");
        for other in [
            "name",
            "/a/b",
            "./b",
            "../b",
            "a/b/c",
            "a/",
            "a/b@",
            "a b/c",
            "a/b@../../../etc",
            "a/b@/etc",
        ] {
            assert_eq!(RepoId::parse(other), None, "{other}");
        }
    }

    #[test]
    fn one_kind_of_weights_is_chosen_for_each_component() {
        let paths = |all: &[&str]| all.iter().map(|p| p.to_string()).collect::<Vec<_>>();
        let transformers = paths(&[
            "README.md",
            "config.json",
            "flax_model.msgpack",
            "model.safetensors",
            "pytorch_model.bin",
            "tokenizer.json",
        ]);
        assert_eq!(
            choose(&transformers),
            ["config.json", "tokenizer.json", "model.safetensors"]
        );
        let pipeline = paths(&[
            "model_index.json",
            "whole.safetensors",
            "unet/config.json",
            "unet/diffusion_pytorch_model.fp16.safetensors",
            "unet/diffusion_pytorch_model.safetensors",
            "tokenizer/merges.txt",
            "tokenizer/vocab.json",
            "text_encoder/model.safetensors.index.json",
            "text_encoder/model-00001-of-00002.safetensors",
        ]);
        assert_eq!(
            choose(&pipeline),
            [
                "model_index.json",
                "text_encoder/model.safetensors.index.json",
                "tokenizer/merges.txt",
                "tokenizer/vocab.json",
                "unet/config.json",
                "unet/diffusion_pytorch_model.safetensors",
            ]
        );
        assert_eq!(choose(&paths(&["a.pt", "b.pt", "x.png"])), ["a.pt", "b.pt"]);
    }

    #[test]
    fn a_snapshot_with_a_shard_missing_is_not_complete() {
        let folder = tempfile::tempdir().unwrap();
        let snapshot = Snapshot {
            folder: folder.path().to_path_buf(),
        };
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("config.json", "{}");
        assert!(!snapshot.seems_complete());
        write(
            "model.safetensors.index.json",
            r#"{"weight_map": {"x": "one.safetensors", "y": "two.safetensors"}}"#,
        );
        write("one.safetensors", "");
        assert!(!snapshot.seems_complete());
        write("two.safetensors", "");
        assert!(snapshot.seems_complete());
        write(
            "model_index.json",
            r#"{"_class_name": "X", "vae": ["diffusers", "V"], "t3": [null, null], "tokenizer": ["t", "T"]}"#,
        );
        write("tokenizer/vocab.json", "{}");
        assert!(!snapshot.seems_complete());
        write("vae/diffusion_pytorch_model.safetensors", "");
        assert!(snapshot.seems_complete());
    }
}
