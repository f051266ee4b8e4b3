//! Muon (Jordan et al. 2024, <https://kellerjordan.github.io/posts/muon/>) for the matrices inside a network: a step of
//! momentum, made orthogonal, so that every direction of a matrix learns at one rate. The step is scaled as Liu et al.
//! do (2025, arXiv 2502.16982, equation 4), which lets it share AdamW's learning rate and decay.

use std::collections::BTreeMap;

use candle_core::{D, Device, Shape, Tensor, Var};

use super::{AdamW, AdamWConfig, Optimizer, remembered};
use crate::Result;

/// Decay of the momentum.
const MOMENTUM: f64 = 0.95;
/// The root mean square of a step's entries, about that of AdamW's.
const STEP_SIZE: f64 = 0.2;
/// Newton-Schulz steps, and the coefficients of their quintic.
const ITERATIONS: usize = 5;
const QUINTIC: (f64, f64, f64) = (3.4445, -4.7750, 2.0315);
/// Thinner matrices are left to AdamW.
const LEAST_SIDE: usize = 8;
/// What names of tables, of layers that read pixels or captions, and of layers that give pixels have in them. Their
/// rows are met with different frequency, which AdamW sees and Muon does not.
const OUTER: [&str; 3] = ["embed", "conv_in", "conv_out"];
/// Layers that give logits, and latents.
const LAST: [&str; 3] = ["output", "lm_head", "proj_out"];
/// torch's name of the momentum.
const MOMENTUM_BUFFER: &str = "momentum_buffer";

/// Whether Muon is for this tensor: a matrix, or a convolution's kernel, inside the network.
fn is_inner(name: &str, variable: &Var) -> bool {
    let (rows, columns) = sides(variable);
    let layer = [".lora_A", ".lora_B", ".weight"]
        .iter()
        .find_map(|end| Some(name.split_once(end)?.0));
    rows.min(columns) >= LEAST_SIDE
        && !layer.is_some_and(|layer| LAST.contains(&layer))
        && !OUTER.iter().any(|part| name.contains(part))
}

/// How many matrices lie in this tensor, below one another: three where a layer gives queries, keys and values of equal
/// width.
fn parts(name: &str, variable: &Var) -> usize {
    let gives_all = name.contains("qkv") && !name.contains(".lora_A");
    match gives_all && sides(variable).0.is_multiple_of(3) {
        true => 3,
        false => 1,
    }
}

/// Rows and columns: a kernel (outputs, inputs, h, w) has a row for each output.
fn sides(variable: &Var) -> (usize, usize) {
    match variable.dims() {
        [] | [_] => (0, 0),
        [rows, rest @ ..] => (*rows, rest.iter().product()),
    }
}

/// One matrix with its momentum.
struct Slot {
    name: String,
    variable: Var,
    momentum: Tensor,
    /// How many matrices lie in it.
    parts: usize,
    /// Its place among all variables.
    place: usize,
}

/// Muon over the matrices inside a network, and AdamW over its other variables, at one learning rate and decay.
pub struct Muon {
    slots: Vec<Slot>,
    weight_decay: f64,
    others: AdamW,
    /// The places of AdamW's among all variables.
    places: Vec<usize>,
}

impl Muon {
    /// An optimizer at rest, with AdamW's constants.
    ///
    /// # Errors
    /// When a card has no room for what it remembers.
    pub fn new(variables: Vec<(String, Var)>, config: AdamWConfig) -> Result<Self> {
        let (mut slots, mut others, mut places) = (Vec::new(), Vec::new(), Vec::new());
        for (place, (name, variable)) in variables.into_iter().enumerate() {
            if !is_inner(&name, &variable) {
                others.push((name, variable));
                places.push(place);
                continue;
            }
            slots.push(Slot {
                parts: parts(&name, &variable),
                momentum: variable.zeros_like()?.reshape(sides(&variable))?,
                name,
                variable,
                place,
            });
        }
        Ok(Self {
            slots,
            weight_decay: config.weight_decay,
            others: AdamW::new(others, config)?,
            places,
        })
    }
}

