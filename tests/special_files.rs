//! Pipes, devices and sockets where files belong: refused at once, by name, wherever a file is read.
#![cfg(unix)]

use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::support::{Place, Running, copy_tree, program};

const DOG: &str = "datasets/nano/subjects/dog1";
/// Longer than any of these commands takes.
const PATIENCE: Duration = Duration::from_secs(100);

fn pipe(path: &Path) {
    let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: the name ends with a zero byte.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
}

/// A pipe, a link to a device without end, and a socket, called `name` in three folders.
fn special(place: &Place, name: &str) -> [(std::path::PathBuf, &'static str); 3] {
    let at = |folder: &str| {
        let folder = place.path().join(folder);
        std::fs::create_dir_all(&folder).unwrap();
        folder.join(name)
    };
    let (one, two, three) = (at("pipe"), at("device"), at("socket"));
    pipe(&one);
    symlink("/dev/zero", &two).unwrap();
    UnixListener::bind(&three).unwrap();
    [(one, "named pipe"), (two, "device"), (three, "socket")]
}

/// How `command` ended, which it must, and what it said on standard error.
fn ended(command: Command) -> (Option<i32>, String) {
    let mut running = Running::start(command);
    assert!(running.ends_within(PATIENCE), "it hangs");
    let (status, said) = running.wait();
    (status.code(), said)
}

fn copy_dog(to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for number in 0..3 {
        let name = format!("0{number}.png");
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join(DOG).join(&name);
        std::fs::copy(from, to.join(name)).unwrap();
    }
}

#[test]
fn a_folder_of_photos_sets_pipes_devices_and_sockets_aside() {
    let place = Place::new();
    for (file, word) in special(&place, "camera.jpg") {
        copy_dog(file.parent().unwrap());
        let mut command = program();
        command.args([
            "evaluate",
            "--class",
            "dog",
            "--images",
            DOG,
            "--references",
        ]);
        command.arg(file.parent().unwrap());
        let (code, said) = ended(command);
        assert_eq!(code, Some(3), "{said}");
        assert!(said.contains("camera.jpg") && said.contains(word), "{said}");
    }
}

#[test]
fn check_and_run_refuse_pipelines_that_are_no_files() {
    let place = Place::new();
    for (file, word) in special(&place, "pipeline.toml") {
        for verb in ["check", "run"] {
            let mut command = program();
            command.arg(verb).arg(&file);
            let (code, said) = ended(command);
            assert!(matches!(code, Some(1 | 2)), "{said}");
            assert!(said.contains(word) && said.contains("hint: "), "{said}");
        }
    }
}

#[test]
fn prompts_captions_and_metadata_that_are_no_files_are_refused() {
    let place = Place::new();
    for (file, word) in special(&place, "prompts.txt") {
        let mut command = program();
        command.args([
            "evaluate",
            "--class",
            "dog",
            "--references",
            DOG,
            "--model",
            "nano-llamagen",
        ]);
        command.arg("--prompts").arg(&file);
        let (code, said) = ended(command);
        assert!(matches!(code, Some(1 | 2)), "{said}");
        assert!(said.contains(word), "{said}");
    }
    for name in ["metadata.jsonl", "00.txt"] {
        let place = Place::new();
        for (file, word) in special(&place, name) {
            copy_dog(file.parent().unwrap());
            let mut command = program();
            command.args([
                "evaluate",
                "--class",
                "dog",
                "--references",
                DOG,
                "--images",
            ]);
            command.arg(file.parent().unwrap());
            let (code, said) = ended(command);
            assert!(matches!(code, Some(1 | 2)), "{said}");
            assert!(said.contains(name) && said.contains(word), "{said}");
        }
    }
}

#[test]
fn checkpoints_and_adapters_with_pipes_in_them_are_refused() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for name in [
        "config.json",
        "model.safetensors",
        "vq/config.json",
        "t5/tokenizer.json",
    ] {
        let place = Place::new();
        let model = place.path().join("model");
        copy_tree(&root.join("datasets/nano/checkpoints/llamagen"), &model);
        std::fs::remove_file(model.join(name)).unwrap();
        pipe(&model.join(name));
        let mut command = program();
        command
            .args(["sample", "--prompt", "a dog", "--out"])
            .arg(place.path().join("out"));
        command.arg("--model").arg(&model);
        let (code, said) = ended(command);
        assert!(matches!(code, Some(1 | 2)), "{name}: {said}");
    }
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        let place = Place::new();
        let adapter = place.path().join("adapter");
        copy_tree(
            &root.join("tests/golden/llamagen-gpt/two-layers/adapter"),
            &adapter,
        );
        std::fs::remove_file(adapter.join(name)).unwrap();
        pipe(&adapter.join(name));
        let mut command = program();
        command
            .args(["sample", "--prompt", "a dog", "--out"])
            .arg(place.path().join("out"));
        command
            .args(["--model", "nano-llamagen", "--adapter"])
            .arg(&adapter);
        let (code, said) = ended(command);
        assert!(matches!(code, Some(1 | 2)), "{name}: {said}");
    }
}
