//! The prompts of pictures in a folder, as trainers keep them: `metadata.jsonl`, or a text beside each picture.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

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

/// The prompt of each of `pictures`, files in `dir`: what `metadata.jsonl` in `dir` says of the file, or else the .txt
/// of its name; `None` where there is neither.
///
/// # Errors
/// When a file cannot be read, or a line of `metadata.jsonl` has no `file_name` and `text`.
pub fn captions(dir: &Path, pictures: &[PathBuf]) -> Result<Vec<Option<String>>> {
    let mut listed = metadata(&dir.join(SAMPLES))?;
    listed.extend(metadata(&dir.join("metadata.jsonl"))?);
    pictures
        .iter()
        .map(|picture| {
            let name = picture.file_name().unwrap_or_default().to_string_lossy();
            if let Some(text) = listed.get(name.as_ref()) {
                return Ok(Some(text.clone()));
            }
            let beside = picture.with_extension("txt");
            Ok(read(&beside)?.map(|text| text.trim().to_string()))
        })
        .collect()
}

/// `text` without the word `token`: "a dog on the beach" of "a sks dog on the beach".
pub fn without_token(text: &str, token: &str) -> String {
    let is_token = |word: &&str| word.trim_matches(|c: char| !c.is_alphanumeric()) == token;
    let words = text.split_whitespace().filter(|word| !is_token(word));
    words.collect::<Vec<_>>().join(" ")
}

fn metadata(path: &Path) -> Result<BTreeMap<String, String>> {
    let text = read(path)?.unwrap_or_default();
    text.lines()
        .zip(1..)
        .filter(|(line, _)| !line.trim().is_empty())
        .map(|(line, number)| {
            let line: Line = serde_json::from_str(line).map_err(|e| {
                Error::invalid(
                    format!("{}:{number}: {e}", path.display()),
                    "each line is like {\"file_name\": \"0.png\", \"text\": \"a dog\"}",
                )
            })?;
            Ok((line.file_name, line.text))
        })
        .collect()
}

/// The text in `path`; `None` where there is no such file.
fn read(path: &Path) -> Result<Option<String>> {
    crate::files::read_text_if_there(path, crate::files::LISTS)
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
    fn a_token_is_a_whole_word() {
        assert_eq!(without_token("a sks dog, sksy", "sks"), "a dog, sksy");
        assert_eq!(without_token("sks", "sks"), "");
    }
}
