//! Keys and values of sequences that are being sampled. Each sequence has a length of its own.

use candle_core::{DType, Device, Tensor};

use crate::{Error, Result};

/// Keys and values of one sequence in one layer, each (1, kv_heads, capacity, head_dim).
pub(super) struct RowCache {
    keys: Tensor,
    values: Tensor,
}

impl RowCache {
    /// Writes `k` and `v` (1, h, n, d) at `position` and returns everything up to their end.
    pub fn extend(&self, k: &Tensor, v: &Tensor, position: usize) -> Result<(Tensor, Tensor)> {
        let length = position + k.dim(2)?;
        self.keys.slice_set(&k.contiguous()?, 2, position)?;
        self.values.slice_set(&v.contiguous()?, 2, position)?;
        Ok((
            self.keys.narrow(2, 0, length)?,
            self.values.narrow(2, 0, length)?,
        ))
    }
}

/// The new tokens of one sequence among those of all.
pub(super) struct Segment {
    /// Which sequence.
    pub row: usize,
    /// Place of its first new token among all new tokens, and their number.
    pub start: usize,
    pub count: usize,
    /// Position of its first new token in the sequence.
    pub position: usize,
}

impl Segment {
    /// Positions of its new tokens.
    pub fn positions(&self) -> impl Iterator<Item = u32> + use<> {
        let first = self.position as u32;
        first..first + self.count as u32
    }

    /// Place of its last new token among all new tokens.
    pub fn last(&self) -> u32 {
        (self.start + self.count - 1) as u32
    }
}

/// Keys and values of several sequences in all layers, with room for a fixed number of tokens each.
pub struct Cache {
    layers: Vec<Vec<RowCache>>,
    lengths: Vec<usize>,
    capacity: usize,
}

impl Cache {
    pub(super) fn new(
        rows: usize,
        layers: usize,
        shape: (usize, usize, usize, usize),
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let row = |_| {
            Ok(RowCache {
                keys: Tensor::zeros(shape, dtype, device)?,
                values: Tensor::zeros(shape, dtype, device)?,
            })
        };
        let layers = (0..layers)
            .map(|_| (0..rows).map(row).collect())
            .collect::<Result<_>>()?;
        Ok(Self {
            layers,
            lengths: vec![0; rows],
            capacity: shape.2,
        })
    }

    pub(super) fn layers(&self) -> &[Vec<RowCache>] {
        &self.layers
    }

    /// Number of tokens that each sequence holds.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// Where the new `tokens` of each sequence go.
    pub(super) fn segments(&self, tokens: &[Vec<u32>]) -> Result<Vec<Segment>> {
        let longest = tokens.iter().zip(&self.lengths).map(|(t, l)| t.len() + l);
        if tokens.len() != self.lengths.len() || longest.max() > Some(self.capacity) {
            return Err(Error::invalid(
                format!("tokens for {} sequences of a cache", tokens.len()),
                format!(
                    "the cache holds {} sequences of at most {} tokens",
                    self.lengths.len(),
                    self.capacity
                ),
            ));
        }
        let mut start = 0;
        let mut segments = Vec::new();
        for (row, tokens) in tokens.iter().enumerate().filter(|(_, t)| !t.is_empty()) {
            segments.push(Segment {
                row,
                start,
                count: tokens.len(),
                position: self.lengths[row],
            });
            start += tokens.len();
        }
        if segments.is_empty() {
            return Err(Error::invalid(
                "no tokens for any sequence of a cache",
                "give at least one",
            ));
        }
        Ok(segments)
    }

    pub(super) fn advance(&mut self, tokens: &[Vec<u32>]) {
        for (length, tokens) in self.lengths.iter_mut().zip(tokens) {
            *length += tokens.len();
        }
    }
}
