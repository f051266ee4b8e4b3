//! Matrix products of slices, by the `gemm` crate. How many threads share one does not change a bit of it.

use gemm::Parallelism;
use rayon::prelude::*;

use crate::nn::is_crowded;

/// A matrix in a slice: element (i, j) is at `i · row_stride + j · column_stride`, which lies within it.
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
            fits(rows, columns, row_stride, data.len()),
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
        assert!(
            from <= until && until <= self.rows,
            "rows {from}..{until} of {}",
            self.rows
        );
        // Of no columns there may be no element at all.
        let start = (from * self.row_stride).min(self.data.len());
        Self {
            data: &self.data[start..],
            rows: until - from,
            ..self
        }
    }

    /// Columns `from..until`.
    pub fn some_columns(self, from: usize, until: usize) -> Self {
        self.t().some_rows(from, until).t()
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

/// Whether `length` elements hold rows that start `stride` apart.
fn fits(rows: usize, columns: usize, stride: usize, length: usize) -> bool {
    let end = |rows: usize| (rows - 1).checked_mul(stride)?.checked_add(columns);
    rows == 0 || columns == 0 || end(rows).is_some_and(|end| end <= length)
}

/// How many threads a product may use.
#[derive(Clone, Copy, PartialEq)]
pub enum Threads {
    /// The calling one: products inside a parallel loop.
    One,
    All,
}

/// `a·b`, to be added to another product.
#[derive(Clone, Copy)]
pub struct Pair<'a> {
    pub a: Matrix<'a>,
    pub b: Matrix<'a>,
}

impl Pair<'_> {
    /// Adds the product to `out`, whose rows follow one another, on all threads.
    pub fn add_to(self, out: &mut [f32]) {
        let Self { a, b } = self;
        assert_eq!(out.len(), a.rows * b.columns, "products that are added up");
        multiply(1.0, a, b, out, b.columns, true, Threads::All);
    }
}

/// `a·b`, with `row` added to each row and the product `more`, of the same size, to all, on all threads.
pub fn product(a: Matrix, b: Matrix, row: Option<&[f32]>, more: Option<Pair>) -> Vec<f32> {
    fresh(1.0, Pair { a, b }, row, more)
}

/// `factor · a·b`, on all threads.
pub fn scaled_product(factor: f32, a: Matrix, b: Matrix) -> Vec<f32> {
    fresh(factor, Pair { a, b }, None, None)
}

/// Elements of a result that stay in a core's cache while something is added to them.
const CACHED: usize = 1 << 16;

/// The product in new memory, which is not written before it is computed.
fn fresh(factor: f32, pair: Pair, row: Option<&[f32]>, more: Option<Pair>) -> Vec<f32> {
    let (rows, columns) = (pair.a.rows, pair.b.columns);
    if let Some(row) = row {
        assert_eq!(row.len(), columns, "a row with a product");
    }
    if let Some(more) = more {
        let size = (more.a.rows, more.b.columns);
        assert_eq!(size, (rows, columns), "products that are added up");
    }
    let mut out = Vec::with_capacity(rows * columns);
    let place = Shared(out.as_mut_ptr());
    let place = &place;
    let body = |from: usize, until: usize, threads: Threads| {
        // SAFETY: there is room for these rows, which nobody else writes; each is written before it is read.
        unsafe {
            let out = place.0.add(from * columns);
            let a = pair.a.some_rows(from, until);
            if let Some(row) = row {
                for i in 0..until - from {
                    out.add(i * columns).copy_from(row.as_ptr(), columns);
                }
            }
            let accumulate = row.is_some();
            multiply_into(factor, a, pair.b, out, columns, accumulate, threads);
            if let Some(Pair { a, b }) = more {
                let a = a.some_rows(from, until);
                multiply_into(1.0, a, b, out, columns, true, threads);
            }
        }
    };
    // Where the right matrix need not be packed, a part of the rows costs no more than its share.
    let height = (CACHED / columns.max(1)).max(1);
    let adds = row.is_some() || more.is_some();
    if adds && pair.b.column_stride == 1 && rows > height {
        let part = |i: usize| body(i * height, ((i + 1) * height).min(rows), Threads::One);
        let parts = 0..rows.div_ceil(height);
        match is_crowded() {
            true => parts.for_each(part),
            false => parts.into_par_iter().for_each(part),
        }
    } else {
        body(0, rows, Threads::All);
    }
    // SAFETY: all rows are written.
    unsafe { out.set_len(rows * columns) }
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
    // Rows that overlap would be written by several threads at a time.
    assert!(
        fits(a.rows, b.columns, stride, out.len()) && (a.rows < 2 || b.columns <= stride),
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
    // Which thread computes a tile does not change its sums.
    let parallelism = match threads {
        Threads::All if !is_crowded() => Parallelism::Rayon(0),
        _ => Parallelism::None,
    };
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
            parallelism,
        );
    }
}

/// The start of an output that several threads write in disjoint places.
pub struct Shared(pub *mut f32);

