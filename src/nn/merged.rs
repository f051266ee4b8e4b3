//! Adapters merged into the weights while nothing is learnt: sampling calls a layer so often that forming W + scale·B·A
//! once is cheaper than the adapter's own two products each time.

use std::cell::RefCell;
use std::collections::HashMap;

use candle_core::{Tensor, TensorId};

use super::adapter::Lora;
use super::{Weight, is_no_grad, ops};
use crate::Result;

thread_local! {
    /// Merged weights by the identity of their A, while [`merged`] runs.
    static MERGED: RefCell<Option<HashMap<TensorId, Weight>>> = const { RefCell::new(None) };
}

/// Runs `body`, in which adapters must not change. A layer that runs inside [`super::no_grad`] merges its adapter into
/// a copy of its weight at its first call, if the adapter's share of the work is worth that; the copies go with the end
/// of `body`.
pub fn merged<T>(body: impl FnOnce() -> T) -> T {
    struct Restore(Option<HashMap<TensorId, Weight>>);
    impl Drop for Restore {
        fn drop(&mut self) {
            MERGED.set(self.0.take());
        }
    }
    let _restore = Restore(MERGED.replace(Some(HashMap::new())));
    body()
}

/// W + scale·B·A for a frozen `weight` (outputs, inputs), where it is to be used.
pub(super) fn weight(weight: &Tensor, lora: &Lora) -> Result<Option<Weight>> {
    if !is_no_grad() || !is_worth_it(weight, lora)? {
        return Ok(None);
    }
    MERGED.with_borrow_mut(|merged| {
        let Some(merged) = merged else {
            return Ok(None);
        };
        let key = lora.a.id();
        if let Some(known) = merged.get(&key) {
            return Ok(Some(known.clone()));
        }
        let addition = (ops::linear(&lora.b, &lora.a.t()?, None)? * lora.scale)?;
        let sum = (weight + addition.to_dtype(weight.dtype())?)?.detach();
        let sum = Weight::Tensor(sum).turned()?;
        merged.insert(key, sum.clone());
        Ok(Some(sum))
    })
}

/// Whether the adapter makes up more than a twentieth of the layer's multiplications. In a large layer it does not, and
/// a second copy of its weight would cost more than it saves.
fn is_worth_it(weight: &Tensor, lora: &Lora) -> Result<bool> {
    let (outputs, inputs) = weight.dims2()?;
    let rank = lora.a.dim(0)?;
    Ok(20 * rank * (outputs + inputs) > outputs * inputs)
}
