//! A run's own directory: what was asked for, its results, and the lock that keeps two processes apart.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use crate::config::Document;
use crate::stages::report::RunSummary;
use crate::store::{Store, StoreRef};
use crate::{Error, Result, files};

pub(crate) const RESOLVED: &str = "resolved.toml";
const PIPELINE: &str = "pipeline.toml";
pub(crate) const COMPLETE: &str = "complete.json";
const STORE: &str = crate::store::identity::FILE;
/// What a run makes; one that has none of it got nowhere.
const MADE: [&str; 5] = [COMPLETE, "checkpoints", "supervisor", "student", "direct"];
/// Digits of the digest of the resolved file in a run's name.
const DIGITS: usize = 8;

/// The directory of one run, locked while this value lives.
pub struct RunDir {
    path: PathBuf,
    id: String,
    /// The name of the pipeline file, where it is known.
    stem: Option<String>,
    /// Whether the directory was there before, with the same resolved file.
    pub resumed: bool,
    /// For a new run of a pipeline that ran before: what its resolved file changed since, one line for each field.
    pub changes: Vec<String>,
    _lock: File,
}

impl RunDir {
    /// Opens the run of the pipeline file `pipeline`, whose text is `text` and whose resolved file is `resolved`,
    /// under `out`. The run's name is the file's stem and a digest of `resolved`, so that an unchanged resolved file
    /// resumes, also one that an older version of this program resolved, if it means the same today; with `new`, a run of
    /// that name that is there already is left alone and a number appended.
    ///
    /// # Errors
    /// When the directory cannot be written, or another process has it open.
    pub fn open(
        out: &Path,
        pipeline: &Path,
        text: &str,
        resolved: &str,
        new: bool,
    ) -> Result<Self> {
        let stem = pipeline
            .file_stem()
            .map_or("run".into(), |stem| stem.to_string_lossy().into_owned());
        let digest = blake3::hash(resolved.as_bytes()).to_hex();
        let mut base = format!("{stem}-{}", &digest[..DIGITS]);
        let taken = |id: &str| out.join(id).join(RESOLVED).exists();
        if !taken(&base)
            && let Some(older) = run_that_means(out, &stem, resolved)?
        {
            base = older;
        }
        let mut id = base.clone();
        let mut number = 1;
        if new {
            while taken(&id) {
                number += 1;
                id = format!("{base}-{number}");
            }
        } else {
            // The newest of the runs that `--new` made.
            while taken(&format!("{base}-{}", number + 1)) {
                number += 1;
                id = format!("{base}-{number}");
            }
        }
        let path = out.join(&id);
        let resumed = taken(&id);
        let changes = if resumed {
            Vec::new()
        } else {
            changes_since_last(out, &stem, resolved)?
        };
        files::create_dir(&path)?;
        let lock = lock(&path, || running(&path))?;
        if !resumed {
            files::write(&path.join(PIPELINE), text.as_bytes())?;
            files::write(&path.join(RESOLVED), resolved.as_bytes())?;
        }
        Ok(Self {
            path,
            id,
            stem: Some(stem),
            resumed,
            changes,
            _lock: lock,
        })
    }

    /// Opens the directory of a run that is there already.
    ///
    /// # Errors
    /// When it is not a run's, or another process has it open.
    pub fn existing(path: &Path) -> Result<Self> {
        if !path.join(RESOLVED).is_file() {
            return Err(Error::invalid(
                format!("{} is not the directory of a run", path.display()),
                "name a directory below datasets/runs, or wherever --out was",
            ));
        }
        // By its own name, not by that of a link to it.
        let path = std::fs::canonicalize(path).map_err(Error::io(path))?;
        let id = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let lock = lock(&path, || running(&path))?;
        Ok(Self {
            path,
            id,
            stem: None,
            resumed: true,
            changes: Vec::new(),
            _lock: lock,
        })
    }

    /// Lets the link beside the directory that is called after the pipeline file lead to this run, its newest, and returns
    /// it. `None` where something else has that name, or the disk has no links.
    #[cfg(unix)]
    pub fn link(&self) -> Option<PathBuf> {
        let link = self.path.with_file_name(self.stem.as_ref()?);
        match files::link(&link, Path::new(&self.id)) {
            Ok(()) => Some(link),
            Err(error) => {
                tracing::debug!("no link to the newest run: {error}");
                None
            }
        }
    }

    /// A link to the newest run of a pipeline file: none here, where links need rights of their own.
    #[cfg(not(unix))]
    pub fn link(&self) -> Option<PathBuf> {
        None
    }

