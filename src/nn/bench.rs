//! How long the operations take: the rows that `tests/golden/bench_torch.py` prints for torch, for comparison on one
//! machine.

use std::time::Instant;

use candle_core::{DType, Device, Tensor};

use super::{Init, LayerNorm, Linear, Mask, Weights, ops};
use crate::Result;

/// One measured operation.
#[derive(Debug, Clone)]
pub struct Row {
    pub name: String,
    /// The fastest of several calls, in milliseconds.
    pub milliseconds: f64,
}

/// Measures everything; takes some seconds. All threads of the current rayon pool are used.
pub fn table() -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let weights = Weights::trainable(&[], 0, &Device::Cpu)?;
    let input = |shape: &[usize], name: &str| -> Result<Tensor> {
        Ok(weights
            .buffer(shape, name, Init::Normal(1.0))?
            .reshape(shape)?)
    };
    let pixels = input(&[4, 128, 32, 32], "pixels")?;
    let kernel = input(&[128, 128, 3, 3], "kernel")?;
    rows.push(best("conv 3x3 4x128x32x32", 20, || {
        ops::conv2d(&pixels, &kernel, None, 1, ops::Padding::Same(1)).map(drop)
    })?);
    let kernel = weights.get((128, 128, 3, 3), "trained_kernel", Init::Normal(0.1))?;
    let tracked = weights.get((4, 128, 32, 32), "trained_pixels", Init::Normal(1.0))?;
    rows.push(best(
        "conv 3x3 4x128x32x32, forward and backward",
        20,
        || {
            let y = ops::conv2d(&tracked, &kernel, None, 1, ops::Padding::Same(1))?;
            y.sum_all()?.backward()?;
            Ok(())
        },
    )?);
    let values = input(&[2048, 1024], "values")?;
    rows.push(best("gelu 2M", 50, || ops::gelu(&values).map(drop))?);
    rows.push(best("softmax 2048x1024", 50, || {
        ops::softmax(&values).map(drop)
    })?);
    let left = input(&[2048, 1280], "left")?;
    let right = input(&[1280, 1280], "right")?;
    rows.push(best("matmul 2048x1280x1280", 20, || {
        ops::linear(&left, &right, None).map(drop)
    })?);
    for (width, layers, b, n) in [(256, 4, 8, 96), (768, 4, 1, 376), (192, 6, 16, 88)] {
        let name = format!("transformer step {width} wide, {layers} layers, {b}x{n} tokens");
        let model = Transformer::new(width, layers, &weights.pp(&name))?;
        let x = input(&[b, n, width], &format!("x{width}"))?;
        rows.push(best(&name, 15, || {
            model.forward(&x)?.sqr()?.mean_all()?.backward()?;
            Ok(())
        })?);
    }
    Ok(rows)
}

fn best(name: &str, times: usize, mut body: impl FnMut() -> Result<()>) -> Result<Row> {
    body()?;
    let mut milliseconds = f64::INFINITY;
    for _ in 0..times {
        let start = Instant::now();
        body()?;
        milliseconds = milliseconds.min(start.elapsed().as_secs_f64() * 1e3);
    }
    Ok(Row {
        name: name.to_string(),
        milliseconds,
    })
}

/// A pre-norm transformer with heads of 64 and a GELU of four times the width.
struct Transformer {
    layers: Vec<Block>,
}

struct Block {
    norm1: LayerNorm,
    qkv: Linear,
    proj: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

impl Transformer {
    fn new(width: usize, layers: usize, weights: &Weights) -> Result<Self> {
        let layers = (0..layers)
            .map(|i| {
                let weights = weights.pp(i);
                Ok(Block {
                    norm1: LayerNorm::new(width, 1e-5, &weights.pp("norm1"))?,
                    qkv: Linear::new(width, 3 * width, true, &weights.pp("qkv"))?,
                    proj: Linear::new(width, width, true, &weights.pp("proj"))?,
                    norm2: LayerNorm::new(width, 1e-5, &weights.pp("norm2"))?,
                    fc1: Linear::new(width, 4 * width, true, &weights.pp("fc1"))?,
                    fc2: Linear::new(4 * width, width, true, &weights.pp("fc2"))?,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self { layers })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, n, c) = x.dims3()?;
        let mut x = x.to_dtype(DType::F32)?;
        for block in &self.layers {
            let qkv = block.qkv.forward(&block.norm1.forward(&x)?)?;
            let qkv = qkv
                .reshape((b, n, 3, c / 64, 64))?
                .permute((2, 0, 3, 1, 4))?;
            let (q, k, v) = (qkv.get(0)?, qkv.get(1)?, qkv.get(2)?);
            let y = ops::attention(&q, &k, &v, 0.125, &Mask::Causal)?;
            let y = y.transpose(1, 2)?.reshape((b, n, c))?;
            x = (x + block.proj.forward(&y)?)?;
            let y = ops::gelu(&block.fc1.forward(&block.norm2.forward(&x)?)?)?;
            x = (x + block.fc2.forward(&y)?)?;
        }
        Ok(x)
    }
}
