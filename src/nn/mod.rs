//! Differentiable layers. Model files are written with these alone, because several of candle's fused operations
//! drop the gradient without an error and its backward pass also computes gradients for frozen weights.
//!
//! - [`Weights`] hands named tensors to models: frozen from a checkpoint, or trainable, with an [`Adapter`] attached.
//! - [`layers`] holds `Linear`, `Conv2d`, norms and `Embedding`; [`ops`] the functions that they are made of.
//! - [`no_grad`] runs a closure without building a graph: sampling, encoding and evaluation use it.

mod adapter;
pub mod bench;
mod cpu;
pub mod layers;
pub mod ops;
pub mod plain;
mod vjp;
mod weights;

pub(crate) use adapter::seeded;
pub use adapter::{Adapter, Lora, LoraConfig};
pub use layers::{Conv2d, Embedding, GroupNorm, LayerNorm, Linear, RmsNorm};
pub use ops::Mask;
pub use weights::{Init, Weights};

use std::cell::Cell;

use candle_core::Tensor;

thread_local! {
    static NO_GRAD: Cell<bool> = const { Cell::new(false) };
}

/// Runs `body` on this thread without recording a graph: every parameter is taken detached.
pub fn no_grad<T>(body: impl FnOnce() -> T) -> T {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            NO_GRAD.with(|flag| flag.set(self.0));
        }
    }
    let _restore = Restore(NO_GRAD.with(|flag| flag.replace(true)));
    body()
}

/// A parameter as operations should see it: as it is, or detached inside [`no_grad`]. The storage is shared.
pub fn parameter(tensor: &Tensor) -> Tensor {
    if tensor.track_op() && NO_GRAD.with(Cell::get) {
        tensor.detach()
    } else {
        tensor.clone()
    }
}
