//! The loops in AVX-512 and in AVX2 with FMA.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::{Gradients, Kernels, LINES, NARROW, Products, RUN, Set};

/// A register of f32.
///
/// # Safety
/// Of every function: the machine must have the instructions, and pointers must be valid for [`Self::LANES`]
/// elements.
trait Vector: Copy {
    const LANES: usize;
    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn plus(self, other: Self) -> Self;
    /// `self · factor + sum`.
    unsafe fn times_plus(self, factor: Self, sum: Self) -> Self;
    /// [`sum_tile`] with the instructions of this register.
    unsafe fn sum_tile<const O: usize, const N: usize>(
        job: &Products,
        first: usize,
        pixel: usize,
        to: &mut Sums,
    );
}

#[rustfmt::skip]
impl Vector for __m512 {
    const LANES: usize = 16;
    #[inline(always)]
    // SAFETY: this and those below by the trait's contract.
    unsafe fn splat(value: f32) -> Self { unsafe { _mm512_set1_ps(value) } }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self { unsafe { _mm512_loadu_ps(from) } }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) { unsafe { _mm512_storeu_ps(to, self) } }
    #[inline(always)]
    unsafe fn plus(self, other: Self) -> Self { unsafe { _mm512_add_ps(self, other) } }
    #[inline(always)]
    unsafe fn times_plus(self, factor: Self, sum: Self) -> Self { unsafe { _mm512_fmadd_ps(self, factor, sum) } }
    #[inline(always)]
    unsafe fn sum_tile<const O: usize, const N: usize>(job: &Products, first: usize, pixel: usize, to: &mut Sums) {
        unsafe { sum_tile_avx512::<O, N>(job, first, pixel, to) }
    }
}

#[rustfmt::skip]
impl Vector for __m256 {
    const LANES: usize = 8;
    #[inline(always)]
    // SAFETY: this and those below by the trait's contract.
    unsafe fn splat(value: f32) -> Self { unsafe { _mm256_set1_ps(value) } }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self { unsafe { _mm256_loadu_ps(from) } }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) { unsafe { _mm256_storeu_ps(to, self) } }
    #[inline(always)]
    unsafe fn plus(self, other: Self) -> Self { unsafe { _mm256_add_ps(self, other) } }
    #[inline(always)]
    unsafe fn times_plus(self, factor: Self, sum: Self) -> Self { unsafe { _mm256_fmadd_ps(self, factor, sum) } }
    #[inline(always)]
    unsafe fn sum_tile<const O: usize, const N: usize>(job: &Products, first: usize, pixel: usize, to: &mut Sums) {
        unsafe { sum_tile_avx2::<O, N>(job, first, pixel, to) }
    }
}

/// # Safety
/// As for [`Products::run`], after its assertion.
#[target_feature(enable = "avx512f,avx2,fma")]
pub unsafe fn products_avx512(job: &Products, out: *mut f32) {
    // 24 of the 32 registers are sums.
    // SAFETY: this function's contract.
    unsafe { products::<__m512, 8, 3>(job, Kernels(Set::Avx512), out) }
}

/// # Safety
/// As for [`Products::run`], after its assertion.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn products_avx2(job: &Products, out: *mut f32) {
    // 12 of the 16 registers are sums.
    // SAFETY: this function's contract.
    unsafe { products::<__m256, 6, 2>(job, Kernels(Set::Avx2), out) }
}

/// Tiles of O output channels and N registers of pixels; an output block's weights stay in the first cache.
#[inline(always)]
unsafe fn products<V: Vector, const O: usize, const N: usize>(
    job: &Products,
    kernels: Kernels,
    out: *mut f32,
) {
    for (first, width) in kernels.weight_blocks(job.outputs) {
        let mut pixel = 0;
        while pixel < job.count {
            let vectors = (job.count - pixel).div_ceil(V::LANES);
            // SAFETY: the contract of `Products::run`: the tile begins within the output.
            let taken = unsafe {
                match (width == NARROW, vectors) {
                    (true, 1) => tile::<V, NARROW, 1>(job, first, pixel, out),
                    (true, _) => tile::<V, NARROW, 2>(job, first, pixel, out),
                    (false, 1) => tile::<V, O, 1>(job, first, pixel, out),
                    (false, vectors) if vectors < N => tile::<V, O, 2>(job, first, pixel, out),
                    (false, _) => tile::<V, O, N>(job, first, pixel, out),
                }
            };
            pixel += taken;
        }
    }
}

