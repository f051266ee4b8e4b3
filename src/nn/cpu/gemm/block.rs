//! A product on one thread, cut so that what is read again and again stays in a core's caches: a block of the right
//! matrix in the second level, a few rows of the left one in the first.

use std::cell::RefCell;

use super::lanes::turn;
use super::tile::{Copying, Instructions, Strips, Tile, VECTORS};
use super::{Base, Matrix, Pair, Term};

/// The most rows and columns of a block of the right matrix: half a MiB.
const DEPTH: usize = 384;
const WIDTH: usize = super::MOST_COLUMNS;

/// Up to this many vectors wide, a block has too few panels to be worth copying columns of the left matrix for.
const NARROW: usize = 9;

/// A cache line: vectors that lie across two are slower.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[expect(dead_code, reason = "read and written through pointers")] [f32; 16]);

/// Memory for one thread's copies of panels of all matrices.
#[derive(Default)]
struct Scratch {
    a: Vec<Line>,
    b: Vec<Line>,
    more_b: Vec<Line>,
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

/// `out = term + base + more`, where `term` has no factor if there is more.
///
/// # Safety
/// As for [`super::spread`], and the machine must have these instructions.
pub unsafe fn multiply(
    instructions: Instructions,
    term: Term,
    base: Base,
    more: Option<Pair>,
    out: *mut f32,
    stride: usize,
) {
    let Term { factor, a, b } = term;
    let lanes = instructions.lanes();
    let vectors = b.columns.div_ceil(lanes);
    let widths = vectors.div_ceil(WIDTH / lanes);
    // At least one, which sets the result where there is nothing to add up.
    let depths = a.columns.div_ceil(DEPTH).max(1);
    // A deep one is cut up itself.
    let (with_last, afterwards) = match more {
        Some(more) if more.a.columns > DEPTH => (None, Some(more)),
        other => (other, None),
    };
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
                let more = with_last.filter(|_| depth + 1 == depths);
                let slice = Slice {
                    instructions,
                    term: Term {
                        factor,
                        a: a.some_columns(from, to),
                        b: b.some_rows(from, to).some_columns(first, until),
                    },
                    more: more.map(|more| more.some_columns(first, until)),
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
    if let Some(more) = afterwards {
        // SAFETY: this function's contract.
        unsafe { multiply(instructions, more.term(), Base::Out, None, out, stride) }
    }
}

/// A product whose right matrix is one block, and one to add to it.
struct Slice<'a> {
    instructions: Instructions,
    term: Term<'a>,
    more: Option<Pair<'a>>,
    base: Option<*const f32>,
    base_stride: usize,
    out: *mut f32,
    stride: usize,
}

/// Some columns of a block: a row of tiles' width.
#[derive(Clone, Copy)]
struct Panel {
    /// Its first column.
    first: usize,
    vectors: usize,
    /// Elements of a row of its copy.
    width: usize,
    /// Columns that there are.
    columns: usize,
}

/// The most panels of a block, where vectors are shortest; four that are left over make two panels.
const PANELS: usize = WIDTH.div_ceil(VECTORS * 8) + 1;

impl Slice<'_> {
    /// # Safety
    /// As for [`multiply`].
    unsafe fn multiply(&self, scratch: &mut Scratch) {
        let Term { factor, a, b } = self.term;
        let depth = a.columns;
        let (lanes, height) = (self.instructions.lanes(), self.instructions.rows());
        let elements = b.columns.next_multiple_of(lanes);
        let copied_a = room(&mut scratch.a, height * depth);
        let copied_b = room(&mut scratch.b, elements * depth);
        let more_depth = self.more.map_or(0, |more| more.a.columns);
        let copied_more = room(&mut scratch.more_b, elements * more_depth);
        let mut nowhere = [0.0f32; VECTORS * 16];
        let nowhere = nowhere.as_mut_ptr();
        let copies_a = a.column_stride != 1 && elements > NARROW * lanes;
        let mut panels = [None; PANELS];
        for (i, panel) in self.panels().enumerate() {
            panels[i] = Some(panel);
        }
        for first_row in (0..a.rows).step_by(height) {
            let rows = (a.rows - first_row).min(height);
            // SAFETY: rows of both lie within their slices.
            let (out, base) = unsafe {
                let base = self.base.map(|base| base.add(first_row * self.base_stride));
                (self.out.add(first_row * self.stride), base)
            };
            let mut tile = Tile {
                strips: Strips {
                    a: a.at(first_row, 0),
                    a_row: a.row_stride,
                    a_step: a.column_stride,
                    b: copied_b,
                    b_step: 0,
                    depth,
                },
                more: None,
                out,
                stride: self.stride,
                base,
                base_stride: self.base_stride,
                factor,
                last: 0,
                copy_a: nowhere,
                copy_a_step: 0,
                copy_b: nowhere,
                copy_b_step: 0,
            };
            for panel in panels.iter().map_while(Option::as_ref) {
                // SAFETY: each panel has its own part of the copy; all matrices lie within their slices.
                unsafe {
                    let copy = copied_b.add(panel.first * depth);
                    let strips = &mut tile.strips;
                    let mut copying = Copying::Nothing;
                    (strips.b, strips.b_step) = (copy, panel.width);
                    if first_row == 0 {
                        if !panel.is_adjacent(&b) {
                            panel.pack(&b, copy);
                        } else {
                            (strips.b, strips.b_step) = (b.at(0, panel.first), b.row_stride);
                            if a.rows > height {
                                copying = Copying::B;
                                (tile.copy_b, tile.copy_b_step) = (copy, panel.width);
                            }
                        }
                    }
                    if copies_a && panel.first == 0 {
                        copying = Copying::Both;
                        (tile.copy_a, tile.copy_a_step) = (copied_a, rows);
                    }
                    if let Some(more) = &self.more {
                        let copy = copied_more.add(panel.first * more_depth);
                        let adjacent = panel.is_adjacent(&more.b);
                        if first_row == 0 && !adjacent {
                            panel.pack(&more.b, copy);
                        }
                        let (b, b_step) = match adjacent {
                            true => (more.b.at(0, panel.first), more.b.row_stride),
                            false => (copy.cast_const(), panel.width),
                        };
                        tile.more = Some(Strips {
                            a: more.a.at(first_row, 0),
                            a_row: more.a.row_stride,
                            a_step: more.a.column_stride,
                            b,
                            b_step,
                            depth: more_depth,
                        });
                    }
                    tile.out = out.add(panel.first);
                    tile.base = base.map(|base| base.add(panel.first));
                    tile.last = panel.columns - (panel.vectors - 1) * lanes;
                    let kernel = self.instructions.kernel(rows, panel.vectors, copying);
                    kernel(&tile);
                    if copies_a && panel.first == 0 {
                        let strips = &mut tile.strips;
                        (strips.a, strips.a_row, strips.a_step) = (copied_a, 1, rows);
                    }
                }
            }
        }
    }

