//! LoRA adapters: low-rank additions `scale · B·A` to chosen linear layers (Hu et al. 2021, arXiv 2106.09685).

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Tensor, Var};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal};

use crate::{Error, Result};

/// Which layers carry an adapter, and how large it is.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// Rank r of the two factors, at least 1.
    pub rank: usize,
    /// The addition is scaled by `alpha / rank`.
    pub alpha: f64,
    /// Module names that carry an adapter: a layer matches when its path equals a target or ends with `.target`.
    pub targets: Vec<String>,
}

impl LoraConfig {
    /// Whether `target` names the layer at `path`: it is equal, or its end after a dot.
    pub fn names(target: &str, path: &str) -> bool {
        path.strip_suffix(target)
            .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    }
}

/// The two factors of one adapted layer.
#[derive(Debug, Clone)]
pub struct Lora {
    /// A, shape (rank, in), f32; of a convolution (rank, in, k, k).
    pub a: Var,
    /// B, shape (out, rank), f32, zero at the start; of a convolution (out, rank, 1, 1).
    pub b: Var,
    /// `alpha / rank`.
    pub scale: f64,
}

/// The factors of one layer of an adapter that has been trained.
#[derive(Debug, Clone)]
pub struct Factors {
    /// A, shape (rank, in); of a convolution (rank, in, k, k).
    pub a: Tensor,
    /// B, shape (out, rank); of a convolution (out, rank, 1, 1).
    pub b: Tensor,
    /// What B·A is multiplied with.
    pub scale: f64,
}

/// Factors by layer, each with its own rank and scale, that wait for a model's layers to ask for them.
#[derive(Debug)]
struct Trained {
    factors: BTreeMap<String, Factors>,
    /// The name under which `factors` has the layer at a path of the checkpoint.
    layer: fn(&str) -> String,
}

/// The adapter of one backbone: one [`Lora`] for each layer that the model's construction found to be a target.
#[derive(Debug)]
pub struct Adapter {
    config: LoraConfig,
    seed: u64,
    trained: Option<Trained>,
    layers: Mutex<BTreeMap<String, Lora>>,
    places: Mutex<BTreeMap<String, Vec<usize>>>,
}

impl Adapter {
    /// An empty adapter; layers join it while the model is built. A is drawn from N(0, 1/rank²) with a generator
    /// seeded by `seed` and the layer's path, so the order in which layers are built does not matter. B is zero.
    pub fn new(config: LoraConfig, seed: u64) -> Self {
        Self {
            config,
            seed,
            trained: None,
            layers: Mutex::default(),
            places: Mutex::default(),
        }
    }

    /// An adapter that has been trained, convolutions included: ranks and scales may differ from layer to layer. A
    /// layer at `path` of the checkpoint carries `factors[layer(path)]` if the shapes fit, and its variables have that
    /// name: compare with [`Adapter::places`] when the model is built. In [`Adapter::config`] rank and alpha are the
    /// first layer's.
    pub fn from_factors(factors: BTreeMap<String, Factors>, layer: fn(&str) -> String) -> Self {
        let first = factors.values().next();
        let rank = first.map_or(0, |f| f.a.dims().first().copied().unwrap_or(0));
        Self {
            config: LoraConfig {
                rank,
                alpha: first.map_or(0.0, |f| f.scale * rank as f64),
                targets: factors.keys().cloned().collect(),
            },
            seed: 0,
            trained: Some(Trained { factors, layer }),
            layers: Mutex::default(),
            places: Mutex::default(),
        }
    }

    /// The layers that the model's construction has met so far, adapted or not, under the names that the adapter has for
    /// them, with the shapes of their weights: where factors can be applied.
    pub fn places(&self) -> BTreeMap<String, Vec<usize>> {
        lock(&self.places).clone()
    }

    /// Rank, alpha and targets.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// The factors for the convolution at `path` with weight (`outputs`, `inputs`, `kernel`, `kernel`), if this is a
    /// trained adapter that has some.
    pub fn attach_conv(
        &self,
        path: &str,
        [outputs, inputs, kernel]: [usize; 3],
        device: &Device,
    ) -> Result<Option<Lora>> {
        self.take(path, &[outputs, inputs, kernel, kernel], device)
    }

