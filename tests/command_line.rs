//! What can be typed, and what comes back.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::support::{Place, SMOKE, Said, find, program, say};

fn proxytune(arguments: &[&str]) -> Said {
    let mut command = program();
    command.args(arguments);
    say(command)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A completed run of the smoke pipeline, made once.
fn completed() -> &'static (Place, PathBuf) {
    static ONCE: OnceLock<(Place, PathBuf)> = OnceLock::new();
    ONCE.get_or_init(|| {
        let place = Place::new();
        // A name that must be quoted wherever it is asked for.
        let file = place.path().join("it's.toml");
        std::fs::copy(SMOKE, &file).unwrap();
        let mut command = program();
        command
            .arg("run")
            .arg(&file)
            .arg("--store")
            .arg(place.store());
        command.arg("--out").arg(place.out());
        for change in ["direct.enabled=false", "evaluation.every=0"] {
            command.args(["--set", change]);
        }
        let said = say(command);
        said.says(0, &["a new run"]);
        for part in ["synthesize", "wall time", "CLIP-I", "DINO", "report.html"] {
            assert!(said.out.contains(part), "{part}: {}", said.out);
        }
        let run = place.only_run();
        (place, run)
    })
}

#[test]
fn every_command_has_help_with_an_example() {
    let commands = [
        "run", "check", "graph", "sample", "evaluate", "report", "pretrain",
    ];
    let all = proxytune(&["--help"]);
    for command in commands {
        assert!(all.out.contains(&format!("  {command}")), "{}", all.out);
        let help = proxytune(&[command, "--help"]);
        assert_eq!(help.code, Some(0));
        let (_, examples) = help
            .out
            .split_once("Example")
            .unwrap_or_else(|| panic!("{}", help.out));
        let example = format!("proxytune {command} ");
        assert!(examples.contains(&example), "{}", help.out);
    }
}

#[test]
fn check_names_every_fault_at_once_with_its_place_and_how_to_mend_it() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("faulty.toml");
    let pipeline = "[subject.dog1]\nimages = \"photos\"\nclass = \"dog\"\n\n[supervisor]\nmodel = \"nano-sd3\"\n\
                    stepz = 3\n\n[student]\nmodel = \"nano-llamagen\"\nsteps = \"many\"\n  rank = 0\n";
    std::fs::write(&file, pipeline).unwrap();
    let said = proxytune(&["check", text(&file)]);
    let at = |line: usize, column: usize| format!("{}:{line}:{column}: ", file.display());
    let places = [at(7, 1), at(11, 9), at(12, 10)];
    said.says(
        2,
        &[
            &places[0],
            &places[1],
            &places[2],
            "stepz",
            "student.steps",
            "student.rank",
            "hint: ",
        ],
    );
    assert_eq!(said.err.matches("hint: ").count(), 3, "{}", said.err);
    assert!(said.out.is_empty(), "{}", said.out);

    let said = proxytune(&["check", SMOKE, "--set", "student.stepz=3"]);
    said.says(2, &["--set", "stepz", "steps", "hint: "]);
}

#[test]
fn what_check_prints_checks_to_itself() {
    let said = proxytune(&["check", SMOKE, "--set", "student.steps=100"]);
    assert_eq!(said.code, Some(0), "{}", said.err);
    assert!(said.out.contains("steps = 100"), "{}", said.out);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("resolved.toml");
    std::fs::write(&file, &said.out).unwrap();
    assert_eq!(proxytune(&["check", text(&file)]).out, said.out);
}

#[test]
fn graph_prints_stages_and_channels_as_text_and_for_graphviz() {
    let said = proxytune(&["graph", SMOKE]);
    assert_eq!(said.code, Some(0), "{}", said.err);
    for stage in [
        "references",
        "supervise",
        "synthesize",
        "tokenize",
        "train",
        "evaluate",
    ] {
        assert!(said.out.contains(stage), "{stage}: {}", said.out);
    }
    let dot = proxytune(&["graph", SMOKE, "--dot"]);
    assert!(
        dot.out.starts_with("digraph") && dot.out.contains("->"),
        "{}",
        dot.out
    );
}

#[test]
fn sample_draws_the_same_pictures_again_with_a_student_and_with_a_supervisor() {
    let (place, run) = completed();
    let supervisors = find(&place.store().join("adapters"), &|name| {
        name.ends_with(".safetensors")
    });
    let supervisor = supervisors[0].parent().unwrap();
    let draw = |model: &str, adapter: &Path, out: &Path| {
        let said = proxytune(&[
            "sample",
            "--model",
            model,
            "--adapter",
            text(adapter),
            "--prompt",
            "a sks dog in the snow",
            "--count",
            "2",
            "--seed",
            "5",
            "--out",
            text(out),
        ]);
        assert_eq!(said.code, Some(0), "{}", said.err);
        let files = find(out, &|name| name.ends_with(".png"));
        let listed: Vec<PathBuf> = said.out.lines().map(PathBuf::from).collect();
        assert_eq!(listed, files);
        assert_eq!(files.len(), 2);
        files
            .iter()
            .map(|file| proxytune::images::load(file).unwrap())
            .collect::<Vec<_>>()
    };
    for (model, adapter) in [
        ("nano-llamagen", run.join("student")),
        ("nano-sd3", supervisor.to_path_buf()),
    ] {
        let (once, again) = (
            place.path().join(format!("{model}-1")),
            place.path().join(format!("{model}-2")),
        );
        let pictures = draw(model, &adapter, &once);
        assert_eq!(pictures, draw(model, &adapter, &again));
        assert_eq!(pictures[0].dimensions(), (32, 32));
        assert_ne!(pictures[0], pictures[1]);
    }
}

