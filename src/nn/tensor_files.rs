//! The tensors of a checkpoint's files under the names that models ask for: those of the files, or others that a table
//! gives, where a tensor may also be some rows of one in the files.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::quantized::GgmlDType;
use candle_core::safetensors::MmapedSafetensors;
use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;

use super::mapped;
use super::precision::{HalfKind, HalfMatrix, MappedBytes};
use super::quantised::{Bytes, QuantisedMatrix, unpack};
use crate::files::tensor_headers::{gguf_header, is_gguf, map};
use crate::{Error, Result};

/// How a tensor comes of one in a file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Cut {
    /// Rows, in this order; all where there are none.
    pub rows: Vec<Range<usize>>,
    /// What is done with them then.
    pub form: Form,
}

impl Cut {
    /// The shape of what is cut of a tensor with these `dims`.
    pub fn shape(&self, dims: &[usize]) -> Vec<usize> {
        let mut dims = dims.to_vec();
        if let (false, Some(first)) = (self.rows.is_empty(), dims.first_mut()) {
            *first = self.rows.iter().map(Range::len).sum();
        }
        match (self.form, dims.as_slice()) {
            (Form::Flat, [rows, columns, 1, 1]) => vec![*rows, *columns],
            (Form::Turned, [rows, columns]) => vec![*columns, *rows],
            _ => dims,
        }
    }
}

/// What is done with a tensor's dimensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Form {
    /// Nothing.
    #[default]
    Same,
    /// A convolution with a kernel of one pixel, (outputs, inputs, 1, 1), becomes a matrix.
    Flat,
    /// A matrix is transposed.
    Turned,
}

/// The names that models ask for of the tensor that a file calls so and that has this shape, each with its cut. None at
/// all leaves it out.
pub type Rename<'a> = dyn Fn(&str, &[usize]) -> Vec<(String, Cut)> + 'a;

/// How numbers are kept in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stored {
    Plain(DType),
    Packed(GgmlDType),
    /// In a type that candle does not know: to be refused when it is read.
    Unknown,
}

#[derive(Clone)]
enum Source {
    Safetensors(Arc<MmapedSafetensors>, String),
    Gguf(Arc<Mmap>, Range<usize>),
}

/// A tensor that models may ask for.
struct Located {
    source: Source,
    stored: Stored,
    /// As in the file.
    dims: Vec<usize>,
    cut: Cut,
}

/// See the module.
pub(super) struct TensorFiles {
    tensors: BTreeMap<String, Located>,
}

impl TensorFiles {
    /// Maps all `files` of one checkpoint, safetensors or GGUF, and calls their tensors as `rename` says, or as the files do.
    ///
    /// # Errors
    /// When one is not whole, or two tensors come to one name.
    pub fn open(files: &[PathBuf], rename: Option<&Rename>) -> Result<Self> {
        let (packed, plain): (Vec<PathBuf>, Vec<PathBuf>) =
            files.iter().cloned().partition(|path| is_gguf(path));
        let mut found = Vec::new();
        if !plain.is_empty() {
            let mapped = Arc::new(mapped::map(&plain)?);
            for (name, view) in mapped.tensors() {
                let stored = DType::try_from(view.dtype());
                let stored = stored.map_or(Stored::Unknown, Stored::Plain);
                let source = Source::Safetensors(mapped.clone(), name.clone());
                found.push((name, source, stored, view.shape().to_vec()));
            }
        }
        for path in &packed {
            let file = Arc::new(map(path)?);
            for (name, place) in gguf_header(path, &file)?.tensors {
                let stored = match place.kind {
                    GgmlDType::F32 => Stored::Plain(DType::F32),
                    GgmlDType::F16 => Stored::Plain(DType::F16),
                    GgmlDType::BF16 => Stored::Plain(DType::BF16),
                    kind => Stored::Packed(kind),
                };
                let source = Source::Gguf(file.clone(), place.bytes);
                found.push((name, source, stored, place.dims));
            }
        }
        let mut tensors = BTreeMap::new();
        for (name, source, stored, dims) in found {
            let names = match rename {
                Some(rename) => rename(&name, &dims),
                None => vec![(name.clone(), Cut::default())],
            };
            for (ours, cut) in names {
                let located = Located {
                    source: source.clone(),
                    stored,
                    dims: dims.clone(),
                    cut,
                };
                if tensors.insert(ours.clone(), located).is_some() {
                    let path = files.first().map(PathBuf::as_path).unwrap_or(Path::new(""));
                    return Err(Error::Checkpoint {
                        path: path.to_path_buf(),
                        faults: vec![format!("{ours} is there twice, the second time as {name}")],
                    });
                }
            }
        }
        Ok(Self { tensors })
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &String> {
        self.tensors.keys()
    }

    /// All shapes.
    pub fn shapes(&self) -> impl Iterator<Item = Vec<usize>> {
        self.tensors.values().map(Located::shape)
    }

    /// The shape of `name`, if it is there.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors.get(name).map(Located::shape)
    }

    /// The type that the first matrix by name is kept in; what is packed counts as half precision.
    pub fn dtype(&self) -> Option<DType> {
        let mut matrices = self.tensors.values();
        let first = matrices.find(|located| located.shape().len() == 2)?;
        match first.stored {
            Stored::Plain(dtype) => Some(dtype),
            Stored::Packed(_) => Some(DType::BF16),
            Stored::Unknown => None,
        }
    }

