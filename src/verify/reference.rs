//! The reference file: what went in, what came out, and the gradients.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use candle_core::safetensors::Load;
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::de::DeserializeOwned;

use super::{Component, Precision};
use crate::models::lora_file;
use crate::{Error, Result};

/// Everything that the file holds, on the CPU: whole numbers as i64, others as f64. `output` and `cotangent` have the
/// empty name.
pub(super) struct Reference {
    inputs: BTreeMap<String, Tensor>,
    pub outputs: BTreeMap<String, Tensor>,
    pub cotangents: BTreeMap<String, Tensor>,
    /// By the normalised name of the adapter's weight.
    pub gradients: BTreeMap<String, Tensor>,
    /// Names that mean nothing here.
    pub ignored: Vec<String>,
    /// The header's own entries.
    metadata: HashMap<String, String>,
}

/// `kind` or `kind.name`.
pub(super) fn key(kind: &str, name: &str) -> String {
    if name.is_empty() {
        kind.to_string()
    } else {
        format!("{kind}.{name}")
    }
}

impl Reference {
    pub fn read(path: &Path, component: Component) -> Result<Self> {
        let bytes = crate::files::read(path, crate::files::TENSORS).map_err(Error::io(path))?;
        let fault = |what: String| Error::Checkpoint {
            path: path.to_path_buf(),
            faults: vec![what],
        };
        let broken = |e| fault(format!("not a safetensors file: {e}"));
        let file = SafeTensors::deserialize(&bytes).map_err(broken)?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(broken)?;
        let mut reference = Self {
            inputs: BTreeMap::new(),
            outputs: BTreeMap::new(),
            cotangents: BTreeMap::new(),
            gradients: BTreeMap::new(),
            ignored: Vec::new(),
            metadata: header.metadata().clone().unwrap_or_default(),
        };
        for (name, view) in file.tensors() {
            let (kind, rest) = name.split_once('.').unwrap_or((&name, ""));
            let rest_of = rest.to_string();
            let (place, at) = match kind {
                "input" if !rest.is_empty() => (&mut reference.inputs, rest_of),
                "output" => (&mut reference.outputs, rest_of),
                "cotangent" => (&mut reference.cotangents, rest_of),
                "grad" if !rest.is_empty() => {
                    let weight = weight(rest, component);
                    if component.is_without(&weight) {
                        continue;
                    }
                    (&mut reference.gradients, weight)
                }
                _ => {
                    reference.ignored.push(name);
                    continue;
                }
            };
            let tensor = tensor(&view).map_err(|e| fault(format!("{name}: {e}")))?;
            place.insert(at, tensor);
        }
        reference.ignored.sort();
        if reference.outputs.is_empty() {
            return Err(fault(
                "no output, and no output.NAME, to compare with".into(),
            ));
        }
        Ok(reference)
    }

    /// What the component is given; it computes in `dtype`.
    pub fn inputs(&self, device: &Device, precision: Precision, dtype: DType) -> Inputs<'_> {
        Inputs {
            tensors: &self.inputs,
            metadata: &self.metadata,
            device: device.clone(),
            precision,
            dtype,
            used: RefCell::default(),
        }
    }
}

/// The name of the adapter's weight that the file calls `key`.
fn weight(key: &str, component: Component) -> String {
    let name = lora_file::normalise(key);
    for part in [".lora_A", ".lora_B"] {
        if let Some((layer, _)) = name.split_once(part) {
            return format!("{}{part}.weight", component.layer(layer));
        }
    }
    name
}

fn tensor(view: &TensorView<'_>) -> candle_core::Result<Tensor> {
    fn whole<const N: usize>(
        view: &TensorView<'_>,
        value: impl Fn([u8; N]) -> i64,
    ) -> candle_core::Result<Tensor> {
        let (chunks, _) = view.data().as_chunks::<N>();
        let values: Vec<i64> = chunks.iter().map(|chunk| value(*chunk)).collect();
        Tensor::from_vec(values, view.shape(), &Device::Cpu)
    }
    match view.dtype() {
        Dtype::BOOL | Dtype::U8 => whole(view, |b: [u8; 1]| i64::from(b[0])),
        Dtype::I8 => whole(view, |b| i64::from(i8::from_le_bytes(b))),
        Dtype::U16 => whole(view, |b| i64::from(u16::from_le_bytes(b))),
        Dtype::I16 => whole(view, |b| i64::from(i16::from_le_bytes(b))),
        Dtype::U32 => whole(view, |b| i64::from(u32::from_le_bytes(b))),
        Dtype::I32 => whole(view, |b| i64::from(i32::from_le_bytes(b))),
        Dtype::U64 | Dtype::I64 => whole(view, i64::from_le_bytes),
        _ => view.load(&Device::Cpu)?.to_dtype(DType::F64),
    }
}