    /// The trained factors for the layer at `path`, whose weight has these `dims`.
    fn take(&self, path: &str, dims: &[usize], device: &Device) -> Result<Option<Lora>> {
        let name = match &self.trained {
            Some(trained) => (trained.layer)(path),
            None => path.to_string(),
        };
        lock(&self.places).insert(name.clone(), dims.to_vec());
        let Some(trained) = &self.trained else {
            return Ok(None);
        };
        let Some(Factors { a, b, scale }) = trained.factors.get(&name) else {
            return Ok(None);
        };
        let rank = a.dims().first().copied().unwrap_or(0);
        let mut down = dims.to_vec();
        down[0] = rank;
        let mut up = vec![1; dims.len()];
        (up[0], up[1]) = (dims[0], rank);
        if rank == 0 || a.dims() != down || b.dims() != up {
            return Ok(None);
        }
        let variable = |t: &Tensor| -> Result<Var> {
            let t = t.to_dtype(DType::F32)?.to_device(device)?;
            Ok(Var::from_tensor(&t.contiguous()?)?)
        };
        let lora = Lora {
            a: variable(a)?,
            b: variable(b)?,
            scale: *scale,
        };
        lock(&self.layers).insert(name, lora.clone());
        Ok(Some(lora))
    }

    /// The factors for the layer at `path` with weight (`outputs`, `inputs`), or `None` if it is not a target.
    pub fn attach(
        &self,
        path: &str,
        inputs: usize,
        outputs: usize,
        device: &Device,
    ) -> Result<Option<Lora>> {
        let taken = self.take(path, &[outputs, inputs], device)?;
        if self.trained.is_some() {
            return Ok(taken);
        }
        let mut targets = self.config.targets.iter();
        if !targets.any(|target| LoraConfig::names(target, path)) {
            return Ok(None);
        }
        let rank = self.config.rank;
        let mut generator = seeded(self.seed, path);
        let normal = Normal::new(0f32, 1.0 / rank as f32)
            .map_err(|_| Error::invalid(format!("rank {rank}"), "the rank must be at least 1"))?;
        let values: Vec<f32> = (0..rank * inputs)
            .map(|_| normal.sample(&mut generator))
            .collect();
        let lora = Lora {
            a: Var::from_vec(values, (rank, inputs), device)?,
            b: Var::zeros((outputs, rank), DType::F32, device)?,
            scale: self.config.alpha / rank as f64,
        };
        self.lock().insert(path.to_string(), lora.clone());
        Ok(Some(lora))
    }

    /// All trainable tensors by name, `PATH.lora_A.weight` and `PATH.lora_B.weight`, in the order of their names.
    pub fn variables(&self) -> Vec<(String, Var)> {
        self.lock()
            .iter()
            .flat_map(|(path, lora)| {
                [
                    (format!("{path}.lora_A.weight"), lora.a.clone()),
                    (format!("{path}.lora_B.weight"), lora.b.clone()),
                ]
            })
            .collect()
    }

    /// The adapted layers by path.
    pub fn layers(&self) -> BTreeMap<String, Lora> {
        self.lock().clone()
    }

    /// Replaces the values of all factors; `tensors` has the names of [`Adapter::variables`]. Every difference in
    /// names or shapes is reported at once, and then nothing is changed.
    pub fn load(&self, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        let variables = self.variables();
        let mut faults = Vec::new();
        for (name, variable) in &variables {
            match tensors.get(name) {
                None => faults.push(format!("{name} is missing")),
                Some(t) if t.shape() != variable.shape() => faults.push(format!(
                    "{name} has shape {:?}, {:?} expected",
                    t.dims(),
                    variable.dims()
                )),
                Some(_) => {}
            }
        }
        let known: std::collections::BTreeSet<&String> =
            variables.iter().map(|(name, _)| name).collect();
        faults.extend(
            tensors
                .keys()
                .filter(|name| !known.contains(name))
                .map(|name| format!("{name} is not known")),
        );
        if !faults.is_empty() {
            return Err(Error::invalid(
                format!(
                    "the adapter does not fit the model:\n  {}",
                    faults.join("\n  ")
                ),
                "use the checkpoint, rank and targets that the adapter was trained with",
            ));
        }
        for (name, variable) in &variables {
            variable.set(
                &tensors[name]
                    .to_dtype(DType::F32)?
                    .to_device(variable.device())?,
            )?;
        }
        Ok(())
    }

    /// The current values by name, detached copies on the CPU.
    pub fn snapshot(&self) -> Result<BTreeMap<String, Tensor>> {
        self.variables()
            .into_iter()
            .map(|(name, variable)| {
                Ok((
                    name,
                    variable
                        .as_tensor()
                        .detach()
                        .to_device(&Device::Cpu)?
                        .copy()?,
                ))
            })
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Lora>> {
        lock(&self.layers)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A generator that depends on `seed` and `name` alone.
pub(crate) fn seeded(seed: u64, name: &str) -> ChaCha8Rng {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.update(name.as_bytes());
    ChaCha8Rng::from_seed(*hasher.finalize().as_bytes())
}
