//! The inner loops of the direct convolution, for AVX-512 and for AVX2 with FMA. Each sum runs in one lane and in the
//! same order with either, so both give the same bytes.

#![cfg_attr(
    not(target_arch = "x86_64"),
    allow(unused, reason = "other machines have no kernels")
)]

#[cfg(target_arch = "x86_64")]
mod x86;

/// The loops for one set of instructions; there is a value only where the machine has them.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Kernels(Set);

#[derive(Clone, Copy, PartialEq, Debug)]
enum Set {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
}

/// Output channels of a narrow block of weights.
const NARROW: usize = 4;

/// Rows that [`Gradients::run`] sums at once.
pub const LINES: usize = 9;

/// Pixels that [`Gradients::run`] sums before it adds to memory: the gradient's part of them stays in the first cache.
const RUN: usize = 128;

/// Elements that a kernel may read beyond the last pixel.
pub const SLACK: usize = 16;

impl Kernels {
    /// Those that this machine can run, the best first.
    #[cfg(target_arch = "x86_64")]
    pub fn all() -> impl Iterator<Item = Self> {
        let narrow = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        let wide = narrow && is_x86_feature_detected!("avx512f");
        let sets = [(wide, Set::Avx512), (narrow, Set::Avx2)];
        sets.into_iter()
            .filter_map(|(has, set)| has.then_some(Self(set)))
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub fn all() -> impl Iterator<Item = Self> {
        std::iter::empty()
    }

    /// First output channel and width of each block of packed weights; the last may reach beyond `outputs`.
    pub fn weight_blocks(self, outputs: usize) -> impl Iterator<Item = (usize, usize)> {
        blocks(outputs, move |left| match self.0 {
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => 8.min(left.next_multiple_of(NARROW)),
            // Two narrow blocks rather than one that is full and one that is nearly empty.
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 if left <= NARROW || left == 2 * NARROW => NARROW,
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => 6,
        })
    }

    /// First output channel and width of each block of a result's gradient; the last may reach beyond `outputs`.
    pub fn gradient_blocks(self, outputs: usize) -> impl Iterator<Item = (usize, usize)> {
        blocks(outputs, move |left| match self.0 {
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => match left {
                ..=8 => 8,
                9..=16 => 16,
                _ => 32,
            },
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => 8,
        })
    }
}

fn blocks(outputs: usize, width: impl Fn(usize) -> usize) -> impl Iterator<Item = (usize, usize)> {
    let mut next = 0;
    std::iter::from_fn(move || {
        let first = next;
        next += width(outputs.checked_sub(first).filter(|left| *left > 0)?);
        Some((first, next - first))
    })
}

/// `out[o][p] = bias[o] + Σ weights[o][c][t] · pixels[c · channel + taps[t] + p]` over channels c and taps t.
pub struct Products<'a> {
    pub pixels: &'a [f32],
    pub channels: usize,
    pub channel: usize,
    pub taps: &'a [usize],
    /// Blocks of (weights of an output channel, width), as [`Kernels::weight_blocks`] says.
    pub weights: &'a [f32],
    /// Weights of an output channel in a block.
    pub depth: usize,
    /// How many of them belong to channels before these.
    pub skipped: usize,
    /// None: the sums are added to what `out` has.
    pub bias: Option<&'a [f32]>,
    pub outputs: usize,
    /// Pixels of each output channel.
    pub count: usize,
    /// From one output channel to the next.
    pub stride: usize,
}

impl Products<'_> {
    /// # Safety
    /// `out` must be valid for writes (and reads, if there is no bias) of `count` elements at each multiple of `stride`
    /// below `outputs · stride`, and nobody else may touch those during the call.
    pub unsafe fn run(&self, kernels: Kernels, out: *mut f32) {
        let last = self.taps.iter().max().copied().unwrap_or(0);
        let read = self.channels.saturating_sub(1) * self.channel + last + self.count + SLACK;
        let used = self.skipped + self.channels * self.taps.len();
        let padded: usize = kernels
            .weight_blocks(self.outputs)
            .map(|(_, width)| width)
            .sum();
        assert!(
            read <= self.pixels.len()
                && used <= self.depth
                && padded * self.depth <= self.weights.len()
                && self.bias.is_none_or(|bias| bias.len() >= self.outputs),
            "a direct convolution outside its buffers"
        );
        match kernels.0 {
            // SAFETY: the assertion above, this function's contract and that of `Kernels`.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => unsafe { x86::products_avx512(self, out) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => unsafe { x86::products_avx2(self, out) },
        }
    }
}

/// `sums[l][o] += Σ pixels[lines[l] + p] · gradient[p][o]` over pixels p.
pub struct Gradients<'a> {
    pub pixels: &'a [f32],
    /// A multiple of [`LINES`].
    pub lines: &'a [usize],
    /// Blocks of (pixels, width), as [`Kernels::gradient_blocks`] says.
    pub gradient: &'a [f32],
    pub outputs: usize,
    pub count: usize,
}

impl Gradients<'_> {
    /// `sums` has blocks of (lines, width).
    pub fn run(&self, kernels: Kernels, sums: &mut [f32]) {
        let widths = kernels
            .gradient_blocks(self.outputs)
            .map(|(_, width)| width);
        let padded: usize = widths.sum();
        let last = self.lines.iter().max().copied().unwrap_or(0);
        assert!(
            last + self.count <= self.pixels.len()
                && self.lines.len().is_multiple_of(LINES)
                && padded * self.count <= self.gradient.len()
                && padded * self.lines.len() <= sums.len(),
            "a direct convolution's gradient outside its buffers"
        );
        match kernels.0 {
            // SAFETY: the assertion above, this function's contract and that of `Kernels`.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => unsafe { x86::gradients_avx512(self, sums.as_mut_ptr()) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => unsafe { x86::gradients_avx2(self, sums.as_mut_ptr()) },
        }
    }
}

/// `to[c · to_stride + r] = from[r · from_stride + c]` for `rows` r and `columns` c.
pub fn transpose(
    kernels: Kernels,
    (from, from_stride): (&[f32], usize),
    (rows, columns): (usize, usize),
    (to, to_stride): (&mut [f32], usize),
) {
    if rows == 0 || columns == 0 {
        return;
    }
    assert!(
        (rows - 1) * from_stride + columns <= from.len()
            && (columns - 1) * to_stride + rows <= to.len(),
        "a transposition outside its buffers"
    );
    let (from, to) = (from.as_ptr(), to.as_mut_ptr());
    match kernels.0 {
        // SAFETY: the assertion above; the machine has the instructions.
        #[cfg(target_arch = "x86_64")]
        Set::Avx512 | Set::Avx2 => unsafe {
            x86::transpose(from, from_stride, rows, columns, to, to_stride);
        },
    }
}
