//! What lies on disk can be damaged: training goes on from what is whole, to the same bytes, and says so. What was
//! evaluated stays usable, and more steps go on where fewer ended.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{Place, Running, Said, find, program, say};

fn flip(path: &Path, place: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    let place = place.min(bytes.len() - 1);
    bytes[place] ^= 4;
    std::fs::write(path, bytes).unwrap();
}

fn cut(path: &Path) {
    let bytes = std::fs::read(path).unwrap();
    std::fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
}

fn middle(path: &Path) -> usize {
    path.metadata().unwrap().len() as usize / 2
}

type Damage = (&'static str, fn(&Path));

/// What disks, kills and people do to a checkpoint's folder.
const DAMAGES: [Damage; 8] = [
    ("a truncated optimizer", |dir| {
        cut(&dir.join("optimizer.safetensors"));
    }),
    ("a flipped bit in the weights", |dir| {
        let path = dir.join("weights.safetensors");
        flip(&path, path.metadata().unwrap().len() as usize - 5);
    }),
    ("a flipped bit in the optimizer", |dir| {
        let path = dir.join("optimizer.safetensors");
        flip(&path, middle(&path));
    }),
    ("no weights", |dir| {
        std::fs::remove_file(dir.join("weights.safetensors")).unwrap();
    }),
    ("no state", |dir| {
        std::fs::remove_file(dir.join("state.json")).unwrap();
    }),
    ("broken JSON", |dir| cut(&dir.join("state.json"))),
    ("an empty state", |dir| {
        std::fs::write(dir.join("state.json"), "").unwrap();
    }),
    ("a flipped bit in the state", |dir| {
        let path = dir.join("state.json");
        let text = std::fs::read_to_string(&path).unwrap();
        let place = text.find("student ").or(text.find("train ")).unwrap();
        flip(&path, place + 9);
    }),
];

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
    for (what, damage) in DAMAGES {
        let student = checkpoints(&dir, "student");
        assert_eq!(student.len(), 2, "{what}");
        damage(&student[1]);
        let said = run(&place, &[]);
        said.says(
            0,
            &[
                "checkpoint-000008 is damaged",
                "train: goes on from the checkpoint of step 6",
            ],
        );
        place.remains().await.assert_equal(&whole, what);
        assert_eq!(checkpoints(&dir, "student"), student, "{what}");
    }
    // Nothing is damaged any more, so nothing is said.
    let said = run(&place, &[]);
    assert!(!said.err.contains("damaged"), "{}", said.err);

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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_student_of_references_and_a_supervisor_fall_back_too() {
    let shape = ["student.source=\"references\"", "direct.enabled=false"];
    let place = Place::new();
    run(&place, &shape).says(0, &[]);
    let dir = place.only_run();
    let student = || std::fs::read(dir.join("student/adapter_model.safetensors")).unwrap();
    let whole = student();
    let train = checkpoints(&dir, "train");
    flip(&train[1].join("weights.safetensors"), 2000);
    run(&place, &shape).says(0, &["train: goes on from the checkpoint of step 6"]);
    assert!(student() == whole, "it differs");

    let long = ["supervisor.steps=40", "direct.enabled=false"];
    let undisturbed = Place::new();
    run(&undisturbed, &long).says(0, &[]);
    let place = Place::new();
    let mut killed = Running::start(place.command(&long));
    let training = place.store().join("training");
    let newest = || find(&training, &|name| name.starts_with("checkpoint-0"));
    assert!(killed.runs_until(|| newest().len() >= 2));
    killed.kill();
    let newest = newest().pop().unwrap();
    cut(&newest.join("optimizer.safetensors"));
    let said = run(&place, &long);
    said.says(0, &["supervise:dog1: goes on from the checkpoint of step "]);
    let whole = undisturbed.remains().await;
    place.remains().await.assert_equal(&whole, "supervisor");
}

#[test]
fn what_was_evaluated_between_stays_usable_as_an_adapter() {
    let place = Place::new();
    run(
        &place,
        &[
            "student.steps=10",
            "evaluation.every=2",
            "direct.enabled=false",
        ],
    )
    .says(0, &[]);
    let evaluated = place.only_run().join("evaluated");
    for step in [2, 4, 6, 8] {
        let adapter = evaluated.join(format!("step-{step:06}"));
        let mut sample: Command = program();
        sample
            .args([
                "sample",
                "--model",
                "nano-llamagen",
                "--prompt",
                "a sks dog",
            ])
            .arg("--adapter")
            .arg(&adapter)
            .arg("--out")
            .arg(place.path().join(format!("{step}")));
        say(sample).says(0, &[]);
    }
    assert_eq!(find(&evaluated, &|name| name.starts_with("step-")).len(), 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_steps_go_on_where_fewer_ended_or_say_why_not() {
    let base = ["direct.enabled=false", "evaluation.every=0"];
    let with = |more: &[&'static str]| [&base[..], more].concat();
    let student = |place: &Place, steps: &str| {
        let needle = format!("steps = {steps}");
        let is_it = |run: &&PathBuf| {
            let text = std::fs::read_to_string(run.join("resolved.toml")).unwrap();
            let (_, student) = text.split_once("[student]").unwrap();
            student.lines().any(|line| line == needle)
        };
        let runs = place.runs();
        let run = runs.iter().find(is_it).unwrap();
        std::fs::read(run.join("student/adapter_model.safetensors")).unwrap()
    };
    let place = Place::new();
    run(&place, &with(&["student.overlap=0"])).says(0, &[]);
    let more = with(&["student.overlap=0", "student.steps=12"]);
    run(&place, &more).says(0, &["goes on from step 8 of nano-smoke-"]);
    let once = Place::new();
    let said = run(&once, &more);
    assert!(!said.err.contains("goes on"), "{}", said.err);
    assert!(student(&place, "12") == student(&once, "12"), "it differs");
    // The same again is the same run, which is complete.
    let said = run(&place, &more);
    said.says(0, &["this ran to its end before"]);

    let place = Place::new();
    run(&place, &base).says(0, &[]);
    let more = "student.steps=16";
    run(&place, &with(&[more])).says(
        0,
        &[
            "starts over instead of going on from step 8",
            "--set student.overlap=0.25 goes on",
        ],
    );
    let cosine = "student.lr_scheduler=\"cosine\"";
    run(&place, &with(&["student.overlap=0", cosine])).says(0, &[]);
    run(&place, &with(&["student.overlap=0", cosine, more])).says(
        0,
        &[
            "starts over instead of going on from step 8",
            "lr_scheduler",
        ],
    );
}
