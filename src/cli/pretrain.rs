//! `proxytune pretrain`: trains the nano checkpoints from drawn scenes.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::config::Device;
use crate::console;
use crate::nano::pretrain::{Budget, Context, Curves, Model, Settings};
use crate::pipeline::device;
use crate::{Error, Result};

/// Layers recurse when gradients are computed: deep graphs want a deep stack.
const STACK: usize = 256 << 20;

/// `proxytune pretrain`
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Examples:\n  proxytune pretrain pipelines/nano-pretrain.toml\n  \
                        proxytune pretrain pipelines/nano-pretrain.toml --only gpt,sd3 --minutes 30"
)]
pub struct PretrainArgs {
    /// The settings
    pub file: PathBuf,
    /// Only these models, in their own order
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub only: Vec<Model>,
    /// Train each model for so many minutes
    #[arg(long, value_name = "N", conflicts_with = "images")]
    pub minutes: Option<f64>,
    /// Train each model on so many images
    #[arg(long, value_name = "N")]
    pub images: Option<usize>,
    /// cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    pub device: Device,
    /// Where the checkpoints are and go; by default what the settings say
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    #[command(flatten)]
    pub store: super::StoreArgs,
    /// Threads for computing; 0 is all cores, or what RAYON_NUM_THREADS says
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub threads: usize,
}

impl ValueEnum for Model {
    fn value_variants<'a>() -> &'a [Self] {
        &Model::ALL
    }

    fn to_possible_value(&self) -> Option<clap::builder::PossibleValue> {
        Some(clap::builder::PossibleValue::new(self.name()))
    }
}

/// Trains what was asked for.
///
/// # Errors
/// When the settings have a fault, a model lacks what it stands on, or a file cannot be read or written.
pub fn pretrain(args: &PretrainArgs) -> Result<()> {
    let settings = Settings::read(&args.file)?;
    let threads = match args.threads {
        0 => rayon::current_num_threads(),
        threads => threads,
    };
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .stack_size(STACK)
        .build()
        .map_err(|e| Error::invalid(format!("--threads {threads}: {e}"), "give fewer"))?;
    let budget = match (args.minutes, args.images) {
        (Some(minutes), _) => Some(Budget::Minutes(minutes)),
        (_, Some(images)) => Some(Budget::Images(images)),
        _ => None,
    };
    let models = chosen(&args.only);
    let store = args.store.path();
    let curves = Curves::open(&store)?;
    let shown = console::shown(&store);
    console::print(format!("curves: run {} in {shown}", curves.run()))?;
    let context = Context {
        out: args.out.clone().unwrap_or_else(|| settings.out.clone()),
        machine: format!("{}, {threads} threads, {}", processor(), args.device),
        settings,
        device: device(args.device)?,
        named_device: args.device,
        budget,
        curves: Some(curves),
    };
    // On a thread of the pool, so that an operation begins where it is asked for instead of waking another thread.
    pool.install(move || {
        models
            .into_iter()
            .try_for_each(|model| model.train(&context))
    })
}

/// Those of `only` in the order of their needs; all if it is empty.
pub(super) fn chosen(only: &[Model]) -> Vec<Model> {
    Model::ALL
        .into_iter()
        .filter(|model| only.is_empty() || only.contains(model))
        .collect()
}

/// The processor's name as Linux tells it.
fn processor() -> String {
    std::fs::read_to_string("/proc/cpuinfo")
        .ok()
        .and_then(|text| {
            let line = text.lines().find(|line| line.starts_with("model name"))?;
            Some(line.split_once(':')?.1.trim().to_string())
        })
        .unwrap_or_else(|| std::env::consts::ARCH.to_string())
}
