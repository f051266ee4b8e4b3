//! Proxies alone: however many processes make them and however these end, the store comes to hold what one undisturbed
//! process makes, once.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use proxytune::config::Document;
use proxytune::files;
use proxytune::pipeline::{Generated, Generation, Options, generate};
use proxytune::stages::disk::FreeSpace;
use proxytune::store::{Columns, Store};
use proxytune::stream::Stop;

use crate::support;
use crate::support::{Place, Running, SMOKE, find, program};

/// A second subject beside that of the smoke pipeline.
const CAT: [&str; 2] = [
    "subject.cat1.images=datasets/nano/subjects/cat1",
    "subject.cat1.class=cat",
];

fn generation(place: &Place, overrides: &[&str], shard: &str) -> Generation {
    let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
    let text = std::fs::read_to_string(SMOKE).unwrap();
    let document = Document::parse(&text, SMOKE, &overrides, &proxytune::models::Registry);
    Generation {
        options: Options {
            pipeline: SMOKE.into(),
            resolved: document.for_proxies(false).resolve().unwrap(),
            text,
            store: Some(place.store()),
            out: place.out(),
            new: false,
            sequential: false,
            progress: false,
        },
        shard: shard.parse().unwrap(),
        tokens: false,
        keep_free: 0,
        free_space: files::free_space,
    }
}

async fn make(place: &Place, overrides: &[&str], shard: &str) -> proxytune::Result<Generated> {
    generate(&generation(place, overrides, shard), Stop::default()).await
}

/// The command that makes the proxies of the smoke pipeline here.
fn command(place: &Place, overrides: &[&str], arguments: &[&str]) -> Command {
    let mut command = program();
    command.args(["generate", SMOKE, "--keep-free", "0", "--store"]);
    command.arg(place.store()).arg("--out").arg(place.out());
    for text in overrides {
        command.args(["--set", text]);
    }
    command.args(arguments);
    command
}

/// What a store holds of proxies and supervisors: the rows' digest, how many rows Lance has, and the adapters' files
/// by their names.
async fn held(place: &Place) -> (String, usize, Vec<(PathBuf, Vec<u8>)>) {
    let table = place.proxies().await;
    let rows = lance::Dataset::open(table.path().to_str().unwrap()).await;
    let rows = rows.unwrap().count_rows(None).await.unwrap();
    let adapters = place.store().join("adapters");
    let weights = find(&adapters, &|name| name.ends_with(".safetensors"));
    let weights = weights.into_iter().map(|path| {
        let bytes = std::fs::read(&path).unwrap();
        (path.strip_prefix(&adapters).unwrap().to_path_buf(), bytes)
    });
    (table.digest().await.unwrap(), rows, weights.collect())
}