/// One tile; gives the number of its pixels.
#[inline(always)]
unsafe fn tile<V: Vector, const O: usize, const N: usize>(
    job: &Products,
    first: usize,
    pixel: usize,
    out: *mut f32,
) -> usize {
    let width = N * V::LANES;
    let mut sums = Sums(MaybeUninit::uninit());
    // SAFETY: by the assertion in `Products::run`; the tile reads less than one register beyond `count`, and fills
    // O·width sums.
    let sums = unsafe {
        V::sum_tile::<O, N>(job, first, pixel, &mut sums);
        std::slice::from_raw_parts(sums.0.as_ptr().cast::<f32>(), O * width)
    };
    let taken = (job.count - pixel).min(width);
    let outputs = O.min(job.outputs - first);
    for (o, sums) in sums.chunks_exact(width).enumerate().take(outputs) {
        let bias = job.bias.map(|bias| bias[first + o]);
        // SAFETY: the contract of `Products::run`; the pixels of a full tile are N registers.
        unsafe {
            let out = out.add((first + o) * job.stride + pixel);
            if taken < width {
                for (i, sum) in sums.iter().enumerate().take(taken) {
                    let out = out.add(i);
                    *out = sum + bias.unwrap_or_else(|| *out);
                }
                continue;
            }
            for n in 0..N {
                let out = out.add(n * V::LANES);
                let add = bias.map_or_else(|| V::load(out), |bias| V::splat(bias));
                V::load(sums.as_ptr().add(n * V::LANES))
                    .plus(add)
                    .store(out);
            }
        }
    }
    taken
}

/// The sums of one tile, for each output channel those of all pixels.
#[repr(align(64))]
struct Sums(MaybeUninit<[f32; 8 * 3 * 16]>);

/// The sums of [`tile`]. With indices rather than iterators the compiler keeps all of them in registers.
#[expect(clippy::needless_range_loop)]
#[inline(always)]
unsafe fn sum_tile<V: Vector, const O: usize, const N: usize>(
    job: &Products,
    first: usize,
    pixel: usize,
    to: &mut Sums,
) {
    // SAFETY: weights and pixels lie within their slices by the assertion in `Products::run`; O·N registers fit in
    // `to`.
    unsafe {
        let mut sums = [[V::splat(0.0); N]; O];
        let mut weights = job
            .weights
            .as_ptr()
            .add(first * job.depth + job.skipped * O);
        let mut channel = job.pixels.as_ptr().add(pixel);
        for _ in 0..job.channels {
            for tap in job.taps {
                let from = channel.add(*tap);
                let mut x = [V::splat(0.0); N];
                for n in 0..N {
                    x[n] = V::load(from.add(n * V::LANES));
                }
                for o in 0..O {
                    let weight = V::splat(*weights.add(o));
                    for n in 0..N {
                        sums[o][n] = weight.times_plus(x[n], sums[o][n]);
                    }
                }
                weights = weights.add(O);
            }
            channel = channel.wrapping_add(job.channel);
        }
        for o in 0..O {
            for n in 0..N {
                let to = to.0.as_mut_ptr().cast::<f32>();
                sums[o][n].store(to.add((o * N + n) * V::LANES));
            }
        }
    }
}

/// [`sum_tile`] as a function of its own, lest the compiler lets go of registers for what is around it.
///
/// # Safety
/// As for [`Products::run`], after its assertion.
#[inline(never)]
#[target_feature(enable = "avx512f,avx2,fma")]
unsafe fn sum_tile_avx512<const O: usize, const N: usize>(
    job: &Products,
    first: usize,
    pixel: usize,
    to: &mut Sums,
) {
    // SAFETY: this function's contract.
    unsafe { sum_tile::<__m512, O, N>(job, first, pixel, to) }
}

/// As [`sum_tile_avx512`].
///
/// # Safety
/// As for [`Products::run`], after its assertion.
#[inline(never)]
#[target_feature(enable = "avx2,fma")]
unsafe fn sum_tile_avx2<const O: usize, const N: usize>(
    job: &Products,
    first: usize,
    pixel: usize,
    to: &mut Sums,
) {
    // SAFETY: this function's contract.
    unsafe { sum_tile::<__m256, O, N>(job, first, pixel, to) }
}

/// # Safety
/// As for [`Gradients::run`], after its assertion.
#[target_feature(enable = "avx512f,avx2,fma")]
pub unsafe fn gradients_avx512(job: &Gradients, sums: *mut f32) {
    // SAFETY: this function's contract; the widths are those of `Kernels::gradient_blocks`.
    unsafe {
        gradients(job, Kernels(Set::Avx512), sums, |run, width| match width {
            32 => lines::<__m512, 2>(run),
            16 => lines::<__m512, 1>(run),
            _ => lines::<__m256, 1>(run),
        });
    }
}

