//! Checkpoints by name arrive from a hub on this machine, whatever happens on the way; nothing here uses the network.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::hub::{COMMIT, Hub, Manner, sha256};
use crate::support::{Said, program, say};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn models(hub: &Hub, home: &Path, arguments: &[&str]) -> Said {
    let mut command = hub.program(home);
    command.arg("models").args(arguments);
    say(command)
}

/// A hub with the nano DINO under its published name, and as somebody's own.
fn with_dino(manner: Manner) -> Hub {
    let hub = Hub::start(manner);
    for repository in ["facebook/dino-vits16", "somebody/small-dino"] {
        hub.add_folder(repository, &root().join("datasets/nano/checkpoints/dino"));
        hub.add(repository, "README.md", "not a part of it");
        hub.add(
            repository,
            "pytorch_model.bin",
            "the same in another format",
        );
    }
    hub
}

fn snapshot(home: &Path, repository: &str) -> PathBuf {
    home.join("hub")
        .join(format!("models--{}", repository.replace('/', "--")))
        .join("snapshots")
        .join(COMMIT)
}

#[test]
fn a_repository_comes_into_the_usual_cache_and_is_not_asked_for_again() {
    let (hub, home) = (with_dino(Manner::default()), tempfile::tempdir().unwrap());
    let said = models(&hub, home.path(), &["--download", "somebody/small-dino"]);
    said.says(0, &["downloading somebody/small-dino"]);
    let snapshot = snapshot(home.path(), "somebody/small-dino");
    assert!(
        said.out.contains(&snapshot.display().to_string()),
        "{said:?}"
    );
    let weights = snapshot.join("model.safetensors");
    let original = root().join("datasets/nano/checkpoints/dino/model.safetensors");
    assert_eq!(
        std::fs::read(&weights).unwrap(),
        std::fs::read(original).unwrap()
    );
    // As huggingface_hub lays it out, so that both use the same files.
    let blob = std::fs::canonicalize(&weights).unwrap();
    assert_eq!(blob.parent().unwrap().file_name().unwrap(), "blobs");
    let main = snapshot.join("../../refs/main");
    assert_eq!(std::fs::read_to_string(main).unwrap(), COMMIT);
    assert!(!snapshot.join("pytorch_model.bin").exists());
    assert!(!snapshot.join("README.md").exists());

    assert!(!hub.requests().is_empty());
    models(&hub, home.path(), &["--download", "somebody/small-dino"]).says(0, &[]);
    assert_eq!(hub.requests(), Vec::<String>::new());
    let mut command = hub.program(home.path());
    command
        .env("HF_HUB_OFFLINE", "1")
        .args(["models", "somebody/small-dino"]);
    let said = say(command);
    assert!(
        said.out.starts_with("somebody/small-dino: DINO\n"),
        "{said:?}"
    );
}

#[test]
fn a_known_model_is_downloaded_before_the_command_that_needs_it_starts() {
    let (hub, home) = (with_dino(Manner::default()), tempfile::tempdir().unwrap());
    let evaluate = |command: &mut Command| {
        command.args([
            "evaluate",
            "--references",
            "datasets/nano/subjects/dog1",
            "--class",
            "dog",
        ]);
        command.args([
            "--images",
            "datasets/nano/subjects/dog1",
            "--dino",
            "dino-vits16",
        ]);
    };
    let mut first = hub.program(home.path());
    evaluate(&mut first);
    let said = say(first);
    said.says(0, &["downloading dino-vits16"]);
    let line = |said: &Said| {
        said.out
            .lines()
            .find(|l| l.contains("DINO"))
            .map(String::from)
    };
    let scores = line(&said).unwrap();
    assert!(
        said.out.contains("DINO: facebook/dino-vits16 ("),
        "{said:?}"
    );
    let mut offline = hub.program(home.path());
    evaluate(
        offline
            .env("HF_HUB_OFFLINE", "1")
            .env("HF_ENDPOINT", "http://127.0.0.1:9"),
    );
    let said = say(offline);
    said.says(0, &[]);
    assert_eq!(line(&said).unwrap(), scores);
}

