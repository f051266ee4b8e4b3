//! `proxytune generate`: proxies alone, by one process or by several.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;

use super::{
    Ended, PipelineArgs, StoreArgs, block_on, not_negative, output_failed, run::stage_table,
};
use crate::config::limits;
use crate::console;
use crate::pipeline::{Generated, Generation, Options, generate as make};
use crate::stages::generate::Shard;
use crate::stream::Stop;
use crate::{Result, files};

/// `proxytune generate`
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Examples:\n  proxytune generate pipelines/nano.toml --count 1000\n  \
                  proxytune generate pipelines/nano.toml --count 20000 --shard 1/2 --set threads=1 &\n  \
                  proxytune generate pipelines/nano.toml --count 20000 --shard 2/2 --set threads=1\n\n\
                  A run of the same file with the same number of proxies finds them all and makes none."
)]
pub struct GenerateArgs {
    #[command(flatten)]
    pub pipeline: PipelineArgs,
    #[command(flatten)]
    pub store: StoreArgs,
    /// Proxies per subject; the same as --set proxies.count=N
    #[arg(long, value_name = "N", value_parser = limits::PROXIES.parser())]
    pub count: Option<usize>,
    /// Be the I-th of N processes, on one machine or several, that fill one store
    #[arg(long, value_name = "I/N", default_value = "1/1")]
    pub shard: Shard,
    /// Make tokens of the proxies too, for the student of the pipeline
    #[arg(long)]
    pub tokens: bool,
    /// Stop, cleanly, before less than this is free on the disk of the store, in GiB
    #[arg(long, value_name = "GIB", default_value_t = 1.0, value_parser = not_negative)]
    pub keep_free: f64,
    /// Where the directory of this process is made
    #[arg(long, value_name = "DIR", default_value = "datasets/runs")]
    pub out: PathBuf,
}

pub(super) fn generate(args: &GenerateArgs, out: &mut impl Write) -> Result<Ended> {
    let count = args.count.map(|count| format!("proxies.count={count}"));
    let (text, document) = args.pipeline.open(count)?;
    let generation = Generation {
        options: Options {
            pipeline: args.pipeline.file.clone(),
            resolved: document.for_proxies(args.tokens).resolve()?,
            text,
            store: args.store.store.clone(),
            out: args.out.clone(),
            new: false,
            sequential: false,
            progress: true,
        },
        shard: args.shard,
        tokens: args.tokens,
        keep_free: (args.keep_free * (1_u64 << 30) as f64) as u64,
        free_space: files::free_space,
    };
    let generated = block_on(async {
        let stop = Stop::default();
        stop.on_signals();
        make(&generation, stop).await
    })?;
    write!(out, "{}", describe(&generated)).map_err(output_failed)?;
    for warning in &generated.warnings {
        console::note(format!("warning: {warning}"));
    }
    match generated.warnings.is_empty() {
        true => Ok(Ended::Well),
        false => Ok(Ended::WithWarnings),
    }
}

fn describe(generated: &Generated) -> String {
    let Generated {
        planned,
        found,
        made,
        wall_seconds,
        ..
    } = generated;
    let others = planned - found - made.min(&(planned - found));
    let mut text = stage_table(&generated.stages);
    text +=
        &format!("\nall {planned} proxies are in the store: {found} were there, {made} made here");
    if others > 0 {
        text += &format!(", {others} by other processes");
    }
    text += &format!(
        "\nwall time {wall_seconds:.1} s, the store's share of it {:.1} %\n",
        100.0 * generated.store_share()
    );
    text
}
