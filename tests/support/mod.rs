//! What the tests of whole runs share: the smoke pipeline, ways to run it, and what a run leaves behind.

pub mod filled;
pub mod golden;
pub mod hub;
pub mod memory;
pub mod torch;

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use proxytune::config::Document;
use proxytune::pipeline::{Options, Outcome, run};
use proxytune::store::{ProxyRow, Store, Table};
use proxytune::stream::Stop;
use tempfile::TempDir;

/// The smoke pipeline, from the repository's root, where tests and the program run.
pub const SMOKE: &str = "pipelines/nano-smoke.toml";
/// Proxies that it plans.
pub const PROXIES: usize = 12;

/// Tokens of an image, of all sizes that the nano students have.
const TOKENS: [usize; 2] = [64, 16];

/// Copies what lies in the folder `from`, at any depth, to the folder `to`; links stay links.
pub fn copy_tree(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => copy_tree(&from, &to),
            #[cfg(unix)]
            kind if kind.is_symlink() => {
                std::os::unix::fs::symlink(std::fs::read_link(&from).unwrap(), to).unwrap();
            }
            _ => drop(std::fs::copy(&from, &to).unwrap()),
        }
    }
}

/// A store and a place for run directories that vanish with this value.
pub struct Place {
    dir: TempDir,
}

impl Place {
    pub fn new() -> Self {
        Place {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn store(&self) -> PathBuf {
        self.path().join("store")
    }

    pub fn out(&self) -> PathBuf {
        self.path().join("runs")
    }

    /// The directories of its runs, sorted.
    pub fn runs(&self) -> Vec<PathBuf> {
        let Ok(entries) = std::fs::read_dir(self.out()) else {
            return Vec::new();
        };
        let mut runs: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        // The link to the newest is none of its own.
        runs.retain(|run| !run.is_symlink());
        runs.sort();
        runs
    }

    /// The directory of its only run.
    pub fn only_run(&self) -> PathBuf {
        let runs = self.runs();
        assert_eq!(runs.len(), 1, "{runs:?}");
        runs[0].clone()
    }

    /// Runs the smoke pipeline from code, with `overrides` as `--set` takes them.
    pub async fn run(&self, overrides: &[&str], sequential: bool) -> proxytune::Result<Outcome> {
        let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
        let text = std::fs::read_to_string(SMOKE).unwrap();
        let options = Options {
            pipeline: SMOKE.into(),
            resolved: Document::parse(&text, SMOKE, &overrides, &proxytune::models::Registry)
                .resolve()?,
            text,
            store: Some(self.store()),
            out: self.out(),
            new: false,
            sequential,
            progress: false,
        };
        run(&options, Stop::default()).await
    }

    /// The command that runs the smoke pipeline here.
    pub fn command(&self, overrides: &[&str]) -> Command {
        let mut command = program();
        command.args(["run", SMOKE, "--store"]).arg(self.store());
        command.arg("--out").arg(self.out());
        for text in overrides {
            command.args(["--set", text]);
        }
        command
    }

    pub async fn proxies(&self) -> Table<ProxyRow> {
        Store::open(self.store())
            .await
            .unwrap()
            .proxies()
            .await
            .unwrap()
    }

    /// What does not depend on when and how the work was done.
    pub async fn remains(&self) -> Remains {
        let mut adapters = BTreeMap::new();
        collect(&self.only_run(), Path::new(""), &mut adapters);
        collect(
            &self.store().join("adapters"),
            Path::new("store"),
            &mut adapters,
        );
        // Which checkpoints stay depends on where a run was stopped. Beside a published adapter there may be what a
        // killed process was writing aside.
        adapters.retain(|path, _| {
            path.ends_with(".safetensors")
                && !path.starts_with("checkpoints/")
                && !path.contains(".tmp/")
        });
        let tables = tables(&self.store()).await;
        let summary = std::fs::read_to_string(self.only_run().join("complete.json")).unwrap();
        let summary: serde_json::Value = serde_json::from_str(&summary).unwrap();
        Remains {
            adapters,
            tables,
            evaluated: summary["evaluated"].clone(),
        }
    }
}

/// The digests of the tables of a store by their names, without that of the runs: how often a run was started and
/// stopped is not part of what it came to.
pub async fn tables(store: &Path) -> BTreeMap<String, String> {
    let store = Store::open(store).await.unwrap();
    let (clip, dino) = (
        number("clip/config.json", "projection_dim"),
        number("dino/config.json", "hidden_size"),
    );
    let mut tables = BTreeMap::new();
    for name in store.table_names().await.unwrap() {
        let digest = match name.split_once('_') {
            Some(("tokens", digest)) => {
                let mut table = store.tokens(digest, TOKENS[0]).await;
                for tokens in &TOKENS[1..] {
                    if table.is_err() {
                        table = store.tokens(digest, *tokens).await;
                    }
                }
                table.unwrap().digest().await
            }
            Some(("evaluations", digest)) => {
                let table = store.evaluations(digest, clip, dino).await.unwrap();
                table.digest().await
            }
            _ if name == "subjects" => store.subjects().await.unwrap().digest().await,
            _ if name == "proxies" => store.proxies().await.unwrap().digest().await,
            _ if name == "metrics" => store.metrics().await.unwrap().digest().await,
            _ => continue,
        };
        tables.insert(name, digest.unwrap());
    }
    tables
}

/// What a run leaves: trained weights by their paths, the digests of the tables by their names, and what the report
/// was made of.
#[derive(Debug, PartialEq)]
pub struct Remains {
    pub adapters: BTreeMap<String, Vec<u8>>,
    pub tables: BTreeMap<String, String>,
    pub evaluated: serde_json::Value,
}

impl Remains {
    /// Fails with the names of what differs, not with its bytes.
    pub fn assert_equal(&self, other: &Remains, what: &str) {
        let names = |remains: &Remains| remains.adapters.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(self), names(other), "{what}: files");
        for (name, bytes) in &self.adapters {
            assert!(bytes == &other.adapters[name], "{what}: {name} differs");
        }
        assert_eq!(self.tables, other.tables, "{what}: tables");
        assert_eq!(self.evaluated, other.evaluated, "{what}: evaluations");
    }
}

/// The contents of all files below `dir`, by their paths, which begin with `prefix`.
fn collect(dir: &Path, prefix: &Path, found: &mut BTreeMap<String, Vec<u8>>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let name = prefix.join(entry.file_name());
        if entry.path().is_dir() {
            collect(&entry.path(), &name, found);
        } else {
            let bytes = std::fs::read(entry.path()).unwrap();
            found.insert(name.display().to_string(), bytes);
        }
    }
}

