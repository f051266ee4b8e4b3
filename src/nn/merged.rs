//! Adapters merged into the weights while nothing is learnt: sampling calls a layer so often that forming W + scale·B·A
//! once is cheaper than the adapter's own two products each time.

use std::cell::RefCell;
use std::collections::HashMap;

use candle_core::{Tensor, TensorId};

use super::adapter::Lora;
use super::{is_no_grad, ops};
use crate::Result;

thread_local! {
    /// Merged weights by the identity of their A, while [`merged`] runs.
    static MERGED: RefCell<Option<HashMap<TensorId, Merged>>> = const { RefCell::new(None) };
}

/// W + scale·B·A.
#[derive(Clone)]
pub(super) struct Merged {
    /// (outputs, inputs)
    weight: Tensor,
    /// (inputs, outputs): what a product with several rows reads in place, on the CPU.
    turned: Option<Tensor>,
}

impl Merged {
    /// See [`ops::linear`].
    pub(super) fn forward(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        match &self.turned {
            Some(turned) => ops::linear_in_place(x, &self.weight, turned, bias),
            None => ops::linear(x, &self.weight, bias),
        }
    }
}

/// Runs `body`, in which adapters must not change. A layer that runs inside [`super::no_grad`] merges its adapter into
/// a copy of its weight at its first call, if the adapter's share of the work is worth that; the copies go with the end
/// of `body`.
pub fn merged<T>(body: impl FnOnce() -> T) -> T {
    struct Restore(Option<HashMap<TensorId, Merged>>);
    impl Drop for Restore {
        fn drop(&mut self) {
            MERGED.set(self.0.take());
        }
    }
    let _restore = Restore(MERGED.replace(Some(HashMap::new())));
    body()
}

/// W + scale·B·A for a frozen `weight` (outputs, inputs), where it is to be used.
pub(super) fn weight(weight: &Tensor, lora: &Lora) -> Result<Option<Merged>> {
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
        let weight = (weight + addition.to_dtype(weight.dtype())?)?.detach();
        let here = weight.device().is_cpu();
        let turned = here.then(|| weight.t()?.contiguous()).transpose()?;
        let sum = Merged { weight, turned };
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
