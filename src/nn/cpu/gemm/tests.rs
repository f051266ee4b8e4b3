use std::cell::Cell;

use proptest::prelude::*;

use super::*;

/// A matrix to make: its sizes, what is between its rows, and whether it is seen transposed.
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
    let state = Cell::new(seed);
    let next = || {
        state.set(
            state
                .get()
                .wrapping_mul(1_664_525)
                .wrapping_add(1_013_904_223),
        );
        (state.get() >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn matrix(data: &[f32], (rows, columns): (usize, usize), gap: usize, turned: bool) -> Matrix<'_> {
    match turned {
        true => Matrix::with_stride(data, columns, rows, rows + gap).t(),
        false => Matrix::with_stride(data, rows, columns, columns + gap),
    }
}

impl Shape {
    /// Whether a product is what the definition says, to rounding, and touches nothing else.
    fn check(&self, compute: impl Fn(Matrix, Matrix, &mut [f32], usize)) {
        let Shape {
            rows,
            depth,
            columns,
            gaps,
            turned,
            ..
        } = *self;
        let room = (rows.max(columns) + 9) * (depth + 9);
        let (left, right) = (numbers(room, 1), numbers(room, 2));
        let a = matrix(&left, (rows, depth), gaps[0], turned[0]);
        let b = matrix(&right, (depth, columns), gaps[1], turned[1]);
        let stride = columns + gaps[2];
        let before = numbers(rows * stride, 3);
        let mut out = before.clone();
        compute(a, b, &mut out, stride);
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
            let base = if self.accumulate {
                f64::from(*before)
            } else {
                0.0
            };
            let wanted = f64::from(self.factor) * sum + base;
            let error = (f64::from(*found) - wanted).abs();
            assert!(
                error < 2e-5 * (depth as f64).sqrt().max(1.0),
                "{error} at {i}, {j}"
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn a_product_is_what_the_definition_says(shape in shapes(70)) {
        let Shape { factor, accumulate, .. } = shape;
        shape.check(|a, b, out, stride| {
            multiply(factor, a, b, out, stride, accumulate, Threads::All);
        });
        shape.check(|a, b, out, stride| {
            let base = if accumulate { Base::Out } else { Base::Nothing };
            // SAFETY: `out` has `stride` elements for each row.
            unsafe { multiply_elsewhere(Term { factor, a, b }, base, out.as_mut_ptr(), stride) }
        });
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn so_is_one_with_the_lesser_instructions(shape in shapes(70)) {
        for instructions in tile::Instructions::all() {
            shape.check(|a, b, out, stride| {
                let base = if shape.accumulate { Base::Out } else { Base::Nothing };
                let (term, out) = (Term { factor: shape.factor, a, b }, out.as_mut_ptr());
                // SAFETY: `out` has `stride` elements for each row, and the machine has the instructions.
                unsafe { block::multiply(instructions, term, base, None, out, stride) }
            });
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn so_is_a_large_one_that_threads_share(shape in shapes(500)) {
        let Shape { factor, accumulate, .. } = shape;
        shape.check(|a, b, out, stride| {
            multiply(factor, a, b, out, stride, accumulate, Threads::All);
        });
    }
}

#[test]
fn a_row_is_added_to_every_row() {
    for (rows, depth, columns) in [(3, 5, 7), (200, 400, 500), (4, 0, 20)] {
        let (left, right, row) = (
            numbers(rows * depth, 1),
            numbers(depth * columns, 2),
            numbers(columns, 3),
        );
        let (a, b) = (
            Matrix::new(&left, rows, depth),
            Matrix::new(&right, depth, columns),
        );
        let mut wanted = row.repeat(rows);
        multiply(1.0, a, b, &mut wanted, columns, true, Threads::One);
        assert_eq!(product(a, b, Some(&row)), wanted);
    }
}

#[test]
fn a_product_that_is_added_to_another_goes_on_with_its_sums() {
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
            let (a, b) = (
                Matrix::new(&a, rows, depth),
                matrix(&b, (depth, columns), 0, turned),
            );
            let (c, d) = (
                Matrix::new(&c, rows, more),
                matrix(&d, (more, columns), 0, !turned),
            );
            let mut wanted = product(a, b, Some(&row));
            multiply(1.0, c, d, &mut wanted, columns, true, Threads::All);
            let found = product_and(a, b, Some(&row), Some(Pair { a: c, b: d }));
            let size = ((depth + more) as f32).sqrt();
            for (found, wanted) in found.iter().zip(&wanted) {
                assert!((found - wanted).abs() < 2e-6 * size, "{found} and {wanted}");
            }
        }
    }
}

#[test]
fn products_side_by_side_are_each_what_it_is_alone() {
    for (rows, depth, widths, rank) in [
        (3, 5, [7, 0, 2], 2),
        (130, 128, [128, 90, 128], 16),
        (300, 200, [400, 512, 33], 8),
    ] {
        let total: usize = widths.iter().sum();
        let [left, right] = [numbers(rows * depth, 1), numbers(depth * total, 2)];
        let [low, up, row] = [
            numbers(rows * rank, 3),
            numbers(rank * total, 4),
            numbers(total, 5),
        ];
        let a = Matrix::new(&left, rows, depth);
        let b = Matrix::new(&right, depth, total);
        let mut rights = Vec::new();
        let mut from = 0;
        for (i, width) in widths.into_iter().enumerate() {
            let until = from + width;
            let more = Pair {
                a: Matrix::new(&low, rows, rank),
                b: Matrix::new(&up, rank, total).some_columns(from, until),
            };
            rights.push(Right {
                b: b.some_columns(from, until),
                row: (i != 1).then_some(&row[from..until]),
                more: (i != 2).then_some(more),
            });
            from = until;
        }
        let found = products(a, &rights);
        let mut from = 0;
        for Right { b, row, more } in &rights {
            let alone = product_and(a, *b, *row, *more);
            for (i, alone) in alone.chunks_exact(b.columns.max(1)).enumerate() {
                assert!(found[i * total + from..][..b.columns] == *alone);
            }
            from += b.columns;
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
        let mut alone = vec![0.0; rows * columns];
        multiply(1.0, a, b, &mut alone, columns, false, Threads::One);
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            let shared = pool.unwrap().install(|| product(a, b, None));
            assert!(shared == alone, "{threads} threads");
        }
    }
}
