//! What a person is told: standard output and standard error. Nothing here panics when nobody listens, and what a
//! terminal would take for a command is shown instead: names of files, captions and prompts come from anywhere.

use std::borrow::Cow;
use std::fmt::Display;
use std::io::{self, Write};
use std::path::Path;

use crate::{Error, Result};

/// Whether a terminal may obey `c` instead of showing it: control characters, and those that turn the direction of
/// the text around them.
fn is_command(c: char) -> bool {
    c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn escape(text: &str, wanted: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.contains(&wanted) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match wanted(c) {
            true => shown.extend(c.escape_default()),
            false => shown.push(c),
        }
    }
    Cow::Owned(shown)
}

/// `text` as part of one line: line breaks and everything else that a terminal would obey become `\n`, `\u{1b}` and
/// so on.
pub fn escaped(text: &str) -> Cow<'_, str> {
    escape(text, is_command)
}

/// `path` as part of one line.
pub fn shown(path: &Path) -> String {
    escaped(&path.to_string_lossy()).into_owned()
}

/// `text` with its own lines and columns, but nothing else that a terminal would obey.
pub fn harmless(text: &str) -> Cow<'_, str> {
    escape(text, |c| is_command(c) && c != '\n' && c != '\t')
}

/// Standard output. What is written is [`harmless`]; once whoever reads has gone, what follows is dropped, so that work
/// goes on to its end.
#[derive(Debug, Default)]
pub struct Output;

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        let written = io::stdout().write_all(harmless(&text).as_bytes());
        unless_closed(written).map(|()| bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        unless_closed(io::stdout().flush())
    }
}

/// That nobody reads any more is no fault.
fn unless_closed(written: io::Result<()>) -> io::Result<()> {
    match written {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

/// Standard error: [`harmless`], and what cannot be written is dropped, as there is nobody to tell.
#[derive(Debug, Default)]
pub struct Notes;

impl Write for Notes {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        let _ = io::stderr().write_all(harmless(&text).as_bytes());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let _ = io::stderr().flush();
        Ok(())
    }
}

/// A line on standard error.
pub fn note(line: impl Display) {
    // `Notes` never fails. One write for the line, so that those of several threads do not mix.
    let _ = Notes.write_all(format!("{line}\n").as_bytes());
}

/// A line on standard output.
///
/// # Errors
/// When it cannot be written although somebody reads: a full disk.
pub fn print(line: impl Display) -> Result<()> {
    Output
        .write_all(format!("{line}\n").as_bytes())
        .map_err(output_failed)
}

/// What a write to standard output may fail with.
pub fn output_failed(source: io::Error) -> Error {
    Error::Io {
        path: "standard output".into(),
        source,
    }
}

/// A writer that keeps what it failed with, for those who write through a library that keeps the words alone.
#[derive(Debug)]
pub struct Watched<W> {
    inner: W,
    /// The first failure.
    pub failure: Option<io::Error>,
}

impl<W: Write> Watched<W> {
    pub fn new(inner: W) -> Self {
        Self {
            inner,
            failure: None,
        }
    }

    fn keep<T>(&mut self, done: io::Result<T>) -> io::Result<T> {
        done.map_err(|e| {
            let kind = e.kind();
            self.failure.get_or_insert(e);
            kind.into()
        })
    }
}

impl<W: Write> Write for Watched<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let done = self.inner.write(bytes);
        self.keep(done)
    }

    fn flush(&mut self) -> io::Result<()> {
        let done = self.inner.flush();
        self.keep(done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_shown_and_all_else_stays() {
        let name = "a\u{1b}]0;owned\u{7}\r\nb\u{9b}31m\u{202e}c\tü猫";
        let line = escaped(name);
        assert_eq!(
            line,
            "a\\u{1b}]0;owned\\u{7}\\r\\nb\\u{9b}31m\\u{202e}c\\tü猫"
        );
        assert_eq!(
            harmless("two\nlines\tand\u{1b}[2J"),
            "two\nlines\tand\\u{1b}[2J"
        );
        assert!(matches!(
            escaped("a photo of Ærøskøbing 猫 🐶"),
            Cow::Borrowed(_)
        ));
        assert_eq!(shown(Path::new("photos/a\nb.png")), "photos/a\\nb.png");
    }

    #[test]
    fn the_first_failure_of_a_writer_is_kept() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::Error::from(io::ErrorKind::StorageFull))
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut full = Watched::new(Full);
        assert!(full.write_all(b"text").is_err());
        let kind = full.failure.map(|e| e.kind());
        assert_eq!(kind, Some(io::ErrorKind::StorageFull));
    }
}
