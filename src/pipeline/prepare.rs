//! What must be known before anything starts: the photos, the plan, and the digests that work is addressed by.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use super::context::Context;
use super::preflight::{Preflight, preflight_with};
use super::{Options, RunDir};
use crate::config::{Device, Dtype, Memory, Resolved, Student, Supervisor};
use crate::evaluation::embed::{Evaluator, ImageScorer};
use crate::evaluation::embedders::{ClipEmbedder, DinoEmbedder};
use crate::models::adapters::CHECKPOINT_WEIGHTS;
use crate::models::limits::read_config;
use crate::models::lora_file::LoraFile;
use crate::models::{LearnerOptions, Tuning, architecture, clip, locate, vit};
use crate::nn::Factors;
use crate::plan::{
    Plan, Versions, captioned_photos_digest, checkpoint_digest, derive_seed, evaluators_key,
    source_key, student_key, supervisor_keys, tokens_key,
};
use crate::stages::source::ImageSource;
use crate::stages::supervise::key_in;
use crate::stages::tokenize::{OpenTokenizer, Resizing};
use crate::stages::{
    LazyEvaluator, LazyLearner, OpenLearner, ProxyKeys, Subject, TokenizerIdentity, Warnings,
    opener, references,
};
use crate::store::{
    EvaluationRow, Limits, MetricRow, RunRow, RunStatus, Store, Table, Writer, now_us,
};
use crate::stream::{Board, Meter, Stop, blocking};
use crate::training::tuning;
use crate::{Error, Result};
use futures::future::BoxFuture;

/// Everything from which the graph is built.
pub(super) struct Prepared {
    pub context: Arc<Context>,
    pub models: Models,
    pub origin: StudentOrigin,
}

/// How the models are opened that learn or tokenize; those that draw are in the context.
pub(super) struct Models {
    pub student: OpenLearner,
    /// The student's model, as the baseline trains it.
    pub baseline: OpenLearner,
    /// `None` without supervisors.
    pub supervisor: Option<OpenLearner>,
    /// The adapter that is the supervisor of every subject, where one is given.
    pub given: Option<Arc<BTreeMap<String, Factors>>>,
    pub tokenizer: Arc<OpenTokenizer>,
}

/// What a student depends on beside the plan.
pub(super) struct StudentOrigin {
    /// Digest of the checkpoint that it starts from.
    base: String,
    /// Digests of the photos of all subjects.
    photos: Vec<String>,
    supervisors: Vec<String>,
}

impl StudentOrigin {
    /// Key of a student that is trained by `plan`.
    pub fn identity(&self, plan: &Plan) -> String {
        let supervisors: Vec<&String> = self.supervisors.iter().collect();
        student_key(plan.digest(), &self.base, &self.photos, &supervisors)
    }
}

/// The device that a pipeline file names.
///
/// # Errors
/// When there is no such card, or this program was built without CUDA.
pub fn device(device: Device) -> Result<candle_core::Device> {
    match device {
        Device::Cpu => Ok(candle_core::Device::Cpu),
        #[cfg(feature = "cuda")]
        Device::Cuda(ordinal) => card(ordinal),
        #[cfg(not(feature = "cuda"))]
        Device::Cuda(_) => Err(Error::invalid(
            "this program was built without CUDA",
            "set device = \"cpu\", or build with: cargo build --release --features cuda",
        )),
    }
}

