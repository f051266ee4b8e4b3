//! Texts and JSON that programs wrote.

use std::path::Path;

use super::{SETTINGS, read};
use crate::{Error, Result};

/// The text of the regular file at `path`, of at most `most` bytes.
///
/// # Errors
/// Those of [`read`]; a file that is not UTF-8.
pub fn read_text(path: &Path, most: u64) -> Result<String> {
    let bytes = read(path, most).map_err(Error::io(path))?;
    String::from_utf8(bytes).map_err(|_| {
        let source = std::io::Error::new(
            std::io::ErrorKind::InvalidData,
            "the file is no text: it is not UTF-8",
        );
        Error::io(path)(source)
    })
}

/// The same, or `None` where there is no such file.
///
/// # Errors
/// Those of [`read_text`].
pub fn read_text_if_there(path: &Path, most: u64) -> Result<Option<String>> {
    match read_text(path, most) {
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        read => read.map(Some),
    }
}

/// Reads a JSON file of at most [`SETTINGS`] bytes. `Infinity`, `-Infinity` and `NaN`, which Python writes though JSON has
/// no such numbers, are read as null.
///
/// # Errors
/// Those of [`read_text`]; when it is no JSON of a `T`.
pub fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let text = without_numbers_of_python(read_text(path, SETTINGS)?);
    serde_json::from_str(&text).map_err(|e| Error::Checkpoint {
        path: path.to_path_buf(),
        faults: vec![e.to_string()],
    })
}

fn without_numbers_of_python(text: String) -> String {
    const NUMBERS: [&str; 3] = ["-Infinity", "Infinity", "NaN"];
    if !NUMBERS.iter().any(|number| text.contains(number)) {
        return text;
    }
    let (mut kept, mut rest) = (String::with_capacity(text.len()), text.as_str());
    let (mut quoted, mut escaped) = (false, false);
    while let Some(c) = rest.chars().next() {
        if !quoted && let Some(number) = NUMBERS.iter().find(|number| rest.starts_with(**number)) {
            kept.push_str("null");
            rest = &rest[number.len()..];
            continue;
        }
        (quoted, escaped) = match (c, escaped) {
            ('"', false) => (!quoted, false),
            ('\\', false) => (quoted, true),
            _ => (quoted, false),
        };
        kept.push(c);
        rest = &rest[c.len_utf8()..];
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_as_python_writes_it_is_read() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("config.json");
        std::fs::write(
            &path,
            r#"{"a": -Infinity, "b": [NaN, Infinity], "c": "NaN \"Infinity\"", "d": 1}"#,
        )
        .unwrap();
        let read: serde_json::Value = read_json(&path).unwrap();
        let expected = serde_json::json!({
            "a": null, "b": [null, null], "c": "NaN \"Infinity\"", "d": 1,
        });
        assert_eq!(read, expected);
    }
}
