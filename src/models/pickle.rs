//! PyTorch's zip files (`.pt`, `.bin`, `.ckpt`): state dicts, bare or inside a training checkpoint. Nothing in them is
//! run, and nothing that they say is believed before it is compared with the file: of a tensor only what lies in its
//! storage is read, and the memory that all of them take is in proportion to the file.

mod machine;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Layout, Shape, Tensor};
use safetensors::View;
use zip::{CompressionMethod, ZipArchive};

use self::machine::{Id, Pickled, Value};
use super::tensor_writer::{Entry, TensorWriter, in_order};
use crate::{Error, Result, files};

/// The most bytes of a zip file's table of contents, and of the pickle in it: a model of a thousand tensors has some
/// hundred thousand.
const MAX_TABLE: u64 = 16 << 20;
/// The most dimensions of a tensor.
const MAX_RANK: usize = 8;
/// Tensors that share a storage (T5 has its embeddings four times) may take so many times the file's size, and in a small
/// file as much as costs nobody anything.
const MAX_SHARING: u64 = 8;
const ALWAYS: u64 = 64 << 20;

/// The tensors of one file, which are read when asked for.
pub struct Pickle {
    path: PathBuf,
    tensors: BTreeMap<String, Place>,
}

/// Where a tensor's values lie.
struct Place {
    dtype: DType,
    layout: Layout,
    /// In the file.
    start: u64,
}

impl Place {
    /// In bytes.
    fn size(&self) -> u64 {
        (self.layout.shape().elem_count() * self.dtype.size_in_bytes()) as u64
    }
}

impl Pickle {
    /// Opens the state dict of `path`: what lies under `model`, `module` or `state_dict` where there is such a key,
    /// else the file's own entries. Fails when it holds no tensors, is of the kind that torch wrote before 1.6, or says
    /// of a tensor what cannot be.
    pub fn open(path: &Path) -> Result<Self> {
        let opened = files::open(path).map_err(Error::io(path))?;
        let tensors = tensors(opened).map_err(|what| fault(path, what))?;
        Ok(Self {
            path: path.to_path_buf(),
            tensors,
        })
    }

    /// Names, types and shapes, in the order in which [`TensorWriter`] takes them.
    pub fn entries(&self) -> Vec<Entry> {
        in_order(
            self.tensors
                .iter()
                .map(|(name, place)| Entry {
                    name: name.clone(),
                    dtype: place.dtype,
                    shape: place.layout.dims().to_vec(),
                })
                .collect(),
        )
    }

    /// The tensor `name` on the CPU, in the file's type and contiguous.
    pub fn get(&self, name: &str) -> Result<Tensor> {
        let place = self.place(name)?;
        let bytes = self.bytes(place)?;
        let dims = place.layout.dims();
        let tensor =
            |dims: &[usize]| Tensor::from_raw_buffer(&bytes, place.dtype, dims, &Device::Cpu);
        if place.layout.is_contiguous() {
            return Ok(tensor(dims)?);
        }
        // The first dimension is the one whose values lie side by side.
        let reversed: Vec<usize> = dims.iter().rev().copied().collect();
        let order: Vec<usize> = (0..dims.len()).rev().collect();
        Ok(tensor(&reversed)?.permute(order)?.contiguous()?)
    }

    fn place(&self, name: &str) -> Result<&Place> {
        let place = self.tensors.get(name);
        place.ok_or_else(|| fault(&self.path, format!("{name}: there is no such tensor")))
    }

    /// The values of a tensor as they lie in the file.
    fn bytes(&self, place: &Place) -> Result<Vec<u8>> {
        let mut bytes = vec![0; place.size() as usize];
        files::open(&self.path)
            .and_then(|mut file| {
                file.seek(SeekFrom::Start(place.start))?;
                file.read_exact(&mut bytes)
            })
            .map_err(Error::io(&self.path))?;
        Ok(bytes)
    }

    /// All tensors by name.
    pub fn read_all(&self) -> Result<HashMap<String, Tensor>> {
        let names = self.tensors.keys();
        names
            .map(|name| Ok((name.clone(), self.get(name)?)))
            .collect()
    }

    /// Writes all tensors to the safetensors file `path`, one after another.
    pub fn convert(&self, path: &Path) -> Result<()> {
        let entries = self.entries();
        let mut writer = TensorWriter::create(path, &entries)?;
        for Entry { name, .. } in &entries {
            let place = self.place(name)?;
            match place.layout.is_contiguous() {
                true => writer.write(name, &self.bytes(place)?)?,
                false => writer.write(name, &self.get(name)?.data())?,
            }
        }
        writer.finish()
    }
}

fn fault(path: &Path, what: impl Into<String>) -> Error {
    Error::Checkpoint {
        path: path.to_path_buf(),
        faults: vec![what.into()],
    }
}

