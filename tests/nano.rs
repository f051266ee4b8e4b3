//! The nano checkpoints that ship: their size, what measures them, and that they can be trained further.

use std::path::Path;
use std::process::Command;

use proxytune::store::{Columns, Store};
use serde_json::Value;

use crate::support::{Place, Said, copy_tree, find, program, say};

const CHECKPOINTS: &str = "datasets/nano/checkpoints";
const SETTINGS: &str = "pipelines/nano-pretrain.toml";

fn evaluate(arguments: &[&str]) -> Said {
    let mut command = program();
    command.args(["evaluate", "--nano"]).args(arguments);
    say(command)
}

fn rows(said: &Said) -> Vec<Value> {
    said.says(0, &[]);
    serde_json::from_str(&said.out).unwrap()
}

fn size(folder: &Path) -> u64 {
    std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| match entry.path().is_dir() {
            true => size(&entry.path()),
            false => entry.metadata().unwrap().len(),
        })
        .sum()
}

#[test]
fn all_checkpoints_together_take_at_most_48_mib() {
    let bytes = size(Path::new(CHECKPOINTS));
    assert!(bytes <= 48 << 20, "{bytes} bytes");
}

#[test]
fn measures_come_with_their_aims_and_dino_reaches_its_own() {
    let rows = rows(&evaluate(&["--only", "dino,vae", "--json"]));
    let models: Vec<&str> = rows.iter().map(|r| r["model"].as_str().unwrap()).collect();
    assert_eq!(models, ["dino", "vae"]);
    for row in &rows {
        let (value, aim) = (row["value"].as_f64().unwrap(), row["aim"].as_f64().unwrap());
        assert_eq!(row["met"], value >= aim, "{row}");
    }
    assert_eq!(rows[0]["met"], true, "{}", rows[0]);
    assert!(rows[1]["value"].as_f64().unwrap() > 20.0, "{}", rows[1]);
}

#[test]
fn the_table_is_markdown_and_names_what_is_missed() {
    let said = evaluate(&["--only", "dino"]);
    said.says(0, &[]);
    let lines: Vec<&str> = said.out.lines().collect();
    assert_eq!(lines[0], "| model | measure | value | aim | |", "{said:?}");
    assert!(
        lines[2].starts_with("| dino | tells individuals"),
        "{said:?}"
    );
    assert_eq!(lines.last(), Some(&"1 of 1 aims are met."), "{said:?}");
}

#[test]
fn adaptation_is_measured_by_running_the_job_for_one_subject_after_another() {
    let job = "pipelines/nano-smoke.toml";
    let said = evaluate(&["--only", "dino", "--runs", "2", "--job", job, "--json"]);
    let rows = rows(&said);
    assert!(said.err.contains("adaptation 2 of 2"), "{}", said.err);
    let of = |words: &str| {
        rows.iter()
            .filter(|row| row["measure"].as_str().unwrap().starts_with(words))
            .collect::<Vec<_>>()
    };
    for (words, aimed) in [
        ("supervisor, 2 runs", true),
        ("proxy-tuned, 2 runs", true),
        ("directly tuned, 2 runs", false),
    ] {
        let found = of(words);
        assert_eq!(found.len(), 3, "{words}: {rows:?}");
        for row in found {
            // Scores lie within -1 and 1; the change of CLIP-T is a share of what may be close to nothing.
            let most = if row["unit"] == "change" {
                f64::MAX
            } else {
                2.0
            };
            assert!(row["value"].as_f64().unwrap().abs() <= most, "{row}");
            assert!(row["standard_error"].as_f64().unwrap() > 0.0, "{row}");
            assert_eq!(row["aim"].is_number(), aimed, "{row}");
        }
    }
}

#[test]
fn one_run_has_no_standard_error_and_photos_do_not_go_with_nano() {
    evaluate(&["--only", "dino", "--runs", "1"]).says(1, &["--runs 1", "hint:"]);
    evaluate(&["--class", "dog"]).says(2, &["--nano", "--class"]);
    evaluate(&["--guidance-scale", "2"]).says(2, &["--nano", "--guidance-scale"]);
}

