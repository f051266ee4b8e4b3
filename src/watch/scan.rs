//! What lies in a watched folder, and what of it has come to rest. Nothing here trusts events: a scan lists everything,
//! and what has looked the same for a while counts.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use super::state::SetAside;
use crate::images::{self, is_other_picture, is_photo_name};
use crate::{Error, Result};

/// What tells that a file has changed, without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    bytes: u64,
    modified: Option<SystemTime>,
    /// The inode, where there are such: a file that another was moved over has a new one.
    inode: u64,
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
    /// When the watched folder itself cannot be listed.
    pub fn scan(&mut self, expected: &[String], now: Instant) -> Result<Scan> {
        let mut scan = Scan::default();
        let mut listings = self.list(&mut scan.set_aside)?;
        for folder in self.seen.keys().chain(expected) {
            if !listings.contains_key(folder) {
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

    /// Every subject's folder with its pictures; pictures that lie outside of one are set aside.
    fn list(&self, set_aside: &mut Vec<SetAside>) -> Result<BTreeMap<String, Listing>> {
        let mut listings = BTreeMap::new();
        for class in entries(&self.root)? {
            if !class.is_dir() {
                set_aside.extend(misplaced(&self.root, &class));
                continue;
            }
            // A class's folder may vanish between two looks at it.
            for subject in entries(&class).unwrap_or_default() {
                if !subject.is_dir() {
                    set_aside.extend(misplaced(&self.root, &subject));
                    continue;
                }
                let mut files = BTreeMap::new();
                for file in entries(&subject).unwrap_or_default() {
                    let is_picture = is_photo_name(&file) || is_other_picture(&file);
                    if let (true, Some(stamp)) = (is_picture, stamp(&file)) {
                        files.insert(name(&file), stamp);
                    }
                }
                listings.insert(format!("{}/{}", name(&class), name(&subject)), Some(files));
            }
        }
        Ok(listings)
    }

    /// Reads the files of a folder; `None` when one of them changed meanwhile.
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
                _ => self.read_file(&path),
            };
            if stamp(&path) != Some(*expected) {
                return None;
            }
            self.read.insert(path.clone(), (*expected, verdict.clone()));
            match verdict {
                Verdict::Photo(digest) => drop(found.photos.entry(digest).or_insert(path)),
                Verdict::Bad(reason) => bad.push(SetAside {
                    path: format!("{folder}/{name}"),
                    reason,
                }),
            }
        }
        set_aside.extend(bad);
        Some(found)
    }

    fn read_file(&mut self, path: &Path) -> Verdict {
        if !is_photo_name(path) {
            return Verdict::Bad("only JPEG, PNG and WebP are read".into());
        }
        let bytes = match images::read(path) {
            Ok(bytes) => bytes,
            Err(error) => return Verdict::Bad(reason(error)),
        };
        let digest = blake3::hash(&bytes).to_hex().to_string();
        let fault = self
            .known
            .entry(digest.clone())
            .or_insert_with(|| images::decode(&bytes, path).err().map(reason));
        match fault {
            None => Verdict::Photo(digest),
            Some(reason) => Verdict::Bad(reason.clone()),
        }
    }
}

/// What is in `dir`, in the order of names; hidden things do not count.
fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir))? {
        let path = entry.map_err(Error::io(dir))?.path();
        if !name(&path).starts_with('.') {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

fn misplaced(root: &Path, path: &Path) -> Option<SetAside> {
    (is_photo_name(path) || is_other_picture(path)).then(|| SetAside {
        path: path
            .strip_prefix(root)
            .unwrap_or(path)
            .display()
            .to_string(),
        reason: "it lies outside of a subject's folder, which is CLASS/SUBJECT".into(),
    })
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
    let inode = std::os::unix::fs::MetadataExt::ino(&metadata);
    #[cfg(not(unix))]
    let inode = 0;
    Some(Stamp {
        bytes: metadata.len(),
        modified: metadata.modified().ok(),
        inode,
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
