//! Matrix products of slices, by the `gemm` crate's kernels. A large result is cut into blocks, by its shape alone and
//! never along the sums, so the number of threads does not change a bit.

use gemm::Parallelism;
use rayon::prelude::*;

/// A matrix in a slice: element (i, j) is at `i · row_stride + j · column_stride`.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// A matrix whose rows follow one another.
    pub fn new(data: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::with_stride(data, rows, columns, columns)
    }

    /// A matrix whose rows start `row_stride` elements apart.
    pub fn with_stride(data: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(
            rows == 0 || columns == 0 || (rows - 1) * row_stride + columns <= data.len(),
            "a matrix of {rows} x {columns} with stride {row_stride} in {} elements",
            data.len()
        );
        Self {
            data,
            rows,
            columns,
            row_stride,
            column_stride: 1,
        }
    }

    /// Rows `from..until`.
    fn some_rows(self, from: usize, until: usize) -> Self {
        Self {
            data: &self.data[(from * self.row_stride).min(self.data.len())..],
            rows: until - from,
            ..self
        }
    }

    /// The transposed view.
    pub fn t(self) -> Self {
        Self {
            data: self.data,
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
        }
    }
}

/// How many threads a product may use.
#[derive(Clone, Copy, PartialEq)]
pub enum Threads {
    /// The calling one: products inside a parallel loop.
    One,
    All,
}

/// `out = factor · a·b`, or `out += factor · a·b` if `accumulate`; the rows of `out` start `stride` elements apart.
pub fn multiply(
    factor: f32,
    a: Matrix,
    b: Matrix,
    out: &mut [f32],
    stride: usize,
    accumulate: bool,
    threads: Threads,
) {
    assert!(
        a.rows == 0 || b.columns == 0 || (a.rows - 1) * stride + b.columns <= out.len(),
        "a product of {} x {} with stride {stride} into {} elements",
        a.rows,
        b.columns,
        out.len()
    );
    // SAFETY: the assertion above; `out` is borrowed mutably.
    unsafe { multiply_into(factor, a, b, out.as_mut_ptr(), stride, accumulate, threads) }
}

/// [`multiply`] into memory that other threads write elsewhere at the same time.
///
/// # Safety
/// `out` must be valid for writes (and reads, if `accumulate`) of `b.columns` elements at each multiple of `stride`
/// below `a.rows · stride`, and nobody else may touch those during the call.
pub unsafe fn multiply_into(
    factor: f32,
    a: Matrix,
    b: Matrix,
    out: *mut f32,
    stride: usize,
    accumulate: bool,
    threads: Threads,
) {
    assert_eq!(a.columns, b.rows, "inner dimensions of a product");
    let work = a.rows * a.columns * b.columns;
    // The kernels pack a left matrix that is transposed, else the right one: the packed one is what gets cut.
    let by_rows = a.column_stride != 1;
    let size = if by_rows { a.rows } else { b.columns };
    let step = if by_rows { ROW_STEP } else { COLUMN_STEP };
    let blocks = (work / BLOCK_WORK).min(size / step);
    if threads == Threads::One || blocks < 2 {
        // SAFETY: this function's contract.
        return unsafe { multiply_block(factor, a, b, out, stride, accumulate) };
    }
    let length = size.div_ceil(blocks).next_multiple_of(step);
    let out = Shared(out);
    let out = &out;
    (0..size.div_ceil(length))
        .into_par_iter()
        .for_each(|block| {
            let (from, until) = (block * length, ((block + 1) * length).min(size));
            // SAFETY: this function's contract; each block of rows or columns is written by one task.
            unsafe {
                if by_rows {
                    let a = a.some_rows(from, until);
                    let out = out.0.add(from * stride);
                    multiply_block(factor, a, b, out, stride, accumulate);
                } else {
                    let b = b.t().some_rows(from, until).t();
                    multiply_block(factor, a, b, out.0.add(from), stride, accumulate);
                }
            }
        });
}

/// Multiplications below which a block is not worth a task of its own.
const BLOCK_WORK: usize = 1 << 20;

/// What the rows and the columns of a block are multiples of: whole tiles of the AVX-512 kernel, which are 6 x 64.
const ROW_STEP: usize = 96;
const COLUMN_STEP: usize = 64;

/// The start of an output that several threads write in disjoint places.
pub struct Shared(pub *mut f32);

// SAFETY: only the address is shared; every use says why its places are disjoint.
unsafe impl Send for Shared {}
unsafe impl Sync for Shared {}

/// # Safety
/// As for [`multiply_into`].
unsafe fn multiply_block(
    factor: f32,
    a: Matrix,
    b: Matrix,
    out: *mut f32,
    stride: usize,
    accumulate: bool,
) {
    // SAFETY: both matrices lie within their slices (checked when they were made); `out` by this function's contract.
    unsafe {
        gemm::gemm(
            a.rows,
            b.columns,
            a.columns,
            out,
            1,
            stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            factor,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}
