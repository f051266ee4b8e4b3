//! The graph. [`run`] prepares what the plan needs, [`Graph`] builds the stages and the channels between them, and
//! nobody else spawns anything.

mod generate;
mod preflight;
mod prepare;
mod run_dir;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use futures::future::BoxFuture;
use futures::{Stream, StreamExt, TryStreamExt};

pub use self::generate::{Generated, Generation, generate};
pub use self::preflight::{Obstacle, Preflight, preflight};
use self::prepare::Prepared;
pub use self::prepare::Purpose;
pub use self::prepare::{device, evaluations, opening_for, sampler_opening, use_threads};
pub use self::run_dir::RunDir;
pub(crate) use self::run_dir::lock;
use crate::config::{Document, Resolved, Source};
use crate::evaluation::report::Report;
use crate::stages::direct::{Tuned, direct};
use crate::stages::evaluate::{Evaluated, evaluate};
use crate::stages::keep::{Keeping, keep};
use crate::stages::references::references;
use crate::stages::report::{self, Ending};
use crate::stages::score::score_proxies;
use crate::stages::supervise::supervise;
use crate::stages::synthesize::synthesize;
use crate::stages::tokenize::tokenize;
use crate::stages::train::train;
use crate::stages::{Context, Method};
use crate::stream::{Inlet, Meter, Outlet, Progress, Stages, Stop, channel};
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
    pub store: PathBuf,
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
    /// it: the store is `datasets/store`, run directories are made in `datasets/runs`, and an earlier run is continued.
    ///
    /// # Errors
    /// [`Error::Config`] with every fault of the text and the overrides.
    pub fn new(
        pipeline: impl Into<PathBuf>,
        text: impl Into<String>,
        overrides: &[String],
    ) -> Result<Self> {
        let (pipeline, text) = (pipeline.into(), text.into());
        let document = Document::parse(&text, &pipeline.display().to_string(), overrides);
        Ok(Self {
            resolved: document.resolve()?,
            pipeline,
            text,
            store: "datasets/store".into(),
            out: "datasets/runs".into(),
            new: false,
            sequential: false,
            progress: false,
        })
    }
}

/// What a run came to.
#[derive(Debug)]
pub struct Outcome {
    /// The run's directory.
    pub dir: PathBuf,
    /// The link beside it that leads to the newest run of the pipeline file, where there can be one.
    pub latest: Option<PathBuf>,
    pub report: Report,
    pub ending: Ending,
}

/// Runs a pipeline to its end, or continues it.
///
/// # Errors
/// [`Error::Interrupted`] when `stop` was requested: everything is committed and the same call continues. Otherwise
/// the first failure of any stage.
pub fn run<'a>(options: &'a Options, stop: Stop) -> BoxFuture<'a, Result<Outcome>> {
    Box::pin(async move {
        let start = Instant::now();
        let resolved_text = options.resolved.to_toml()?;
        let ready = prepare::ready(options, Purpose::Run).await?;
        let dir = RunDir::open(
            &options.out,
            &options.pipeline,
            &options.text,
            &resolved_text,
            options.new,
        )?;
        let latest = dir.link();
        if options.progress {
            announce(&dir);
        }
        let prepared = prepare::prepare(options, Purpose::Run, &dir, ready, stop).await?;
        let context = prepared.context.clone();
        let progress = options
            .progress
            .then(|| Progress::show(context.board.clone()));
        prepare::note_status(&context, options, "started").await?;
        let result = Graph::build(prepared, options.sequential)
            .join(&context)
            .await;
        if let Some(progress) = progress {
            progress.finish();
        }
        // What was recorded before a failure stays: a resumed run records the same again, which is harmless.
        let flushed = context.metrics.flush().await;
        let (evaluated, first_training_proxy) = match result {
            Ok(ended) => ended,
            Err(error) => return Err(failed(&context, options, error, flushed).await),
        };
        flushed?;
        if context.stop.requested() {
            prepare::note_status(&context, options, "interrupted").await?;
            return Err(Error::Interrupted);
        }
        let ending = Ending {
            stages: context.board.report(),
            wall_seconds: start.elapsed().as_secs_f64(),
            first_training_proxy,
            warnings: context.warnings.all(),
            evaluated: report::with_earlier(&context, evaluated, dir.ending()).await?,
            protocol: prepare::protocol(&context).await?,
        };
        let report = report::write(&context, &ending).await?;
        prepare::note_status(&context, options, "complete").await?;
        let summary = serde_json::to_value(&ending).map_err(|e| Error::Invalid {
            what: format!("the ending as JSON: {e}"),
            hint: None,
        })?;
        dir.complete(&summary)?;
        for (_, place) in files::list(&dir.join("checkpoints"))? {
            clear_due(&place)?;
        }
        Ok(Outcome {
            dir: dir.path().to_path_buf(),
            latest,
            report,
            ending,
        })
    })
}

