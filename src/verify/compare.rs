//! Ours against theirs.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor};

use super::reference::Reference;
use super::report::{GradientResult, OutputResult, Tokens};
use crate::nn::Adapter;
use crate::{Error, Result};

/// Two codes closer than this, in squared distance, may stand for each other.
pub const TIE: f32 = 1e-5;

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

/// The relative L2 error of `ours`, over the places where `valid` (of the first dimensions) is not zero.
pub(super) fn numbers(
    name: String,
    ours: &Tensor,
    theirs: &Tensor,
    valid: Option<&Tensor>,
    tolerance: f64,
) -> Result<OutputResult> {
    let shape = theirs.dims().to_vec();
    if ours.dims() != theirs.dims() {
        return Ok(OutputResult {
            name,
            shape,
            computed_shape: ours.dims().to_vec(),
            error: f64::INFINITY,
            tokens: None,
            passed: false,
        });
    }
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

/// Equal tokens, or different ones where the two nearest codes are as good as equally near.
pub(super) fn tokens(
    name: String,
    ours: &Tensor,
    gaps: &[f32],
    theirs: &Tensor,
) -> Result<OutputResult> {
    let shape = theirs.dims().to_vec();
    let computed_shape = ours.dims().to_vec();
    let (a, b) = (values(ours)?, values(theirs)?);
    if a.len() != b.len() || (shape.len() > 1 && shape[0] != computed_shape[0]) {
        return Ok(OutputResult {
            name,
            shape,
            computed_shape,
            error: f64::INFINITY,
            tokens: None,
            passed: false,
        });
    }
    let (mut ties, mut different) = (0, Vec::new());
    for (i, ((a, b), gap)) in a.iter().zip(&b).zip(gaps).enumerate() {
        if a == b {
            continue;
        }
        if *gap < TIE {
            ties += 1;
        } else {
            different.push(i);
        }
    }
    Ok(OutputResult {
        name,
        shape,
        computed_shape,
        error: different.len() as f64 / a.len().max(1) as f64,
        passed: different.is_empty(),
        tokens: Some(Tokens {
            count: a.len(),
            ties,
            different: different.len(),
            first_different: different.first().copied(),
        }),
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