/// All files and folders below `dir`, but not behind links, whose names satisfy `wanted`.
pub fn find(dir: &Path, wanted: &impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let mut found = Vec::new();
    // Folders may vanish while a run that is being watched renames them.
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if wanted(&entry.file_name().to_string_lossy()) {
            found.push(path.clone());
        }
        if path.is_dir() && !path.is_symlink() {
            found.extend(find(&path, wanted));
        }
    }
    found.sort();
    found
}

/// A number from a nano checkpoint's configuration.
fn number(file: &str, field: &str) -> usize {
    let path = Path::new("datasets/nano/checkpoints").join(file);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    json[field].as_u64().unwrap() as usize
}

/// The program, in the repository's root.
pub fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_proxytune"));
    command
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env_remove("RUST_LOG")
        .stdin(Stdio::null());
    command
}

/// How a command ended, and what it said.
#[derive(Debug)]
pub struct Said {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Said {
    /// Asserts the exit code and that standard error contains all of `parts`.
    pub fn says(&self, code: i32, parts: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:?}");
        for part in parts {
            assert!(
                self.err.contains(part),
                "{part:?} is not in:\n{}\nstandard output:\n{}",
                self.err,
                self.out
            );
        }
    }
}

/// Runs `command` to its end.
pub fn say(mut command: Command) -> Said {
    let output = command.output().unwrap();
    Said {
        code: output.status.code(),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

/// A command that is running; it is killed when this value is dropped.
pub struct Running {
    child: Child,
    end: Receiver<String>,
    said: Option<String>,
    /// When it was started.
    pub started: Instant,
}

impl Running {
    pub fn start(mut command: Command) -> Self {
        let started = Instant::now();
        let mut child = command
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut pipe = child.stderr.take().unwrap();
        let (sender, end) = channel();
        // Standard error closes when the process ends: waiting for that needs no polling.
        std::thread::spawn(move || {
            let mut said = String::new();
            let _ = pipe.read_to_string(&mut said);
            let _ = sender.send(said);
        });
        Running {
            child,
            end,
            said: None,
            started,
        }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the process ends, at most for `time`; whether it has ended.
    pub fn ends_within(&mut self, time: Duration) -> bool {
        if self.said.is_none() {
            match self.end.recv_timeout(time) {
                Ok(said) => self.said = Some(said),
                Err(RecvTimeoutError::Timeout) => return false,
                Err(RecvTimeoutError::Disconnected) => panic!("the reader of standard error ended"),
            }
        }
        true
    }

    /// Waits until `happened` or the process ends; whether it happened.
    pub fn runs_until(&mut self, happened: impl Fn() -> bool) -> bool {
        while !happened() {
            if self.ends_within(Duration::from_millis(1)) {
                return happened();
            }
        }
        true
    }

    /// Asks it to stop, as Ctrl-C does.
    #[cfg(unix)]
    pub fn interrupt(&self) {
        // SAFETY: a signal to a child that has not been waited for, so its number is still its own.
        assert_eq!(unsafe { libc::kill(self.id() as i32, libc::SIGINT) }, 0);
    }

    /// Kills it as a power cut would, and waits until it is gone.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for its end: how it ended and what it said on standard error.
    pub fn wait(mut self) -> (ExitStatus, String) {
        let status = self.child.wait().unwrap();
        let said = self.said.take().or_else(|| self.end.recv().ok());
        (status, said.unwrap_or_default())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
