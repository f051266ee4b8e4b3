//! FLUX.1 (Black Forest Labs 2024) from a directory in diffusers' layout, for example `black-forest-labs/FLUX.1-dev`.

mod block;
mod transformer;

pub use transformer::{Condition, Config, FluxTransformer, LORA_TARGETS};
