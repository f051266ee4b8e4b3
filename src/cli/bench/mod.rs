//! `proxytune bench`: times on this machine, in the terms of the reference implementations.

mod denoiser;
mod instructions;
mod operations;
mod step;
mod table;
mod torch;

use clap::{Args, Subcommand};

use crate::Result;
use instructions::Instructions;

/// `proxytune bench`
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Example:\n  proxytune bench step --model llamagen-xl --memory fit --dtype bf16"
)]
pub struct BenchArgs {
    #[command(subcommand)]
    pub what: Bench,
    /// avx2: measure as on a processor without AVX-512, on both sides
    #[arg(long, global = true, default_value = "native")]
    pub instructions: Instructions,
}

/// What is measured.
#[derive(Debug, Clone, Subcommand)]
pub enum Bench {
    /// Time the training step of a model at full size with random weights, and its peak memory
    Step(step::StepArgs),
    /// Time a diffusion model's network at full size with random weights, and its peak memory
    Denoiser(denoiser::DenoiserArgs),
    /// Time operations and the steps of the nano models, beside torch's
    Table(table::TableArgs),
}

impl BenchArgs {
    /// Settles what has to be settled before anything else happens in the process.
    ///
    /// # Errors
    /// When `--instructions` asks for what cannot be had here.
    pub(super) fn prepare(&self) -> Result<()> {
        self.instructions.settle()
    }
}

/// Measures and prints.
pub(super) fn run(args: &BenchArgs) -> Result<()> {
    match &args.what {
        Bench::Step(step) => step::run(step, args.instructions),
        Bench::Denoiser(denoiser) => denoiser::run(denoiser),
        Bench::Table(table) => table::run(table, args.instructions),
    }
}