impl Optimizer for Muon {
    fn step(&mut self, gradients: &[Tensor], scale: f64, learning_rate: f64) -> Result<()> {
        let others: Vec<Tensor> = self.places.iter().map(|&i| gradients[i].clone()).collect();
        self.others.step(&others, scale, learning_rate)?;
        let mut ahead = Vec::new();
        for slot in &mut self.slots {
            let gradient = gradients[slot.place].reshape(sides(&slot.variable))?;
            let gradient = (gradient * scale)?;
            slot.momentum = ((&slot.momentum * MOMENTUM)? + &gradient)?;
            let one = (gradient + (&slot.momentum * MOMENTUM)?)?;
            ahead.extend(one.chunk(slot.parts, 0)?);
        }
        let mut steps = orthogonal(ahead)?.into_iter();
        for slot in &self.slots {
            let parts: Vec<Tensor> = steps.by_ref().take(slot.parts).collect();
            let (rows, columns) = sides(&slot.variable);
            let longer = (rows / slot.parts).max(columns) as f64;
            let step = (Tensor::cat(&parts, 0)? * (learning_rate * STEP_SIZE * longer.sqrt()))?;
            let kept = 1.0 - learning_rate * self.weight_decay;
            let weight = (slot.variable.as_tensor().detach() * kept)?;
            let weight = (weight - step.reshape(slot.variable.shape())?)?;
            slot.variable.set(&weight)?;
        }
        Ok(())
    }

    fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut state = self.others.state()?;
        for slot in &self.slots {
            let momentum = slot.momentum.to_device(&Device::Cpu)?;
            state.insert(format!("{}.{MOMENTUM_BUFFER}", slot.name), momentum);
        }
        Ok(state)
    }

    fn load_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let momentum = |slot: &Slot| -> Result<Tensor> {
            let shape = Shape::from(sides(&slot.variable));
            let momentum = remembered(state, &slot.name, MOMENTUM_BUFFER, &shape)?;
            Ok(momentum.to_device(slot.variable.device())?)
        };
        let loaded = self.slots.iter().map(momentum);
        let loaded = loaded.collect::<Result<Vec<Tensor>>>()?;
        self.others.load_state(state)?;
        for (slot, momentum) in self.slots.iter_mut().zip(loaded) {
            slot.momentum = momentum;
        }
        Ok(())
    }
}

/// About the nearest matrix to each of `matrices` whose singular values are all one: they end between 0.7 and 1.2.
/// Those of one shape go through the iteration together, because on a card small products cost their start alone.
fn orthogonal(matrices: Vec<Tensor>) -> Result<Vec<Tensor>> {
    let mut shapes: BTreeMap<(usize, usize), Vec<usize>> = BTreeMap::new();
    for (place, matrix) in matrices.iter().enumerate() {
        let (rows, columns) = matrix.dims2()?;
        let sides = (rows.min(columns), rows.max(columns));
        shapes.entry(sides).or_default().push(place);
    }
    let mut results = matrices.clone();
    for places in shapes.into_values() {
        let is_wide = |place: usize| matrices[place].dims()[0] <= matrices[place].dims()[1];
        let wide = places.iter().map(|&place| match is_wide(place) {
            true => Ok(matrices[place].clone()),
            false => matrices[place].t(),
        });
        let wide = wide.collect::<candle_core::Result<Vec<_>>>()?;
        let together = newton_schulz(Tensor::stack(&wide, 0)?)?;
        for (i, place) in places.into_iter().enumerate() {
            let result = together.get(i)?;
            results[place] = match is_wide(place) {
                true => result,
                false => result.t()?.contiguous()?,
            };
        }
    }
    Ok(results)
}

