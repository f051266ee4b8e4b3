//! What is printed: to whoever still reads, and never as a command to their terminal.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::support::{Place, filled, find, program, say};

const DOG: &str = "datasets/nano/subjects/dog1";

/// Every command that prints something and ends soon, with a store for those that ask one.
fn printing(store: &str) -> Vec<Vec<String>> {
    let golden = "tests/golden/llamagen-gpt/two-layers";
    let with = |dir: &str| format!("{golden}/{dir}");
    let words = |text: &str| text.split(' ').map(String::from).collect::<Vec<_>>();
    let mut commands = vec![
        words("--help"),
        words("--version"),
        words("sample --help"),
        words("models"),
        words("models nano-sd3"),
        words("check pipelines/nano.toml"),
        words("graph pipelines/nano.toml"),
        words(&format!("query --tables --store {store}")),
        words(&format!(
            "evaluate --references {DOG} --images {DOG} --class dog"
        )),
        words(&format!(
            "verify llamagen-gpt --model {} --adapter {} --reference {}",
            with("model"),
            with("adapter"),
            with("reference.safetensors")
        )),
    ];
    for format in ["table", "csv", "jsonl", "parquet"] {
        let mut command = words(&format!("query --store {store} --format {format}"));
        command.push("SELECT * FROM proxies".into());
        commands.push(command);
    }
    commands
}

fn command(arguments: &[String]) -> Command {
    let mut command = program();
    command.args(arguments);
    command
}

/// The writing end of a pipe that nobody reads.
fn closed() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

fn full() -> Stdio {
    std::fs::File::options()
        .write(true)
        .open("/dev/full")
        .unwrap()
        .into()
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_closed_pipe_ends_every_command_quietly_and_a_full_output_is_an_error() {
    let place = Place::new();
    filled::store(&place.store(), filled::SMALL, 400).await;
    for arguments in printing(place.store().to_str().unwrap()) {
        let what = arguments.join(" ");
        let mut gone = command(&arguments);
        let gone = gone
            .stdout(closed())
            .stderr(Stdio::piped())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&gone.stderr);
        assert_eq!(gone.status.code(), Some(0), "{what}: {said}");
        assert!(
            !said.contains("error") && !said.contains("panicked"),
            "{what}: {said}"
        );

        let mut nowhere = command(&arguments);
        let nowhere = nowhere
            .stdout(full())
            .stderr(Stdio::piped())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&nowhere.stderr);
        assert_eq!(nowhere.status.code(), Some(1), "{what}: {said}");
        assert!(said.contains("standard output: "), "{what}: {said}");
        assert!(!said.contains("panicked"), "{what}: {said}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn standard_error_that_nobody_reads_or_that_is_full_changes_nothing() {
    let words = |text: &str| text.split(' ').map(String::from).collect::<Vec<_>>();
    for (arguments, code) in [
        (words("check pipelines/nano.toml"), 0),
        (words("check nowhere.toml"), 1),
        (words("check pipelines/nano.toml --set student.stepz=1"), 2),
        (words("frobnicate"), 2),
    ] {
        for stderr in [closed(), full()] {
            let mut command = command(&arguments);
            let status = command
                .stdout(Stdio::null())
                .stderr(stderr)
                .status()
                .unwrap();
            assert_eq!(status.code(), Some(code), "{arguments:?}");
        }
    }
}

/// Draws five pictures to `out`.
#[cfg(unix)]
fn five_dogs(out: &Path) -> Command {
    let mut sample = program();
    let model = ["sample", "--model", "nano-llamagen"];
    sample
        .args(model)
        .args(["--prompt", "a dog", "--count", "5"]);
    sample.arg("--out").arg(out);
    sample
}

#[cfg(unix)]
#[test]
fn sample_and_run_finish_their_work_when_nobody_reads() {
    let place = Place::new();
    let out = place.path().join("out");
    let mut sample = five_dogs(&out);
    let status = sample.stdout(closed()).stderr(closed()).status().unwrap();
    assert_eq!(status.code(), Some(0));
    assert_eq!(find(&out, &|name| name.ends_with(".png")).len(), 5);
    let mut run = place.command(&[
        "supervisor.steps=1",
        "proxies.count=2",
        "student.steps=1",
        "direct.enabled=false",
        "evaluation.every=0",
    ]);
    let status = run.stdout(closed()).stderr(closed()).status().unwrap();
    assert_eq!(status.code(), Some(0));
    assert!(place.only_run().join("complete.json").is_file());
}

#[cfg(target_os = "linux")]
#[test]
fn sample_into_a_full_output_draws_all_and_ends_with_an_error() {
    let place = Place::new();
    let out = place.path().join("out");
    let mut sample = five_dogs(&out);
    let ended = sample
        .stdout(full())
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert_eq!(ended.status.code(), Some(1));
    assert_eq!(find(&out, &|name| name.ends_with(".png")).len(), 5);
}

#[cfg(unix)]
#[test]
fn names_captions_and_prompts_never_reach_the_terminal_as_commands() {
    let place = Place::new();
    let photos = place.path().join("a\u{1b}]0;owned\u{7}b");
    std::fs::create_dir(&photos).unwrap();
    for entry in std::fs::read_dir(DOG).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, photos.join(path.file_name().unwrap())).unwrap();
    }
    std::fs::write(
        photos.join("c\u{1b}[2J\r\nerror: all is lost\u{9b}31m.png"),
        "no picture",
    )
    .unwrap();
    let photos = photos.to_str().unwrap();
    let evaluate = [
        "evaluate",
        "--references",
        photos,
        "--class",
        "dog",
        "--images",
        photos,
    ];
    let sample = |what: &'static str| {
        [
            "sample",
            "--model",
            "nano-llamagen",
            "--prompt",
            "a \u{1b}[31mdog",
            what,
            photos,
        ]
    };
    let hostile = "\u{1b}[31m";
    for arguments in [
        &evaluate[..],
        &sample("--out"),
        &sample("--adapter"),
        &["check", photos],
        &["models", hostile],
        &["run", "pipelines/nano.toml", "--set", hostile],
        &["query", "--store", photos, hostile],
        &["report", photos],
        &["frobnicate\u{1b}[31m"],
        &["sample", hostile],
    ] {
        let mut command = program();
        command.args(arguments).env("RUST_LOG", "info");
        let said = say(command);
        for text in [&said.out, &said.err] {
            let obeyed = |c: char| c.is_control() && c != '\n' && c != '\t';
            assert!(!text.contains(obeyed), "{arguments:?}: {text:?}");
        }
        assert!(
            !said
                .err
                .lines()
                .any(|line| line.starts_with("error: all is lost")),
            "{}",
            said.err
        );
    }
    let mut command = program();
    command.args(evaluate);
    say(command).says(
        3,
        &[
            "a\\u{1b}]0;owned\\u{7}b",
            "c\\u{1b}[2J\\r\\nerror: all is lost\\u{9b}31m.png",
        ],
    );
    assert!(Path::new(photos).is_dir());
}
