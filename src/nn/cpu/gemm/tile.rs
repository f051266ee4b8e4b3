//! The inner kernels: a tile of the result stays in registers while a panel of the right matrix streams by.

use std::arch::is_x86_feature_detected;
use std::arch::x86_64::*;
use std::sync::LazyLock;

use super::lanes::Lanes;

/// Vectors in a row of a tile.
pub const VECTORS: usize = 3;

/// Some rows of a left matrix and a panel of a right one.
#[derive(Clone, Copy)]
pub struct Strips {
    /// Element (r, k) is at `r · a_row + k · a_step`.
    pub a: *const f32,
    pub a_row: usize,
    pub a_step: usize,
    /// Row k starts at `k · b_step`; whole vectors can be read.
    pub b: *const f32,
    pub b_step: usize,
    pub depth: usize,
}

/// What a kernel reads and writes: `out = factor · (a·b + more) + base`.
pub struct Tile {
    pub strips: Strips,
    /// Those of another product, which is added.
    pub more: Option<Strips>,
    pub out: *mut f32,
    pub stride: usize,
    /// Where there is something to add: rows `base_stride` apart.
    pub base: Option<*const f32>,
    pub base_stride: usize,
    pub factor: f32,
    /// How many columns of the last vector belong to the result.
    pub last: usize,
    /// Where a kernel that copies leaves what it read, row by row of `b` and column by column of `a`. A step of 0
    /// throws it away.
    pub copy_a: *mut f32,
    pub copy_a_step: usize,
    pub copy_b: *mut f32,
    pub copy_b_step: usize,
}

/// # Safety
/// The machine must have the instructions, and the tile's addresses must be valid for what its fields say.
pub type Kernel = unsafe fn(&Tile);

/// What a kernel leaves in adjacent memory for the tiles after it: packing that way costs next to nothing, as its misses
/// pass under the multiplications.
#[derive(Clone, Copy)]
pub enum Copying {
    Nothing,
    B,
    /// Elements of `a` are adjacent along its columns.
    Both,
}

/// The instructions that there are kernels for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Instructions {
    Avx512,
    Avx2,
}

impl Instructions {
    /// The best of this machine.
    pub fn of_this_machine() -> Option<Self> {
        static FOUND: LazyLock<Option<Instructions>> =
            LazyLock::new(|| Instructions::all().first().copied());
        *FOUND
    }

    /// Those of this machine, the best first.
    pub fn all() -> Vec<Self> {
        let mut all = Vec::new();
        let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        if avx2 && is_x86_feature_detected!("avx512f") {
            all.push(Self::Avx512);
        }
        if avx2 {
            all.push(Self::Avx2);
        }
        all
    }

    /// Elements of a vector.
    pub fn lanes(self) -> usize {
        match self {
            Self::Avx512 => <__m512 as Lanes>::COUNT,
            Self::Avx2 => <__m256 as Lanes>::COUNT,
        }
    }

    /// Rows of a whole tile: with [`VECTORS`] they leave enough registers for a row of `b` and an element of `a`.
    pub fn rows(self) -> usize {
        match self {
            Self::Avx512 => 8,
            Self::Avx2 => 4,
        }
    }

    /// The kernel for a tile of up to [`Self::rows`] rows and up to [`VECTORS`] vectors.
    pub fn kernel(self, rows: usize, vectors: usize, copying: Copying) -> Kernel {
        let kernels = match self {
            Self::Avx512 => of_vectors_512,
            Self::Avx2 => of_vectors_256,
        };
        kernels(rows, vectors, copying)
    }
}

const NOTHING: usize = Copying::Nothing as usize;
const B: usize = Copying::B as usize;
const BOTH: usize = Copying::Both as usize;

fn of_vectors_512(rows: usize, vectors: usize, copying: Copying) -> Kernel {
    match (vectors, copying) {
        (1, Copying::Nothing) => of_rows_512::<1, NOTHING>(rows),
        (1, Copying::B) => of_rows_512::<1, B>(rows),
        (1, Copying::Both) => of_rows_512::<1, BOTH>(rows),
        (2, Copying::Nothing) => of_rows_512::<2, NOTHING>(rows),
        (2, Copying::B) => of_rows_512::<2, B>(rows),
        (2, Copying::Both) => of_rows_512::<2, BOTH>(rows),
        (_, Copying::Nothing) => of_rows_512::<3, NOTHING>(rows),
        (_, Copying::B) => of_rows_512::<3, B>(rows),
        (_, Copying::Both) => of_rows_512::<3, BOTH>(rows),
    }
}

fn of_rows_512<const V: usize, const COPYING: usize>(rows: usize) -> Kernel {
    match rows {
        1 => tile_512::<1, V, COPYING>,
        2 => tile_512::<2, V, COPYING>,
        3 => tile_512::<3, V, COPYING>,
        4 => tile_512::<4, V, COPYING>,
        5 => tile_512::<5, V, COPYING>,
        6 => tile_512::<6, V, COPYING>,
        7 => tile_512::<7, V, COPYING>,
        _ => tile_512::<8, V, COPYING>,
    }
}