#[test]
fn a_transfer_that_breaks_off_goes_on_where_it_was() {
    let hub = Hub::start(Manner {
        redirects_from: Some(1 << 20),
        ..Manner::default()
    });
    // More than two of the parts in which a file is asked for.
    let weights: Vec<u8> = (0..40_000_000u32).map(|i| (i / 7) as u8).collect();
    hub.add("somebody/large", "config.json", r#"{"model_type": "vit"}"#);
    hub.add("somebody/large", "model.safetensors", weights.clone());
    hub.change(|manner| manner.breaks = 3);
    let home = tempfile::tempdir().unwrap();
    let said = models(&hub, home.path(), &["--download", "somebody/large"]);
    said.says(0, &["model.safetensors: 40.0 MB", "trying again"]);
    let arrived = snapshot(home.path(), "somebody/large").join("model.safetensors");
    assert!(std::fs::read(arrived).unwrap() == weights);

    // What came from it before is not asked for again.
    let home = tempfile::tempdir().unwrap();
    let part = left_behind(home.path(), &weights, &weights[..16 << 20]);
    let before = hub.sent();
    hub.requests();
    models(&hub, home.path(), &["--download", "somebody/large"]).says(0, &[]);
    assert!(!part.exists());
    let asked = hub.requests();
    assert!(
        asked
            .iter()
            .any(|request| request.ends_with(" bytes=16777216-")),
        "{asked:#?}"
    );
    assert!(hub.sent() - before < 24_000_000);
    let arrived = snapshot(home.path(), "somebody/large").join("model.safetensors");
    assert!(std::fs::read(arrived).unwrap() == weights);
}

/// What a program leaves that was killed when `part` of `weights` had arrived.
fn left_behind(home: &Path, weights: &[u8], part: &[u8]) -> PathBuf {
    let blobs = home.join("hub/models--somebody--large/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    let path = blobs.join(format!("{}.incomplete", sha256(weights)));
    std::fs::write(&path, part).unwrap();
    path
}

#[test]
fn a_part_of_other_bytes_is_not_built_upon() {
    let hub = Hub::start(Manner {
        redirects_from: Some(1000),
        ..Manner::default()
    });
    let weights = b"weights ".repeat(1000);
    hub.add("somebody/large", "model.safetensors", weights.clone());
    for part in [vec![7; 4000], vec![7; 8000], vec![7; 20_000]] {
        let home = tempfile::tempdir().unwrap();
        left_behind(home.path(), &weights, &part);
        models(&hub, home.path(), &["--download", "somebody/large"]).says(0, &[]);
        let arrived = snapshot(home.path(), "somebody/large").join("model.safetensors");
        assert!(std::fs::read(arrived).unwrap() == weights, "{}", part.len());
    }
}

#[test]
fn a_hub_that_never_delivers_is_given_up() {
    let hub = with_dino(Manner {
        silent: true,
        ..Manner::default()
    });
    let home = tempfile::tempdir().unwrap();
    models(&hub, home.path(), &["--download", "somebody/small-dino"]).says(
        1,
        &[
            "broke off",
            "hint: the same command goes on where it stopped",
        ],
    );
}

#[test]
fn a_file_that_was_damaged_in_the_cache_comes_again() {
    let hub = with_dino(Manner {
        redirects_from: Some(100_000),
        ..Manner::default()
    });
    for repository in ["somebody/small-dino", "dino-vits16"] {
        let home = tempfile::tempdir().unwrap();
        let download = || models(&hub, home.path(), &["--download", repository]);
        download().says(0, &[]);
        let id = repository.replace("dino-vits16", "facebook/dino-vits16");
        for name in ["model.safetensors", "config.json"] {
            let file = snapshot(home.path(), &id).join(name);
            let whole = std::fs::read(&file).unwrap();
            let blob = std::fs::canonicalize(&file).unwrap();
            let mut flipped = whole.clone();
            flipped[whole.len() / 2] ^= 1;
            for damaged in [&whole[..whole.len() - 1], &flipped[..], &[][..]] {
                std::fs::write(&blob, damaged).unwrap();
                download().says(0, &["damaged, and therefore removed"]);
                assert!(std::fs::read(&file).unwrap() == whole);
            }
        }
    }
}

#[test]
fn a_gated_repository_says_what_to_do() {
    let hub = with_dino(Manner {
        token: Some("good".into()),
        ..Manner::default()
    });
    let home = tempfile::tempdir().unwrap();
    let download = ["--download", "dino-vits16"];
    let page = format!(
        "accept the terms on {}/facebook/dino-vits16",
        hub.endpoint()
    );
    models(&hub, home.path(), &download).says(1, &["(401)", "gated", &page, "HF_TOKEN"]);
    let with = |token: &str| {
        let mut command = hub.program(home.path());
        command.env("HF_TOKEN", token).arg("models").args(download);
        say(command)
    };
    with("bad").says(1, &["(403)", &page]);
    with("good").says(0, &[]);
    // The token that `hf auth login` leaves.
    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("token"), "good\n").unwrap();
    models(&hub, home.path(), &download).says(0, &[]);
}

#[test]
fn what_the_hub_does_not_have_is_named() {
    let (hub, home) = (with_dino(Manner::default()), tempfile::tempdir().unwrap());
    hub.add("openai/clip-vit-base-patch32", "config.json", "{}");
    models(&hub, home.path(), &["--download", "clip-vit-base-patch32"]).says(
        1,
        &[
            "has no file model.safetensors.index.json or model.safetensors or",
            "pytorch_model.bin",
        ],
    );
    models(&hub, home.path(), &["--download", "somebody/nothing"])
        .says(1, &["no such repository", "hint: "]);
    models(&hub, home.path(), &["--download", "nothing"])
        .says(1, &["neither a known model", "hint: "]);
}

#[test]
fn without_a_network_the_error_says_how_to_go_on() {
    let (hub, home) = (with_dino(Manner::default()), tempfile::tempdir().unwrap());
    let mut command = hub.program(home.path());
    command.env("HF_ENDPOINT", "http://127.0.0.1:9");
    command.args(["models", "--download", "dino-vits16"]);
    say(command).says(
        1,
        &[
            "http://127.0.0.1:9 is not reached",
            "hint: check the network",
        ],
    );
    let mut command = hub.program(home.path());
    command
        .env("HF_HUB_OFFLINE", "1")
        .args(["models", "--download", "dino-vits16"]);
    say(command).says(1, &["HF_HUB_OFFLINE is set", "hint: unset HF_HUB_OFFLINE"]);
    assert_eq!(hub.requests(), Vec::<String>::new());
}

#[test]
fn checking_a_pipeline_downloads_nothing_and_says_what_is_here() {
    let (hub, home) = (with_dino(Manner::default()), tempfile::tempdir().unwrap());
    let check = || {
        let mut command = hub.program(home.path());
        command.args([
            "check",
            "pipelines/nano.toml",
            "--set",
            "evaluation.dino=dino-vits16",
        ]);
        say(command)
    };
    check().says(
        0,
        &[
            "not here yet: ",
            "proxytune models --download dino-vits16",
            "90.0 MB",
        ],
    );
    assert_eq!(hub.requests(), Vec::<String>::new());
    models(&hub, home.path(), &["--download", "dino-vits16"]).says(0, &[]);
    check().says(0, &["here: dino-vits16, "]);
    let said = models(&hub, home.path(), &[]);
    let line = said
        .out
        .lines()
        .find(|line| line.starts_with("dino-vits16"))
        .unwrap();
    assert!(
        line.contains("Apache 2.0") && line.contains("1.6 MB"),
        "{line}"
    );
}

#[test]
fn llamagen_by_name_comes_from_two_repositories_and_draws() {
    let hub = Hub::start(Manner {
        redirects_from: Some(100_000),
        ..Manner::default()
    });
    let published = root().join("tests/golden/llamagen-published/xl-256");
    hub.add_folder("peizesun/llamagen_t2i", &published);
    hub.add_folder("google/flan-t5-xl", &published.join("t5"));
    let tokenizer = root().join("datasets/nano/checkpoints/llamagen/t5/tokenizer.json");
    hub.add(
        "google/flan-t5-xl",
        "tokenizer.json",
        std::fs::read(tokenizer).unwrap(),
    );
    let home = tempfile::tempdir().unwrap();
    let draw = |command: &mut Command, to: &str| {
        command.args([
            "sample",
            "--model",
            "llamagen-xl-256",
            "--prompt",
            "a red dog on the beach",
        ]);
        command
            .args(["--temperature", "0", "--out"])
            .arg(home.path().join(to));
    };
    let mut command = hub.program(home.path());
    draw(&mut command, "first");
    let said = say(command);
    said.says(0, &["downloading llamagen-xl-256"]);
    assert!(
        !hub.requests()
            .iter()
            .any(|request| request.contains("drawn.safetensors"))
    );
    let mut offline = hub.program(home.path());
    draw(offline.env("HF_HUB_OFFLINE", "1"), "second");
    say(offline).says(0, &[]);
    let drawn = |to: &str| {
        let file = home.path().join(to).join("0000-a-red-dog-on-the-beach.png");
        image::open(file).unwrap().to_rgb8()
    };
    assert!(drawn("first") == drawn("second"));
    // The same files in a folder of one's own give the same image.
    let local = home.path().join("local");
    std::fs::create_dir_all(local.join("t5")).unwrap();
    let gathered = home.path().join("proxytune/checkpoints/llamagen-xl-256");
    for name in [
        "t2i_XL_stage1_256.pt",
        "vq_ds16_t2i.pt",
        "t5/config.json",
        "t5/tokenizer.json",
    ] {
        std::fs::copy(gathered.join(name), local.join(name)).unwrap();
    }
    for entry in std::fs::read_dir(published.join("t5")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, local.join("t5").join(path.file_name().unwrap())).unwrap();
    }
    let mut command = program();
    command.args([
        "sample",
        "--prompt",
        "a red dog on the beach",
        "--temperature",
        "0",
        "--model",
    ]);
    command
        .arg(&local)
        .arg("--out")
        .arg(home.path().join("third"));
    say(command).says(0, &[]);
    assert!(drawn("first") == drawn("third"));
}