/// The card `ordinal`, set up for many small operations.
#[cfg(feature = "cuda")]
fn card(ordinal: usize) -> Result<candle_core::Device> {
    use candle_core::cuda_backend::cudarc::driver::{result, sys};

    // One stream for all threads. Without it each thread would have its own, and every tensor two events by which these
    // wait for one another: on an H100 making these was 8 % of a profiled training step of nano GPT, and 38 % of one of its VQ.
    let device = candle_core::Device::new_cuda_with_stream(ordinal)?;
    // SAFETY: nothing uses a tensor of this device on another stream.
    unsafe { device.as_cuda_device()?.disable_event_tracking() };
    let failed = |e: result::DriverError| candle_core::Error::wrap(e);
    // Freed memory stays with the process instead of going back to the driver whenever it is waited for.
    let mut kept = u64::MAX;
    // SAFETY: the card exists, its default pool lives as long as it does, and the attribute is read as a u64.
    unsafe {
        let card = result::device::get(ordinal as i32).map_err(failed)?;
        let pool = result::device::get_default_mem_pool(card).map_err(failed)?;
        result::mem_pool::set_attribute(
            pool,
            sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
            std::ptr::from_mut(&mut kept).cast(),
        )
        .map_err(failed)?;
    }
    Ok(device)
}

/// Uses `threads` threads for computing, in the whole process. Only the first call counts.
pub fn use_threads(threads: usize) {
    // The pool exists already when a run is started from code for a second time.
    let _ = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global();
}

/// What is going to happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// The whole graph.
    Run,
    /// The report of a run that has ended, from what the store has.
    Report,
    /// Proxies are made, and tokens of them if so; nothing is evaluated.
    Proxies { tokens: bool },
}

