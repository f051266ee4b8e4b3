//! Whether a component computes here what its reference implementation computed: outputs, and the gradients of an
//! adapter's weights, for inputs that a file holds beside the reference's results. `proxytune verify` is the command.

mod compare;
mod component;
mod folder;
mod optimizers;
mod reference;
mod report;
mod runners;
mod text_to_image;

pub use compare::{GradientState, TIE};
pub use component::Component;
pub use report::{GradientResult, OutputResult, Report, Tokens};

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use candle_core::{Device, Tensor};

use self::reference::Reference;
use self::runners::{Output, Place, Value};
use crate::console::{escaped, shown};
use crate::models::lora_file::LoraFile;
use crate::nn::{Adapter, Factors, Weights, backward, no_grad};
use crate::{Error, Result};

/// The type in which frozen weights and inputs are taken. On the CPU arithmetic is in f32 either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    F32,
    /// Weights and inputs rounded to bf16.
    Bf16,
}

impl Precision {
    /// The relative error that outputs may have where nothing else is asked for.
    pub fn tolerance(self) -> f64 {
        match self {
            Precision::F32 => 1e-4,
            Precision::Bf16 => 2e-2,
        }
    }

    /// The same for gradients.
    pub fn gradient_tolerance(self) -> f64 {
        match self {
            Precision::F32 => 1e-3,
            Precision::Bf16 => 5e-2,
        }
    }
}

impl std::str::FromStr for Precision {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "f32" => Ok(Precision::F32),
            "bf16" => Ok(Precision::Bf16),
            _ => Err("the choices are f32 and bf16".to_string()),
        }
    }
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
        })
    }
}

/// What is compared with what.
#[derive(Debug, Clone)]
pub struct Request {
    pub component: Component,
    /// The component's folder, or one that has it among its own.
    pub model: PathBuf,
    /// A folder or a file, in PEFT's or diffusers' layout.
    pub adapter: Option<PathBuf>,
    /// A safetensors file with `input.NAME`, `output` or `output.NAME`, and for gradients `cotangent` (or
    /// `cotangent.NAME`) and `grad.KEY`.
    pub reference: PathBuf,
    /// Largest relative L2 error of an output.
    pub tolerance: f64,
    /// Largest relative L2 error of a gradient.
    pub gradient_tolerance: f64,
    pub device: Device,
    pub precision: Precision,
}

/// Computes and compares.
///
/// # Errors
/// When something that was given cannot be used: a file that is missing, a checkpoint, an adapter or inputs that do
/// not fit the component. A difference is no error: the report has it.
pub fn verify(request: &Request) -> Result<Report> {
    let reference = Reference::read(&request.reference, request.component)?;
    if request.adapter.is_none() && !reference.gradients.is_empty() {
        return Err(Error::invalid(
            format!("{} has gradients", request.reference.display()),
            "name the adapter that they belong to with --adapter",
        ));
    }
    let file = match &request.adapter {
        Some(path) => Some(renamed(LoraFile::read(path)?, request.component)?),
        None => None,
    };
    let adapter = file.as_ref().map(|file| {
        let layer = request.component.layer_names();
        Arc::new(Adapter::from_factors(file.layers.clone(), layer))
    });
    let place = Place {
        folder: folder::find(request.component, &request.model)?,
        adapter: adapter.clone(),
        device: request.device.clone(),
        precision: request.precision,
    };
    let (runner, weights) = request.component.open(&place)?;
    weights.finish().map_err(|error| place.name(error))?;
    if let (Some(file), Some(adapter)) = (&file, &adapter) {
        file.check_fit(&adapter.places())?;
        file.check_whole(|name| base(name, request.component, &weights))?;
    }
    let inputs = reference.inputs(&request.device, request.precision, weights.dtype());
    let run = || runner.run(&inputs);
    let outputs = if reference.cotangents.is_empty() {
        no_grad(run)?
    } else {
        run()?
    };
    inputs.all_used()?;
    let results = compare_outputs(&outputs, &reference, request.tolerance)?;
    let (mut gradients, mut notes) = (Vec::new(), Vec::new());
    if let Some(adapter) = adapter.as_ref().filter(|_| !reference.gradients.is_empty()) {
        match loss(&outputs, &reference)? {
            Some(loss) => {
                let ours = backward(&loss)?;
                let tolerance = request.gradient_tolerance;
                gradients = compare::gradients(adapter, &ours, &reference, tolerance)?;
            }
            None => notes.push("gradients are not compared where shapes differ".to_string()),
        }
    }
    let unused = weights.unused();
    if let Some(first) = unused.first() {
        notes.push(format!(
            "{} tensors of the checkpoint are not part of this component, such as {first}",
            unused.len()
        ));
    }
    if let Some(adapter) = &adapter {
        notes.extend(without_gradient(adapter, &reference));
    }
    notes.extend(
        reference
            .ignored
            .iter()
            .map(|name| format!("{name} in the reference file is not looked at")),
    );
    Ok(Report {
        component: request.component,
        folder: place.folder,
        adapter: request.adapter.clone(),
        reference: request.reference.clone(),
        precision: request.precision,
        tolerance: request.tolerance,
        gradient_tolerance: request.gradient_tolerance,
        outputs: results,
        gradients,
        notes,
    })
}

