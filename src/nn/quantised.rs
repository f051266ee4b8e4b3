//! Frozen matrices of GGUF files, which stay as they are packed: rows of blocks, each some small whole numbers with a
//! scale. They are unpacked to f32 piece by piece where they are multiplied, by candle's own code for each kind, so
//! results are those of the unpacked matrix in f32.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use candle_core::quantized::k_quants::{
    BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K,
    BlockQ8_0, GgmlType,
};
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;
use rayon::prelude::*;

use crate::Result;

/// Rows that are unpacked by one thread at a time.
const ROWS: usize = 16;

/// What blocks lie in on the CPU.
#[derive(Clone)]
pub(super) enum Bytes {
    /// A mapped file.
    Mapped(Arc<Mmap>),
    /// Memory.
    Held(Arc<Vec<u8>>),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Mapped(file) => file,
            Bytes::Held(bytes) => bytes,
        }
    }
}

/// Where the blocks lie.
#[derive(Clone)]
enum Blocks {
    /// On the CPU: parts of these bytes, one after another, each some whole rows.
    Here(Bytes, Vec<Range<usize>>),
    /// On a card.
    Card(Arc<QTensor>),
}

/// A frozen matrix in blocks of few bits.
#[derive(Clone)]
pub struct QuantisedMatrix {
    blocks: Blocks,
    kind: GgmlDType,
    rows: usize,
    columns: usize,
}

impl QuantisedMatrix {
    /// The numbers of `matrix` packed as `kind`, on the CPU.
    ///
    /// # Errors
    /// When rows are not whole blocks.
    pub fn pack(matrix: &Tensor, kind: GgmlDType) -> Result<Self> {
        let dims = matrix.dims2()?;
        let packed = QTensor::quantize(matrix, kind)?;
        let bytes = packed.data()?.into_owned();
        let parts = std::iter::once(0..bytes.len()).collect();
        Self::new(
            &Bytes::Held(Arc::new(bytes)),
            parts,
            kind,
            dims,
            &Device::Cpu,
        )
    }

    /// The matrix (`rows`, `columns`) whose rows lie in `parts` of `file`, one after another, on `device`.
    ///
    /// # Errors
    /// When the parts are not as long as the matrix, or do not lie where blocks can.
    pub(super) fn new(
        file: &Bytes,
        parts: Vec<Range<usize>>,
        kind: GgmlDType,
        (rows, columns): (usize, usize),
        device: &Device,
    ) -> Result<Self> {
        let row = columns / kind.block_size() * kind.type_size();
        let there: usize = parts.iter().map(Range::len).sum();
        let fits = columns.is_multiple_of(kind.block_size())
            && there == rows * row
            && parts.iter().all(|part| {
                let whole = row == 0 || part.len().is_multiple_of(row);
                whole && part.start.is_multiple_of(align_of::<BlockQ8_0>())
            });
        if !fits {
            return Err(crate::Error::Invalid {
                what: format!("{there} bytes of {kind:?} for a matrix ({rows}, {columns})"),
                hint: None,
            });
        }
        let blocks = match device.is_cpu() {
            true => Blocks::Here(file.clone(), parts),
            false => {
                let bytes = match parts.as_slice() {
                    [one] => Cow::Borrowed(&file[one.clone()]),
                    more => Cow::Owned(
                        more.iter()
                            .flat_map(|part| &file[part.clone()])
                            .copied()
                            .collect(),
                    ),
                };
                let storage = QStorage::from_data(bytes, device, kind)?;
                Blocks::Card(Arc::new(QTensor::new(storage, (rows, columns))?))
            }
        };
        Ok(Self {
            blocks,
            kind,
            rows,
            columns,
        })
    }

    /// How the numbers are packed.
    pub fn kind(&self) -> GgmlDType {
        self.kind
    }

