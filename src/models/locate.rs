//! Where the files of a model lie that a pipeline names: a directory, a checkpoint that ships with proxytune, or one
//! in the hub's cache.

use std::path::{Path, PathBuf};

use super::family::KnownModel;
use super::registry::{family_of, known, known_models};
use crate::hub::{self, Presence, Published, RepoId, Settings, Snapshot, human_bytes, parts};
use crate::{Error, Result};

/// How much of a model is on this machine.
#[derive(Debug, Clone)]
pub struct Whereabouts {
    /// What to load, when everything is there: a folder, or a single file.
    pub folder: Option<PathBuf>,
    /// Bytes that are there.
    pub bytes: u64,
    /// Of a published model that is known by name: what of it is there, in the place that has the most.
    pub presence: Option<Presence>,
}

impl Whereabouts {
    fn here(folder: &Path) -> Self {
        Self {
            folder: Some(folder.to_path_buf()),
            bytes: match std::fs::metadata(folder) {
                Ok(file) if file.is_file() => file.len(),
                _ => bytes_below(folder),
            },
            presence: None,
        }
    }

    fn nowhere() -> Self {
        Self {
            folder: None,
            bytes: 0,
            presence: None,
        }
    }
}

fn bytes_below(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| match std::fs::metadata(entry.path()) {
            Ok(metadata) if metadata.is_dir() => bytes_below(&entry.path()),
            Ok(metadata) => metadata.len(),
            Err(_) => 0,
        })
        .sum()
}

/// What is there of the model called `name`: a directory or a single file, a known model, or `owner/name` on the hub, with
/// or without `@revision`. Nothing is asked of the hub. Known models are looked for in their directory, below the working
/// directory and then above the program's own file, and in the hub's cache.
///
/// # Errors
/// When `name` is none of the three, or the links to files of several repositories cannot be made.
pub fn look_for(name: &str) -> Result<Whereabouts> {
    if let Some(model) = known(name) {
        return match model.hub {
            None => {
                Ok(shipped(model).map_or_else(Whereabouts::nowhere, |dir| Whereabouts::here(&dir)))
            }
            Some(published) => look_for_published(model, published),
        };
    }
    let place = Path::new(name);
    if place.is_dir() || parts::is_named(place) {
        return Ok(Whereabouts::here(place));
    }
    match RepoId::parse(name) {
        Some(repo) => Ok(match Snapshot::find(&Settings::from_env()?, &repo) {
            Some(snapshot) if snapshot.seems_complete() => Whereabouts::here(&snapshot.folder),
            _ => Whereabouts::nowhere(),
        }),
        None => Err(Error::invalid(
            format!("{name:?} is neither a known model nor a directory"),
            format!(
                "known models: {}; owner/name names a repository of the hub",
                known_models()
                    .map(|(_, model)| model.name)
                    .collect::<Vec<_>>()
                    .join(", ")
            ),
        )),
    }
}

/// The directory of the model called `name`, with all its files there; see [`look_for`].
///
/// # Errors
/// When files are missing: which, where they belong, and how to get them.
pub fn locate(name: &str) -> Result<PathBuf> {
    let found = look_for(name)?;
    if let Some(folder) = found.folder {
        return Ok(folder);
    }
    Err(match known(name) {
        Some(model) => absent(model, found.presence.as_ref()),
        None => absent_repository(name),
    })
}

/// That the repository `name` has not been downloaded.
pub(super) fn absent_repository(name: &str) -> Error {
    Error::invalid(
        format!("{name} is not on this machine"),
        format!("`proxytune models --download {name}` gets it from the hub"),
    )
}

/// Downloads what is missing of the model called `name`; nothing is asked of the hub when everything is there.
///
/// # Errors
/// As [`hub::download`], and when what is missing is on no hub.
pub fn make_present(name: &str) -> Result<PathBuf> {
    let found = look_for(name)?;
    if let Some(folder) = found.folder {
        return Ok(folder);
    }
    let settings = Settings::from_env()?;
    match (known(name), &found.presence) {
        (Some(model), Some(presence)) => {
            if let Some(published) = model.hub
                && !presence.missing.is_empty()
            {
                let presence = published.in_cache(&settings, Path::new(model.directory));
                hub::download(&settings, name, published, &presence)?;
            }
        }
        (None, _) => {
            if let Some(repo) = RepoId::parse(name) {
                // A damaged config is found before the weights come.
                let is_readable = |folder: &Path| family_of(folder).map(drop);
                hub::download_repository(&settings, &repo, is_readable)?;
            }
        }
        (Some(_), None) => {}
    }
    locate(name)
}

