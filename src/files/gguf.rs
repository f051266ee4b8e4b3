//! Headers of GGUF files: what llama.cpp, ComfyUI-GGUF and stable-diffusion.cpp write quantised models to.
//! Format: `docs/gguf.md` of ggml-org/ggml. Nothing is believed before it is checked against the file's length.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use candle_core::quantized::GgmlDType;

/// Arrays in arrays; nobody writes deeper ones.
const DEEPEST: usize = 4;

/// Numbers of an array that are kept: shapes. Longer ones are vocabularies.
const KEPT: usize = 8;

/// Dimensions of a tensor in ggml.
const DIMENSIONS: usize = 4;

/// An entry of a header, as far as somebody here asks for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    Text(String),
    Whole(u64),
    /// A short array of whole numbers.
    Wholes(Vec<u64>),
    /// Anything else.
    Other,
}

/// Where a tensor lies in its file and what it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Outermost dimension first, as safetensors have them.
    pub dims: Vec<usize>,
    /// How its numbers are packed; one of [`READ`].
    pub kind: GgmlDType,
    /// Its bytes in the file.
    pub bytes: Range<usize>,
}

/// What a GGUF file says before its tensors' numbers.
#[derive(Debug, Clone, Default)]
pub struct Header {
    pub entries: BTreeMap<String, Entry>,
    pub tensors: BTreeMap<String, Place>,
}

/// The kinds of tensors that are read, with ggml's numbers for them.
pub const READ: [(u32, GgmlDType); 13] = [
    (0, GgmlDType::F32),
    (1, GgmlDType::F16),
    (2, GgmlDType::Q4_0),
    (3, GgmlDType::Q4_1),
    (6, GgmlDType::Q5_0),
    (7, GgmlDType::Q5_1),
    (8, GgmlDType::Q8_0),
    (10, GgmlDType::Q2K),
    (11, GgmlDType::Q3K),
    (12, GgmlDType::Q4K),
    (13, GgmlDType::Q5K),
    (14, GgmlDType::Q6K),
    (30, GgmlDType::BF16),
];

/// Reads the header of the file whose whole content is `file`.
///
/// # Errors
/// What is wrong with it, in words: another format or version, an end too soon, counts or sizes beyond the file, kinds of
/// tensors that are not read.
pub fn header(file: &[u8]) -> Result<Header, String> {
    let mut reader = Reader { file, at: 0 };
    if reader.take(4)? != b"GGUF" {
        return Err("it does not start with GGUF".to_string());
    }
    match reader.number(4)? {
        2 | 3 => {}
        version if version > 0xffff => return Err("numbers in it are big-endian".to_string()),
        version => return Err(format!("version {version}; 2 and 3 are read")),
    }
    let (tensors, entries) = (reader.number(8)?, reader.number(8)?);
    let mut header = Header::default();
    for _ in 0..entries {
        let key = reader.text()?;
        let kind = reader.number(4)?;
        let entry = reader.entry(kind, 0).map_err(|e| format!("{key}: {e}"))?;
        header.entries.insert(key, entry);
    }
    let alignment = match header.entries.get("general.alignment") {
        None => 32,
        Some(Entry::Whole(alignment)) if alignment.is_power_of_two() && *alignment >= 8 => {
            usize::try_from(*alignment).map_err(|e| e.to_string())?
        }
        Some(other) => return Err(format!("general.alignment is {other:?}")),
    };
    let mut found = Vec::new();
    for _ in 0..tensors {
        found.push(reader.tensor()?);
    }
    let start = reader.at.checked_next_multiple_of(alignment);
    let start = start.ok_or("its header is larger than any memory")?;
    let mut names = BTreeSet::new();
    for (name, mut place) in found {
        let fault = |what: &str| format!("{name} {what}");
        let (from, length) = (place.bytes.start, place.bytes.len());
        if !from.is_multiple_of(alignment) {
            return Err(fault("does not lie at a multiple of the alignment"));
        }
        let from = start.checked_add(from);
        let until = from.and_then(|from| from.checked_add(length));
        match (from, until) {
            (Some(from), Some(until)) if until <= file.len() => place.bytes = from..until,
            _ => return Err(fault("ends behind the end of the file")),
        }
        if let Some(dims) = header.original_shape(&name, &place.dims) {
            place.dims = dims;
        }
        if !names.insert(name.clone()) {
            return Err(fault("is there twice"));
        }
        header.tensors.insert(name, place);
    }
    Ok(header)
}

impl Header {
    /// The shape of a tensor that was written in another one for its rows to be whole blocks: ComfyUI-GGUF notes it.
    fn original_shape(&self, name: &str, dims: &[usize]) -> Option<Vec<usize>> {
        let noted = self.entries.get(&format!("comfy.gguf.orig_shape.{name}"))?;
        let Entry::Wholes(noted) = noted else {
            return None;
        };
        let product = noted
            .iter()
            .try_fold(1u64, |all, dim| all.checked_mul(*dim))?;
        let same = product == dims.iter().map(|dim| *dim as u64).product::<u64>();
        same.then(|| noted.iter().map(|dim| *dim as usize).collect())
    }

