//! The command line: what can be typed, one file per command.

pub mod check;
mod evaluate;
mod evaluate_nano;
pub mod graph;
pub mod pretrain;
mod report;
mod run;
mod sample;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::config::{Device, Document};
use crate::{Error, Result};

/// Proxy-Tuning: photos of a subject go in, an autoregressive image model that draws it comes out.
#[derive(Debug, Parser)]
#[command(
    name = "proxytune",
    version,
    about,
    after_help = "Example:\n  proxytune run pipelines/nano.toml"
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a pipeline, or continue it where it was stopped
    Run(RunArgs),
    /// Print the full pipeline with every default filled in, or every fault in it
    Check(CheckArgs),
    /// Print the stages of a pipeline and the channels between them
    Graph(GraphArgs),
    /// Draw images with a model and, if given, an adapter
    Sample(SampleArgs),
    /// Score images, or a model with an adapter, against reference photos
    Evaluate(Box<EvaluateArgs>),
    /// Write the report of a run again from the store
    Report(ReportArgs),
    /// Train the nano checkpoints from drawn scenes
    Pretrain(pretrain::PretrainArgs),
}

/// Which pipeline, and what to change in it.
#[derive(Debug, Clone, Args)]
pub struct PipelineArgs {
    /// The pipeline file
    pub file: PathBuf,
    /// Set a field, such as student.steps=100; may be given several times
    #[arg(long = "set", value_name = "PATH=VALUE")]
    pub overrides: Vec<String>,
}

impl PipelineArgs {
    /// The file with the overrides laid over it.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn open(&self) -> Result<Document> {
        Document::open(&self.file, &self.overrides)
    }
}

/// Where the Lance tables are.
#[derive(Debug, Clone, Args)]
pub struct StoreArgs {
    /// The store: proxies, tokens, scores and metrics, kept across runs
    #[arg(long, value_name = "DIR", default_value = "datasets/store")]
    pub store: PathBuf,
}

/// `proxytune run`
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Examples:\n  proxytune run pipelines/nano.toml\n  proxytune run pipelines/nano.toml \
                        --set subject.dog1.images=photos/rex --set subject.dog1.class=dog"
)]
pub struct RunArgs {
    #[command(flatten)]
    pub pipeline: PipelineArgs,
    #[command(flatten)]
    pub store: StoreArgs,
    /// Where run directories are made
    #[arg(long, value_name = "DIR", default_value = "datasets/runs")]
    pub out: PathBuf,
    /// Start afresh instead of continuing the last run of this file
    #[arg(long)]
    pub new: bool,
    /// One stage after another, instead of all at once; the result is the same
    #[arg(long)]
    pub sequential: bool,
}

/// `proxytune check`
#[derive(Debug, Clone, Args)]
#[command(after_help = "Example:\n  proxytune check pipelines/nano.toml --set student.steps=100")]
pub struct CheckArgs {
    #[command(flatten)]
    pub pipeline: PipelineArgs,
}

/// `proxytune graph`
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:\n  proxytune graph pipelines/nano.toml\n  \
                        proxytune graph pipelines/nano.toml --dot | dot -Tsvg > graph.svg")]
pub struct GraphArgs {
    #[command(flatten)]
    pub pipeline: PipelineArgs,
    /// Print Graphviz's language
    #[arg(long)]
    pub dot: bool,
}

/// `proxytune sample`
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Example:\n  proxytune sample --model nano-llamagen --adapter datasets/runs/nano/student \
                        --prompt \"a sks dog on the beach\" --count 4 --out beach"
)]
pub struct SampleArgs {
    /// A known model or a checkpoint directory
    #[arg(long, value_name = "NAME|DIR")]
    pub model: String,
    /// An adapter directory: PEFT's layout for students, diffusers' for supervisors
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// What to draw; may be given several times
    #[arg(long = "prompt", value_name = "TEXT", required = true)]
    pub prompts: Vec<String>,
    /// Images per prompt
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    pub count: usize,
    /// Where the randomness comes from
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Folder for the images, one PNG each
    #[arg(long, value_name = "DIR", default_value = "samples")]
    pub out: PathBuf,
    #[command(flatten)]
    pub compute: ComputeArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// How to sample; what is not given has the default of the model's family.
#[derive(Debug, Clone, Default, Args)]
pub struct SamplingArgs {
    /// Classifier-free guidance; 1 is none
    #[arg(long, value_name = "X")]
    pub guidance_scale: Option<f64>,
    /// Denoising steps (diffusion models)
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub num_inference_steps: Option<usize>,
    /// What to lead away from (diffusion models)
    #[arg(long, value_name = "TEXT")]
    pub negative_prompt: Option<String>,
    /// Draw among this many likeliest tokens; 0 is all (autoregressive models)
    #[arg(long, value_name = "N")]
    pub top_k: Option<usize>,
    /// Draw among the likeliest tokens of this total probability (autoregressive models)
    #[arg(long, value_name = "P")]
    pub top_p: Option<f64>,
    /// Divide logits by this; 0 takes the likeliest token (autoregressive models)
    #[arg(long, value_name = "T")]
    pub temperature: Option<f64>,
}

/// Where and how to compute.
#[derive(Debug, Clone, Args)]
pub struct ComputeArgs {
    /// cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    pub device: Device,
    /// Images drawn together
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = at_least_one)]
    pub batch_size: usize,
    /// Threads for computing; 0 is all cores
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub threads: usize,
}

