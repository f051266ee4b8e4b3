//! What lies in a watched folder, and what of it has come to rest. Nothing here trusts events: a scan lists everything,
//! and what has looked the same for a while counts.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use super::state::SetAside;
use crate::files::system::is_system;
use crate::images::{self, is_other_picture, is_photo_name};
use crate::{Error, Result};

/// What tells that a file has changed, without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    bytes: u64,
    modified: Option<SystemTime>,
    /// The inode, where there are such: a file that another was moved over has a new one.
    inode: u64,
    /// When the inode changed, in seconds and nanoseconds: a file may be given the time of another, but not this.
    changed: (i64, i64),
}

/// The files of a subject's folder by their names; `None` when the folder is not there.
type Listing = Option<BTreeMap<String, Stamp>>;

struct Seen {
    listing: Listing,
    /// When it was first seen like this.
    since: Instant,
}

/// What reading a file came to.
#[derive(Debug, Clone)]
enum Verdict {
    Photo(String),
    Bad(String),
    /// It may not be read, which can change without the file.
    Closed(String),
}

/// A subject's folder that has come to rest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Folder {
    /// The usable photos by the digests of their bytes; of equal files the first counts.
    pub photos: BTreeMap<String, PathBuf>,
}

/// One look at the whole folder.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scan {
    /// The folders at rest, by `class/subject`.
    pub folders: BTreeMap<String, Folder>,
    /// Folders that are still changing, or were there a moment ago.
    pub unsettled: BTreeSet<String>,
    /// Pictures that cannot be used.
    pub set_aside: Vec<SetAside>,
    /// How long until something may have come to rest; `None` when everything has.
    pub settles_in: Option<Duration>,
}

/// Looks at a watched folder again and again.
pub struct Scanner {
    root: PathBuf,
    settle: Duration,
    seen: BTreeMap<String, Seen>,
    read: HashMap<PathBuf, (Stamp, Verdict)>,
    /// Whether a content is a picture does not depend on where it lies.
    known: HashMap<String, Option<String>>,
}

impl Scanner {
    /// A scanner of `root` for which what has looked the same for `settle` is at rest.
    pub fn new(root: impl Into<PathBuf>, settle: Duration) -> Self {
        Self {
            root: root.into(),
            settle,
            seen: BTreeMap::new(),
            read: HashMap::new(),
            known: HashMap::new(),
        }
    }

    /// Looks at everything, at the time `now`, and reads what has come to rest since. `expected` are folders that were
    /// there when this was last known, `class/subject`: they are gone when they have been missing for a while. Blocks.
    ///
    /// # Errors
    /// When the watched folder cannot be listed, or a folder in it for another reason than missing rights.
    pub fn scan(&mut self, expected: &[String], now: Instant) -> Result<Scan> {
        let mut scan = Scan::default();
        let (mut listings, closed) = self.list(&mut scan.set_aside)?;
        for folder in self.seen.keys().chain(expected) {
            let class = folder.split('/').next().unwrap_or_default();
            if closed.contains(folder) || closed.contains(class) {
                // What may not be listed is not known to be gone.
                scan.unsettled.insert(folder.clone());
            } else if !listings.contains_key(folder) {
                listings.insert(folder.clone(), None);
            }
        }
        for (folder, listing) in listings {
            let seen = self.seen.entry(folder.clone()).or_insert_with(|| Seen {
                listing: listing.clone(),
                since: now,
            });
            if seen.listing != listing {
                seen.listing = listing.clone();
                seen.since = now;
            }
            let waits = self
                .settle
                .saturating_sub(now.saturating_duration_since(seen.since));
            let at_rest = match (&listing, waits.is_zero()) {
                (None, true) => {
                    self.seen.remove(&folder);
                    continue;
                }
                (Some(files), true) => self.read_folder(&folder, files, &mut scan.set_aside),
                (_, false) => None,
            };
            match at_rest {
                Some(photos) => drop(scan.folders.insert(folder, photos)),
                None => {
                    // What changed while it was being read has to rest again.
                    let waits = if waits.is_zero() { self.settle } else { waits };
                    scan.settles_in = Some(scan.settles_in.map_or(waits, |other| other.min(waits)));
                    scan.unsettled.insert(folder);
                }
            }
        }
        let seen = &self.seen;
        let root = &self.root;
        self.read.retain(|path, _| {
            let folder = path
                .parent()
                .and_then(|parent| parent.strip_prefix(root).ok());
            folder.is_some_and(|folder| seen.contains_key(&*folder.to_string_lossy()))
        });
        scan.set_aside.sort();
        Ok(scan)
    }