    /// Where the run's store is: in `given`, or where it was when the run began.
    ///
    /// # Errors
    /// When `given` is another store, or the run's own is not there any more.
    pub fn store(&self, given: Option<&Path>) -> Result<PathBuf> {
        let owner = format!("the run {}", self.path.display());
        self.noted_store()?.find(&owner, &self.keeper()?, given)
    }

    /// Notes that `store` is the run's.
    ///
    /// # Errors
    /// When the directory cannot be written.
    pub fn note_store(&self, store: &Store) -> Result<()> {
        let reference = store.reference(&self.keeper()?);
        if reference == self.noted_store()? {
            return Ok(());
        }
        let text = serde_json::to_string_pretty(&reference).map_err(|e| Error::Invalid {
            what: format!("{STORE}: {e}"),
            hint: None,
        })?;
        files::write(&self.path.join(STORE), text.as_bytes())
    }

    /// What older versions did not note is not known.
    fn noted_store(&self) -> Result<StoreRef> {
        let path = self.path.join(STORE);
        match path.is_file() {
            true => files::read_json(&path).map_err(|error| {
                Error::invalid(
                    error.to_string(),
                    "remove it, and say with --store where the run's store is",
                )
            }),
            false => Ok(StoreRef::default()),
        }
    }

    /// The directory, absolute and without links, as paths from it are noted.
    fn keeper(&self) -> Result<PathBuf> {
        std::fs::canonicalize(&self.path).map_err(Error::io(&self.path))
    }

    /// The other runs of the same pipeline file beside this one, names and directories.
    ///
    /// # Errors
    /// When the directory around them cannot be listed.
    pub fn siblings(&self) -> Result<Vec<(String, PathBuf)>> {
        let (Some(around), Some(stem)) = (self.path.parent(), &self.stem) else {
            return Ok(Vec::new());
        };
        let mut runs = files::list(around)?;
        runs.retain(|(name, _)| is_run_of(stem, name) && *name != self.id);
        Ok(runs)
    }

    /// Whether the run has made anything that can be looked at or gone on from.
    pub fn has_shown(&self) -> bool {
        has_shown(&self.path)
    }

    /// The pipeline file as it was given, and the resolved one.
    pub fn texts(&self) -> Result<(String, String)> {
        let read = |name| {
            let path = self.path.join(name);
            crate::files::read_text(&path, crate::files::SETTINGS)
        };
        Ok((read(PIPELINE)?, read(RESOLVED)?))
    }

    /// The summary of a run that has ended well.
    pub fn summary_text(&self) -> Result<String> {
        summary_text_in(&self.path)?.ok_or_else(|| not_ended(&self.path))
    }

    /// The results of the run when it last ended well; `None` when it has not, or a version with another layout of the
    /// summary noted it.
    pub fn earlier_summary(&self) -> Option<RunSummary> {
        serde_json::from_str(&summary_text_in(&self.path).ok()??).ok()
    }

    /// The run's name: the directory's last part, and what rows of the store call it.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A place in the directory.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// Whether the run has ended well before.
    pub fn is_complete(&self) -> bool {
        self.path.join(COMPLETE).exists()
    }

    /// Notes that the run has ended well, with a summary.
    pub fn complete(&self, summary: &serde_json::Value) -> Result<()> {
        files::write(
            &self.path.join(COMPLETE),
            format!("{summary:#}\n").as_bytes(),
        )
    }
}

/// The summary of the run in `dir`, if it has ended well. It lists every sample: [`files::LISTS`] is room for half a
/// million.
fn summary_text_in(dir: &Path) -> Result<Option<String>> {
    files::read_text_if_there(&dir.join(COMPLETE), files::LISTS)
}

fn not_ended(dir: &Path) -> Error {
    Error::invalid(
        format!("{} has not run to its end", dir.display()),
        "run its pipeline again: it continues where it stopped",
    )
}

/// The results of the run in `dir`.
///
/// # Errors
/// When it has not run to its end, or the summary is another version's.
pub(crate) fn summary_in(dir: &Path) -> Result<RunSummary> {
    let summary = summary_text_in(dir)?.ok_or_else(|| not_ended(dir))?;
    serde_json::from_str(&summary).map_err(|e| Error::Checkpoint {
        path: dir.join(COMPLETE),
        faults: vec![e.to_string()],
    })
}

fn running(path: &Path) -> Error {
    Error::invalid(
        format!("{}: another process is running this", path.display()),
        "wait for it; `run --new` starts another, and `generate` wants another --shard for every process",
    )
}

/// How long to wait for a lock: a process that was killed may hold it for a moment more.
const PATIENCE: Duration = Duration::from_secs(3);

