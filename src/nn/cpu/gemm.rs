//! Matrix products of slices: on processors with AVX-512 or AVX2 by kernels of our own, on others by the `gemm` crate's.
//! A large result is cut into blocks, never along the sums, so the number of threads does not change a bit.

#[cfg(target_arch = "x86_64")]
mod block;
#[cfg(target_arch = "x86_64")]
mod lanes;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod tile;

use gemm::Parallelism;
use rayon::prelude::*;

use crate::nn::is_crowded;

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
    pub fn some_rows(self, from: usize, until: usize) -> Self {
        Self {
            data: &self.data[(from * self.row_stride).min(self.data.len())..],
            rows: until - from,
            ..self
        }
    }

    /// Columns `from..until`.
    pub fn some_columns(self, from: usize, until: usize) -> Self {
        self.t().some_rows(from, until).t()
    }

    /// Where element (i, j) is.
    #[cfg(target_arch = "x86_64")]
    fn at(&self, i: usize, j: usize) -> *const f32 {
        let place = i * self.row_stride + j * self.column_stride;
        self.data.as_ptr().wrapping_add(place)
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

/// What a product is added to.
#[derive(Clone, Copy)]
enum Base<'a> {
    Nothing,
    /// What is in the result's place.
    Out,
    /// The same row for all of the result's.
    Row(&'a [f32]),
    /// A matrix of the result's size, whose rows start this many elements apart.
    Matrix(&'a [f32], usize),
}

/// `factor · a·b`.
#[derive(Clone, Copy)]
struct Term<'a> {
    factor: f32,
    a: Matrix<'a>,
    b: Matrix<'a>,
}

/// `a·b`, to be added to another product, whose sums go on where its own end.
#[derive(Clone, Copy)]
pub struct Pair<'a> {
    pub a: Matrix<'a>,
    pub b: Matrix<'a>,
}

impl<'a> Pair<'a> {
    /// Adds the product to `out`, whose rows follow one another, on all threads.
    pub fn add_to(self, out: &mut [f32]) {
        let Self { a, b } = self;
        multiply(1.0, a, b, out, b.columns, true, Threads::All);
    }

    fn term(self) -> Term<'a> {
        let Self { a, b } = self;
        Term { factor: 1.0, a, b }
    }

    fn some_rows(self, from: usize, until: usize) -> Self {
        let a = self.a.some_rows(from, until);
        Self { a, ..self }
    }

    fn some_columns(self, from: usize, until: usize) -> Self {
        let b = self.b.some_columns(from, until);
        Self { b, ..self }
    }
}

impl<'a> Term<'a> {
    fn some_rows(self, from: usize, until: usize) -> Self {
        let a = self.a.some_rows(from, until);
        Self { a, ..self }
    }

    fn some_columns(self, from: usize, until: usize) -> Self {
        let b = self.b.some_columns(from, until);
        Self { b, ..self }
    }
}

/// `a·b`, with `row` added to each row, on all threads.
pub fn product(a: Matrix, b: Matrix, row: Option<&[f32]>) -> Vec<f32> {
    product_and(a, b, row, None)
}

/// The right side of one of several products with the same left matrix.
pub struct Right<'a> {
    pub b: Matrix<'a>,
    /// Added to each row.
    pub row: Option<&'a [f32]>,
    /// Added to the product, as in [`product_and`].
    pub more: Option<Pair<'a>>,
}

/// The products of `a` with each of `rights`, side by side in one matrix, on all threads.
pub fn products(a: Matrix, rights: &[Right]) -> Vec<f32> {
    let columns: usize = rights.iter().map(|right| right.b.columns).sum();
    let mut out = Vec::with_capacity(a.rows * columns);
    let place: *mut f32 = out.as_mut_ptr();
    let mut first = 0;
    for Right { b, row, more } in rights {
        let base = row.map_or(Base::Nothing, |row| Base::Row(&row[..b.columns]));
        let term = Term {
            factor: 1.0,
            a,
            b: *b,
        };
        // SAFETY: there is room for the result, of which each product writes its own columns and reads none before.
        unsafe {
            spread(
                term,
                base,
                *more,
                place.wrapping_add(first),
                columns,
                Threads::All,
            )
        }
        first += b.columns;
    }
    // SAFETY: all columns are written.
    unsafe { out.set_len(a.rows * columns) }
    out
}

/// [`product`] with another product of the same size added to it.
pub fn product_and(a: Matrix, b: Matrix, row: Option<&[f32]>, more: Option<Pair>) -> Vec<f32> {
    let base = row.map_or(Base::Nothing, |row| Base::Row(&row[..b.columns]));
    fresh(Term { factor: 1.0, a, b }, base, more)
}

/// `factor · a·b`, on all threads.
pub fn scaled_product(factor: f32, a: Matrix, b: Matrix) -> Vec<f32> {
    fresh(Term { factor, a, b }, Base::Nothing, None)
}

/// `factor · a·b + sum`, on all threads; the rows of `sum` follow one another.
pub fn product_on(sum: &[f32], factor: f32, a: Matrix, b: Matrix) -> Vec<f32> {
    assert_eq!(sum.len(), a.rows * b.columns, "a sum with a product");
    fresh(Term { factor, a, b }, Base::Matrix(sum, b.columns), None)
}

/// `term + base + more`, on all threads; the base is not the result's own place. Nothing is written before it is
/// computed.
fn fresh(term: Term, base: Base, more: Option<Pair>) -> Vec<f32> {
    let (rows, columns) = (term.a.rows, term.b.columns);
    let mut out = Vec::with_capacity(rows * columns);
    let place = out.as_mut_ptr();
    // SAFETY: there is room for the result, which is written as a whole and never read before.
    unsafe {
        spread(term, base, more, place, columns, Threads::All);
        out.set_len(rows * columns);
    }
    out
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
    let base = match accumulate {
        true => Base::Out,
        false => Base::Nothing,
    };
    // SAFETY: this function's contract.
    unsafe { spread(Term { factor, a, b }, base, None, out, stride, threads) }
}

