//! Ours against theirs.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor};

use super::reference::Reference;
use super::report::{GradientResult, OutputResult, Tokens};
use crate::models::vqgan::Compared;
use crate::nn::Adapter;
use crate::{Error, Result};

/// Where the distances of an encoding to two codes differ by less than this, either may stand for the other.
pub const TIE: f64 = 1e-5;

/// A gradient may be off by this share of the whole gradient's norm, however small it is itself.
const FLOOR: f64 = 1e-6;

fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    let tensor = tensor.detach().to_device(&Device::Cpu)?;
    Ok(tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|x| x * x).sum::<f64>().sqrt()
}

/// |ours − theirs| and |theirs|.
fn distance(ours: &[f64], theirs: &[f64]) -> (f64, f64) {
    let apart = norm(ours.iter().zip(theirs).map(|(a, b)| a - b));
    (apart, norm(theirs.iter().copied()))
}

/// apart / size; 0 where both are, infinite where only `size` is.
fn relative(apart: f64, size: f64) -> f64 {
    if apart == 0.0 { 0.0 } else { apart / size }
}

/// Fails unless something is left to compare.
fn some(name: &str, count: usize) -> Result<()> {
    if count > 0 {
        return Ok(());
    }
    Err(Error::invalid(
        format!("{name} has no values to compare"),
        "give an output that is not empty, and a mask that leaves some of it",
    ))
}

impl OutputResult {
    /// Of an output that has another shape here.
    pub(super) fn misshapen(name: String, theirs: &Tensor, ours: &Tensor) -> Self {
        Self {
            name,
            shape: theirs.dims().to_vec(),
            computed_shape: ours.dims().to_vec(),
            error: f64::INFINITY,
            tokens: None,
            passed: false,
        }
    }
}

/// The relative L2 error of `ours`, over the places where `valid` (of the first dimensions) is not zero.
pub(super) fn numbers(
    name: String,
    ours: &Tensor,
    theirs: &Tensor,
    valid: Option<&Tensor>,
    tolerance: f64,
) -> Result<OutputResult> {
    some(&name, theirs.elem_count())?;
    if ours.dims() != theirs.dims() {
        return Ok(OutputResult::misshapen(name, theirs, ours));
    }
    let shape = theirs.dims().to_vec();
    let (mut a, mut b) = (values(ours)?, values(theirs)?);
    if let Some(valid) = valid {
        let valid = values(valid)?;
        let width = a.len() / valid.len().max(1);
        for values in [&mut a, &mut b] {
            let mut places = valid
                .iter()
                .flat_map(|&v| std::iter::repeat_n(v != 0.0, width));
            values.retain(|_| places.next().unwrap_or(true));
        }
    }
    some(&name, b.len())?;
    let (apart, size) = distance(&a, &b);
    let error = relative(apart, size);
    Ok(OutputResult {
        name,
        computed_shape: shape.clone(),
        shape,
        error,
        tokens: None,
        // A number that is not finite on either side is neither more nor less than anything.
        passed: error <= tolerance,
    })
}

/// Equal tokens, or different ones where the two nearest codes are as good as equally near and these are among the
/// nearest.
pub(super) fn tokens(
    name: String,
    ours: &Tensor,
    compared: &Compared,
    theirs: &Tensor,
) -> Result<OutputResult> {
    some(&name, theirs.elem_count())?;
    let shape = theirs.dims().to_vec();
    let computed_shape = ours.dims().to_vec();
    let (a, b) = (values(ours)?, values(theirs)?);
    if a.len() != b.len() || (shape.len() > 1 && shape[0] != computed_shape[0]) {
        return Ok(OutputResult::misshapen(name, theirs, ours));
    }
    let (mut ties, mut different) = (0, Vec::new());
    for (i, (a, b)) in a.iter().zip(&b).enumerate() {
        if a == b {
            continue;
        }
        if is_tie(&compared.distances(i), *a, *b) {
            ties += 1;
        } else {
            different.push(i);
        }
    }
    Ok(OutputResult {
        name,
        shape,
        computed_shape,
        error: different.len() as f64 / a.len() as f64,
        passed: different.is_empty(),
        tokens: Some(Tokens {
            count: a.len(),
            ties,
            different: different.len(),
            first_different: different.first().copied(),
        }),
    })
}