// SAFETY: only the address is shared; every use says why its places are disjoint.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Matrices to make: their sizes, what is between rows, and whether each is seen transposed.
    #[derive(Debug, Clone)]
    struct Shape {
        rows: usize,
        depth: usize,
        columns: usize,
        gaps: [usize; 3],
        turned: [bool; 2],
        factor: f32,
        accumulate: bool,
    }

    prop_compose! {
        fn shapes(most: usize)(
            rows in 0..most,
            depth in 0..most * 2,
            columns in 0..most,
            gaps in [0..9usize, 0..9, 0..9],
            turned in any::<[bool; 2]>(),
            factor in prop_oneof![Just(1.0f32), Just(-0.37)],
            accumulate in any::<bool>(),
        ) -> Shape {
            Shape { rows, depth, columns, gaps, turned, factor, accumulate }
        }
    }

    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    fn matrix(
        data: &[f32],
        (rows, columns): (usize, usize),
        gap: usize,
        turned: bool,
    ) -> Matrix<'_> {
        match turned {
            true => Matrix::with_stride(data, columns, rows, rows + gap).t(),
            false => Matrix::with_stride(data, rows, columns, columns + gap),
        }
    }

    /// Whether a product is what the definition says, to rounding, and touches nothing else.
    fn check(shape: &Shape, threads: Threads) {
        let Shape {
            rows,
            depth,
            columns,
            gaps,
            turned,
            factor,
            accumulate,
        } = *shape;
        let room = (rows.max(columns) + 9) * (depth + 9);
        let (left, right) = (numbers(room, 1), numbers(room, 2));
        let a = matrix(&left, (rows, depth), gaps[0], turned[0]);
        let b = matrix(&right, (depth, columns), gaps[1], turned[1]);
        let stride = columns + gaps[2];
        let before = numbers(rows * stride, 3);
        let mut out = before.clone();
        multiply(factor, a, b, &mut out, stride, accumulate, threads);
        let places = (0..rows).flat_map(|i| (0..stride).map(move |j| (i, j)));
        for ((i, j), (found, before)) in places.zip(out.iter().zip(&before)) {
            if j >= columns {
                assert_eq!(found, before, "between the rows, at {i}, {j}");
                continue;
            }
            let sum: f64 = (0..depth)
                .map(|k| {
                    let left = a.data[i * a.row_stride + k * a.column_stride];
                    let right = b.data[k * b.row_stride + j * b.column_stride];
                    f64::from(left) * f64::from(right)
                })
                .sum();
            let base = if accumulate { f64::from(*before) } else { 0.0 };
            let wanted = f64::from(factor) * sum + base;
            let error = (f64::from(*found) - wanted).abs();
            let allowed = 2e-5 * (depth as f64).sqrt().max(1.0);
            assert!(error < allowed, "{error} at {i}, {j}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn a_product_is_what_the_definition_says(shape in shapes(70)) {
            check(&shape, Threads::All);
            check(&shape, Threads::One);
        }

        #[test]
        fn parts_of_a_matrix_are_its_rows_and_columns(
            shape in shapes(20),
            from in [0..21usize, 0..21],
            until in [0..21usize, 0..21],
        ) {
            let Shape { rows, columns, gaps, turned, .. } = shape;
            let data = numbers((rows.max(columns) + 9) * 30, 1);
            let whole = matrix(&data, (rows, columns), gaps[0], turned[0]);
            let part = std::panic::catch_unwind(|| {
                whole.some_rows(from[0], until[0]).some_columns(from[1], until[1])
            });
            let inside = |from, until, count| from <= until && until <= count;
            let fits = inside(from[0], until[0], rows) && inside(from[1], until[1], columns);
            prop_assert_eq!(part.is_ok(), fits);
            let at = |m: &Matrix, i: usize, j: usize| m.data[i * m.row_stride + j * m.column_stride];
            if let Ok(part) = part {
                prop_assert_eq!((part.rows, part.columns), (until[0] - from[0], until[1] - from[1]));
                for (i, j) in (0..part.rows).flat_map(|i| (0..part.columns).map(move |j| (i, j))) {
                    prop_assert_eq!(at(&part, i, j), at(&whole, from[0] + i, from[1] + j));
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]

        #[test]
        fn so_is_a_large_one_that_threads_share(shape in shapes(500)) {
            check(&shape, Threads::All);
        }
    }

    #[test]
    fn a_row_and_another_product_are_added() {
        for (rows, depth, columns, more) in [
            (3, 5, 7, 2),
            (8, 0, 48, 4),
            (17, 40, 83, 16),
            (300, 400, 500, 8),
            (20, 30, 350, 500),
        ] {
            for turned in [false, true] {
                let [a, b] = [numbers(rows * depth, 1), numbers(depth * columns, 2)];
                let [c, d] = [numbers(rows * more, 3), numbers(more * columns, 4)];
                let row = numbers(columns, 5);
                let a = Matrix::new(&a, rows, depth);
                let b = matrix(&b, (depth, columns), 0, turned);
                let c = Matrix::new(&c, rows, more);
                let d = matrix(&d, (more, columns), 0, !turned);
                let mut wanted = row.repeat(rows);
                multiply(1.0, a, b, &mut wanted, columns, true, Threads::One);
                multiply(1.0, c, d, &mut wanted, columns, true, Threads::One);
                let found = product(a, b, Some(&row), Some(Pair { a: c, b: d }));
                let size = ((depth + more) as f32).sqrt();
                for (found, wanted) in found.iter().zip(&wanted) {
                    assert!((found - wanted).abs() < 2e-6 * size, "{found} and {wanted}");
                }
            }
        }
    }

    #[test]
    fn the_number_of_threads_does_not_change_a_bit() {
        for (rows, depth, columns, turned) in [
            (768, 256, 700, [false, true]),
            (301, 900, 257, [true, false]),
            (8, 3000, 768, [true, false]),
            (3000, 768, 8, [false, true]),
        ] {
            let (left, right) = (numbers(rows * depth, 1), numbers(depth * columns, 2));
            let a = matrix(&left, (rows, depth), 0, turned[0]);
            let b = matrix(&right, (depth, columns), 0, turned[1]);
            let on = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                pool.unwrap().install(|| product(a, b, None, None))
            };
            let one = on(1);
            for threads in [2, 5] {
                assert!(on(threads) == one, "{threads} threads");
            }
        }
    }
}
