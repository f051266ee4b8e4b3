//! Safetensors files written one tensor at a time, so that a file of any size needs the memory of its largest tensor.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use candle_core::DType;
use serde_json::{Map, Value, json};

use crate::{Error, Result, files};

/// A tensor that a file is to hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<usize>,
}

impl Entry {
    /// Bytes of its values.
    pub fn size(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.dtype.size_in_bytes()) as u64
    }
}

/// A file that is being written aside; it takes its place in [`TensorWriter::finish`].
pub struct TensorWriter {
    path: PathBuf,
    aside: PathBuf,
    file: BufWriter<File>,
    expected: VecDeque<Entry>,
}

impl TensorWriter {
    /// Begins the file `path` with a header for `entries`. Values are written in the order that [`in_order`] gives.
    pub fn create(path: &Path, entries: &[Entry]) -> Result<Self> {
        Self::with_metadata(path, entries, BTreeMap::new())
    }

    /// [`TensorWriter::create`] with `metadata` in the header, beside `format: pt`, which readers expect.
    pub fn with_metadata(
        path: &Path,
        entries: &[Entry],
        mut metadata: BTreeMap<String, String>,
    ) -> Result<Self> {
        if let Some(parent) = path.parent() {
            files::create_dir(parent)?;
        }
        let entries = in_order(entries.to_vec());
        metadata.insert("format".into(), "pt".into());
        let mut header = Map::from_iter([("__metadata__".to_string(), json!(metadata))]);
        let mut start = 0;
        for entry in &entries {
            let dtype = safetensors_name(entry)?;
            let end = start + entry.size();
            let value = json!({"dtype": dtype, "shape": entry.shape, "data_offsets": [start, end]});
            header.insert(entry.name.clone(), value);
            start = end;
        }
        let mut header = Value::Object(header).to_string().into_bytes();
        // Values begin at a multiple of eight bytes.
        header.resize(header.len().next_multiple_of(8), b' ');
        let (file, aside) = files::create_aside(path)?;
        let mut file = BufWriter::new(file);
        file.write_all(&(header.len() as u64).to_le_bytes())
            .and_then(|()| file.write_all(&header))
            .map_err(Error::io(path))?;
        Ok(Self {
            path: path.to_path_buf(),
            aside,
            file,
            expected: entries.into(),
        })
    }

    /// Writes the values of the next tensor, which must be `name`, as they lie in memory.
    pub fn write(&mut self, name: &str, values: &[u8]) -> Result<()> {
        let next = self.expected.pop_front();
        let fits = |next: &Entry| next.name == name && next.size() == values.len() as u64;
        if !next.as_ref().is_some_and(fits) {
            return Err(Error::Invalid {
                what: format!(
                    "{} bytes of {name} for {}, where {next:?} is next",
                    values.len(),
                    self.path.display()
                ),
                hint: None,
            });
        }
        self.file.write_all(values).map_err(Error::io(&self.path))
    }

    /// Ends the file and puts it in its place; fails when a tensor was not written.
    pub fn finish(mut self) -> Result<()> {
        if let Some(missing) = self.expected.front() {
            return Err(Error::Invalid {
                what: format!(
                    "{} was not written to {}",
                    missing.name,
                    self.path.display()
                ),
                hint: None,
            });
        }
        self.file.flush().map_err(Error::io(&self.path))?;
        files::into_place(&self.aside, &self.path)
    }
}

impl Drop for TensorWriter {
    /// A file that was not finished is of no use.
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.aside);
    }
}

/// Wide types first, so that every tensor is aligned to its type; by name among equals.
pub fn in_order(mut entries: Vec<Entry>) -> Vec<Entry> {
    let key = |entry: &Entry| {
        (
            std::cmp::Reverse(entry.dtype.size_in_bytes()),
            entry.name.clone(),
        )
    };
    entries.sort_by_cached_key(key);
    entries
}

fn safetensors_name(entry: &Entry) -> Result<&'static str> {
    Ok(match entry.dtype {
        DType::U8 => "U8",
        DType::U32 => "U32",
        DType::I16 => "I16",
        DType::I32 => "I32",
        DType::I64 => "I64",
        DType::BF16 => "BF16",
        DType::F16 => "F16",
        DType::F32 => "F32",
        DType::F64 => "F64",
        other => {
            return Err(Error::Invalid {
                what: format!(
                    "{} has type {other:?}, which is not written here",
                    entry.name
                ),
                hint: None,
            });
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};

    fn entry(name: &str, dtype: DType, shape: &[usize]) -> Entry {
        Entry {
            name: name.to_string(),
            dtype,
            shape: shape.to_vec(),
        }
    }

    #[test]
    fn what_is_written_one_by_one_is_read_back_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new/model.safetensors");
        let entries = [
            entry("half", DType::BF16, &[3]),
            entry("whole", DType::F32, &[2, 1]),
        ];
        let mut writer = TensorWriter::create(&path, &entries).unwrap();
        writer
            .write(
                "whole",
                &[1.5f32.to_le_bytes(), (-2f32).to_le_bytes()].concat(),
            )
            .unwrap();
        assert!(!path.exists());
        writer
            .write("half", &[0x80, 0x3f, 0, 0, 0x80, 0xbf])
            .unwrap();
        writer.finish().unwrap();
        let tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
        let values = |name: &str| -> Vec<f32> {
            let tensor: Tensor = tensors[name].to_dtype(DType::F32).unwrap();
            tensor.flatten_all().unwrap().to_vec1().unwrap()
        };
        assert_eq!(values("half"), [1.0, 0.0, -1.0]);
        assert_eq!(values("whole"), [1.5, -2.0]);
        assert_eq!(tensors["whole"].dims(), [2, 1]);
    }

    #[test]
    fn a_file_with_a_tensor_too_few_or_too_short_never_appears() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.safetensors");
        let entries = [entry("a", DType::F32, &[1]), entry("b", DType::F32, &[1])];
        let mut writer = TensorWriter::create(&path, &entries).unwrap();
        assert!(writer.write("a", &[0; 3]).is_err());
        drop(writer);
        let mut writer = TensorWriter::create(&path, &entries).unwrap();
        writer.write("a", &[0; 4]).unwrap();
        let error = writer.finish().unwrap_err().to_string();
        assert!(error.contains("b was not written"), "{error}");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
