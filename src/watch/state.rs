//! What a watch remembers: one small file, replaced as a whole at every change.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::reconcile::is_id;
use crate::evaluation::metrics::Scores;
use crate::store::StoreRef;
use crate::{Error, Result, files, pipeline};

/// The layout of the file; a file of another layout is refused.
const VERSION: u32 = 1;

/// Everything that outlives the process.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub version: u32,
    /// The store that the watch began with.
    pub store: StoreRef,
    /// Digest of how subjects were learnt and judged last: what was held back under other settings is tried again.
    #[serde(default)]
    pub settings: String,
    /// In the order of their arrival; retired ones stay.
    pub subjects: Vec<Subject>,
    /// Every token that was ever given: none is given twice.
    pub tokens: Vec<String>,
    /// How often something began to wait for a run.
    pub arrivals: u64,
    /// Folders that no run waits for, with the reason.
    pub waiting: BTreeMap<String, String>,
    pub set_aside: Vec<SetAside>,
    /// The run that is under way.
    pub run: Option<Run>,
    pub published: Option<Published>,
    /// The runs that have ended, oldest first.
    pub history: Vec<Ended>,
}

/// A subject, whatever its folder is called today.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Subject {
    /// What plans and the store call it: the name that its folder had first.
    pub id: String,
    /// `class/subject`, below the watched folder.
    pub folder: String,
    pub class: String,
    pub token: String,
    /// Digests of its photos, sorted.
    pub photos: Vec<String>,
    /// Its folder is gone.
    pub retired: bool,
    /// Its place in the queue; `None` when there is nothing to learn.
    pub pending: Option<u64>,
    /// What the published student knows of it.
    pub learnt: Option<Look>,
    /// What a run has tried in vain, and why; not tried again with the same settings.
    pub held: Option<(Look, String)>,
}

/// What is to be learnt of a subject.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Look {
    pub class: String,
    /// Digests of the photos, sorted.
    pub photos: Vec<String>,
}

/// A picture that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SetAside {
    /// Below the watched folder.
    pub path: String,
    pub reason: String,
}

/// A run of the chain.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// From 1.
    pub number: usize,
    /// The subject that it learns.
    pub subject: String,
    pub look: Look,
    /// The resolved pipeline file: with the photos, all that it depends on.
    pub pipeline: String,
    /// Digest of the adapter that it starts from.
    pub init: Option<String>,
    /// Microseconds since 1970, UTC.
    pub started_us: i64,
}

/// What the folder `published` holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Published {
    /// The run that made it.
    pub number: usize,
    /// The run's directory, below the watch's.
    pub run: String,
    /// Digest of the adapter's files.
    pub adapter: String,
    /// Means over the samples of each subject.
    pub scores: BTreeMap<String, Scores>,
}

/// A run that has ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ended {
    pub number: usize,
    pub subject: String,
    /// Digest of the adapter that it started from.
    pub init: Option<String>,
    /// Digest of the adapter that it made.
    pub adapter: Option<String>,
    /// Means over the samples of each subject.
    pub scores: BTreeMap<String, Scores>,
    /// Why it was not published.
    pub refused: Option<String>,
    /// From its start to its end, interruptions included.
    pub seconds: f64,
}

/// The most runs that a chain can have: what follows the last is still a number.
const RUNS: usize = 100_000_000;

