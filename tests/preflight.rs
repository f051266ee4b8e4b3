//! What can be known before work starts: `check` says it, and `run` refuses it in the same words and leaves nothing.

use std::path::Path;
use std::process::Command;

use crate::support::{Place, SMOKE, Said, find, program, say};

const PHOTOS: &str = "datasets/nano/subjects/dog1";

/// `check` of the smoke pipeline with the store and the runs of `place`.
fn checking(place: &Place, arguments: &[&str]) -> Command {
    let mut command = program();
    command.args(["check", SMOKE, "--store"]).arg(place.store());
    command.arg("--out").arg(place.out());
    command.args(arguments);
    command
}

fn check(place: &Place, overrides: &[&str]) -> Said {
    let set = overrides.iter().flat_map(|text| ["--set", text]);
    say(checking(place, &set.collect::<Vec<_>>()))
}

fn proxytune(arguments: &[&str]) -> Said {
    let mut command = program();
    command.args(arguments);
    say(command)
}

/// A folder called `name` with the first `count` photos of a subject.
fn photos(place: &Place, name: &str, count: usize) -> String {
    let folder = place.path().join(name);
    std::fs::create_dir_all(&folder).unwrap();
    for number in 0..count {
        let file = format!("{number:02}.png");
        std::fs::copy(Path::new(PHOTOS).join(&file), folder.join(&file)).unwrap();
    }
    folder.to_str().unwrap().to_string()
}

#[test]
fn what_run_refuses_at_once_check_refuses_in_the_same_words_and_nothing_is_made() {
    let place = Place::new();
    let empty = format!("subject.dog1.images={}", photos(&place, "empty", 0));
    let a_file = format!("subject.dog1.images={PHOTOS}/00.png");
    let cases: &[(&[&str], &str)] = &[
        (
            &["student.resolution=64"],
            "the model draws images of 32 pixels, not of 64",
        ),
        (
            &["supervisor.resolution=128"],
            "choose a multiple of 4 up to 32 for this model",
        ),
        (
            &["student.targets=[\"wqkv\", \"wq\"]"],
            "nano-llamagen has no layer that is called \"wq\"",
        ),
        (
            &["direct.targets=[\"tok_embeddings\"]"],
            "no layer that is called \"tok_embeddings\"",
        ),
        (
            &["supervisor.targets=[\"to_q\", \"nothing\"]"],
            "nano-sd3 has no layer that is called \"nothing\"",
        ),
        #[cfg(not(feature = "cuda"))]
        (
            &["student.device=cuda"],
            "this program was built without CUDA",
        ),
        #[cfg(not(feature = "cuda"))]
        (
            &["evaluation.device=cuda:1"],
            "this program was built without CUDA",
        ),
        (&[&empty], "no usable photo"),
        (&[&a_file], "is not a folder"),
        (
            &["student.model=nano-lumina", "student.resolution=64"],
            "an image 8 units high or wide",
        ),
    ];
    for (overrides, part) in cases {
        let (checked, ran) = (check(&place, overrides), say(place.command(overrides)));
        checked.says(2, &[part, "hint: "]);
        ran.says(2, &[part, "hint: "]);
        assert!(checked.out.is_empty(), "{}", checked.out);
        assert!(
            !place.out().exists() && !place.store().exists(),
            "{overrides:?}"
        );
    }
}

#[test]
fn what_is_not_here_yet_check_says_without_a_fault_and_run_refuses() {
    let place = Place::new();
    let missing = place.path().join("nowhere");
    let images = format!("subject.dog1.images={}", missing.display());
    let checked = check(&place, &[&images]);
    checked.says(
        3,
        &[
            "not here yet: --set subject.dog1.images=",
            "there is no folder",
        ],
    );
    assert!(checked.out.contains("[student]"), "{}", checked.out);
    say(place.command(&[&images])).says(2, &["there is no folder", "hint: check the path"]);
    assert!(!place.out().exists());
}

