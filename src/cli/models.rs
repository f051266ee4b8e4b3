//! `proxytune models`: what is known by name, what of it is here, and how the rest comes.

use std::io::Write;

use super::{ModelsArgs, output_failed};
use crate::config::Resolved;
use crate::hub::{self, Published, RepoId, Settings, human_bytes};
use crate::models::locate::{self, Whereabouts};
use crate::models::registry::known_models;
use crate::models::{KnownModel, family, known};
use crate::{Error, Result};

pub(super) fn models(args: &ModelsArgs, out: &mut impl Write) -> Result<()> {
    let text = match (&args.download, &args.name) {
        (Some(name), _) => {
            drop_damaged(name)?;
            let folder = locate::make_present(name)?;
            format!("{name}: {}\n", folder.display())
        }
        (None, Some(name)) => details(name)?,
        (None, None) => table()?,
    };
    out.write_all(text.as_bytes()).map_err(output_failed)
}

/// Removes what of `name` is in the hub's cache and is not what the hub published, so that it comes again.
fn drop_damaged(name: &str) -> Result<()> {
    let settings = Settings::from_env()?;
    if settings.offline {
        return Ok(());
    }
    let published = known(name).and_then(|model| model.hub);
    let repositories = match published {
        Some(published) => {
            let ids = published.repositories.iter();
            ids.map(|repository| RepoId::main(repository.id)).collect()
        }
        None => Vec::from_iter(RepoId::parse(name)),
    };
    for repository in repositories {
        hub::drop_damaged(&settings, &repository)?;
    }
    Ok(())
}

/// Downloads whatever `names` lack.
///
/// # Errors
/// As [`locate::make_present`].
pub(super) fn make_ready<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<()> {
    for name in names {
        locate::make_present(name)?;
    }
    Ok(())
}

/// The models of a pipeline.
pub(super) fn models_of(resolved: &Resolved) -> Vec<&str> {
    let supervisor = resolved.supervisor.iter().map(|s| s.model.as_str());
    let evaluation = &resolved.evaluation;
    supervisor
        .chain([
            resolved.student.model.as_str(),
            &evaluation.clip,
            &evaluation.dino,
        ])
        .collect()
}

/// A line for each of the models of `resolved` that do not ship with proxytune and are here.
pub(super) fn present(resolved: &Resolved) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for name in models_of(resolved) {
        if known(name).is_some_and(|model| model.hub.is_none()) {
            continue;
        }
        let found = locate::look_for(name)?;
        if let Some(folder) = &found.folder {
            let size = human_bytes(found.bytes);
            lines.push(format!("here: {name}, {size}, in {}", folder.display()));
        }
    }
    Ok(lines)
}

