//! Files that are either wholly there or not at all: written aside, synced, renamed.

pub mod gguf;
mod json;
mod open;
pub mod system;
pub mod tensor_headers;
mod tensors;
pub mod text;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Component, Path, PathBuf};

pub use self::json::{read_json, read_text, read_text_if_there};
pub use self::open::{LISTS, SETTINGS, TENSORS, copy, open, read};
pub use self::tensors::{read_tensors, values_digest, write_tensors};
use crate::{Error, Result};

/// Where the file or folder `path` is written before it takes its place.
pub(crate) fn aside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}.tmp", std::process::id()))
}

fn sync(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(Error::io(path))
}

fn sync_parent(path: &Path) -> Result<()> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync(parent),
        _ => Ok(()),
    }
}

/// Creates `dir` and its parents.
pub fn create_dir(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(Error::io(dir))
}

/// Replaces the file `path` by `bytes`.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    if let Some(parent) = path.parent() {
        create_dir(parent)?;
    }
    let mut aside = Aside::create(path)?;
    aside.file().write_all(bytes).map_err(Error::io(path))?;
    aside.finish()
}

/// The new file in which what is to be the file `path` is written, and where it is. What a killed process left there, or
/// a link that somebody laid out, is not written through.
pub(crate) fn create_aside(path: &Path) -> Result<(File, PathBuf)> {
    let temporary = aside(path);
    remove_file(&temporary)?;
    let file = File::create_new(&temporary).map_err(Error::io(path))?;
    Ok((file, temporary))
}

/// Removes the file or link `path`, if it is there.
pub(crate) fn remove_file(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path)(e)),
        _ => Ok(()),
    }
}

/// Makes the finished file `aside` the file `path`.
pub(crate) fn into_place(aside: &Path, path: &Path) -> Result<()> {
    sync(aside)?;
    std::fs::rename(aside, path).map_err(Error::io(path))?;
    sync_parent(path)
}

/// Writes `bytes` as the new file `path`, wholly or not at all; false, and nothing is changed, if something of that name
/// is there already.
pub fn write_new(path: &Path, bytes: &[u8]) -> Result<bool> {
    let (mut file, temporary) = create_aside(path)?;
    let written = file
        .write_all(bytes)
        .and_then(|()| file.sync_all())
        .and_then(|()| give_new_name(&temporary, path));
    // After a rename there is none any more.
    let _ = std::fs::remove_file(&temporary);
    match written {
        Ok(()) => sync_parent(path).map(|()| true),
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(false),
        Err(e) => Err(Error::io(path)(e)),
    }
}

/// Lets the file `from` have the name `to` as well, which nothing has yet. Where the disk has no second names it loses
/// its own.
fn give_new_name(from: &Path, to: &Path) -> std::io::Result<()> {
    match std::fs::hard_link(from, to) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
            File::create_new(to)?;
            std::fs::rename(from, to)
        }
        linked => linked,
    }
}

/// Adds `line` and a line break to the text file `path`, which is made if it is not there.
pub fn append_line(path: &Path, line: &str) -> Result<()> {
    let append = || {
        let mut options = File::options();
        let mut file = options.read(true).append(true).create(true).open(path)?;
        let mut last = [b'\n'];
        if file.metadata()?.len() > 0 {
            file.seek(SeekFrom::End(-1))?;
            file.read_exact(&mut last)?;
        }
        let before = if last == [b'\n'] { "" } else { "\n" };
        file.write_all(format!("{before}{line}\n").as_bytes())
    };
    append().map_err(Error::io(path))
}

/// A file that is written aside, bit by bit, and takes its name when it is whole. Dropped before, it vanishes.
pub struct Aside {
    file: File,
    temporary: PathBuf,
    path: PathBuf,
}

impl Aside {
    /// A new file that is to become `path`, in a folder that exists.
    pub fn create(path: &Path) -> Result<Self> {
        let (file, temporary) = create_aside(path)?;
        Ok(Self {
            file,
            temporary,
            path: path.to_path_buf(),
        })
    }

    /// What to write to.
    pub fn file(&mut self) -> &mut File {
        &mut self.file
    }

    /// Syncs what was written and gives it its name; a file of that name is replaced.
    pub fn finish(self) -> Result<()> {
        self.file.sync_all().map_err(Error::io(&self.path))?;
        std::fs::rename(&self.temporary, &self.path).map_err(Error::io(&self.path))?;
        sync_parent(&self.path)
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        // After `finish` there is none any more.
        let _ = std::fs::remove_file(&self.temporary);
    }
}