    /// Every subject's folder with its pictures, and the folders of classes and subjects that may not be listed.
    /// Pictures that lie outside of a subject's folder are set aside, and so is what has a name that cannot be kept.
    fn list(
        &self,
        set_aside: &mut Vec<SetAside>,
    ) -> Result<(BTreeMap<String, Listing>, BTreeSet<String>)> {
        let root = std::fs::canonicalize(&self.root).map_err(Error::io(&self.root))?;
        let mut listings = BTreeMap::new();
        let mut closed = BTreeSet::new();
        for class in entries(&self.root)? {
            if !class.is_dir() {
                set_aside.extend(misplaced(&self.root, &class));
                continue;
            }
            if let Some(reason) = astray(&root, &class) {
                let path = below(&self.root, &class);
                set_aside.push(SetAside { path, reason });
                continue;
            }
            let Some(class_name) = self.kept_name(&class, set_aside) else {
                continue;
            };
            let Some(subjects) = self.open_entries(&class, set_aside)? else {
                closed.insert(class_name);
                continue;
            };
            for subject in subjects {
                if !subject.is_dir() {
                    set_aside.extend(misplaced(&self.root, &subject));
                    continue;
                }
                if let Some(reason) = astray(&root, &subject) {
                    let path = below(&self.root, &subject);
                    set_aside.push(SetAside { path, reason });
                    continue;
                }
                let Some(subject_name) = self.kept_name(&subject, set_aside) else {
                    continue;
                };
                let folder = format!("{class_name}/{subject_name}");
                let Some(found) = self.open_entries(&subject, set_aside)? else {
                    closed.insert(folder);
                    continue;
                };
                let mut files = BTreeMap::new();
                for file in found {
                    let is_picture = is_photo_name(&file) || is_other_picture(&file);
                    if let (true, Some(stamp)) = (is_picture, stamp(&file))
                        && let Some(name) = self.kept_name(&file, set_aside)
                    {
                        files.insert(name, stamp);
                    }
                }
                listings.insert(folder, Some(files));
            }
        }
        Ok((listings, closed))
    }

    /// The name of what is at `path`; set aside when it is not UTF-8, as it would not be found again by it.
    fn kept_name(&self, path: &Path, set_aside: &mut Vec<SetAside>) -> Option<String> {
        let name = path.file_name().and_then(|name| name.to_str());
        if name.is_none() {
            set_aside.push(SetAside {
                path: below(&self.root, path),
                reason: "its name is not UTF-8: give it another one".into(),
            });
        }
        name.map(str::to_string)
    }

    /// What is in `dir`, which may vanish between two looks at it; `None` when it may not be listed, which is noted.
    fn open_entries(
        &self,
        dir: &Path,
        set_aside: &mut Vec<SetAside>,
    ) -> Result<Option<Vec<PathBuf>>> {
        let kind = |error: &Error| match error {
            Error::Io { source, .. } => Some(source.kind()),
            _ => None,
        };
        match entries(dir) {
            Err(error) if kind(&error) == Some(ErrorKind::NotFound) => Ok(Some(Vec::new())),
            Err(error) if kind(&error) == Some(ErrorKind::PermissionDenied) => {
                set_aside.push(SetAside {
                    path: below(&self.root, dir),
                    reason: reason(error),
                });
                Ok(None)
            }
            listed => listed.map(Some),
        }
    }

    /// Reads the files of a folder; `None` when one of them changed meanwhile, or could not be read just now.
    fn read_folder(
        &mut self,
        folder: &str,
        files: &BTreeMap<String, Stamp>,
        set_aside: &mut Vec<SetAside>,
    ) -> Option<Folder> {
        let mut found = Folder::default();
        let mut bad = Vec::new();
        for (name, expected) in files {
            let path = self.root.join(folder).join(name);
            let verdict = match self.read.get(&path) {
                Some((known, verdict)) if known == expected => verdict.clone(),
                _ => self.read_file(&path)?,
            };
            if stamp(&path) != Some(*expected) {
                return None;
            }
            if !matches!(verdict, Verdict::Closed(_)) {
                self.read.insert(path.clone(), (*expected, verdict.clone()));
            }
            match verdict {
                Verdict::Photo(digest) => drop(found.photos.entry(digest).or_insert(path)),
                Verdict::Bad(reason) | Verdict::Closed(reason) => bad.push(SetAside {
                    path: format!("{folder}/{name}"),
                    reason,
                }),
            }
        }
        set_aside.extend(bad);
        Some(found)
    }

