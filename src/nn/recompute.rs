//! Blocks that run again in the backward pass instead of keeping what they computed: a training step then holds the
//! inputs of all blocks and the activations of one (Chen et al. 2016, arXiv 1604.06174).

use std::collections::HashMap;
use std::rc::Rc;

use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, TensorId, Var};
use rand_chacha::ChaCha8Rng;

use super::context::{Context, Gathered};
use super::{is_recomputing, no_grad, recomputing, vjp};
use crate::{Error, Result};

/// `body(inputs, generator)`, one block of a network with one result. Inside [`super::recomputing`] the block runs without a
/// graph now and again in the backward pass, there with the same state of `generator`: values and gradients are equal.
///
/// Whatever tracked tensor `body` depends on must be among `inputs`, at most six of them tracked, or be a variable.
pub fn recompute<F>(
    inputs: &[&Tensor],
    generator: Option<&mut ChaCha8Rng>,
    body: F,
) -> Result<Tensor>
where
    F: Fn(&[Tensor], Option<&mut ChaCha8Rng>) -> Result<Tensor> + Send + Sync + 'static,
{
    if !is_recomputing() {
        let inputs: Vec<Tensor> = inputs.iter().map(|t| (*t).clone()).collect();
        return body(&inputs, generator);
    }
    let state = generator.as_deref().cloned();
    let kept: Vec<Tensor> = inputs.iter().map(|t| t.detach()).collect();
    let wanted: Vec<bool> = inputs.iter().map(|t| t.track_op()).collect();
    let value = no_grad(|| body(&kept, generator))?.detach();
    let value = match value.layout().start_offset() {
        0 => value.contiguous()?,
        _ => value.force_contiguous()?,
    };
    let mut tracked: Vec<&Tensor> = inputs.iter().copied().filter(|t| t.track_op()).collect();
    // Even the first block, whose input nobody differentiates, has variables inside.
    let anchor;
    if tracked.is_empty() {
        anchor = Var::zeros((), DType::F32, value.device())?;
        tracked.push(&anchor);
    }
    let again = move |gradient: &Tensor| -> Result<Vec<Tensor>> {
        let leaves = kept
            .iter()
            .zip(&wanted)
            .map(|(kept, wanted)| match wanted {
                true => Ok(Var::from_tensor(kept)?.into_inner()),
                false => Ok(kept.clone()),
            })
            .collect::<Result<Vec<Tensor>>>()?;
        let value = recomputing(false, || body(&leaves, state.clone().as_mut()))?;
        let mut gradients = differentiate(&value, gradient)?;
        let of_inputs = leaves
            .iter()
            .zip(&wanted)
            .filter(|(_, wanted)| **wanted)
            .map(|(leaf, _)| match gradients.remove(&leaf.id()) {
                Some(gradient) => Ok(gradient),
                None => Ok(leaf.zeros_like()?),
            })
            .collect::<Result<Vec<Tensor>>>()?;
        collect(gradients)?;
        Ok(if of_inputs.is_empty() {
            vec![Tensor::zeros((), DType::F32, value.device())?]
        } else {
            of_inputs
        })
    };
    Ok(vjp::attach(&value, &tracked, move |gradient| {
        again(gradient).map_err(candle_core::Error::wrap)
    })?)
}

/// The gradients of all variables on which `value` depends, if its own is `gradient`.
fn differentiate(value: &Tensor, gradient: &Tensor) -> Result<HashMap<TensorId, Tensor>> {
    if !value.track_op() {
        return Ok(HashMap::new());
    }
    let end = vjp::pull(value, gradient.clone())?;
    let mut store = backward(&end)?;
    let nodes = end.sorted_nodes();
    let variables = nodes.into_iter().filter(|node| node.is_variable());
    Ok(variables
        .filter_map(|variable| Some((variable.id(), store.remove(variable)?)))
        .collect())
}

/// Gives gradients of variables to the [`backward`] that runs.
pub(super) fn collect(gradients: HashMap<TensorId, Tensor>) -> Result<()> {
    for (id, gradient) in gradients {
        if collect_variable(id, gradient)?.is_some() {
            return Err(Error::Invalid {
                what:
                    "a loss in blocks or parts of our own was differentiated by candle's backward"
                        .into(),
                hint: Some("call nn::backward, which knows of them".into()),
            });
        }
    }
    Ok(())
}

/// Adds `gradient` to what [`backward`] has of this variable; gives it back where that does not run.
pub(super) fn collect_variable(
    id: TensorId,
    gradient: Tensor,
) -> candle_core::Result<Option<Tensor>> {
    let Some(collected) = Context::current().collected else {
        return Ok(Some(gradient));
    };
    let mut collected = collected.borrow_mut();
    let sum = match collected.remove(&id) {
        Some(sum) => (sum + gradient)?,
        None => gradient.detach(),
    };
    collected.insert(id, sum);
    Ok(None)
}

/// The gradients of the scalar `loss`, with those of variables inside blocks that went through [`recompute`]. Like
/// candle's own, but gradients of variables that our operations find are not added to zeros first.
pub fn backward(loss: &Tensor) -> Result<GradStore> {
    let collected = Gathered::default();
    let context = Context {
        collected: Some(Rc::clone(&collected)),
        ..Context::current()
    };
    let mut store = context.run(|| loss.backward())?;
    let collected = collected.take();
    for (id, gradient) in collected {
        let sum = match store.get_id(id) {
            Some(outside) => (outside + gradient)?,
            None => gradient,
        };
        store.insert_id(id, sum);
    }
    Ok(store)
}
