//! Stand-ins for models, and what a stage needs around them: its tests run it alone, over a store in memory.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use candle_core::{Device, Tensor, Var};
use futures::stream::BoxStream;
use futures::{Stream, StreamExt, stream};
use image::{Rgb, RgbImage};
use rand_chacha::ChaCha8Rng;

use super::source::{ImageSource, SourceImage, WantedBatch};
use super::{
    Lazy, LazyEvaluator, LazyLearner, Log, OpenLearner, ProxyKeys, Subject, Subjects,
    TokenizerIdentity, Warnings,
};
use crate::config::{Document, Resolved, Sampling};
use crate::evaluation::embed::{Embeddings, ImageScorer};
use crate::evaluation::metrics::Scores;
use crate::models::{Example, ImageTokenizer, Learner, Request, TrainingExample};
use crate::plan::{Plan, Versions};
use crate::store::{Limits, Store, Writer};
use crate::stream::{Board, Stop};
use crate::{Error, Result, files};

/// Side of every fake image in pixels.
const SIDE: u32 = 8;
/// Hangs become failures.
const PATIENCE: Duration = Duration::from_secs(60);

/// What fake models have done, and when they are to fail or to wait.
#[derive(Default)]
pub(crate) struct Work {
    pub opened: AtomicUsize,
    /// Images drawn.
    pub drawn: AtomicUsize,
    /// Images encoded by learners, and by tokenizers.
    pub encoded: AtomicUsize,
    /// Batches whose loss was computed.
    pub losses: AtomicUsize,
    /// Images embedded.
    pub embedded: AtomicUsize,
    /// The prompts of all examples learnt, in their order.
    pub learnt: Mutex<Vec<String>>,
    /// Fails from this many drawn images on; 0: never.
    pub fails_after: AtomicUsize,
    /// Tokenizers and scorers wait while this is closed.
    pub gate: Gate,
}

/// Open until it is closed.
#[derive(Default)]
pub(crate) struct Gate {
    closed: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    pub fn close(&self) {
        *self.closed.lock().unwrap() = true;
    }

    pub fn open(&self) {
        *self.closed.lock().unwrap() = false;
        self.opened.notify_all();
    }

    fn pass(&self) {
        let closed = self.closed.lock().unwrap();
        drop(self.opened.wait_while(closed, |closed| *closed).unwrap());
    }
}

impl Work {
    /// All that learners were asked to compute: none of it is done for what the store has.
    pub fn of_learners(&self) -> [usize; 4] {
        [&self.opened, &self.drawn, &self.encoded, &self.losses].map(|count| count.load(SeqCst))
    }
}

/// A learner of two weights, which draws one colour for each seed.
pub(crate) struct FakeLearner {
    work: Arc<Work>,
    weights: Var,
}

const WEIGHTS: &str = "layer.weight";
const ADAPTER: &str = "fake.safetensors";

impl Learner for FakeLearner {
    fn resolution(&self) -> u32 {
        SIDE
    }

    fn encode(&mut self, images: &[RgbImage]) -> Result<Vec<Example>> {
        self.work.encoded.fetch_add(images.len(), SeqCst);
        let first = |image: &RgbImage| Example::Tokens(vec![image.get_pixel(0, 0).0[0].into()]);
        Ok(images.iter().map(first).collect())
    }

    fn loss(&mut self, batch: &[TrainingExample], _: &mut ChaCha8Rng) -> Result<Tensor> {
        self.work.losses.fetch_add(1, SeqCst);
        let prompts = batch.iter().map(|pair| pair.prompt.clone());
        self.work.learnt.lock().unwrap().extend(prompts);
        let tokens = batch.iter().map(|pair| match &pair.example {
            Example::Tokens(tokens) => f64::from(tokens[0]),
            Example::Latents { .. } => unreachable!(),
        });
        let mean = tokens.sum::<f64>() / batch.len() as f64;
        let wanted = (self.weights.as_tensor() - mean / 255.0)?;
        Ok(wanted.sqr()?.mean_all()?)
    }

