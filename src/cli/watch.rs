//! `proxytune watch`: a folder that personalises continuously.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::{Ended, StoreArgs, block_on, not_negative, output_failed};
use crate::Result;
use crate::config::limits;
use crate::stream::Stop;
use crate::watch::{self, Options, status};

/// `proxytune watch`
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Photos go into DIR/CLASS/SUBJECT, such as photos/dog/rex. The adapter to use is always in \
                  DIR/.proxytune/published.\n\nExamples:\n  proxytune watch photos\n  proxytune watch --status photos\n  \
                  proxytune watch photos --once"
)]
pub struct WatchArgs {
    /// The folder to watch
    pub dir: PathBuf,
    /// Show subjects, scores and what waits, and end; works from another terminal while a watch runs
    #[arg(long)]
    pub status: bool,
    /// How subjects are learnt; its own subjects and its baseline do not count
    #[arg(long, value_name = "FILE", default_value = "pipelines/nano.toml")]
    pub pipeline: PathBuf,
    /// Set a field, such as student.steps=100; may be given several times
    #[arg(long = "set", value_name = "PATH=VALUE")]
    pub overrides: Vec<String>,
    #[command(flatten)]
    pub store: StoreArgs,
    /// Look so often instead of waiting for file events, which network drives do not give
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub poll: Option<Duration>,
    /// Learn what is there now, then end
    #[arg(long)]
    pub once: bool,
    /// Proxies of every other subject that each run replays, so that they are not forgotten
    #[arg(long, value_name = "N", default_value_t = 25, value_parser = limits::PROXIES.parser())]
    pub replay: usize,
    /// Do not publish an adapter with which any subject loses more DINO than this
    #[arg(long, value_name = "X", default_value_t = 0.1, value_parser = not_negative)]
    pub margin: f64,
    /// A folder counts when it has not changed for so long
    #[arg(long, value_name = "SECONDS", default_value = "3", value_parser = seconds)]
    pub settle: Duration,
}

fn seconds(text: &str) -> std::result::Result<Duration, String> {
    let number = limits::SECONDS.parser()(text)?;
    Duration::try_from_secs_f64(number).map_err(|error| error.to_string())
}

pub(super) fn watch(args: &WatchArgs, out: &mut impl Write) -> Result<Ended> {
    let show = |out: &mut dyn Write| -> Result<()> {
        let text = block_on(status::status(&args.dir))?;
        write!(out, "{text}").map_err(output_failed)
    };
    if args.status {
        show(out)?;
        return Ok(Ended::Well);
    }
    let options = Options {
        dir: args.dir.clone(),
        pipeline: args.pipeline.clone(),
        overrides: args.overrides.clone(),
        store: args.store.store.clone(),
        poll: args.poll.map(|poll| poll.max(Duration::from_millis(10))),
        once: args.once,
        replay: args.replay,
        margin: args.margin,
        settle: args.settle,
        progress: true,
    };
    let state = block_on(async {
        let stop = Stop::default();
        stop.on_signals();
        watch::watch(&options, stop).await
    })?;
    show(out)?;
    let mut subjects = state.subjects.iter();
    match state.set_aside.is_empty() && !subjects.any(|subject| subject.is_held()) {
        true => Ok(Ended::Well),
        false => Ok(Ended::WithWarnings),
    }
}
