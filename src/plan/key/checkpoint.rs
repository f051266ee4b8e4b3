//! The digest of a checkpoint's files.

use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::Digest;
use crate::hub::parts::Parts;
use crate::{Error, Result};

/// Above this size only a file's beginning and end are read.
const READ_WHOLE: u64 = 1 << 30;
/// How much of each, in bytes. A safetensors file begins with the names, types and shapes of all its tensors.
const READ_PART: u64 = 16 << 20;

/// Digest of a checkpoint: all files under `directory`, or the one file that it names, with their relative paths, sizes and contents. Of a file of
/// 1 GiB and more, the first and last 16 MiB stand for the content. Hidden files and what is no part of a checkpoint
/// (pictures, texts for readers) do not count.
///
/// # Errors
/// When the folder or a file in it cannot be read, or there is no file.
pub fn checkpoint_digest(directory: &Path) -> Result<String> {
    let mut files = Vec::new();
    let parts;
    let directory = match (
        directory.is_file(),
        directory.parent(),
        directory.file_name(),
    ) {
        (true, Some(parent), Some(name)) => {
            parts = Parts::find(directory)?;
            match &parts {
                Some(parts) => {
                    list_parts(parts, &mut files)?;
                    parts.folder.as_path()
                }
                None => {
                    files.push(PathBuf::from(name));
                    parent
                }
            }
        }
        _ => {
            list(directory, Path::new(""), &mut files)?;
            directory
        }
    };
    files.sort();
    files.dedup();
    if files.is_empty() {
        return Err(Error::Checkpoint {
            path: directory.to_path_buf(),
            faults: vec!["there are no files".to_string()],
        });
    }
    let mut digest = Digest::new("checkpoint 1");
    for file in files {
        let path = directory.join(&file);
        let name = file
            .components()
            .map(|part| part.as_os_str().to_string_lossy())
            .collect::<Vec<_>>()
            .join("/");
        let (size, content) = content(&path).map_err(Error::io(&path))?;
        digest = digest
            .field("file", name)
            .number("size", size)
            .field("content", content);
    }
    Ok(digest.finish())
}

/// The files of a diffusion model whose network is a single file: what lies beside it may be of other models.
fn list_parts(parts: &Parts, files: &mut Vec<PathBuf>) -> Result<()> {
    let own = parts
        .files
        .iter()
        .filter_map(|part| part.path.strip_prefix(&parts.folder).ok());
    files.extend(own.map(Path::to_path_buf));
    let components = parts.network.components().iter().map(|(name, _, _)| *name);
    let folders = ["scheduler", "tokenizer", "tokenizer_2", "tokenizer_3"];
    for name in components.chain(folders) {
        if parts.folder.join(name).is_dir() {
            list(&parts.folder, Path::new(name), files)?;
        }
    }
    Ok(())
}

fn list(root: &Path, inside: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    const COUNT: [&str; 11] = [
        "json",
        "safetensors",
        "gguf",
        "pt",
        "pth",
        "ckpt",
        "bin",
        "yaml",
        "txt",
        "model",
        "vocab",
    ];
    let folder = root.join(inside);
    for entry in std::fs::read_dir(&folder).map_err(Error::io(&folder))? {
        let entry = entry.map_err(Error::io(&folder))?;
        let path = inside.join(entry.file_name());
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        // through links, as the hub's cache consists of them
        let metadata = std::fs::metadata(root.join(&path)).map_err(Error::io(root.join(&path)))?;
        let counts = path
            .extension()
            .is_some_and(|end| COUNT.iter().any(|count| end == *count));
        if metadata.is_dir() {
            list(root, &path, files)?;
        } else if counts {
            files.push(path);
        }
    }
    Ok(())
}

fn content(path: &Path) -> std::io::Result<(u64, [u8; 32])> {
    let mut file = crate::files::open(path)?;
    let size = file.metadata()?.len();
    let mut hasher = blake3::Hasher::new();
    if size < READ_WHOLE {
        // A file that grows meanwhile does not keep this from ending.
        hasher.update_reader((&mut file).take(size))?;
    } else {
        hasher.update_reader((&mut file).take(READ_PART))?;
        file.seek(SeekFrom::End(-(READ_PART as i64)))?;
        hasher.update_reader(&mut file)?;
    }
    Ok((size, *hasher.finalize().as_bytes()))
}