    /// What the file at `path` is; `None` when the disk failed, which says nothing about the file.
    fn read_file(&mut self, path: &Path) -> Option<Verdict> {
        if !is_photo_name(path) {
            return Some(Verdict::Bad("only JPEG, PNG and WebP are read".into()));
        }
        // Opening a pipe would wait for somebody at its other end, and a device may never end.
        match std::fs::metadata(path) {
            Ok(found) if found.is_dir() => return Some(Verdict::Bad("it is a folder".into())),
            Ok(found) if !found.is_file() => {
                let reason = "it is a pipe, a socket or a device, not a file";
                return Some(Verdict::Bad(reason.into()));
            }
            _ => {}
        }
        let bytes = match images::read(path) {
            Ok(bytes) => bytes,
            Err(Error::Io { source, .. }) if source.kind() == ErrorKind::PermissionDenied => {
                return Some(Verdict::Closed(source.to_string()));
            }
            Err(Error::Io { .. }) => return None,
            Err(error) => return Some(Verdict::Bad(reason(error))),
        };
        let digest = blake3::hash(&bytes).to_hex().to_string();
        let fault = self
            .known
            .entry(digest.clone())
            .or_insert_with(|| images::decode(&bytes, path).err().map(reason));
        Some(match fault {
            None => Verdict::Photo(digest),
            Some(reason) => Verdict::Bad(reason.clone()),
        })
    }
}

/// Why the folder at `path`, if it is a link, is not followed: it leads back into the folder `root` (without links) or to
/// where that lies, so that it would be watched twice, or everything around it with it.
fn astray(root: &Path, path: &Path) -> Option<String> {
    let target = path
        .is_symlink()
        .then(|| std::fs::canonicalize(path).ok())??;
    let to = target.display();
    if root.starts_with(&target) {
        return Some(format!(
            "it is a link to {to}, in which the watched folder itself lies: not followed"
        ));
    }
    let is_inside = target.starts_with(root);
    is_inside.then(|| format!("it is a link to {to}, which is watched already: not followed"))
}

/// The folders of subjects and classes below `root` that are reached through links, which are listened to by themselves.
pub fn linked(root: &Path) -> Vec<PathBuf> {
    let Ok(root) = std::fs::canonicalize(root) else {
        return Vec::new();
    };
    let folders = |dir: &Path| {
        let mut folders = entries(dir).unwrap_or_default();
        folders.retain(|path| path.is_dir() && astray(&root, path).is_none());
        folders
    };
    let mut found = Vec::new();
    for class in folders(&root) {
        let subjects = folders(&class);
        let is_linked = class.is_symlink();
        found.extend(
            subjects
                .into_iter()
                .filter(|subject| is_linked || subject.is_symlink()),
        );
        found.extend(is_linked.then_some(class));
    }
    found
}

/// What is in `dir`, in the order of names; hidden things and the system's do not count.
fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir))? {
        let path = entry.map_err(Error::io(dir))?.path();
        let name = name(&path);
        if !name.starts_with('.') && !is_system(&name) {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

fn misplaced(root: &Path, path: &Path) -> Option<SetAside> {
    (is_photo_name(path) || is_other_picture(path)).then(|| SetAside {
        path: below(root, path),
        reason: "it lies outside of a subject's folder, which is CLASS/SUBJECT".into(),
    })
}

/// `path` as people are told it, below the watched folder.
fn below(root: &Path, path: &Path) -> String {
    let path = path.strip_prefix(root).unwrap_or(path);
    path.display().to_string()
}

fn name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

fn stamp(path: &Path) -> Option<Stamp> {
    let metadata = std::fs::metadata(path).ok()?;
    #[cfg(unix)]
    let (inode, changed) = {
        use std::os::unix::fs::MetadataExt;
        (metadata.ino(), (metadata.ctime(), metadata.ctime_nsec()))
    };
    #[cfg(not(unix))]
    let (inode, changed) = (0, (0, 0));
    Some(Stamp {
        bytes: metadata.len(),
        modified: metadata.modified().ok(),
        inode,
        changed,
    })
}

/// The reason alone: the path stands beside it already.
fn reason(error: Error) -> String {
    match error {
        Error::Image { reason, .. } => reason,
        Error::Io { source, .. } => source.to_string(),
        other => other.to_string(),
    }
}
