//! Texts that people wrote: pipelines, lists of prompts, captions. They come from every editor there is.

use std::path::Path;

use crate::{Error, Result};

/// The text in the file `path`, UTF-8 of at most `most` bytes: without a byte-order mark, each line ended by `\n` alone.
///
/// # Errors
/// [`Error::Io`] when the file cannot be read; otherwise its name and why it is no such text: something else than a
/// file, which might never end, a larger one, or another encoding, and which it seems to be.
pub fn read(path: &Path, most: u64) -> Result<String> {
    let bytes = super::read(path, most).map_err(|error| match error.kind() {
        std::io::ErrorKind::InvalidInput | std::io::ErrorKind::IsADirectory => {
            Error::invalid(format!("{}: {error}", path.display()), "name a text file")
        }
        std::io::ErrorKind::FileTooLarge => Error::invalid(
            format!("{}: {error}", path.display()),
            "is it the right file? Otherwise make several of it",
        ),
        _ => Error::io(path)(error),
    })?;
    decode(bytes).map_err(|what| {
        Error::invalid(
            format!("{}: {what}", path.display()),
            "save it as UTF-8 in your editor",
        )
    })
}

/// The same, or `None` where there is no such file.
///
/// # Errors
/// Those of [`read`].
pub fn read_if_there(path: &Path, most: u64) -> Result<Option<String>> {
    match read(path, most) {
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        read => read.map(Some),
    }
}

fn decode(mut bytes: Vec<u8>) -> Result<String, String> {
    if bytes.starts_with(b"\xEF\xBB\xBF") {
        bytes.drain(..3);
    }
    if bytes.starts_with(b"\xFF\xFE") || bytes.starts_with(b"\xFE\xFF") {
        return Err("the text is UTF-16, only UTF-8 is read".into());
    }
    if bytes.contains(&0) {
        return Err("there are zero bytes in it: it is UTF-16, or no text at all".into());
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        let (at, bytes) = (error.utf8_error().valid_up_to(), error.as_bytes());
        let line = 1 + bytes[..at].iter().filter(|byte| **byte == b'\n').count();
        format!("line {line} is not UTF-8: the text is Latin-1, or in another encoding")
    })?;
    match text.contains('\r') {
        true => Ok(text.replace("\r\n", "\n").replace('\r', "\n")),
        false => Ok(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_the_same_from_every_editor_or_its_encoding_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        let read = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            read(&path, 100)
        };
        for bytes in [
            "a dög\nb\n".as_bytes(),
            "\u{feff}a dög\r\nb\r\n".as_bytes(),
            "a dög\rb\r".as_bytes(),
        ] {
            assert_eq!(read(bytes).unwrap(), "a dög\nb\n");
        }
        assert_eq!(read(b"\xEF\xBB\xBF").unwrap(), "");
        for (bytes, part) in [
            (b"\xFF\xFEa\0".as_slice(), "UTF-16"),
            (b"\xFE\xFF\0a", "UTF-16"),
            (b"a\0b\0", "UTF-16"),
            (b"a\nd\xF6g", "line 2 is not UTF-8: the text is Latin-1"),
            (&[b'a'; 101], "at most 100 bytes are read"),
        ] {
            let error = read(bytes).unwrap_err();
            let said = error.to_string();
            assert!(said.contains("a.txt") && said.contains(part), "{said}");
            assert!(error.hint().is_some());
        }
        assert!(super::read(dir.path(), 100).is_err());
        #[cfg(unix)]
        assert!(super::read(Path::new("/dev/zero"), 100).is_err());
    }
}