/// Replaces the folder `dir` by what `fill` puts into an empty one. On Linux the two are exchanged, so that there is
/// always one of them; elsewhere, and on disks that cannot exchange, there is none for a moment, and should the process
/// be killed in it, [`remove_leftovers`] puts the old one back.
pub fn write_dir(dir: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let temporary = aside(dir);
    remove_dir(&temporary)?;
    create_dir(&temporary)?;
    let written = fill(&temporary)
        .and_then(|()| sync_dir(&temporary))
        .and_then(|()| replace_dir(&temporary, dir));
    if written.is_err() {
        // What failed is told; that its remains cannot be removed either is of no use to anyone.
        let _ = remove_dir(&temporary);
    }
    written
}

/// Refuses a `path` that is not below the folder `root`, or leads there through a link: where others may write, a link
/// can lead anywhere. The last part of `path` may be one.
///
/// # Errors
/// When `path` is `root` or not below it, or has `..` in it; when a folder between the two is a link.
pub fn within(root: &Path, path: &Path) -> Result<()> {
    let outside = || Error::Invalid {
        what: format!("{} does not lie in {}", path.display(), root.display()),
        hint: None,
    };
    let below = path.strip_prefix(root).map_err(|_| outside())?;
    let is_plain = |part: Component| matches!(part, Component::Normal(_));
    if below.as_os_str().is_empty() || !below.components().all(is_plain) {
        return Err(outside());
    }
    let between = path.ancestors().skip(1).take_while(|part| *part != root);
    match between.filter(|part| part.is_symlink()).last() {
        None => Ok(()),
        Some(link) => Err(link_in_the_way(link)),
    }
}

/// Refuses a folder that is a link, or in which a link lies at any depth.
///
/// # Errors
/// Naming the link; when a folder cannot be listed.
pub fn refuse_links(dir: &Path) -> Result<()> {
    if dir.is_symlink() {
        return Err(link_in_the_way(dir));
    }
    for (_, path) in list(dir)? {
        if path.is_dir() || path.is_symlink() {
            refuse_links(&path)?;
        }
    }
    Ok(())
}

fn link_in_the_way(link: &Path) -> Error {
    Error::invalid(
        format!("{} is a link: it is not followed", link.display()),
        "move it away: proxytune made no link there",
    )
}

/// Deletes the file, link or folder `path`, which must lie [`within`] `root`, if it is there.
///
/// # Errors
/// Those of [`within`]; when something cannot be deleted.
pub fn remove_within(root: &Path, path: &Path) -> Result<()> {
    within(root, path)?;
    match path.symlink_metadata() {
        Ok(found) if found.is_dir() => remove_dir(path),
        _ => remove_file(path),
    }
}

/// Puts what `fill` puts into an empty folder into the folder `dir`: in one step if it is not there yet, else entry by
/// entry, as a folder that a disk is mounted on, or that a terminal is in, keeps its place.
pub fn fill_dir(dir: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if !dir.is_dir() {
        return write_dir(dir, fill);
    }
    let temporary = aside(&dir.join("contents"));
    let filled = write_dir(&temporary, fill).and_then(|()| {
        for (name, from) in list(&temporary)? {
            let to = dir.join(name);
            std::fs::rename(&from, &to).map_err(Error::io(&to))?;
        }
        sync(dir)
    });
    let removed = remove_dir(&temporary);
    filled.and(removed)
}

/// Removes the folder `path`, if it is there.
pub(crate) fn remove_dir(path: &Path) -> Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path)(e)),
        _ => Ok(()),
    }
}

/// Syncs the folder `dir` and what lies in it.
fn sync_dir(dir: &Path) -> Result<()> {
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir))? {
        sync(&entry.map_err(Error::io(dir))?.path())?;
    }
    sync(dir)
}

/// Makes the folder `new` the folder `dir`, and removes the one that was there.
fn replace_dir(new: &Path, dir: &Path) -> Result<()> {
    let rename = |from: &Path, to: &Path| std::fs::rename(from, to).map_err(Error::io(to));
    if dir.symlink_metadata().is_err() {
        rename(new, dir)?;
        return sync_parent(dir);
    }
    if exchange(new, dir).is_ok() {
        sync_parent(dir)?;
        return remove_dir(new);
    }
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let old = aside(&dir.with_file_name(format!("{name}{REPLACED}")));
    remove_dir(&old)?;
    rename(dir, &old)?;
    if let Err(error) = rename(new, dir) {
        let _ = rename(&old, dir);
        return Err(error);
    }
    sync_parent(dir)?;
    remove_dir(&old)
}

/// How the name of a folder ends that was moved aside to make room.
const REPLACED: &str = ".old";

