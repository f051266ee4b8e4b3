//! A subject leaves a watch for good: its photos, their copies, and what runs drew of it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::publish::switch;
use super::reconcile::reconcile;
use super::scan::Scanner;
use super::state::{Home, State, Subject};
use crate::files::system::is_system;
use crate::images::{is_other_picture, is_photo_name};
use crate::pipeline::RESOLVED;
use crate::{Error, Result, files};

/// A subject of a watch that is to be removed, and the watch, which cannot run meanwhile.
pub struct Leaving {
    home: Home,
    state: State,
    /// As it lies in the folder today.
    subject: Subject,
    pictures: Pictures,
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
        let lock = home.lock_or("stop the watch first")?;
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
        let pictures = Pictures::find(&home, &state, &today, &subject)?;
        Ok(Self {
            home,
            state,
            subject,
            pictures,
            _lock: lock,
        })
    }

    /// What the store calls the subject.
    pub fn id(&self) -> &str {
        &self.subject.id
    }

    /// The store of the watch: in `given`, or where it was.
    ///
    /// # Errors
    /// When `given` is another store, or the watch's own is not there any more. When an older version noted it, which
    /// wrote down no id: what others may have written into a shared folder does not say from where rows are deleted.
    pub fn store(&self, given: Option<&Path>) -> Result<PathBuf> {
        let noted = &self.state.store;
        if noted.id.is_empty() && given.is_none() {
            return Err(Error::invalid(
                format!(
                    "the watch on {} has not noted which store is its own",
                    self.home.watched.display()
                ),
                match noted.is_known() {
                    true => format!("name it: it was --store {}", noted.path.display()),
                    false => "name it with --store".to_string(),
                },
            ));
        }
        self.home.store(&self.state, given)
    }

    /// What will be deleted from the watched folder: all pictures of the subject's own folder, and its photos wherever
    /// they lie, but for [`Leaving::shared`].
    pub fn photos(&self) -> &[PathBuf] {
        &self.pictures.own
    }

    /// The link that is the subject's folder, which will be deleted; what lies behind it stays.
    pub fn link(&self) -> Option<&Path> {
        self.pictures.link.as_deref()
    }

    /// Photos of the subject that lie in the folder of another one, whose photos they are too: these stay.
    pub fn shared(&self) -> &[PathBuf] {
        &self.pictures.shared
    }

    /// Pictures of the subject that stay although they are nobody else's, with the reason.
    pub fn left(&self) -> &[(PathBuf, String)] {
        &self.pictures.left
    }

    /// Deletes the photos, their copies, and the sheets, reports and supervisors that runs made of the subject, and
    /// forgets it. A run under way that learns or replays it is dropped. Its token stays taken. What is interrupted is
    /// completed by the same call.
    ///
    /// # Errors
    /// When something cannot be deleted.
    pub fn remove(mut self) -> Result<()> {
        let id = self.subject.id.clone();
        for photo in self.pictures.own.iter().chain(&self.pictures.link) {
            files::remove_within(&self.home.watched, photo)?;
        }
        let folder = self.home.watched.join(&self.subject.folder);
        if files::within(&self.home.watched, &folder).is_ok() {
            // It stays where something else lies in it.
            let _ = std::fs::remove_dir(folder);
        }
        let gone = |path: &Path| self.home.remove(path);
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
            if adapter.is_symlink() {
                continue;
            }
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
            None => self.home.remove(&link)?,
        }
        self.home.remove(&self.home.adapter(number))?;
        for (name, run) in files::list(&self.home.runs())? {
            if is_of_run(&name, number) {
                self.home.remove(&run)?;
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

/// The pictures of a subject in the watched folder.
#[derive(Default)]
struct Pictures {
    /// Those that will be deleted.
    own: Vec<PathBuf>,
    /// Those that are another subject's, too.
    shared: Vec<PathBuf>,
    /// Those that stay for another reason.
    left: Vec<(PathBuf, String)>,
    /// The subject's folder, where it is a link.
    link: Option<PathBuf>,
}

impl Pictures {
    fn find(home: &Home, state: &State, today: &State, subject: &Subject) -> Result<Self> {
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
        let mut found = Self::default();
        if let Some(own) = &own {
            found.behind_links(&home.watched, own)?;
        }
        for (picture, is_kept) in pictures(&home.watched, home.path(), false)? {
            let parent = picture.parent();
            if is_kept {
                let is_below = own.as_ref().is_some_and(|own| picture.starts_with(own));
                let is_known = files::digest(&picture).is_ok_and(|digest| known.contains(&digest));
                if is_below || is_known {
                    let reason = "in a folder of the system or another program: empty it there";
                    found.left.push((picture, reason.to_string()));
                }
            } else if parent == own.as_deref() {
                found.own.push(picture);
            } else if known.contains(&files::digest(&picture)?) {
                match parent.is_some_and(|parent| others.contains(parent)) {
                    true => found.shared.push(picture),
                    false => found.own.push(picture),
                }
            }
        }
        found.behind_linked_photos(&home.watched)?;
        Ok(found)
    }

    /// Of a photo that is a link the link goes, and what it leads to stays, unless it lies here, too.
    fn behind_linked_photos(&mut self, watched: &Path) -> Result<()> {
        for photo in self.own.iter().filter(|photo| photo.is_symlink()) {
            let target = std::fs::canonicalize(photo).map_err(Error::io(photo))?;
            if !target.starts_with(watched) {
                let reason = format!("{} was a link to it: delete it there", photo.display());
                self.left.push((target, reason));
            }
        }
        Ok(())
    }

    /// What lies in the folder `own` when that is reached through a link: a link that is the subject's own folder goes,
    /// one that is its class's leads to other subjects, too. Nothing is deleted behind either.
    fn behind_links(&mut self, watched: &Path, own: &Path) -> Result<()> {
        let class = own.parent().unwrap_or(watched);
        let reason = if class.is_symlink() {
            let class = class.display();
            format!("{class} is a link: delete it there, or the next watch learns it again")
        } else if own.is_symlink() {
            self.link = Some(own.to_path_buf());
            format!("{} is a link: delete it there", own.display())
        } else {
            return Ok(());
        };
        for (_, path) in files::list(own)? {
            if path.is_file() && is_picture(&path) {
                let path = std::fs::canonicalize(&path).map_err(Error::io(&path))?;
                self.left.push((path, reason.clone()));
            }
        }
        Ok(())
    }
}

fn is_picture(path: &Path) -> bool {
    is_photo_name(path) || is_other_picture(path)
}

/// All pictures below `dir` but for those in `home`, sorted, and whether they lie in a folder that is hidden or the
/// system's, as all in `dir` do if `is_kept`. Links to folders are not followed.
fn pictures(dir: &Path, home: &Path, is_kept: bool) -> Result<Vec<(PathBuf, bool)>> {
    let mut found = Vec::new();
    for (name, path) in files::list(dir)? {
        if path == home {
            continue;
        }
        if path.is_dir() && !path.is_symlink() {
            let is_kept = is_kept || name.starts_with('.') || is_system(&name);
            match pictures(&path, home, is_kept) {
                // What the system keeps, it may keep to itself.
                Err(_) if is_kept => {}
                listed => found.extend(listed?),
            }
        } else if path.is_file() && is_picture(&path) {
            found.push((path, is_kept));
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
    let path = dir.join(RESOLVED);
    let text = files::read_text_if_there(&path, files::SETTINGS)?;
    Ok(text.is_some_and(|text| names(&text, id)))
}
