//! Which store is whose. Every store has an id of its own, and who works with one notes id and place: another one is
//! then noticed, and the same one is found where it was moved to.

use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Locks;
use crate::{Error, Result, files};

/// Where the command line looks for a store when neither it nor a record names one.
pub const DEFAULT: &str = "datasets/store";
/// The file in a store that says which one it is, and the one in a run's directory that says whose that is.
pub const FILE: &str = "store.json";
/// Bytes of an id: nobody guesses one, and no two are equal.
const BYTES: usize = 16;

/// What stands in a store's own [`FILE`].
#[derive(Serialize, Deserialize)]
struct Identity {
    id: String,
}

/// The id of the store in `path`; `None` where there is no store, or an older version made it.
///
/// # Errors
/// When the file that has it cannot be read.
pub fn id_of(path: &Path) -> Result<Option<String>> {
    let file = path.join(FILE);
    if !file.is_file() {
        return Ok(None);
    }
    let refused = |what: String| Error::Store {
        what,
        hint: Some("restore the file; without it the store gets another id".into()),
    };
    let Identity { id } = files::read_json(&file).map_err(|e| refused(e.to_string()))?;
    match is_id(&id) {
        true => Ok(Some(id)),
        false => Err(refused(format!(
            "{}: {id:?} is no id of a store",
            file.display()
        ))),
    }
}

