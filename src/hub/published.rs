//! What a published checkpoint consists of, and how much of it a place holds.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::names::is_file_name;
use super::snapshot::Snapshot;
use super::{RepoId, Settings};
use crate::files::read_json;
use crate::{Error, Result};

/// A checkpoint that others publish: which files of which repositories, and what one should know before loading it.
#[derive(Debug, PartialEq, Eq)]
pub struct Published {
    /// The licence by its name, or where it is said.
    pub licence: &'static str,
    /// Numbers held in memory when it is loaded, in millions.
    pub million_parameters: u64,
    pub repositories: &'static [Repository],
    /// Files that no hub has: what they are, where they come from.
    pub by_hand: &'static [ByHand],
}

/// One repository's part of a checkpoint.
#[derive(Debug, PartialEq, Eq)]
pub struct Repository {
    /// `owner/name` on the hub.
    pub id: &'static str,
    /// What it is for.
    pub role: &'static str,
    /// Whether its terms must be accepted first.
    pub gated: bool,
    /// The folder of the checkpoint that its files belong into; empty for the checkpoint's own.
    pub into: &'static str,
    pub files: &'static [Wanted],
    /// About how much there is to download, in megabytes.
    pub megabytes: u64,
}

/// A file of a repository. An index (`.index.json`) stands for the shards that it names, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    Needed(&'static str),
    /// Taken where there is one.
    Useful(&'static str),
    /// The first of these that there is.
    OneOf(&'static [&'static str]),
}

impl Wanted {
    /// The paths that do, best first, and whether one of them must be there.
    pub(super) fn choices(&self) -> (&[&'static str], bool) {
        match self {
            Wanted::Needed(path) => (std::slice::from_ref(path), true),
            Wanted::Useful(path) => (std::slice::from_ref(path), false),
            Wanted::OneOf(paths) => (paths, true),
        }
    }
}

/// A file to be placed by hand.
#[derive(Debug, PartialEq, Eq)]
pub struct ByHand {
    /// Path in the checkpoint's folder.
    pub path: &'static str,
    /// Another file that does as well.
    pub or: Option<&'static str>,
    pub role: &'static str,
    /// Where it comes from.
    pub from: &'static str,
}

/// A file of a checkpoint that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Its path in the checkpoint.
    pub path: String,
    /// Where it lies.
    pub at: PathBuf,
}

/// How much of a checkpoint a place holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Presence {
    pub found: Vec<Found>,
    /// Paths of files that are not there; of alternatives, the first that is no index.
    pub missing: Vec<String>,
    /// The same for files that nobody but the user can place.
    pub missing_by_hand: Vec<String>,
    /// The numbers of the repositories that lack files.
    pub incomplete: Vec<usize>,
}

impl Presence {
    /// Whether nothing is missing.
    pub fn is_complete(&self) -> bool {
        self.missing.is_empty() && self.missing_by_hand.is_empty()
    }

    /// Bytes of all that is there.
    pub fn bytes(&self) -> u64 {
        let size = |found: &Found| std::fs::metadata(&found.at).map_or(0, |file| file.len());
        self.found.iter().map(size).sum()
    }
}

impl Published {
    /// How much of it lies in `folder`, whose files are placed as loading wants them.
    pub fn in_folder(&self, folder: &Path) -> Presence {
        let look =
            |repository: &Repository, path: &str| existing(folder.join(repository.into).join(path));
        let by_hand = |path: &str| existing(folder.join(path));
        self.presence(look, by_hand)
    }

    /// How much of it lies in the hub's cache; `folder` may hold what is placed by hand.
    pub fn in_cache(&self, settings: &Settings, folder: &Path) -> Presence {
        let snapshots: Vec<Option<Snapshot>> = self
            .repositories
            .iter()
            .map(|repository| Snapshot::find(settings, &RepoId::main(repository.id)))
            .collect();
        let look = |repository: &Repository, path: &str| {
            let number = self
                .repositories
                .iter()
                .position(|other| other == repository)?;
            existing(snapshots[number].as_ref()?.folder.join(path))
        };
        self.presence(look, |path| existing(folder.join(path)))
    }