#[cfg(not(feature = "cuda"))]
#[test]
fn every_pipeline_that_ships_is_whole_but_for_what_is_not_here() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("pipelines");
    let mut checked = 0;
    for file in find(&folder, &|name| name.ends_with(".toml")) {
        // That one is for another command.
        if file.ends_with("nano-pretrain.toml") {
            continue;
        }
        let mut command = program();
        command.arg("check").arg(&file);
        // There is no card here.
        let text = std::fs::read_to_string(&file).unwrap();
        if text.contains("cuda") {
            for section in ["supervisor", "student", "evaluation"] {
                command.args(["--set", &format!("{section}.device=cpu")]);
            }
        }
        let said = say(command);
        assert!(matches!(said.code, Some(0 | 3)), "{file:?}: {said:?}");
        assert!(said.out.contains("[student]"), "{file:?}");
        for line in said.err.lines() {
            assert!(!line.starts_with("warning: "), "{file:?}: {line}");
        }
        checked += 1;
    }
    assert!(checked >= 13, "{checked}");
}

#[test]
fn one_photo_alone_and_captions_that_are_not_read_or_name_nothing_are_warned_of() {
    let place = Place::new();
    let folder = photos(&place, "one", 1);
    std::fs::write(Path::new(&folder).join("00.txt"), "a dog").unwrap();
    std::fs::write(Path::new(&folder).join("00.caption"), "a sks dog").unwrap();
    std::fs::write(Path::new(&folder).join("notes.txt"), "for me").unwrap();
    let images = format!("subject.dog1.images={folder}");
    let parts = [
        "dog1: there is one photo only",
        "captions beside its photos are ignored (00.caption)",
        "a caption does not name it, so that the photo is not learnt as \"sks\": \"a dog\"",
    ];
    check(&place, &[&images]).says(3, &parts);
    let tiny = [
        "supervisor.steps=1",
        "proxies.count=4",
        "student.steps=1",
        "direct.enabled=false",
        "evaluation.every=0",
    ];
    let overrides: Vec<&str> = tiny.into_iter().chain([images.as_str()]).collect();
    say(place.command(&overrides)).says(3, &parts);
}

#[test]
fn a_place_that_cannot_be_written_is_known_beforehand() {
    let place = Place::new();
    std::fs::write(place.out(), "a file").unwrap();
    check(&place, &[]).says(2, &["--out: ", "hint: "]);
    std::fs::remove_file(place.out()).unwrap();
    std::fs::write(place.store(), "a file").unwrap();
    check(&place, &[]).says(2, &["--store: ", "hint: "]);
}

#[test]
fn a_pipeline_whose_name_cannot_be_that_of_a_directory_is_refused_before_work() {
    let place = Place::new();
    for (name, part) in [
        ("x".repeat(240), "has 240 bytes"),
        ("a\u{1b}b".to_string(), "control characters"),
    ] {
        let file = place.path().join(format!("{name}.toml"));
        std::fs::copy(SMOKE, &file).unwrap();
        for command in ["check", "run"] {
            let mut typed = program();
            typed
                .arg(command)
                .arg(&file)
                .arg("--store")
                .arg(place.store());
            typed.arg("--out").arg(place.out());
            say(typed).says(2, &[part, "hint: "]);
        }
    }
    assert!(!place.out().exists());
}