    fn generate(&mut self, requests: &[Request], _: &Sampling) -> Result<Vec<RgbImage>> {
        let drawn = self.work.drawn.fetch_add(requests.len(), SeqCst) + requests.len();
        let limit = self.work.fails_after.load(SeqCst);
        if limit > 0 && drawn > limit {
            return Err(Error::invalid("the model is broken", "mend it"));
        }
        Ok(requests
            .iter()
            .map(|request| picture(request.seed))
            .collect())
    }

    fn variables(&self) -> Vec<(String, Var)> {
        vec![(WEIGHTS.to_string(), self.weights.clone())]
    }

    fn save(&self, dir: &Path, values: &BTreeMap<String, Tensor>) -> Result<()> {
        files::write_tensors(&dir.join(ADAPTER), values, &[])
    }

    fn read(&self, dir: &Path) -> Result<BTreeMap<String, Tensor>> {
        Ok(files::read_tensors(&dir.join(ADAPTER))?.0)
    }
}

/// The picture that a fake model draws with `seed`.
pub(crate) fn picture(seed: u64) -> RgbImage {
    let [r, g, b, ..] = seed.to_le_bytes();
    RgbImage::from_pixel(SIDE, SIDE, Rgb([r, g, b]))
}

struct FakeTokenizer(Arc<Work>);

impl ImageTokenizer for FakeTokenizer {
    fn encode(&self, images: &[RgbImage]) -> Result<Vec<Vec<u32>>> {
        self.0.gate.pass();
        self.0.encoded.fetch_add(images.len(), SeqCst);
        let tokens = |image: &RgbImage| image.get_pixel(0, 0).0.map(u32::from);
        Ok(images
            .iter()
            .map(|image| [tokens(image).as_slice(), &[7]].concat())
            .collect())
    }
}

struct FakeScorer(Arc<Work>);

impl ImageScorer for FakeScorer {
    fn embed(&self, images: &[RgbImage]) -> Result<Embeddings> {
        self.0.gate.pass();
        self.0.embedded.fetch_add(images.len(), SeqCst);
        let first = |image: &RgbImage| image.get_pixel(0, 0).0.map(f32::from)[..2].to_vec();
        let embedded: Vec<Vec<f32>> = images.iter().map(first).collect();
        Ok(Embeddings {
            clip: embedded.clone(),
            dino: embedded,
        })
    }

    fn score(
        &self,
        _: &Embeddings,
        generated: &Embeddings,
        texts: &[String],
    ) -> Result<Vec<Scores>> {
        assert_eq!(generated.clip.len(), texts.len());
        let score = |text: &String| Scores {
            clip_i: 0.5,
            clip_t: text.len() as f64 / 1000.0,
            dino: 0.25,
        };
        Ok(texts.iter().map(score).collect())
    }

    fn protocol(&self) -> Vec<String> {
        vec!["fake".into()]
    }
}

/// A program's own source, which captions its images itself.
pub(crate) struct FakeSource(pub Arc<Work>);

impl ImageSource for FakeSource {
    fn key(&self, subject: &Subject) -> String {
        format!("fake source of {}", subject.name)
    }

    fn images<'a>(
        &'a self,
        wanted: &'a WantedBatch,
        _: &'a crate::stream::Meter,
    ) -> BoxStream<'a, Result<SourceImage>> {
        let made = wanted.images.iter().map(|wanted| {
            self.0.drawn.fetch_add(1, SeqCst);
            Ok(SourceImage {
                image: picture(wanted.seed),
                prompt: format!("{} number {}", wanted.prompt, wanted.index),
                settings: "{}".into(),
            })
        });
        stream::iter(made).boxed()
    }
}

/// What stages of one run need, with fake models.
pub(crate) struct Fakes {
    pub resolved: Resolved,
    pub plan: Arc<Plan>,
    pub subjects: Subjects,
    pub store: Arc<Store>,
    pub work: Arc<Work>,
    pub board: Board,
    pub stop: Stop,
    pub warnings: Warnings,
    pub dir: tempfile::TempDir,
}

impl Fakes {
    /// The smoke pipeline with `overrides` and the two subjects `dog1` and `cat1`, over an empty store in memory.
    pub async fn new(overrides: &[&str]) -> Self {
        Self::over(Arc::new(Store::open("memory://").await.unwrap()), overrides)
    }

