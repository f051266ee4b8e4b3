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

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn values(x: &Tensor) -> Vec<f32> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn slices_give_the_sum_and_the_gradients_of_the_whole() {
        let device = Device::Cpu;
        let random = |shape: &[usize]| Var::randn(0f32, 1f32, shape, &device).unwrap();
        let (x, a, b, c) = (random(&[7, 3]), random(&[3]), random(&[3]), random(&[3]));
        let run = |at_once: usize, parameters: &[&Tensor]| {
            let input = (x.as_tensor() * 2.0).unwrap();
            let body = |x: &Tensor, _| {
                let y = parameters
                    .iter()
                    .try_fold(x.sqr()?, |y, p| y.broadcast_mul(p))?;
                Ok(y.sum_all()?)
            };
            let sum = (sum_over_rows(&input, parameters, at_once, body).unwrap() * 3.0).unwrap();
            let gradients = sum.backward().unwrap();
            let mut all = vec![sum.to_scalar::<f32>().unwrap()];
            for v in std::iter::once(x.as_tensor()).chain(parameters.iter().copied()) {
                all.extend(values(gradients.get(v).unwrap()));
            }
            all
        };
        let two: [&Tensor; 2] = [&a, &b];
        let three: [&Tensor; 3] = [&a, &b, &c];
        for parameters in [&two[..], &three[..]] {
            let whole = run(7, parameters);
            for at_once in [1, 3, 100] {
                for (one, other) in run(at_once, parameters).iter().zip(&whole) {
                    assert!(
                        (one - other).abs() < 1e-4 * (1.0 + other.abs()),
                        "{at_once}"
                    );
                }
            }
        }
        let body = |x: &Tensor, _| {
            Ok(x.detach()
                .broadcast_mul(&crate::nn::parameter(&a))?
                .sum_all()?)
        };
        let quiet = crate::nn::no_grad(|| sum_over_rows(&x, &[&a], 2, body).unwrap());
        assert!(!quiet.track_op());
        let none = x.as_tensor().detach();
        assert!(sum_over_rows(&none, &[], 2, |x, _| Ok(x.sum_all()?)).is_ok());
        let empty = none.narrow(0, 0, 0).unwrap();
        assert!(sum_over_rows(&empty, &[], 2, |x, _| Ok(x.sum_all()?)).is_err());
    }

    #[test]
    fn each_slice_is_told_its_first_row() {
        let x = Var::zeros((5, 1), DType::F32, &Device::Cpu).unwrap();
        let targets = Tensor::new(&[1f32, 2.0, 3.0, 4.0, 5.0], &Device::Cpu).unwrap();
        let sum = sum_over_rows(x.as_tensor(), &[], 2, |x, first| {
            let targets = targets.narrow(0, first, x.dim(0)?)?.unsqueeze(1)?;
            Ok((x - targets)?.sqr()?.sum_all()?)
        })
        .unwrap();
        assert_eq!(sum.to_scalar::<f32>().unwrap(), 55.0);
        let gradients = sum.backward().unwrap();
        let gradient = values(gradients.get(x.as_tensor()).unwrap());
        assert_eq!(gradient, [-2.0, -4.0, -6.0, -8.0, -10.0]);
    }
}
