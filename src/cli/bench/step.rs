//! `proxytune bench step`: LoRA steps of a LlamaGen at full size with random weights, beside the same steps of
//! LlamaGen's own source with peft where a Python with torch is given.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Tensor, Var};
use clap::{Args, ValueEnum};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::instructions::Instructions;
use super::torch::{Torch, median, threads};
use crate::cli::memory::{gibibytes, peak_memory};
use crate::config::{Device, Dtype};
use crate::console;
use crate::models::llamagen::gpt::{Config, Gpt};
use crate::nn::{Adapter, Init, LoraConfig, Weights, ops, recomputing};
use crate::pipeline::{device, use_threads};
use crate::training::TrainingLoop;
use crate::training::optimizer::OptimizerConfig;
use crate::{Error, Result};

/// `proxytune bench step`
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Example:\n  proxytune bench step --model llamagen-xl --memory fit --dtype bf16\n  \
                        proxytune bench step --model llamagen-xl --memory fast --torch python3 --source LlamaGen"
)]
pub struct StepArgs {
    /// Which size
    #[arg(long, default_value = "llamagen-xl")]
    pub model: Model,
    /// fit: blocks run again in the backward pass; fast: their activations are kept
    #[arg(long, default_value = "fit")]
    pub memory: Kept,
    /// How the frozen weights are kept: f32, bf16 or f16
    #[arg(long, default_value = "f32")]
    pub dtype: Dtype,
    /// Side of the images in pixels, a multiple of 16
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub size: usize,
    /// Examples of a step
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = super::super::at_least_one)]
    pub batch_size: usize,
    /// Steps that are timed, after one that is not
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = super::super::at_least_one)]
    pub steps: usize,
    /// cpu, cuda or cuda:N, on both sides
    #[arg(long, default_value = "cpu")]
    pub device: Device,
    /// Threads, on both sides; 0 is all cores
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub threads: usize,
    /// A Python with torch and peft: its steps alternate with ours
    #[arg(long, value_name = "PYTHON", requires = "source")]
    pub torch: Option<PathBuf>,
    /// The program that makes torch's side
    #[arg(
        long,
        value_name = "FILE",
        default_value = "tests/golden/step_torch.py"
    )]
    pub program: PathBuf,
    /// LlamaGen's source (github.com/FoundationVision/LlamaGen), for torch's side
    #[arg(long, value_name = "DIR")]
    pub source: Option<PathBuf>,
}

/// LlamaGen's text-to-image models by size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Model {
    /// 111 million weights
    LlamagenB,
    /// 343 million
    LlamagenL,
    /// 775 million
    LlamagenXl,
    /// 1.4 billion
    LlamagenXxl,
}

/// What a step keeps of its forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kept {
    Fit,
    Fast,
}

impl Model {
    /// Layers, heads and width, as the reference's `GPT_B` and so on have them.
    fn sizes(self) -> [usize; 3] {
        match self {
            Model::LlamagenB => [12, 12, 768],
            Model::LlamagenL => [24, 16, 1024],
            Model::LlamagenXl => [36, 20, 1280],
            Model::LlamagenXxl => [48, 24, 1536],
        }
    }
}

/// Measures and prints.
///
/// # Errors
/// When the size is none that LlamaGen has, or torch's side cannot be run.
pub(super) fn run(args: &StepArgs, instructions: Instructions) -> Result<()> {
    if args.size == 0 || !args.size.is_multiple_of(16) {
        return Err(Error::invalid(
            format!("images of {} pixels", args.size),
            "LlamaGen's tokens stand for 16 × 16 pixels: use a multiple of 16, such as 256",
        ));
    }
    let threads = threads(args.threads);
    use_threads(threads);
    let mut bench = Bench::new(args)?;
    let mut torch = match (&args.torch, &args.source) {
        (Some(python), Some(source)) => {
            let variables = instructions.variables();
            Some(start(args, (python, source), threads, variables)?)
        }
        _ => None,
    };
    bench.step()?;
    if let Some(torch) = &mut torch {
        torch.ask("step")?;
    }
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..args.steps {
        let start = Instant::now();
        bench.step()?;
        ours.push(start.elapsed().as_secs_f64());
        if let Some(torch) = &mut torch {
            theirs.push(torch.ask("step")?);
        }
    }
    console::print(format!(
        "{}, {} threads, medians of {} steps, batch of {}, {} px",
        args.device, threads, args.steps, args.batch_size, args.size
    ))?;
    // What a process holds says nothing about a card's memory.
    let here = args.device == Device::Cpu;
    let memory = |bytes: u64| match here {
        true => format!("{:>6.2} GiB", gibibytes(bytes)),
        false => String::new(),
    };
    let peak = peak_memory();
    console::print(format!("ours   {:>9.3} s  {}", median(&ours), memory(peak)))?;
    if let Some(torch) = &mut torch {
        let theirs_peak = torch.ask("peak")? as u64;
        let each: Vec<f64> = ours.iter().zip(&theirs).map(|(a, b)| a / b).collect();
        let ratio = match here {
            true => format!("{:>6.2}", peak as f64 / theirs_peak as f64),
            false => String::new(),
        };
        console::print(format!(
            "torch  {:>9.3} s  {}",
            median(&theirs),
            memory(theirs_peak)
        ))?;
        console::print(format!("ratio  {:>9.2}    {ratio}", median(&each)))?;
    }
    Ok(())
}

