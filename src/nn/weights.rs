//! Named tensors for models, from a checkpoint or freshly drawn, frozen or trainable.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Shape, Tensor, Var};

use super::adapter::{Adapter, Lora};
use super::init::{Init, draw};
use super::precision::{HalfMatrix, Precision, Weight};
use super::quantised::QuantisedMatrix;
use super::shared::Shared;
use super::tensor_files::{Rename, Stored, TensorFiles};
use super::weight_source::{Held, Source, elements_in, half_in, read_half, stored_dtype};
use crate::{Error, Result};

struct Inner {
    source: Source,
    /// What others have loaded of the same files.
    shared: Option<Arc<Shared>>,
    path: PathBuf,
    precision: Precision,
    /// What the model computes in.
    dtype: DType,
    device: Device,
    trainable: bool,
    /// Draws what the source lacks; without it, that is a fault.
    seed: Option<u64>,
    variables: Mutex<BTreeMap<String, Var>>,
    used: Mutex<BTreeSet<String>>,
    elements: AtomicUsize,
    faults: Mutex<Vec<String>>,
    /// Elements of tensors that were made because the checkpoint does not have them so.
    made: AtomicUsize,
    /// The most of these that there may be.
    most_made: usize,
}

/// So many elements may be made for a checkpoint beyond as many as it has: 64 MB in f32.
const MADE_AT_LEAST: usize = 1 << 24;

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
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
        precision: Precision,
        device: &Device,
        (trainable, seed): (bool, Option<u64>),
    ) -> Self {
        let inner = Inner {
            dtype: precision.computes_in(stored_dtype(&source), device),
            most_made: elements_in(&source).saturating_add(MADE_AT_LEAST),
            made: AtomicUsize::new(0),
            source,
            shared: None,
            path: path.to_path_buf(),
            precision,
            device: device.clone(),
            trainable,
            seed,
            variables: Mutex::default(),
            used: Mutex::default(),
            elements: AtomicUsize::new(0),
            faults: Mutex::default(),
        };
        Self {
            inner: Arc::new(inner),
            prefix: String::new(),
            module: None,
            adapter: None,
        }
    }

    /// Frozen weights, memory-mapped from `files` of safetensors (all shards of one checkpoint) or GGUF. `precision` is a
    /// type or [`Precision::AsStored`]; on the CPU matrices in half precision are not copied where the files have them so.
    /// Matrices that a GGUF file has in blocks of few bits stay as they are whatever it is.
    ///
    /// Models of one process that are opened from the same files on the same device have one copy of them in common, as
    /// long as one of these weights is kept.
    pub fn from_files(
        files: &[PathBuf],
        precision: impl Into<Precision>,
        device: &Device,
    ) -> Result<Self> {
        let mut weights = Self::from_renamed(files, None, precision, device)?;
        if let Some(inner) = Arc::get_mut(&mut weights.inner) {
            inner.shared = Some(Shared::of(files, device));
        }
        Ok(weights)
    }

    /// [`Weights::from_files`] for models that call the tensors as `rename` says.
    pub fn from_renamed(
        files: &[PathBuf],
        rename: Option<&Rename>,
        precision: impl Into<Precision>,
        device: &Device,
    ) -> Result<Self> {
        let (source, path) = open(files, rename)?;
        Ok(Self::new(
            source,
            &path,
            precision.into(),
            device,
            (false, None),
        ))
    }

    /// Frozen weights from memory. Matrices that are kept in half precision replace their tensors one after another.
    pub fn from_tensors(
        tensors: HashMap<String, Tensor>,
        precision: impl Into<Precision>,
        device: &Device,
    ) -> Self {
        let held = tensors
            .into_iter()
            .map(|(name, tensor)| (name, Held::Tensor(tensor)));
        let source = Source::Memory(Mutex::new(held.collect()));
        let path = Path::new("(memory)");
        Self::new(source, path, precision.into(), device, (false, None))
    }

    /// Frozen weights without a checkpoint, each drawn by a generator seeded with `seed` and its name: a model of full
    /// size to measure with.
    pub fn drawn(seed: u64, precision: impl Into<Precision>, device: &Device) -> Self {
        let path = Path::new("(drawn)");
        Self::new(
            Source::Nothing,
            path,
            precision.into(),
            device,
            (false, Some(seed)),
        )
    }

    /// [`Weights::drawn`] with matrices in blocks of `kind`, where their rows are whole blocks, on the CPU.
    pub fn drawn_in_blocks(seed: u64, kind: GgmlDType) -> Self {
        let path = Path::new("(drawn)");
        let how = (false, Some(seed));
        Self::new(
            Source::Blocks(kind),
            path,
            DType::F32.into(),
            &Device::Cpu,
            how,
        )
    }

    /// Trainable f32 weights; those that `files` hold start from there (`files` may be empty), the others are drawn by
    /// a generator seeded with `seed` and their name.
    pub fn trainable(files: &[PathBuf], seed: u64, device: &Device) -> Result<Self> {
        Self::trainable_renamed(files, None, seed, device)
    }

    /// [`Weights::trainable`] for models that call the tensors as `rename` says.
    pub fn trainable_renamed(
        files: &[PathBuf],
        rename: Option<&Rename>,
        seed: u64,
        device: &Device,
    ) -> Result<Self> {
        let (source, path) = if files.is_empty() {
            (Source::Nothing, PathBuf::from("(new)"))
        } else {
            open(files, rename)?
        };
        let precision = Precision::In(DType::F32);
        Ok(Self::new(
            source,
            &path,
            precision,
            device,
            (true, Some(seed)),
        ))
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

    /// Where the weights are, and what is computed with them.
    pub fn device(&self) -> &Device {
        &self.inner.device
    }

    /// The type of activations: that of the weights, but f32 on the CPU where these are kept in half precision.
    pub fn dtype(&self) -> DType {
        self.inner.dtype
    }

    /// How other components are to be kept so that they compute in the same type as this one.
    pub fn precision(&self) -> Precision {
        if self.inner.device.is_cpu() {
            self.inner.precision
        } else {
            Precision::In(self.inner.dtype)
        }
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
            Source::Files(files) => files.shape(full),
            Source::Memory(tensors) => lock(tensors).get(full).map(Held::dims),
            Source::Nothing | Source::Blocks(_) => None,
        }
    }

    /// The tensor `name` with `shape`: frozen and in [`Weights::dtype`], or a tracked f32 variable when trainable.
    /// What is missing or has another shape is noted for [`Weights::finish`], and zeros stand in for it.
    pub fn get(&self, shape: impl Into<Shape>, name: &str, init: Init) -> Result<Tensor> {
        self.fetch(shape.into(), name, init, self.inner.trainable)
    }

    /// Like [`Weights::get`] for a tensor that is never trained (a buffer, such as LlamaGen's `uncond_embedding`).
    pub fn buffer(&self, shape: impl Into<Shape>, name: &str, init: Init) -> Result<Tensor> {
        self.fetch(shape.into(), name, init, false)
    }

    /// Like [`Weights::get`] for the matrix (rows, columns) of a linear layer or a table, which may be kept in half
    /// precision or in blocks of few bits.
    pub fn matrix(&self, shape: (usize, usize), name: &str, init: Init) -> Result<Weight> {
        if let Some(packed) = self.packed(shape, name)? {
            return Ok(Weight::Quantised(packed));
        }
        match self.half(shape, name, init)? {
            Some(half) => Ok(Weight::Half(half)),
            None => Ok(Weight::Tensor(self.get(shape, name, init)?)),
        }
    }

    /// The matrix `name`, if it is there with `shape`, frozen, and kept in blocks.
    fn packed(&self, shape: (usize, usize), name: &str) -> Result<Option<QuantisedMatrix>> {
        let (full, inner) = (self.name(name), &self.inner);
        let packed = match (&inner.source, inner.seed) {
            (Source::Files(files), _)
                if !inner.trainable && files.shape(&full) == Some(vec![shape.0, shape.1]) =>
            {
                files.packed(&full, &inner.device)?
            }
            (Source::Blocks(kind), Some(seed)) if shape.1.is_multiple_of(kind.block_size()) => {
                let init = Init::fan_in(shape.1);
                let drawn = draw(&shape.into(), init, seed, &full, &inner.device)?;
                Some(QuantisedMatrix::pack(&drawn, *kind)?)
            }
            _ => None,
        };
        if packed.is_some() {
            self.note(full, shape.0 * shape.1);
        }
        Ok(packed)
    }

    /// The matrix `name`, if it is there (or drawn) with `shape` and kept in half precision.
    fn half(&self, shape: (usize, usize), name: &str, init: Init) -> Result<Option<HalfMatrix>> {
        let (full, inner) = (self.name(name), &self.inner);
        let elements = self.elements_of(&full, &shape.into())?;
        let kept = |stored: DType| inner.precision.half(stored, elements, &inner.device);
        if inner.trainable {
            return Ok(None);
        }
        let half = match (self.shape(&full), &inner.source) {
            (Some(dims), _) if dims != [shape.0, shape.1] => None,
            (Some(_), Source::Memory(tensors)) => half_in(&mut lock(tensors), &full, kept)?,
            (Some(_), Source::Files(files)) => {
                let kind = match files.stored(&full) {
                    Some(Stored::Plain(stored)) => kept(stored),
                    Some(Stored::Packed(_) | Stored::Unknown) | None => None,
                };
                match kind {
                    Some(kind) => {
                        let load = || read_half(files, &full, kind);
                        Some(match &inner.shared {
                            Some(shared) => shared.half(&full, kind, load)?,
                            None => load()?,
                        })
                    }
                    None => None,
                }
            }
            (None, _) => match (inner.seed, kept(DType::F32)) {
                (Some(seed), Some(kind)) => {
                    let drawn = draw(&shape.into(), init, seed, &full, &inner.device)?;
                    Some(HalfMatrix::new(&drawn, kind)?)
                }
                _ => None,
            },
            (Some(_), Source::Nothing | Source::Blocks(_)) => None,
        };
        if half.is_some() {
            self.note(full, elements);
        }
        Ok(half)
    }

    fn fetch(&self, shape: Shape, name: &str, init: Init, tracked: bool) -> Result<Tensor> {
        let full = self.name(name);
        let inner = &self.inner;
        let elements = self.elements_of(&full, &shape)?;
        self.note(full.clone(), elements);
        if let Some(variable) = lock(&inner.variables).get(&full) {
            let tensor = variable.as_tensor().clone();
            return Ok(if tracked { tensor } else { tensor.detach() });
        }
        let found = self.shape(&full);
        let tensor = match (&found, inner.seed) {
            (Some(dims), _) if dims.as_slice() == shape.dims() => match &inner.source {
                Source::Files(files) => {
                    let load = || Ok(files.load(&full, &inner.device)?.to_dtype(inner.dtype)?);
                    match &inner.shared {
                        Some(shared) => shared.tensor(&full, inner.dtype, load),
                        None => load(),
                    }
                    .map_err(|e: Error| self.fault(format!("{full} cannot be read: {e}")))?
                }
                Source::Memory(tensors) => match &lock(tensors)[&full] {
                    Held::Tensor(tensor) => {
                        tensor.to_device(&inner.device)?.to_dtype(inner.dtype)?
                    }
                    Held::Half(half) => half.to_tensor()?,
                },
                Source::Nothing | Source::Blocks(_) => {
                    Tensor::zeros(&shape, inner.dtype, &inner.device)?
                }
            },
            (Some(dims), _) => {
                lock(&inner.faults).push(format!(
                    "{full} has shape {dims:?}, {:?} expected",
                    shape.dims()
                ));
                self.make(elements)?;
                Tensor::zeros(&shape, inner.dtype, &inner.device)?
            }
            (None, Some(seed)) => {
                self.make(elements)?;
                draw(&shape, init, seed, &full, &inner.device)?.to_dtype(inner.dtype)?
            }
            (None, None) => {
                lock(&inner.faults).push(format!("{full} {:?} is missing", shape.dims()));
                self.make(elements)?;
                Tensor::zeros(&shape, inner.dtype, &inner.device)?
            }
        };
        if !inner.trainable {
            return Ok(tensor);
        }
        let variable = Var::from_tensor(&tensor)?;
        let tensor = variable.as_tensor().clone();
        lock(&inner.variables).insert(full, variable);
        Ok(if tracked { tensor } else { tensor.detach() })
    }

    /// The product of `shape`, that of the tensor `full`.
    fn elements_of(&self, full: &str, shape: &Shape) -> Result<usize> {
        let dims = shape.dims();
        let product = dims
            .iter()
            .try_fold(1usize, |all, dim| all.checked_mul(*dim));
        product.ok_or_else(|| self.fault(format!("{full} {dims:?} is larger than any memory")))
    }

    /// Allows for a tensor of so many `elements` that the checkpoint does not have. What its config asks for beyond it
    /// must not take all memory before it is told.
    fn make(&self, elements: usize) -> Result<()> {
        let inner = &self.inner;
        let made = inner.made.load(Relaxed).saturating_add(elements);
        inner.made.store(made, Relaxed);
        let limited = !matches!(inner.source, Source::Nothing | Source::Blocks(_));
        if made <= inner.most_made || !limited {
            return Ok(());
        }
        self.finish()?;
        Err(self.fault("its config is that of a far larger model".to_string()))
    }

    fn fault(&self, fault: String) -> Error {
        Error::Checkpoint {
            path: self.inner.path.clone(),
            faults: vec![fault],
        }
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

    /// Notes for [`Weights::finish`] every name in the checkpoint that the model has not asked for: a backbone that
    /// leaves weights out computes something else.
    pub fn expect_no_others(&self) {
        let named = self
            .unused()
            .into_iter()
            .map(|name| format!("{name} is not expected"));
        lock(&self.inner.faults).extend(named);
    }

    /// The adapter's factors for a convolution at this place, if a trained adapter has some.
    pub fn lora_conv(&self, inputs: usize, outputs: usize, kernel: usize) -> Result<Option<Lora>> {
        match &self.adapter {
            Some(adapter) => {
                let shape = [outputs, inputs, kernel];
                adapter.attach_conv(&self.prefix, shape, &self.inner.device)
            }
            None => Ok(None),
        }
    }

    /// Notes that a model has asked for `full`.
    fn note(&self, full: String, elements: usize) {
        if lock(&self.inner.used).insert(full) {
            self.inner.elements.fetch_add(elements, Relaxed);
        }
    }

    /// How many numbers models have asked for so far, each tensor once.
    pub fn elements(&self) -> usize {
        self.inner.elements.load(Relaxed)
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

    /// All names in the checkpoint, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = match &self.inner.source {
            Source::Files(files) => files.names().cloned().collect(),
            Source::Memory(tensors) => lock(tensors).keys().cloned().collect(),
            Source::Nothing | Source::Blocks(_) => Vec::new(),
        };
        names.sort();
        names
    }

    /// The tensor `full` of the checkpoint, on the CPU and in the type that it is kept in, if it is there.
    pub fn stored(&self, full: &str) -> Result<Option<Tensor>> {
        Ok(match &self.inner.source {
            Source::Files(files) if files.shape(full).is_some() => {
                Some(files.load(full, &Device::Cpu)?)
            }
            Source::Memory(tensors) => match lock(tensors).get(full) {
                Some(Held::Tensor(tensor)) => Some(tensor.to_device(&Device::Cpu)?),
                Some(Held::Half(half)) => Some(half.to_tensor()?.to_dtype(half.kind().dtype())?),
                None => None,
            },
            Source::Files(_) | Source::Nothing | Source::Blocks(_) => None,
        })
    }

    /// Names in the checkpoint that no model has asked for, sorted.
    pub fn unused(&self) -> Vec<String> {
        let used = lock(&self.inner.used);
        let mut names = self.names();
        names.retain(|name| !used.contains(name));
        names
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

fn open(files: &[PathBuf], rename: Option<&Rename>) -> Result<(Source, PathBuf)> {
    let path = files.first().cloned().unwrap_or_default();
    Ok((Source::Files(TensorFiles::open(files, rename)?), path))
}
