//! A subject leaves a watch for good: its photos, their copies, and what runs drew of it.

use std::path::{Path, PathBuf};

use super::state::{Home, State, Subject};
use crate::images::{is_other_picture, is_photo_name};
use crate::{Error, Result};

/// A subject of a watch that is to be removed, and the watch, which cannot run meanwhile.
pub struct Leaving {
    home: Home,
    state: State,
    subject: Subject,
    _lock: std::fs::File,
}

impl Leaving {
    /// The subject that the watch on `dir` calls `name`, or whose folder is `name` or ends so.
    ///
    /// # Errors
    /// When the watch runs, or there is no such subject.
    pub fn find(dir: &Path, name: &str) -> Result<Self> {
        let home = Home::of(dir)?;
        let lock = home.lock().map_err(|error| match error {
            Error::Invalid { what, .. } => Error::invalid(what, "stop the watch first"),
            other => other,
        })?;
        let state = home.load()?;
        let by_folder = |subject: &&Subject| {
            subject.folder == name || subject.folder.rsplit('/').next() == Some(name)
        };
        let found = state
            .subject(name)
            .or_else(|| state.subjects.iter().find(by_folder))
            .cloned();
        let Some(subject) = found else {
            let known: Vec<&str> = state
                .subjects
                .iter()
                .map(|subject| subject.id.as_str())
                .collect();
            return Err(Error::invalid(
                format!(
                    "the watch on {} knows no subject {name:?}",
                    home.watched.display()
                ),
                format!("it knows {}", known.join(", ")),
            ));
        };
        Ok(Self {
            home,
            state,
            subject,
            _lock: lock,
        })
    }

    /// What the store calls the subject.
    pub fn id(&self) -> &str {
        &self.subject.id
    }

    /// The store that the watch used last.
    pub fn store(&self) -> &Path {
        &self.state.store
    }

    /// The photos in the watched folder that will be deleted.
    pub fn photos(&self) -> Vec<PathBuf> {
        if self.subject.retired {
            return Vec::new();
        }
        let folder = self.home.watched.join(&self.subject.folder);
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let mut photos: Vec<PathBuf> = entries
            .map(|entry| entry.path())
            .filter(|path| path.is_file() && (is_photo_name(path) || is_other_picture(path)))
            .collect();
        photos.sort();
        photos
    }

    /// Deletes the photos, their copies, and the sheets, reports and supervisors that runs made of the subject, and
    /// forgets it. Its token stays taken. What is interrupted is completed by the same call.
    ///
    /// # Errors
    /// When something cannot be deleted.
    pub fn remove(mut self) -> Result<()> {
        let id = self.subject.id.clone();
        for photo in self.photos() {
            std::fs::remove_file(&photo).map_err(Error::io(&photo))?;
        }
        let folder = self.home.watched.join(&self.subject.folder);
        // It stays where something else lies in it.
        let _ = std::fs::remove_dir(&folder);
        gone(&self.home.path().join("photos").join(&id))?;
        let under_way = self
            .state
            .run
            .as_ref()
            .filter(|run| run.subject == id)
            .map(|run| run.number);
        for run in entries(&self.home.runs())? {
            let name = run
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            if under_way.is_some_and(|number| name.starts_with(&format!("run-{number:04}-"))) {
                gone(&run)?;
            } else if knows(&run, &id)? {
                for part in ["evaluation", "sheet.png", "report.html", "report.json"] {
                    gone(&run.join(part))?;
                }
                gone(&run.join("supervisor").join(&id))?;
                gone(&run.join("checkpoints/supervise").join(&id))?;
            }
        }
        for adapter in entries(&self.home.path().join("adapters"))? {
            let scores = adapter.join("evaluation/scores.json");
            if std::fs::read_to_string(&scores)
                .is_ok_and(|text| text.contains(&format!("\"{id}\"")))
            {
                gone(&adapter.join("evaluation"))?;
            }
        }
        let state = &mut self.state;
        if under_way.is_some() {
            state.run = None;
        }
        state.subjects.retain(|subject| subject.id != id);
        if let Some(published) = &mut state.published {
            published.scores.remove(&id);
        }
        for ended in &mut state.history {
            ended.scores.remove(&id);
        }
        state
            .set_aside
            .retain(|bad| !bad.path.starts_with(&format!("{}/", self.subject.folder)));
        state.waiting.remove(&self.subject.folder);
        self.home.save(&self.state)
    }
}

/// Whether the run in `dir` had the subject `id`.
fn knows(dir: &Path, id: &str) -> Result<bool> {
    let path = dir.join("resolved.toml");
    match std::fs::read_to_string(&path) {
        Ok(text) => {
            let table: toml::Table = text.parse().unwrap_or_default();
            let subjects = table.get("subject").and_then(toml::Value::as_table);
            Ok(subjects.is_some_and(|subjects| subjects.contains_key(id)))
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(Error::io(&path)(e)),
    }
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    match std::fs::read_dir(dir) {
        Ok(entries) => entries
            .map(|entry| entry.map(|entry| entry.path()).map_err(Error::io(dir)))
            .collect(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(Error::io(dir)(e)),
    }
}

/// Deletes the file or folder at `path`, if it is there.
fn gone(path: &Path) -> Result<()> {
    let removed = if path.is_dir() {
        std::fs::remove_dir_all(path)
    } else {
        std::fs::remove_file(path)
    };
    match removed {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path)(e)),
        _ => Ok(()),
    }
}
