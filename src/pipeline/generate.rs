//! Proxies alone: the front of the graph, by one process or shared between several.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;

use super::context::Context;
use super::graph::{Graph, GraphOptions, Shared};
use super::prepare::{self, Purpose};
use super::topology::{Stage, Topology};
use super::{Options, RunDir, failed};
use crate::console;
use crate::plan::Digest;
use crate::stages::disk::{Disk, FreeSpace, bytes};
use crate::stages::generate::{AllWork, Shard, Work};
use crate::stages::keep::CommitPolicy;
use crate::stages::{ProxyKeys, Warning};
use crate::store::{Claim, Limits, RunStatus};
use crate::stream::{Meter, Progress, StageReport, Stop};
use crate::{Error, Result};

/// Nobody waits for single batches, so that these may wait for each other; what a kill loses is as little.
const LIMITS: Limits = Limits {
    rows: 64,
    age: Duration::from_secs(2),
};
/// A process that was killed may hold its lock for a moment more.
const PATIENCE: Duration = Duration::from_secs(3);

/// Which proxies to make, and how.
#[derive(Debug, Clone)]
pub struct Generation {
    /// The pipeline; what is said in it of students counts only with `tokens`.
    pub options: Options,
    pub shard: Shard,
    /// Make tokens of the proxies for the student of the pipeline.
    pub tokens: bool,
    /// Bytes of the store's disk that stay free.
    pub keep_free: u64,
    /// How the room on a disk is asked for.
    pub free_space: FreeSpace,
}

/// What was made.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Generated {
    /// The run's directory.
    pub dir: PathBuf,
    /// Proxies that the plan has.
    pub planned: usize,
    /// Those that were there before.
    pub found: usize,
    /// Those that this process made.
    pub made: usize,
    pub stages: Vec<StageReport>,
    pub wall_seconds: f64,
    pub warnings: Vec<Warning>,
}

impl Generated {
    /// The share of the wall time for which the store was busy.
    pub fn store_share(&self) -> f64 {
        let writes = |stage: &&StageReport| stage.stage == Stage::Keep.name();
        let busy: f64 = self.stages.iter().filter(writes).map(|s| s.busy).sum();
        busy / self.wall_seconds.max(f64::MIN_POSITIVE)
    }
}

/// Makes every proxy of the plan that the store does not have, together with all other processes that do the same, and
/// returns when all are there.
///
/// # Errors
/// [`Error::Interrupted`] when `stop` was requested: everything made is committed and the same call continues. A disk
/// that is too full, a shard that runs already, or the first failure of any stage.
pub fn generate<'a>(generation: &'a Generation, stop: Stop) -> BoxFuture<'a, Result<Generated>> {
    Box::pin(async move {
        let start = Instant::now();
        let options = &generation.options;
        if options.resolved.teacher().is_none() {
            return Err(no_proxies(options));
        }
        let purpose = Purpose::Proxies {
            tokens: generation.tokens,
        };
        let ready = prepare::ready(options, purpose, false).await?;
        let shard = generation.shard;
        let stem = options.pipeline.file_stem().unwrap_or_default();
        let mut name = format!("{}-proxies", stem.to_string_lossy());
        if shard.of > 1 {
            name += &format!("-{}-of-{}", shard.index + 1, shard.of);
        }
        let dir = RunDir::open(
            &options.out,
            Path::new(&format!("{name}.toml")),
            &options.text,
            &options.resolved.to_toml()?,
            false,
        )?;
        let prepared = prepare::prepare(options, purpose, &dir, ready, None, stop).await?;
        let context = prepared.context.clone();
        if generation.tokens && context.tokenizer.is_none() {
            return Err(Error::invalid(
                format!(
                    "{} reads images, not tokens",
                    options.resolved.student.model
                ),
                "leave --tokens out, or name an autoregressive model as student",
            ));
        }
        let keys = context
            .proxy_keys
            .clone()
            .ok_or_else(|| no_proxies(options))?;
        let shards = shard_claims(&keys, context.subjects.len(), shard);
        let _at_work = come_to_work(&context, shard, &shards[shard.index]).await?;
        let fleet = context.board.meter(
            if shard.of > 1 {
                "all shards"
            } else {
                "in the store"
            },
            "proxies",
        );
        let planned = context.plan.proxies().len();
        fleet.expect(planned);
        let all = AllWork {
            subjects: context.subjects.len(),
            keys: keys.clone(),
            store: context.store.clone(),
            tokens: context.tokenizer.clone(),
            shards,
            fleet: fleet.clone(),
        };
        let work = Work::open(all, shard).await?;
        let found = work.found();
        let disk = look_for_room(generation, &context, planned - found, &fleet)?;
        prepare::note_status(&context, options, RunStatus::Started).await?;
        let progress = options
            .progress
            .then(|| Progress::show(context.board.clone()));
        let topology = Topology::of_proxies(&options.resolved, context.tokenizer.is_some());
        let how = GraphOptions {
            sequential: false,
            commit: CommitPolicy {
                limits: LIMITS,
                disk: Some(disk),
            },
            shared: Some(Shared {
                subjects: taken_up(&context, shard, &work),
                work,
            }),
        };
        let graph = Graph::build(&topology, context.clone(), prepared.models, how);
        let result = graph.join(&context, true).await;
        if let Some(progress) = progress {
            progress.finish();
        }
        let flushed = context.metrics.flush().await;
        if let Err(error) = result {
            return Err(failed(&context, options, error, flushed).await);
        }
        flushed?;
        if context.stop.requested() {
            prepare::note_status(&context, options, RunStatus::Interrupted).await?;
            return Err(Error::Interrupted);
        }
        all_there(&context, &keys).await?;
        fleet.add(planned.saturating_sub(fleet.progress().0 as usize));
        prepare::note_status(&context, options, RunStatus::Complete).await?;
        let stages = context.board.report();
        let made = stages
            .iter()
            .find(|stage| stage.stage == Stage::Synthesize.name());
        let generated = Generated {
            dir: dir.path().to_path_buf(),
            planned,
            found,
            made: made.map_or(0, |stage| (stage.done - stage.reused) as usize),
            wall_seconds: start.elapsed().as_secs_f64(),
            warnings: context.warnings.all(),
            stages,
        };
        let text = serde_json::to_string_pretty(&generated).map_err(|e| Error::Invalid {
            what: format!("the summary as JSON: {e}"),
            hint: None,
        })?;
        crate::files::write(&dir.join("proxies.json"), text.as_bytes())?;
        Ok(generated)
    })
}

