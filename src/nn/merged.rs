//! Adapters merged into the weights while nothing is learnt: sampling calls a layer so often that forming W + scale·B·A
//! once is cheaper than the adapter's own two products each time.

use candle_core::Tensor;

use super::adapter::Lora;
use super::{Context, Weight, ops};
use crate::Result;

/// A frozen `weight` (outputs, inputs) with scale·B·A of `lora` added to it, where it is to be used: inside
/// [`super::merged`] and [`super::no_grad`].
pub(super) fn weight(weight: &Tensor, lora: &Lora) -> Result<Option<Weight>> {
    let context = Context::current();
    let Some(merged) = context.merged.filter(|_| context.no_grad) else {
        return Ok(None);
    };
    if !is_worth_it(weight, lora)? {
        return Ok(None);
    }
    if let Some(known) = merged.borrow().get(&lora.a.id()) {
        return Ok(Some(known.clone()));
    }
    let addition = (ops::linear(&lora.b, &lora.a.t()?, None)? * lora.scale)?;
    let sum = (weight + addition.to_dtype(weight.dtype())?)?.detach();
    let sum = Weight::Tensor(sum).turned()?;
    merged.borrow_mut().insert(lora.a.id(), sum.clone());
    Ok(Some(sum))
}

/// Whether an adapter makes up more than a twentieth of a layer's multiplications. In a large layer it does not, and a
/// second copy of its weight would cost more than it saves.
fn is_worth_it(weight: &Tensor, lora: &Lora) -> Result<bool> {
    let (outputs, inputs) = weight.dims2()?;
    let rank = lora.b.dim(1)?;
    Ok(20 * rank * (outputs + inputs) > outputs * inputs)
}
