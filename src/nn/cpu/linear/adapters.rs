//! The low-rank additions of a linear layer: each to some of its outputs.

use std::ops::Range;

use candle_core::{Result, Tensor};

use super::products::{forward, weight_gradient};
use crate::nn::Weight;
use crate::nn::cpu::gemm::{
    Matrix, Pair, Right, Threads, multiply, product, product_on, products, scaled_product,
};
use crate::nn::cpu::{Values, detached, tensor, values};
use crate::nn::ops::LoraBlock;
use crate::nn::shapes::Linear as Shapes;

/// What a linear layer's passes need of its adapters: their A one below the other, so that `x` is multiplied with all
/// at once, and each B.
pub struct Adapters {
    /// (ranks of all, inputs)
    a: Tensor,
    ranks: usize,
    blocks: Vec<Block>,
}

struct Block {
    /// (outputs, ranks)
    b: Tensor,
    scale: f32,
    /// Which of the layer's outputs it adds to, and which of all ranks are its own.
    outputs: Range<usize>,
    ranks: Range<usize>,
    /// Whether A and B are trained.
    trained: [bool; 2],
}

impl Block {
    /// B as a matrix of its `values`.
    fn b<'a>(&self, values: &'a [f32]) -> Matrix<'a> {
        Matrix::new(values, self.outputs.len(), self.ranks.len())
    }
}

impl Adapters {
    /// `None` of no blocks.
    pub fn new(given: &[LoraBlock], shape: &Shapes) -> Result<Option<Self>> {
        let mut blocks: Vec<Block> = Vec::with_capacity(given.len());
        for block in given {
            let (outputs, _) = block.b.dims2()?;
            let outputs = block.start..block.start + outputs;
            let before = blocks.last().map_or(0, |last| last.ranks.end);
            let own = Shapes {
                outputs: outputs.len(),
                ..*shape
            };
            let after = blocks.last().map_or(0, |last| last.outputs.end);
            if outputs.start < after || outputs.end > shape.outputs {
                candle_core::bail!(
                    "an adapter of outputs {outputs:?} where {after}..{} are left",
                    shape.outputs
                );
            }
            blocks.push(Block {
                b: detached(block.b)?,
                scale: block.scale as f32,
                outputs,
                ranks: before..before + own.rank(block.a, block.b)?,
                trained: block.factors().map(Tensor::track_op),
            });
        }
        let Some(ranks) = blocks.last().map(|last| last.ranks.end) else {
            return Ok(None);
        };
        let a = match given {
            [one] => detached(one.a)?,
            more => {
                let mut all = Vec::with_capacity(ranks * shape.inputs);
                for block in more {
                    all.extend_from_slice(&values(&detached(block.a)?)?);
                }
                tensor(all, (ranks, shape.inputs))?
            }
        };
        Ok(Some(Self { a, ranks, blocks }))
    }

    /// Whether some A is trained.
    pub fn trains_a(&self) -> bool {
        self.blocks.iter().any(|block| block.trained[0])
    }

    /// scale·`x`·Aᵀ of all, (rows, ranks).
    pub fn low(&self, x: &Tensor, shape: &Shapes) -> Result<Vec<f32>> {
        let a = Weight::Tensor(self.a.clone());
        let mut low = forward(x, &[a], None, &self.down(shape), None)?;
        for block in self.blocks.iter().filter(|block| block.scale != 1.0) {
            for row in low.chunks_exact_mut(self.ranks.max(1)) {
                let own = row[block.ranks.clone()].iter_mut();
                own.for_each(|v| *v *= block.scale);
            }
        }
        Ok(low)
    }

    fn down(&self, shape: &Shapes) -> Shapes {
        Shapes {
            outputs: self.ranks,
            ..*shape
        }
    }

    /// The only one, if it adds to all outputs.
    fn only(&self, shape: &Shapes) -> Option<&Block> {
        match self.blocks.as_slice() {
            [one] if one.outputs.len() == shape.outputs => Some(one),
            _ => None,
        }
    }

    /// W + scale·B·A of `weight` (outputs, inputs).
    pub fn merged_into(&self, weight: &[f32], shape: &Shapes) -> Result<Vec<f32>> {
        let inputs = shape.inputs;
        let a = values(&self.a)?;
        let all = Matrix::new(&a, self.ranks, inputs);
        if let Some(only) = self.only(shape) {
            return Ok(product_on(
                weight,
                only.scale,
                only.b(&values(&only.b)?),
                all,
            ));
        }
        let mut sum = weight.to_vec();
        for block in &self.blocks {
            let a = all.some_rows(block.ranks.start, block.ranks.end);
            let rows = &mut sum[block.outputs.start * inputs..];
            let b = values(&block.b)?;
            multiply(
                block.scale,
                block.b(&b),
                a,
                rows,
                inputs,
                true,
                Threads::All,
            );
        }
        Ok(sum)
    }

