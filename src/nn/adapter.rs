//! LoRA adapters: low-rank additions `scale · B·A` to chosen linear layers (Hu et al. 2021, arXiv 2106.09685).

use std::collections::BTreeMap;
use std::sync::Mutex;

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

/// The two factors of one adapted layer.
#[derive(Debug, Clone)]
pub struct Lora {
    /// A, shape (rank, in), f32.
    pub a: Var,
    /// B, shape (out, rank), f32, zero at the start.
    pub b: Var,
    /// `alpha / rank`.
    pub scale: f64,
}

/// The adapter of one backbone: one [`Lora`] for each layer that the model's construction found to be a target.
#[derive(Debug)]
pub struct Adapter {
    config: LoraConfig,
    seed: u64,
    layers: Mutex<BTreeMap<String, Lora>>,
}

impl Adapter {
    /// An empty adapter; layers join it while the model is built. A is drawn from N(0, 1/rank²) with a generator
    /// seeded by `seed` and the layer's path, so the order in which layers are built does not matter. B is zero.
    pub fn new(config: LoraConfig, seed: u64) -> Self {
        Self {
            config,
            seed,
            layers: Mutex::default(),
        }
    }

    /// Rank, alpha and targets.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// The factors for the layer at `path` with weight (`outputs`, `inputs`), or `None` if it is not a target.
    pub fn attach(
        &self,
        path: &str,
        inputs: usize,
        outputs: usize,
        device: &Device,
    ) -> Result<Option<Lora>> {
        let is_target = self.config.targets.iter().any(|target| {
            path == target
                || path
                    .strip_suffix(target.as_str())
                    .is_some_and(|rest| rest.ends_with('.'))
        });
        if !is_target {
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

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Lora>> {
        self.layers
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// A generator that depends on `seed` and `name` alone.
pub(crate) fn seeded(seed: u64, name: &str) -> ChaCha8Rng {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.update(name.as_bytes());
    ChaCha8Rng::from_seed(*hasher.finalize().as_bytes())
}
