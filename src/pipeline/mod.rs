//! A run: [`topology`] pictures it, `prepare` finds out what the plan needs, `graph` builds the stages and the channels
//! between them, and nobody else spawns anything.

mod context;
mod extend;
mod generate;
mod graph;
mod preflight;
mod prepare;
mod run_dir;
pub mod topology;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::BoxFuture;

use self::context::Context;
pub use self::generate::{Generated, Generation, generate};
use self::graph::{Finished, Graph, GraphOptions};
pub use self::preflight::{Obstacle, Preflight, preflight};
pub use self::prepare::Purpose;
pub use self::prepare::{device, evaluations, opening_for, sampler_opening, use_threads};
pub use self::run_dir::RunDir;
pub(crate) use self::run_dir::{RESOLVED, lock, summary_in};
use self::topology::Topology;
use crate::config::{Document, Resolved};
use crate::console;
use crate::evaluation::report::Report;
use crate::stages::keep::CommitPolicy;
use crate::stages::report::{self, RunSummary};
use crate::stages::source::ImageSource;
use crate::store::RunStatus;
use crate::stream::{Progress, Stop};
use crate::training::clear_due;
use crate::{Error, Result, files};

/// What to run, and how.
#[derive(Debug, Clone)]
pub struct Options {
    /// The pipeline file's path; the run is named after it.
    pub pipeline: PathBuf,
    /// Its text.
    pub text: String,
    pub resolved: Resolved,
    /// The store; `None`: the one that the run noted, for a new run `datasets/store`.
    pub store: Option<PathBuf>,
    /// Where run directories are made.
    pub out: PathBuf,
    /// Start afresh instead of resuming.
    pub new: bool,
    /// One stage after another.
    pub sequential: bool,
    /// Show progress on standard error.
    pub progress: bool,
}

impl Options {
    /// Runs the pipeline that `text` holds, with `overrides` (`a.b=value`) laid over it. `pipeline` is the path of
    /// its file, there or not: the run and its faults are named after it. Everything else is as the command line has
    /// it: the store is the run's own, at first `datasets/store`, run directories are made in `datasets/runs`, and an earlier run is continued.
    ///
    /// # Errors
    /// [`Error::Config`] with every fault of the text and the overrides.
    pub fn new(
        pipeline: impl Into<PathBuf>,
        text: impl Into<String>,
        overrides: &[String],
    ) -> Result<Self> {
        let (pipeline, text) = (pipeline.into(), text.into());
        let document = Document::parse(
            &text,
            &pipeline.display().to_string(),
            overrides,
            &crate::models::Registry,
        );
        Ok(Self {
            resolved: document.resolve()?,
            pipeline,
            text,
            store: None,
            out: "datasets/runs".into(),
            new: false,
            sequential: false,
            progress: false,
        })
    }
}

/// The results of a run.
#[derive(Debug)]
pub struct Outcome {
    /// The run's directory.
    pub dir: PathBuf,
    /// The link beside it that leads to the newest run of the pipeline file, where there can be one.
    pub latest: Option<PathBuf>,
    pub report: Report,
    pub summary: RunSummary,
}

/// Runs a pipeline to its end, or continues it.
///
/// # Errors
/// [`Error::Interrupted`] when `stop` was requested: everything is committed and the same call continues. Otherwise
/// the first failure of any stage.
pub fn run<'a>(options: &'a Options, stop: Stop) -> BoxFuture<'a, Result<Outcome>> {
    Box::pin(run_graph(options, None, stop))
}

/// Runs a pipeline whose student learns from `source` (`student.source = "custom"`), or continues it: what [`run`] does,
/// with the program's own images in place of supervisors' proxies. They become rows of the store, tokens, scores and
/// training steps as proxies do, while they are made.
///
/// # Errors
/// Those of [`run`], and of the source.
pub fn run_with_source<'a>(
    options: &'a Options,
    source: Arc<dyn ImageSource>,
    stop: Stop,
) -> BoxFuture<'a, Result<Outcome>> {
    Box::pin(run_graph(options, Some(source), stop))
}

