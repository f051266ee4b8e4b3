//! Safetensors files in memory, whose headers are checked before anything believes them: the crate compares offsets,
//! shapes and types with each other and with the file's length; here it is kept from headers that it should not read.

use std::io::Read;
use std::path::{Path, PathBuf};

use candle_core::safetensors::MmapedSafetensors;

use crate::files::tensor_headers::LARGEST_HEADER;
use crate::{Error, Result};

/// Maps all `files` of one checkpoint.
///
/// # Errors
/// When one is no whole safetensors file, or a tensor is in two of them.
pub fn map(files: &[PathBuf]) -> Result<MmapedSafetensors> {
    for file in files {
        check_header(file)?;
    }
    // SAFETY: the files are opened read-only; a checkpoint that is rewritten in place while it is mapped would be
    // read half-new, which is why everything here writes aside and renames.
    let mapped = unsafe { MmapedSafetensors::multi(files) };
    let path = files.first().map(PathBuf::as_path).unwrap_or(Path::new(""));
    let mapped = mapped.map_err(|e| fault(path, format!("not a whole safetensors file: {e}")))?;
    let mut names: Vec<String> = mapped.tensors().into_iter().map(|(name, _)| name).collect();
    names.sort();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(fault(path, format!("{} is in two of its files", pair[0]))),
        None => Ok(mapped),
    }
}

/// Fails where `file` is no regular file, or cannot hold the header that it announces.
fn check_header(file: &Path) -> Result<()> {
    let mut opened = crate::files::open(file).map_err(Error::io(file))?;
    let metadata = opened.metadata().map_err(Error::io(file))?;
    let mut start = [0; 8];
    let Some(behind) = metadata.len().checked_sub(start.len() as u64) else {
        let what = format!(
            "no safetensors file, which has more than {} bytes",
            metadata.len()
        );
        return Err(fault(file, what));
    };
    opened.read_exact(&mut start).map_err(Error::io(file))?;
    if &start == b"version " {
        let what = "a pointer to a file of git-lfs: fetch the file itself with `git lfs pull`";
        return Err(fault(file, what.to_string()));
    }
    let header = u64::from_le_bytes(start);
    if header > behind.min(LARGEST_HEADER) {
        let what = format!("a header of {header} bytes is announced, and {behind} bytes follow");
        return Err(fault(file, format!("not a whole safetensors file: {what}")));
    }
    Ok(())
}

fn fault(path: &Path, what: String) -> Error {
    Error::Checkpoint {
        path: path.to_path_buf(),
        faults: vec![what],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A safetensors file with this header in front of `data` bytes.
    fn file(folder: &Path, name: &str, header: &str, data: usize) -> PathBuf {
        let path = folder.join(name);
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    #[test]
    fn headers_that_lie_are_refused_by_the_name_of_their_file() {
        let folder = tempfile::tempdir().unwrap();
        let tensor = |dtype: &str, shape: &str, offsets: &str| {
            format!(r#""x":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
        };
        let good = file(
            folder.path(),
            "good",
            &format!("{{{}}}", tensor("F32", "[2]", "[0,8]")),
            8,
        );
        map(&[good]).unwrap();
        let max = u64::MAX;
        for (inside, data) in [
            // Beyond the file, short of it, backwards, overlapping, with a hole.
            (tensor("F32", "[2]", "[0,8]"), 4),
            (tensor("F32", "[2]", "[0,8]"), 12),
            (tensor("F32", "[2]", "[8,0]"), 8),
            (tensor("F32", "[2]", "[4,12]"), 12),
            (
                format!(
                    "{},{}",
                    tensor("F32", "[1]", "[0,4]").replace('x', "y"),
                    tensor("F32", "[1]", "[2,6]")
                ),
                6,
            ),
            // Another size than the shape's in the type.
            (tensor("F64", "[2]", "[0,8]"), 8),
            (tensor("F32", "[3]", "[0,8]"), 8),
            (tensor("F999", "[2]", "[0,8]"), 8),
            // Products that overflow, numbers that no size has.
            (tensor("F32", "[4294967296,4294967296]", "[0,0]"), 0),
            (tensor("F32", "[4611686018427387904,4]", "[0,0]"), 0),
            (tensor("F32", "[2]", &format!("[0,{max}]")), 8),
            (tensor("F32", "[-1]", "[0,8]"), 8),
            (tensor("F32", "[1.5]", "[0,6]"), 6),
            // One name for two tensors.
            (
                format!(
                    "{},{}",
                    tensor("F32", "[1]", "[0,4]"),
                    tensor("F32", "[1]", "[4,8]")
                ),
                8,
            ),
            ("\"x\":".to_string() + &"[".repeat(100_000), 0),
        ] {
            let path = file(folder.path(), "bad", &format!("{{{inside}}}"), data);
            let error = map(std::slice::from_ref(&path))
                .err()
                .expect(&inside)
                .to_string();
            assert!(error.contains("not a whole safetensors file"), "{error}");
            assert!(error.contains(&path.display().to_string()), "{error}");
        }
    }

    #[test]
    fn a_header_is_not_read_where_it_cannot_be() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        for (start, told) in [
            (&b"short"[..], "no safetensors file"),
            (&[0xff; 40], "announced"),
            (&[0, 0, 0, 0, 0, 0, 0, 0x80, b'{', b'}'], "announced"),
            (&[20, 0, 0, 0, 0, 0, 0, 0, b'{', b'}'], "announced"),
            (
                b"version https://git-lfs.github.com/spec/v1\noid sha256:00",
                "git-lfs",
            ),
        ] {
            std::fs::write(&path, start).unwrap();
            let error = map(std::slice::from_ref(&path)).err().unwrap().to_string();
            assert!(error.contains(told), "{error}");
        }
        let error = map(&[folder.path().to_path_buf()]).err().unwrap();
        assert!(
            error.to_string().contains("a folder, not a file"),
            "{error}"
        );
    }

    #[test]
    fn a_tensor_in_two_shards_is_a_fault() {
        let folder = tempfile::tempdir().unwrap();
        let header = r#"{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
        let shards = ["one", "two"].map(|name| file(folder.path(), name, header, 4));
        let error = map(&shards).err().unwrap().to_string();
        assert!(error.contains("x is in two of its files"), "{error}");
    }
}