/// Notes that the run has failed, and gives the `error` that it failed with: what else goes wrong then is said, too, but
/// does not hide it.
async fn failed(context: &Context, options: &Options, error: Error, flushed: Result<()>) -> Error {
    let noted = prepare::note_status(context, options, "failed").await;
    for second in [flushed, noted].into_iter().filter_map(Result::err) {
        tracing::error!("after a failure: {second}");
    }
    error
}

/// Writes the report of the run in `dir` again, from the store and what the run noted at its end.
///
/// # Errors
/// When the run has not ended, or its photos, checkpoints or rows are gone.
pub fn report_again<'a>(
    dir: &'a std::path::Path,
    store: &'a std::path::Path,
) -> BoxFuture<'a, Result<Report>> {
    Box::pin(async move {
        let run = RunDir::existing(dir)?;
        let (text, resolved) = run.texts()?;
        let ending: Ending = serde_json::from_str(&run.summary()?).map_err(|e| {
            Error::invalid(
                format!("{}: complete.json: {e}", dir.display()),
                "run the pipeline again to renew it",
            )
        })?;
        let resolved = Document::parse(&resolved, "resolved.toml", &[]).resolve()?;
        let options = Options {
            pipeline: dir.to_path_buf(),
            text,
            resolved,
            store: store.to_path_buf(),
            out: dir.to_path_buf(),
            new: false,
            sequential: false,
            progress: false,
        };
        let ready = prepare::photos(&options).await?;
        let prepared =
            prepare::prepare(&options, Purpose::Run, &run, ready, Stop::default()).await?;
        report::write(&prepared.context, &ending).await
    })
}

fn announce(dir: &RunDir) {
    let path = dir.path().display();
    match (dir.is_complete(), dir.resumed) {
        (true, _) => {
            eprintln!("{path}: this ran to its end before; checking that everything is there")
        }
        (false, true) => eprintln!("{path}: continuing"),
        (false, false) => eprintln!("{path}: a new run"),
    }
    if !dir.changes.is_empty() {
        eprintln!("changed since the last run of this file:");
        for change in &dir.changes {
            eprintln!("  {change}");
        }
    }
}

/// The running stages.
struct Graph {
    stages: Stages,
    evaluated: Inlet<Evaluated>,
    reporting: Meter,
    first_training_proxy: Arc<AtomicUsize>,
}