    /// Adds what the adapters add to `y` (rows, outputs).
    pub fn add_to(&self, y: &mut [f32], low: &[f32], shape: &Shapes) -> Result<()> {
        for block in &self.blocks {
            let b = values(&block.b)?;
            let low = self.columns(low, block, shape);
            let y = y.get_mut(block.outputs.start..).unwrap_or_default();
            multiply(
                1.0,
                low,
                block.b(&b).t(),
                y,
                shape.outputs,
                true,
                Threads::All,
            );
        }
        Ok(())
    }

    /// Those of `low` (rows, ranks) that belong to `block`.
    fn columns<'a>(&self, low: &'a [f32], block: &Block, shape: &Shapes) -> Matrix<'a> {
        let Range { start, end } = block.ranks;
        Matrix::new(low, shape.rows, self.ranks).some_columns(start, end)
    }

    /// `x`·`w` with what the adapters add, from `low`, and the bias: `w` is (inputs, outputs).
    pub fn product(
        &self,
        x: Matrix,
        w: Matrix,
        bias: Option<&[f32]>,
        low: &[f32],
        shape: &Shapes,
    ) -> Result<Vec<f32>> {
        let factors = self.blocks.iter().map(|block| values(&block.b));
        let factors: Vec<Values> = factors.collect::<Result<_>>()?;
        let mut rights = Vec::with_capacity(2 * self.blocks.len() + 1);
        let mut right = |outputs: Range<usize>, more| {
            if !outputs.is_empty() {
                rights.push(Right {
                    b: w.some_columns(outputs.start, outputs.end),
                    row: bias.map(|bias| &bias[outputs]),
                    more,
                });
            }
        };
        let mut end = 0;
        for (block, b) in self.blocks.iter().zip(&factors) {
            right(end..block.outputs.start, None);
            let more = Pair {
                a: self.columns(low, block, shape),
                b: block.b(b).t(),
            };
            right(block.outputs.clone(), Some(more));
            end = block.outputs.end;
        }
        right(end..shape.outputs, None);
        Ok(products(x, &rights))
    }

    /// scale·g·B of all, (rows, ranks), with `g` (rows, outputs).
    pub fn low_gradient(&self, g: &[f32], shape: &Shapes) -> Result<Vec<f32>> {
        let g = Matrix::new(g, shape.rows, shape.outputs);
        if let Some(only) = self.only(shape) {
            return Ok(scaled_product(only.scale, g, only.b(&values(&only.b)?)));
        }
        let mut all = vec![0.0; shape.rows * self.ranks];
        for block in &self.blocks {
            let b = values(&block.b)?;
            let g = g.some_columns(block.outputs.start, block.outputs.end);
            let out = all.get_mut(block.ranks.start..).unwrap_or_default();
            multiply(
                block.scale,
                g,
                block.b(&b),
                out,
                self.ranks,
                false,
                Threads::All,
            );
        }
        Ok(all)
    }

    /// Calls `body` with what adds the adapters' share to the gradient of `x`, `low_gradient`·A.
    pub fn with_input_pair<T>(
        &self,
        low_gradient: &[f32],
        shape: &Shapes,
        body: impl FnOnce(Pair) -> T,
    ) -> Result<T> {
        let a = values(&self.a)?;
        Ok(body(Pair {
            a: Matrix::new(low_gradient, shape.rows, self.ranks),
            b: Matrix::new(&a, self.ranks, shape.inputs),
        }))
    }

    /// The gradients of each A and B that are trained, one adapter after the other. `low` is found again where the
    /// forward pass had no use for it; `low_gradient` is there if an A is trained.
    pub fn gradients(
        &self,
        g: &[f32],
        x: &Tensor,
        low: Option<&[f32]>,
        low_gradient: Option<&[f32]>,
        shape: &Shapes,
    ) -> Result<Vec<Tensor>> {
        let inputs = shape.inputs;
        let mut da = match low_gradient {
            Some(low) if self.trains_a() => weight_gradient(low, &values(x)?, &self.down(shape)),
            _ => Vec::new(),
        };
        let now;
        let low = match low {
            Some(low) => low,
            None if self.blocks.iter().any(|block| block.trained[1]) => {
                now = self.low(x, shape)?;
                &now
            }
            None => &[],
        };
        let g = Matrix::new(g, shape.rows, shape.outputs);
        let mut gradients = Vec::new();
        for block in &self.blocks {
            let Range { start, end } = block.ranks;
            if block.trained[0] {
                let da = match self.blocks.len() {
                    1 => std::mem::take(&mut da),
                    _ => da[start * inputs..end * inputs].to_vec(),
                };
                gradients.push(tensor(da, (end - start, inputs))?);
            }
            if block.trained[1] {
                let outputs = block.outputs.clone();
                let g = g.some_columns(outputs.start, outputs.end);
                let low = self.columns(low, block, shape);
                let db = product(g.t(), low, None);
                gradients.push(tensor(db, (outputs.len(), end - start))?);
            }
        }
        Ok(gradients)
    }
}
