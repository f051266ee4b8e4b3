//! The command line: what can be typed, one file per command.

pub mod bench;
pub mod check;
mod convert;
mod evaluate;
mod evaluate_nano;
mod export;
mod generate;
pub mod graph;
mod memory;
mod merge;
mod models;
pub mod pretrain;
mod query;
mod remove;
mod report;
mod run;
mod sample;
mod unread;
pub mod verify;
mod watch;

use std::io::{IsTerminal, Write};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::config::{Changes, Device, Document, Dtype, limits, prompts};
use crate::console::{self, Notes, Output, output_failed};
use crate::files::text;
use crate::nn::Operations;
use crate::store::identity::DEFAULT as DEFAULT_STORE;
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
    /// Make proxies alone, in any number, by one process or several
    Generate(generate::GenerateArgs),
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
    /// Write a checkpoint with an adapter worked into its weights
    Merge(MergeArgs),
    /// Write an adapter in another program's layout: diffusers, kohya and ComfyUI, or peft
    Convert(convert::ConvertArgs),
    /// List the models known by name, with what is here of them, or download one
    Models(ModelsArgs),
    /// Learn every subject whose photos arrive in a folder, with one student, again and again
    Watch(watch::WatchArgs),
    /// Delete a subject, its photos and everything made of them, in all versions
    Remove(remove::RemoveArgs),
    /// Ask the store: SQL over all tables, nearest neighbours
    Query(query::QueryArgs),
    /// Write chosen proxies, samples or photos as images with captions, or as one picture
    Export(export::ExportArgs),
    /// Compare a component with what its reference implementation computed
    Verify(verify::VerifyArgs),
    /// Train the nano checkpoints from drawn scenes
    Pretrain(pretrain::PretrainArgs),
    /// Measure times and memory on this machine
    Bench(bench::BenchArgs),
}

/// Which pipeline, and what to change in it.
#[derive(Debug, Clone, Default, Args)]
pub struct PipelineArgs {
    /// The pipeline file
    pub file: PathBuf,
    /// A subject of your own, in place of the file's: a name, the folder of its photos, its class (such as dog), and if
    /// you like the rare word that stands for it; may be given several times
    #[arg(long = "subject", value_name = "NAME=DIR:CLASS[:TOKEN]")]
    pub subjects: Vec<String>,
    /// All subjects of this folder, in place of the file's: their photos lie in DIR/CLASS/NAME, as watch has it
    #[arg(long = "subjects", value_name = "DIR")]
    pub subjects_dir: Option<PathBuf>,
    /// Set a field, such as student.steps=100; may be given several times
    #[arg(long = "set", value_name = "PATH=VALUE")]
    pub overrides: Vec<String>,
}

impl PipelineArgs {
    /// The file's text, and its meaning with all changes laid over it, after which `more` overrides.
    ///
    /// # Errors
    /// When the file cannot be read.
    fn open(&self, more: Option<String>) -> Result<(String, Document<'static>)> {
        let text = text::read(&self.file, limits::TEXT_BYTES)?;
        let overrides: Vec<String> = self.overrides.iter().cloned().chain(more).collect();
        let changes = Changes {
            subjects: &self.subjects,
            subjects_dir: self.subjects_dir.as_deref(),
            overrides: &overrides,
        };
        let document = Document::with_changes(
            &text,
            &self.file.display().to_string(),
            &changes,
            &crate::models::Registry,
        );
        Ok((text, document))
    }
}

/// Where the Lance tables are.
#[derive(Debug, Clone, Args)]
pub struct StoreArgs {
    /// The store: proxies, tokens, scores and metrics, kept across runs. If not said, the one that the run or the watch
    /// has used before, or else datasets/store
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
}

impl StoreArgs {
    /// The store, for commands that go by no record.
    fn path(&self) -> PathBuf {
        self.store.clone().unwrap_or_else(|| DEFAULT_STORE.into())
    }
}

/// `proxytune run`
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Examples:\n  proxytune run pipelines/nano.toml\n  proxytune run pipelines/nano.toml \
                        --subject rex=photos/rex:dog"
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
    #[command(flatten)]
    pub store: StoreArgs,
    /// Where run directories would be made
    #[arg(long, value_name = "DIR", default_value = "datasets/runs")]
    pub out: PathBuf,
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
    /// Print Mermaid's language, which Markdown viewers draw
    #[arg(long, conflicts_with = "dot")]
    pub mermaid: bool,
}

