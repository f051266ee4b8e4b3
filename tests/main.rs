//! What the project promises, one module per behaviour. One binary: each of its own would link the whole store again.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

mod adapters;
mod backpressure;
mod bad_input;
mod checkpoints;
mod command_line;
mod config;
mod console;
#[cfg(feature = "cuda")]
mod cuda;
mod custom_source;
mod documents;
mod evaluators;
mod export;
mod fuzz;
mod generate;
mod half_precision;
mod hostile_checkpoints;
mod hostile_hub;
mod hub;
mod images;
mod joins;
mod keys;
mod layouts;
mod llamagen_published;
mod lumina;
mod merged_adapters;
mod nano;
mod nearest;
mod nn;
mod no_effect;
mod optimizer;
mod parity_ar;
mod parity_chameleon;
mod parity_diffusion;
mod parity_flux;
mod parity_sdxl;
mod parts;
mod photos;
mod plan;
mod preflight;
mod prompts;
mod query;
mod recompute;
mod removal;
mod report;
mod resume;
mod sample;
mod slices;
mod special_files;
mod store;
mod streaming;
mod text_tokenizers;
mod torch_files;
mod verify;
mod watch;
mod watch_shared;
mod watch_trial;
#[cfg(unix)]
mod whose_store;
