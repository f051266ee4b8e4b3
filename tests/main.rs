//! What the project promises, one module per behaviour. One binary: each of its own would link the whole store again.

mod support;

mod backpressure;
mod bad_input;
mod command_line;
mod config;
#[cfg(feature = "cuda")]
mod cuda;
mod evaluators;
mod export;
mod fused;
mod generate;
mod half_precision;
mod hub;
mod images;
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
mod parts;
mod plan;
mod preflight;
mod prompts;
mod query;
mod recompute;
mod removal;
mod report;
mod resume;
mod store;
mod streaming;
mod text_tokenizers;
mod verify;
mod watch;
mod watch_trial;