/// Locks the directory `path` for this process, and removes what killed ones left half-written in it. `busy` says that
/// another process has it.
pub(crate) fn lock(path: &Path, busy: impl FnOnce() -> Error) -> Result<File> {
    let name = path.join("lock");
    // Opening a pipe would wait for somebody at its other end, and a link leads elsewhere.
    if name.symlink_metadata().is_ok_and(|found| !found.is_file()) {
        return Err(Error::invalid(
            format!("{} is not a file", name.display()),
            "move it away",
        ));
    }
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&name)
        .map_err(Error::io(&name))?;
    let start = Instant::now();
    // The lock dies with the process, however that ends.
    loop {
        match file.try_lock() {
            Ok(()) => {
                files::remove_leftovers(path)?;
                return Ok(file);
            }
            Err(std::fs::TryLockError::WouldBlock) if start.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(std::fs::TryLockError::WouldBlock) => {
                return Err(busy());
            }
            Err(std::fs::TryLockError::Error(e)) => return Err(Error::io(&name)(e)),
        }
    }
}

/// Whether `name` is that of a run of the pipeline file `stem`: that, a digest, and a number for those made by `--new`.
fn is_run_of(stem: &str, name: &str) -> bool {
    let rest = name
        .strip_prefix(stem)
        .and_then(|rest| rest.strip_prefix('-'));
    let Some((digest, number)) = rest.and_then(|rest| rest.split_at_checked(DIGITS)) else {
        return false;
    };
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    digest.bytes().all(|b| b.is_ascii_hexdigit())
        && (number.is_empty() || number.strip_prefix('-').is_some_and(is_number))
}

/// Whether the run in `dir` has made anything.
fn has_shown(dir: &Path) -> bool {
    MADE.iter().any(|name| dir.join(name).exists())
}

/// The runs of the pipeline file `stem` under `out`: when their resolved files were written, their names and these
/// files, the newest first.
fn runs_of(out: &Path, stem: &str) -> Result<Vec<(SystemTime, String, PathBuf)>> {
    let entries = match std::fs::read_dir(out) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io(out)(e)),
    };
    let mut runs = Vec::new();
    for entry in entries {
        let path = entry.map_err(Error::io(out))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let file = path.join(RESOLVED);
        if is_run_of(stem, &name)
            && has_shown(&path)
            && let Ok(time) = file.metadata().and_then(|m| m.modified())
        {
            runs.push((time, name.into_owned(), file));
        }
    }
    runs.sort();
    runs.reverse();
    Ok(runs)
}

/// The name, without a number, of the newest run whose resolved file comes to `resolved` when it is read today: it lacks
/// fields that there were not when it was written.
fn run_that_means(out: &Path, stem: &str, resolved: &str) -> Result<Option<String>> {
    for (_, name, file) in runs_of(out, stem)? {
        let text = files::read_text(&file, files::SETTINGS)?;
        let read = Document::parse(&text, RESOLVED, &[], &crate::models::Registry).resolve();
        if read
            .and_then(|read| read.to_toml())
            .is_ok_and(|text| text == resolved)
        {
            let length = stem.len() + 1 + DIGITS;
            return Ok(name.get(..length).map(str::to_string));
        }
    }
    Ok(None)
}

/// The fields in which `resolved` differs from the newest run of the same pipeline file.
fn changes_since_last(out: &Path, stem: &str, resolved: &str) -> Result<Vec<String>> {
    let Some((_, _, file)) = runs_of(out, stem)?.into_iter().next() else {
        return Ok(Vec::new());
    };
    let before = fields(&crate::files::read_text(&file, crate::files::SETTINGS)?);
    let after = fields(resolved);
    let mut names: Vec<&String> = before.keys().chain(after.keys()).collect();
    names.sort();
    names.dedup();
    let show = |value: Option<&String>| value.cloned().unwrap_or_else(|| "(absent)".into());
    Ok(names
        .into_iter()
        .filter(|name| before.get(*name) != after.get(*name))
        .map(|name| {
            format!(
                "{name}: {} -> {}",
                show(before.get(name)),
                show(after.get(name))
            )
        })
        .collect())
}