/// Exchanges two folders in one step.
#[cfg(target_os = "linux")]
fn exchange(a: &Path, b: &Path) -> std::io::Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let a = std::ffi::CString::new(a.as_os_str().as_bytes())?;
    let b = std::ffi::CString::new(b.as_os_str().as_bytes())?;
    // SAFETY: both names end with a zero byte and live until the call is over; it takes five plain numbers and pointers.
    let failed = unsafe {
        libc::syscall(
            libc::SYS_renameat2,
            libc::AT_FDCWD,
            a.as_ptr(),
            libc::AT_FDCWD,
            b.as_ptr(),
            libc::RENAME_EXCHANGE,
        )
    };
    match failed {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Exchanges two folders in one step: here nobody can.
#[cfg(not(target_os = "linux"))]
fn exchange(_a: &Path, _b: &Path) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}

/// Lets the link `link` lead to `to`, a path relative to the link's own folder, in one step; a link of that name is
/// replaced.
///
/// # Errors
/// When something else than a link is there, or the disk has none.
#[cfg(unix)]
pub fn link(link: &Path, to: &Path) -> Result<()> {
    if link.symlink_metadata().is_ok() && !link.is_symlink() {
        return Err(Error::invalid(
            format!("{} is no link", link.display()),
            "move it away",
        ));
    }
    let temporary = aside(link);
    remove_file(&temporary)?;
    std::os::unix::fs::symlink(to, &temporary).map_err(Error::io(&temporary))?;
    std::fs::rename(&temporary, link).map_err(Error::io(link))
}

/// What is in the folder `dir`, names and paths, sorted; nothing if there is no such folder.
pub fn list(dir: &Path) -> Result<Vec<(String, PathBuf)>> {
    let entries = match std::fs::read_dir(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(Error::io(dir))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(Error::io(dir))?;
        found.push((
            entry.file_name().to_string_lossy().into_owned(),
            entry.path(),
        ));
    }
    found.sort();
    Ok(found)
}

/// The file or folder that `name` is, or was, to become when a process wrote it aside.
pub fn written_aside(name: &str) -> Option<&str> {
    let (name, process) = name
        .strip_prefix('.')?
        .strip_suffix(".tmp")?
        .rsplit_once('.')?;
    process.bytes().all(|b| b.is_ascii_digit()).then_some(name)
}

/// Bytes that may still be written on the disk of `path`.
#[cfg(unix)]
pub fn free_space(path: &Path) -> Result<u64> {
    use std::os::unix::ffi::OsStrExt;
    let name = std::ffi::CString::new(path.as_os_str().as_bytes())
        .map_err(|e| Error::io(path)(e.into()))?;
    // SAFETY: an all-zero statvfs is a valid one, plain numbers.
    let mut found: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: `name` ends with a zero byte, and `found` is there to be written.
    if unsafe { libc::statvfs(name.as_ptr(), &mut found) } != 0 {
        return Err(Error::io(path)(std::io::Error::last_os_error()));
    }
    Ok(found.f_bavail as u64 * found.f_frsize as u64)
}

/// Bytes that may still be written on the disk of `path`: here nobody knows.
#[cfg(not(unix))]
pub fn free_space(_path: &Path) -> Result<u64> {
    Ok(u64::MAX)
}

/// Removes what a killed process left half-written in `dir` and below, and puts back what it had moved aside to replace
/// it; nobody else may be writing there.
pub fn remove_leftovers(dir: &Path) -> Result<()> {
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir))? {
        let path = entry.map_err(Error::io(dir))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let replaced = written_aside(&name).and_then(|name| name.strip_suffix(REPLACED));
        let place = replaced.map(|name| path.with_file_name(name));
        if let Some(place) = place.filter(|place| place.symlink_metadata().is_err()) {
            std::fs::rename(&path, &place).map_err(Error::io(&place))?;
            continue;
        }
        let left = name.starts_with('.') && name.ends_with(".tmp");
        match (left, path.is_dir() && !path.is_symlink()) {
            (true, true) => std::fs::remove_dir_all(&path).map_err(Error::io(&path))?,
            (true, false) => std::fs::remove_file(&path).map_err(Error::io(&path))?,
            (false, true) => remove_leftovers(&path)?,
            (false, false) => {}
        }
    }
    Ok(())
}

/// Replaces the folder `to` by a copy of the files of the folder `from`.
pub fn copy_dir(from: &Path, to: &Path) -> Result<()> {
    if let Some(parent) = to.parent() {
        create_dir(parent)?;
    }
    write_dir(to, |aside| {
        for entry in std::fs::read_dir(from).map_err(Error::io(from))? {
            let entry = entry.map_err(Error::io(from))?;
            copy(&entry.path(), &aside.join(entry.file_name())).map_err(Error::io(entry.path()))?;
        }
        Ok(())
    })
}