fn no_proxies(options: &Options) -> Error {
    Error::invalid(
        format!("{} makes no proxies", options.pipeline.display()),
        "it needs a [supervisor], and with --tokens a student that learns from proxies",
    )
}

/// The claims of all processes at this work, which is named after everything that it comes to.
fn shard_claims(keys: &ProxyKeys, subjects: usize, shard: Shard) -> Vec<String> {
    let mut digest = Digest::new("shards 1");
    for batch in 0..keys.plan.batches().min(subjects) {
        for key in keys.known(batch).newest() {
            digest = digest.field("proxy", key);
        }
    }
    let digest = digest
        .number("count", keys.plan.proxies().len() as u64)
        .finish();
    let name = |index| format!("shards/{}/{}-of-{}", &digest[..12], index + 1, shard.of);
    (0..shard.of).map(name).collect()
}

/// Claims the shard's own name, so that others see it at work.
async fn come_to_work(context: &Context, shard: Shard, name: &str) -> Result<Claim> {
    let locks = context.store.locks();
    match tokio::time::timeout(PATIENCE, locks.claim(name)).await {
        Ok(claim) => {
            let claim = claim?;
            claim.note(&format!("{}, process {}", host(), std::process::id()))?;
            Ok(claim)
        }
        Err(_) => Err(Error::invalid(
            format!(
                "shard {shard} of this work is running already, on {}",
                locks.noted(name)
            ),
            "give every process a --shard of its own",
        )),
    }
}

/// This machine's name.
fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname");
    name.map_or("this machine".to_string(), |name| name.trim().to_string())
}

/// Says how much room is needed, and refuses to begin without any.
fn look_for_room(
    generation: &Generation,
    context: &Context,
    left: usize,
    fleet: &Meter,
) -> Result<Disk> {
    let disk = Disk::new(
        context.store.path(),
        generation.keep_free,
        generation.free_space,
        fleet.clone(),
    );
    if left == 0 {
        return Ok(disk);
    }
    let usable = disk.usable()?;
    let resolution = context
        .resolved
        .supervisor
        .as_ref()
        .and_then(|s| s.resolution);
    if let Some(side) = resolution {
        let needed = Disk::estimate(left as u64, side as u64);
        let sentence = format!(
            "{left} proxies of {side}x{side} pixels will need about {}; there is room for {}",
            bytes(needed),
            bytes(usable)
        );
        match needed > usable {
            true => context.warnings.add(Warning::Other(sentence)),
            false if generation.options.progress => console::note(sentence),
            false => {}
        }
    }
    Ok(disk)
}

/// The subjects of which anything is left. Every process begins with another one, so that several train several
/// supervisors at once.
fn taken_up(context: &Context, shard: Shard, work: &Work) -> Vec<usize> {
    let subjects = context.subjects.len();
    let first = shard.index % subjects.max(1);
    (first..subjects)
        .chain(0..first)
        .filter(|&subject| work.wants(subject))
        .collect()
}

/// Looks whether every proxy of the plan is in the store.
async fn all_there(context: &Context, keys: &ProxyKeys) -> Result<()> {
    let table = context.store.proxies().await?;
    table.refresh().await?;
    let mut missing = 0;
    for batch in 0..context.plan.batches() {
        missing += table.missing(&keys.of(batch, &table)).len();
    }
    match missing {
        0 => Ok(()),
        _ => Err(Error::invalid(
            format!("{missing} proxies that were made are not in the store"),
            "somebody deletes from it: run the same command again",
        )),
    }
}