/// Newton and Schulz's iteration on wide matrices (n, r, c).
fn newton_schulz(x: Tensor) -> Result<Tensor> {
    let norm = x.sqr()?.sum_keepdim((1, 2))?.sqrt()?;
    let mut x = x.broadcast_div(&(norm + 1e-7)?)?;
    let (a, b, c) = QUINTIC;
    for _ in 0..ITERATIONS {
        let square = x.matmul(&x.transpose(D::Minus1, D::Minus2)?)?;
        let polynomial = ((&square * b)? + (square.matmul(&square)? * c)?)?;
        x = ((&x * a)? + polynomial.matmul(&x)?)?;
    }
    Ok(x)
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;

    #[test]
    fn a_step_of_a_badly_scaled_matrix_becomes_nearly_orthogonal() {
        let mut values = vec![0f32; 4 * 6];
        for (i, scale) in [100.0, 10.0, 1.0, 0.5].into_iter().enumerate() {
            values[i * 6 + i] = scale;
            values[i * 6 + i + 1] = 0.1 * scale;
        }
        let x = Tensor::from_vec(values, (4, 6), &Device::Cpu).unwrap();
        let (wide, tall) = (x.clone(), x.t().unwrap());
        for (x, y) in [&wide, &tall]
            .into_iter()
            .zip(orthogonal(vec![wide.clone(), tall.clone()]).unwrap())
        {
            assert_eq!(x.dims(), y.dims());
            let y = if y.dims() == [4, 6] {
                y
            } else {
                y.t().unwrap()
            };
            let gram = y.matmul(&y.t().unwrap()).unwrap();
            for (i, row) in gram.to_vec2::<f32>().unwrap().iter().enumerate() {
                for (j, &value) in row.iter().enumerate() {
                    let range = if i == j { 0.3..1.5 } else { -0.35..0.35 };
                    assert!(range.contains(&value), "{i} {j}: {value}");
                }
            }
        }
    }

    #[test]
    fn it_descends_and_leaves_tables_and_vectors_alone() {
        let device = &Device::Cpu;
        let table = Var::ones((64, 16), DType::F32, device).unwrap();
        let vector = Var::ones(16, DType::F32, device).unwrap();
        let matrix = Var::from_tensor(&Tensor::eye(16, DType::F32, device).unwrap()).unwrap();
        assert!(!is_inner("tok_embeddings.weight", &table));
        assert!(!is_inner("layers.0.norm.weight", &vector));
        assert!(is_inner("layers.0.attention.wqkv.weight", &matrix));
        assert!(!is_inner("output.weight", &matrix));
        assert!(!is_inner("proj_out.lora_B.weight", &matrix));
        assert!(is_inner("layers.0.attn.to_out.0.lora_A.weight", &matrix));
        // Queries, keys and values lie below one another in what a layer gives, not in what an adapter reads.
        let stacked = Var::ones((24, 16), DType::F32, device).unwrap();
        assert_eq!(parts("layers.0.attention.wqkv.weight", &stacked), 3);
        assert_eq!(parts("layers.0.attention.wqkv.lora_B.weight", &stacked), 3);
        assert_eq!(parts("layers.0.attention.wqkv.lora_A.weight", &stacked), 1);
        assert_eq!(parts("layers.0.attention.wo.weight", &stacked), 1);
        let config = AdamWConfig {
            weight_decay: 0.0,
            ..AdamWConfig::default()
        };
        let mut muon = Muon::new(vec![("m".into(), matrix.clone())], config).unwrap();
        let loss = || matrix.as_tensor().sqr().unwrap().sum_all().unwrap();
        let before = loss().to_scalar::<f32>().unwrap();
        for _ in 0..40 {
            let gradients = loss().backward().unwrap();
            let gradient = gradients.get(matrix.as_tensor()).unwrap().detach();
            muon.step(&[gradient], 1.0, 0.02).unwrap();
        }
        let after = loss().to_scalar::<f32>().unwrap();
        assert!(after < 0.5 * before, "{before} {after}");
    }
}