    /// Panels of [`VECTORS`] vectors, but of two and two rather than of three and one: a tile of one is slow.
    fn panels(&self) -> impl Iterator<Item = Panel> {
        let lanes = self.instructions.lanes();
        let columns = self.term.b.columns;
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
}

impl Panel {
    /// Whether the panel of `b` can be read in place.
    fn is_adjacent(&self, b: &Matrix) -> bool {
        b.column_stride == 1 && self.columns == self.width
    }

    /// Copies the panel of a matrix that cannot be read in place. Whatever follows its last column
    /// there is multiplied too, and left out of the result.
    ///
    /// # Safety
    /// As for [`multiply`]; `to` must have room for it.
    unsafe fn pack(&self, b: &Matrix, to: *mut f32) {
        let depth = b.rows;
        // SAFETY: the panel's elements lie within the slice, its rows within `to`; the kernels' machines have AVX.
        unsafe {
            if b.column_stride == 1 {
                for k in 0..depth {
                    let to = to.add(k * self.width);
                    std::ptr::copy_nonoverlapping(b.at(k, self.first), to, self.columns);
                }
                return;
            }
            let whole = self.columns / 8 * 8;
            // The last eight may have some of those before among them.
            let last = (self.columns > whole && whole > 0).then(|| self.columns - 8);
            for i in (0..whole).step_by(8).chain(last) {
                let from = b.at(0, self.first + i);
                turn(from, b.column_stride, depth, to.add(i), self.width);
            }
            if whole == 0 {
                for k in 0..depth {
                    for i in 0..self.columns {
                        *to.add(k * self.width + i) = *b.at(k, self.first + i);
                    }
                }
            }
        }
    }
}