    /// (rows, columns).
    pub fn dims2(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    /// Elements that are unpacked together: pieces of a row start and end at multiples of this.
    pub(super) fn block(&self) -> usize {
        self.kind.block_size()
    }

    /// Unpacks the values from number `start` on into `out`; both are whole blocks. On the CPU alone.
    pub(super) fn unpack(&self, start: usize, out: &mut [f32]) -> candle_core::Result<()> {
        let Blocks::Here(file, parts) = &self.blocks else {
            candle_core::bail!("a matrix on a card was to be unpacked on the CPU");
        };
        let bytes_of = |elements: usize| elements / self.block() * self.kind.type_size();
        let (mut skipped, mut out) = (bytes_of(start), out);
        for part in parts {
            if skipped >= part.len() {
                skipped -= part.len();
                continue;
            }
            let bytes = &file[part.start + skipped..part.end];
            let bytes = &bytes[..bytes.len().min(bytes_of(out.len()))];
            let count = bytes.len() / self.kind.type_size() * self.block();
            let (now, later) = std::mem::take(&mut out).split_at_mut(count);
            unpack(self.kind, bytes, now)?;
            (skipped, out) = (0, later);
        }
        match out.is_empty() {
            true => Ok(()),
            false => candle_core::bail!("{} values behind the end of a matrix", out.len()),
        }
    }

    /// The matrix in f32, (rows, columns).
    pub fn to_tensor(&self) -> Result<Tensor> {
        if let Blocks::Card(packed) = &self.blocks {
            return Ok(packed.dequantize(&packed.device())?);
        }
        let mut values = vec![0.0; self.rows * self.columns];
        let piece = (ROWS * self.columns).max(1);
        values
            .par_chunks_mut(piece)
            .enumerate()
            .try_for_each(|(i, out)| self.unpack(i * piece, out))?;
        Ok(Tensor::from_vec(
            values,
            (self.rows, self.columns),
            &Device::Cpu,
        )?)
    }

    /// The matrix in `dtype`, for operations of cards.
    pub(super) fn to_dtype(&self, dtype: DType) -> Result<Tensor> {
        if let (Blocks::Card(packed), DType::F16) = (&self.blocks, dtype) {
            return Ok(packed.dequantize_f16(&packed.device())?);
        }
        Ok(self.to_tensor()?.to_dtype(dtype)?)
    }
}

impl std::fmt::Debug for QuantisedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} {} x {}", self.kind, self.rows, self.columns)
    }
}

/// The values of whole blocks of a kind. `bytes` lie at an even address.
pub(super) fn unpack(kind: GgmlDType, bytes: &[u8], out: &mut [f32]) -> candle_core::Result<()> {
    match kind {
        GgmlDType::Q4_0 => blocks::<BlockQ4_0>(bytes, out),
        GgmlDType::Q4_1 => blocks::<BlockQ4_1>(bytes, out),
        GgmlDType::Q5_0 => blocks::<BlockQ5_0>(bytes, out),
        GgmlDType::Q5_1 => blocks::<BlockQ5_1>(bytes, out),
        GgmlDType::Q8_0 => blocks::<BlockQ8_0>(bytes, out),
        GgmlDType::Q2K => blocks::<BlockQ2K>(bytes, out),
        GgmlDType::Q3K => blocks::<BlockQ3K>(bytes, out),
        GgmlDType::Q4K => blocks::<BlockQ4K>(bytes, out),
        GgmlDType::Q5K => blocks::<BlockQ5K>(bytes, out),
        GgmlDType::Q6K => blocks::<BlockQ6K>(bytes, out),
        other => candle_core::bail!("matrices of {other:?} are not read in blocks"),
    }
}

fn blocks<B: GgmlType>(bytes: &[u8], out: &mut [f32]) -> candle_core::Result<()> {
    // SAFETY: blocks are plain numbers, for which every bit pattern is one.
    let (before, blocks, behind) = unsafe { bytes.align_to::<B>() };
    if !before.is_empty() || !behind.is_empty() || blocks.len() * B::BLCK_SIZE != out.len() {
        candle_core::bail!("{} bytes for {} values in blocks", bytes.len(), out.len());
    }
    B::to_float(blocks, out);
    Ok(())
}