pub(super) async fn prepare(
    options: &Options,
    purpose: Purpose,
    run: &RunDir,
    ready: Preflight,
    source: Option<Arc<dyn ImageSource>>,
    stop: Stop,
) -> Result<Prepared> {
    let resolved = &options.resolved;
    let place = run.store(options.store.as_deref())?;
    use_threads(resolved.threads);
    let warnings = Warnings::default();
    ready.warnings.into_iter().for_each(|w| warnings.add(w));
    let subjects = ready.subjects;
    let counts: Vec<(String, usize)> = subjects
        .iter()
        .map(|subject| (subject.name.clone(), subject.images.len()))
        .collect();
    let plan = Plan::new(resolved, &counts)?;
    let store = match purpose {
        Purpose::Report => Store::open_existing(&place).await?,
        Purpose::Run | Purpose::Proxies { .. } => Store::open(&place).await?,
    };
    if purpose == Purpose::Report && !store.latest_runs().await?.contains_key(run.id()) {
        return Err(Error::invalid(
            format!(
                "{} has nothing of the run {}",
                store.path().display(),
                run.id()
            ),
            "name the store that the run was made with by --store",
        ));
    }
    run.note_store(&store)?;

    let student_dir = locate(&resolved.student.model)?;
    let student = student_opening(resolved, &resolved.student, student_dir)?;
    let supervisor = match &resolved.supervisor {
        Some(supervisor) => Some(supervisor_opening(resolved, supervisor, purpose)?),
        None => None,
    };
    let (learning, teaching) = (student.clone(), supervisor.clone());
    let own = resolved.clone();
    let reading = blocking("reading checkpoints", move || {
        let evaluator = match purpose {
            Purpose::Run | Purpose::Report => evaluator(&own)?,
            Purpose::Proxies { .. } => no_evaluator(),
        };
        let student_base = checkpoint_digest(&learning.dir)?;
        let teacher = teaching.as_ref();
        let supervisor_base = teacher.map(|opening| checkpoint_digest(&opening.dir));
        let (tokenizer, identity) = image_tokenizer(&learning, teacher)?;
        Ok((
            evaluator,
            student_base,
            supervisor_base.transpose()?,
            tokenizer,
            identity,
        ))
    });
    let (evaluator, student_base, supervisor_base, tokenizer, identity) = reading.await?;
    let supervisor_base = supervisor_base.unwrap_or_default();
    let mut known = Vec::new();
    if let Some((settings, _, sampling)) = resolved.teacher() {
        for (subject, loaded) in resolved.subjects.iter().zip(&subjects) {
            known.push(supervisor_keys(
                &captioned_photos_digest(&loaded.digests, &loaded.captions),
                &supervisor_base,
                subject,
                settings,
                sampling,
                resolved.seed,
            ));
        }
    } else if let Some(source) = &source {
        let key = |subject: &Arc<Subject>| source_key(&source.key(subject));
        let keys = subjects.iter().map(key);
        known.extend(keys.map(|key| Versions::new(key, Vec::new())));
    }
    let in_store = |keys: &Versions<String>| key_in(store.path(), keys).clone();
    let sources: Vec<String> = known.iter().map(in_store).collect();
    let identity = identity.filter(|_| purpose != Purpose::Proxies { tokens: false });
    let photos: Vec<String> = subjects
        .iter()
        .flat_map(|subject| {
            let captions = subject.captions.iter().flatten().next();
            let learnt =
                captions.map(|_| captioned_photos_digest(&subject.digests, &subject.captions));
            subject.digests.iter().cloned().chain(learnt)
        })
        .collect();
    let newest = |keys: &Versions<String>| keys.newest().clone();
    let origin = StudentOrigin {
        base: student_base.clone(),
        photos,
        supervisors: known.iter().map(newest).collect(),
    };
    let metrics = store.metrics().await?;
    let frequent = Limits {
        rows: 1024,
        ..Limits::default()
    };
    let (plan, subjects) = (Arc::new(plan), Arc::new(subjects));
    let proxy_keys = resolved.proxies.as_ref().map(|proxies| ProxyKeys {
        plan: plan.clone(),
        sources: known,
        sampling: proxies.sampling.clone(),
    });
    let supervisor_sampler = supervisor
        .clone()
        .map(|opening| LazyLearner::of_checkpoint("supervisor sampler", opening, &supervisor_base));
    let student_sampler = LazyLearner::of_checkpoint(
        "student sampler",
        sampler_opening(resolved, &student),
        &student_base,
    );
    let context = Context {
        run: run.id().to_string(),
        dir: run.path().to_path_buf(),
        student_identity: origin.identity(&plan),
        sources,
        proxy_keys,
        metrics: Arc::new(Writer::<MetricRow>::with_limits(metrics, frequent)),
        board: Board::default(),
        stop,
        source,
        supervisor_sampler,
        student_sampler,
        evaluator,
        tokenizer: identity,
        warnings,
        resolved: Arc::new(resolved.clone()),
        plan,
        subjects,
        store: Arc::new(store),
    };
    let direct = &resolved.direct;
    let baseline = LearnerOptions {
        tuning: tuning(&direct.training),
        memory: direct.training.memory,
        dropout: direct.dropout,
        condition_dropout: direct.condition_dropout,
        ..student.clone()
    };
    let given = supervisor
        .as_ref()
        .and_then(|opening| match &opening.tuning {
            Tuning::Given(layers) => Some(layers.clone()),
            Tuning::Lora(_) | Tuning::Full | Tuning::Frozen => None,
        });
    Ok(Prepared {
        context: Arc::new(context),
        models: Models {
            student: opener(student),
            baseline: opener(baseline),
            supervisor: supervisor.map(opener),
            given,
            tokenizer,
        },
        origin,
    })
}

/// What [`preflight`] finds, if nothing stands in the way.
///
/// # Errors
/// With everything that does.
pub(super) async fn ready(
    options: &Options,
    purpose: Purpose,
    has_source: bool,
) -> Result<Preflight> {
    use_threads(options.resolved.threads);
    let options = options.clone();
    blocking("looking at what is needed", move || {
        preflight_with(&options, purpose, has_source).ready()
    })
    .await
}

/// The subjects alone, for a run that has ended.
///
/// # Errors
/// When photos are missing.
pub(super) async fn photos(options: &Options) -> Result<Preflight> {
    let resolved = options.resolved.clone();
    blocking("reading photos", move || {
        let mut found = Preflight::default();
        for subject in &resolved.subjects {
            let (subject, warnings) = references::load(subject)?;
            found.subjects.push(Arc::new(subject));
            found.warnings.extend(warnings);
        }
        Ok(found)
    })
    .await
}