/// `out = term + base + more`.
///
/// # Safety
/// As for [`multiply_into`]; `out` is only read if it is the base, or after it was written.
unsafe fn spread(
    term: Term,
    base: Base,
    more: Option<Pair>,
    out: *mut f32,
    stride: usize,
    threads: Threads,
) {
    let Term { a, b, .. } = term;
    assert_eq!(a.columns, b.rows, "inner dimensions of a product");
    if let Some(more) = more {
        assert_eq!(more.a.columns, more.b.rows, "inner dimensions of a product");
        let size = (more.a.rows, more.b.columns);
        assert_eq!(size, (a.rows, b.columns), "products that are added up");
    }
    let (height, width) = match threads {
        Threads::One => (a.rows, b.columns),
        Threads::All if is_crowded() && is_one_chain() => (a.rows, b.columns),
        Threads::All => blocks(a.rows, a.columns, b.columns),
    };
    if height >= a.rows && width >= b.columns {
        // SAFETY: this function's contract.
        return unsafe { multiply_block(term, base, more, out, stride) };
    }
    let down = a.rows.div_ceil(height);
    let out = Shared(out);
    let out = &out;
    let body = |block: usize| {
        let (row, column) = (block % down * height, block / down * width);
        let (end, until) = ((row + height).min(a.rows), (column + width).min(b.columns));
        let base = match base {
            Base::Row(values) => Base::Row(&values[column..until]),
            Base::Matrix(values, stride) => Base::Matrix(&values[row * stride + column..], stride),
            other => other,
        };
        // SAFETY: this function's contract; each block is written by one task.
        unsafe {
            let out = out.0.add(row * stride + column);
            let term = term.some_rows(row, end).some_columns(column, until);
            let more = more.map(|more| more.some_rows(row, end).some_columns(column, until));
            multiply_block(term, base, more, out, stride);
        }
    };
    (0..down * b.columns.div_ceil(width))
        .into_par_iter()
        .for_each(body);
}

/// Multiplications below which a block is not worth a task of its own.
const BLOCK_WORK: usize = 1 << 20;

/// There need not be more blocks than this, for threads that get no more than one at a time.
const BLOCKS: usize = 64;

/// Whether each element of a product is one chain of operations, however the product is cut.
fn is_one_chain() -> bool {
    #[cfg(target_arch = "x86_64")]
    return tile::Instructions::of_this_machine().is_some();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// The sizes of a block: the most that the caches hold of the right matrix, the least that pays for bringing it there,
/// and whole tiles of the kernels, with either instructions.
const MOST_COLUMNS: usize = 336;
const LEAST_COLUMNS: usize = 144;
const COLUMN_STEP: usize = 48;
const LEAST_ROWS: usize = 96;
const ROW_STEP: usize = 8;

/// Rows and columns of the blocks that a product is cut into.
fn blocks(rows: usize, depth: usize, columns: usize) -> (usize, usize) {
    let wanted = (rows * depth * columns / BLOCK_WORK).min(BLOCKS);
    if wanted < 2 {
        return (rows, columns);
    }
    let across = columns.div_ceil(MOST_COLUMNS).min(wanted);
    let down = (wanted / across).min(rows / LEAST_ROWS).max(1);
    let across = (wanted / down).min(columns / LEAST_COLUMNS).max(across);
    (
        rows.div_ceil(down).next_multiple_of(ROW_STEP),
        columns.div_ceil(across).next_multiple_of(COLUMN_STEP),
    )
}

/// The start of an output that several threads write in disjoint places.
pub struct Shared(pub *mut f32);

// SAFETY: only the address is shared; every use says why its places are disjoint.
unsafe impl Send for Shared {}
unsafe impl Sync for Shared {}

/// # Safety
/// As for [`spread`].
unsafe fn multiply_block(term: Term, base: Base, more: Option<Pair>, out: *mut f32, stride: usize) {
    #[cfg(target_arch = "x86_64")]
    if let Some(instructions) = tile::Instructions::of_this_machine() {
        // SAFETY: this function's contract, and the machine has them.
        return unsafe { block::multiply(instructions, term, base, more, out, stride) };
    }
    // SAFETY: this function's contract.
    unsafe {
        multiply_elsewhere(term, base, out, stride);
        if let Some(more) = more {
            multiply_elsewhere(more.term(), Base::Out, out, stride);
        }
    }
}

/// # Safety
/// As for [`spread`].
unsafe fn multiply_elsewhere(
    Term { factor, a, b }: Term,
    base: Base,
    out: *mut f32,
    stride: usize,
) {
    let copied = match base {
        Base::Nothing | Base::Out => None,
        Base::Row(row) => Some((row, 0)),
        Base::Matrix(values, rows) => Some((values, rows)),
    };
    if let Some((values, rows)) = copied {
        for i in 0..a.rows {
            let row = &values[i * rows..][..b.columns];
            // SAFETY: this function's contract; the row is as long as the result's.
            unsafe { out.add(i * stride).copy_from(row.as_ptr(), b.columns) }
        }
    }
    // SAFETY: both matrices lie within their slices (checked when they were made); `out` by this function's contract.
    unsafe {
        gemm::gemm(
            a.rows,
            b.columns,
            a.columns,
            out,
            1,
            stride as isize,
            !matches!(base, Base::Nothing),
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
