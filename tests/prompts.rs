//! What of a prompt a model does not read is said, wherever a prompt is given.

use std::path::{Path, PathBuf};

use crate::support::{Place, SMOKE, Said, program, say};

const PHOTOS: &str = "datasets/nano/subjects/dog1";
/// More words than any nano tokenizer takes.
const LONG: &str = "a dog on the beach and a dog on the beach and a dog on the beach and a dog on the beach and a dog on the \
                    beach and a dog on the beach and";

fn proxytune(arguments: &[&str]) -> Said {
    let mut command = program();
    command.args(arguments);
    say(command)
}

fn check(prompts: &str) -> Said {
    let set = format!("evaluation.prompts={prompts}");
    proxytune(&["check", SMOKE, "--set", &set])
}

#[test]
fn the_words_that_are_cut_off_are_named_by_check_for_every_encoder_that_reads_them() {
    let said = check(&format!("[\"a {{token}} {{class}} {LONG} in the snow\"]"));
    for reader in [
        "CLIP of nano-sd3 takes",
        "T5 of nano-llamagen takes",
        "CLIP of nano-clip takes",
    ] {
        said.says(3, &["warning: ", reader, "in the snow\" is cut off"]);
    }
    check("[\"a {token} {class} in the snow\"]").says(0, &[]);
}

#[test]
fn a_prompt_that_loses_its_token_is_refused_before_anything_is_made() {
    let place = Place::new();
    let prompts = format!("evaluation.prompts=[\"{LONG} {{token}} {{class}}\"]");
    let part = "the subject's token \"sks\" is cut off from";
    proxytune(&["check", SMOKE, "--set", &prompts])
        .says(2, &[part, "hint: make the prompt shorter"]);
    say(place.command(&[&prompts])).says(2, &[part]);
    let proxies = format!("proxies.prompts=[\"{LONG} {{token}} {{class}}\"]");
    say(place.command(&[&proxies])).says(2, &[part]);
    let supervisor = format!("supervisor.prompt={LONG} {{token}} {{class}}");
    say(place.command(&[&supervisor])).says(2, &[part]);
    let mut command = program();
    command
        .args(["generate", SMOKE, "--set", &proxies, "--store"])
        .arg(place.store());
    command.arg("--out").arg(place.out());
    say(command).says(2, &[part]);
    assert!(!place.out().exists() && !place.store().exists());

    let file = place.path().join("prompts.txt");
    std::fs::write(&file, format!("{LONG} {{token}} {{class}}\n")).unwrap();
    let evaluate = [
        "evaluate",
        "--references",
        PHOTOS,
        "--class",
        "dog",
        "--model",
        "nano-llamagen",
        "--prompts",
        file.to_str().unwrap(),
    ];
    proxytune(&evaluate).says(2, &[part]);
}

#[test]
fn what_is_too_long_for_chameleon_is_refused_beforehand() {
    let place = Place::new();
    let long = [LONG; 5].join(" ");
    let out = place.path().join("drawn");
    let prompt = format!("{long} in the snow");
    let said = proxytune(&[
        "sample",
        "--model",
        "nano-lumina",
        "--prompt",
        &prompt,
        "--out",
        out.to_str().unwrap(),
    ]);
    said.says(2, &["Chameleon of nano-lumina takes", "is cut off"]);
    assert!(!out.exists());
}

#[test]
fn sample_names_what_is_cut_off_and_what_is_unknown() {
    let place = Place::new();
    let out = place.path().join("drawn");
    let out = out.to_str().unwrap();
    let sample = [
        "sample",
        "--model",
        "nano-llamagen",
        "--out",
        out,
        "--prompt",
    ];
    let long = format!("{LONG} in the snow");
    let said = proxytune(&[sample.as_slice(), &[&long]].concat());
    said.says(
        0,
        &[
            "warning: ",
            "T5 of nano-llamagen takes: \"",
            "in the snow\" is cut off",
        ],
    );
    let said = proxytune(&[sample.as_slice(), &["a zyzzyva in the snow"]].concat());
    said.says(
        0,
        &["warning: T5 of nano-llamagen does not know these words: zyzzyva"],
    );
    proxytune(&[sample.as_slice(), &["a dog in the snow"]].concat()).says(0, &[]);
}