    fn presence(
        &self,
        look: impl Fn(&Repository, &str) -> Option<PathBuf>,
        by_hand: impl Fn(&str) -> Option<PathBuf>,
    ) -> Presence {
        let mut presence = Presence::default();
        for (number, repository) in self.repositories.iter().enumerate() {
            let inside = |path: &str| match repository.into {
                "" => path.to_string(),
                into => format!("{into}/{path}"),
            };
            let before = presence.missing.len();
            for wanted in repository.files {
                let (choices, needed) = wanted.choices();
                let found = choices
                    .iter()
                    .find_map(|path| Some((*path, look(repository, path)?)));
                let Some((path, at)) = found else {
                    if needed {
                        let plain = choices.iter().find(|path| !is_index(path));
                        presence
                            .missing
                            .extend(plain.or(choices.first()).map(|p| inside(p)));
                    }
                    continue;
                };
                match shards_named(path, &at) {
                    Ok(shards) => {
                        for shard in shards {
                            match look(repository, &shard) {
                                Some(at) => presence.found.push(Found {
                                    path: inside(&shard),
                                    at,
                                }),
                                None => presence.missing.push(inside(&shard)),
                            }
                        }
                    }
                    // Getting it or loading it says why it cannot be used.
                    Err(_) => presence.missing.push(inside(path)),
                }
                presence.found.push(Found {
                    path: inside(path),
                    at,
                });
            }
            if presence.missing.len() > before {
                presence.incomplete.push(number);
            }
        }
        for file in self.by_hand {
            let choices = std::iter::once(file.path).chain(file.or);
            let mut there = choices.filter_map(|path| Some((path, by_hand(path)?)));
            match there.next() {
                Some((path, at)) => presence.found.push(Found {
                    path: path.to_string(),
                    at,
                }),
                None => presence.missing_by_hand.push(file.path.to_string()),
            }
        }
        presence
    }
}

fn existing(path: PathBuf) -> Option<PathBuf> {
    path.is_file().then_some(path)
}

/// The paths, in the repository, of the shards that the index `path`, which lies at `at`, names; none where `path`
/// is no index.
///
/// # Errors
/// As [`shard_names`].
pub(super) fn shards_named(path: &str, at: &Path) -> Result<Vec<String>> {
    if !is_index(path) {
        return Ok(Vec::new());
    }
    let folder = path.rsplit_once('/').map(|(folder, _)| folder);
    let inside = |name: String| match folder {
        Some(folder) => format!("{folder}/{name}"),
        None => name,
    };
    Ok(shard_names(at)?.into_iter().map(inside).collect())
}

/// An index of shards.
#[derive(Deserialize)]
struct Index {
    /// The shard of each tensor.
    weight_map: BTreeMap<String, String>,
}

/// The names of the shards beside the index that lies at `index`, in order.
///
/// # Errors
/// When it cannot be read, names none, or something that is no file beside it.
pub fn shard_names(index: &Path) -> Result<BTreeSet<String>> {
    let fault = |what: String| Error::Checkpoint {
        path: index.to_path_buf(),
        faults: vec![what],
    };
    let Index { weight_map } = read_json(index)?;
    let name = |(tensor, shard): (String, String)| match is_file_name(&shard) {
        true => Ok(shard),
        false => Err(fault(format!(
            "{tensor:?} is in {shard:?}, which is no name of a file beside it"
        ))),
    };
    let names: BTreeSet<String> = weight_map.into_iter().map(name).collect::<Result<_>>()?;
    if names.is_empty() {
        return Err(fault("names no shards".to_string()));
    }
    Ok(names)
}

/// Whether `path` is an index of shards.
pub(super) fn is_index(path: &str) -> bool {
    path.ends_with(".json") && path.contains(".index.")
}

/// The folder from which a checkpoint with all its files there is loaded: the one that they lie in as they should,
/// or one with links to them, below `made` and called `name`, which is made or renewed.
///
/// # Errors
/// When the links cannot be made.
pub fn gather(presence: &Presence, made: &Path, name: &str) -> Result<PathBuf> {
    let root = |found: &Found| {
        let at = found.at.to_string_lossy();
        at.strip_suffix(&found.path).map(PathBuf::from)
    };
    let roots: BTreeSet<Option<PathBuf>> = presence.found.iter().map(root).collect();
    if roots.len() == 1
        && let Some(Some(root)) = roots.into_iter().next()
    {
        return Ok(root);
    }
    let folder = made.join("checkpoints").join(name);
    let is_there = |found: &Found| {
        std::fs::canonicalize(folder.join(&found.path)).ok()
            == std::fs::canonicalize(&found.at).ok()
    };
    if count_files(&folder) == presence.found.len() && presence.found.iter().all(is_there) {
        return Ok(folder);
    }
    crate::files::create_dir(&made.join("checkpoints"))?;
    crate::files::write_dir(&folder, |aside| {
        for found in &presence.found {
            let link = aside.join(&found.path);
            if let Some(parent) = link.parent() {
                crate::files::create_dir(parent)?;
            }
            let target = std::fs::canonicalize(&found.at).map_err(Error::io(&found.at))?;
            link_file(&target, &link).map_err(Error::io(&link))?;
        }
        Ok(())
    })?;
    Ok(folder)
}