/// Whether codes `ours` and `theirs`, which differ, are both as good as nearest by their `distances`.
fn is_tie(distances: &[f64], ours: f64, theirs: f64) -> bool {
    let nearest = distances.iter().copied().fold(f64::INFINITY, f64::min);
    [ours, theirs].iter().all(|&code| {
        let known = code >= 0.0 && code.fract() == 0.0;
        let distance = distances.get(code as usize).filter(|_| known);
        distance.is_some_and(|distance| distance - nearest < TIE)
    })
}

/// How one gradient compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GradientState {
    Equal,
    /// Further from the reference's than the tolerance.
    Different,
    /// None was computed here, and the reference's is not zero.
    Missing,
    /// It is zero here, and the reference's is not.
    Zero,
    /// Of another shape than the adapter's weight.
    Misshapen,
}

/// Every gradient of the reference against ours of the same weight.
pub(super) fn gradients(
    adapter: &Adapter,
    ours: &GradStore,
    reference: &Reference,
    tolerance: f64,
) -> Result<Vec<GradientResult>> {
    let variables: std::collections::BTreeMap<_, _> = adapter.variables().into_iter().collect();
    let unknown: Vec<&String> = reference
        .gradients
        .keys()
        .filter(|name| !variables.contains_key(*name))
        .collect();
    if let Some(first) = unknown.first() {
        return Err(Error::invalid(
            format!(
                "{} gradients of the reference file belong to no weight of the adapter, such as {first}",
                unknown.len()
            ),
            "give the adapter that the gradients were computed with",
        ));
    }
    let mut squares = 0.0;
    for theirs in reference.gradients.values() {
        squares += norm(values(theirs)?.into_iter()).powi(2);
    }
    let floor = FLOOR * squares.sqrt();
    let mut results = Vec::new();
    for (name, theirs) in &reference.gradients {
        let variable = &variables[name];
        let gradient = ours.get(variable.as_tensor());
        let expected = values(theirs)?;
        let size = norm(expected.iter().copied());
        let (state, error) = if theirs.dims() != variable.dims() {
            (GradientState::Misshapen, f64::INFINITY)
        } else {
            let computed = match gradient {
                Some(gradient) => values(gradient)?,
                None => vec![0.0; expected.len()],
            };
            let (apart, _) = distance(&computed, &expected);
            let error = relative(apart, size);
            let state = if error <= tolerance || apart <= floor {
                GradientState::Equal
            } else if gradient.is_none() {
                GradientState::Missing
            } else if computed.iter().all(|&x| x == 0.0) {
                GradientState::Zero
            } else {
                GradientState::Different
            };
            (state, error)
        };
        results.push(GradientResult {
            name: name.clone(),
            shape: theirs.dims().to_vec(),
            norm: size,
            below_floor: size <= floor,
            error,
            state,
        });
    }
    Ok(results)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_codes_that_are_as_good_as_nearest_are_tied() {
        let distances = [0.3, 0.1 + 0.9e-5, 0.1, 0.1 + 1.1e-5];
        assert!(is_tie(&distances, 2.0, 1.0) && is_tie(&distances, 1.0, 2.0));
        // The two nearest are tied, but the reference took neither.
        for theirs in [0.0, 3.0, 4.0, -1.0, 1.5, f64::NAN] {
            assert!(!is_tie(&distances, 2.0, theirs), "{theirs}");
        }
    }

    #[test]
    fn an_output_without_values_is_not_equal_but_unusable() {
        let ones = |shape: (usize, usize)| Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap();
        let result = |shape, valid: Option<&Tensor>| {
            numbers("output".into(), &ones(shape), &ones(shape), valid, 1e-4)
        };
        assert!(result((2, 3), None).unwrap().passed);
        assert!(result((2, 0), None).is_err());
        let nowhere = ones((2, 3)).zeros_like().unwrap();
        assert!(result((2, 3), Some(&nowhere)).is_err());
    }
}
