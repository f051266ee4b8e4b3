//! A sum over many rows whose graph would be too large to keep: each slice of rows is differentiated as soon as it is
//! computed, and only the gradients stay. Made for the loss over a large vocabulary, whose logits are the largest
//! tensor of a training step.

use candle_core::{DType, Tensor, Var};

use super::is_no_grad;
use super::recompute::backward;
use super::vjp::{MOST_TRACKED, record};
use crate::{Error, Result};

/// The sum over slices of at most `at_once` rows of `x` (n, d) of `body(slice, first)`, a scalar in f32 of the slice and
/// the number of its first row. `parameters` is everything else that may be tracked in `body`.
///
/// On the CPU in f32, and with at most nine tracked tensors in all, one slice's graph exists at a time; elsewhere all
/// of them until the backward pass. Nothing is differentiated where nothing is tracked, or inside
/// [`no_grad`](super::no_grad).
pub fn sum_over_rows(
    x: &Tensor,
    parameters: &[&Tensor],
    at_once: usize,
    body: impl Fn(&Tensor, usize) -> Result<Tensor>,
) -> Result<Tensor> {
    let (n, _) = x.dims2()?;
    if n == 0 {
        return Err(Error::invalid(
            "a sum over no rows",
            "give at least one example with something to learn",
        ));
    }
    let starts = (0..n).step_by(at_once.max(1));
    let slice = |x: &Tensor, start: usize| x.narrow(0, start, at_once.max(1).min(n - start));
    let others: Vec<&Tensor> = parameters
        .iter()
        .copied()
        .filter(|parameter| parameter.track_op())
        .collect();
    let tracked = match is_no_grad() {
        true => 0,
        false => others.len() + usize::from(x.track_op()),
    };
    let here = x.device().is_cpu() && x.dtype() == DType::F32;
    if tracked == 0 || tracked > MOST_TRACKED || !here {
        let parts = starts
            .map(|start| body(&slice(x, start)?, start))
            .collect::<Result<Vec<_>>>()?;
        return Ok(Tensor::stack(&parts, 0)?.sum_all()?);
    }
    let mut total = 0.0;
    let mut slopes = Vec::new();
    let mut sums: Vec<Option<Tensor>> = vec![None; others.len()];
    for start in starts {
        let part = slice(&x.detach(), start)?;
        let part = Var::from_tensor(&part)?;
        let value = body(part.as_tensor(), start)?;
        total += value.to_scalar::<f32>()?;
        let gradients = backward(&value)?;
        slopes.push(match gradients.get(part.as_tensor()) {
            Some(gradient) => gradient.clone(),
            None => part.zeros_like()?,
        });
        for (sum, parameter) in sums.iter_mut().zip(&others) {
            let gradient = match gradients.get(parameter) {
                Some(gradient) => gradient.clone(),
                None => parameter.zeros_like()?.detach(),
            };
            *sum = Some(match sum.take() {
                Some(sum) => (sum + gradient)?,
                None => gradient,
            });
        }
    }
    let slope = x.track_op().then(|| Tensor::cat(&slopes, 0)).transpose()?;
    let all: Vec<Tensor> = slope
        .into_iter()
        .chain(sums.into_iter().flatten())
        .map(|gradient| gradient.detach())
        .collect();
    let inputs: Vec<&Tensor> = std::iter::once(x).chain(others).collect();
    Ok(record(&inputs, vec![total], (), move |gradient| {
        all.iter()
            .map(|slope| slope.broadcast_mul(gradient))
            .collect()
    })?)
}
