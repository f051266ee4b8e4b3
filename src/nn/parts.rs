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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::ops;

    /// The loss of examples that count differently, in parts of `at_once`, with its gradients.
    fn run(at_once: usize, threads: usize) -> Vec<f32> {
        let weight =
            Var::from_tensor(&Tensor::new(&[[0.3f32, -0.2], [0.1, 0.7]], &Device::Cpu).unwrap());
        let (weight, bias) = (
            weight.unwrap(),
            Var::zeros(2, DType::F32, &Device::Cpu).unwrap(),
        );
        let variables = [
            ("w".to_string(), weight.clone()),
            ("b".to_string(), bias.clone()),
        ];
        let x: Vec<f32> = (0..14).map(|i| (i as f32 * 0.7).sin()).collect();
        let x = Tensor::from_vec(x, (7, 2), &Device::Cpu).unwrap();
        let shares = [1, 2, 3, 1, 1, 2, 4];
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.unwrap().install(|| {
            let mut generator = ChaCha8Rng::seed_from_u64(1);
            let loss = mean_over_parts(&shares, at_once, &variables, &mut generator, |part, _| {
                let own = &shares[part.clone()];
                let weights: Vec<f32> = own.iter().map(|&s| s as f32).collect();
                let sum = weights.iter().sum::<f32>();
                let weights = Tensor::from_vec(weights, (own.len(), 1), &Device::Cpu)?;
                let y = ops::linear(&x.narrow(0, part.start, own.len())?, &weight, Some(&bias))?;
                let y = ops::silu(&y)?.sqr()?.broadcast_mul(&weights)?;
                Ok((y.sum_all()? / f64::from(sum))?)
            });
            let loss = (loss.unwrap() * 3.0).unwrap();
            let gradients = backward(&loss).unwrap();
            let of = |v: &Var| gradients.get(v).unwrap().flatten_all().unwrap();
            let mut all = vec![loss.to_scalar::<f32>().unwrap()];
            for v in [&weight, &bias] {
                all.extend(of(v).to_vec1::<f32>().unwrap());
            }
            all
        })
    }

    #[test]
    fn parts_give_the_mean_and_the_gradients_of_the_whole() {
        let whole = run(7, 2);
        for at_once in [1, 2, 3, 4] {
            for (one, other) in run(at_once, 2).iter().zip(&whole) {
                assert!(
                    (one - other).abs() < 1e-5 * (1.0 + other.abs()),
                    "{at_once}"
                );
            }
        }
    }

    #[test]
    fn the_number_of_threads_does_not_change_a_bit() {
        let alone = run(2, 1);
        for threads in [2, 3, 5] {
            assert_eq!(run(2, threads), alone);
        }
    }

    #[test]
    fn each_part_draws_from_a_generator_of_its_own() {
        let draws = |at_once: usize| {
            let w = Var::zeros((), DType::F32, &Device::Cpu).unwrap();
            let variables = [("w".to_string(), w.clone())];
            let mut generator = ChaCha8Rng::seed_from_u64(5);
            let seen = std::sync::Mutex::new(Vec::new());
            mean_over_parts(&[1; 6], at_once, &variables, &mut generator, |part, own| {
                seen.lock().unwrap().push((part.start, own.random::<u64>()));
                Ok(w.as_tensor().sqr()?)
            })
            .unwrap();
            let mut seen = seen.into_inner().unwrap();
            seen.sort_unstable();
            seen
        };
        let parts = draws(2);
        assert_eq!(parts, draws(2));
        assert_eq!(
            parts.iter().map(|(start, _)| *start).collect::<Vec<_>>(),
            [0, 2, 4]
        );
        assert!(parts[0].1 != parts[1].1 && parts[1].1 != parts[2].1);
        assert_eq!(
            draws(6),
            [(0, ChaCha8Rng::seed_from_u64(5).random::<u64>())]
        );
    }
}
