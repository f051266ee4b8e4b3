//! What tensors a file holds, without their numbers.

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;
use safetensors::SafeTensors;

use super::gguf;
use crate::{Error, Result};

/// The most bytes of a safetensors file's header: that of 100,000 tensors has 15 MB.
pub const LARGEST_HEADER: u64 = 32 << 20;

/// The content of the regular file at `path`, mapped for reading.
///
/// # Errors
/// Those of [`super::open`]; an empty file.
pub fn map(path: &Path) -> Result<Mmap> {
    let file: File = super::open(path).map_err(Error::io(path))?;
    // SAFETY: the file is opened read-only; one that is rewritten in place while it is mapped would be read half-new,
    // which is why everything here writes aside and renames.
    unsafe { Mmap::map(&file) }.map_err(Error::io(path))
}

/// Whether `path` is named as a GGUF file.
pub fn is_gguf(path: &Path) -> bool {
    path.extension()
        .is_some_and(|end| end.eq_ignore_ascii_case("gguf"))
}

/// The header of the GGUF file at `path`, whose content is `file`.
///
/// # Errors
/// When it is no whole GGUF file of the kinds that are read.
pub fn gguf_header(path: &Path, file: &[u8]) -> Result<gguf::Header> {
    gguf::header(file).map_err(|what| Error::Checkpoint {
        path: path.to_path_buf(),
        faults: vec![format!("not a GGUF file that is read here: {what}")],
    })
}

/// Names and shapes of the tensors in the safetensors or GGUF file at `path`, in the order of their names.
///
/// # Errors
/// When it is neither, or not whole.
pub fn tensors_in(path: &Path) -> Result<Vec<(String, Vec<usize>)>> {
    let file = map(path)?;
    let mut tensors: Vec<(String, Vec<usize>)> = if is_gguf(path) {
        let header = gguf_header(path, &file)?;
        let tensors = header.tensors.into_iter();
        tensors.map(|(name, place)| (name, place.dims)).collect()
    } else {
        let fault = |what: String| Error::Checkpoint {
            path: path.to_path_buf(),
            faults: vec![format!("not a whole safetensors file: {what}")],
        };
        let announced = file.first_chunk().map(|start| u64::from_le_bytes(*start));
        if announced.is_none_or(|length| length > LARGEST_HEADER) {
            return Err(fault("no header of a possible size".to_string()));
        }
        let metadata = SafeTensors::read_metadata(&file);
        let (_, metadata) = metadata.map_err(|e| fault(e.to_string()))?;
        let tensors = metadata.tensors().into_iter();
        tensors
            .map(|(name, info)| (name, info.shape.clone()))
            .collect()
    };
    tensors.sort();
    Ok(tensors)
}
