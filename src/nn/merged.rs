//! Adapters merged into the weights while nothing is learnt: sampling calls a layer so often that forming W + scale·B·A
//! once is cheaper than the adapter's own two products each time.

use std::cell::RefCell;
use std::collections::HashMap;

use candle_core::{Tensor, TensorId};

use super::adapter::Lora;
use super::{Weight, is_no_grad, ops};
use crate::Result;

type Merged = HashMap<(TensorId, usize), Weight>;

thread_local! {
    /// Merged weights by the identity of their first A and their rows, while [`merged`] runs.
    static MERGED: RefCell<Option<Merged>> = const { RefCell::new(None) };
}

/// Runs `body`, in which adapters must not change. A layer that runs inside [`super::no_grad`] merges its adapter into
/// a copy of its weight at its first call, if the adapter's share of the work is worth that; the copies go with the end
/// of `body`.
pub fn merged<T>(body: impl FnOnce() -> T) -> T {
    struct Restore(Option<Merged>);
    impl Drop for Restore {
        fn drop(&mut self) {
            MERGED.set(self.0.take());
        }
    }
    let _restore = Restore(MERGED.replace(Some(HashMap::new())));
    body()
}

/// A frozen `weight` (outputs, inputs) with scale·B·A of each of `blocks` added to its rows from the block's first on,
/// where it is to be used.
pub(super) fn weight(weight: &Tensor, blocks: &[(usize, &Lora)]) -> Result<Option<Weight>> {
    let Some((_, first)) = blocks.first() else {
        return Ok(None);
    };
    if !is_no_grad() || !is_worth_it(weight, blocks)? {
        return Ok(None);
    }
    MERGED.with_borrow_mut(|merged| {
        let Some(merged) = merged else {
            return Ok(None);
        };
        let key = (first.a.id(), weight.dim(0)?);
        if let Some(known) = merged.get(&key) {
            return Ok(Some(known.clone()));
        }
        let mut parts = Vec::new();
        let mut end = 0;
        for (start, lora) in blocks {
            let addition = (ops::linear(&lora.b, &lora.a.t()?, None)? * lora.scale)?;
            let outputs = addition.dim(0)?;
            parts.push(weight.narrow(0, end, start - end)?);
            let own = weight.narrow(0, *start, outputs)?;
            parts.push((own + addition.to_dtype(weight.dtype())?)?);
            end = start + outputs;
        }
        parts.push(weight.narrow(0, end, weight.dim(0)? - end)?);
        parts.retain(|part| part.elem_count() > 0);
        let sum = match parts.as_slice() {
            [one] => one.detach(),
            more => Tensor::cat(more, 0)?.detach(),
        };
        let sum = Weight::Tensor(sum).turned()?;
        merged.insert(key, sum.clone());
        Ok(Some(sum))
    })
}

/// Whether an adapter makes up more than a twentieth of its rows' multiplications. In a large layer it does not, and
/// a second copy of its weight would cost more than it saves.
fn is_worth_it(weight: &Tensor, blocks: &[(usize, &Lora)]) -> Result<bool> {
    let inputs = weight.dim(1)?;
    for (_, lora) in blocks {
        let (outputs, rank) = lora.b.dims2()?;
        if 20 * rank * (outputs + inputs) > outputs * inputs {
            return Ok(true);
        }
    }
    Ok(false)
}