fn table() -> Result<String> {
    let mut rows = vec![
        [
            "model", "family", "px", "here", "download", "f32", "bf16", "licence",
        ]
        .map(String::from),
    ];
    for (family, model) in known_models() {
        let found = locate::look_for(model.name)?;
        let side = model
            .resolution
            .map_or("-".to_string(), |side| side.to_string());
        let [download, f32, bf16, licence] = match model.hub {
            Some(published) => columns(published),
            None => ["-", "-", "-", "ships with proxytune"].map(String::from),
        };
        let family = family.to_string();
        let name = model.name.to_string();
        rows.push([
            name,
            family,
            side,
            here(&found),
            download,
            f32,
            bf16,
            licence,
        ]);
    }
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: Vec<usize> = (0..rows[0].len()).map(|c| width(c).unwrap_or(0)).collect();
    let line = |row: &[String; 8]| {
        let cells = row
            .iter()
            .zip(&widths)
            .map(|(cell, &w)| format!("{cell:<w$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_string() + "\n"
    };
    let mut text: String = rows.iter().map(line).collect();
    text += "\nf32, bf16: memory to load it. `proxytune models NAME` tells more, `proxytune models --download NAME` \
             gets it.\n";
    Ok(text)
}

fn columns(published: &Published) -> [String; 4] {
    let megabytes: u64 = published
        .repositories
        .iter()
        .map(|repo| repo.megabytes)
        .sum();
    let gated = published.repositories.iter().any(|repo| repo.gated);
    let terms = if gated { " (gated)" } else { "" };
    [
        human_bytes(megabytes * 1_000_000),
        memory(published, 4),
        memory(published, 2),
        format!("{}{terms}", published.licence),
    ]
}

fn memory(published: &Published, bytes: u64) -> String {
    human_bytes(published.million_parameters * 1_000_000 * bytes)
}

fn here(found: &Whereabouts) -> String {
    match (&found.folder, &found.presence) {
        (Some(_), _) => human_bytes(found.bytes),
        (None, Some(presence)) if !presence.found.is_empty() => {
            format!("partly, {}", human_bytes(found.bytes))
        }
        _ => "no".to_string(),
    }
}

fn details(name: &str) -> Result<String> {
    let found = locate::look_for(name)?;
    let mut text = String::new();
    text += &format!("{name}: {}", family(name)?);
    match known(name) {
        Some(model) => {
            if let Some(side) = model.resolution {
                text += &format!(", images of {side} pixels");
            }
            text.push('\n');
            if let Some(published) = model.hub {
                text += &of_published(model, published, &found)?;
            }
        }
        None => text.push('\n'),
    }
    match &found.folder {
        Some(folder) => {
            let size = human_bytes(found.bytes);
            text += &format!("loaded from {} ({size})\n", folder.display());
        }
        None => {
            let error = locate::locate(name).err();
            if let Some(hint) = error.as_ref().and_then(Error::hint) {
                text += &format!("not loadable yet: {hint}\n");
            }
        }
    }
    Ok(text)
}

fn of_published(model: &KnownModel, published: &Published, found: &Whereabouts) -> Result<String> {
    let mut text = format!("licence: {}\n", published.licence);
    text += &format!(
        "memory to load it: {} in f32, {} in bf16\n",
        memory(published, 4),
        memory(published, 2)
    );
    let presence = found.presence.clone().unwrap_or_default();
    for repository in published.repositories {
        let gated = if repository.gated { ", gated" } else { "" };
        text += &format!(
            "repository {}: {}; at most {}{gated}\n",
            repository.id,
            repository.role,
            human_bytes(repository.megabytes * 1_000_000)
        );
        let is_own = |path: &str| match repository.into {
            "" => !published
                .repositories
                .iter()
                .any(|other| !other.into.is_empty() && path.starts_with(other.into)),
            into => path.starts_with(&format!("{into}/")),
        };
        text += &files(&presence, is_own, published);
    }
    if !published.by_hand.is_empty() {
        text += "on no hub, to be placed by hand\n";
        for file in published.by_hand {
            let is_it = |path: &str| path == file.path || file.or == Some(path);
            let there = presence.found.iter().any(|found| is_it(&found.path));
            let state = if there { "here" } else { "missing" };
            text += &format!(
                "  {state:<8} {}: {}, from {}\n",
                file.path, file.role, file.from
            );
        }
    }
    let settings = Settings::from_env()?;
    let folders = published.repositories.iter().map(|repository| {
        let folder = RepoId::main(repository.id).folder(&settings);
        folder.display().to_string()
    });
    let folders: Vec<String> = folders.collect();
    text += &format!(
        "looked for in {} and in {}\n",
        model.directory,
        folders.join(", ")
    );
    Ok(text)
}

fn files(
    presence: &crate::hub::Presence,
    is_own: impl Fn(&str) -> bool,
    published: &Published,
) -> String {
    let by_hand = |path: &str| {
        let mut files = published.by_hand.iter();
        files.any(|file| file.path == path || file.or == Some(path))
    };
    let mut lines = Vec::new();
    for file in &presence.found {
        if is_own(&file.path) && !by_hand(&file.path) {
            let size = std::fs::metadata(&file.at).map_or(0, |file| file.len());
            lines.push(format!(
                "  here     {} ({})\n",
                file.path,
                human_bytes(size)
            ));
        }
    }
    for path in presence.missing.iter().filter(|path| is_own(path)) {
        lines.push(format!("  missing  {path}\n"));
    }
    lines.concat()
}
