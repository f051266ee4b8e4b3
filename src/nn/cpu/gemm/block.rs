//! A product on one thread, cut so that what is read again and again stays in a core's caches: a block of the right
//! matrix in the second level, a few rows of the left one in the first.

use std::cell::RefCell;

use super::lanes::turn;
use super::tile::{Copying, Instructions, Tile, VECTORS};
use super::{Base, Matrix};

/// The most rows and columns of a block of the right matrix: half a MiB.
const DEPTH: usize = 384;
const WIDTH: usize = super::MOST_COLUMNS;

/// Up to this many vectors wide, a block has too few panels to be worth copying columns of the left matrix for.
const NARROW: usize = 9;

/// A cache line: vectors that lie across two are slower.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[expect(dead_code, reason = "read and written through pointers")] [f32; 16]);

/// Memory for one thread's copies of panels of both matrices.
#[derive(Default)]
struct Scratch {
    a: Vec<Line>,
    b: Vec<Line>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

fn room(lines: &mut Vec<Line>, length: usize) -> *mut f32 {
    let count = length.div_ceil(16);
    if lines.len() < count {
        lines.resize(count, Line([0.0; 16]));
    }
    lines.as_mut_ptr().cast()
}

/// `out = factor · a·b + base`.
///
/// # Safety
/// As for [`super::multiply_into`], and the machine must have these instructions.
pub unsafe fn multiply(
    instructions: Instructions,
    factor: f32,
    a: Matrix,
    b: Matrix,
    base: Base,
    out: *mut f32,
    stride: usize,
) {
    let lanes = instructions.lanes();
    let vectors = b.columns.div_ceil(lanes);
    let widths = vectors.div_ceil(WIDTH / lanes);
    // At least one, which sets the result where there is nothing to add up.
    let depths = a.columns.div_ceil(DEPTH).max(1);
    SCRATCH.with_borrow_mut(|scratch| {
        for width in 0..widths {
            let first = vectors * width / widths * lanes;
            let until = (vectors * (width + 1) / widths * lanes).min(b.columns);
            for depth in 0..depths {
                let from = a.columns * depth / depths;
                let to = a.columns * (depth + 1) / depths;
                // SAFETY: the columns from `first` on of `out`.
                let out = unsafe { out.add(first) };
                let (base, base_stride) = match base {
                    _ if depth > 0 => (Some(out.cast_const()), stride),
                    Base::Nothing => (None, 0),
                    Base::Out => (Some(out.cast_const()), stride),
                    Base::Row(row) => (Some(row[first..until].as_ptr()), 0),
                    Base::Matrix(values, rows) => (Some(values[first..].as_ptr()), rows),
                };
                let slice = Slice {
                    instructions,
                    factor,
                    a: a.some_columns(from, to),
                    b: b.some_rows(from, to).some_columns(first, until),
                    base,
                    base_stride,
                    out,
                    stride,
                };
                // SAFETY: this function's contract; the slice is a part of the product.
                unsafe { slice.multiply(scratch) }
            }
        }
    });
}

/// A product whose right matrix is one block.
struct Slice<'a> {
    instructions: Instructions,
    factor: f32,
    a: Matrix<'a>,
    b: Matrix<'a>,
    base: Option<*const f32>,
    base_stride: usize,
    out: *mut f32,
    stride: usize,
}

/// Some columns of a block: a row of tiles' width.
struct Panel {
    /// Its first column.
    first: usize,
    vectors: usize,
    /// Elements of a row of its copy.
    width: usize,
    /// Columns that there are.
    columns: usize,
}