/// Training steps of supervisors that `generated` took itself.
fn steps(generated: &Generated) -> u64 {
    let supervise = |stage: &&proxytune::stream::StageReport| stage.stage == "supervise";
    let report = generated.stages.iter().find(supervise).unwrap();
    report.done - report.reused
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shards_that_race_fill_the_store_as_one_process_does_and_train_each_supervisor_once() {
    for (subjects, more) in [(1, &[][..]), (2, &CAT[..])] {
        let overrides = [more, &["proxies.count=30"]].concat();
        let (alone, shared) = (Place::new(), Place::new());
        let single = make(&alone, &overrides, "1/1").await.unwrap();
        assert_eq!(
            (single.planned, single.made),
            (30 * subjects, 30 * subjects)
        );
        assert_eq!(steps(&single), 4 * subjects as u64);
        let (first, second) = tokio::join!(
            make(&shared, &overrides, "1/2"),
            make(&shared, &overrides, "2/2")
        );
        let (first, second) = (first.unwrap(), second.unwrap());
        assert_eq!(
            first.made + second.made,
            30 * subjects,
            "nothing is made twice"
        );
        assert_eq!(steps(&first) + steps(&second), 4 * subjects as u64);
        assert_eq!(held(&shared).await, held(&alone).await);
        assert_eq!(held(&shared).await.1, 30 * subjects);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_killed_shards_leave_is_taken_up_and_restarted_ones_go_on() {
    const COUNT: usize = 300;
    let overrides = ["proxies.count=300"];
    let (alone, shared) = (Place::new(), Place::new());
    make(&alone, &overrides, "1/1").await.unwrap();
    let versions = shared.store().join("proxies.lance/_versions");
    let commits = || find(&versions, &|name| name.ends_with(".manifest")).len();
    // Twice the first shard is killed just after a commit, with batches in hand.
    for _ in 0..2 {
        let known = commits();
        let mut first = Running::start(command(&shared, &overrides, &["--shard", "1/2"]));
        let committed = first.runs_until(|| commits() > known);
        assert!(committed, "it ended too early");
        first.kill();
    }
    let before = shared.proxies().await.count();
    let second = make(&shared, &overrides, "2/2").await.unwrap();
    assert_eq!((second.found, second.made), (before, COUNT - before));
    assert_eq!(held(&shared).await, held(&alone).await);
    assert_eq!(held(&shared).await.1, COUNT);
    let again = make(&shared, &overrides, "1/2").await.unwrap();
    assert_eq!((again.found, again.made), (COUNT, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_supervisor_goes_on_from_the_checkpoints_of_a_killed_process() {
    let overrides = ["supervisor.steps=60", "proxies.count=4"];
    let (alone, shared) = (Place::new(), Place::new());
    make(&alone, &overrides, "1/1").await.unwrap();
    let mut first = Running::start(command(&shared, &overrides, &["--shard", "1/2"]));
    let training = shared.store().join("training");
    let number = |name: &str| name.strip_prefix("checkpoint-")?.parse::<usize>().ok();
    let late = |name: &str| number(name).is_some_and(|step| step >= 10);
    assert!(first.runs_until(|| !find(&training, &late).is_empty()));
    first.kill();
    let second = make(&shared, &overrides, "2/2").await.unwrap();
    assert!(steps(&second) <= 50, "it began afresh: {second:?}");
    assert_eq!(held(&shared).await, held(&alone).await);
    assert!(
        find(&training, &|_| true).is_empty(),
        "nothing stays behind"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_kill_left_of_a_publication_goes_and_one_in_progress_stays() {
    let place = Place::new();
    let adapters = place.store().join("adapters");
    let (left, going_on) = (
        adapters.join(".abc.4000000.tmp"),
        adapters.join(".def.7.tmp"),
    );
    for dir in [&left, &going_on] {
        std::fs::create_dir_all(dir).unwrap();
        std::fs::write(dir.join("adapter_model.safetensors"), "half").unwrap();
    }
    let store = Store::open(place.store()).await.unwrap();
    let _claim = store.locks().try_claim("supervisors/def").unwrap().unwrap();
    make(&place, &[], "1/1").await.unwrap();
    assert!(!left.exists());
    assert!(going_on.exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_made_twice_and_a_run_finds_all_proxies() {
    let place = Place::new();
    let first = make(&place, &[], "1/1").await.unwrap();
    assert_eq!((first.planned, first.found, first.made), (12, 0, 12));
    let again = make(&place, &[], "1/1").await.unwrap();
    assert_eq!((again.found, again.made), (12, 0));
    let more = make(&place, &["proxies.count=20"], "1/1").await.unwrap();
    assert_eq!((more.found, more.made), (12, 8));
    let table = place.proxies().await;
    let before = table.digest().await.unwrap();
    let outcome = place.run(&["proxies.count=20"], false).await.unwrap();
    for stage in ["synthesize", "keep"] {
        let report = outcome.summary.stages.iter().find(|s| s.stage == stage);
        let report = report.unwrap();
        assert_eq!((report.done, report.reused), (20, 20), "{stage}");
    }
    table.refresh().await.unwrap();
    assert_eq!(table.digest().await.unwrap(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pipeline_without_a_student_generates_and_with_one_gets_tokens_too() {
    let place = Place::new();
    let file = place.path().join("proxies.toml");
    let text = std::fs::read_to_string(SMOKE).unwrap();
    let head = text.split("[student]").next().unwrap();
    std::fs::write(&file, head).unwrap();
    let run = |arguments: &[&str]| {
        let mut command = program();
        command.arg("generate").arg(&file).args(["--store"]);
        command.arg(place.store()).arg("--out").arg(place.out());
        command.args(["--keep-free", "0"]).args(arguments);
        support::say(command)
    };
    let said = run(&["--count", "5"]);
    said.says(0, &["5 proxies of 32x32 pixels will need about"]);
    assert!(
        said.out
            .contains("all 5 proxies are in the store: 0 were there, 5 made here"),
        "{said:?}"
    );
    run(&["--tokens"]).says(2, &["there is no [student]"]);
    // The tokens of what is there already, and no more images.
    std::fs::write(&file, &text).unwrap();
    let said = run(&["--count", "5", "--tokens"]);
    assert_eq!(said.code, Some(0), "{said:?}");
    assert!(said.out.contains("5 were there, 0 made here"), "{said:?}");
    let store = Store::open(place.store()).await.unwrap();
    let names = store.table_names().await.unwrap();
    let digest = names
        .iter()
        .find_map(|name| name.strip_prefix("tokens_"))
        .unwrap();
    let tokens = store.tokens(digest, 64).await.unwrap();
    let proxies = place.proxies().await;
    let contents = proxies.rows(None, Columns::WithoutPictures).await.unwrap();
    let keys: Vec<String> = contents.iter().map(|row| row.key.clone()).collect();
    assert_eq!((tokens.count(), keys.len()), (5, 5));
    for (row, token) in contents
        .iter()
        .zip(tokens.get(&keys, Columns::All).await.unwrap())
    {
        assert_eq!(token.unwrap().content, row.content);
    }
}

/// What the disk of a test is said to have left; each look takes some of it away.
static ROOM: AtomicU64 = AtomicU64::new(0);
const LOOK_TAKES: u64 = 1 << 20;

fn shrinking(_: &Path) -> proxytune::Result<u64> {
    let before = ROOM.fetch_update(SeqCst, SeqCst, |room| Some(room.saturating_sub(LOOK_TAKES)));
    Ok(before.unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_fills_up_stops_the_work_cleanly_and_it_goes_on_later() {
    let place = Place::new();
    let with = |free_space: FreeSpace| Generation {
        keep_free: 1 << 20,
        free_space,
        ..generation(&place, &["proxies.count=400"], "1/1")
    };
    let full = generate(&with(|_| Ok(1000)), Stop::default()).await;
    let error = full.unwrap_err();
    assert!(error.to_string().contains("1000 bytes left"), "{error}");
    assert!(error.hint().unwrap().contains("--keep-free"));
    let table = place.proxies().await;
    assert_eq!(table.count(), 0, "it did not begin");

    // One look before the start, and one after each commit.
    ROOM.store(3 * LOOK_TAKES, SeqCst);
    let error = generate(&with(shrinking), Stop::default())
        .await
        .unwrap_err();
    assert!(error.to_string().starts_with("stage keep: "), "{error}");
    assert!(error.hint().unwrap().contains("free some space"), "{error}");
    table.refresh().await.unwrap();
    let kept = table.count();
    assert!(0 < kept && kept < 400, "{kept}");
    let rest = make(&place, &["proxies.count=400"], "1/1").await.unwrap();
    assert_eq!((rest.found, rest.made), (kept, 400 - kept));
    assert_eq!(held(&place).await.1, 400);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_that_runs_already_is_refused_by_name() {
    let place = Place::new();
    let overrides = ["proxies.count=4000"];
    let mut first = Running::start(command(&place, &overrides, &["--shard", "2/2"]));
    let proxies = place.store().join("proxies.lance");
    assert!(first.runs_until(|| proxies.exists()));
    let elsewhere = Place::new();
    let mut second = generation(&place, &overrides, "2/2");
    second.options.out = elsewhere.out();
    let error = generate(&second, Stop::default()).await.unwrap_err();
    assert!(
        error
            .to_string()
            .contains("shard 2/2 of this work is running already"),
        "{error}"
    );
    assert!(
        error
            .to_string()
            .contains(&format!("process {}", first.id())),
        "{error}"
    );
    // Asked to stop, it ends with what it has made committed.
    // SAFETY: a signal to a child that has not been waited for, so its number is still its own.
    assert_eq!(unsafe { libc::kill(first.id() as i32, libc::SIGTERM) }, 0);
    assert!(first.ends_within(Duration::from_secs(60)));
    let (status, said) = first.wait();
    assert_eq!(status.code(), Some(130), "{said}");
}