fn student_opening(resolved: &Resolved, student: &Student, dir: PathBuf) -> Result<LearnerOptions> {
    Ok(LearnerOptions {
        dir,
        name: student.model.clone(),
        family: student.family,
        resolution: student.resolution.map(|side| side as u32),
        tuning: tuning(&student.training),
        seed: derive_seed(resolved.seed, "student adapter", 0),
        device: device(student.device)?,
        dtype: student.dtype,
        memory: student.training.memory,
        dropout: student.dropout,
        condition_dropout: student.condition_dropout,
    })
}

fn supervisor_opening(
    resolved: &Resolved,
    supervisor: &Supervisor,
    purpose: Purpose,
) -> Result<LearnerOptions> {
    let tuning = match &supervisor.adapter {
        None => tuning(&supervisor.training),
        // A report opens no model.
        Some(_) if purpose == Purpose::Report => Tuning::Frozen,
        Some(path) => given(path, supervisor.adapter_digest.as_deref())?,
    };
    Ok(LearnerOptions {
        dir: locate(&supervisor.model)?,
        name: supervisor.model.clone(),
        family: supervisor.family,
        resolution: supervisor.resolution.map(|side| side as u32),
        tuning,
        seed: derive_seed(resolved.seed, "supervisor adapter", 0),
        device: device(supervisor.device)?,
        dtype: supervisor.dtype,
        memory: supervisor.training.memory,
        dropout: 0.0,
        condition_dropout: 0.0,
    })
}

/// The adapter at `path` that is a supervisor, if it is the one of this `digest`. Scales are worked into it: so it is kept
/// in the store.
fn given(path: &std::path::Path, digest: Option<&str>) -> Result<Tuning> {
    if Some(crate::files::digest_of(path)?.as_str()) != digest {
        return Err(Error::invalid(
            format!(
                "{}: this is not the adapter of supervisor.adapter_digest",
                path.display()
            ),
            "restore it, or take adapter_digest out of the pipeline file and start a new run",
        ));
    }
    let file = LoraFile::read(path)?;
    file.check_alone()?;
    Ok(Tuning::Given(Arc::new(file.folded()?)))
}

/// How a student is opened for drawing: as for training, without dropout.
pub fn sampler_opening(resolved: &Resolved, student: &LearnerOptions) -> LearnerOptions {
    LearnerOptions {
        tuning: tuning(&resolved.student.training),
        dropout: 0.0,
        condition_dropout: 0.0,
        ..student.clone()
    }
}

/// How the image tokenizer of `student` is opened, and which it is for the proxies of `supervisor`, whose sides may be others.
fn image_tokenizer(
    student: &LearnerOptions,
    supervisor: Option<&LearnerOptions>,
) -> Result<(Arc<OpenTokenizer>, Option<TokenizerIdentity>)> {
    let side = |of: &LearnerOptions| architecture(of.family)?.resolution(&of.dir, of.resolution);
    let learnt = side(student)?;
    let parts = architecture(student.family)?.learner()?.tokenizer;
    let identity = match parts {
        Some(parts) => {
            let (folder, count) = (parts.files)(&student.dir, student.resolution)?;
            let drawn = supervisor.map_or(Ok(learnt), side)?;
            Some(TokenizerIdentity {
                digest: tokens_key(&checkpoint_digest(&folder)?, drawn, learnt),
                count,
            })
        }
        None => None,
    };
    let student = student.clone();
    let open: OpenTokenizer = Box::new(move || match parts {
        Some(parts) => Ok(Box::new(Resizing {
            tokenizer: (parts.open)(&student.dir, student.resolution, &student.device)?,
            side: learnt,
        })),
        None => Err(Error::Invalid {
            what: format!("{} has no image tokenizer", student.family),
            hint: None,
        }),
    });
    Ok((Arc::new(open), identity))
}