/// A model with its adapter, optimizer and one batch of random examples.
struct Bench {
    gpt: Gpt,
    training: TrainingLoop,
    learning_rate: f64,
    captions: Tensor,
    mask: Tensor,
    tokens: Tensor,
    generator: ChaCha8Rng,
    recomputes: bool,
}

impl Bench {
    fn new(args: &StepArgs) -> Result<Self> {
        let [n_layer, n_head, dim] = args.model.sizes();
        let side = args.size / 16;
        let config = Config {
            dim,
            n_layer,
            n_head,
            block_size: side * side,
            ..Config::default()
        };
        let settings = crate::models::llamagen::FAMILY.training();
        let lora = LoraConfig {
            rank: settings.rank,
            alpha: settings.alpha,
            targets: settings.targets.clone(),
        };
        let device = device(args.device)?;
        let adapter = Arc::new(Adapter::new(lora, 0));
        let weights = Weights::drawn(0, args.dtype, &device).with_adapter(adapter.clone());
        let gpt = Gpt::new(&config, &weights)?;
        let b = args.batch_size;
        let shape = (b, config.cls_token_num, config.caption_dim);
        let captions = weights.buffer(shape, "bench.captions", Init::Normal(1.0))?;
        let mut generator = ChaCha8Rng::seed_from_u64(0);
        let tokens: Vec<u32> = (0..b * config.block_size)
            .map(|_| generator.random_range(0..config.vocab_size as u32))
            .collect();
        let variables: Vec<(String, Var)> = adapter.variables();
        let optimizer = OptimizerConfig::new(&settings);
        let training = TrainingLoop::new(variables, &optimizer, Some(settings.max_grad_norm))?;
        Ok(Self {
            gpt,
            training,
            learning_rate: settings.learning_rate,
            captions,
            mask: Tensor::ones((b, config.cls_token_num), DType::U8, &device)?,
            tokens: Tensor::from_vec(tokens, (b, config.block_size), &device)?,
            generator,
            recomputes: args.memory == Kept::Fit,
        })
    }

    fn step(&mut self) -> Result<()> {
        let (b, n) = self.tokens.dims2()?;
        let given = self.tokens.narrow(1, 0, n - 1)?.contiguous()?;
        let Self {
            gpt,
            training,
            captions,
            mask,
            tokens,
            generator,
            recomputes,
            ..
        } = self;
        training.step(0, self.learning_rate, 1, |_| {
            let logits = recomputing(*recomputes, || {
                gpt.forward(captions, mask, &given, Some(generator))
            })?;
            let logits = logits.reshape((b * n, logits.dim(2)?))?;
            Ok(ops::cross_entropy(&logits, &tokens.flatten_all()?)?.mean_all()?)
        })?;
        // A card may still be at work on what it was asked for.
        self.tokens.device().synchronize()?;
        Ok(())
    }
}

/// Torch's side, which takes a step for each line `step` and tells its `peak` memory in bytes.
fn start(
    args: &StepArgs,
    (python, source): (&Path, &Path),
    threads: usize,
    variables: &[(&str, &str)],
) -> Result<Torch> {
    let [layers, heads, dim] = args.model.sizes();
    let memory = match args.memory {
        Kept::Fit => "fit",
        Kept::Fast => "fast",
    };
    let dtype = match args.dtype {
        Dtype::Auto | Dtype::F32 => "float32",
        Dtype::Bf16 => "bfloat16",
        Dtype::F16 => "float16",
    };
    let settings = [
        ("--source", source.as_os_str().to_owned()),
        ("--memory", memory.into()),
        ("--dtype", dtype.into()),
        ("--sizes", format!("{layers},{heads},{dim}").into()),
        ("--size", args.size.to_string().into()),
        ("--batch-size", args.batch_size.to_string().into()),
        ("--threads", threads.to_string().into()),
        ("--device", args.device.to_string().into()),
    ];
    let settings = settings
        .into_iter()
        .flat_map(|(name, value)| [name.into(), value]);
    Torch::start(python, &args.program, settings, variables)
}
