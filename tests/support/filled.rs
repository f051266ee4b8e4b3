//! A store as runs leave it, made quickly: proxies whose embeddings lie around the centres of their prompts.

use std::path::Path;

use arrow::array::{AsArray, RecordBatch};
use arrow::datatypes::Int64Type;
use image::{Rgb, RgbImage};
use proxytune::images::{encode_png, pixel_digest};
use proxytune::store::query::Snapshot;
use proxytune::store::{
    EvaluationRow, Method, MetricRow, MetricStage, PictureKind, ProxyRow, RunRow, RunStatus, Store,
    TokenRow,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tempfile::TempDir;

use crate::support::{Said, find, program, say};

pub const EVALUATORS: &str = "e0e0e0e0e0e0e0e0e0e0e0e0";
pub const TOKENIZER: &str = "70707070707070707070";
/// Prompts, each with a centre of embeddings.
pub const PROMPTS: u64 = 50;
const BATCH: u64 = 1000;

/// Lengths of the embeddings.
#[derive(Clone, Copy)]
pub struct Widths {
    pub clip: usize,
    pub dino: usize,
}

pub const SMALL: Widths = Widths { clip: 16, dino: 24 };

pub fn key(number: u64) -> String {
    blake3::hash(&number.to_le_bytes()).to_hex().to_string()
}

fn vector(width: usize, kind: u64, number: u64) -> Vec<f32> {
    let draw = |seed: u64| {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        (0..width)
            .map(|_| random.random_range(-1.0..1.0f32))
            .collect::<Vec<_>>()
    };
    let (centre, own) = (
        draw(kind * 1000 + number % PROMPTS),
        draw(kind * 1_000_000 + 500 + number),
    );
    centre
        .iter()
        .zip(own)
        .map(|(centre, own)| centre + 0.6 * own)
        .collect()
}

pub fn clip_of(widths: Widths, number: u64) -> Vec<f32> {
    vector(widths.clip, 1, number)
}

pub fn dino_of(widths: Widths, number: u64) -> Vec<f32> {
    vector(widths.dino, 2, number)
}

pub fn proxy(number: u64) -> ProxyRow {
    let mut random = ChaCha8Rng::seed_from_u64(number);
    let picture = RgbImage::from_fn(32, 32, |x, y| {
        Rgb([
            (x * 8) as u8,
            (y * 8) as u8,
            random.random_range(0..64) + (number % 190) as u8,
        ])
    });
    ProxyRow {
        key: key(number),
        supervisor: "5".repeat(64),
        run: "nano-1".into(),
        subject: format!("dog{}", number % 4),
        class: "dog".into(),
        token: "sks".into(),
        number: number / 4,
        prompt: format!("a sks dog in place {}", number % PROMPTS),
        seed: u64::MAX - number,
        settings: r#"{"guidance_scale":2.0,"num_inference_steps":12}"#.into(),
        width: 32,
        height: 32,
        content: pixel_digest(&picture),
        image: encode_png(&picture).unwrap(),
        created_us: 1_700_000_000_000_000 + number as i64,
    }
}

pub fn evaluation(widths: Widths, number: u64) -> EvaluationRow {
    let proxy = proxy(number);
    EvaluationRow {
        key: proxy.key,
        kind: PictureKind::Proxy,
        run: proxy.run,
        method: Some(Method::Supervisor),
        step: 0,
        subject: proxy.subject,
        prompt: proxy.prompt,
        seed: proxy.seed,
        clip_i: Some((number % 100) as f32 / 100.0),
        clip_t: Some((number % 37) as f32 / 37.0),
        dino: Some((number % 61) as f32 / 61.0),
        clip_embedding: Some(clip_of(widths, number)),
        dino_embedding: Some(dino_of(widths, number)),
        image: None,
        created_us: 7,
        adapter: None,
    }
}

/// Adds proxies, their scores, embeddings and tokens.
pub async fn add(store: &Store, widths: Widths, numbers: std::ops::Range<u64>) {
    let proxies = store.proxies().await.unwrap();
    let evaluations = store
        .evaluations(EVALUATORS, widths.clip, widths.dino)
        .await
        .unwrap();
    let tokens = store.tokens(TOKENIZER, 64).await.unwrap();
    for start in numbers.clone().step_by(BATCH as usize) {
        let part = start..numbers.end.min(start + BATCH);
        let rows: Vec<ProxyRow> = part.clone().map(proxy).collect();
        proxies.append(&rows).await.unwrap();
        let token = |row: &ProxyRow| TokenRow {
            key: row.key.clone(),
            content: row.content.clone(),
            grid_height: 8,
            grid_width: 8,
            tokens: (0..64)
                .map(|i| (i * 97 + row.number as u32) % 512)
                .collect(),
            run: row.run.clone(),
            created_us: 7,
        };
        tokens
            .append(&rows.iter().map(token).collect::<Vec<_>>())
            .await
            .unwrap();
        let scored: Vec<EvaluationRow> = part.map(|number| evaluation(widths, number)).collect();
        evaluations.append(&scored).await.unwrap();
    }
}

/// A store of `count` proxies with the runs and curves of two runs that differ in one setting.
pub async fn store(dir: &Path, widths: Widths, count: u64) -> Store {
    let store = Store::open(dir).await.unwrap();
    add(&store, widths, 0..count).await;
    let runs = store.runs().await.unwrap();
    let row = |run: &str, steps: usize, status, event_us| RunRow {
        run: run.into(),
        pipeline: format!("seed = 7\n[student]\nsteps = {steps}\n"),
        resolved: format!(
            "seed = 7\n[student]\nmodel = \"nano-llamagen\"\nsteps = {steps}\n[evaluation]\nclip = \"nano-clip\"\ndino = \"nano-dino\"\n"
        ),
        plan_digest: "a".repeat(64),
        versions: format!(r#"{{"proxytune":"0.1.0","evaluators":"{EVALUATORS}"}}"#),
        status,
        event_us,
    };
    let rows = [
        row("nano-1", 200, RunStatus::Started, 1_000_000),
        row("nano-1", 200, RunStatus::Complete, 61_000_000),
        row("nano-2", 100, RunStatus::Started, 70_000_000),
        row("nano-2", 100, RunStatus::Interrupted, 90_000_000),
    ];
    runs.append(&rows).await.unwrap();
    let metrics = store.metrics().await.unwrap();
    let point = |step: u64| MetricRow {
        run: "nano-1".into(),
        stage: MetricStage::Train,
        step,
        name: "loss".into(),
        value: 1.0 / (step + 1) as f64,
        created_us: 3,
    };
    metrics
        .append(&(0..200).map(point).collect::<Vec<_>>())
        .await
        .unwrap();
    store
}

/// A store of `count` proxies with short embeddings.
pub async fn small_store(count: u64) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    store(dir.path(), SMALL, count).await;
    dir
}

/// The rows that `sql` answers, from code.
pub async fn ask(dir: &Path, sql: &str) -> RecordBatch {
    let snapshot = Snapshot::open(dir, None).await.unwrap();
    let answer = snapshot.sql(sql).await.unwrap();
    let schema = answer.schema.clone();
    arrow::compute::concat_batches(&schema, &answer.all().await.unwrap()).unwrap()
}

/// The one number that `sql` answers.
pub async fn count(dir: &Path, sql: &str) -> i64 {
    let batch = ask(dir, sql).await;
    assert_eq!(batch.num_rows(), 1, "{sql}");
    batch.column(0).as_primitive::<Int64Type>().value(0)
}

/// `proxytune query` with `arguments`.
pub fn asked(dir: &Path, arguments: &[&str]) -> Said {
    let mut command = program();
    command.arg("query").args(arguments).arg("--store").arg(dir);
    say(command)
}

/// Every file and folder below `dir` with its size.
pub fn files_of(dir: &Path) -> Vec<(String, u64)> {
    let mut files: Vec<(String, u64)> = find(dir, &|_| true)
        .into_iter()
        .map(|path| (path.display().to_string(), path.metadata().unwrap().len()))
        .collect();
    files.sort();
    files
}