#[test]
fn sample_refuses_a_model_that_does_not_draw_and_an_adapter_that_is_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let out = text(dir.path());
    let said = proxytune(&[
        "sample",
        "--model",
        "nano-clip",
        "--prompt",
        "a dog",
        "--out",
        out,
    ]);
    said.says(1, &["nano-clip does not draw", "hint: "]);
    let said = proxytune(&[
        "sample",
        "--model",
        "nano-llamagen",
        "--adapter",
        "no/such/folder",
        "--prompt",
        "a dog",
        "--out",
        out,
    ]);
    said.says(1, &["no/such/folder", "hint: "]);
}

#[test]
fn evaluate_prints_the_scores_of_a_folder_and_of_a_model() {
    let (_, run) = completed();
    let photos = "datasets/nano/subjects/dog1";
    let said = proxytune(&[
        "evaluate",
        "--references",
        photos,
        "--class",
        "dog",
        "--images",
        photos,
    ]);
    assert_eq!(said.code, Some(0), "{}", said.err);
    for part in ["CLIP-I", "CLIP-T", "DINO", photos] {
        assert!(said.out.contains(part), "{part}: {}", said.out);
    }
    assert!(said.out.contains("with \"a dog\""), "{}", said.out);
    let own = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(photos).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, own.path().join(path.file_name().unwrap())).unwrap();
        let caption = own.path().join(path.file_stem().unwrap());
        std::fs::write(caption.with_extension("txt"), "a sks dog in the snow").unwrap();
    }
    let about = ["evaluate", "--references", photos, "--class", "dog"];
    let own = [&about[..], &["--images", text(own.path())]].concat();
    let said = proxytune(&own);
    said.says(0, &[]);
    assert!(!said.out.contains("with \"a dog\""), "{}", said.out);
    for flag in [["--prompts", "nano-10"], ["--guidance-scale", "3"]] {
        proxytune(&[&own[..], &flag].concat()).says(2, &["--images", flag[0]]);
    }
    let list = run.join("prompts.txt");
    std::fs::write(&list, "a {token}\na {clas} in the snow\n").unwrap();
    let faulty = ["--model", "nano-llamagen", "--prompts", text(&list)];
    proxytune(&[&about[..], &faulty].concat()).says(2, &["prompts.txt:2:1: {clas}", "hint: "]);
    std::fs::write(&list, "a {token} {class} in the snow\n").unwrap();
    let student = run.join("student");
    let said = proxytune(&[
        "evaluate",
        "--references",
        photos,
        "--class",
        "dog",
        "--model",
        "nano-llamagen",
        "--adapter",
        text(&student),
        "--prompts",
        text(&list),
    ]);
    assert_eq!(said.code, Some(0), "{}", said.err);
    assert!(said.out.contains("nano-llamagen"), "{}", said.out);
}

#[test]
fn options_that_would_have_no_effect_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let dir = text(dir.path());
    for (arguments, code, part) in [
        (&["query", "--tables", "--format", "csv"][..], 2, "--format"),
        (&["query", "--tables", "--out", "tables.csv"], 2, "--out"),
        (&["query", "--recall", "--out", "recall.txt"], 2, "--out"),
        (
            &["query", "SELECT 1", "--by", "clip"],
            1,
            "--by goes with --like",
        ),
        (&["export", "--to", dir, "--columns", "3"], 2, "--sheet"),
        (
            &["export", "--sheet", "a.png", "--layout", "kohya"],
            2,
            "--to",
        ),
        (
            &["export", "--to", "a", "--by", "clip"],
            1,
            "--by goes with --like",
        ),
        (
            &["export", "--to", "a", "--repeats", "3"],
            1,
            "--layout kohya",
        ),
    ] {
        proxytune(arguments).says(code, &[part]);
    }
}

#[test]
fn report_writes_the_report_of_a_run_again() {
    let (place, run) = completed();
    let (html, sheet) = (run.join("report.html"), run.join("sheet.png"));
    let before = [&html, &sheet].map(|path| std::fs::read(path).unwrap());
    std::fs::write(&html, "lost").unwrap();
    std::fs::remove_file(&sheet).unwrap();
    // By the name that leads to the newest run of the file.
    let newest = match cfg!(unix) {
        true => place.out().join("it's"),
        false => run.clone(),
    };
    let store = place.store();
    let said = proxytune(&["report", text(&newest), "--store", text(&store)]);
    assert_eq!(said.code, Some(0), "{}", said.err);
    let page = std::fs::read_to_string(&html).unwrap();
    assert!(page.contains("Supervisor loss") && page.contains("Student loss"));
    assert!(said.out.contains("report.html"), "{}", said.out);
    assert!([&html, &sheet].map(|path| std::fs::read(path).unwrap()) == before);
    let said = proxytune(&["report", text(place.path())]);
    said.says(1, &["is not the directory of a run", "hint: "]);
}

#[test]
fn what_belongs_to_the_nano_measures_is_refused_without_them() {
    for option in [
        &["--json"][..],
        &["--only", "clip"],
        &["--runs", "2"],
        &["--settings", "pipelines/nano-pretrain.toml"],
        &["--job", "pipelines/nano.toml"],
        &["--sheets", "nowhere"],
        &["--checkpoints", "nowhere"],
    ] {
        let subject = "datasets/nano/subjects/dog1";
        let images = [
            "evaluate",
            "--references",
            subject,
            "--class",
            "dog",
            "--images",
            subject,
        ];
        let said = proxytune(&[&images[..], option].concat());
        assert_ne!(said.code, Some(0), "{said:?}");
        assert!(
            said.err.contains(option[0]) || said.err.contains("--nano"),
            "{said:?}"
        );
    }
}
