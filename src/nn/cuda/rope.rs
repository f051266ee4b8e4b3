//! Rotary position embedding of (b, h, n, d) in both pairings.

use candle_core::{DType, Result, Tensor};

use super::{Arg, Buffer, Card, Grid, adjacent, at, int, kept, strides, takes};
use crate::nn::shapes::check_rope;
use crate::nn::vjp::record;

/// Whether [`rope`] can take these: `x` in any of the three types, the angles in f32 and not tracked.
pub fn takes_angles(x: &Tensor, cos: &Tensor, sin: &Tensor) -> bool {
    takes([x])
        && takes([cos, sin])
        && cos.dtype() == DType::F32
        && cos.device().same_device(x.device())
        && !cos.track_op()
        && !sin.track_op()
}

/// See [`crate::nn::ops::rope_adjacent`], and [`crate::nn::ops::rope_halves`] if not `pairs_adjacent`.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, pairs_adjacent: bool) -> Result<Tensor> {
    check_rope(x, cos, sin)?;
    let (cos, sin) = (kept(cos)?, kept(sin)?);
    let turn = move |x: &Tensor, sign: f64| -> Result<Buffer> {
        let x = adjacent(x)?;
        let (_, h, n, d) = x.dims4()?;
        let (card, pairs) = (Card::of(&x)?, x.elem_count() / 2);
        let y = card.buffer(2 * pairs, x.dtype())?;
        let mut args = vec![Arg::from(&y), at(&x)?, at(&cos)?, at(&sin)?];
        args.extend([int(pairs)?, int(h)?, int(n)?, int(d / 2)?]);
        args.extend([Arg::from(sign), pairs_adjacent.into()]);
        let steps = x.stride();
        args.extend(strides([steps[0], steps[1], steps[2]]));
        // SAFETY: `x` (b, h, n, d) has these strides, `y` as many pairs, and the angles (n, d/2) were checked.
        unsafe { card.launch("rope", x.dtype(), Grid::each(pairs), &args) }?;
        Ok(y)
    };
    let y = turn(x, 1.0)?.into_storage();
    record(&[x], y, x.shape(), move |g| {
        // A rotation's transpose turns the other way.
        Ok(vec![turn(g, -1.0)?.tensor(g.shape())])
    })
}