/// # Safety
/// As for [`Gradients::run`], after its assertion.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn gradients_avx2(job: &Gradients, sums: *mut f32) {
    // SAFETY: this function's contract; the widths are those of `Kernels::gradient_blocks`.
    unsafe {
        gradients(job, Kernels(Set::Avx2), sums, |run, _| {
            lines::<__m256, 1>(run)
        })
    }
}

/// Some pixels of all lines and of one block.
struct Run<'a> {
    pixels: *const f32,
    lines: &'a [[usize; LINES]],
    gradient: *const f32,
    sums: *mut f32,
    count: usize,
}

#[inline(always)]
unsafe fn gradients(job: &Gradients, kernels: Kernels, sums: *mut f32, body: impl Fn(&Run, usize)) {
    let (lines, _) = job.lines.as_chunks::<LINES>();
    for from in (0..job.count).step_by(RUN) {
        let count = (job.count - from).min(RUN);
        for (first, width) in kernels.gradient_blocks(job.outputs) {
            // SAFETY: the assertion in `Gradients::run`.
            let run = unsafe {
                Run {
                    pixels: job.pixels.as_ptr().add(from),
                    lines,
                    gradient: job.gradient.as_ptr().add(first * job.count + from * width),
                    sums: sums.add(first * job.lines.len()),
                    count,
                }
            };
            body(&run, width);
        }
    }
}

/// Up to 18 registers are sums.
#[inline(always)]
unsafe fn lines<V: Vector, const N: usize>(run: &Run) {
    let mut to = run.sums;
    for lines in run.lines {
        // SAFETY: the assertion in `Gradients::run`.
        unsafe {
            let mut sums = [[V::splat(0.0); N]; LINES];
            let mut from = [run.pixels; LINES];
            for (from, line) in from.iter_mut().zip(lines) {
                *from = from.add(*line);
            }
            for pixel in 0..run.count {
                let gradient = run.gradient.add(pixel * N * V::LANES);
                let mut g = [V::splat(0.0); N];
                for (n, g) in g.iter_mut().enumerate() {
                    *g = V::load(gradient.add(n * V::LANES));
                }
                for (sums, from) in sums.iter_mut().zip(from) {
                    let x = V::splat(*from.add(pixel));
                    for (sum, g) in sums.iter_mut().zip(g) {
                        *sum = x.times_plus(g, *sum);
                    }
                }
            }
            for sum in sums.as_flattened() {
                V::load(to).plus(*sum).store(to);
                to = to.add(V::LANES);
            }
        }
    }
}

/// # Safety
/// As for [`super::transpose`], after its assertion.
#[target_feature(enable = "avx2")]
pub unsafe fn transpose(
    from: *const f32,
    from_stride: usize,
    rows: usize,
    columns: usize,
    to: *mut f32,
    to_stride: usize,
) {
    for c in (0..columns).step_by(8) {
        for r in (0..rows).step_by(8) {
            // SAFETY: this function's contract.
            unsafe {
                let (from, to) = (from.add(r * from_stride + c), to.add(c * to_stride + r));
                let (rows, columns) = (rows - r, columns - c);
                if rows >= 8 && columns >= 8 {
                    turn(from, from_stride, to, to_stride);
                    continue;
                }
                for r in 0..rows.min(8) {
                    for c in 0..columns.min(8) {
                        *to.add(c * to_stride + r) = *from.add(r * from_stride + c);
                    }
                }
            }
        }
    }
}

/// Eight rows and eight columns of [`transpose`].
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn turn(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
    // SAFETY: the contract of `transpose`.
    unsafe {
        let mut rows = [_mm256_setzero_ps(); 8];
        for (r, row) in rows.iter_mut().enumerate() {
            *row = _mm256_loadu_ps(from.add(r * from_stride));
        }
        for half in 0..2 {
            let [a, b, c, d] = [0, 1, 2, 3].map(|i| {
                let (one, two) = (rows[i], rows[i + 4]);
                if half == 0 {
                    _mm256_permute2f128_ps::<0x20>(one, two)
                } else {
                    _mm256_permute2f128_ps::<0x31>(one, two)
                }
            });
            let (ab, cd) = (_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d));
            let to = to.add(half * 4 * to_stride);
            _mm256_storeu_ps(to, _mm256_shuffle_ps::<0x44>(ab, cd));
            _mm256_storeu_ps(to.add(to_stride), _mm256_shuffle_ps::<0xee>(ab, cd));
            let (ab, cd) = (_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d));
            _mm256_storeu_ps(to.add(2 * to_stride), _mm256_shuffle_ps::<0x44>(ab, cd));
            _mm256_storeu_ps(to.add(3 * to_stride), _mm256_shuffle_ps::<0xee>(ab, cd));
        }
    }
}