/// `proxytune sample`
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Example:\n  proxytune sample --model nano-llamagen --adapter datasets/runs/nano/student \
                        --prompt \"a sks dog on the beach\" --count 4 --out beach"
)]
pub struct SampleArgs {
    /// A known model, a checkpoint directory, or a repository of the hub (owner/name)
    #[arg(long, value_name = "NAME|DIR|OWNER/NAME")]
    pub model: String,
    /// An adapter: a folder or file of diffusers, peft, kohya's scripts or ComfyUI
    #[arg(long, value_name = "DIR|FILE")]
    pub adapter: Option<PathBuf>,
    /// What to draw; may be given several times
    #[arg(long = "prompt", value_name = "TEXT", required = true)]
    pub prompts: Vec<String>,
    /// Images per prompt
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = limits::IMAGES_PER_PROMPT.parser())]
    pub count: usize,
    /// Where the randomness comes from
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = seed())]
    pub seed: u64,
    /// Folder for the images: each is written when it is drawn, never over another file, and says how it was drawn
    #[arg(long, value_name = "DIR", default_value = "samples")]
    pub out: PathBuf,
    #[command(flatten)]
    pub compute: ComputeArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// How to sample; what is not given is as the adapter was evaluated with, else the default of the model's family.
#[derive(Debug, Clone, Default, Args)]
pub struct SamplingArgs {
    /// Classifier-free guidance, at least 1, which is none
    #[arg(long, value_name = "X", value_parser = limits::GUIDANCE_SCALE.parser())]
    pub guidance_scale: Option<f64>,
    /// Denoising steps (diffusion models)
    #[arg(long, value_name = "N", value_parser = limits::NUM_INFERENCE_STEPS.parser())]
    pub num_inference_steps: Option<usize>,
    /// What to lead away from (diffusion models)
    #[arg(long, value_name = "TEXT")]
    pub negative_prompt: Option<String>,
    /// Guide only after this share of the steps (SDXL, SD3)
    #[arg(long, value_name = "SHARE", value_parser = limits::SHARE.parser())]
    pub guidance_start: Option<f64>,
    /// Guide only before this share of the steps (SDXL, SD3)
    #[arg(long, value_name = "SHARE", value_parser = limits::SHARE.parser())]
    pub guidance_stop: Option<f64>,
    /// Draw among this many likeliest tokens; 0 is all (autoregressive models)
    #[arg(long, value_name = "N", value_parser = limits::TOP_K.parser())]
    pub top_k: Option<usize>,
    /// Draw among the likeliest tokens of this total probability (autoregressive models)
    #[arg(long, value_name = "P", value_parser = limits::PROBABILITY.parser())]
    pub top_p: Option<f64>,
    /// Divide logits by this; 0 takes the likeliest token (autoregressive models)
    #[arg(long, value_name = "T", value_parser = limits::NOT_NEGATIVE.parser())]
    pub temperature: Option<f64>,
    /// Guidance ends after this many tokens beyond the first (LlamaGen)
    #[arg(long, value_name = "N", value_parser = limits::GUIDANCE_INTERVAL.parser())]
    pub guidance_interval: Option<usize>,
}

/// Where and how to compute.
#[derive(Debug, Clone, Args)]
pub struct ComputeArgs {
    /// cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    pub device: Device,
    /// How frozen weights are kept: auto (as the checkpoint has them), f32, bf16 or f16
    #[arg(long, default_value = "auto")]
    pub dtype: Dtype,
    /// Images drawn together
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = limits::BATCH_SIZE.parser())]
    pub batch_size: usize,
    /// Threads for computing; 0 is all cores
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = limits::THREADS.parser())]
    pub threads: usize,
}