    /// The same over `store`.
    fn over(store: Arc<Store>, overrides: &[&str]) -> Self {
        let second = ["subject.cat1.images=any", "subject.cat1.class=cat"];
        let text = std::fs::read_to_string("pipelines/nano-smoke.toml").unwrap();
        Self::resolved(store, &text, &[&second, overrides].concat())
    }

    /// The pipeline `text` with `overrides`, over an empty store in memory.
    pub async fn of(text: &str, overrides: &[&str]) -> Self {
        let store = Arc::new(Store::open("memory://").await.unwrap());
        Self::resolved(store, text, overrides)
    }

    fn resolved(store: Arc<Store>, text: &str, overrides: &[&str]) -> Self {
        let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
        let document = Document::parse(text, "fake.toml", &overrides, &crate::models::Registry);
        let resolved = document.resolve().unwrap();
        let subject = |subject: &crate::config::Subject| {
            let images: Vec<RgbImage> = (1..=3).map(picture).collect();
            let name = &subject.name;
            Arc::new(Subject {
                name: name.clone(),
                class: subject.class.clone(),
                token: subject.token.clone(),
                digests: (1..=3).map(|photo| format!("{name} {photo}")).collect(),
                files: (1..=3).map(|photo| format!("{photo}.png")).collect(),
                whole: images.clone(),
                captions: vec![None; images.len()],
                images,
            })
        };
        let subjects: Subjects = Arc::new(resolved.subjects.iter().map(subject).collect());
        let counts: Vec<(String, usize)> = subjects
            .iter()
            .map(|subject| (subject.name.clone(), subject.images.len()))
            .collect();
        Self {
            plan: Arc::new(Plan::new(&resolved, &counts).unwrap()),
            resolved,
            subjects,
            store,
            work: Arc::default(),
            board: Board::default(),
            stop: Stop::default(),
            warnings: Warnings::default(),
            dir: tempfile::tempdir().unwrap(),
        }
    }

    /// A second run over the same store: what it does is counted anew.
    pub fn again(&self, overrides: &[&str]) -> Self {
        Self::over(self.store.clone(), overrides)
    }

    pub async fn log(&self, stage: &str) -> Log {
        let metrics = self.store.metrics().await.unwrap();
        Log {
            run: "run".into(),
            meter: self.board.meter(stage, "items"),
            stop: self.stop.clone(),
            warnings: self.warnings.clone(),
            metrics: Arc::new(Writer::with_limits(metrics, Limits::default())),
        }
    }

    pub fn learner(&self) -> OpenLearner {
        let work = self.work.clone();
        Arc::new(move || {
            work.opened.fetch_add(1, SeqCst);
            let weights = Tensor::new(&[0.25f32, 0.75], &Device::Cpu)?;
            Ok(Box::new(FakeLearner {
                work: work.clone(),
                weights: Var::from_tensor(&weights)?,
            }))
        })
    }

    pub fn sampler(&self) -> LazyLearner {
        Lazy::new("sampler", "the fake model".into(), self.learner())
    }

    pub fn tokenizer(&self) -> (TokenizerIdentity, Arc<super::tokenize::OpenTokenizer>) {
        let work = self.work.clone();
        let identity = TokenizerIdentity {
            digest: "70ce".repeat(16),
            count: 4,
        };
        let open: super::tokenize::OpenTokenizer =
            Box::new(move || Ok(Box::new(FakeTokenizer(work.clone()))));
        (identity, Arc::new(open))
    }

    pub fn evaluator(&self) -> LazyEvaluator {
        let work = self.work.clone();
        let open =
            move || -> Result<Box<dyn ImageScorer>> { Ok(Box::new(FakeScorer(work.clone()))) };
        LazyEvaluator::new(open, "e7a1".repeat(16), 2, 2)
    }

    pub fn scorer(&self) -> super::score::Scorer {
        super::score::Scorer {
            subjects: self.subjects.clone(),
            store: self.store.clone(),
            evaluator: self.evaluator(),
            run: "run".into(),
        }
    }

    /// Keys of the proxies, as supervisors with the keys `supervisor 0`, `supervisor 1` … make them.
    pub fn keys(&self) -> ProxyKeys {
        let key = |subject| Versions::new(format!("supervisor {subject}"), Vec::new());
        ProxyKeys {
            plan: self.plan.clone(),
            sources: (0..self.subjects.len()).map(key).collect(),
            sampling: self.resolved.proxies.as_ref().unwrap().sampling.clone(),
        }
    }