impl Graph {
    /// The picture of the crate's documentation, as code.
    fn build(prepared: Prepared, sequential: bool) -> Self {
        let Prepared {
            context,
            student,
            supervisor,
            supervisor_keys,
            tokenizer,
        } = prepared;
        let (board, sizes) = (&context.board, &context.resolved.channels);
        let resolved = &context.resolved;
        let mut stages = Stages::default();
        let meter = |name: &str, unit: &str, total: usize| {
            let meter = board.meter(name, unit);
            meter.expect(total);
            meter
        };
        let subjects = context.subjects.len();
        let proxies = context.plan.proxies().len();
        let referring = meter("references", "subjects", subjects);
        let first_training_proxy = Arc::new(AtomicUsize::new(usize::MAX));
        // Meters stand in the order of the dataflow, which is the order in which progress shows them.
        let teaching =
            supervisor
                .as_ref()
                .zip(resolved.supervisor.as_ref())
                .map(|(opening, settings)| {
                    let steps = settings.training.steps * subjects;
                    let meters = [
                        meter("supervise", "steps", steps),
                        meter("synthesize", "proxies", proxies),
                        meter("keep", "proxies", proxies),
                        meter("tokenize", "proxies", proxies),
                        meter("score", "proxies", proxies),
                    ];
                    (opening.clone(), meters)
                });
        let baseline = resolved
            .direct()
            .map(|direct| (direct, meter("direct", "steps", direct.training.steps)));
        let training = meter("train", "steps", resolved.student.training.steps);
        let evaluating = meter("evaluate", "samples", expected_samples(&context));
        let reporting = board.meter("report", "checkpoints");

        let (checkpoints, to_evaluate) = channel(
            board,
            "checkpoints",
            sizes.checkpoints,
            &training,
            &evaluating,
        );
        let mut to_subjects: Vec<Outlet<usize>> = Vec::new();

        match teaching {
            Some((opening, [supervising, synthesizing, keeping, tokenizing, scoring])) => {
                let (subjects, to_supervise) = channel(
                    board,
                    "references",
                    sizes.references,
                    &referring,
                    &supervising,
                );
                to_subjects.push(subjects);
                let keys = supervisor_keys.clone();
                let keyed = in_order(sequential, to_supervise)
                    .map(move |subject| (subject, keys[subject].clone()));
                let (supervisors, to_synthesize) = channel(
                    board,
                    "supervisors",
                    sizes.supervisors,
                    &supervising,
                    &synthesizing,
                );
                stages.spawn(
                    &supervising,
                    supervise(context.clone(), opening, keyed, supervising.clone()),
                    supervisors,
                );

                let (made, to_keep) =
                    channel(board, "proxies", sizes.proxies, &synthesizing, &keeping);
                let synthesis = synthesize(
                    context.clone(),
                    in_order(sequential, to_synthesize),
                    checkpoints.clone(),
                    synthesizing.clone(),
                );
                stages.spawn(&synthesizing, synthesis, made);

                let kept = keep(
                    context.clone(),
                    supervisor_keys,
                    to_keep,
                    keeping.clone(),
                    Keeping::at_once(),
                )
                .map_ok(move |mut batch| {
                    if sequential {
                        // Batches wait for each other; readers take the pixels from the store.
                        batch.images = None;
                    }
                    batch
                });
                let (for_tokens, to_tokenize) =
                    channel(board, "kept", sizes.kept, &keeping, &tokenizing);
                let (for_scores, to_score) = channel(board, "kept", sizes.kept, &keeping, &scoring);
                stages.spawn(&keeping, kept, vec![for_tokens, for_scores]);

                let (ready, to_train) =
                    channel(board, "tokens", sizes.tokens, &tokenizing, &training);
                let tokens = tokenize(
                    context.clone(),
                    tokenizer,
                    in_order(sequential, to_tokenize),
                    tokenizing.clone(),
                );
                stages.spawn(&tokenizing, tokens, ready);

                let scores = score_proxies(
                    context.clone(),
                    in_order(sequential, to_score),
                    scoring.clone(),
                );
                stages.spawn(&scoring, scores, ());

                let learning = train(
                    context.clone(),
                    student.clone(),
                    in_order(sequential, to_train),
                    first_training_proxy.clone(),
                    training.clone(),
                );
                stages.spawn(&training, learning, checkpoints.clone());
            }
            None => {
                let (subjects, to_train) =
                    channel(board, "references", sizes.references, &referring, &training);
                to_subjects.push(subjects);
                let tuned = Tuned {
                    method: Method::Student,
                    source: resolved.student.source,
                    settings: resolved.student.training.clone(),
                };
                let learning = direct(
                    context.clone(),
                    student.clone(),
                    tuned,
                    to_train,
                    training.clone(),
                );
                stages.spawn(&training, learning, checkpoints.clone());
            }
        }
        if let Some((settings, tuning)) = baseline {
            let (subjects, to_tune) =
                channel(board, "references", sizes.references, &referring, &tuning);
            to_subjects.push(subjects);
            let tuned = Tuned {
                method: Method::Direct,
                source: settings.source,
                settings: settings.training.clone(),
            };
            let opening = crate::models::Opening {
                dropout: settings.dropout,
                condition_dropout: settings.condition_dropout,
                ..student
            };
            let learning = direct(context.clone(), opening, tuned, to_tune, tuning.clone());
            stages.spawn(&tuning, learning, checkpoints.clone());
        }
        drop(checkpoints);
        stages.spawn(
            &referring,
            references(context.clone(), referring.clone()),
            to_subjects,
        );

        let (evaluated, results) = channel(
            board,
            "evaluations",
            sizes.evaluations,
            &evaluating,
            &reporting,
        );
        let scored = evaluate(
            context.clone(),
            in_order(sequential, to_evaluate),
            evaluating.clone(),
        );
        stages.spawn(&evaluating, scored, evaluated);
        Self {
            stages,
            evaluated: results,
            reporting,
            first_training_proxy,
        }
    }

    /// Waits for all stages. The first failure stops the others.
    async fn join(mut self, context: &Context) -> Result<(Vec<Evaluated>, Option<(usize, usize)>)> {
        let mut evaluated = Vec::new();
        let mut open = true;
        loop {
            tokio::select! {
                result = self.evaluated.next(), if open => match result {
                    Some(result) => {
                        self.reporting.add(1);
                        evaluated.push(result);
                    }
                    None => open = false,
                },
                ended = self.stages.next() => match ended {
                    Some(result) => result?,
                    None if !open => break,
                    None => {}
                },
            }
        }
        evaluated.sort_by_key(|result: &Evaluated| (result.method, result.step));
        let first = self.first_training_proxy.load(Relaxed);
        let first = (first != usize::MAX).then(|| (first, context.plan.proxies().len()));
        Ok((evaluated, first))
    }
}

/// `input` as it comes, or, one stage after another, only when all of it has come.
fn in_order<T: Send + 'static>(
    sequential: bool,
    input: impl Stream<Item = T> + Send + 'static,
) -> futures::stream::BoxStream<'static, T> {
    if !sequential {
        return input.boxed();
    }
    futures::stream::once(input.collect::<Vec<T>>())
        .flat_map(futures::stream::iter)
        .boxed()
}

/// How many samples the evaluation will draw.
fn expected_samples(context: &Context) -> usize {
    let images = context.plan.evaluation().images.len();
    let resolved = &context.resolved;
    let (steps, every) = (resolved.student.training.steps, resolved.evaluation.every);
    let between = (steps - 1).checked_div(every).unwrap_or(0);
    let from_proxies = resolved.student.source == Source::Proxies;
    let methods = 1
        + between
        + usize::from(resolved.evaluation.untouched)
        + usize::from(from_proxies)
        + usize::from(resolved.direct().is_some());
    images * methods
}