/// The inputs, in the types that models take. Reading one marks it as used.
pub(super) struct Inputs<'a> {
    tensors: &'a BTreeMap<String, Tensor>,
    metadata: &'a HashMap<String, String>,
    device: Device,
    precision: Precision,
    dtype: DType,
    used: RefCell<BTreeSet<String>>,
}

impl Inputs<'_> {
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// What follows `prefix` in the names that begin with it.
    pub fn names(&self, prefix: &str) -> Vec<String> {
        let names = self.tensors.keys();
        let names = names.filter_map(|name| name.strip_prefix(prefix));
        names.map(str::to_string).collect()
    }

    fn get(&self, name: &str) -> Result<&Tensor> {
        self.used.borrow_mut().insert(name.to_string());
        self.tensors.get(name).ok_or_else(|| {
            let given: Vec<&str> = self.tensors.keys().map(String::as_str).collect();
            Error::invalid(
                format!("the reference file has no input.{name}"),
                format!("inputs that it has: {}", given.join(", ")),
            )
        })
    }

    /// What the file's metadata has under `name`, as JSON, if anything.
    pub fn setting<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        let Some(text) = self.metadata.get(name) else {
            return Ok(None);
        };
        serde_json::from_str(text).map_err(|e| {
            Error::invalid(
                format!("{name} in the reference file's metadata is {text}: {e}"),
                "write it as JSON",
            )
        })
    }

    /// In the type that is computed in, rounded as the weights are.
    pub fn numbers(&self, name: &str) -> Result<Tensor> {
        let tensor = self.get(name)?.to_dtype(DType::F32)?;
        let tensor = match self.precision {
            Precision::F32 => tensor,
            Precision::Bf16 => tensor.to_dtype(DType::BF16)?,
        };
        Ok(tensor.to_dtype(self.dtype)?.to_device(&self.device)?)
    }

    /// As f32, not rounded.
    pub fn exact(&self, name: &str) -> Result<Tensor> {
        let tensor = self.get(name)?.to_dtype(DType::F32)?;
        Ok(tensor.to_device(&self.device)?)
    }

    /// As u32, (b, n), each below `bound`.
    pub fn ids(&self, name: &str, bound: usize) -> Result<Tensor> {
        let tensor = self.get(name)?;
        let (b, n) = tensor
            .dims2()
            .map_err(|_| misshapen(name, tensor, "(b, n)"))?;
        let values = tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?;
        let ids = values
            .into_iter()
            .map(|value: f64| {
                if value.fract() == 0.0 && (0.0..bound as f64).contains(&value) {
                    return Ok(value as u32);
                }
                Err(Error::invalid(
                    format!("input.{name} holds {value}"),
                    format!("whole numbers from 0 to {} are expected", bound - 1),
                ))
            })
            .collect::<Result<Vec<u32>>>()?;
        Ok(Tensor::from_vec(ids, (b, n), &self.device)?)
    }

    /// As u8, 1 where it is not zero; all 1 where there is no such input.
    pub fn mask(&self, name: &str, (b, n): (usize, usize)) -> Result<Tensor> {
        if !self.has(name) {
            return Ok(Tensor::ones((b, n), DType::U8, &self.device)?);
        }
        let tensor = self.get(name)?;
        if tensor.dims() != [b, n] {
            return Err(misshapen(name, tensor, &format!("({b}, {n})")));
        }
        let values = tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?;
        let mask: Vec<u8> = values
            .into_iter()
            .map(|v: f64| u8::from(v != 0.0))
            .collect();
        Ok(Tensor::from_vec(mask, (b, n), &self.device)?)
    }

    /// Fails with the names of inputs that the component did not read.
    pub fn all_used(&self) -> Result<()> {
        let used = self.used.borrow();
        let unknown: Vec<String> = self
            .tensors
            .keys()
            .filter(|name| !used.contains(*name))
            .map(|name| format!("input.{name}"))
            .collect();
        if unknown.is_empty() {
            return Ok(());
        }
        let known: Vec<&str> = used.iter().map(String::as_str).collect();
        Err(Error::invalid(
            format!("this component does not take {}", unknown.join(", ")),
            format!("inputs that it read: {}", known.join(", ")),
        ))
    }
}

fn misshapen(name: &str, tensor: &Tensor, expected: &str) -> Error {
    Error::invalid(
        format!("input.{name} has shape {:?}", tensor.dims()),
        format!("{expected} is expected"),
    )
}
