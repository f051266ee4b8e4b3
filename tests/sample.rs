//! What `sample` leaves in its folder.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::{Place, Said, find, program, say};

const MODEL: [&str; 3] = ["sample", "--model", "nano-llamagen"];

fn sample(out: &Path, more: &[&str]) -> Said {
    let mut command = program();
    command.args(MODEL).args(more).arg("--out").arg(out);
    say(command)
}

fn pictures(out: &Path) -> Vec<PathBuf> {
    find(out, &|name| name.ends_with(".png"))
}

/// What is noted of the pictures in `out`, a line each.
fn noted(out: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(out.join(".metadata.jsonl")).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn three_seeds_leave_three_pictures_that_know_how_they_were_drawn() {
    let place = Place::new();
    let out = place.path().join("out");
    let prompt = "a sks dog, \u{202e}\"in\" the snow \u{1b}[2J 猫";
    let mut seen = Vec::new();
    for seed in ["1", "2", "3"] {
        let said = sample(&out, &["--prompt", prompt, "--seed", seed, "--top-k", "77"]);
        assert_eq!(said.code, Some(0), "{said:?}");
        assert!(
            !said.err.contains('\u{1b}') && !said.out.contains('\u{1b}'),
            "{said:?}"
        );
        let listed = PathBuf::from(said.out.trim_end());
        assert!(listed.is_file(), "{said:?}");
        seen.push(std::fs::read(listed).unwrap());
    }
    assert!(seen[0] != seen[1] && seen[1] != seen[2] && seen[0] != seen[2]);
    assert_eq!(pictures(&out).len(), 3);
    // Beside the pictures nothing is in sight.
    assert_eq!(find(&out, &|name| !name.starts_with('.')).len(), 3);
    for (number, line) in noted(&out).iter().enumerate() {
        assert!(out.join(line["file_name"].as_str().unwrap()).is_file());
        assert_eq!(line["text"], prompt);
        assert_eq!(line["seed"], number + 1);
        assert_eq!(
            (&line["model"], &line["top_k"]),
            (&"nano-llamagen".into(), &77.into())
        );
    }
    let decoder = png::Decoder::new(std::io::Cursor::new(&seen[1]));
    let reader = decoder.read_info().unwrap();
    let text = |keyword: &str| {
        let mut texts = reader.info().utf8_text.iter();
        let found = texts.find(|text| text.keyword == keyword).unwrap();
        found.get_text().unwrap()
    };
    assert_eq!(text("prompt"), prompt);
    assert_eq!((text("seed"), text("top_k")), ("2".into(), "77".into()));
    assert_eq!(text("model"), "nano-llamagen");
    // The same command draws the same bytes.
    let again = place.path().join("again");
    sample(
        &again,
        &["--prompt", prompt, "--seed", "2", "--top-k", "77"],
    )
    .says(0, &[]);
    assert!(std::fs::read(&pictures(&again)[0]).unwrap() == seen[1]);
}

#[test]
fn options_that_the_model_does_not_draw_with_are_refused() {
    let place = Place::new();
    for (model, option, value) in [
        ("nano-sd3", "--top-k", "5"),
        ("nano-sd3", "--temperature", "1"),
        ("nano-llamagen", "--negative-prompt", "blurry"),
        ("nano-llamagen", "--num-inference-steps", "3"),
        ("nano-lumina", "--guidance-interval", "3"),
    ] {
        let mut command = program();
        command.args([
            "sample", "--prompt", "a dog", "--model", model, option, value,
        ]);
        command.arg("--out").arg(place.path());
        say(command).says(
            1,
            &[
                &format!("{option} has no effect on a"),
                "hint: leave it out",
            ],
        );
    }
}

#[test]
fn evaluate_finds_the_prompts_of_what_sample_drew() {
    let place = Place::new();
    let out = place.path().join("out");
    sample(&out, &["--prompt", "a sks dog in the snow", "--count", "2"]).says(0, &[]);
    let mut command = program();
    let photos = "datasets/nano/subjects/dog1";
    command.args([
        "evaluate",
        "--references",
        photos,
        "--class",
        "dog",
        "--images",
    ]);
    command.arg(&out);
    let said = say(command);
    assert_eq!(said.code, Some(0), "{said:?}");
    assert!(!said.out.contains("with \"a dog\""), "{}", said.out);
}

#[test]
fn prompts_of_any_length_and_script_have_names_that_every_disk_takes() {
    let place = Place::new();
    let out = place.path().join("out");
    let long = "a sks dog on the beach with a mountain in the background ".repeat(6);
    let japanese = "美しい猫が浜辺で遊んでいる".repeat(9);
    let prompts = [&long, &japanese, "../../etc/a\nb", "🐶"];
    let mut more = Vec::new();
    for prompt in &prompts {
        more.extend(["--prompt", prompt]);
    }
    let said = sample(&out, &more);
    assert_eq!(said.code, Some(0), "{said:?}");
    assert_eq!(said.out.lines().count(), 4, "{}", said.out);
    let pictures = pictures(&out);
    assert_eq!(pictures.len(), 4, "{pictures:?}");
    for picture in &pictures {
        let name = picture.file_name().unwrap().to_str().unwrap();
        assert!(
            name.len() < 140 && !name.chars().any(char::is_control),
            "{name}"
        );
        assert_eq!(picture.parent(), Some(out.as_path()));
    }
    let texts: Vec<Value> = noted(&out)
        .iter()
        .map(|line| line["text"].clone())
        .collect();
    assert_eq!(texts, prompts);
}

#[test]
fn pictures_are_written_when_they_are_drawn_and_counting_goes_on_after_what_is_there() {
    let place = Place::new();
    let out = place.path().join("out");
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("0041-mine.png"), "not a picture").unwrap();
    std::fs::write(
        out.join(".metadata.jsonl"),
        r#"{"file_name": "0041-mine.png", "text": "mine"}"#,
    )
    .unwrap();
    // A folder with the name of the fifth picture stops nothing: the number is taken.
    std::fs::create_dir(out.join("0046-a-dog.png")).unwrap();
    let said = sample(
        &out,
        &["--prompt", "a dog", "--count", "2", "--batch-size", "1"],
    );
    assert_eq!(said.code, Some(0), "{said:?}");
    assert_eq!(
        std::fs::read(out.join("0041-mine.png")).unwrap(),
        b"not a picture"
    );
    assert!(out.join("0047-a-dog.png").is_file() && out.join("0048-a-dog.png").is_file());
    assert_eq!(noted(&out).len(), 3);
}

#[cfg(unix)]
#[test]
fn a_folder_that_goes_away_keeps_what_was_drawn_before_and_ends_with_an_error() {
    let place = Place::new();
    let (out, kept) = (place.path().join("out"), place.path().join("kept"));
    let mut command = program();
    command
        .args(MODEL)
        .args(["--prompt", "a dog", "--count", "400", "--batch-size", "1"]);
    command.arg("--out").arg(&out);
    let mut running = crate::support::Running::start(command);
    assert!(running.runs_until(|| !pictures(&out).is_empty()));
    std::fs::rename(&out, &kept).unwrap();
    let (status, said) = running.wait();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("error: "), "{said}");
    assert!(!pictures(&kept).is_empty());
}
