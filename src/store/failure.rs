//! What Lance reports, as this crate's errors: a full disk, missing rights and foreign layouts are recognised.

use std::error::Error as Cause;
use std::io;
use std::path::Path;

use crate::Error;

/// `cause`, met while trying to `act` ("read", "append to") on the table at `path`.
pub(super) fn failed(act: &str, path: &Path, cause: lance::Error) -> Error {
    match io_kind(&cause) {
        Some(kind) => Error::Io {
            path: path.to_path_buf(),
            source: io::Error::new(kind, format!("cannot {act} this table: {}", plain(&cause))),
        },
        None => Error::Store {
            what: format!("cannot {act} {}: {}", path.display(), plain(&cause)),
            hint: hint(&cause),
        },
    }
}

/// A table of a layout that this program cannot read; `found` is its number, if it has one.
pub(super) fn refused(path: &Path, found: Option<u32>, ours: u32) -> Error {
    let hint = "choose another directory with --store";
    let (found, hint) = match found {
        None => (
            "no schema version: proxytune did not make it".to_string(),
            hint.to_string(),
        ),
        Some(version) => (
            format!("schema version {version}"),
            format!("use the newer version of proxytune that made this store, or {hint}"),
        ),
    };
    Error::Store {
        what: format!(
            "{} has {found}; this program reads versions up to {ours}",
            path.display()
        ),
        hint: Some(hint),
    }
}

/// Lance's message on one line, without the place in Lance's own source that it ends with.
fn plain(cause: &lance::Error) -> String {
    first_line(&cause.to_string()).to_string()
}

/// The first line of `text`, without the place in a library's own source that it may end with.
pub(in crate::store) fn first_line(text: &str) -> &str {
    let line = text.lines().next().unwrap_or_default();
    let end = [", /", ", rust/", ", location: "]
        .iter()
        .filter_map(|mark| line.find(mark))
        .min();
    &line[..end.unwrap_or(line.len())]
}

fn hint(cause: &lance::Error) -> Option<String> {
    match cause {
        lance::Error::InvalidInput { .. } => None,
        lance::Error::NotFound { .. } => Some(
            "another process may have compacted the table meanwhile: run the same command again"
                .into(),
        ),
        lance::Error::CorruptFile { .. } => Some(
            "the table is damaged: restore it, or delete its directory and let it be made again"
                .into(),
        ),
        _ => None,
    }
}

/// The kinds that the hints of [`Error::Io`] know, wherever in the chain of causes they stand.
fn io_kind(cause: &(dyn Cause + 'static)) -> Option<io::ErrorKind> {
    let mut next = Some(cause);
    while let Some(cause) = next {
        if let Some(io) = cause.downcast_ref::<io::Error>()
            && let Some(kind) = known(io.kind())
        {
            return Some(kind);
        }
        next = cause.source();
    }
    // Some layers keep the text alone of what they met.
    let text = cause.to_string();
    let marks = [
        (io::ErrorKind::StorageFull, "os error 28"),
        (io::ErrorKind::QuotaExceeded, "os error 122"),
        (io::ErrorKind::PermissionDenied, "os error 13"),
        (io::ErrorKind::PermissionDenied, "os error 1)"),
        (io::ErrorKind::ReadOnlyFilesystem, "os error 30"),
    ];
    let found = marks.iter().find(|(_, mark)| text.contains(mark))?;
    known(found.0)
}

fn known(kind: io::ErrorKind) -> Option<io::ErrorKind> {
    use io::ErrorKind::{PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    match kind {
        StorageFull | QuotaExceeded => Some(StorageFull),
        PermissionDenied | ReadOnlyFilesystem => Some(kind),
        _ => None,
    }
}
