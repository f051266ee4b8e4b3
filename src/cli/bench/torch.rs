//! Torch's side of a measurement: a Python program that does what it is sent a line for, and answers with a number.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use crate::{Error, Result};

/// The running program; it ends with this value.
pub(super) struct Torch {
    process: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    program: PathBuf,
}

impl Torch {
    /// Starts `program` with `python`, and these variables in its environment.
    ///
    /// # Errors
    /// When there is no such Python.
    pub fn start(
        python: &Path,
        program: &Path,
        args: impl IntoIterator<Item = OsString>,
        variables: &[(&str, &str)],
    ) -> Result<Self> {
        let mut process = Command::new(python)
            .arg(program)
            .args(args)
            .envs(variables.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(Error::io(python))?;
        match (process.stdin.take(), process.stdout.take()) {
            (Some(to), Some(from)) => Ok(Self {
                process,
                to,
                from: BufReader::new(from),
                program: program.to_path_buf(),
            }),
            _ => Err(silent(program, "start")),
        }
    }

    /// Sends `line` and reads the number that comes back.
    ///
    /// # Errors
    /// When the program has ended or answers with something else.
    pub fn ask(&mut self, line: &str) -> Result<f64> {
        let silent = |_| silent(&self.program, line);
        writeln!(self.to, "{line}").map_err(silent)?;
        let mut answer = String::new();
        self.from.read_line(&mut answer).map_err(silent)?;
        answer
            .trim()
            .parse()
            .map_err(|_| self::silent(&self.program, line))
    }
}

impl Drop for Torch {
    fn drop(&mut self) {
        // It may have ended already; then there is nothing to end.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

fn silent(program: &Path, line: &str) -> Error {
    Error::invalid(
        format!("{} did not answer {line:?}", program.display()),
        "what it says stands above; start in the repository, with a Python that has torch, diffusers and peft (and \
         for bench step LlamaGen's source)",
    )
}

/// The middle of `values`, or between the two in the middle; NaN of none.
pub(super) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n => (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0,
    }
}

/// How many threads `asked` means; 0 is all cores.
pub(super) fn threads(asked: usize) -> usize {
    match asked {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    }
}
