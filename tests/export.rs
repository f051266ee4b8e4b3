//! What exports promise: the layouts that other trainers read, pictures unchanged, whole or not at all.

use std::collections::BTreeSet;
use std::path::Path;

use tempfile::TempDir;

use crate::support;
use crate::support::filled;
use crate::support::filled::{SMALL, key};
use crate::support::{Said, program, say};

async fn store(count: u64) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    filled::store(&dir.path().join("store"), SMALL, count).await;
    dir
}

fn export(dir: &Path, arguments: &[&str]) -> Said {
    let mut command = program();
    command
        .arg("export")
        .arg("--store")
        .arg(dir.join("store"))
        .args(arguments);
    say(command)
}

fn exported(dir: &Path, arguments: &[&str]) -> String {
    let to = dir.join("to");
    let said = export(dir, &[arguments, &["--to", to.to_str().unwrap()]].concat());
    assert_eq!(said.code, Some(0), "{said:?}");
    said.out
}

/// Paths of the files below `dir`.
fn files(dir: &Path) -> BTreeSet<String> {
    let all = support::find(dir, &|_| true)
        .into_iter()
        .filter(|path| path.is_file());
    all.map(|path| path.strip_prefix(dir).unwrap().display().to_string())
        .collect()
}

fn stem(number: u64) -> String {
    format!("dog{}-{:05}-{}", number % 4, number / 4, &key(number)[..12])
}

#[tokio::test]
async fn kohya_finds_repeats_token_and_class_in_the_folder_and_captions_beside_the_pictures() {
    let dir = store(12).await;
    let said = exported(
        dir.path(),
        &["--subject", "dog1", "--layout", "kohya", "--repeats", "10"],
    );
    assert!(said.starts_with("3 proxies in "), "{said}");
    let folder = dir.path().join("to/10_sks dog");
    let expected: BTreeSet<String> = [1, 5, 9]
        .into_iter()
        .flat_map(|n| [format!("{}.png", stem(n)), format!("{}.txt", stem(n))])
        .collect();
    assert_eq!(files(&folder), expected);
    assert_eq!(files(&dir.path().join("to")).len(), 6);
    let picture = std::fs::read(folder.join(format!("{}.png", stem(5)))).unwrap();
    assert_eq!(picture, filled::proxy(5).image);
    let caption = std::fs::read_to_string(folder.join(format!("{}.txt", stem(5)))).unwrap();
    assert_eq!(caption, "a sks dog in place 5");
}

#[tokio::test]
async fn ai_toolkit_gets_a_folder_for_each_subject() {
    let dir = store(70).await;
    exported(
        dir.path(),
        &[
            "--layout",
            "ai-toolkit",
            "--where",
            "scored.number < 17 AND content <> '' -- not the last",
        ],
    );
    let subjects = std::fs::read_dir(dir.path().join("to")).unwrap();
    let subjects: BTreeSet<String> = subjects
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(
        subjects,
        ["dog0", "dog1", "dog2", "dog3"].map(String::from).into()
    );
    for number in 0..68 {
        let path = dir
            .path()
            .join(format!("to/dog{}/{}.png", number % 4, stem(number)));
        assert_eq!(
            std::fs::read(&path).unwrap(),
            filled::proxy(number).image,
            "{}",
            path.display()
        );
    }
    assert_eq!(files(&dir.path().join("to")).len(), 2 * 68);
}

