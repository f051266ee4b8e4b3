//! The prompts of pictures in a folder, as trainers keep them: `metadata.jsonl`, or a text beside each picture.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::config::limits::TEXT_BYTES;
use crate::files::text;
use crate::{Error, Result};

/// Where `sample` notes the prompts of what it draws: as `metadata.jsonl`, but hidden, so that its folder shows pictures
/// alone.
pub const SAMPLES: &str = ".metadata.jsonl";

/// A line of `metadata.jsonl`, as Hugging Face's imagefolder has it; other keys may stand in it.
#[derive(Deserialize)]
struct Line {
    file_name: String,
    text: String,
}

/// The most bytes of a `metadata.jsonl`: a line for each of a million pictures.
const METADATA_BYTES: u64 = 256 << 20;
const METADATA: &str = "metadata.jsonl";

/// Files with captions that other programs read.
const OTHER_METADATA: [&str; 3] = ["metadata.csv", "metadata.parquet", "metadata.json"];
const CAPTION_EXTENSIONS: [&str; 2] = ["txt", "caption"];

/// The prompt of each of `pictures`, files in `dir`: what `metadata.jsonl` in `dir` says of the file, or else the .txt
/// of its name; `None` where there is neither, or an empty one.
///
/// # Errors
/// When a file cannot be read as text in UTF-8, or a line of `metadata.jsonl` has no `file_name` and `text`.
pub fn captions(dir: &Path, pictures: &[PathBuf]) -> Result<Vec<Option<String>>> {
    let mut listed = metadata(&dir.join(SAMPLES))?;
    listed.extend(metadata(&dir.join(METADATA))?);
    pictures
        .iter()
        .map(|picture| {
            let name = picture.file_name().unwrap_or_default().to_string_lossy();
            if let Some(text) = listed.get(name.as_ref()) {
                return Ok(Some(text.clone()));
            }
            let beside = read(&picture.with_extension("txt"), TEXT_BYTES)?;
            Ok(beside.and_then(|text| written(&text)))
        })
        .collect()
}

/// The names of files in `dir` that look like captions of the `pictures` there: of all, or only of those that
/// [`captions`] does not read.
///
/// # Errors
/// When the folder cannot be listed.
pub fn side_files(dir: &Path, pictures: &[PathBuf], only_unread: bool) -> Result<Vec<String>> {
    let name_of =
        |path: Option<&std::ffi::OsStr>| path.map(|name| name.to_string_lossy().into_owned());
    let names: BTreeSet<String> = pictures
        .iter()
        .filter_map(|p| name_of(p.file_name()))
        .collect();
    let stems: BTreeSet<String> = pictures
        .iter()
        .filter_map(|p| name_of(p.file_stem()))
        .collect();
    let is_side = |name: &str| {
        let (stem, extension) = name.rsplit_once('.').unwrap_or((name, ""));
        let is_caption = CAPTION_EXTENSIONS.contains(&extension.to_lowercase().as_str());
        let is_read = name == METADATA || extension == "txt" && stems.contains(stem);
        let is_any = name == METADATA
            || OTHER_METADATA.contains(&name)
            || is_caption && (stems.contains(stem) || names.contains(stem));
        is_any && !(only_unread && is_read)
    };
    let found = crate::files::list(dir)?.into_iter().map(|(name, _)| name);
    Ok(found.filter(|name| is_side(name)).collect())
}

/// Several names in few words.
pub fn few(names: &[String]) -> String {
    let shown = names.iter().take(3).cloned().collect::<Vec<_>>().join(", ");
    match names.len() {
        0..=3 => shown,
        all => format!("{shown} and {} more", all - 3),
    }
}

fn metadata(path: &Path) -> Result<BTreeMap<String, String>> {
    let text = read(path, METADATA_BYTES)?.unwrap_or_default();
    let mut captions = BTreeMap::new();
    for (line, number) in text.lines().zip(1..) {
        if line.trim().is_empty() {
            continue;
        }
        let line: Line = serde_json::from_str(line).map_err(|e| {
            Error::invalid(
                format!("{}:{number}: {e}", path.display()),
                "each line is like {\"file_name\": \"0.png\", \"text\": \"a dog\"}",
            )
        })?;
        let name = line.file_name.strip_prefix("./");
        if let Some(text) = written(&line.text) {
            captions.insert(name.unwrap_or(&line.file_name).to_string(), text);
        }
    }
    Ok(captions)
}

/// `text` without the space around it; `None` where that is all.
fn written(text: &str) -> Option<String> {
    let text = text.trim_matches(|c: char| c.is_whitespace() || c == '\u{feff}');
    (!text.is_empty()).then(|| text.to_string())
}

/// The text in `path`; `None` where there is no such file.
fn read(path: &Path, most: u64) -> Result<Option<String>> {
    match text::read(path, most) {
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        read => read.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_comes_before_a_text_beside_and_a_bad_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write(
            "metadata.jsonl",
            "{\"file_name\": \"a.png\", \"text\": \"a sks dog\", \"seed\": 1}\n\n",
        );
        write("a.txt", "not this");
        write("b.txt", "a cat\n");
        let pictures = ["a.png", "b.png", "c.png"].map(|name| dir.path().join(name));
        let found = captions(dir.path(), &pictures).unwrap();
        assert_eq!(
            found,
            [Some("a sks dog".into()), Some("a cat".into()), None]
        );
        write("metadata.jsonl", "\n{\"file_name\": \"a.png\"}\n");
        let error = captions(dir.path(), &pictures).unwrap_err();
        assert!(error.to_string().contains("metadata.jsonl:2: "), "{error}");
        assert!(error.hint().is_some());
    }

    #[test]
    fn captions_are_the_same_from_every_editor_and_an_empty_one_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write("a.txt", "\u{feff}a dog\r\n");
        write("b.txt", " \r\n");
        write("c.txt", "");
        write(
            "metadata.jsonl",
            "\u{feff}{\"file_name\": \"./d.png\", \"text\": \"a cat\"}\r\n\r\n\
             {\"file_name\": \"a.png\", \"text\": \"\"}\r\n",
        );
        let pictures = ["a", "b", "c", "d"].map(|name| dir.path().join(name).with_extension("png"));
        let found = captions(dir.path(), &pictures).unwrap();
        assert_eq!(
            found,
            [Some("a dog".into()), None, None, Some("a cat".into())]
        );
        std::fs::write(dir.path().join("b.txt"), b"a d\xF6g").unwrap();
        let error = captions(dir.path(), &pictures).unwrap_err().to_string();
        assert!(
            error.contains("b.txt") && error.contains("Latin-1"),
            "{error}"
        );
    }

    #[test]
    fn captions_of_other_programs_beside_pictures_are_found() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "a.txt",
            "a.png.txt",
            "b.caption",
            "metadata.csv",
            "metadata.jsonl",
            "notes.txt",
            "a.xmp",
        ] {
            std::fs::write(dir.path().join(name), "a dog").unwrap();
        }
        let pictures = ["a.png", "b.png"].map(|name| dir.path().join(name));
        let all = side_files(dir.path(), &pictures, false).unwrap();
        assert_eq!(few(&all), "a.png.txt, a.txt, b.caption and 2 more");
        let unread = side_files(dir.path(), &pictures, true).unwrap();
        assert_eq!(unread, ["a.png.txt", "b.caption", "metadata.csv"]);
    }
}
