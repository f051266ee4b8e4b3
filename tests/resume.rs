//! A run may end at any moment: what is committed stays, and the same command goes on to the same result.

use std::collections::BTreeSet;
use std::time::Duration;

use lance::Dataset;
use proxytune::store::Row;
use rand::{Rng, SeedableRng};
use tokio::sync::OnceCell;

use crate::support::{PROXIES, Place, Remains, Running, find};

const KILLS: usize = 20;

/// What the smoke pipeline comes to when nobody disturbs it, and how long that takes.
async fn undisturbed() -> &'static (Remains, Duration) {
    static ONCE: OnceCell<(Remains, Duration)> = OnceCell::const_new();
    ONCE.get_or_init(|| async {
        let place = Place::new();
        let run = Running::start(place.command(&[]));
        let started = run.started;
        let (status, said) = run.wait();
        assert!(status.success(), "{said}");
        (place.remains().await, started.elapsed())
    })
    .await
}

/// Runs the pipeline to its end and compares what it leaves with an undisturbed run.
async fn completes(place: &Place, what: &str) {
    let (status, said) = Running::start(place.command(&[])).wait();
    assert!(status.success(), "{what}: {said}");
    is_whole(place, what).await;
}

/// Whether a completed run's directory and store are those of an undisturbed run.
async fn is_whole(place: &Place, what: &str) {
    place
        .remains()
        .await
        .assert_equal(&undisturbed().await.0, what);
    let table = place.proxies().await;
    let dataset = Dataset::open(table.path().to_str().unwrap()).await.unwrap();
    assert_eq!(dataset.count_rows(None).await.unwrap(), PROXIES, "{what}");
    let rows = table
        .rows(None, proxytune::store::Columns::WithoutPictures)
        .await
        .unwrap();
    let keys: BTreeSet<String> = rows.iter().map(Row::key).collect();
    assert_eq!(keys.len(), PROXIES, "{what}");
    let left = find(&place.only_run(), &|name| name.ends_with(".tmp"));
    assert!(left.is_empty(), "{what}: {left:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_killed_at_twenty_random_moments_resumes_to_the_same_bytes_and_rows() {
    let duration = undisturbed().await.1;
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(2);
    let mut place = Place::new();
    let (mut kills, mut since) = (0, 0);
    while kills < KILLS {
        let moment = duration.mul_f64(random.random_range(0.02..0.7));
        let mut run = Running::start(place.command(&[]));
        if !run.ends_within(moment) {
            run.kill();
            kills += 1;
            since += 1;
            continue;
        }
        // It got to its end before the moment came: it must be whole, and the next one starts afresh.
        let (status, said) = run.wait();
        let what = format!("ended after {since} kills, {kills} in all");
        assert!(status.success(), "{what}: {said}");
        is_whole(&place, &what).await;
        (place, since) = (Place::new(), 0);
    }
    completes(&place, &format!("resumed after the last {since} kills")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_due_for_evaluation_before_a_kill_is_evaluated_after_it() {
    let place = Place::new();
    let mut run = Running::start(place.command(&[]));
    // An evaluation falls due at step 4, and only the student takes more than 4 steps.
    let is_later = |name: &str| name == "checkpoint-000006";
    assert!(run.runs_until(|| !find(&place.out(), &is_later).is_empty()));
    run.kill();
    completes(&place, "killed after a later checkpoint").await;
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ctrl_c_checkpoints_and_exits_with_130_and_the_same_command_completes() {
    let place = Place::new();
    let is_checkpoint = |name: &str| name == "state.json";
    let mut run = Running::start(place.command(&[]));
    let happened = run.runs_until(|| !find(&place.out(), &is_checkpoint).is_empty());
    assert!(happened, "it ended before its first checkpoint");
    run.interrupt();
    let (status, said) = run.wait();
    assert_eq!(status.code(), Some(130), "{said}");
    for part in ["stopping: ", "interrupted; the same command continues"] {
        assert!(said.contains(part), "{said}");
    }
    let checkpoints = find(&place.only_run(), &is_checkpoint);
    assert!(!checkpoints.is_empty(), "{said}");
    completes(&place, "after Ctrl-C").await;
    let is_due = |name: &str| name.starts_with("evaluate-");
    assert!(find(&place.only_run(), &is_due).is_empty());
    completes(&place, "once more after its end").await;
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ctrl_c_while_evaluation_holds_training_back_keeps_what_was_learnt() {
    let place = Place::new();
    let mut run = Running::start(place.command(&[
        "evaluation.every=1",
        "channels.checkpoints=1",
        "student.checkpoint_every=100",
    ]));
    // Nothing but the stop writes a checkpoint, and training waits for room to hand this one on.
    let is_second = |name: &str| name == "evaluate-000002.safetensors";
    let happened = run.runs_until(|| !find(&place.out(), &is_second).is_empty());
    assert!(happened, "it ended before its second evaluation");
    run.interrupt();
    let (status, said) = run.wait();
    assert_eq!(status.code(), Some(130), "{said}");
    let student = place.only_run().join("checkpoints/student");
    let saved = find(&student, &|name| name == "state.json");
    assert_eq!(saved.len(), 1, "{said}");
}
