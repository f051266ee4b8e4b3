//! A watched folder, `DIR/CLASS/SUBJECT/*.jpg`: one student that goes on learning whoever arrives there.
//!
//! A watch is a chain of runs, each of one subject. A run's plan follows from the digest of the adapter that it goes on
//! from, the digests of the photos, and the seed, all of which stand in its resolved pipeline file: a chain can be
//! replayed. What the watch remembers is one small file ([`state`]); everything else is done by runs, which can be
//! killed and continued, so the watch can, too.
//!
//! | file | what is in it |
//! |---|---|
//! | [`scan`] | what lies in the folder and has come to rest |
//! | [`reconcile`] | who is who: arrivals, renames, changes, retirement; tokens |
//! | [`chain`] | the next run |
//! | [`publish`] | whether its adapter may be published, and the switch |
//! | [`status`] | all of it for people |
//! | [`remove`] | a subject and everything made of it, gone |

pub mod chain;
pub mod publish;
pub mod reconcile;
pub mod remove;
pub mod scan;
pub mod state;
pub mod status;

use std::io::Write;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use notify::event::{AccessKind, AccessMode, EventKind};
use notify::{RecursiveMode, Watcher};
use tokio::sync::{mpsc, watch};

use self::chain::Recipe;
use self::publish::{dino_before, publish, refusal, scores};
use self::reconcile::reconcile;
use self::scan::{Scan, Scanner};
use self::state::{Ended, Home, Published, Run, State};
use crate::config::Document;
use crate::pipeline::{self, Outcome};
use crate::store::{Store, now_us};
use crate::stream::{Stop, blocking};
use crate::{Error, Result, files};
use futures::future::BoxFuture;

/// Events come in swarms: so long after one, everything is looked at once.
const SWARM: Duration = Duration::from_millis(100);
/// Events may fail to come: a drive was away and is another one to the system now, or there are more folders than it
/// watches. So often they are asked for anew, and everything is looked at anyway.
const ANYWAY: Duration = Duration::from_secs(60);

/// What to watch, and how.
#[derive(Debug, Clone)]
pub struct Options {
    /// The watched folder.
    pub dir: PathBuf,
    /// The pipeline file that says how subjects are learnt.
    pub pipeline: PathBuf,
    /// Laid over it, as `a.b=value`.
    pub overrides: Vec<String>,
    /// `None`: the store that the watch began with, at first `datasets/store`.
    pub store: Option<PathBuf>,
    /// Look so often instead of waiting for events.
    pub poll: Option<Duration>,
    /// Learn what is there now, then end.
    pub once: bool,
    /// Proxies of every other subject that each run replays.
    pub replay: usize,
    /// No subject may lose more DINO than this from one published adapter to the next.
    pub margin: f64,
    /// What has looked the same for so long is at rest.
    pub settle: Duration,
    /// Show the progress of runs on standard error.
    pub progress: bool,
}

/// Watches until `stop` is requested or, with `once`, until everything that was there is learnt; returns what is
/// remembered then.
///
/// # Errors
/// [`Error::Interrupted`] when `stop` was requested: the same call goes on. Faults of the pipeline file; a second watch
/// on the same folder; what stops a run, such as a full disk: the same call goes on with it. A run that fails because of
/// its subject (a loss that is not finite, a photo that cannot be read) is noted, and the subject not tried again until
/// its photos or the settings change.
pub fn watch<'a>(options: &'a Options, stop: Stop) -> BoxFuture<'a, Result<State>> {
    Box::pin(async move {
        let recipe = Recipe::open(&options.pipeline, &options.overrides, options.replay)?;
        let home = Home::of(&options.dir)?;
        let _lock = home.lock()?;
        let mut state = home.load()?;
        let store = Store::open(home.store(&state, options.store.as_deref())?).await?;
        state.store = store.reference(home.path());
        drop(store);
        let is_ours = |run: &Run| chain::is_of(&home, &run.pipeline);
        let foreign = state.run.take_if(|run| !is_ours(run));
        state.use_settings(&recipe.settings(options.margin));
        home.save(&state)?;
        let watcher = Watching {
            options,
            recipe,
            home,
            state: Mutex::new(state),
            scan: Mutex::new(None),
            looks: watch::Sender::new(Looks::default()),
            stop,
        };
        watcher.remove_checkpoints()?;
        if let Some(run) = foreign {
            let number = run.number;
            watcher.say(&format!(
                "run {number} was begun in another place: it is begun anew"
            ))?;
        }
        watcher.say(&format!("watching {}", watcher.home.watched.display()))?;
        tokio::try_join!(watcher.follow(), watcher.work())?;
        let state = watcher.state().clone();
        Ok(state)
    })
}