async fn run_graph(
    options: &Options,
    source: Option<Arc<dyn ImageSource>>,
    stop: Stop,
) -> Result<Outcome> {
    let start = Instant::now();
    let resolved_text = options.resolved.to_toml()?;
    let ready = prepare::ready(options, Purpose::Run, source.is_some()).await?;
    let dir = RunDir::open(
        &options.out,
        &options.pipeline,
        &options.text,
        &resolved_text,
        options.new,
    )?;
    if options.progress {
        announce(&dir);
    }
    let prepared = prepare::prepare(options, Purpose::Run, &dir, ready, source, stop).await?;
    let context = prepared.context.clone();
    if !options.new
        && let Some(said) = extend::go_on(&context, &prepared.origin, &dir)?
    {
        tracing::info!("{}: {said}", dir.id());
    }
    let progress = options
        .progress
        .then(|| Progress::show(context.board.clone()));
    prepare::note_status(&context, options, RunStatus::Started).await?;
    let topology = Topology::of_run(&options.resolved);
    let how = GraphOptions {
        sequential: options.sequential,
        commit: CommitPolicy::at_once(),
        shared: None,
    };
    let graph = Graph::build(&topology, context.clone(), prepared.models, how);
    let result = tokio::select! {
        ended = graph.join(&context, false) => ended,
        never = link_once_it_shows(&dir) => match never {},
    };
    let latest = dir.has_shown().then(|| dir.link()).flatten();
    if let Some(progress) = progress {
        progress.finish();
    }
    // What was recorded before a failure stays: a resumed run records the same again, which is harmless.
    let flushed = context.metrics.flush().await;
    let finished = match result {
        Ok(finished) => finished,
        Err(error) => return Err(failed(&context, options, error, flushed).await),
    };
    flushed?;
    if context.stop.requested() {
        prepare::note_status(&context, options, RunStatus::Interrupted).await?;
        return Err(Error::Interrupted);
    }
    let (summary, report) = conclude(&context, options, &dir, finished, start).await?;
    Ok(Outcome {
        dir: dir.path().to_path_buf(),
        latest,
        report,
        summary,
    })
}

/// Writes the report of a run that has ended well, and notes that it has.
async fn conclude(
    context: &Context,
    options: &Options,
    dir: &RunDir,
    finished: Finished,
    start: Instant,
) -> Result<(RunSummary, Report)> {
    let Finished {
        evaluated,
        first_training_proxy,
    } = finished;
    let needs = context.report();
    let summary = RunSummary {
        stages: context.board.report(),
        wall_seconds: start.elapsed().as_secs_f64(),
        first_training_proxy: first_training_proxy
            .map(|first| (first, context.plan.proxies().len())),
        warnings: context.warnings.all(),
        evaluated: report::with_earlier(&needs, evaluated, dir.earlier_summary()).await?,
        protocol: prepare::protocol(context).await?,
    };
    let report = report::write(&needs, &summary).await?;
    prepare::note_status(context, options, RunStatus::Complete).await?;
    let value = serde_json::to_value(&summary).map_err(|e| Error::Invalid {
        what: format!("the summary as JSON: {e}"),
        hint: None,
    })?;
    dir.complete(&value)?;
    for (_, place) in files::list(&dir.join("checkpoints"))? {
        clear_due(&place)?;
    }
    Ok((summary, report))
}

/// Between two looks at whether a run has made anything.
const LOOK: Duration = Duration::from_millis(250);

/// Lets the link to the newest run lead to this one as soon as it has made something; what fails at once never is the
/// newest. Does not end.
async fn link_once_it_shows(dir: &RunDir) -> std::convert::Infallible {
    while !dir.has_shown() {
        tokio::time::sleep(LOOK).await;
    }
    dir.link();
    std::future::pending().await
}

/// Notes that the run has failed, and gives the `error` that it failed with: what else goes wrong then is said, too, but
/// does not hide it.
async fn failed(context: &Context, options: &Options, error: Error, flushed: Result<()>) -> Error {
    let noted = prepare::note_status(context, options, RunStatus::Failed).await;
    for second in [flushed, noted].into_iter().filter_map(Result::err) {
        tracing::error!("after a failure: {second}");
    }
    error
}

/// Writes the report of the run in `dir` again, from the store and what the run noted at its end.
///
/// # Errors
/// When the run has not ended, or its photos, checkpoints or rows are gone; when `store` is another one than the run's.
pub fn report_again<'a>(
    dir: &'a std::path::Path,
    store: Option<&'a std::path::Path>,
) -> BoxFuture<'a, Result<Report>> {
    Box::pin(async move {
        let run = RunDir::existing(dir)?;
        let (text, resolved) = run.texts()?;
        let summary: RunSummary = serde_json::from_str(&run.summary_text()?).map_err(|e| {
            Error::invalid(
                format!("{}: complete.json: {e}", dir.display()),
                "run the pipeline again to renew it",
            )
        })?;
        let resolved =
            Document::parse(&resolved, "resolved.toml", &[], &crate::models::Registry).resolve()?;
        let options = Options {
            pipeline: dir.to_path_buf(),
            text,
            resolved,
            store: store.map(PathBuf::from),
            out: dir.to_path_buf(),
            new: false,
            sequential: false,
            progress: false,
        };
        let ready = prepare::photos(&options).await?;
        let prepared = prepare::prepare(
            &options,
            Purpose::Report,
            &run,
            ready,
            None,
            Stop::default(),
        )
        .await?;
        report::write(&prepared.context.report(), &summary).await
    })
}

fn announce(dir: &RunDir) {
    let path = dir.path().display();
    match (dir.is_complete(), dir.resumed) {
        (true, _) => console::note(format!(
            "{path}: this ran to its end before; checking that everything is there"
        )),
        (false, true) => console::note(format!("{path}: continuing")),
        (false, false) => console::note(format!("{path}: a new run")),
    }
    if !dir.changes.is_empty() {
        console::note("changed since the last run of this file:");
        for change in &dir.changes {
            console::note(format!("  {change}"));
        }
    }
}