#[test]
fn options_and_fields_refuse_the_same_numbers_in_the_same_words() {
    let place = Place::new();
    let sample = ["sample", "--model", "nano-llamagen", "--prompt", "a dog"];
    for (field, option, number) in [
        ("threads", "--threads", "1000000"),
        (
            "evaluation.batch_size",
            "--batch-size",
            "9223372036854775807",
        ),
        ("evaluation.images_per_prompt", "--count", "1000000000000"),
        ("proxies.num_inference_steps", "--num-inference-steps", "0"),
        ("student.guidance_scale", "--guidance-scale", "1e300"),
        ("student.top_k", "--top-k", "18446744073709551615"),
        ("student.top_p", "--top-p", "0"),
        ("student.temperature", "--temperature", "-1"),
        (
            "student.guidance_interval",
            "--guidance-interval",
            "99999999999",
        ),
        ("seed", "--seed", "9223372036854775808"),
    ] {
        let refused = check(&place, &[&format!("{field}={number}")]);
        let (_, words) = refused.err.split_once("hint: ").unwrap();
        let option = format!("{option}={number}");
        let typed = proxytune(&[sample.as_slice(), &[&option]].concat());
        typed.says(2, &[words.trim()]);
    }
    proxytune(&["generate", SMOKE, "--count", "1000000000000"]).says(2, &["from 1 to 1000000: "]);
    proxytune(&["generate", SMOKE, "--shard", "1/1000000000"]).says(2, &["from 1 to 4096: "]);
}

#[test]
fn ones_own_subjects_are_typed_with_run_check_graph_and_generate() {
    let place = Place::new();
    let (rex, tom) = (photos(&place, "rex", 3), photos(&place, "pets/cat/tom", 3));
    let typed = format!("rex={rex}:dog");
    let pets = place.path().join("pets").display().to_string();
    let both = ["--subject", &typed, "--subjects", &pets];
    let checked = say(checking(&place, &both));
    checked.says(0, &[]);
    for part in [
        "[subject.rex]",
        "[subject.tom]",
        "token = \"ohw\"",
        &rex,
        &tom,
    ] {
        assert!(checked.out.contains(part), "{part}: {}", checked.out);
    }
    assert!(!checked.out.contains("dog1"), "{}", checked.out);
    let graph = proxytune(&[["graph", SMOKE].as_slice(), &both].concat());
    assert!(graph.out.contains("photos of 2 subjects"), "{graph:?}");
    let tiny = [
        "--set",
        "supervisor.steps=1",
        "--set",
        "proxies.count=2",
        "--set",
        "student.steps=1",
        "--set",
        "direct.enabled=false",
        "--set",
        "evaluation.every=0",
        "--subject",
        &typed,
    ];
    let mut command = program();
    command
        .args(["generate", SMOKE, "--store"])
        .arg(place.store());
    let proxies = place.path().join("proxies");
    command.arg("--out").arg(proxies).args(tiny);
    say(command).says(0, &[]);
    let mut command = place.command(&[]);
    command.args(tiny);
    let ran = say(command);
    ran.says(0, &[]);
    let supervisors = find(&place.only_run().join("supervisor"), &|_| true);
    let of = |name: &str| {
        supervisors
            .iter()
            .any(|path| path.to_string_lossy().contains(name))
    };
    assert!(of("/rex/") && !of("/dog1/"), "{supervisors:?}");
    proxytune(&["check", SMOKE, "--subject", "rex"]).says(2, &["NAME=DIR:CLASS", "hint: "]);
}

#[test]
fn hints_fit_what_the_folder_is_for() {
    let place = Place::new();
    let empty = photos(&place, "empty", 0);
    let evaluate = ["evaluate", "--class", "dog", "--references", PHOTOS];
    let scored = proxytune(&[evaluate.as_slice(), &["--images", &empty]].concat());
    scored.says(
        1,
        &[
            "no usable photo",
            "hint: name the folder with pictures to score",
        ],
    );
    let a_file = format!("{PHOTOS}/00.png");
    let scored = proxytune(&[evaluate.as_slice(), &["--images", &a_file]].concat());
    scored.says(
        1,
        &[
            "is not a folder",
            "hint: name the folder with pictures to score",
        ],
    );
    let references = [
        "evaluate",
        "--class",
        "dog",
        "--images",
        PHOTOS,
        "--references",
        &empty,
    ];
    proxytune(&references).says(1, &["hint: name the folder with the subject's photos"]);
}
