//! Differentiable layers. Model files are written with these alone, because several of candle's fused operations
//! drop the gradient without an error and its backward pass also computes gradients for frozen weights.
//!
//! - [`Weights`] hands named tensors to models: frozen from a checkpoint, or trainable, with an [`Adapter`] attached.
//! - [`layers`] holds `Linear`, `Conv2d`, norms and `Embedding`; [`ops`] the functions that they are made of.
//! - A frozen [`Weight`] may be a [`HalfMatrix`]: bf16 or f16 on the CPU, mapped from its file, with f32 arithmetic.
//!   A [`QuantisedMatrix`] is one of a GGUF file, kept in blocks of few bits and unpacked where it is multiplied.
//! - [`recompute`] runs a block again in the backward pass instead of keeping what it computed; [`backward`] gives the
//!   gradients.
//! - [`merged`] runs a closure in which small layers carry their adapters inside their weights: sampling uses it.
//! - [`no_grad`] runs a closure without building a graph: sampling, encoding and evaluation use it.

#![warn(missing_docs)]

mod adapter;
mod context;
mod cpu;
mod cuda;
mod init;
pub mod layers;
pub mod layout;
mod mapped;
mod merged;
pub mod ops;
mod parts;
pub mod plain;
mod precision;
mod quantised;
mod recompute;
mod shapes;
mod shared;
mod slices;
mod slot;
mod tensor_files;
mod vjp;
mod weight_source;
mod weights;

pub(crate) use adapter::seeded;
pub use adapter::{Adapter, Factors, Lora, LoraConfig};
use context::{Context, is_crowded, is_no_grad};
pub use context::{Operations, is_recomputing, merged, no_grad, recomputing, use_operations};
pub(crate) use cuda::optimizer as card_optimizer;
pub(crate) use cuda::takes as card_takes;
pub use init::Init;
pub use layers::{Conv2d, Embedding, GroupNorm, LayerNorm, Linear, RmsNorm};
pub(crate) use mapped::map as map_safetensors;
pub use ops::Mask;
pub use parts::mean_over_parts;
pub use precision::{HalfKind, HalfMatrix, Precision, Weight};
pub use quantised::QuantisedMatrix;
pub use recompute::{backward, recompute};
pub use slices::sum_over_rows;
pub use tensor_files::{Cut, Form, Rename};
pub use weights::Weights;

use candle_core::Tensor;

/// A parameter as operations should see it: as it is, or detached inside [`no_grad`]. The storage is shared.
pub fn parameter(tensor: &Tensor) -> Tensor {
    if tensor.track_op() && is_no_grad() {
        tensor.detach()
    } else {
        tensor.clone()
    }
}

/// Settles four things that training on the CPU depends on, once for the whole process: where mimalloc is the
/// allocator, freed memory is kept for a second for the next tensor instead of going back to the system (which
/// otherwise takes longer than the arithmetic); candle's own elementwise operations run on the thread that asks for
/// them, because its pool waits by spinning, on cores that other stages need; candle is told the number of cores,
/// which it otherwise reads from the system's description of every processor before each of its matrix products; and those
/// products do not copy what they can read in place for up to some hundred columns, as for a convolution's outputs.
///
/// # Safety
/// To be called at the start of `main`, before there is a second thread: it sets environment variables.
pub unsafe fn prepare_process() {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    for (name, value) in [("CANDLE_NUM_THREADS", 1), ("RAYON_NUM_THREADS", cores)] {
        if std::env::var_os(name).is_none() {
            // SAFETY: by contract nobody else can be reading the environment.
            unsafe { std::env::set_var(name, value.to_string()) };
        }
    }
    const READ_IN_PLACE: usize = 32;
    gemm::set_lhs_packing_threshold_single_thread(READ_IN_PLACE);
    /// Its number in mimalloc 2's `mi_option_e`.
    const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
    const MILLISECONDS: std::ffi::c_long = 1000;
    // SAFETY: an option takes a number, here unless its variable MIMALLOC_PURGE_DELAY is set; a program with another
    // allocator has no use for it.
    unsafe { libmimalloc_sys::mi_option_set_default(PURGE_DELAY, MILLISECONDS) }
}
