//! Fused projections: linear layers of one input, such as an attention's queries, keys and values, computed as one
//! operation. Their names, files and adapters stay those of the single layers.

use candle_core::{D, Tensor};

use super::adapter::Lora;
use super::cpu::takes;
use super::layers::TURNED;
use super::ops::LoraBlock;
use super::{Init, Linear, Weight, Weights, layout, merged, ops};
use crate::Result;

/// The most layers that are fused: an operation has so many tracked inputs, of which each adapter gives two.
const MOST: usize = 4;

/// Several [`Linear`] layers of one input. Where their weights are frozen and in f32 or half precision on the CPU, they
/// are computed together; elsewhere one after the other. An adapter joins each layer by its own name.
///
/// Weights in f32 then lie one below the other in memory, of which each layer's own is a part. Those in half precision
/// stay where they are, mapped in their file if they were.
pub struct FusedLinear {
    layers: Vec<Linear>,
    stack: Option<Stack>,
}

/// What is computed together.
struct Stack {
    /// One in f32, or each layer's in half precision.
    weights: Vec<Weight>,
    bias: Option<Tensor>,
}

impl FusedLinear {
    /// A layer of `inputs` to so many outputs at each of `places`; see [`Linear::with_init`].
    pub fn new(inputs: usize, places: &[(usize, Weights)], bias: bool, init: Init) -> Result<Self> {
        let layer = |(outputs, weights): &(usize, Weights)| {
            Linear::as_read(inputs, *outputs, bias, init, weights)
        };
        let mut layers: Vec<Linear> = places.iter().map(layer).collect::<Result<_>>()?;
        let stack = stack(&mut layers)?;
        Ok(Self { layers, stack })
    }

    /// `x` (…, inputs) as each layer sees it.
    pub fn forward(&self, x: &Tensor) -> Result<Projected> {
        let stack = match &self.stack {
            Some(stack) if takes([x]) => stack,
            _ => {
                let each = self.layers.iter().map(|layer| layer.forward(x));
                return Ok(Projected(Parts::Each(each.collect::<Result<_>>()?)));
            }
        };
        let (mut blocks, mut widths) = (Vec::new(), Vec::new());
        let mut start = 0;
        for layer in &self.layers {
            if let Some(lora) = layer.lora() {
                blocks.push((start, lora));
            }
            widths.push(layer.outputs()?);
            start += layer.outputs()?;
        }
        let together = stack.forward(x, &blocks)?;
        Ok(Projected(Parts::Together(together, widths)))
    }
}

impl Stack {
    fn forward(&self, x: &Tensor, blocks: &[(usize, &Lora)]) -> Result<Tensor> {
        let bias = self.bias.as_ref();
        if let [weight] = self.weights.as_slice()
            && let Some(tensor) = weight.tensor()
            && let Some(merged) = merged::weight(tensor, blocks)?
        {
            return Ok(ops::stacked(x, &[merged], bias, &[])?);
        }
        let blocks: Vec<LoraBlock> = blocks
            .iter()
            .map(|(start, lora)| LoraBlock::of(lora, *start))
            .collect();
        Ok(ops::stacked(x, &self.weights, bias, &blocks)?)
    }
}

/// The stack of `layers`, whose own weights become parts of it, where they can be computed together.
fn stack(layers: &mut [Linear]) -> Result<Option<Stack>> {
    let frozen = |tensor: &Tensor| !tensor.track_op() && takes([tensor]);
    let biases: Vec<&Tensor> = layers.iter().filter_map(Linear::bias).collect();
    if layers.len() > MOST
        || !(biases.is_empty() || biases.len() == layers.len())
        || !biases.iter().all(|bias| frozen(bias))
    {
        return Ok(None);
    }
    let bias = match biases.is_empty() {
        true => None,
        false => Some(Tensor::cat(&biases, 0)?),
    };
    let weights = layers.iter().map(Linear::weight);
    if weights.clone().all(|w| matches!(w, Weight::Half(_))) {
        let weights = weights.cloned().collect();
        return Ok(Some(Stack { weights, bias }));
    }
    let tensors: Vec<&Tensor> = weights.filter_map(Weight::tensor).collect();
    if tensors.len() < layers.len() || !tensors.iter().all(|tensor| frozen(tensor)) {
        return Ok(None);
    }
    let all = Tensor::cat(&tensors, 0)?;
    let mut start = 0;
    for layer in layers {
        let outputs = layer.outputs()?;
        layer.set_weight(all.narrow(0, start, outputs)?);
        start += outputs;
    }
    let mut weight = Weight::Tensor(all);
    let (outputs, inputs) = weight.dims2()?;
    if outputs * inputs <= TURNED {
        weight = weight.turned()?;
    }
    Ok(Some(Stack {
        weights: vec![weight],
        bias,
    }))
}

/// What the layers of a [`FusedLinear`] made of one input.
pub struct Projected(Parts);

enum Parts {
    /// Side by side, and how wide each is.
    Together(Tensor, Vec<usize>),
    Each(Vec<Tensor>),
}

impl Projected {
    /// What layer `i` made of an input (b, n, …), in heads of `d` values: (b, heads, n, d). The widths of the layers
    /// before it are multiples of `d`.
    pub fn heads(&self, i: usize, d: usize) -> Result<Tensor> {
        match &self.0 {
            Parts::Together(all, widths) => {
                let start = widths[..i].iter().sum();
                layout::split_heads(all, start, widths[i] / d, d)
            }
            Parts::Each(each) => layout::split_heads(&each[i], 0, each[i].dim(D::Minus1)? / d, d),
        }
    }

    /// What layer `i` made, (…, outputs).
    pub fn part(&self, i: usize) -> Result<Tensor> {
        match &self.0 {
            Parts::Together(all, widths) => {
                let start = widths[..i].iter().sum();
                Ok(all.narrow(D::Minus1, start, widths[i])?.contiguous()?)
            }
            Parts::Each(each) => Ok(each[i].clone()),
        }
    }

    /// `silu(first) · second` of two layers.
    pub fn swiglu(&self) -> Result<Tensor> {
        match &self.0 {
            Parts::Together(all, _) => ops::swiglu_halves(all),
            Parts::Each(each) => ops::swiglu(&each[0], &each[1]),
        }
    }
}
