//! Whether the shapes that an operation is given fit, and what they come to: asked alike wherever it is computed.

use candle_core::{Result, Tensor};

use super::ops::Mask;

/// The sizes of a linear layer's call.
#[derive(Clone, Copy)]
pub struct Linear {
    pub rows: usize,
    pub inputs: usize,
    pub outputs: usize,
}

impl Linear {
    /// Of `x` (…, inputs) and a weight (outputs, inputs).
    pub fn of(x: &Tensor, (outputs, inputs): (usize, usize)) -> Result<Self> {
        if x.dims().last() != Some(&inputs) {
            candle_core::bail!(
                "a linear layer of {inputs} inputs was given a tensor of shape {:?}",
                x.dims()
            );
        }
        Ok(Self {
            rows: x.elem_count() / inputs.max(1),
            inputs,
            outputs,
        })
    }

    /// The rank of the adapter with factors `a` (rank, inputs) and `b` (outputs, rank).
    pub fn rank(&self, a: &Tensor, b: &Tensor) -> Result<usize> {
        match (a.dims2()?, b.dims2()?) {
            ((rank, inputs), factors)
                if inputs == self.inputs && factors == (self.outputs, rank) =>
            {
                Ok(rank)
            }
            _ => candle_core::bail!(
                "the factors of an adapter have shapes {:?} and {:?}, the layer's weight ({}, {})",
                a.dims(),
                b.dims(),
                self.outputs,
                self.inputs
            ),
        }
    }

    /// The bias has one value for each output.
    pub fn check_bias(&self, bias: &Tensor) -> Result<()> {
        if bias.elem_count() != self.outputs {
            candle_core::bail!(
                "a bias of shape {:?} for {} outputs",
                bias.dims(),
                self.outputs
            );
        }
        Ok(())
    }

    /// The shape of the result for `x`.
    pub fn result(&self, x: &Tensor) -> Vec<usize> {
        let mut dims = x.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = self.outputs;
        }
        dims
    }
}

/// The sizes of an attention's call: `q` (b, h, n, d), `k` and `v` (b, h, m, d).
#[derive(Clone, Copy)]
pub struct Attention {
    pub b: usize,
    pub h: usize,
    pub n: usize,
    pub m: usize,
    pub d: usize,
    /// Whether later keys are hidden; the mask, if there is one too, then leaves every query its own key.
    pub causal: bool,
}

impl Attention {
    pub fn of(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Mask) -> Result<Self> {
        let (b, h, n, d) = q.dims4()?;
        let m = k.dim(2)?;
        let causal = matches!(mask, Mask::Causal | Mask::CausalKeys(_));
        if k.dims() != [b, h, m, d]
            || v.dims() != [b, h, m, d]
            || (causal && m < n)
            || (m == 0 && n > 0)
        {
            candle_core::bail!(
                "attention of queries {:?}, keys {:?} and values {:?}",
                q.dims(),
                k.dims(),
                v.dims()
            );
        }
        Ok(Self {
            b,
            h,
            n,
            m,
            d,
            causal,
        })
    }
}

/// The length of the rows that a norm is over, and of its `parameters`.
pub fn norm<'a>(x: &Tensor, parameters: impl IntoIterator<Item = &'a Tensor>) -> Result<usize> {
    let width = x.dims().last().copied().unwrap_or(0).max(1);
    for parameter in parameters {
        if parameter.dims() != [width] {
            candle_core::bail!(
                "a norm's parameter of shape {:?} for width {width}",
                parameter.dims()
            );
        }
    }
    Ok(width)
}

/// Images and channels of `x` (b, c, …), whose channels make equal groups.
pub fn group_norm(
    x: &Tensor,
    groups: usize,
    weight: &Tensor,
    bias: &Tensor,
) -> Result<(usize, usize)> {
    let (b, c) = match x.dims() {
        [b, c, ..] => (*b, *c),
        other => candle_core::bail!("group norm of a tensor of shape {other:?}"),
    };
    if groups == 0 || c % groups != 0 || weight.dims() != [c] || bias.dims() != [c] {
        candle_core::bail!(
            "group norm of {c} channels in {groups} groups with weight {:?} and bias {:?}",
            weight.dims(),
            bias.dims()
        );
    }
    Ok((b, c))
}

/// The angles of a rotary embedding have a row for each position of `x` (b, h, n, d) and a value for each pair.
pub fn check_rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<()> {
    let (_, _, n, d) = x.dims4()?;
    if d % 2 != 0 || cos.dims() != [n, d / 2] || sin.dims() != [n, d / 2] {
        candle_core::bail!(
            "rotary embedding of {:?} by angles of {:?} and {:?}",
            x.dims(),
            cos.dims(),
            sin.dims()
        );
    }
    Ok(())
}

/// The gate and the values of a gated activation are alike.
pub fn check_gate(gate: &Tensor, up: &Tensor) -> Result<()> {
    if gate.dims() != up.dims() {
        candle_core::bail!(
            "a gate of shape {:?} for values of shape {:?}",
            gate.dims(),
            up.dims()
        );
    }
    Ok(())
}

/// The sizes of a sequence `x` (b, n, c) with one of each of `vectors` (b, c) for an image.
pub fn sequence(x: &Tensor, vectors: &[&Tensor]) -> Result<(usize, usize, usize)> {
    let (b, n, c) = x.dims3()?;
    if let Some(vector) = vectors.iter().find(|v| v.dims() != [b, c]) {
        candle_core::bail!(
            "a vector of {:?} for a sequence of {:?}",
            vector.dims(),
            x.dims()
        );
    }
    Ok((b, n, c))
}

/// [`sequence`] with another of its own shape.
pub fn two_sequences(x: &Tensor, y: &Tensor, vectors: &[&Tensor]) -> Result<(usize, usize, usize)> {
    if y.dims() != x.dims() {
        candle_core::bail!("{:?} added to {:?}", y.dims(), x.dims());
    }
    sequence(x, vectors)
}