#[tokio::test]
async fn an_imagefolder_names_each_file_with_its_text_in_the_chosen_order() {
    let dir = store(40).await;
    exported(
        dir.path(),
        &[
            "--order",
            "dino DESC, key",
            "--limit",
            "5",
            "--where",
            "clip_t > 0.5",
        ],
    );
    let text = std::fs::read_to_string(dir.path().join("to/metadata.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let mut wanted: Vec<u64> = (0..40).filter(|n| (n % 37) as f32 / 37.0 > 0.5).collect();
    wanted.sort_by_key(|n| (std::cmp::Reverse(n % 61), key(*n)));
    let names: Vec<String> = lines
        .iter()
        .map(|line| line["file_name"].as_str().unwrap().to_string())
        .collect();
    assert_eq!(
        names,
        wanted[..5]
            .iter()
            .map(|n| format!("{}.png", stem(*n)))
            .collect::<Vec<_>>()
    );
    assert_eq!(
        lines[0]["text"],
        format!("a sks dog in place {}", wanted[0] % 50)
    );
    let dino = lines[0]["dino"].as_f64().unwrap();
    assert!(
        (dino - (wanted[0] % 61) as f64 / 61.0).abs() < 1e-5,
        "{dino}"
    );
    let expected: BTreeSet<String> = names
        .into_iter()
        .chain(["metadata.jsonl".to_string()])
        .collect();
    assert_eq!(files(&dir.path().join("to")), expected);
}

#[tokio::test]
async fn the_most_alike_come_first_and_onto_a_sheet() {
    let dir = store(60).await;
    let sheet = dir.path().join("sheet.png");
    let like = ["--like", &key(7), "--by", "clip", "--limit", "6"];
    let out = ["--sheet", sheet.to_str().unwrap(), "--columns", "3"];
    exported(dir.path(), &[&like[..], &out[..]].concat());
    let text = std::fs::read_to_string(dir.path().join("to/metadata.jsonl")).unwrap();
    let first = text.lines().next().unwrap();
    assert!(first.contains(&key(7)), "{first}");
    assert_eq!(text.lines().count(), 6);
    let sheet = image::open(&sheet).unwrap();
    assert!(
        sheet.width() > 3 * 128 && sheet.width() < 4 * 128 + 64,
        "{}",
        sheet.width()
    );
    assert!(sheet.height() > 2 * 128, "{}", sheet.height());
}

#[tokio::test]
async fn nothing_is_replaced_and_nothing_is_left_half() {
    let dir = store(4).await;
    let to = dir.path().join("to");
    std::fs::create_dir(&to).unwrap();
    std::fs::write(to.join("mine"), "mine").unwrap();
    let said = export(dir.path(), &["--to", to.to_str().unwrap()]);
    said.says(1, &["to is there already", "choose another name"]);
    assert_eq!(files(&to), ["mine".to_string()].into());
    let fresh = dir.path().join("fresh");
    let fresh = fresh.to_str().unwrap();
    export(dir.path(), &["--to", fresh, "--subject", "nobody"]).says(1, &["no proxy is chosen"]);
    export(dir.path(), &["--to", fresh, "--where", "nothing > 1"]).says(1, &["no column nothing"]);
    export(dir.path(), &["--to", fresh, "--like", &key(1)]).says(1, &["--limit N"]);
    let left = support::find(dir.path(), &|name| {
        name.contains("fresh") || name.ends_with(".tmp")
    });
    assert_eq!(left, Vec::<std::path::PathBuf>::new());
}

#[tokio::test]
async fn samples_of_evaluations_and_references_are_exported_too() {
    let dir = store(4).await;
    let store = proxytune::store::Store::open(dir.path().join("store"))
        .await
        .unwrap();
    let sample = |step: u64, number: u64| proxytune::store::EvaluationRow {
        key: blake3::hash(format!("sample {step} {number}").as_bytes())
            .to_hex()
            .to_string(),
        kind: proxytune::store::PictureKind::Sample,
        method: Some(proxytune::store::Method::Student),
        step,
        prompt: format!("a sks dog at step {step}"),
        seed: number,
        image: Some(filled::proxy(number).image),
        ..filled::evaluation(SMALL, number)
    };
    let samples: Vec<_> = [50, 100]
        .iter()
        .flat_map(|step| [1, 2].map(|n| sample(*step, n)))
        .collect();
    let table = store
        .evaluations(filled::EVALUATORS, SMALL.clip, SMALL.dino)
        .await
        .unwrap();
    table.append(&samples).await.unwrap();
    let reference = proxytune::store::SubjectRow {
        key: "f".repeat(64),
        subject: "dog1".into(),
        class: "dog".into(),
        token: "sks".into(),
        index: 3,
        file_name: "03.jpg".into(),
        width: 32,
        height: 32,
        image: filled::proxy(9).image,
        created_us: 1,
    };
    store
        .subjects()
        .await
        .unwrap()
        .append(&[reference])
        .await
        .unwrap();
    drop((table, store));

    let between = "kind = 'sample' AND method = 'student' AND step = 50 AND dino >= 0";
    let said = exported(dir.path(), &["--where", between]);
    assert!(said.starts_with("2 samples in "), "{said}");
    let text = std::fs::read_to_string(dir.path().join("to/metadata.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    for (line, number) in lines.iter().zip([1, 2]) {
        assert_eq!(
            (line["kind"].as_str(), line["step"].as_u64()),
            (Some("sample"), Some(50))
        );
        assert_eq!(line["text"], "a sks dog at step 50");
        assert!(
            line["file_name"]
                .as_str()
                .unwrap()
                .starts_with(&format!("dog{number}-student-00050-"))
        );
        let picture = dir
            .path()
            .join("to")
            .join(line["file_name"].as_str().unwrap());
        assert_eq!(std::fs::read(picture).unwrap(), filled::proxy(number).image);
    }
    let to = |name: &str| dir.path().join(name).display().to_string();
    let said = export(
        dir.path(),
        &[
            "--kind",
            "reference",
            "--layout",
            "kohya",
            "--to",
            &to("photos"),
        ],
    );
    assert!(said.out.starts_with("1 reference in "), "{said:?}");
    let found = files(&dir.path().join("photos/1_sks dog"));
    assert!(
        found
            .iter()
            .any(|name| name.starts_with("dog1-reference-00003-ffff")),
        "{found:?}"
    );
    let all = ["--kind", "proxy", "--kind", "sample", "--kind", "reference"];
    let said = export(
        dir.path(),
        &[&all[..], &["--sheet", &to("all.png"), "--to", &to("all")]].concat(),
    );
    assert!(said.out.starts_with("9 pictures in "), "{said:?}");
    // Who does not speak of kinds means proxies.
    let said = export(dir.path(), &["--to", &to("proxies")]);
    assert!(said.out.starts_with("4 proxies in "), "{said:?}");
    let said = export(
        dir.path(),
        &[
            "--like",
            &key(1),
            "--limit",
            "1",
            "--kind",
            "sample",
            "--to",
            &to("x"),
        ],
    );
    said.says(1, &["--like finds proxies alone"]);
}