/// Every value of a TOML text by its dotted path.
fn fields(text: &str) -> BTreeMap<String, String> {
    fn walk(prefix: &str, value: &toml::Value, found: &mut BTreeMap<String, String>) {
        match value {
            toml::Value::Table(table) => {
                for (key, value) in table {
                    let path = if prefix.is_empty() {
                        key.clone()
                    } else {
                        format!("{prefix}.{key}")
                    };
                    walk(&path, value, found);
                }
            }
            other => {
                found.insert(prefix.to_string(), other.to_string());
            }
        }
    }
    let mut found = BTreeMap::new();
    if let Ok(table) = text.parse::<toml::Table>() {
        walk("", &toml::Value::Table(table), &mut found);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unchanged_file_resumes_and_a_changed_one_says_what_changed() {
        let out = tempfile::tempdir().unwrap();
        let open = |resolved: &str, new| {
            RunDir::open(out.path(), Path::new("a/dog.toml"), "", resolved, new)
        };
        let first = open("seed = 1\n[student]\nsteps = 2\n", false).unwrap();
        assert!(!first.resumed && first.changes.is_empty());
        let (path, id) = (first.path().to_path_buf(), first.id().to_string());
        let failed_at_once = open("seed = 1\n[student]\nsteps = 4\n", false).unwrap();
        assert!(failed_at_once.changes.is_empty() && !failed_at_once.has_shown());
        drop(failed_at_once);
        std::fs::create_dir(path.join("checkpoints")).unwrap();
        assert!(
            open("seed = 1\n[student]\nsteps = 2\n", false).is_err(),
            "it is locked"
        );
        drop(first);
        let again = open("seed = 1\n[student]\nsteps = 2\n", false).unwrap();
        assert!(again.resumed && again.path() == path);
        let changed = open("seed = 1\n[student]\nsteps = 3\n", false).unwrap();
        assert_eq!(changed.changes, ["student.steps: 2 -> 3"]);
        // Runs of files whose names only begin alike are those of other files.
        for (stem, run) in [
            ("dog", "dog-old-01234567"),
            ("dog", "dog-0123456"),
            ("dog", "dog-01234567-x"),
        ] {
            assert!(!is_run_of(stem, run), "{run}");
        }
        assert!(is_run_of("dog", "dog-01234567") && is_run_of("dog-old", "dog-old-01234567-12"));
        let afresh = open("seed = 1\n[student]\nsteps = 2\n", true).unwrap();
        assert!(!afresh.resumed && afresh.id() == format!("{id}-2"));
        drop(afresh);
        assert_eq!(
            open("seed = 1\n[student]\nsteps = 2\n", false)
                .unwrap()
                .id(),
            format!("{id}-2")
        );
    }

    #[test]
    fn a_run_that_was_resolved_before_there_was_some_field_resumes() {
        let out = tempfile::tempdir().unwrap();
        let text = concat!(
            "[subject.dog]\nimages = \"photos\"\nclass = \"dog\"\n",
            "[student]\nmodel = \"nano-llamagen\"\nsource = \"references\"\n"
        );
        let resolved = |overrides: &[String]| {
            let document = Document::parse(text, "dog.toml", overrides, &crate::models::Registry);
            document.resolve().unwrap().to_toml().unwrap()
        };
        let today = resolved(&[]);
        let field = "gradient_accumulation_steps = 1\n";
        let before = today.replace(field, "");
        assert_ne!(before, today);
        let open = |resolved: &str| {
            RunDir::open(out.path(), Path::new("dog.toml"), text, resolved, false).unwrap()
        };
        let id = open(&before).id().to_string();
        std::fs::create_dir(out.path().join(&id).join(MADE[1])).unwrap();
        let again = open(&today);
        assert!(again.resumed && again.id() == id, "{}", again.id());
        let other = open(&resolved(&[
            "student.gradient_accumulation_steps=2".to_string()
        ]));
        assert!(!other.resumed);
    }

    #[cfg(unix)]
    #[test]
    fn a_link_called_after_the_file_leads_to_its_newest_run_and_replaces_nothing_else() {
        let out = tempfile::tempdir().unwrap();
        let open = |resolved: &str| {
            RunDir::open(out.path(), Path::new("dog.toml"), "", resolved, false).unwrap()
        };
        let link = out.path().join("dog");
        for resolved in ["seed = 1\n", "seed = 2\n", "seed = 1\n"] {
            let run = open(resolved);
            assert_eq!(run.link(), Some(link.clone()));
            let file = std::fs::read_to_string(link.join(RESOLVED)).unwrap();
            assert_eq!(file, resolved);
            let id = run.id().to_string();
            drop(run);
            assert_eq!(RunDir::existing(&link).unwrap().id(), id);
        }
        std::fs::remove_file(&link).unwrap();
        std::fs::create_dir(&link).unwrap();
        assert_eq!(open("seed = 2\n").link(), None);
        assert!(link.is_dir() && !link.is_symlink());
    }
}