    /// How `name` is kept, if it is there.
    pub fn stored(&self, name: &str) -> Option<Stored> {
        self.tensors.get(name).map(|located| located.stored)
    }

    fn located(&self, name: &str) -> Result<&Located> {
        self.tensors.get(name).ok_or_else(|| Error::Invalid {
            what: format!("{name} is asked for, which is not there"),
            hint: None,
        })
    }

    /// The tensor `name` in the type that it is kept in, in f32 where it is packed.
    pub fn load(&self, name: &str, device: &Device) -> Result<Tensor> {
        self.located(name)?.load(device)
    }

    /// The matrix `name`, of half precision, in place; `None` where it is no such matrix or does not lie so.
    pub fn half(&self, name: &str, kind: HalfKind) -> Result<Option<HalfMatrix>> {
        let located = self.located(name)?;
        let rows = located.rows();
        let (Stored::Plain(stored), [rows]) = (located.stored, rows.as_slice()) else {
            return Ok(None);
        };
        let [height, columns] = *located.shape() else {
            return Ok(None);
        };
        if HalfKind::of(stored) != Some(kind) || located.cut.form == Form::Turned {
            return Ok(None);
        }
        let bytes = match &located.source {
            Source::Safetensors(files, name) => {
                MappedBytes::Safetensors(files.clone(), name.clone())
            }
            Source::Gguf(file, range) => MappedBytes::File(file.clone(), range.clone()),
        };
        HalfMatrix::mapped(bytes, rows.start * columns, kind, (height, columns))
    }

    /// The matrix `name` as it is packed; `None` where it is not, or no matrix.
    pub fn packed(&self, name: &str, device: &Device) -> Result<Option<QuantisedMatrix>> {
        let located = self.located(name)?;
        let (Stored::Packed(kind), Source::Gguf(file, bytes)) = (located.stored, &located.source)
        else {
            return Ok(None);
        };
        let [rows, columns] = *located.shape() else {
            return Ok(None);
        };
        if located.cut.form == Form::Turned || !columns.is_multiple_of(kind.block_size()) {
            return Ok(None);
        }
        let row = columns / kind.block_size() * kind.type_size();
        let parts = located.rows().into_iter();
        let parts = parts.map(|part| bytes.start + part.start * row..bytes.start + part.end * row);
        let bytes = Bytes::Mapped(file.clone());
        QuantisedMatrix::new(&bytes, parts.collect(), kind, (rows, columns), device).map(Some)
    }
}

impl Located {
    /// The rows that it has of the file's tensor.
    fn rows(&self) -> Vec<Range<usize>> {
        match self.cut.rows.is_empty() {
            true => std::iter::once(0..self.dims.first().copied().unwrap_or(1)).collect(),
            false => self.cut.rows.clone(),
        }
    }

    fn shape(&self) -> Vec<usize> {
        self.cut.shape(&self.dims)
    }

    fn load(&self, device: &Device) -> Result<Tensor> {
        let whole = match (&self.source, self.stored) {
            (Source::Safetensors(files, name), _) if self.cut.rows.is_empty() => {
                files.load(name, device)?
            }
            (Source::Safetensors(files, name), Stored::Plain(dtype)) => {
                self.some_rows(files.get(name)?.data(), dtype, device)?
            }
            (Source::Gguf(file, range), Stored::Plain(dtype)) => {
                self.some_rows(&file[range.clone()], dtype, device)?
            }
            (Source::Gguf(file, range), Stored::Packed(kind)) => {
                let mut values = vec![0.0; self.dims.iter().product()];
                unpack(kind, &file[range.clone()], &mut values)?;
                let whole = Tensor::from_vec(values, self.dims.as_slice(), device)?;
                let rows = self.rows().into_iter();
                let parts = rows.map(|rows| whole.narrow(0, rows.start, rows.len()));
                Tensor::cat(&parts.collect::<candle_core::Result<Vec<_>>>()?, 0)?
            }
            (_, Stored::Packed(_) | Stored::Unknown) => {
                return Err(Error::Invalid {
                    what: "numbers of an unknown type".to_string(),
                    hint: None,
                });
            }
        };
        Ok(match self.cut.form {
            Form::Same => whole,
            Form::Flat => whole.reshape(self.shape())?,
            Form::Turned => whole.t()?.contiguous()?,
        })
    }

    /// The rows of a tensor with these bytes.
    fn some_rows(&self, bytes: &[u8], dtype: DType, device: &Device) -> Result<Tensor> {
        let inner: usize = self.dims.iter().skip(1).product::<usize>() * dtype.size_in_bytes();
        let parts = self.rows().into_iter().map(|rows| {
            let mut dims = self.dims.clone();
            if let Some(first) = dims.first_mut() {
                *first = rows.len();
            }
            let bytes = bytes.get(rows.start * inner..rows.end * inner);
            let bytes = bytes.ok_or_else(|| Error::Invalid {
                what: format!("rows {rows:?} of a tensor of {:?}", self.dims),
                hint: None,
            })?;
            Ok(Tensor::from_raw_buffer(bytes, dtype, &dims, device)?)
        });
        let parts = parts.collect::<Result<Vec<_>>>()?;
        match parts.as_slice() {
            [one] => Ok(one.clone()),
            more => Ok(Tensor::cat(more, 0)?),
        }
    }
}
