//! Named tensors for models, from a checkpoint or freshly drawn, frozen or trainable.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::safetensors::MmapedSafetensors;
use candle_core::{DType, Device, Shape, Tensor, Var};
use rand_distr::{Distribution, Normal, Uniform};

use super::adapter::{Adapter, Lora, seeded};
use crate::{Error, Result};

/// How a trainable weight starts when no checkpoint gives it.
#[derive(Debug, Clone, Copy)]
pub enum Init {
    Zeros,
    Ones,
    /// This value everywhere.
    Constant(f64),
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
    /// Uniform in ±bound.
    Uniform(f64),
}

enum Source {
    Files(MmapedSafetensors),
    Memory(HashMap<String, Tensor>),
    Nothing,
}

struct Inner {
    source: Source,
    path: PathBuf,
    dtype: DType,
    device: Device,
    /// Present when every weight is trained; its seed draws what the source lacks.
    trainable: Option<u64>,
    variables: Mutex<BTreeMap<String, Var>>,
    used: Mutex<BTreeSet<String>>,
    faults: Mutex<Vec<String>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A place in the tree of a checkpoint's names; [`Weights::pp`] goes down. Faults (a missing name, another shape)
/// are collected while a model is built and reported together by [`Weights::finish`].
#[derive(Clone)]
pub struct Weights {
    inner: Arc<Inner>,
    prefix: String,
    /// What adapters call this place where it is not `prefix`.
    module: Option<String>,
    adapter: Option<Arc<Adapter>>,
}

impl Weights {
    fn new(
        source: Source,
        path: &Path,
        dtype: DType,
        device: &Device,
        trainable: Option<u64>,
    ) -> Self {
        let inner = Inner {
            source,
            path: path.to_path_buf(),
            dtype,
            device: device.clone(),
            trainable,
            variables: Mutex::default(),
            used: Mutex::default(),
            faults: Mutex::default(),
        };
        Self {
            inner: Arc::new(inner),
            prefix: String::new(),
            module: None,
            adapter: None,
        }
    }

    /// Frozen weights, memory-mapped from safetensors `files` (all shards of one checkpoint) and converted to `dtype`.
    pub fn from_files(files: &[PathBuf], dtype: DType, device: &Device) -> Result<Self> {
        let (source, path) = open(files)?;
        Ok(Self::new(source, &path, dtype, device, None))
    }

    /// Frozen weights from memory.
    pub fn from_tensors(tensors: HashMap<String, Tensor>, dtype: DType, device: &Device) -> Self {
        Self::new(
            Source::Memory(tensors),
            Path::new("(memory)"),
            dtype,
            device,
            None,
        )
    }

    /// Trainable f32 weights; those that `files` hold start from there (`files` may be empty), the others are drawn by
    /// a generator seeded with `seed` and their name.
    pub fn trainable(files: &[PathBuf], seed: u64, device: &Device) -> Result<Self> {
        let (source, path) = if files.is_empty() {
            (Source::Nothing, PathBuf::from("(new)"))
        } else {
            open(files)?
        };
        Ok(Self::new(source, &path, DType::F32, device, Some(seed)))
    }

    /// The same weights with `adapter` attached: linear layers that are its targets will carry it.
    pub fn with_adapter(mut self, adapter: Arc<Adapter>) -> Self {
        self.adapter = Some(adapter);
        self
    }

    /// One level down.
    pub fn pp(&self, name: impl std::fmt::Display) -> Self {
        let name = name.to_string();
        Self {
            prefix: joined(&self.prefix, &name),
            module: self.module.as_ref().map(|module| joined(module, &name)),
            ..self.clone()
        }
    }

    /// The same place of the checkpoint, which adapters call `module`: for files whose names differ from the modules'.
    pub fn as_module(&self, module: &str) -> Self {
        Self {
            module: Some(module.to_string()),
            ..self.clone()
        }
    }

    /// The path of this place, for example `layers.0.attention`.
    pub fn path(&self) -> &str {
        &self.prefix
    }

    pub fn device(&self) -> &Device {
        &self.inner.device
    }

    pub fn dtype(&self) -> DType {
        self.inner.dtype
    }

    fn name(&self, name: &str) -> String {
        joined(&self.prefix, name)
    }

    /// Whether the checkpoint has `name` here. False for weights that are drawn afresh.
    pub fn contains(&self, name: &str) -> bool {
        self.shape(&self.name(name)).is_some()
    }

    /// The shape of `name` here, if the checkpoint has it.
    pub fn dims(&self, name: &str) -> Option<Vec<usize>> {
        self.shape(&self.name(name))
    }

    fn shape(&self, full: &str) -> Option<Vec<usize>> {
        match &self.inner.source {
            Source::Files(files) => files.get(full).ok().map(|view| view.shape().to_vec()),
            Source::Memory(tensors) => tensors.get(full).map(|t| t.dims().to_vec()),
            Source::Nothing => None,
        }
    }

    /// The tensor `name` with `shape`: frozen and in the weights' dtype, or a tracked f32 variable when trainable.
    /// What is missing or has another shape is noted for [`Weights::finish`], and zeros stand in for it.
    pub fn get(&self, shape: impl Into<Shape>, name: &str, init: Init) -> Result<Tensor> {
        self.fetch(shape.into(), name, init, self.inner.trainable.is_some())
    }