/// A file of which no more than `left` bytes are read.
struct Bounded {
    file: BufReader<File>,
    left: u64,
}

impl Read for Bounded {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let count = self.file.read(into)?;
        let left = self.left.checked_sub(count as u64);
        self.left =
            left.ok_or_else(|| std::io::Error::other("its table of contents is too long"))?;
        Ok(count)
    }
}

impl Seek for Bounded {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        self.file.seek(to)
    }
}

/// The places of all tensors in `file`.
fn tensors(file: File) -> Result<BTreeMap<String, Place>, String> {
    let unlike = |e: &dyn std::fmt::Display| format!("not a zip file of torch: {e}");
    let length = file.metadata().map_err(|e| unlike(&e))?.len();
    let bounded = Bounded {
        file: BufReader::new(file),
        left: 2 * MAX_TABLE,
    };
    let zip = ZipArchive::new(bounded).map_err(|e| unlike(&e))?;
    let names = zip.file_names().map(|name| name.map(String::from));
    let names: Vec<String> = names.collect::<Result<_, _>>().map_err(|e| unlike(&e))?;
    let pickle = names
        .iter()
        .find(|name| *name == "data.pkl" || name.ends_with("/data.pkl"))
        .ok_or_else(|| unlike(&"no data.pkl in it"))?;
    let mut storages = Storages {
        zip,
        folder: pickle.trim_end_matches(".pkl").to_string(),
        length,
        known: HashMap::new(),
    };
    let (_, size) = storages.entry(pickle)?;
    if size > MAX_TABLE {
        return Err(format!(
            "data.pkl has {size} bytes, at most {MAX_TABLE} are read"
        ));
    }
    let bytes = storages.bytes(pickle).map_err(|e| unlike(&e))?;
    let pickled = machine::read(&bytes)?;
    let root = pickled
        .dict(pickled.root())
        .ok_or("its pickle is of no dict")?;
    let inside = ["model", "module", "state_dict"].map(|key| {
        let entry = root
            .iter()
            .rfind(|(own, _)| pickled.text(*own) == Some(key));
        entry.and_then(|(_, value)| pickled.dict(*value))
    });
    for dict in inside.into_iter().flatten().chain([root]) {
        let found = in_dict(dict, &pickled, &mut storages)?;
        if !found.is_empty() {
            return bounded_sum(found, length);
        }
    }
    Err("no tensors under model, module or state_dict".into())
}

/// Refuses tensors that take far more memory than the file has bytes.
fn bounded_sum(
    tensors: BTreeMap<String, Place>,
    length: u64,
) -> Result<BTreeMap<String, Place>, String> {
    let bytes = tensors
        .values()
        .fold(0u64, |sum, place| sum.saturating_add(place.size()));
    match bytes > length.saturating_mul(MAX_SHARING).max(ALWAYS) {
        true => Err(format!(
            "its tensors would take {bytes} bytes, more than {MAX_SHARING} times the file"
        )),
        false => Ok(tensors),
    }
}

fn in_dict(
    dict: &[(Id, Id)],
    pickled: &Pickled,
    storages: &mut Storages,
) -> Result<BTreeMap<String, Place>, String> {
    let mut found = BTreeMap::new();
    for (key, value) in dict {
        let (Some(name), Some(arguments)) = (pickled.text(*key), rebuilt(*value, pickled)) else {
            continue;
        };
        match place(arguments, pickled, storages) {
            Ok(Some(place)) => drop(found.insert(name.to_string(), place)),
            Ok(None) => tracing::warn!("{name} is passed over: its type is not read"),
            Err(what) => return Err(format!("{name:?}: {what}")),
        }
    }
    Ok(found)
}

/// The arguments of `_rebuild_tensor_v2`, if `value` is a tensor or a parameter.
fn rebuilt(value: Id, pickled: &Pickled) -> Option<Id> {
    let call = |id: Id| match pickled.value(id) {
        Value::Call {
            callable,
            arguments,
        } => Some((pickled.global(*callable)?, *arguments)),
        _ => None,
    };
    let (name, mut arguments) = call(value)?;
    let name = match name {
        ("torch._tensor", "_rebuild_from_type_v2") => {
            let outer = pickled.tuple(arguments)?;
            arguments = *outer.get(2)?;
            pickled.global(*outer.first()?)?
        }
        ("torch._utils", "_rebuild_parameter") => {
            let (name, inner) = call(*pickled.tuple(arguments)?.first()?)?;
            arguments = inner;
            name
        }
        name => name,
    };
    (name == ("torch._utils", "_rebuild_tensor_v2")).then_some(arguments)
}

