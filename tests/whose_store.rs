//! Runs and watched folders know their store: another one is refused, and what only reads makes none.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::support::filled;
use crate::support::{Place, SMOKE, Said, copy_tree, program, say};

const SMALL: [&str; 2] = ["direct.enabled=false", "evaluation.every=0"];

fn proxytune(arguments: &[&str]) -> Said {
    let mut command = program();
    command.args(arguments);
    say(command)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A completed run with its store, made once, and copied into a new place.
fn completed() -> Place {
    static ONCE: OnceLock<Place> = OnceLock::new();
    let made = ONCE.get_or_init(|| {
        let place = Place::new();
        say(place.command(&SMALL)).says(0, &[]);
        place
    });
    let place = Place::new();
    for name in ["store", "runs"] {
        copy_tree(&made.path().join(name), &place.path().join(name));
    }
    place
}

#[tokio::test]
async fn a_run_knows_its_store_and_refuses_another() {
    let place = completed();
    let (run, store) = (place.only_run(), place.store());
    let report = std::fs::read(run.join("report.json")).unwrap();
    let again = |run: &Path, more: &[&str]| proxytune(&[&["report", text(run)], more].concat());
    let other = place.path().join("other");
    let refused = again(&run, &["--store", text(&other)]);
    refused.says(1, &[text(&store), text(&other), "hint: "]);
    assert!(!other.exists(), "what reads made a store");
    // Another store that is there, and a run that is gone on with.
    let foreign = place.path().join("foreign");
    filled::store(&foreign, filled::SMALL, 4).await;
    again(&run, &["--store", text(&foreign)]).says(1, &[text(&store), text(&foreign)]);
    let mut command = program();
    command.args(["run", SMOKE, "--store", text(&foreign), "--out"]);
    command.arg(place.out());
    for text in SMALL {
        command.args(["--set", text]);
    }
    say(command).says(1, &[text(&store), text(&foreign), "--new"]);
    assert_eq!(std::fs::read(run.join("report.json")).unwrap(), report);

    // Without --store it is the run's own, and where both were moved to.
    again(&run, &[]).says(0, &[]);
    let moved = place.path().join("moved");
    std::fs::create_dir(&moved).unwrap();
    for name in ["store", "runs"] {
        std::fs::rename(place.path().join(name), moved.join(name)).unwrap();
    }
    let run = moved.join("runs").join(run.file_name().unwrap());
    again(&run, &[]).says(0, &[]);
    // The store alone: it is known where it is named.
    let alone = place.path().join("alone");
    std::fs::rename(moved.join("store"), &alone).unwrap();
    std::fs::create_dir(moved.join("store")).unwrap();
    again(&run, &["--store", text(&alone)]).says(0, &[]);
    again(&run, &[]).says(0, &[]);
    // What an older version left notes no store; one that has nothing of the run is not its own.
    std::fs::remove_file(run.join("store.json")).unwrap();
    let said = again(&run, &["--store", text(&foreign)]);
    said.says(1, &["has nothing of the run", text(&foreign)]);
    again(&run, &["--store", text(&alone)]).says(0, &[]);
}

#[test]
fn what_only_reads_makes_no_store() {
    let place = Place::new();
    let nothing = place.path().join("nothing");
    let to = place.path().join("to");
    let asked: [&[&str]; 4] = [
        &["query", "SELECT 1"],
        &["query", "--tables"],
        &["export", "--to", text(&to)],
        &["remove", "rex", "--yes"],
    ];
    for arguments in asked {
        let said = proxytune(&[arguments, &["--store", text(&nothing)]].concat());
        said.says(1, &["there is no store in", text(&nothing)]);
        assert!(!nothing.exists(), "{arguments:?}");
    }
    // A folder of something else is none either, and stays as it is.
    std::fs::create_dir(&nothing).unwrap();
    for arguments in asked {
        let said = proxytune(&[arguments, &["--store", text(&nothing)]].concat());
        said.says(1, &["there is no store in"]);
    }
    assert_eq!(std::fs::read_dir(&nothing).unwrap().count(), 0);
}

#[test]
fn a_run_that_fails_at_once_is_not_the_newest() {
    let place = completed();
    let (link, run) = (place.out().join("nano-smoke"), place.only_run());
    let target = || -> PathBuf { std::fs::canonicalize(&link).unwrap() };
    let run = std::fs::canonicalize(run).unwrap();
    assert_eq!(target(), run);
    let empty = place.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    let images = format!("subject.dog1.images={:?}", text(&empty));
    for steps in ["student.steps=8", "student.steps=9"] {
        let said = say(place.command(&[&SMALL[..], &[&images, steps]].concat()));
        assert_eq!(said.code, Some(2), "{said:?}");
        // Each is compared with the one that got somewhere, not with the one that failed before.
        assert!(said.err.contains("subject.dog1.images: "), "{}", said.err);
        assert_eq!(target(), run);
    }
}