/// What says how images are drawn: images that are there already have no use for it.
const FOR_DRAWING: [&str; 14] = [
    "prompts",
    "images_per_prompt",
    "seed",
    "dtype",
    "batch_size",
    "guidance_scale",
    "num_inference_steps",
    "negative_prompt",
    "guidance_start",
    "guidance_stop",
    "top_k",
    "top_p",
    "temperature",
    "guidance_interval",
];

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
    /// The subject's token; the prompts of images are compared without it
    #[arg(long, value_name = "WORD", default_value = "sks", value_parser = token)]
    pub token: String,
    /// Folder with images to score; without it, the model draws them. CLIP-T compares them with their prompts in
    /// metadata.jsonl (file_name, text) or in a .txt beside each, or else with "a CLASS"
    #[arg(
        long,
        value_name = "DIR",
        required_unless_present_any = ["model", "nano"],
        conflicts_with_all = FOR_DRAWING
    )]
    pub images: Option<PathBuf>,
    /// A known model, a checkpoint directory, or a repository of the hub (owner/name)
    #[arg(long, value_name = "NAME|DIR|OWNER/NAME", conflicts_with = "images")]
    pub model: Option<String>,
    /// An adapter: a folder or file of diffusers, peft, kohya's scripts or ComfyUI
    #[arg(long, value_name = "DIR|FILE", requires = "model")]
    pub adapter: Option<PathBuf>,
    /// What the model draws: dreambooth, nano-10, or a file with one prompt per line
    #[arg(long, value_name = "LIST", default_value = "nano-10")]
    pub prompts: String,
    /// Images per prompt
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = limits::IMAGES_PER_PROMPT.parser())]
    pub images_per_prompt: usize,
    /// Where the randomness comes from
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = seed())]
    pub seed: u64,
    /// CLIP checkpoint: a known name, a directory or a repository; by default nano-clip for images and for what nano
    /// models draw, clip-vit-base-patch32 for other models
    #[arg(long, value_name = "NAME|DIR|OWNER/NAME")]
    pub clip: Option<String>,
    /// DINO checkpoint: a known name, a directory or a repository; by default nano-dino for images and for what nano
    /// models draw, dino-vits16 for other models
    #[arg(long, value_name = "NAME|DIR|OWNER/NAME")]
    pub dino: Option<String>,
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

/// `proxytune merge`
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Example:\n  proxytune merge --model nano-llamagen --adapter datasets/runs/nano/student \
                        --out merged\n  proxytune sample --model merged --prompt \"a sks dog on the beach\""
)]
pub struct MergeArgs {
    /// A known model, a checkpoint directory, or a repository of the hub (owner/name)
    #[arg(long, value_name = "NAME|DIR|OWNER/NAME")]
    pub model: String,
    /// An adapter: a folder or file of diffusers, peft, kohya's scripts or ComfyUI
    #[arg(long, value_name = "DIR|FILE")]
    pub adapter: PathBuf,
    /// Folder for the merged checkpoint; new or empty
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Type of the backbone's weights; without it, as they are
    #[arg(long, value_enum)]
    pub dtype: Option<FloatType>,
}

/// How weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum FloatType {
    F32,
    Bf16,
    F16,
}

impl From<FloatType> for candle_core::DType {
    fn from(float: FloatType) -> Self {
        match float {
            FloatType::F32 => Self::F32,
            FloatType::Bf16 => Self::BF16,
            FloatType::F16 => Self::F16,
        }
    }
}

/// `proxytune models`
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Examples:\n  proxytune models\n  proxytune models llamagen-xl\n  \
                        proxytune models --download llamagen-xl"
)]
pub struct ModelsArgs {
    /// Tell all about this one: a known model, a directory, or a repository of the hub
    #[arg(value_name = "NAME|DIR|OWNER/NAME")]
    pub name: Option<String>,
    /// Download what is missing of this one
    #[arg(long, value_name = "NAME|OWNER/NAME", conflicts_with = "name")]
    pub download: Option<String>,
}

fn not_negative(text: &str) -> std::result::Result<f64, String> {
    limits::NOT_NEGATIVE.parser()(text)
}

fn at_least_one(text: &str) -> std::result::Result<usize, String> {
    limits::ROWS.parser()(text)
}

fn token(text: &str) -> std::result::Result<String, String> {
    prompts::check_token(text).map(|()| text.to_string())
}

fn seed() -> impl Fn(&str) -> std::result::Result<u64, String> + Clone {
    let read = limits::SEED.parser();
    move |text| read(text).map(|seed| seed as u64)
}

/// How a command ended that did what it was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Well,
    /// Something was set aside or warned about.
    WithWarnings,
}

