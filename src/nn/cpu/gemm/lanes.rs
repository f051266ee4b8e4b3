//! Vector registers of f32, as the kernels see them.

use std::arch::x86_64::*;

/// A vector register.
///
/// # Safety
/// Every function needs a machine with the register's instructions, and memory of [`Lanes::COUNT`] (or `count`, from 1 to
/// that) values where it has an address.
pub trait Lanes: Copy {
    const COUNT: usize;

    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn load_some(from: *const f32, count: usize) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn store_some(self, to: *mut f32, count: usize);
    unsafe fn times(self, factor: Self) -> Self;
    unsafe fn times_plus(self, factor: Self, addend: Self) -> Self;
}

// SAFETY of all below: the trait's contract.
impl Lanes for __m512 {
    const COUNT: usize = 16;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn load_some(from: *const f32, count: usize) -> Self {
        unsafe { _mm512_maskz_loadu_ps(u16::MAX >> (Self::COUNT - count), from) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { _mm512_storeu_ps(to, self) }
    }

    #[inline(always)]
    unsafe fn store_some(self, to: *mut f32, count: usize) {
        unsafe { _mm512_mask_storeu_ps(to, u16::MAX >> (Self::COUNT - count), self) }
    }

    #[inline(always)]
    unsafe fn times(self, factor: Self) -> Self {
        unsafe { _mm512_mul_ps(self, factor) }
    }

    #[inline(always)]
    unsafe fn times_plus(self, factor: Self, addend: Self) -> Self {
        unsafe { _mm512_fmadd_ps(self, factor, addend) }
    }
}

// SAFETY of all below: the trait's contract.
impl Lanes for __m256 {
    const COUNT: usize = 8;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        unsafe { _mm256_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        unsafe { _mm256_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn load_some(from: *const f32, count: usize) -> Self {
        unsafe { _mm256_maskload_ps(from, first(count)) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { _mm256_storeu_ps(to, self) }
    }

    #[inline(always)]
    unsafe fn store_some(self, to: *mut f32, count: usize) {
        unsafe { _mm256_maskstore_ps(to, first(count), self) }
    }

    #[inline(always)]
    unsafe fn times(self, factor: Self) -> Self {
        unsafe { _mm256_mul_ps(self, factor) }
    }

    #[inline(always)]
    unsafe fn times_plus(self, factor: Self, addend: Self) -> Self {
        unsafe { _mm256_fmadd_ps(self, factor, addend) }
    }
}

/// The mask of the first `count` of eight lanes.
///
/// # Safety
/// The machine must have AVX, and `count` be at most 8.
#[inline(always)]
unsafe fn first(count: usize) -> __m256i {
    const MASKS: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
    // SAFETY: eight values from `8 - count` on lie within the array.
    unsafe { _mm256_loadu_si256(MASKS.as_ptr().add(8 - count).cast()) }
}

/// Eight lines of `depth` elements, `stride` apart, transposed: `depth` lines of eight, `width` apart.
///
/// # Safety
/// The machine must have AVX; all that is said to be there must be valid for reads and writes.
#[inline]
#[target_feature(enable = "avx")]
pub unsafe fn turn(from: *const f32, stride: usize, depth: usize, to: *mut f32, width: usize) {
    let whole = depth / 4 * 4;
    for k in (0..whole).step_by(4) {
        // SAFETY: elements `k..k + 4` of the eight lines, and lines `k..k + 4` of the result.
        unsafe {
            let pair = |i: usize| {
                let low = _mm256_castps128_ps256(_mm_loadu_ps(from.add(i * stride + k)));
                _mm256_insertf128_ps::<1>(low, _mm_loadu_ps(from.add((i + 4) * stride + k)))
            };
            let (r0, r1, r2, r3) = (pair(0), pair(1), pair(2), pair(3));
            let (low01, high01) = (_mm256_unpacklo_ps(r0, r1), _mm256_unpackhi_ps(r0, r1));
            let (low23, high23) = (_mm256_unpacklo_ps(r2, r3), _mm256_unpackhi_ps(r2, r3));
            let to = to.add(k * width);
            _mm256_storeu_ps(to, _mm256_shuffle_ps::<0x44>(low01, low23));
            _mm256_storeu_ps(to.add(width), _mm256_shuffle_ps::<0xEE>(low01, low23));
            _mm256_storeu_ps(to.add(2 * width), _mm256_shuffle_ps::<0x44>(high01, high23));
            _mm256_storeu_ps(to.add(3 * width), _mm256_shuffle_ps::<0xEE>(high01, high23));
        }
    }
    for k in whole..depth {
        for i in 0..8 {
            // SAFETY: the contract.
            unsafe { *to.add(k * width + i) = *from.add(i * stride + k) }
        }
    }
}