    /// What `general.architecture` says, for example `flux`.
    pub fn architecture(&self) -> Option<&str> {
        match self.entries.get("general.architecture")? {
            Entry::Text(text) => Some(text),
            _ => None,
        }
    }
}

struct Reader<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], String> {
        let rest = &self.file[self.at..];
        let taken = rest.get(..length).ok_or_else(|| {
            format!(
                "{length} bytes are announced at byte {}, and {} follow",
                self.at,
                rest.len()
            )
        })?;
        self.at += length;
        Ok(taken)
    }

    /// A whole number of so many `bytes`, at most 8, without a sign.
    fn number(&mut self, bytes: usize) -> Result<u64, String> {
        let taken = self.take(bytes)?;
        Ok(taken
            .iter()
            .rev()
            .fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    fn length(&mut self) -> Result<usize, String> {
        let length = self.number(8)?;
        usize::try_from(length).map_err(|_| format!("a length of {length}"))
    }

    fn text(&mut self) -> Result<String, String> {
        let length = self.length()?;
        Ok(String::from_utf8_lossy(self.take(length)?).into_owned())
    }

    fn entry(&mut self, kind: u64, depth: usize) -> Result<Entry, String> {
        Ok(match (kind, size_of(kind)) {
            // Signed and unsigned numbers and truth values alike: nothing that is asked for is negative.
            (0..=5 | 7 | 10 | 11, Some(size)) => Entry::Whole(self.number(size)?),
            (_, Some(size)) => {
                self.take(size)?;
                Entry::Other
            }
            (8, _) => Entry::Text(self.text()?),
            (9, _) if depth < DEEPEST => {
                let kind = self.number(4)?;
                let count = self.length()?;
                self.array(kind, count, depth)?
            }
            (9, _) => return Err(format!("arrays in more than {DEEPEST} arrays")),
            (kind, _) => return Err(format!("an entry of kind {kind}")),
        })
    }

    fn array(&mut self, kind: u64, count: usize, depth: usize) -> Result<Entry, String> {
        if let (Some(size), true) = (size_of(kind), count > KEPT) {
            self.take(count.checked_mul(size).ok_or("an array beyond any file")?)?;
            return Ok(Entry::Other);
        }
        let mut wholes = Vec::new();
        for _ in 0..count {
            if let (Entry::Whole(number), true) = (self.entry(kind, depth + 1)?, count <= KEPT) {
                wholes.push(number);
            }
        }
        match wholes.len() == count && count > 0 {
            true => Ok(Entry::Wholes(wholes)),
            false => Ok(Entry::Other),
        }
    }

    /// A tensor, whose bytes start at its offset from the first one's.
    fn tensor(&mut self) -> Result<(String, Place), String> {
        let name = self.text()?;
        let fault = |what: String| format!("{name} {what}");
        let rank = self.number(4)? as usize;
        if rank > DIMENSIONS {
            return Err(fault(format!("has {rank} dimensions")));
        }
        let mut dims = Vec::new();
        for _ in 0..rank {
            dims.insert(0, self.length()?);
        }
        if dims.contains(&0) {
            return Err(fault(format!("has no numbers: its shape is {dims:?}")));
        }
        let number = self.number(4)?;
        let known = READ.iter().find(|(known, _)| u64::from(*known) == number);
        let Some((_, kind)) = known else {
            let read: Vec<String> = READ.iter().map(|(_, kind)| format!("{kind:?}")).collect();
            let read = read.join(", ");
            return Err(fault(format!(
                "is of ggml's kind {number}; read are {read}"
            )));
        };
        let offset = self.length()?;
        let row = dims.last().copied().unwrap_or(1);
        if !row.is_multiple_of(kind.block_size()) {
            let block = kind.block_size();
            return Err(fault(format!(
                "has rows of {row} numbers, and {kind:?} has blocks of {block}"
            )));
        }
        let elements = dims
            .iter()
            .try_fold(1usize, |all, dim| all.checked_mul(*dim));
        let size = elements
            .and_then(|elements| (elements / kind.block_size()).checked_mul(kind.type_size()));
        let until = size.and_then(|size| offset.checked_add(size));
        match until {
            Some(until) => Ok((
                name,
                Place {
                    dims,
                    kind: *kind,
                    bytes: offset..until,
                },
            )),
            None => Err(fault(format!("of {dims:?} is larger than any file"))),
        }
    }
}

/// Bytes of an entry of a kind whose entries all have the same size.
fn size_of(kind: u64) -> Option<usize> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}
