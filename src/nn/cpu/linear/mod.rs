//! Linear layers, with and without low-rank additions, one or several of the same input at once.

mod adapters;
mod products;

use candle_core::{Result, Tensor};

use adapters::Adapters;
pub use products::column_sums;
use products::{forward, input_gradient, weight_gradient};

use super::{detached, tensor, values};
use crate::nn::Weight;
use crate::nn::ops::LoraBlock;
use crate::nn::shapes::Linear as Shapes;
use crate::nn::vjp::record;

/// `x` (…, inputs) to (…, outputs): x·Wᵀ + bias, W being `weights` one below the other, and what the adapters of
/// `blocks` add to it. Several weights are all in half precision, and nobody trains them. Where `merge`, W with its
/// adapters may be formed if that is less work; the result then rounds by how many rows `x` has.
///
/// See [`crate::nn::ops::linear`], [`crate::nn::ops::linear_lora`] and [`crate::nn::ops::fused_linear`].
pub fn linear(
    x: &Tensor,
    weights: &[Weight],
    bias: Option<&Tensor>,
    blocks: &[LoraBlock],
    merge: bool,
) -> Result<Tensor> {
    let shape = Shapes::of_stack(x, weights)?;
    let adapters = Adapters::new(blocks, &shape)?;
    let x_kept = detached(x)?;
    let weights_kept: Vec<Weight> = weights.iter().map(kept).collect::<Result<_>>()?;
    let merged = match (weights, &adapters) {
        ([weight], Some(adapters)) if merge && shape.is_deep() => match weight.tensor() {
            Some(weight) => {
                let sum = adapters.merged_into(&values(&detached(weight)?)?, &shape)?;
                Some([Weight::Tensor(tensor(sum, (shape.outputs, shape.inputs))?)])
            }
            None => None,
        },
        _ => None,
    };
    let (y, low) = match (&merged, &adapters) {
        (None, Some(adapters)) => {
            let low = adapters.low(&x_kept, &shape)?;
            let share = Some((adapters, &*low));
            let y = forward(&x_kept, &weights_kept, bias, &shape, share)?;
            (y, Some(low))
        }
        (Some(merged), _) => (forward(&x_kept, merged, bias, &shape, None)?, None),
        (None, None) => (forward(&x_kept, &weights_kept, bias, &shape, None)?, None),
    };
    let trained = match weights {
        [weight] => trained(weight),
        _ => None,
    };
    let wanted = [
        x.track_op(),
        trained.is_some(),
        bias.is_some_and(Tensor::track_op),
    ];
    let factors = blocks.iter().flat_map(|block| block.factors());
    let inputs: Vec<&Tensor> = [x]
        .into_iter()
        .chain(trained)
        .chain(bias)
        .chain(factors)
        .collect();
    let (x_dims, y_dims) = (x.dims().to_vec(), shape.result(x));
    record(&inputs, y, y_dims, move |gradient| {
        let g = values(gradient)?;
        let low_gradient = match &adapters {
            Some(adapters) if adapters.trains_a() || (wanted[0] && merged.is_none()) => {
                Some((adapters, adapters.low_gradient(&g, &shape)?))
            }
            _ => None,
        };
        let mut gradients = Vec::new();
        if wanted[0] {
            let dx = match (&merged, &low_gradient) {
                (Some(merged), _) => input_gradient(&g, merged, &shape, None)?,
                (None, Some((adapters, low_gradient))) => {
                    let share = Some((*adapters, &**low_gradient));
                    input_gradient(&g, &weights_kept, &shape, share)?
                }
                (None, None) => input_gradient(&g, &weights_kept, &shape, None)?,
            };
            gradients.push(tensor(dx, x_dims.clone())?);
        }
        if wanted[1] {
            let dw = weight_gradient(&g, &values(&x_kept)?, &shape);
            gradients.push(tensor(dw, (shape.outputs, shape.inputs))?);
        }
        if wanted[2] {
            gradients.push(tensor(column_sums(&g, shape.outputs), shape.outputs)?);
        }
        if let Some(adapters) = &adapters {
            let low_gradient = low_gradient.as_ref().map(|(_, gradient)| &**gradient);
            gradients.extend(adapters.gradients(
                &g,
                &x_kept,
                low.as_deref(),
                low_gradient,
                &shape,
            )?);
        }
        Ok(gradients)
    })
}

/// What a backward pass keeps of a weight.
fn kept(weight: &Weight) -> Result<Weight> {
    match weight {
        Weight::Tensor(tensor) => Ok(Weight::Tensor(detached(tensor)?)),
        Weight::Twice { .. } | Weight::Half(_) => Ok(weight.clone()),
    }
}

/// The weight, if it is trained.
fn trained(weight: &Weight) -> Option<&Tensor> {
    weight.tensor().filter(|tensor| tensor.track_op())
}