fn content(path: &Path) -> Result<blake3::Hash> {
    let mut content = blake3::Hasher::new();
    open(path)
        .and_then(|file| content.update_reader(file).map(drop))
        .map_err(Error::io(path))?;
    Ok(content.finalize())
}

/// Digest of the bytes of the file `path`.
///
/// # Errors
/// When it cannot be read.
pub fn digest(path: &Path) -> Result<String> {
    Ok(content(path)?.to_hex().to_string())
}

/// Digest of the file `path`, or of the files in the folder `path` as [`digest_dir`] takes it.
///
/// # Errors
/// When there is neither, or it cannot be read.
pub fn digest_of(path: &Path) -> Result<String> {
    match path.is_dir() {
        true => digest_dir(path),
        false => digest(path),
    }
}

/// Digest of the files that lie in the folder `dir`, hidden ones and folders left out: names and contents.
pub fn digest_dir(dir: &Path) -> Result<String> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir))? {
        let path = entry.map_err(Error::io(dir))?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if path.is_file() && !name.starts_with('.') {
            found.insert(name, path);
        }
    }
    let mut hasher = blake3::Hasher::new();
    for (name, path) in found {
        let content = content(&path)?;
        hasher.update(&(name.len() as u64).to_le_bytes());
        hasher.update(name.as_bytes());
        hasher.update(content.as_bytes());
    }
    Ok(hasher.finalize().to_hex().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(dir: &Path, text: &str) -> Result<()> {
        write_dir(dir, |aside| {
            std::fs::write(aside.join("text"), text).map_err(Error::io(aside))
        })
    }

    #[test]
    fn a_folder_that_is_replaced_is_never_missing_and_what_fails_leaves_nothing() {
        let around = tempfile::tempdir().unwrap();
        let dir = around.path().join("folder");
        folder(&dir, "0").unwrap();
        let watched = dir.clone();
        let reader = std::thread::spawn(move || (0..20_000).all(|_| watched.is_dir()));
        for i in 1..100 {
            folder(&dir, &i.to_string()).unwrap();
        }
        let always = reader.join().unwrap();
        assert!(always || cfg!(not(target_os = "linux")), "it was missing");
        let failed = write_dir(&dir, |_| Err(Error::invalid("no", "yes")));
        assert!(failed.is_err());
        assert_eq!(std::fs::read_to_string(dir.join("text")).unwrap(), "99");
        assert_eq!(list(around.path()).unwrap().len(), 1);
    }

    #[test]
    fn a_folder_that_is_there_is_filled_and_stays_the_same_folder() {
        let around = tempfile::tempdir().unwrap();
        let fill = |dir: &Path| {
            create_dir(&dir.join("inside"))?;
            write(&dir.join("inside/text"), b"1")
        };
        let (old, new) = (around.path().join("old"), around.path().join("new"));
        create_dir(&old).unwrap();
        // Opened before, it must still be the one that has the files after.
        let handle = File::open(&old).unwrap();
        for dir in [&old, &new] {
            fill_dir(dir, fill).unwrap();
            assert_eq!(list(dir).unwrap().len(), 1);
            assert!(dir.join("inside/text").is_file());
        }
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            let number = |file: std::fs::Metadata| file.ino();
            let same = number(handle.metadata().unwrap()) == number(old.metadata().unwrap());
            assert!(same, "it was replaced");
        }
        let failed = fill_dir(&old, |_| Err(Error::invalid("no", "yes")));
        assert!(failed.is_err());
        assert_eq!(list(&old).unwrap().len(), 1);
    }

    #[test]
    fn a_new_file_takes_nobodys_place_and_lines_are_added_to_what_is_there() {
        let around = tempfile::tempdir().unwrap();
        let path = around.path().join("a");
        assert!(write_new(&path, b"one").unwrap());
        assert!(!write_new(&path, b"two").unwrap());
        assert_eq!(std::fs::read(&path).unwrap(), b"one");
        append_line(&path, "two").unwrap();
        append_line(&path, "three").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"one\ntwo\nthree\n");
        assert_eq!(list(around.path()).unwrap().len(), 1);
        assert!(write_new(&around.path().join("no/such"), b"").is_err());
    }

    #[test]
    fn what_was_moved_aside_is_put_back_when_nothing_took_its_place() {
        let around = tempfile::tempdir().unwrap();
        for name in [".lost.old.7.tmp", ".lost.7.tmp", ".kept.old.7.tmp", "kept"] {
            folder(&around.path().join(name), name).unwrap();
        }
        remove_leftovers(around.path()).unwrap();
        let left = list(around.path()).unwrap();
        let names: Vec<&str> = left.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["kept", "lost"]);
        let text = std::fs::read_to_string(around.path().join("lost/text")).unwrap();
        assert_eq!(text, ".lost.old.7.tmp");
    }
}