impl Slice<'_> {
    /// # Safety
    /// As for [`multiply`].
    unsafe fn multiply(&self, scratch: &mut Scratch) {
        let (a, b, depth) = (self.a, self.b, self.a.columns);
        let (lanes, height) = (self.instructions.lanes(), self.instructions.rows());
        let vectors = b.columns.div_ceil(lanes);
        let copied_a = room(&mut scratch.a, height * depth);
        let copied_b = room(&mut scratch.b, vectors * lanes * depth);
        let mut nowhere = [0.0f32; VECTORS * 16];
        let nowhere = nowhere.as_mut_ptr();
        let copies_a = a.column_stride != 1 && vectors > NARROW;
        for first_row in (0..a.rows).step_by(height) {
            let rows = (a.rows - first_row).min(height);
            for panel in self.panels() {
                // SAFETY: each panel has its own part of the copy; both matrices lie within their slices.
                unsafe {
                    let copy = copied_b.add(panel.first * depth);
                    let adjacent = b.column_stride == 1 && panel.columns == panel.width;
                    if first_row == 0 && !adjacent {
                        self.pack(&panel, copy);
                    }
                    let in_place = first_row == 0 && adjacent;
                    let copy_b = in_place && a.rows > height;
                    let (from_b, b_step) = match in_place {
                        true => (b.at(0, panel.first), b.row_stride),
                        false => (copy.cast_const(), panel.width),
                    };
                    let copy_a = copies_a && panel.first == 0;
                    let (from_a, a_row, a_step) = match copies_a && panel.first > 0 {
                        true => (copied_a.cast_const(), 1, rows),
                        false => (a.at(first_row, 0), a.row_stride, a.column_stride),
                    };
                    let copying = match (copy_a, copy_b) {
                        (true, _) => Copying::Both,
                        (false, true) => Copying::B,
                        (false, false) => Copying::Nothing,
                    };
                    let base = self
                        .base
                        .map(|base| base.add(first_row * self.base_stride + panel.first));
                    let kernel = self.instructions.kernel(rows, panel.vectors, copying);
                    kernel(&Tile {
                        a: from_a,
                        a_row,
                        a_step,
                        b: from_b,
                        b_step,
                        depth,
                        out: self.out.add(first_row * self.stride + panel.first),
                        stride: self.stride,
                        base,
                        base_stride: self.base_stride,
                        factor: self.factor,
                        last: panel.columns - (panel.vectors - 1) * lanes,
                        copy_a: if copy_a { copied_a } else { nowhere },
                        copy_a_step: if copy_a { rows } else { 0 },
                        copy_b: if copy_b { copy } else { nowhere },
                        copy_b_step: if copy_b { panel.width } else { 0 },
                    });
                }
            }
        }
    }

    /// Panels of [`VECTORS`] vectors, but of two and two rather than of three and one: a tile of one is slow.
    fn panels(&self) -> impl Iterator<Item = Panel> {
        let lanes = self.instructions.lanes();
        let columns = self.b.columns;
        let mut first = 0;
        std::iter::from_fn(move || {
            let vectors = match (columns - first).div_ceil(lanes) {
                0 => return None,
                4 => 2,
                left => left.min(VECTORS),
            };
            let width = vectors * lanes;
            let panel = Panel {
                first,
                vectors,
                width,
                columns: width.min(columns - first),
            };
            first += panel.columns;
            Some(panel)
        })
    }

    /// Copies a panel that cannot be read in place, with zeros after its last column.
    ///
    /// # Safety
    /// As for [`multiply`]; `to` must have room for the panel.
    unsafe fn pack(&self, panel: &Panel, to: *mut f32) {
        let (b, depth) = (self.b, self.a.columns);
        // SAFETY: the panel's elements lie within the slice, its rows within `to`; the kernels' machines have AVX.
        unsafe {
            if b.column_stride == 1 {
                for k in 0..depth {
                    let to = to.add(k * panel.width);
                    std::ptr::copy_nonoverlapping(b.at(k, panel.first), to, panel.columns);
                    std::ptr::write_bytes(to.add(panel.columns), 0, panel.width - panel.columns);
                }
                return;
            }
            let whole = panel.columns / 8 * 8;
            for i in (0..whole).step_by(8) {
                let from = b.at(0, panel.first + i);
                turn(from, b.column_stride, depth, to.add(i), panel.width);
            }
            for k in 0..depth {
                for i in whole..panel.width {
                    *to.add(k * panel.width + i) = match i < panel.columns {
                        true => *b.at(k, panel.first + i),
                        false => 0.0,
                    };
                }
            }
        }
    }
}
