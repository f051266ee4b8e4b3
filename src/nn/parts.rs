//! A batch whose examples are differentiated in parts, side by side: a small model's operations are too short to be cut
//! up among threads, its batches are not.

use std::ops::Range;

use candle_core::{DType, Device, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::recompute::{backward, collect};
use super::{Context, is_crowded, is_no_grad, vjp};
use crate::Result;

/// The mean of `body` over examples: of each of about equal parts of at most `at_once` of them `body` gives the mean, a scalar in f32 on
/// the CPU, and `shares` says how much each example counts in it. `variables` is everything that is trained in `body`;
/// the result's gradients are [`backward`]'s to compute.
///
/// Parts are cut by `at_once` alone and added up in their order, so that the number of threads does not change a bit.
/// Each draws from a generator of its own, a single one from `generator` itself.
///
/// # Errors
/// Those of `body`.
pub fn mean_over_parts(
    shares: &[usize],
    at_once: usize,
    variables: &[(String, Var)],
    generator: &mut ChaCha8Rng,
    body: impl Fn(Range<usize>, &mut ChaCha8Rng) -> Result<Tensor> + Sync,
) -> Result<Tensor> {
    let count = shares.len();
    if count <= at_once || is_no_grad() {
        return body(0..count, generator);
    }
    let total = shares.iter().sum::<usize>() as f64;
    let parts = count.div_ceil(at_once.max(1));
    let parts: Vec<(Range<usize>, u64)> = (0..parts)
        .map(|i| {
            let examples = i * count / parts..(i + 1) * count / parts;
            (examples, generator.random())
        })
        .collect();
    let one = |(examples, seed): &(Range<usize>, u64)| -> Result<Part> {
        let share = shares[examples.clone()].iter().sum::<usize>() as f64 / total;
        let mut generator = ChaCha8Rng::seed_from_u64(*seed);
        let loss = (body(examples.clone(), &mut generator)? * share)?;
        let gradients = backward(&loss)?;
        let of = |(_, v): &(String, Var)| gradients.get(v).map(Tensor::detach);
        Ok(Part {
            value: loss.to_scalar()?,
            gradients: variables.iter().map(of).collect(),
        })
    };
    // Its share of the work is one thread's.
    let alone = |part| {
        let context = Context {
            alone: true,
            ..Context::default()
        };
        context.run(|| one(part))
    };
    let parts: Vec<Part> = match is_crowded() {
        true => parts.iter().map(one).collect::<Result<_>>()?,
        false => parts
            .par_iter()
            .with_max_len(1)
            .map(alone)
            .collect::<Result<_>>()?,
    };
    attach(parts, variables)
}

/// What was found of one part: its share of the loss and, in the order of the variables, of their gradients.
struct Part {
    value: f32,
    gradients: Vec<Option<Tensor>>,
}

/// The sum of the parts' values, which has the sum of their gradients.
fn attach(parts: Vec<Part>, variables: &[(String, Var)]) -> Result<Tensor> {
    let mut value = 0.0;
    let mut sums: Vec<Option<Tensor>> = vec![None; variables.len()];
    for part in parts {
        value += part.value;
        for (sum, gradient) in sums.iter_mut().zip(part.gradients) {
            *sum = match (sum.take(), gradient) {
                (Some(sum), Some(gradient)) => Some((sum + gradient)?),
                (one, other) => one.or(other),
            };
        }
    }
    let ids = variables.iter().map(|(_, variable)| variable.id());
    let gradients: Vec<_> = ids
        .zip(sums)
        .filter_map(|(id, sum)| Some((id, sum?.detach())))
        .collect();
    let value = Tensor::new(value, &Device::Cpu)?;
    let anchor = Var::zeros((), DType::F32, value.device())?;
    let backward = move |slope: &Tensor| -> Result<Vec<Tensor>> {
        let slope = f64::from(slope.to_scalar::<f32>()?);
        let scaled = gradients.iter().map(|(id, gradient)| {
            let gradient = match slope {
                1.0 => gradient.clone(),
                _ => (gradient * slope)?,
            };
            Ok((*id, gradient))
        });
        collect(scaled.collect::<Result<_>>()?)?;
        Ok(vec![Tensor::zeros((), DType::F32, &Device::Cpu)?])
    };
    Ok(vjp::attach(&value, &[&anchor], move |slope| {
        backward(slope).map_err(candle_core::Error::wrap)
    })?)
}