/// How far following the folder has come.
#[derive(Debug, Clone, Copy, Default)]
struct Looks {
    /// Times that the folder was looked at.
    count: u64,
    /// Nothing more will be looked at.
    over: bool,
}

struct Watching<'a> {
    options: &'a Options,
    recipe: Recipe,
    home: Home,
    state: Mutex<State>,
    /// What was seen last.
    scan: Mutex<Option<Scan>>,
    looks: watch::Sender<Looks>,
    stop: Stop,
}

impl Watching<'_> {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what is remembered, on disk first.
    fn remember(&self, change: impl FnOnce(&mut State)) -> Result<()> {
        let mut state = self.state();
        let mut changed = state.clone();
        change(&mut changed);
        if changed != *state {
            self.home.save(&changed)?;
            *state = changed;
        }
        Ok(())
    }

    /// Says something here and in the log.
    fn say(&self, what: &str) -> Result<()> {
        tracing::info!("{what}");
        let path = self.home.log();
        let line = format!("{} {what}\n", status::time(now_us()));
        if path.symlink_metadata().is_ok_and(|found| !found.is_file()) {
            return Err(Error::invalid(
                format!("{} is not a file", path.display()),
                "move it away",
            ));
        }
        let file = std::fs::File::options()
            .create(true)
            .append(true)
            .open(&path);
        file.and_then(|mut file| file.write_all(line.as_bytes()))
            .map_err(Error::io(&path))
    }

    /// Keeps what is remembered up to what lies in the folder.
    async fn follow(&self) -> Result<()> {
        let (events, mut swarm) = mpsc::channel(1);
        let mut listener = match self.options.poll {
            None => Some(self.listen(events.clone())?),
            Some(_) => None,
        };
        let mut scanner = Scanner::new(&self.home.watched, self.options.settle);
        let mut was_lost = false;
        let mut is_stale = false;
        loop {
            if is_stale && listener.is_some() {
                // Before looking, so that nothing falls between.
                match self.listen(events.clone()) {
                    Ok(anew) => listener = Some(anew),
                    Err(error) => tracing::debug!("{error}"),
                }
                is_stale = false;
            }
            let expected: Vec<String> = {
                let state = self.state();
                let present = state.subjects.iter().filter(|subject| !subject.retired);
                present.map(|subject| subject.folder.clone()).collect()
            };
            let looking = blocking("looking at the folder", move || {
                let scan = scanner.scan(&expected, Instant::now());
                Ok((scanner, scan))
            });
            let (back, scan) = looking.await?;
            scanner = back;
            // A drive that is not mounted looks like a folder from which everything was deleted.
            let scan = scan.and_then(|scan| match self.home.exists() {
                true => Ok(scan),
                false => Err(Error::invalid(
                    format!("{} is empty", self.home.watched.display()),
                    "mount the drive again",
                )),
            });
            let settles_in = match scan {
                Ok(_) if was_lost => Ok(None),
                Ok(scan) => {
                    let settles_in = scan.settles_in;
                    match self.take_in(scan) {
                        Ok(()) => Ok(Some(settles_in)),
                        // It went away while what was seen was written down.
                        Err(error) if !self.home.exists() => Err(error),
                        Err(error) => return Err(error),
                    }
                }
                Err(error) => Err(error),
            };
            let settles_in = match settles_in {
                Ok(Some(settles_in)) => settles_in,
                Ok(None) => {
                    was_lost = false;
                    tracing::info!("{} is back", self.home.watched.display());
                    // What is listened to is the folder that went away.
                    is_stale = true;
                    Some(Duration::ZERO)
                }
                Err(error) => {
                    if !was_lost {
                        tracing::warn!("{error}; waiting until it is back");
                    }
                    was_lost = true;
                    Some(self.options.settle.max(Duration::from_secs(1)))
                }
            };
            let over = self.options.once && settles_in.is_none();
            self.looks.send_modify(|looks| {
                looks.count += 1;
                looks.over = over;
            });
            if over {
                return Ok(());
            }
            let poll = self.options.poll.unwrap_or(ANYWAY);
            let pause = settles_in.map_or(poll, |settles_in| settles_in.min(poll));
            tokio::select! {
                Some(()) = swarm.recv() => tokio::time::sleep(SWARM).await,
                () = tokio::time::sleep(pause) => is_stale |= pause == ANYWAY,
                () = self.stop.wait() => return Ok(()),
            }
        }
    }

    /// Remembers what was seen, and says what it means.
    fn take_in(&self, scan: Scan) -> Result<()> {
        let before = self.state().clone();
        self.remember(|state| reconcile(state, &scan))?;
        let after = self.state().clone();
        for line in status::changes(&before, &after) {
            self.say(&line)?;
        }
        *self.scan.lock().unwrap_or_else(PoisonError::into_inner) = Some(scan);
        Ok(())
    }

    /// Sends something whenever anything changes in the folder.
    fn listen(&self, events: mpsc::Sender<()>) -> Result<notify::RecommendedWatcher> {
        let own = self.home.path().to_path_buf();
        let failed = |e: notify::Error| {
            Error::invalid(
                format!(
                    "{}: the system gives no file events: {e}",
                    self.home.watched.display()
                ),
                "look every ten seconds instead, with --poll 10",
            )
        };
        // A link to / would have it watch the machine.
        let without_links = notify::Config::default().with_follow_symlinks(false);
        let mut watcher = notify::RecommendedWatcher::new(
            move |event: notify::Result<notify::Event>| {
                let counts = event.is_ok_and(|event| {
                    let wrote = EventKind::Access(AccessKind::Close(AccessMode::Write));
                    let is_change =
                        !matches!(event.kind, EventKind::Access(_)) || event.kind == wrote;
                    let is_own = event.paths.iter().all(|path| path.starts_with(&own));
                    event.need_rescan() || (is_change && !is_own)
                });
                if counts {
                    // One that waits already stands for all.
                    let _ = events.try_send(());
                }
            },
            without_links,
        )
        .map_err(failed)?;
        watcher
            .watch(&self.home.watched, RecursiveMode::Recursive)
            .map_err(failed)?;
        for folder in scan::linked(&self.home.watched) {
            let folder = std::fs::canonicalize(&folder).unwrap_or(folder);
            if let Err(error) = watcher.watch(&folder, RecursiveMode::NonRecursive) {
                tracing::debug!("{}: {error}", folder.display());
            }
        }
        Ok(watcher)
    }

    /// Takes one run after another.
    async fn work(&self) -> Result<()> {
        let mut looks = self.looks.subscribe();
        loop {
            if self.stop.requested() {
                return Err(Error::Interrupted);
            }
            let now = *looks.borrow_and_update();
            if let Some(run) = self.next_run()? {
                self.take(&run).await?;
                continue;
            }
            if now.over {
                return Ok(());
            }
            tokio::select! {
                _ = looks.changed() => {}
                () = self.stop.wait() => {}
            }
        }
    }

    /// The run that was under way, or the next one, which is under way then.
    fn next_run(&self) -> Result<Option<Run>> {
        if let Some(run) = self.state().run.clone() {
            return Ok(Some(run));
        }
        let scan = self
            .scan
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let Some(scan) = scan else {
            return Ok(None);
        };
        let state = self.state().clone();
        let run = self.recipe.next(&self.home, &state, &scan)?;
        if let Some(run) = &run {
            self.remember(|state| state.run = Some(run.clone()))?;
            self.say(&format!("run {} learns {}", run.number, run.subject))?;
        }
        Ok(run)
    }

    /// Runs `run` to its end, or goes on with it, and publishes what it made.
    async fn take(&self, run: &Run) -> Result<()> {
        let latest = format!("run-{:04}", run.number);
        for (name, dir) in files::list(&self.home.runs())? {
            // The link to the newest is our own, and replaced.
            if remove::is_of_run(&name, run.number) && name != latest {
                files::refuse_links(&dir)?;
            }
        }
        let options = pipeline::Options {
            pipeline: format!("run-{:04}.toml", run.number).into(),
            text: run.pipeline.clone(),
            resolved: Document::parse(
                &run.pipeline,
                "pipeline.toml",
                &[],
                &crate::models::Registry,
            )
            .resolve()?,
            store: Some(self.state().store.path.clone()),
            out: self.home.runs(),
            new: false,
            sequential: false,
            progress: self.options.progress,
        };
        match pipeline::run(&options, self.stop.clone()).await {
            Ok(outcome) => self.finish(run, &outcome).await,
            Err(error) if stops_the_watch(&error) => Err(error),
            Err(error) => self.end(run, ended(run, Some(format!("it failed: {error}"))), None),
        }
    }

    async fn finish(&self, run: &Run, outcome: &Outcome) -> Result<()> {
        let state = self.state().clone();
        let store = Store::open(&state.store.path).await?;
        let scores = scores(&outcome.report);
        let before = dino_before(&self.home, &state, run, &store).await?;
        let after = scores
            .iter()
            .map(|(subject, scores)| (subject.clone(), scores.dino))
            .collect();
        let refused = refusal(&before, &after, self.options.margin);
        let published = match &refused {
            None => Some(publish(&self.home, run, outcome, &scores)?),
            Some(_) => None,
        };
        let student = outcome.dir.join("student");
        let digesting = blocking("the digest of an adapter", move || {
            files::digest_dir(&student)
        });
        let ended = Ended {
            adapter: Some(digesting.await?),
            scores,
            ..ended(run, refused)
        };
        for warning in &outcome.summary.warnings {
            self.say(&format!("run {}: {warning}", run.number))?;
        }
        self.end(run, ended, published)?;
        self.remove_checkpoints()
    }

    /// Removes the checkpoints of the runs that are over: they are not continued.
    fn remove_checkpoints(&self) -> Result<()> {
        let state = self.state().clone();
        for (name, run) in files::list(&self.home.runs())? {
            let mut over = state.history.iter();
            if !run.is_symlink() && over.any(|ended| remove::is_of_run(&name, ended.number)) {
                self.home.remove(&run.join("checkpoints"))?;
            }
        }
        Ok(())
    }

    /// Remembers how `run` ended.
    fn end(&self, run: &Run, ended: Ended, published: Option<Published>) -> Result<()> {
        let said = match &ended.refused {
            None => format!("run {}: published, {} is learnt", run.number, run.subject),
            Some(why) => format!("run {}: not published, {why}", run.number),
        };
        self.remember(|state| {
            state.run = None;
            state.published = published.or(state.published.take());
            let subject = state
                .subjects
                .iter_mut()
                .find(|subject| subject.id == run.subject);
            if let Some(subject) = subject {
                match &ended.refused {
                    None => (subject.learnt, subject.held) = (Some(run.look.clone()), None),
                    Some(why) => subject.held = Some((run.look.clone(), why.clone())),
                }
                subject.pending = None;
                subject.queue(&mut state.arrivals);
            }
            state.history.push(ended);
        })?;
        self.say(&said)
    }
}

/// The end of `run`, now, with nothing made.
fn ended(run: &Run, refused: Option<String>) -> Ended {
    Ended {
        number: run.number,
        subject: run.subject.clone(),
        init: run.init.clone(),
        adapter: None,
        scores: Default::default(),
        refused,
        seconds: now_us().saturating_sub(run.started_us) as f64 / 1e6,
    }
}

/// Whether a run failed for a reason that is not its subject's: the next one would fail, too, or the same one succeeds
/// when it is continued later.
fn stops_the_watch(error: &Error) -> bool {
    match error {
        Error::Stage { source, .. } | Error::Unusable(source) => stops_the_watch(source),
        Error::Image { .. } | Error::NotFinite { .. } => false,
        Error::Io { .. } | Error::Store { .. } | Error::Interrupted | Error::Config(_) => true,
        Error::Checkpoint { .. } | Error::Invalid { .. } | Error::Tensor(_) => true,
    }
}
