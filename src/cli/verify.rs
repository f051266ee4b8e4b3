//! `proxytune verify`: whether a component computes here what its reference implementation computed.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;

use super::{Ended, output_failed};
use crate::config::Device;
use crate::pipeline::device;
use crate::verify::{Component, Precision, Request, verify};
use crate::{Error, Result};

/// Backward passes recurse along the graph: as much stack as models have elsewhere.
const STACK_BYTES: usize = 256 << 20;

/// `proxytune verify`
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "The reference file holds input.NAME, output (or output.NAME), and for gradients cotangent and \
                  grad.KEY for each weight of the adapter. Of text-to-image its metadata holds prompt, \
                  negative_prompt, height, width, num_inference_steps and guidance_scale as JSON, and where not \
                  all steps are guided guidance_start and guidance_stop.\nExit code: 0 within tolerance, 1 not, 2 unusable input.\n\n\
                  Example:\n  proxytune verify llamagen-gpt --model tests/golden/llamagen-gpt/two-layers/model \
                  --adapter tests/golden/llamagen-gpt/two-layers/adapter \
                  --reference tests/golden/llamagen-gpt/two-layers/reference.safetensors"
)]
pub struct VerifyArgs {
    /// llamagen-gpt, llamagen-vq, chameleon, chameleon-vq, clip, clip-text, t5, dino, sd3-transformer, flux-transformer,
    /// sdxl-unet, vae, text-to-image, adamw or prodigy
    pub component: Component,
    /// The component's folder, or one that has it among its own; of text-to-image the whole pipeline's
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// An adapter: PEFT's or diffusers' folder, or a file
    #[arg(long, value_name = "DIR|FILE")]
    pub adapter: Option<PathBuf>,
    /// What went into the reference implementation and what came out
    #[arg(long, value_name = "FILE")]
    pub reference: PathBuf,
    /// Largest relative L2 error of an output [default: 1e-4 in f32, 2e-2 in bf16; of text-to-image ten times as much]
    #[arg(long, value_name = "T", value_parser = tolerance, allow_negative_numbers = true)]
    pub tolerance: Option<f64>,
    /// Largest relative L2 error of each gradient [default: 1e-3 in f32, 5e-2 in bf16]
    #[arg(long, value_name = "G", value_parser = tolerance, allow_negative_numbers = true)]
    pub gradient_tolerance: Option<f64>,
    /// cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    pub device: Device,
    /// f32, or bf16: weights and inputs rounded to it
    #[arg(long, default_value = "f32")]
    pub dtype: Precision,
    /// Print everything as JSON
    #[arg(long)]
    pub json: bool,
}

fn tolerance(text: &str) -> std::result::Result<f64, String> {
    match text.parse() {
        Ok(number) if number >= 0.0 => Ok(number),
        _ => Err("a number of at least 0 is needed".to_string()),
    }
}

pub(super) fn run(args: &VerifyArgs, out: &mut impl Write) -> Result<Ended> {
    let unusable = |error: Error| Error::Unusable(Box::new(error));
    let request = Request {
        component: args.component,
        model: args.model.clone(),
        adapter: args.adapter.clone(),
        reference: args.reference.clone(),
        tolerance: args
            .tolerance
            .unwrap_or(args.component.tolerance(args.dtype)),
        gradient_tolerance: args
            .gradient_tolerance
            .unwrap_or(args.dtype.gradient_tolerance()),
        device: device(args.device).map_err(unusable)?,
        precision: args.dtype,
    };
    let report = on_a_large_stack(move || verify(&request)).map_err(unusable)?;
    if args.json {
        writeln!(out, "{:#}", report.json()).map_err(output_failed)?;
    } else {
        write!(out, "{}", report.text()).map_err(output_failed)?;
    }
    match report.difference() {
        None => Ok(Ended::Well),
        Some(difference) => Err(Error::invalid(
            difference,
            "compare the config, the versions and the inputs of both sides",
        )),
    }
}

/// `work` on a thread of its own.
fn on_a_large_stack<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .stack_size(STACK_BYTES)
            .spawn_scoped(scope, work)
            .map_err(Error::io("a thread for the model"))?;
        thread.join().unwrap_or_else(|_| {
            Err(Error::Invalid {
                what: "the computation broke off; its own message stands above".into(),
                hint: None,
            })
        })
    })
}
