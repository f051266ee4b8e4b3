//! What lies on disk can be damaged: training goes on from what is whole, to the same bytes, and says so. What was
//! evaluated stays usable, and more steps go on where fewer ended.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{Place, Running, Said, find, program, say};

fn cut(path: &Path) {
    let bytes = std::fs::read(path).unwrap();
    std::fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
}

fn run(place: &Place, overrides: &[&str]) -> Said {
    say(place.command(overrides))
}

/// The folders of whole checkpoints of `stage`, oldest first.
fn checkpoints(run: &Path, stage: &str) -> Vec<PathBuf> {
    find(&run.join("checkpoints").join(stage), &|name| {
        name.starts_with("checkpoint-")
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_newest_checkpoint_falls_back_to_the_one_before_and_says_so() {
    let place = Place::new();
    run(&place, &[]).says(0, &[]);
    let whole = place.remains().await;
    let dir = place.only_run();
    let student = checkpoints(&dir, "student");
    assert_eq!(student.len(), 2);
    cut(&student[1].join("optimizer.safetensors"));
    let said = run(&place, &[]);
    let parts = [
        "checkpoint-000008 is damaged",
        "train: goes on from the checkpoint of step 6",
    ];
    said.says(0, &parts);
    place
        .remains()
        .await
        .assert_equal(&whole, "the optimizer was cut");
    assert_eq!(checkpoints(&dir, "student"), student);

    for dir in checkpoints(&dir, "student") {
        cut(&dir.join("weights.safetensors"));
    }
    let said = run(&place, &[]);
    said.says(0, &["train: begins at step 0, as no checkpoint is whole"]);
    place.remains().await.assert_equal(&whole, "none was whole");
    let direct = checkpoints(&dir, "direct");
    cut(&direct[direct.len() - 1].join("state.json"));
    let said = run(&place, &[]);
    said.says(0, &["direct: begins at step 0", "is damaged"]);
    place.remains().await.assert_equal(&whole, "direct");
}

#[test]
fn a_supervisor_falls_back_too() {
    let long = [
        "supervisor.steps=40",
        "direct.enabled=false",
        "evaluation.every=0",
    ];
    let place = Place::new();
    let mut killed = Running::start(place.command(&long));
    let training = place.store().join("training");
    let whole = || find(&training, &|name| name.starts_with("checkpoint-0"));
    assert!(killed.runs_until(|| whole().len() >= 2));
    killed.kill();
    let newest = whole().pop().unwrap();
    cut(&newest.join("weights.safetensors"));
    let said = run(&place, &long);
    said.says(0, &["supervise:dog1: goes on from the checkpoint of step "]);
}

#[test]
fn what_was_evaluated_between_stays_usable_as_an_adapter() {
    let place = Place::new();
    run(&place, &["direct.enabled=false"]).says(0, &[]);
    let evaluated = place.only_run().join("evaluated");
    let steps = find(&evaluated, &|name| name.starts_with("step-"));
    assert_eq!(steps, [evaluated.join("step-000004")]);
    let mut sample: Command = program();
    sample.args([
        "sample",
        "--model",
        "nano-llamagen",
        "--prompt",
        "a sks dog",
    ]);
    sample.arg("--adapter").arg(&steps[0]);
    sample.arg("--out").arg(place.path().join("drawn"));
    say(sample).says(0, &[]);
}

#[test]
fn more_steps_go_on_where_fewer_ended_or_say_why_not() {
    let base = ["direct.enabled=false", "evaluation.every=0"];
    let with = |more: &[&'static str]| [&base[..], more].concat();
    let place = Place::new();
    run(&place, &with(&["student.overlap=0"])).says(0, &[]);
    let more = with(&["student.overlap=0", "student.steps=12"]);
    run(&place, &more).says(0, &["goes on from step 8 of nano-smoke-"]);
    // The same again is the same run, which is complete; a new one takes all steps.
    run(&place, &more).says(0, &["this ran to its end before"]);
    let mut afresh = place.command(&more);
    afresh.arg("--new");
    let said = say(afresh);
    assert!(
        said.code == Some(0) && !said.err.contains("goes on"),
        "{said:?}"
    );
    let adapters: Vec<Vec<u8>> = place
        .runs()
        .iter()
        .filter(|run| {
            let text = std::fs::read_to_string(run.join("resolved.toml")).unwrap();
            let (_, student) = text.split_once("[student]").unwrap();
            student.lines().any(|line| line == "steps = 12")
        })
        .map(|run| std::fs::read(run.join("student/adapter_model.safetensors")).unwrap())
        .collect();
    assert!(
        adapters.len() == 2 && adapters[0] == adapters[1],
        "they differ"
    );

    let parts = [
        "starts over instead of going on from step 12",
        "with student.overlap = 0.5",
        "--set student.overlap=0",
    ];
    run(&place, &with(&["student.steps=16"])).says(0, &parts);
    let cosine = ["student.overlap=0", "student.lr_scheduler=\"cosine\""];
    let few = with(&[&cosine[..], &["student.steps=2"]].concat());
    run(&place, &few).says(0, &[]);
    let more = with(&[&cosine[..], &["student.steps=3"]].concat());
    run(&place, &more).says(
        0,
        &[
            "starts over instead of going on from step 2",
            "lr_scheduler",
        ],
    );
}
