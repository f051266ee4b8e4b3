//! A subject leaves a watch for good: its photos, their copies, and what runs drew of it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::publish::switch;
use super::reconcile::reconcile;
use super::scan::Scanner;
use super::state::{Home, State, Subject};
use crate::images::{is_other_picture, is_photo_name};
use crate::{Error, Result, files};

/// A subject of a watch that is to be removed, and the watch, which cannot run meanwhile.
pub struct Leaving {
    home: Home,
    state: State,
    /// As it lies in the folder today.
    subject: Subject,
    photos: Vec<PathBuf>,
    shared: Vec<PathBuf>,
    _lock: std::fs::File,
}

impl Leaving {
    /// The subject that the watch on `dir` calls `name`, or whose folder is `name` or ends so. What happened to the
    /// folder since the watch ran is looked at first.
    ///
    /// # Errors
    /// When the watch runs, or there is no such subject, or several folders have that name; a folder that cannot be
    /// read.
    pub fn find(dir: &Path, name: &str) -> Result<Self> {
        let home = Home::of(dir)?;
        let lock = home.lock().map_err(|error| match error {
            Error::Invalid { what, .. } => Error::invalid(what, "stop the watch first"),
            other => other,
        })?;
        let state = home.load()?;
        let mut today = state.clone();
        let scan = Scanner::new(&home.watched, Duration::ZERO).scan(&[], Instant::now())?;
        reconcile(&mut today, &scan);
        today
            .subjects
            .retain(|subject| state.subject(&subject.id).is_some());
        let by_folder = |subject: &&Subject| {
            subject.folder == name || subject.folder.rsplit('/').next() == Some(name)
        };
        let found: Vec<&Subject> = match today.subject(name) {
            Some(subject) => vec![subject],
            None => today.subjects.iter().filter(by_folder).collect(),
        };
        let subject = match found.as_slice() {
            [only] => Subject::clone(only),
            [] => {
                let known: Vec<&str> = today.subjects.iter().map(|s| s.id.as_str()).collect();
                return Err(Error::invalid(
                    format!(
                        "the watch on {} knows no subject {name:?}",
                        home.watched.display()
                    ),
                    format!("it knows {}", known.join(", ")),
                ));
            }
            several => {
                let named = |subject: &&Subject| format!("{} in {}", subject.id, subject.folder);
                let named: Vec<String> = several.iter().map(named).collect();
                return Err(Error::invalid(
                    format!("several subjects could be meant by {name:?}"),
                    format!("name one of them as status does: {}", named.join(", ")),
                ));
            }
        };
        let (photos, shared) = photos(&home, &state, &today, &subject)?;
        Ok(Self {
            home,
            state,
            subject,
            photos,
            shared,
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

    /// What will be deleted from the watched folder: all pictures of the subject's own folder, and its photos wherever
    /// they lie, but for [`Leaving::shared`].
    pub fn photos(&self) -> &[PathBuf] {
        &self.photos
    }

    /// Photos of the subject that lie in the folder of another one, whose photos they are too: these stay.
    pub fn shared(&self) -> &[PathBuf] {
        &self.shared
    }

    /// Deletes the photos, their copies, and the sheets, reports and supervisors that runs made of the subject, and
    /// forgets it. A run under way that learns or replays it is dropped. Its token stays taken. What is interrupted is
    /// completed by the same call.
    ///
    /// # Errors
    /// When something cannot be deleted.
    pub fn remove(mut self) -> Result<()> {
        let id = self.subject.id.clone();
        for photo in &self.photos {
            gone(photo)?;
        }
        // It stays where something else lies in it.
        let _ = std::fs::remove_dir(self.home.watched.join(&self.subject.folder));
        gone(&self.home.path().join("photos").join(&id))?;
        let under_way = self.state.run.as_ref();
        let dropped = under_way.filter(|run| run.subject == id || names(&run.pipeline, &id));
        let dropped = dropped.map(|run| run.number);
        if let Some(number) = dropped {
            self.drop_run(number)?;
        }
        let mut with_it = BTreeSet::new();
        for (name, run) in files::list(&self.home.runs())? {
            if !run.is_symlink() && knows(&run, &id)? {
                for part in ["evaluation", "sheet.png", "report.html", "report.json"] {
                    gone(&run.join(part))?;
                }
                gone(&run.join("supervisor").join(&id))?;
                gone(&run.join("checkpoints/supervise").join(&id))?;
                with_it.extend(name.split('-').nth(1).map(str::to_string));
            }
        }
        for (number, adapter) in files::list(&self.home.path().join("adapters"))? {
            let evaluation = adapter.join("evaluation");
            let scores = evaluation.join("scores.json");
            if with_it.contains(&number) || scored(&scores, &id) {
                for (_, part) in files::list(&evaluation)? {
                    // Last, because it tells whose evaluation this is, should this be cut short.
                    if part != scores {
                        gone(&part)?;
                    }
                }
                gone(&evaluation)?;
            }
        }
        let state = &mut self.state;
        if dropped.is_some() {
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

    /// Removes what the run under way has made. It may have been published without being remembered: then what was
    /// published before is published again.
    fn drop_run(&self, number: usize) -> Result<()> {
        let link = self.home.published();
        match &self.state.published {
            Some(published) => switch(&link, &self.home.adapter(published.number))?,
            None => gone(&link)?,
        }
        gone(&self.home.adapter(number))?;
        for (name, run) in files::list(&self.home.runs())? {
            if is_of_run(&name, number) {
                gone(&run)?;
            }
        }
        Ok(())
    }
}

/// Whether `name` is that of the directory of run `number`, or of the link to it.
pub(super) fn is_of_run(name: &str, number: usize) -> bool {
    name.strip_prefix(&format!("run-{number:04}"))
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
}

/// The pictures in the watched folder that are the subject's alone, and those that are another's, too.
fn photos(
    home: &Home,
    state: &State,
    today: &State,
    subject: &Subject,
) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let before = state.subject(&subject.id);
    let learnt = before.and_then(|before| before.learnt.as_ref());
    let under_way = state.run.as_ref().filter(|run| run.subject == subject.id);
    let known: BTreeSet<&String> = [
        Some(&subject.photos),
        before.map(|before| &before.photos),
        learnt.map(|look| &look.photos),
        under_way.map(|run| &run.look.photos),
    ]
    .into_iter()
    .flatten()
    .flatten()
    .collect();
    let folder = |subject: &Subject| home.watched.join(&subject.folder);
    let others: BTreeSet<PathBuf> = today
        .subjects
        .iter()
        .filter(|other| other.id != subject.id && !other.retired)
        .map(folder)
        .collect();
    let own = (!subject.retired).then(|| folder(subject));
    let (mut alone, mut shared) = (Vec::new(), Vec::new());
    for picture in pictures(&home.watched)? {
        let parent = picture.parent();
        if parent == own.as_deref() {
            alone.push(picture);
            continue;
        }
        let mut digest = blake3::Hasher::new();
        match files::open(&picture).and_then(|file| digest.update_reader(file).map(drop)) {
            // Nothing was learnt from a pipe or a device.
            Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => continue,
            read => read.map_err(Error::io(&picture))?,
        }
        if known.contains(&digest.finalize().to_hex().to_string()) {
            match parent.is_some_and(|parent| others.contains(parent)) {
                true => shared.push(picture),
                false => alone.push(picture),
            }
        }
    }
    Ok((alone, shared))
}

/// All pictures below `dir` that are not hidden, sorted.
fn pictures(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for (name, path) in files::list(dir)? {
        if name.starts_with('.') {
            continue;
        }
        if path.is_dir() && !path.is_symlink() {
            found.extend(pictures(&path)?);
        } else if path.is_file() && (is_photo_name(&path) || is_other_picture(&path)) {
            found.push(path);
        }
    }
    Ok(found)
}

/// Whether the scores of an adapter are of `id`, too.
fn scored(path: &Path, id: &str) -> bool {
    let text = files::read_text(path, files::SETTINGS).unwrap_or_default();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    json["scores"].get(id).is_some()
}

/// Whether the resolved pipeline `text` has the subject `id`.
fn names(text: &str, id: &str) -> bool {
    let table: toml::Table = text.parse().unwrap_or_default();
    let subjects = table.get("subject").and_then(toml::Value::as_table);
    subjects.is_some_and(|subjects| subjects.contains_key(id))
}

/// Whether the run in `dir` had the subject `id`.
fn knows(dir: &Path, id: &str) -> Result<bool> {
    let path = dir.join("resolved.toml");
    let text = files::read_text_if_there(&path, files::SETTINGS)?;
    Ok(text.is_some_and(|text| names(&text, id)))
}

/// Deletes the file, link or folder at `path`, if it is there.
fn gone(path: &Path) -> Result<()> {
    let removed = if path.is_dir() && !path.is_symlink() {
        std::fs::remove_dir_all(path)
    } else {
        std::fs::remove_file(path)
    };
    match removed {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path)(e)),
        _ => Ok(()),
    }
}