    /// Batch `number` of the plan, just made.
    pub fn batch(&self, number: usize) -> super::ProxyBatch {
        let planned = &self.plan.proxies()[self.plan.batch(number).numbers.clone()];
        let caption = |proxy: &crate::plan::Proxy| super::Caption {
            prompt: proxy.prompt.clone(),
            settings: "{}".into(),
        };
        super::ProxyBatch {
            batch: number,
            keys: self.keys().known(number).newest().clone(),
            made: Some(super::Made {
                images: Arc::new(planned.iter().map(|proxy| picture(proxy.seed)).collect()),
                captions: Arc::new(planned.iter().map(caption).collect()),
            }),
            claim: None,
        }
    }

    /// Every batch of the plan, just made, in its order.
    pub fn batches(&self) -> Vec<super::ProxyBatch> {
        (0..self.plan.batches())
            .map(|number| self.batch(number))
            .collect()
    }

    pub async fn keep(&self) -> super::keep::Keep {
        super::keep::Keep {
            plan: self.plan.clone(),
            subjects: self.subjects.clone(),
            sources: vec!["supervisor 0".into(), "supervisor 1".into()],
            store: self.store.clone(),
            policy: super::keep::CommitPolicy::at_once(),
            log: self.log("keep").await,
        }
    }

    /// Commits all batches, and gives them as they come out: without pixels.
    pub async fn kept(&self) -> Vec<super::ProxyBatch> {
        let kept = self.keep().await.run(stream::iter(self.batches()));
        let mut kept = all(kept).await.unwrap();
        kept.iter_mut().for_each(|batch| batch.made = None);
        kept
    }
}

/// What comes out of a stage, or the error with which it ends.
pub(crate) async fn all<T>(stage: impl Stream<Item = Result<T>>) -> Result<Vec<T>> {
    let mut stage = std::pin::pin!(stage);
    let mut items = Vec::new();
    while let Some(item) = next(&mut stage).await {
        items.push(item?);
    }
    Ok(items)
}

/// The next item of a stage.
pub(crate) async fn next<S: Stream + Unpin>(stage: &mut S) -> Option<S::Item> {
    let next = tokio::time::timeout(PATIENCE, stage.next());
    next.await.expect("the stage hangs")
}

/// Waits until `count` is `expected`, and sees that it stays so.
pub(crate) async fn settles(count: impl Fn() -> usize, expected: usize, what: &str) {
    let start = std::time::Instant::now();
    while count() < expected {
        assert!(
            start.elapsed() < PATIENCE,
            "{what}: {} of {expected}",
            count()
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(count(), expected, "{what}");
}

/// Sources of all subjects: supervisors whose adapters lie in the folder of `fakes`.
pub(crate) fn supervisors(fakes: &Fakes, sampler: &LazyLearner) -> Vec<super::source::ReadySource> {
    let of = |subject: usize| {
        let adapter = fakes.dir.path().join(format!("adapter {subject}"));
        std::fs::create_dir_all(&adapter).unwrap();
        let values = Tensor::new(&[subject as f32, 1.0], &Device::Cpu).unwrap();
        let values = [(WEIGHTS.to_string(), values)].into();
        files::write_tensors(&adapter.join(ADAPTER), &values, &[]).unwrap();
        super::source::ReadySource {
            subject,
            adapter: Some(adapter.clone()),
            images: Arc::new(super::source::SupervisorSource {
                key: format!("supervisor {subject}"),
                sampler: sampler.clone(),
                adapter,
                values: Arc::default(),
                sampling: fakes.keys().sampling.unwrap(),
                foreseen: Arc::default(),
            }),
        }
    };
    (0..fakes.subjects.len()).map(of).collect()
}

/// Values of the weights, as a checkpoint has them.
pub(crate) fn values(first: f32) -> Arc<BTreeMap<String, Tensor>> {
    let values = Tensor::new(&[first, 1.0], &Device::Cpu).unwrap();
    Arc::new([(WEIGHTS.to_string(), values)].into())
}
