//! `proxytune bench`: times on this machine, in the terms of the reference implementations.

mod operations;
mod step;
mod table;
mod torch;

use clap::{Args, Subcommand};

use crate::Result;

/// `proxytune bench`
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Example:\n  proxytune bench step --model llamagen-xl --memory fit --dtype bf16"
)]
pub struct BenchArgs {
    #[command(subcommand)]
    pub what: Bench,
}

/// What is measured.
#[derive(Debug, Clone, Subcommand)]
pub enum Bench {
    /// Time the training step of a model at full size with random weights, and its peak memory
    Step(step::StepArgs),
    /// Time operations and the steps of the nano models, beside torch's
    Table(table::TableArgs),
}

/// Measures and prints.
pub(super) fn run(args: &BenchArgs) -> Result<()> {
    match &args.what {
        Bench::Step(args) => step::run(args),
        Bench::Table(args) => table::run(args),
    }
}
