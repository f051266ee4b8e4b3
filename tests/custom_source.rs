//! A program's own source of images plugs into a run.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use futures::stream::{self, BoxStream, StreamExt};
use image::{Rgb, RgbImage};
use proxytune::pipeline::{Options, Outcome, run, run_with_source};
use proxytune::stages::Subject;
use proxytune::stages::source::{ImageSource, SourceImage, WantedBatch};
use proxytune::store::{Columns, ProxyRow, Store};
use proxytune::stream::{Meter, Stop};
use proxytune::{Error, Result, files};

#[path = "../examples/custom_source.rs"]
#[allow(dead_code)]
mod example;

async fn proxies(place: &std::path::Path) -> Vec<ProxyRow> {
    let store = Store::open(place.join("store")).await.unwrap();
    let table = store.proxies().await.unwrap();
    table.rows(None, Columns::WithoutPictures).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_example_learns_its_own_images_and_finds_them_again() {
    let place = tempfile::tempdir().unwrap();
    let outcome = example::learn(Some(place.path().into())).await.unwrap();
    assert!(
        outcome
            .dir
            .join("student/adapter_model.safetensors")
            .is_file()
    );
    let names: Vec<&str> = outcome
        .report
        .models
        .iter()
        .map(|m| m.name.as_str())
        .collect();
    assert!(
        names.contains(&"student tuned on a custom source"),
        "{names:?}"
    );
    let rows = proxies(place.path()).await;
    assert_eq!(rows.len(), 16);
    assert!(
        rows[0].prompt.starts_with("a sks dog "),
        "{}",
        rows[0].prompt
    );
    assert!(
        rows[0].settings.starts_with("{\"setting\":"),
        "{}",
        rows[0].settings
    );
    let digest = || files::digest_dir(&outcome.dir.join("student")).unwrap();
    let before = digest();
    let again = example::learn(Some(place.path().into())).await.unwrap();
    let synthesized = |outcome: &Outcome| {
        let stage = outcome
            .summary
            .stages
            .iter()
            .find(|s| s.stage == "synthesize");
        stage.map(|stage| (stage.done, stage.reused)).unwrap()
    };
    assert_eq!(synthesized(&outcome), (16, 0));
    assert_eq!(synthesized(&again), (16, 16));
    assert_eq!(digest(), before);
}

/// Images of one colour each; fails from the image `fails_at` on.
struct Colours {
    made: AtomicUsize,
    fails_at: usize,
}

impl Colours {
    fn new(fails_at: usize) -> Arc<Self> {
        Arc::new(Self {
            made: AtomicUsize::new(0),
            fails_at,
        })
    }
}

impl ImageSource for Colours {
    fn key(&self, _: &Subject) -> String {
        "colours".into()
    }

    fn images<'a>(
        &'a self,
        wanted: &'a WantedBatch,
        _: &'a Meter,
    ) -> BoxStream<'a, Result<SourceImage>> {
        let images = wanted.images.iter().map(|wanted| {
            if self.made.fetch_add(1, SeqCst) >= self.fails_at {
                return Err(Error::invalid("the camera is off", "turn it on"));
            }
            let [r, g, b, ..] = wanted.seed.to_le_bytes();
            Ok(SourceImage {
                image: RgbImage::from_pixel(32, 32, Rgb([r, g, b])),
                prompt: wanted.prompt.clone(),
                settings: "{}".into(),
            })
        });
        stream::iter(images).boxed()
    }
}

const PIPELINE: &str = r#"
[subject.dog1]
images = "datasets/nano/subjects/dog1"
class = "dog"

[proxies]
count = 12

[student]
model = "nano-llamagen"
source = "custom"
steps = 6
batch_size = 4

[evaluation]
prompts = ["a {token} {class} in the snow"]
images_per_prompt = 1
untouched = false
"#;

fn options(place: &std::path::Path, sequential: bool) -> Options {
    let mut options = Options::new("colours.toml", PIPELINE, &[]).unwrap();
    options.store = Some(place.join("store"));
    options.out = place.join("runs");
    options.sequential = sequential;
    options
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_fails_stops_the_run_and_the_next_run_asks_for_the_rest_alone() {
    let (place, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let one_after_another = options(other.path(), true);
    let whole = run_with_source(&one_after_another, Colours::new(99), Stop::default())
        .await
        .unwrap();
    let failing = options(place.path(), false);
    let error = run_with_source(&failing, Colours::new(6), Stop::default())
        .await
        .unwrap_err();
    assert_eq!(error.to_string(), "stage synthesize: the camera is off");
    let kept = proxies(place.path()).await.len();
    assert!(kept <= 4, "{kept}");
    let rest = Colours::new(99);
    let finished = run_with_source(&failing, rest.clone(), Stop::default())
        .await
        .unwrap();
    assert_eq!(rest.made.load(SeqCst), 12 - kept);
    // Streaming, stopped and gone on with gives what one stage after another gives.
    let student = |outcome: &Outcome| files::digest_dir(&outcome.dir.join("student")).unwrap();
    assert_eq!(student(&finished), student(&whole));
    let keys = |rows: Vec<ProxyRow>| rows.into_iter().map(|row| row.key).collect::<BTreeSet<_>>();
    assert_eq!(
        keys(proxies(place.path()).await),
        keys(proxies(other.path()).await)
    );
}

#[tokio::test]
async fn a_source_and_a_pipeline_that_do_not_belong_together_are_refused_before_anything_is_made() {
    let place = tempfile::tempdir().unwrap();
    let error = run(&options(place.path(), false), Stop::default())
        .await
        .unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("student.source: a program brings the images"),
        "{text}"
    );
    let mut of_photos = options(place.path(), false);
    of_photos.resolved.student.source = proxytune::config::Source::References;
    of_photos.resolved.proxies = None;
    let run = run_with_source(&of_photos, Colours::new(9), Stop::default());
    let text = run.await.unwrap_err().to_string();
    assert!(text.contains("does not learn from the source"), "{text}");
    assert!(!place.path().join("store").exists());
    // What would have no effect is said.
    let beside = [
        (
            "[supervisor]\nmodel = \"nano-sd3\"\n",
            "no effect beside a custom source",
        ),
        ("[direct]\nsource = \"custom\"\n", "would not be direct"),
    ];
    for (section, fault) in beside {
        let text = format!("{PIPELINE}{section}");
        let error = Options::new("colours.toml", text, &[])
            .unwrap_err()
            .to_string();
        assert!(error.contains(fault), "{error}");
    }
    let sampled = ["proxies.num_inference_steps=3".to_string()];
    let error = Options::new("colours.toml", PIPELINE, &sampled)
        .unwrap_err()
        .to_string();
    assert!(error.contains("no effect on a custom source"), "{error}");
    let resolved = Options::new("colours.toml", PIPELINE, &[])
        .unwrap()
        .resolved;
    let text = resolved.to_toml().unwrap();
    let again = Options::new("colours.toml", text.as_str(), &[])
        .unwrap()
        .resolved;
    assert_eq!(again, resolved);
}