/// The tensor of the checkpoint that an adapter's file calls `name`.
fn base(name: &str, component: Component, weights: &Weights) -> Result<Option<Tensor>> {
    let layer = |name: &str| {
        name.strip_suffix(".weight")
            .map(|path| component.layer(path))
    };
    let wanted = layer(name);
    let found = weights.names().into_iter().find(|own| layer(own) == wanted);
    match found {
        Some(own) => weights.stored(&own),
        None => Ok(None),
    }
}

/// The file with its layers under the names that `component` gives them.
fn renamed(file: LoraFile, component: Component) -> Result<LoraFile> {
    let mut layers: BTreeMap<String, Factors> = BTreeMap::new();
    for (layer, factors) in file.layers {
        let name = component.layer(&layer);
        if component.is_without(&name) {
            continue;
        }
        if layers.insert(name, factors).is_some() {
            return Err(Error::invalid(
                format!("{}: {} is there twice", shown(&file.path), escaped(&layer)),
                "its names are those of two versions of a library: keep one of them",
            ));
        }
    }
    if layers.is_empty() {
        return Err(Error::invalid(
            format!("{} has no layer of {component}", shown(&file.path)),
            "name the adapter of this component",
        ));
    }
    Ok(LoraFile { layers, ..file })
}

fn compare_outputs(
    outputs: &[Output],
    reference: &Reference,
    tolerance: f64,
) -> Result<Vec<OutputResult>> {
    reference
        .outputs
        .iter()
        .map(|(name, theirs)| {
            let ours = named(outputs, name, "output")?;
            let name = reference::key("output", name);
            match &ours.value {
                Value::Numbers { tensor, valid } => {
                    compare::numbers(name, tensor, theirs, valid.as_ref(), tolerance)
                }
                Value::Tokens { tokens, compared } => {
                    compare::tokens(name, tokens, compared, theirs)
                }
            }
        })
        .collect()
}

/// The output that the reference file calls `name`; `kind` is the word before it.
fn named<'a>(outputs: &'a [Output], name: &str, kind: &str) -> Result<&'a Output> {
    let names = || -> Vec<&str> {
        outputs
            .iter()
            .flat_map(|output| output.names.iter().map(String::as_str))
            .collect()
    };
    let found = outputs
        .iter()
        .find(|output| output.names.iter().any(|own| own == name));
    let alone = match outputs {
        [only] if name.is_empty() => Some(only),
        _ => None,
    };
    found.or(alone).ok_or_else(|| {
        Error::invalid(
            format!(
                "the reference file has {}, which this component does not give for these inputs",
                reference::key(kind, name)
            ),
            format!("names that it has: {}", names().join(", ")),
        )
    })
}

/// The sum over all outputs of output × cotangent; `None` where an output has another shape than the reference's.
///
/// # Errors
/// When a cotangent alone has another shape, or there is none.
fn loss(outputs: &[Output], reference: &Reference) -> Result<Option<Tensor>> {
    let mut total: Option<Tensor> = None;
    for (name, cotangent) in &reference.cotangents {
        let key = reference::key("cotangent", name);
        let Value::Numbers { tensor, .. } = &named(outputs, name, "cotangent")?.value else {
            return Err(Error::invalid(
                format!("{key} is given for tokens"),
                "only outputs that are not whole numbers have gradients",
            ));
        };
        if tensor.dims() != cotangent.dims() {
            let theirs = reference.outputs.get(name);
            if theirs.is_some_and(|theirs| theirs.dims() != tensor.dims()) {
                return Ok(None);
            }
            return Err(Error::invalid(
                format!(
                    "{key} has shape {:?}, the output {:?}",
                    cotangent.dims(),
                    tensor.dims()
                ),
                "a cotangent has the shape of its output",
            ));
        }
        let cotangent = cotangent
            .to_dtype(tensor.dtype())?
            .to_device(tensor.device())?;
        let part = (tensor * cotangent)?.sum_all()?;
        total = Some(match total {
            Some(total) => (total + part)?,
            None => part,
        });
    }
    match total {
        Some(_) => Ok(total),
        None => Err(Error::invalid(
            "the reference file has gradients but no cotangent",
            "store the tensor that the output was multiplied with as cotangent",
        )),
    }
}

/// A note on weights of the adapter that the reference file says nothing about, where it has gradients at all.
fn without_gradient(adapter: &Adapter, reference: &Reference) -> Option<String> {
    if reference.gradients.is_empty() {
        let what = "the reference file has no gradients";
        return (!reference.cotangents.is_empty()).then(|| what.to_string());
    }
    let missing: Vec<String> = adapter
        .variables()
        .into_iter()
        .map(|(name, _)| name)
        .filter(|name| !reference.gradients.contains_key(name))
        .collect();
    missing.first().map(|first| {
        format!(
            "{} weights of the adapter have no gradient in the reference file, such as {first}",
            missing.len()
        )
    })
}