    /// Like [`Weights::get`] for a tensor that is never trained (a buffer, such as LlamaGen's `uncond_embedding`).
    pub fn buffer(&self, shape: impl Into<Shape>, name: &str, init: Init) -> Result<Tensor> {
        self.fetch(shape.into(), name, init, false)
    }

    fn fetch(&self, shape: Shape, name: &str, init: Init, tracked: bool) -> Result<Tensor> {
        let full = self.name(name);
        let inner = &self.inner;
        lock(&inner.used).insert(full.clone());
        if let Some(variable) = lock(&inner.variables).get(&full) {
            let tensor = variable.as_tensor().clone();
            return Ok(if tracked { tensor } else { tensor.detach() });
        }
        let found = self.shape(&full);
        let tensor = match (&found, inner.trainable) {
            (Some(dims), _) if dims.as_slice() == shape.dims() => match &inner.source {
                Source::Files(files) => files.load(&full, &inner.device)?.to_dtype(inner.dtype)?,
                Source::Memory(tensors) => tensors[&full]
                    .to_device(&inner.device)?
                    .to_dtype(inner.dtype)?,
                Source::Nothing => Tensor::zeros(&shape, inner.dtype, &inner.device)?,
            },
            (Some(dims), _) => {
                lock(&inner.faults).push(format!(
                    "{full} has shape {dims:?}, {:?} expected",
                    shape.dims()
                ));
                Tensor::zeros(&shape, inner.dtype, &inner.device)?
            }
            (None, Some(seed)) => draw(&shape, init, seed, &full, &inner.device)?,
            (None, None) => {
                lock(&inner.faults).push(format!("{full} {:?} is missing", shape.dims()));
                Tensor::zeros(&shape, inner.dtype, &inner.device)?
            }
        };
        if inner.trainable.is_none() {
            return Ok(tensor);
        }
        let variable = Var::from_tensor(&tensor)?;
        let tensor = variable.as_tensor().clone();
        lock(&inner.variables).insert(full, variable);
        Ok(if tracked { tensor } else { tensor.detach() })
    }

    /// The adapter's factors for a linear layer at this place, if it is a target.
    pub fn lora(&self, inputs: usize, outputs: usize) -> Result<Option<Lora>> {
        match &self.adapter {
            Some(adapter) => {
                let module = self.module.as_ref().unwrap_or(&self.prefix);
                adapter.attach(module, inputs, outputs, &self.inner.device)
            }
            None => Ok(None),
        }
    }

    /// Fails with every missing name and every differing shape that was met since the weights were opened.
    pub fn finish(&self) -> Result<()> {
        let faults = lock(&self.inner.faults).clone();
        if faults.is_empty() {
            return Ok(());
        }
        Err(Error::Checkpoint {
            path: self.inner.path.clone(),
            faults,
        })
    }

    /// Names in the checkpoint that no model has asked for.
    pub fn unused(&self) -> Vec<String> {
        let used = lock(&self.inner.used);
        let names: Vec<String> = match &self.inner.source {
            Source::Files(files) => files.tensors().into_iter().map(|(name, _)| name).collect(),
            Source::Memory(tensors) => tensors.keys().cloned().collect(),
            Source::Nothing => Vec::new(),
        };
        names
            .into_iter()
            .filter(|name| !used.contains(name))
            .collect()
    }

    /// All trainable weights and buffers by name, in the order of their names; empty when frozen.
    pub fn variables(&self) -> Vec<(String, Var)> {
        lock(&self.inner.variables)
            .iter()
            .map(|(name, v)| (name.clone(), v.clone()))
            .collect()
    }
}

fn joined(path: &str, name: &str) -> String {
    match (path.is_empty(), name.is_empty()) {
        (true, _) => name.to_string(),
        (_, true) => path.to_string(),
        _ => format!("{path}.{name}"),
    }
}

fn open(files: &[PathBuf]) -> Result<(Source, PathBuf)> {
    let path = files.first().cloned().unwrap_or_default();
    for file in files {
        std::fs::metadata(file).map_err(Error::io(file))?;
    }
    // SAFETY: the files are opened read-only; a checkpoint that is rewritten in place while it is mapped would be
    // read half-new, which is why everything here writes aside and renames.
    let mapped = unsafe { MmapedSafetensors::multi(files) }.map_err(|e| Error::Checkpoint {
        path: path.clone(),
        faults: vec![format!("not a safetensors file: {e}")],
    })?;
    Ok((Source::Files(mapped), path))
}

fn draw(shape: &Shape, init: Init, seed: u64, name: &str, device: &Device) -> Result<Tensor> {
    let count = shape.elem_count();
    let mut generator = seeded(seed, name);
    let values: Vec<f32> = match init {
        Init::Zeros => vec![0.0; count],
        Init::Ones => vec![1.0; count],
        Init::Constant(value) => vec![value as f32; count],
        Init::Normal(deviation) => {
            let normal = Normal::new(0f32, deviation as f32).map_err(|_| {
                Error::invalid(
                    format!("standard deviation {deviation} for {name}"),
                    "must be finite",
                )
            })?;
            (0..count).map(|_| normal.sample(&mut generator)).collect()
        }
        Init::Uniform(bound) => {
            let uniform = Uniform::new_inclusive(-bound as f32, bound as f32).map_err(|_| {
                Error::invalid(
                    format!("bound {bound} for {name}"),
                    "must be finite and not negative",
                )
            })?;
            (0..count).map(|_| uniform.sample(&mut generator)).collect()
        }
    };
    Ok(Tensor::from_vec(values, shape, device)?)
}