fn bases() -> impl Iterator<Item = PathBuf> {
    let program = std::env::current_exe().ok();
    let above: Vec<PathBuf> = program
        .iter()
        .flat_map(|path| path.ancestors().skip(1))
        .map(Path::to_path_buf)
        .collect();
    std::iter::once(PathBuf::new()).chain(above)
}

/// The directory of `model` with all of [`KnownModel::files`] there.
fn shipped(model: &KnownModel) -> Option<PathBuf> {
    bases()
        .map(|base| base.join(model.directory))
        .find(|folder| folder.is_dir() && missing_files(model, folder).is_empty())
}

fn missing_files(model: &KnownModel, folder: &Path) -> Vec<&'static str> {
    let is_missing = |file: &&&str| !folder.join(file).is_file();
    model.files.iter().filter(is_missing).copied().collect()
}

fn look_for_published(model: &KnownModel, published: &Published) -> Result<Whereabouts> {
    if !model.files.is_empty()
        && let Some(folder) = shipped(model)
    {
        return Ok(Whereabouts::here(&folder));
    }
    let mut best = Presence::default();
    for base in bases() {
        let folder = base.join(model.directory);
        if !folder.is_dir() {
            continue;
        }
        let presence = published.in_folder(&folder);
        if presence.is_complete() {
            return Ok(Whereabouts {
                folder: Some(folder),
                bytes: presence.bytes(),
                presence: Some(presence),
            });
        }
        if presence.found.len() > best.found.len() {
            best = presence;
        }
    }
    let settings = Settings::from_env()?;
    let cached = published.in_cache(&settings, Path::new(model.directory));
    let folder = if cached.is_complete() {
        Some(hub::gather(&cached, &settings.made(), model.name)?)
    } else {
        None
    };
    let presence = if folder.is_some() || cached.found.len() >= best.found.len() {
        cached
    } else {
        best
    };
    Ok(Whereabouts {
        folder,
        bytes: presence.bytes(),
        presence: Some(presence),
    })
}

fn absent(model: &KnownModel, presence: Option<&Presence>) -> Error {
    let Some((published, presence)) = model.hub.zip(presence) else {
        let files = match missing_files(model, Path::new(model.directory)).as_slice() {
            [] => "everything".to_string(),
            files => files.join(", "),
        };
        let hint = "start in the repository that the program was built in: these files ship with it; or make them again \
                    with: proxytune pretrain pipelines/nano-pretrain.toml";
        return Error::invalid(
            format!(
                "model {}: missing in {}: {files}",
                model.name, model.directory
            ),
            hint,
        );
    };
    let missing: Vec<&str> = presence
        .missing
        .iter()
        .chain(&presence.missing_by_hand)
        .map(String::as_str)
        .collect();
    Error::invalid(
        format!("model {}: missing: {}", model.name, missing.join(", ")),
        ways_to_get(model, published, presence),
    )
}

/// How what is missing of `published` comes here, in one sentence.
fn ways_to_get(model: &KnownModel, published: &Published, presence: &Presence) -> String {
    let mut ways = Vec::new();
    let lacking = presence
        .incomplete
        .iter()
        .map(|&number| &published.repositories[number]);
    if !presence.incomplete.is_empty() {
        let megabytes: u64 = lacking.clone().map(|repository| repository.megabytes).sum();
        let gated = lacking.clone().any(|repository| repository.gated);
        let terms = if gated {
            ", once its terms are accepted there and HF_TOKEN is set"
        } else {
            ""
        };
        let from: Vec<String> = lacking
            .map(|repository| {
                let into = match repository.into {
                    "" => String::new(),
                    into => format!(" (into {into}/)"),
                };
                format!("https://huggingface.co/{}{into}", repository.id)
            })
            .collect();
        let download = format!(
            "`proxytune models --download {}` gets them (at most {}){terms}; or ",
            model.name,
            human_bytes(megabytes * 1_000_000)
        );
        let (place, from) = (model.directory, from.join(" and "));
        ways.push(format!("{download}place in {place} the files from {from}"));
    }
    let by_hand = published.by_hand.iter();
    let by_hand: Vec<String> = by_hand
        .filter(|file| {
            presence
                .missing_by_hand
                .iter()
                .any(|path| path == file.path)
        })
        .map(|file| format!("{} ({}, from {})", file.path, file.role, file.from))
        .collect();
    if !by_hand.is_empty() {
        ways.push(format!(
            "place in {} by hand, as no hub has them: {}",
            model.directory,
            by_hand.join("; ")
        ));
    }
    ways.join("; ")
}