fn of_vectors_256(rows: usize, vectors: usize, copying: Copying) -> Kernel {
    match (vectors, copying) {
        (1, Copying::Nothing) => of_rows_256::<1, NOTHING>(rows),
        (1, Copying::B) => of_rows_256::<1, B>(rows),
        (1, Copying::Both) => of_rows_256::<1, BOTH>(rows),
        (2, Copying::Nothing) => of_rows_256::<2, NOTHING>(rows),
        (2, Copying::B) => of_rows_256::<2, B>(rows),
        (2, Copying::Both) => of_rows_256::<2, BOTH>(rows),
        (_, Copying::Nothing) => of_rows_256::<3, NOTHING>(rows),
        (_, Copying::B) => of_rows_256::<3, B>(rows),
        (_, Copying::Both) => of_rows_256::<3, BOTH>(rows),
    }
}

fn of_rows_256<const V: usize, const COPYING: usize>(rows: usize) -> Kernel {
    match rows {
        1 => tile_256::<1, V, COPYING>,
        2 => tile_256::<2, V, COPYING>,
        3 => tile_256::<3, V, COPYING>,
        _ => tile_256::<4, V, COPYING>,
    }
}

/// # Safety
/// As for [`Kernel`].
#[target_feature(enable = "avx512f")]
unsafe fn tile_512<const R: usize, const V: usize, const COPYING: usize>(tile: &Tile) {
    // SAFETY: this function's contract.
    unsafe { compute::<__m512, R, V, COPYING>(tile) }
}

/// # Safety
/// As for [`Kernel`].
#[target_feature(enable = "avx2,fma")]
unsafe fn tile_256<const R: usize, const V: usize, const COPYING: usize>(tile: &Tile) {
    // SAFETY: this function's contract.
    unsafe { compute::<__m256, R, V, COPYING>(tile) }
}

/// Rows that a copying kernel asks for before it needs them: what it reads comes from afar.
const AHEAD: usize = 12;

/// Each element of the result is one chain of fused multiplications and additions over the depth, whatever the tile's
/// size: how a product is cut into tiles does not change a bit.
///
/// # Safety
/// As for [`Kernel`].
#[inline(always)]
unsafe fn compute<L: Lanes, const R: usize, const V: usize, const COPYING: usize>(tile: &Tile) {
    // SAFETY: the contract. Addresses past the ends are computed and fetched ahead, never read.
    unsafe {
        // What is written at the end is asked for now.
        for r in 0..R {
            for v in 0..V {
                let out = tile.out.wrapping_add(r * tile.stride + v * L::COUNT);
                _mm_prefetch::<_MM_HINT_T0>(out.cast_const().cast());
            }
        }
        let mut sums = [[L::splat(0.0); V]; R];
        let Strips { mut a, mut b, .. } = tile.strips;
        let (mut copy_a, mut copy_b) = (tile.copy_a, tile.copy_b);
        for _ in 0..tile.strips.depth {
            if COPYING != NOTHING {
                for v in 0..V {
                    L::load(b.add(v * L::COUNT)).store(copy_b.add(v * L::COUNT));
                    let next = b.wrapping_add(AHEAD * tile.strips.b_step + v * L::COUNT);
                    _mm_prefetch::<_MM_HINT_T0>(next.cast());
                }
                copy_b = copy_b.wrapping_add(tile.copy_b_step);
            }
            if COPYING == BOTH {
                let column = a.cast::<[f32; R]>().read_unaligned();
                copy_a.cast::<[f32; R]>().write_unaligned(column);
                let next = a.wrapping_add(AHEAD * tile.strips.a_step);
                _mm_prefetch::<_MM_HINT_T0>(next.cast());
                copy_a = copy_a.wrapping_add(tile.copy_a_step);
            }
            add_step(&mut sums, a, b, tile.strips.a_row);
            a = a.wrapping_add(tile.strips.a_step);
            b = b.wrapping_add(tile.strips.b_step);
        }
        if let Some(more) = &tile.more {
            let Strips { mut a, mut b, .. } = *more;
            for _ in 0..more.depth {
                add_step(&mut sums, a, b, more.a_row);
                a = a.wrapping_add(more.a_step);
                b = b.wrapping_add(more.b_step);
            }
        }
        let factor = L::splat(tile.factor);
        let whole = tile.last == L::COUNT;
        for (r, sums) in sums.into_iter().enumerate() {
            for (v, sum) in sums.into_iter().enumerate() {
                let out = tile.out.add(r * tile.stride + v * L::COUNT);
                let base = tile
                    .base
                    .map(|base| base.add(r * tile.base_stride + v * L::COUNT));
                if v + 1 < V || whole {
                    let value = match base {
                        Some(base) => sum.times_plus(factor, L::load(base)),
                        None => sum.times(factor),
                    };
                    value.store(out);
                } else {
                    let value = match base {
                        Some(base) => sum.times_plus(factor, L::load_some(base, tile.last)),
                        None => sum.times(factor),
                    };
                    value.store_some(out, tile.last);
                }
            }
        }
    }
}

/// One step of the depth: `sums += a·b` with a column of `a`, whose elements are `a_row` apart, and a row of `b`.
///
/// # Safety
/// As for [`Kernel`].
#[inline(always)]
unsafe fn add_step<L: Lanes, const R: usize, const V: usize>(
    sums: &mut [[L; V]; R],
    a: *const f32,
    b: *const f32,
    a_row: usize,
) {
    // SAFETY: the contract.
    unsafe {
        let mut row = [L::splat(0.0); V];
        for (v, vector) in row.iter_mut().enumerate() {
            *vector = L::load(b.add(v * L::COUNT));
        }
        for (r, sums) in sums.iter_mut().enumerate() {
            let x = L::splat(*a.add(r * a_row));
            for (sum, vector) in sums.iter_mut().zip(row) {
                *sum = x.times_plus(vector, *sum);
            }
        }
    }
}