fn evaluator(resolved: &Resolved) -> Result<LazyEvaluator> {
    let evaluation = &resolved.evaluation;
    let (clip_dir, dino_dir) = (locate(&evaluation.clip)?, locate(&evaluation.dino)?);
    let clip_config: clip::Config = read_config(&clip_dir.join("config.json"))?;
    let dino_config = vit::Config::read(&dino_dir)?;
    let digest = evaluators_key(&clip_dir, &dino_dir)?;
    let on = device(evaluation.device)?;
    let build = move || -> Result<Box<dyn ImageScorer>> {
        Ok(Box::new(Evaluator {
            clip: ClipEmbedder::load(&clip_dir, &on)?,
            dino: DinoEmbedder::load(&dino_dir, &on)?,
        }))
    };
    Ok(LazyEvaluator::new(
        build,
        digest,
        clip_config.projection_dim,
        dino_config.hidden_size,
    ))
}

/// Where nothing is evaluated, no evaluator has to be there.
fn no_evaluator() -> LazyEvaluator {
    let build = || {
        Err(Error::Invalid {
            what: "an evaluation while proxies alone are made".into(),
            hint: None,
        })
    };
    LazyEvaluator::new(build, String::new(), 0, 0)
}

/// The table of scores of the evaluators that `resolved` names.
///
/// # Errors
/// When their checkpoints or the table cannot be read.
pub fn evaluations<'a>(
    resolved: &'a Resolved,
    store: &'a Store,
) -> BoxFuture<'a, Result<Table<EvaluationRow>>> {
    Box::pin(async move {
        let own = resolved.clone();
        let evaluator = blocking("reading checkpoints", move || evaluator(&own)).await?;
        store
            .evaluations(&evaluator.digest, evaluator.clip, evaluator.dino)
            .await
    })
}

/// Notes in the store where the run stands.
pub(super) async fn note_status(
    context: &Context,
    options: &Options,
    status: RunStatus,
) -> Result<()> {
    let versions = serde_json::json!({
        "proxytune": env!("CARGO_PKG_VERSION"),
        "evaluators": context.evaluator.digest,
        "tokenizer": context.tokenizer.as_ref().map(|tokenizer| tokenizer.digest.clone()),
    });
    let row = RunRow {
        run: context.run.clone(),
        pipeline: options.text.clone(),
        resolved: context.resolved.to_toml()?,
        plan_digest: context.plan.digest().to_string(),
        versions: versions.to_string(),
        status,
        event_us: now_us(),
    };
    context.store.runs().await?.append(&[row]).await?;
    Ok(())
}

/// What scored the images: one sentence for each evaluator.
pub(super) async fn protocol(context: &Context) -> Result<Vec<String>> {
    let silent = Board::default();
    let meter: Meter = silent.meter("report", "");
    context
        .evaluator
        .get()
        .await?
        .call(&meter, |evaluator| Ok(evaluator.protocol()))
        .await
}

/// How the model called `model` is opened to draw with what a folder or file holds: an adapter, or all weights.
///
/// # Errors
/// When the model or the adapter cannot be found or read.
pub fn opening_for(
    model: &str,
    adapter: Option<&std::path::Path>,
    on: Device,
) -> Result<LearnerOptions> {
    let tuning = match adapter {
        None => Tuning::Frozen,
        Some(dir) if dir.join(CHECKPOINT_WEIGHTS).is_file() => Tuning::Full,
        Some(path) => {
            let file = LoraFile::read(path)?;
            file.check_alone()?;
            Tuning::Given(Arc::new(file.layers))
        }
    };
    Ok(LearnerOptions {
        dir: locate(model)?,
        name: model.to_string(),
        family: crate::models::registry::family(model)?,
        resolution: crate::models::registry::known(model)
            .and_then(|known| known.resolution)
            .map(|side| side as u32),
        tuning,
        seed: 0,
        device: device(on)?,
        dtype: Dtype::Auto,
        memory: Memory::Auto,
        dropout: 0.0,
        condition_dropout: 0.0,
    })
}