#[test]
fn unknown_words_are_named_by_check_run_evaluate_and_query() {
    let place = Place::new();
    let part = "does not know these words: zyzzyva";
    let prompts = "[\"a {token} {class} and a zyzzyva\"]";
    check(prompts).says(3, &[part]);
    let prompts = format!("evaluation.prompts={prompts}");
    let tiny = [
        "supervisor.steps=1",
        "proxies.count=4",
        "student.steps=1",
        "direct.enabled=false",
        "evaluation.every=0",
    ];
    let overrides: Vec<&str> = tiny.into_iter().chain([prompts.as_str()]).collect();
    say(place.command(&overrides)).says(3, &[part]);
    let query = |text: &str| {
        let mut command = program();
        command
            .args(["query", "--like", text, "--store"])
            .arg(place.store());
        say(command)
    };
    query("a zyzzyva").says(3, &["CLIP of clip", part]);
    query(&format!("{LONG} in the snow")).says(3, &["in the snow\" is cut off"]);
    query("a dog").says(0, &[]);
    let file = place.path().join("prompts.txt");
    std::fs::write(&file, "a {token} {class} and a zyzzyva\n").unwrap();
    let evaluate = [
        "evaluate",
        "--references",
        PHOTOS,
        "--class",
        "dog",
        "--model",
        "nano-llamagen",
        "--prompts",
        file.to_str().unwrap(),
    ];
    proxytune(&evaluate).says(3, &["T5 of nano-llamagen", "CLIP of nano-clip", part]);
}

/// A folder of two pictures with `caption` in a text beside each.
fn captioned(dir: &Path, caption: &[u8]) -> PathBuf {
    for (name, photo) in [("a", "03.png"), ("b", "04.png")] {
        std::fs::copy(
            Path::new(PHOTOS).join(photo),
            dir.join(format!("{name}.png")),
        )
        .unwrap();
        std::fs::write(dir.join(format!("{name}.txt")), caption).unwrap();
    }
    dir.to_path_buf()
}

fn evaluate(images: &Path, more: &[&str]) -> Said {
    let arguments = [
        "evaluate",
        "--references",
        PHOTOS,
        "--class",
        "dog",
        "--images",
    ];
    proxytune(&[arguments.as_slice(), &[images.to_str().unwrap()], more].concat())
}

/// The table of scores without the folder's name.
fn scores(said: &Said) -> Vec<String> {
    let line = said.out.lines().nth(1).unwrap();
    let mut words: Vec<String> = line.split_whitespace().map(String::from).collect();
    words.remove(0);
    words
}

#[test]
fn captions_score_the_same_from_every_editor_and_with_every_spelling_of_the_token() {
    let dir = tempfile::tempdir().unwrap();
    let plain = evaluate(&captioned(dir.path(), b"a sks dog in the snow"), &[]);
    plain.says(0, &[]);
    for (caption, token) in [
        ("\u{feff}a sks dog in the snow\r\n", "sks"),
        ("a <new1> dog in the snow", "<new1>"),
        ("a [V] dog in the snow", "[V]"),
        ("a <s0><s1>, dog in the snow", "<s0><s1>"),
        ("a dog in the snow", "sks"),
    ] {
        let said = evaluate(
            &captioned(dir.path(), caption.as_bytes()),
            &["--token", token],
        );
        said.says(0, &[]);
        assert_eq!(scores(&said), scores(&plain), "{caption:?}");
    }
    for empty in ["", " \r\n", "\u{feff}"] {
        let said = evaluate(&captioned(dir.path(), empty.as_bytes()), &[]);
        assert!(
            said.out.contains("2 of 2 images, which have no prompt"),
            "{}",
            said.out
        );
    }
    let said = evaluate(&captioned(dir.path(), b"a d\xF6g"), &[]);
    said.says(
        1,
        &[
            "a.txt: line 1 is not UTF-8",
            "Latin-1",
            "hint: save it as UTF-8",
        ],
    );
    captioned(dir.path(), b"a dog");
    std::fs::write(dir.path().join("a.caption"), "a cat").unwrap();
    evaluate(dir.path(), &[]).says(3, &["ignored: a.caption"]);
}