fn is_id(text: &str) -> bool {
    text.len() == 2 * BYTES && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Whether there is a store in `path`: it has an id or a table.
pub fn is_store(path: &Path) -> bool {
    path.join(FILE).is_file()
        || files::list(path)
            .unwrap_or_default()
            .iter()
            .any(|(name, _)| name.ends_with(".lance"))
}

/// That there is no store in `path`.
pub(crate) fn no_store(path: &Path) -> Error {
    Error::invalid(
        format!("there is no store in {}", path.display()),
        "name the store's directory with --store; a store comes into being with the first run",
    )
}

/// Gives the store in `path` an id, unless it has one, and returns it; an empty one where nothing can be written.
pub(super) async fn identify(path: &Path, locks: &Locks) -> Result<String> {
    match written(path, locks).await {
        Err(Error::Io { source, .. })
            if matches!(
                source.kind(),
                ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem
            ) =>
        {
            Ok(String::new())
        }
        written => written,
    }
}

async fn written(path: &Path, locks: &Locks) -> Result<String> {
    let _turn = locks.turn("identity").await?;
    if let Some(id) = id_of(path)? {
        return Ok(id);
    }
    let bytes: [u8; BYTES] = rand::random();
    let id: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let text = serde_json::json!({ "id": id });
    files::write(&path.join(FILE), format!("{text:#}\n").as_bytes())?;
    Ok(id)
}

/// Whose store it is: kept by a run, and by a watch.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Written")]
pub struct StoreRef {
    /// Empty where the store has none.
    pub id: String,
    /// Where it was, absolute; empty when no store is known yet.
    pub path: PathBuf,
    /// The same, from the folder that keeps this: both may be moved together.
    pub relative: PathBuf,
}

/// How it may have been written: older versions kept the path alone.
#[derive(Deserialize)]
#[serde(untagged)]
enum Written {
    Path(PathBuf),
    Whole {
        id: String,
        path: PathBuf,
        relative: PathBuf,
    },
}

impl From<Written> for StoreRef {
    fn from(written: Written) -> Self {
        match written {
            Written::Path(path) => Self {
                path,
                ..Self::default()
            },
            Written::Whole { id, path, relative } => Self { id, path, relative },
        }
    }
}

impl StoreRef {
    /// The store `id` in `path`, as a file in the folder `keeper` notes it; both absolute.
    pub fn new(id: &str, path: &Path, keeper: &Path) -> Self {
        Self {
            id: id.to_string(),
            path: path.to_path_buf(),
            relative: relative(keeper, path),
        }
    }

    /// Whether a store is noted at all.
    pub fn is_known(&self) -> bool {
        !self.path.as_os_str().is_empty()
    }

    /// Whether the store in `path` is this one.
    fn is(&self, path: &Path) -> Result<bool> {
        Ok(match self.id.as_str() {
            "" => is_store(path),
            id => id_of(path)?.as_deref() == Some(id),
        })
    }

    /// Where the store of `owner`, who keeps this in the folder `keeper`, is today: in `given`, or else where it was.
    /// Without any store noted, `given` or the usual place.
    ///
    /// # Errors
    /// When `given` is another store, or the store is not where it was.
    pub fn find(&self, owner: &str, keeper: &Path, given: Option<&Path>) -> Result<PathBuf> {
        let given = given.map(|given| std::path::absolute(given).map_err(Error::io(given)));
        let given = given.transpose()?;
        if !self.is_known() {
            return Ok(given.unwrap_or_else(|| DEFAULT.into()));
        }
        let mut noted = Vec::new();
        if !self.relative.as_os_str().is_empty() {
            noted.push(tidy(&keeper.join(&self.relative)));
        }
        noted.push(self.path.clone());
        let mut found = None;
        for place in &noted {
            if found.is_none() && self.is(place)? {
                found = Some(place.clone());
            }
        }
        let was = self.path.display();
        match (given, found) {
            (None, Some(found)) => Ok(found),
            (None, None) => Err(Error::invalid(
                format!("the store of {owner} is not in {was} any more"),
                "say where it is now with --store; `run --new` begins another run in another store",
            )),
            (Some(given), Some(found)) if same(&given, &found) => Ok(found),
            // Moved or copied since: it is the same store.
            (Some(given), _) if !self.id.is_empty() && self.is(&given)? => Ok(given),
            (Some(given), None) if self.id.is_empty() => Ok(given),
            (Some(given), found) => {
                let place = found.map_or(self.path.clone(), |found| found);
                Err(Error::invalid(
                    format!(
                        "the store of {owner} is {}, not {}",
                        place.display(),
                        given.display()
                    ),
                    format!(
                        "leave --store out, or name {} with it; `run --new` begins another run in another store",
                        place.display()
                    ),
                ))
            }
        }
    }
}

/// Whether both are one folder.
fn same(a: &Path, b: &Path) -> bool {
    match (std::fs::canonicalize(a), std::fs::canonicalize(b)) {
        (Ok(a), Ok(b)) => a == b,
        _ => a == b,
    }
}

/// How to get from the folder `from` to `to`; `to` itself where the two have no root in common.
fn relative(from: &Path, to: &Path) -> PathBuf {
    let (from, to): (Vec<Component>, Vec<Component>) =
        (from.components().collect(), to.components().collect());
    let common = from.iter().zip(&to).take_while(|(a, b)| a == b).count();
    if common == 0 {
        return to.iter().collect();
    }
    let up = from[common..].iter().map(|_| Component::ParentDir);
    up.chain(to[common..].iter().copied()).collect()
}

/// `path` without `..`, as text alone has it.
fn tidy(path: &Path) -> PathBuf {
    let mut tidied = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => drop(tidied.pop()),
            part => tidied.push(part),
        }
    }
    tidied
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(path: &Path, id: &str) {
        let text = format!("{{\"id\": \"{}\"}}", id.repeat(2 * BYTES));
        files::write(&path.join(FILE), text.as_bytes()).unwrap();
    }

    #[test]
    fn a_store_is_found_where_it_was_and_where_it_was_moved_with_its_keeper() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        store(&at("a/store"), "1");
        let keeper = at("a/runs/dog");
        std::fs::create_dir_all(&keeper).unwrap();
        let noted = StoreRef::new(&"1".repeat(32), &at("a/store"), &keeper);
        assert_eq!(noted.relative, Path::new("../../store"));
        let find = |keeper: &Path, given: Option<&Path>| noted.find("the run", keeper, given);
        assert_eq!(find(&keeper, None).unwrap(), at("a/store"));
        assert_eq!(find(&keeper, Some(&at("a/store"))).unwrap(), at("a/store"));
        // The run alone was moved, then the store with it.
        assert_eq!(find(&at("elsewhere/dog"), None).unwrap(), at("a/store"));
        std::fs::rename(at("a"), at("b")).unwrap();
        assert_eq!(find(&at("b/runs/dog"), None).unwrap(), at("b/store"));
        // The store alone was moved: it must be said where, and is known there.
        std::fs::rename(at("b/store"), at("moved")).unwrap();
        let lost = find(&at("b/runs/dog"), None).unwrap_err();
        assert!(lost.to_string().contains("not in"), "{lost}");
        assert_eq!(
            find(&at("b/runs/dog"), Some(&at("moved"))).unwrap(),
            at("moved")
        );
    }

    #[test]
    fn another_store_is_refused_and_both_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let (own, other) = (dir.path().join("own"), dir.path().join("other"));
        store(&own, "1");
        store(&other, "2");
        let noted = StoreRef::new(&"1".repeat(32), &own, dir.path());
        for given in [&other, &dir.path().join("nothing")] {
            let refused = noted.find("the run", dir.path(), Some(given)).unwrap_err();
            let text = refused.to_string();
            for place in [&own, given] {
                assert!(text.contains(&place.display().to_string()), "{text}");
            }
        }
        // Another store in the place of the one that was noted is another one, too.
        store(&own, "3");
        assert!(noted.find("the run", dir.path(), None).is_err());
    }

    #[test]
    fn what_an_older_version_noted_is_read() {
        let noted: StoreRef = serde_json::from_str("\"/a/store\"").unwrap();
        assert_eq!(
            (noted.id.as_str(), noted.path.as_path()),
            ("", Path::new("/a/store"))
        );
        let text = serde_json::to_string(&StoreRef::new("5", Path::new("/a"), Path::new("/b")));
        let back: StoreRef = serde_json::from_str(&text.unwrap()).unwrap();
        assert_eq!(back.relative, Path::new("../a"));
        assert!(!StoreRef::default().is_known());
    }
}