/// The environment variable that has layers in f32 computed by candle's own operations, and what it is then set to.
const OPERATIONS: (&str, &str) = ("PROXYTUNE_OPERATIONS", "candle");

/// # Errors
/// When the variable is set to what nothing answers to: times taken with it would be of something else.
fn operations() -> Result<Operations> {
    let (name, candles) = OPERATIONS;
    match std::env::var_os(name) {
        None => Ok(Operations::Fused),
        Some(value) if value == candles => Ok(Operations::Candle),
        Some(value) => Err(Error::invalid(
            format!("{name} is {}", value.display()),
            format!("set it to {candles}, or unset it for the fused operations"),
        )),
    }
}

/// Carries out what was typed.
///
/// # Errors
/// Those of the command.
pub fn dispatch(cli: Cli) -> Result<Ended> {
    if let Command::Bench(args) = &cli.command {
        args.prepare()?;
    }
    log();
    crate::nn::use_operations(operations()?);
    let (mut out, mut notes) = (Output, Notes);
    let ended = match cli.command {
        Command::Run(args) => run::run(&args, &mut out),
        Command::Generate(args) => generate::generate(&args, &mut out),
        Command::Check(args) => check::check(&args, &mut out, &mut notes),
        Command::Graph(args) => graph::graph(&args, &mut out).map(|()| Ended::Well),
        Command::Sample(args) => sample::sample(&args, &mut out),
        Command::Evaluate(args) if args.nano.nano => {
            evaluate_nano::evaluate_nano(&args.nano, &args.compute, &mut out)
        }
        Command::Evaluate(args) => evaluate::evaluate(&args, &mut out),
        Command::Report(args) => report::report(&args, &mut out),
        Command::Merge(args) => merge::merge(&args, &mut out).map(|()| Ended::Well),
        Command::Convert(args) => convert::convert(&args, &mut out).map(|()| Ended::Well),
        Command::Models(args) => models::models(&args, &mut out).map(|()| Ended::Well),
        Command::Watch(args) => watch::watch(&args, &mut out),
        Command::Remove(args) => remove::remove(&args, &mut out),
        Command::Query(args) => query::query(&args),
        Command::Export(args) => export::export(&args, &mut out),
        Command::Verify(args) => verify::run(&args, &mut out),
        Command::Pretrain(args) => pretrain::pretrain(&args).map(|()| Ended::Well),
        Command::Bench(args) => bench::run(&args).map(|()| Ended::Well),
    }?;
    out.flush().map_err(output_failed)?;
    Ok(ended)
}

/// Tells why the command line was not understood, or the help that it asked for.
///
/// # Errors
/// When the help cannot be written although somebody reads.
pub fn explain(usage: &clap::Error) -> Result<()> {
    let text = usage.to_string();
    if usage.use_stderr() && console::harmless(&text) != text {
        console::note(text.trim_end());
        return Ok(());
    }
    let printed = usage.print().and_then(|()| std::io::stdout().flush());
    match printed {
        Err(e) if !usage.use_stderr() && e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(output_failed(e))
        }
        _ => Ok(()),
    }
}

/// Warnings go to standard error; `RUST_LOG` asks for more.
fn log() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("proxytune=info,warn"));
    let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let colours = std::io::stderr().is_terminal() && !plain;
    // Set already when commands are called from a program that logs itself.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(colours)
        .with_writer(move || -> Box<dyn Write> {
            match colours {
                // It shows what is hostile in a message itself, and its own colours are meant.
                true => Box::new(std::io::stderr()),
                false => Box::new(Notes),
            }
        })
        .log_internal_errors(false)
        // Modules mean something only to those who asked for them.
        .with_target(std::env::var_os("RUST_LOG").is_some())
        .without_time()
        .try_init();
}

/// Does the `work` of a command that streams. What still computes or waits for a lock when it is over, after Ctrl-C or when
/// nobody reads what is printed, is not waited for and ends with the process: taking its tasks away one by one makes those
/// of Lance panic that wait for another.
fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_stack_size(crate::STACK)
        .enable_all()
        .build()
        .map_err(Error::io("threads for the streams"))?;
    let result = runtime.block_on(work);
    std::mem::forget(runtime);
    result
}
