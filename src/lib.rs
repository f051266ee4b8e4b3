//! proxytune: Proxy-Tuning of autoregressive image models.
//!
//! A diffusion model learns a subject from a few photos and makes *proxy* images of it; these become VQ tokens
//! in a Lance store, and an autoregressive (AR) student trains its LoRA adapter on them while they are still
//! arriving. Evaluation follows downstream.
//!
//! The map, from the outside in; imports run downwards only:
//!
//! | room | what is in it |
//! |---|---|
//! | [`cli`] | one file per command |
//! | [`nano`] | the drawn world and the training of the nano checkpoints |
//! | [`watch`] | the watched folder: a chain of runs |
//! | [`pipeline`] | the graph: builds the stages, spawns, drains, joins |
//! | [`stages`] | one file per box of the dataflow |
//! | [`training`], [`evaluation`], [`verify`] | trainer, optimizers, adapter files; metrics, protocol, report; components against their references |
//! | [`models`] | one file or folder per architecture; the traits and the registry |
//! | [`nn`], [`diffusion`] | differentiable layers; noise schedules and samplers |
//! | [`store`], [`plan`], [`config`], [`hub`], [`stream`], [`images`], [`files`], [`console`] | Lance; what happens in which order; TOML to types; checkpoints by name; channels and workers; pictures; atomic files; what a person is told |
//!
//! Programs that use the crate as a library are in `examples/`: a run from code, a source of one's own, an adapter
//! loaded and drawn with.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

pub mod cli;
pub mod config;
pub mod console;
pub mod diffusion;
pub mod error;
pub mod evaluation;
pub mod files;
pub mod hub;
pub mod images;
pub mod models;
pub mod nano;
pub mod nn;
pub mod pipeline;
pub mod plan;
pub mod stages;
pub mod store;
pub mod stream;
pub mod training;
pub mod verify;
pub mod watch;

pub use error::{Error, Result};

/// Bytes of stack of a thread that runs commands: a condition of as many operations as a query may have
/// ([`store::query`]) is planned by recursion, a debug build's frames included.
pub const STACK: usize = 64 << 20;