#[cfg(unix)]
pub(super) fn link_file(target: &Path, link: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(not(unix))]
pub(super) fn link_file(target: &Path, link: &Path) -> std::io::Result<()> {
    std::fs::hard_link(target, link)
}

fn count_files(folder: &Path) -> usize {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return 0;
    };
    let count = |path: PathBuf| if path.is_dir() { count_files(&path) } else { 1 };
    entries.flatten().map(|entry| count(entry.path())).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    static MODEL: Published = Published {
        licence: "none",
        million_parameters: 1,
        repositories: &[
            Repository {
                id: "a/one",
                role: "first",
                gated: false,
                into: "",
                files: &[Wanted::Needed("config.json"), Wanted::Useful("notes.txt")],
                megabytes: 1,
            },
            Repository {
                id: "b/two",
                role: "second",
                gated: false,
                into: "t5",
                files: &[Wanted::OneOf(&[
                    "model.safetensors.index.json",
                    "pytorch_model.bin",
                ])],
                megabytes: 1,
            },
        ],
        by_hand: &[ByHand {
            path: "tokenizer/text.json",
            or: Some("tokenizer.json"),
            role: "text",
            from: "somewhere",
        }],
    };

    fn write(root: &Path, name: &str, text: &str) {
        let path = root.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    #[test]
    fn what_is_missing_is_told_down_to_shards_and_with_its_repositories() {
        let folder = tempfile::tempdir().unwrap();
        let presence = || MODEL.in_folder(folder.path());
        let weights = "t5/pytorch_model.bin";
        assert_eq!(presence().missing, ["config.json", weights]);
        assert_eq!(presence().missing_by_hand, ["tokenizer/text.json"]);
        assert_eq!(presence().incomplete, [0, 1]);
        write(folder.path(), "config.json", "{}");
        write(
            folder.path(),
            "t5/model.safetensors.index.json",
            r#"{"weight_map": {"x": "one.safetensors", "y": "two.safetensors"}}"#,
        );
        write(folder.path(), "t5/two.safetensors", "weights");
        assert_eq!(presence().missing, ["t5/one.safetensors"]);
        assert_eq!(presence().incomplete, [1]);
        write(folder.path(), "t5/one.safetensors", "weights");
        write(folder.path(), "tokenizer.json", "{}");
        assert!(presence().is_complete());
        let root = gather(&presence(), &folder.path().join("made"), "model").unwrap();
        assert_eq!(
            std::fs::canonicalize(root).unwrap(),
            folder.path().canonicalize().unwrap()
        );
    }

    #[test]
    fn files_of_several_repositories_are_gathered_by_links_which_follow_them() {
        let place = tempfile::tempdir().unwrap();
        let settings = Settings {
            cache: place.path().join("hub"),
            token: None,
            endpoint: String::new(),
            offline: true,
        };
        let by_hand = place.path().join("by-hand");
        write(&by_hand, "tokenizer.json", "{}");
        let snapshot = |id: &str, commit: &str, name: &str, text: &str| {
            let root = settings
                .cache
                .join(format!("models--{}", id.replace('/', "--")));
            write(&root, "refs/main", commit);
            write(&root, &format!("snapshots/{commit}/{name}"), text);
        };
        snapshot("a/one", "c1", "config.json", "first");
        snapshot("b/two", "c2", "pytorch_model.bin", "weights");
        let gathered = || {
            let presence = MODEL.in_cache(&settings, &by_hand);
            assert!(presence.is_complete(), "{presence:?}");
            gather(&presence, &settings.made(), "model").unwrap()
        };
        let read = |path: &str| std::fs::read_to_string(gathered().join(path)).unwrap();
        assert_eq!(
            (read("config.json"), read("t5/pytorch_model.bin")),
            ("first".into(), "weights".into())
        );
        assert_eq!(read("tokenizer.json"), "{}");
        snapshot("a/one", "c3", "config.json", "second");
        assert_eq!(read("config.json"), "second");
    }
}