/// Whether `text` is a digest as we write it.
fn is_digest(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Whether `folder` is the path of a subject's folder below the watched one.
fn is_folder(folder: &str) -> bool {
    let parts: Vec<&str> = folder.split('/').collect();
    let is_name = |part: &&str| {
        let plain = Path::new(part)
            .components()
            .all(|c| matches!(c, Component::Normal(_)));
        !part.is_empty() && !part.starts_with('.') && !part.contains('\0') && plain
    };
    parts.len() == 2 && parts.iter().all(is_name)
}

impl Look {
    fn fault(&self) -> Option<String> {
        let odd = self.photos.iter().find(|photo| !is_digest(photo))?;
        Some(format!("{odd:?} is no digest of a photo"))
    }
}

impl Published {
    fn fault(&self) -> Option<String> {
        let name = self.run.strip_prefix("runs/").unwrap_or_default();
        let is_plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
        let is_ours =
            name.starts_with(&format!("run-{:04}", self.number)) && name.bytes().all(is_plain);
        (!is_ours).then(|| format!("{:?} is no directory of run {}", self.run, self.number))
    }
}

impl Subject {
    /// Why it cannot be one that we wrote.
    fn fault(&self) -> Option<String> {
        if !is_id(&self.id) {
            return Some(format!("{:?} is no name of a subject", self.id));
        }
        if !is_folder(&self.folder) {
            return Some(format!("{:?} is no CLASS/SUBJECT", self.folder));
        }
        let held = self.held.as_ref().map(|(look, _)| look);
        [Some(&self.look()), self.learnt.as_ref(), held]
            .into_iter()
            .flatten()
            .find_map(Look::fault)
    }

    /// What is to be learnt of it today.
    pub fn look(&self) -> Look {
        Look {
            class: self.class.clone(),
            photos: self.photos.clone(),
        }
    }

    /// Whether a run has tried what is to be learnt today in vain.
    pub fn is_held(&self) -> bool {
        let look = self.look();
        self.held.as_ref().is_some_and(|(held, _)| *held == look)
    }

    /// Takes its place in the queue, or leaves it when there is nothing to learn.
    pub fn queue(&mut self, arrivals: &mut u64) {
        let look = self.look();
        let is_known = self.learnt.as_ref() == Some(&look);
        if self.retired || is_known || self.is_held() {
            self.pending = None;
        } else if self.pending.is_none() {
            *arrivals += 1;
            self.pending = Some(*arrivals);
        }
    }
}

impl State {
    /// Why this cannot be what we wrote: whoever may write in the watched folder may write anything into the file, and
    /// names in it become paths.
    fn fault(&self) -> Option<String> {
        let mut ids = std::collections::BTreeSet::new();
        for subject in &self.subjects {
            if let Some(fault) = subject.fault() {
                return Some(fault);
            }
            if !ids.insert(&subject.id) {
                return Some(format!("there are two subjects {}", subject.id));
            }
        }
        let (run, published) = (self.run.as_ref(), self.published.as_ref());
        let digests = self
            .history
            .iter()
            .flat_map(|ended| [&ended.init, &ended.adapter]);
        let digests = digests.chain(run.map(|run| &run.init)).flatten();
        let mut digests = digests.chain(published.map(|published| &published.adapter));
        if let Some(odd) = digests.find(|digest| !is_digest(digest)) {
            return Some(format!("{odd:?} is no digest of an adapter"));
        }
        let numbers = self.history.iter().map(|ended| ended.number);
        let numbers = numbers.chain(run.map(|run| run.number));
        let mut numbers = numbers.chain(published.map(|published| published.number));
        if let Some(odd) = numbers.find(|number| !(1..RUNS).contains(number)) {
            return Some(format!("{odd} is no number of a run"));
        }
        if let Some(run) = run {
            let is_known = ids.contains(&run.subject);
            let unknown = (!is_known).then(|| format!("there is no subject {:?}", run.subject));
            if let Some(fault) = run.look.fault().or(unknown) {
                return Some(fault);
            }
        }
        published.and_then(Published::fault)
    }

    /// Notes the digest of the settings of the watch; what was held back under other ones waits for a run again.
    pub fn use_settings(&mut self, settings: &str) {
        if self.settings == settings {
            return;
        }
        self.settings = settings.to_string();
        for subject in &mut self.subjects {
            subject.held = None;
            subject.queue(&mut self.arrivals);
        }
    }

    /// The subject `id`.
    pub fn subject(&self, id: &str) -> Option<&Subject> {
        self.subjects.iter().find(|subject| subject.id == id)
    }

    /// The subjects that wait for a run, the first in the queue first.
    pub fn queue(&self) -> Vec<&Subject> {
        let mut queue: Vec<&Subject> = self
            .subjects
            .iter()
            .filter(|s| s.pending.is_some())
            .collect();
        queue.sort_by_key(|subject| subject.pending);
        queue
    }

    /// The number of the next run.
    pub fn next_number(&self) -> usize {
        self.history.last().map_or(1, |ended| ended.number + 1)
    }
}

/// Where a watch keeps what is its own: `.proxytune` in the watched folder.
#[derive(Debug, Clone)]
pub struct Home {
    /// The watched folder, absolute.
    pub watched: PathBuf,
    path: PathBuf,
}

impl Home {
    /// The home of a watch on `watched`.
    ///
    /// # Errors
    /// When there is no such folder.
    pub fn of(watched: &Path) -> Result<Self> {
        let watched = std::fs::canonicalize(watched).map_err(Error::io(watched))?;
        Ok(Self {
            path: watched.join(".proxytune"),
            watched,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Copies of the photos, as runs read them.
    pub fn photos(&self, id: &str, look: &Look) -> PathBuf {
        let digest = crate::plan::photos_digest(&look.photos);
        self.path.join("photos").join(id).join(&digest[..12])
    }

    /// Where run directories are.
    pub fn runs(&self) -> PathBuf {
        self.path.join("runs")
    }

    /// What run `number` published.
    pub fn adapter(&self, number: usize) -> PathBuf {
        self.path.join("adapters").join(format!("{number:04}"))
    }

    /// The adapter to use, with its evaluation.
    pub fn published(&self) -> PathBuf {
        self.path.join("published")
    }

    /// What the watch said, with times.
    pub fn log(&self) -> PathBuf {
        self.path.join("watch.log")
    }

    fn state(&self) -> PathBuf {
        self.path.join("state.json")
    }

    /// Whether anything was ever watched here.
    pub fn exists(&self) -> bool {
        self.state().is_file()
    }

    /// What was remembered; an empty state where nothing was.
    ///
    /// # Errors
    /// When the file cannot be read or has another layout.
    pub fn load(&self) -> Result<State> {
        if !self.exists() {
            return Ok(State {
                version: VERSION,
                ..State::default()
            });
        }
        let path = self.state();
        let text = crate::files::read_text(&path, crate::files::LISTS)?;
        let refused = |what: String| {
            Error::invalid(
                format!("{}: {what}", path.display()),
                "use the version of proxytune that wrote it, or move it away to start over",
            )
        };
        let json: serde_json::Value =
            serde_json::from_str(&text).map_err(|e| refused(e.to_string()))?;
        if json["version"] != VERSION {
            return Err(refused(format!(
                "version {}, this program reads {VERSION}",
                json["version"]
            )));
        }
        let state: State = serde_json::from_value(json).map_err(|e| refused(e.to_string()))?;
        match state.fault() {
            None => Ok(state),
            Some(fault) => Err(refused(format!("{fault}: proxytune did not write that"))),
        }
    }

    /// Where the store of the watch is: in `given`, or where it was.
    ///
    /// # Errors
    /// When `given` is another store, or the watch's own is not there any more.
    pub fn store(&self, state: &State, given: Option<&Path>) -> Result<PathBuf> {
        let owner = format!("the watch on {}", self.watched.display());
        state.store.find(&owner, &self.path, given)
    }

    /// Refuses to work where a folder of the watch's own is a link: everything below it would be written, and deleted,
    /// somewhere else.
    ///
    /// # Errors
    /// Naming the link.
    pub fn refuse_links(&self) -> Result<()> {
        for folder in ["photos", "runs", "adapters"] {
            files::within(&self.watched, &self.path.join(folder).join("any"))?;
        }
        Ok(())
    }

    /// Deletes the file, link or folder at `path`, which is one of the watch's own, if it is there.
    ///
    /// # Errors
    /// When it would lie elsewhere, or be reached through a link; when it cannot be deleted.
    pub fn remove(&self, path: &Path) -> Result<()> {
        files::remove_within(&self.path, path)
    }

    /// Remembers `state`, wholly or not at all.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, state: &State) -> Result<()> {
        let text = serde_json::to_string_pretty(state).map_err(|e| Error::Invalid {
            what: format!("state.json: {e}"),
            hint: None,
        })?;
        files::write(&self.state(), text.as_bytes())
    }

    /// Keeps other processes from watching here while the file lives.
    ///
    /// # Errors
    /// When another process watches here, the folder cannot be written, or one of the watch's own is a link.
    pub fn lock(&self) -> Result<File> {
        self.lock_or("see how it is doing with: proxytune watch --status DIR")
    }

    /// The same, with another hint where a process watches here.
    ///
    /// # Errors
    /// Those of [`Home::lock`].
    pub fn lock_or(&self, hint: &str) -> Result<File> {
        self.refuse_links()?;
        files::create_dir(&self.path)?;
        pipeline::lock(&self.path, || {
            let watched = self.watched.display();
            Error::invalid(
                format!("{watched} is being watched by another process"),
                hint,
            )
        })
    }

    /// Whether a process watches here.
    pub fn is_watched(&self) -> bool {
        let file = crate::files::open(&self.path.join("lock"));
        file.is_ok_and(|file| {
            matches!(
                file.try_lock_shared(),
                Err(std::fs::TryLockError::WouldBlock)
            )
        })
    }
}