/// `proxytune evaluate`
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Examples:\n  proxytune evaluate --references photos/rex --class dog --images beach\n  \
                        proxytune evaluate --references photos/rex --class dog --model nano-llamagen \
                        --adapter datasets/runs/nano/student --prompts nano-10\n  \
                        proxytune evaluate --nano --only clip,vq"
)]
pub struct EvaluateArgs {
    /// Folder with the subject's photos
    #[arg(long, value_name = "DIR", required_unless_present = "nano")]
    pub references: Option<PathBuf>,
    /// What kind of thing the subject is
    #[arg(long, value_name = "WORD", required_unless_present = "nano")]
    pub class: Option<String>,
    /// The subject's token
    #[arg(long, value_name = "WORD", default_value = "sks")]
    pub token: String,
    /// Folder with images to score; without it, the model draws them
    #[arg(long, value_name = "DIR", required_unless_present_any = ["model", "nano"])]
    pub images: Option<PathBuf>,
    /// A known model or a checkpoint directory
    #[arg(long, value_name = "NAME|DIR", conflicts_with = "images")]
    pub model: Option<String>,
    /// An adapter directory
    #[arg(long, value_name = "DIR", requires = "model")]
    pub adapter: Option<PathBuf>,
    /// dreambooth, nano-10, or a file with one prompt per line
    #[arg(long, value_name = "LIST", default_value = "nano-10")]
    pub prompts: String,
    /// Images per prompt
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    pub images_per_prompt: usize,
    /// Where the randomness comes from
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// CLIP checkpoint: a known name or a directory
    #[arg(long, value_name = "NAME|DIR", default_value = "nano-clip")]
    pub clip: String,
    /// DINO checkpoint: a known name or a directory
    #[arg(long, value_name = "NAME|DIR", default_value = "nano-dino")]
    pub dino: String,
    #[command(flatten)]
    pub nano: evaluate_nano::NanoArgs,
    #[command(flatten)]
    pub compute: ComputeArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// `proxytune report`
#[derive(Debug, Clone, Args)]
#[command(after_help = "Example:\n  proxytune report datasets/runs/nano")]
pub struct ReportArgs {
    /// The run's directory
    pub run: PathBuf,
    #[command(flatten)]
    pub store: StoreArgs,
}

fn at_least_one(text: &str) -> std::result::Result<usize, String> {
    match text.parse() {
        Ok(number) if number >= 1 => Ok(number),
        _ => Err("a whole number of at least 1 is needed".to_string()),
    }
}

/// What a write to standard output may fail with.
fn output_failed(source: std::io::Error) -> Error {
    Error::Io {
        path: "standard output".into(),
        source,
    }
}

/// How a command ended that did what it was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Well,
    /// Something was set aside or warned about.
    WithWarnings,
}

/// Carries out what was typed.
///
/// # Errors
/// Those of the command.
pub fn dispatch(cli: Cli) -> Result<Ended> {
    log();
    let (mut out, mut notes) = (std::io::stdout(), std::io::stderr());
    match cli.command {
        Command::Run(args) => run::run(&args),
        Command::Check(args) => check::check(&args, &mut out, &mut notes).map(|()| Ended::Well),
        Command::Graph(args) => graph::graph(&args, &mut out).map(|()| Ended::Well),
        Command::Sample(args) => sample::sample(&args, &mut out),
        Command::Evaluate(args) if args.nano.nano => {
            evaluate_nano::evaluate_nano(&args.nano, &args.compute, &mut out)
        }
        Command::Evaluate(args) => evaluate::evaluate(&args, &mut out),
        Command::Report(args) => report::report(&args, &mut out),
        Command::Pretrain(args) => pretrain::pretrain(&args).map(|()| Ended::Well),
    }
}

/// Warnings go to standard error; `RUST_LOG` asks for more.
fn log() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("proxytune=info,warn"));
    // Set already when commands are called from a program that logs itself.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .without_time()
        .try_init();
}

/// A runtime for commands that stream.
fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(Error::io("threads for the streams"))
}