#[tokio::test]
async fn pretraining_goes_on_from_the_weights_alone_and_logs_its_curve() {
    let dir = tempfile::tempdir().unwrap();
    let (out, store) = (dir.path().join("out"), dir.path().join("store"));
    std::fs::create_dir_all(out.join("dino")).unwrap();
    // Nothing but the weights: no configuration, no notes.
    let weights = "dino/model.safetensors";
    std::fs::copy(Path::new(CHECKPOINTS).join(weights), out.join(weights)).unwrap();
    let pretrain = |images: &str| {
        let mut command: Command = program();
        command.args(["pretrain", SETTINGS, "--only", "dino", "--threads", "1"]);
        command.args(["--images", images, "--out"]).arg(&out);
        command.arg("--store").arg(&store);
        let said = say(command);
        said.says(0, &[]);
    };
    pretrain("128");
    pretrain("64");
    // A pretraining of another size that fails leaves the configuration to the weights that are there.
    let config = out.join("dino/config.json");
    let before = std::fs::read(&config).unwrap();
    let settings = std::fs::read_to_string(SETTINGS).unwrap();
    let (size, rest) = (
        "vision = { width = 128, layers = 4, heads = 4 }\nidentities_per_class = 8\n",
        "temperature = 0.1",
    );
    let smaller = size.replace("layers = 4", "layers = 2") + "temperature = 1e-300";
    let changed = settings.replace(&format!("{size}{rest}"), &smaller);
    assert_ne!(changed, settings);
    let other = dir.path().join("other.toml");
    std::fs::write(&other, changed).unwrap();
    let mut command: Command = program();
    command.arg("pretrain").arg(&other);
    command.args(["--only", "dino", "--threads", "1", "--images", "64"]);
    command.arg("--out").arg(&out).arg("--store").arg(&store);
    say(command).says(1, &["not finite"]);
    assert!(std::fs::read(&config).unwrap() == before);
    let notes = std::fs::read_to_string(out.join("dino/training.json")).unwrap();
    let notes: Value = serde_json::from_str(&notes).unwrap();
    assert_eq!(notes["images"], 192);
    assert_eq!(notes["sessions"].as_array().unwrap().len(), 2);

    let metrics = Store::open(&store).await.unwrap().metrics().await.unwrap();
    let filter = Some("stage = 'pretrain:dino' AND name = 'loss'");
    let losses = metrics.rows(filter, Columns::All).await.unwrap();
    let images: Vec<u64> = losses.iter().map(|row| row.step).collect();
    assert_eq!(images, [128, 64]);
    // Fresh weights begin above 5.
    assert!(losses.iter().all(|row| row.value < 3.0), "{losses:?}");
    assert_ne!(losses[0].run, losses[1].run);
}

/// Nano's settings for the newer diffusion models, with batches of two.
fn small_batches() -> String {
    let settings = std::fs::read_to_string(SETTINGS).unwrap();
    let (others, newer) = settings.split_at(settings.find("[sd35]").unwrap());
    let newer: Vec<String> = newer
        .lines()
        .map(|line| match line.split_once("batch_size = ") {
            Some((before, after)) => {
                let rest = after.split_once(',').unwrap().1;
                format!("{before}batch_size = 2,{rest}")
            }
            None => line.to_string(),
        })
        .collect();
    format!("{others}{}\n", newer.join("\n"))
}

#[test]
fn the_newer_diffusion_models_are_made_from_what_is_there_and_trained_on() {
    let dir = tempfile::tempdir().unwrap();
    let (out, settings) = (dir.path().join("out"), dir.path().join("small.toml"));
    for folder in ["sd3", "llamagen/t5"] {
        copy_tree(&Path::new(CHECKPOINTS).join(folder), &out.join(folder));
    }
    std::fs::write(&settings, small_batches()).unwrap();
    let pretrain = |only: &str| {
        let mut command = program();
        command.arg("pretrain").arg(&settings);
        command.args(["--only", only, "--images", "4", "--threads", "1", "--out"]);
        command
            .arg(&out)
            .arg("--store")
            .arg(dir.path().join("store"));
        say(command)
    };
    // FLUX learns from a model that is not there yet.
    pretrain("flux").says(
        1,
        &[
            "sd35",
            "hint: train the models that this one stands on first",
        ],
    );
    for _ in 0..2 {
        pretrain("sd35,flux,sdxl").says(0, &[]);
    }
    for (name, network, side) in [
        ("sd35", "transformer", 64),
        ("flux", "transformer", 64),
        ("sdxl", "unet", 32),
    ] {
        let folder = out.join(name);
        let notes = std::fs::read_to_string(folder.join(network).join("training.json")).unwrap();
        let notes: Value = serde_json::from_str(&notes).unwrap();
        assert_eq!(notes["images"], 8, "{name}");
        let mut command = program();
        command.args([
            "sample",
            "--prompt",
            "a dog in the snow",
            "--num-inference-steps",
            "2",
            "--model",
        ]);
        command.arg(&folder).arg("--out").arg(folder.join("drawn"));
        say(command).says(0, &[]);
        let drawn = find(&folder.join("drawn"), &|name| name.ends_with(".png"));
        let drawn = image::open(&drawn[0]).unwrap();
        assert_eq!((drawn.width(), drawn.height()), (side, side), "{name}");
    }
}

#[test]
fn every_nano_supervisor_learns_a_subject_and_makes_proxies() {
    for model in ["nano-sdxl", "nano-sd3.5", "nano-flux"] {
        let place = Place::new();
        let supervisor = format!("supervisor.model={model}");
        let set = [
            supervisor.as_str(),
            "supervisor.resolution=32",
            "supervisor.steps=2",
            "proxies.count=4",
            "student.steps=2",
        ];
        say(place.command(&set)).says(0, &[]);
        let adapters = find(&place.only_run(), &|name| name.ends_with(".safetensors"));
        assert!(adapters.len() >= 2, "{model}: {adapters:?}");
    }
}
