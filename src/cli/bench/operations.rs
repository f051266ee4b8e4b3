//! The operations whose times are compared with torch's: `proxytune bench table`.

use candle_core::{DType, Device, Tensor};

use crate::Result;
use crate::nn::{Init, LayerNorm, Linear, Mask, Weights, ops};

/// Something to time.
pub(super) struct Operation {
    /// The row's name, the same on torch's side.
    pub name: String,
    /// Does it once.
    pub body: Box<dyn FnMut() -> Result<()> + Send>,
}

impl Operation {
    pub fn new(name: impl Into<String>, body: impl FnMut() -> Result<()> + Send + 'static) -> Self {
        Self {
            name: name.into(),
            body: Box::new(body),
        }
    }
}

/// Two training steps of a transformer, a matrix product, GELU, softmax and a convolution, in f32 on the CPU. All
/// threads of the current rayon pool are used.
pub(super) fn operations() -> Result<Vec<Operation>> {
    let weights = Weights::trainable(&[], 0, &Device::Cpu)?;
    let input = |shape: &[usize], name: &str| -> Result<Tensor> {
        weights.buffer(shape, name, Init::Normal(1.0))
    };
    let mut rows = Vec::new();
    for (width, layers, b, n) in [(256, 4, 8, 96), (768, 4, 4, 376)] {
        let model = Transformer::new(width, layers, &weights.pp(width))?;
        let x = input(&[b, n, width], &format!("x{width}"))?;
        let name = format!("training step, {width} wide, {layers} layers, {b}x{n} tokens");
        rows.push(Operation::new(name, move || {
            model.forward(&x)?.sqr()?.mean_all()?.backward()?;
            Ok(())
        }));
    }
    let (left, right) = (
        input(&[2048, 1280], "left")?,
        input(&[1280, 1280], "right")?,
    );
    rows.push(Operation::new("matrix product 2048x1280x1280", move || {
        ops::linear(&left, &right, None).map(drop)
    }));
    let values = input(&[2048, 1024], "values")?;
    let same = values.clone();
    rows.push(Operation::new("GELU of 2 M values", move || {
        ops::gelu(&values).map(drop)
    }));
    rows.push(Operation::new("softmax of 2 M values", move || {
        ops::softmax(&same).map(drop)
    }));
    let (pixels, kernel) = (
        input(&[4, 128, 32, 32], "pixels")?,
        input(&[128, 128, 3, 3], "kernel")?,
    );
    rows.push(Operation::new("3x3 convolution 4x128x32x32", move || {
        ops::conv2d(&pixels, &kernel, None, 1, ops::Padding::Same(1)).map(drop)
    }));
    Ok(rows)
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