/// Where the tensor of these arguments (storage, offset, size, stride, …) lies; `None` for a type that is not read.
fn place(
    arguments: Id,
    pickled: &Pickled,
    storages: &mut Storages,
) -> Result<Option<Place>, String> {
    let unlike = || "not the arguments of a tensor".to_string();
    let [storage, offset, size, stride, ..] = pickled.tuple(arguments).ok_or_else(unlike)? else {
        return Err(unlike());
    };
    let Value::Stored(storage) = pickled.value(*storage) else {
        return Err("its values are not in a storage".into());
    };
    // ("storage", type, name, device, number of values)
    let [_, kind, name, ..] = pickled.tuple(*storage).ok_or_else(unlike)? else {
        return Err(unlike());
    };
    let (_, kind) = pickled.global(*kind).ok_or_else(unlike)?;
    let name = pickled.text(*name).ok_or_else(unlike)?;
    let dtype = match kind {
        "FloatStorage" => DType::F32,
        "DoubleStorage" => DType::F64,
        "HalfStorage" => DType::F16,
        "BFloat16Storage" => DType::BF16,
        "ByteStorage" => DType::U8,
        "LongStorage" => DType::I64,
        _ => return Ok(None),
    };
    let offset = pickled
        .count(*offset)
        .ok_or("an offset that is no number")?;
    let size = pickled
        .counts(*size)
        .ok_or("a shape of other things than numbers")?;
    let stride = pickled
        .counts(*stride)
        .ok_or("strides that are no numbers")?;
    if size.len() > MAX_RANK || size.len() != stride.len() {
        return Err(format!("{} sizes and {} strides", size.len(), stride.len()));
    }
    let (start, bytes) = storages.storage(name)?;
    let width = dtype.size_in_bytes();
    let values = bytes / width as u64;
    let last = last_value(offset, &size, &stride);
    // Each value may be there once: one that is repeated could fill any memory.
    let count = size
        .iter()
        .try_fold(1u64, |count, size| count.checked_mul(*size as u64));
    let fits = count.is_some_and(|count| count <= values);
    if !fits || last.is_none_or(|last| last > values) {
        return Err(format!(
            "shape {size:?} with strides {stride:?} from {offset} on does not lie in its storage of {values} values"
        ));
    }
    let layout = Layout::new(Shape::from(size), stride, 0);
    if !layout.is_contiguous() && !layout.is_fortran_contiguous() {
        return Err("its values do not lie side by side: save it with .contiguous()".into());
    }
    let start = start + offset as u64 * width as u64;
    Ok(Some(Place {
        dtype,
        layout,
        start,
    }))
}

/// One more than the number of a tensor's last value in its storage; `None` when that is no number.
fn last_value(offset: usize, size: &[usize], stride: &[usize]) -> Option<u64> {
    if size.contains(&0) {
        // Sizes beside a zero would still be multiplied with one another.
        let mut sizes = size.iter().filter(|size| **size > 0);
        sizes.try_fold(1u64, |product, size| product.checked_mul(*size as u64))?;
        return Some(offset as u64);
    }
    let mut last = (offset as u64).checked_add(1)?;
    for (size, stride) in size.iter().zip(stride) {
        last = last.checked_add((*size as u64 - 1).checked_mul(*stride as u64)?)?;
    }
    Some(last)
}

/// The values beside the pickle.
struct Storages {
    zip: ZipArchive<Bounded>,
    folder: String,
    /// Of the file.
    length: u64,
    known: HashMap<String, (u64, u64)>,
}

impl Storages {
    /// Where the storage `name` begins in the file, and its bytes.
    fn storage(&mut self, name: &str) -> Result<(u64, u64), String> {
        if let Some(known) = self.known.get(name) {
            return Ok(*known);
        }
        let found = self.entry(&format!("{}/{name}", self.folder))?;
        self.known.insert(name.to_string(), found);
        Ok(found)
    }

    /// The same of any entry, which torch keeps as it is: nothing packed has to be believed.
    fn entry(&mut self, name: &str) -> Result<(u64, u64), String> {
        let missing = |e: &dyn std::fmt::Display| format!("{name} in the zip file: {e}");
        let index = self.zip.index_for_name(name);
        let index = index.ok_or_else(|| missing(&"it is missing"))?;
        let entry = self.zip.by_index_raw(index).map_err(|e| missing(&e))?;
        if entry.compression() != CompressionMethod::Stored
            || entry.size() != entry.compressed_size()
        {
            return Err(missing(&"it is packed, which torch never does"));
        }
        let (start, size) = (entry.data_start(), entry.size());
        let start = start.ok_or_else(|| missing(&"its place is not known"))?;
        match start.checked_add(size) {
            Some(end) if end <= self.length => Ok((start, size)),
            _ => Err(missing(&format!(
                "{size} bytes, which the file does not have"
            ))),
        }
    }

    /// The bytes of an entry whose size is known to be in bounds.
    fn bytes(&mut self, name: &str) -> std::io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        if let Some(index) = self.zip.index_for_name(name) {
            self.zip.by_index_raw(index)?.read_to_end(&mut bytes)?;
        }
        Ok(bytes)
    }
}
