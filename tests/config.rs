//! Pipeline files: what they mean, and what is said when they are wrong.

use std::path::Path;

use proxytune::Error;
use proxytune::cli::{
    CheckArgs, Cli, Command, GraphArgs, PipelineArgs, StoreArgs, check::check, graph::graph,
};
use proxytune::config::{
    Changes, Device, Document, Optimizer, Resolved, Sampling, Source, prompts,
};

const MINIMAL: &str = r#"
[subject.dog6]
images = "photos/dog6"
class = "dog"
[supervisor]
model = "sd3-medium"
[student]
model = "llamagen-xl"
"#;

fn resolve(text: &str, overrides: &[&str]) -> Result<Resolved, Error> {
    let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
    Document::parse(text, "test.toml", &overrides, &proxytune::models::Registry).resolve()
}

fn faults(text: &str, overrides: &[&str]) -> Vec<String> {
    match resolve(text, overrides) {
        Err(Error::Config(faults)) => faults,
        other => panic!("faults expected, not {other:?}"),
    }
}

/// The only fault of [`MINIMAL`] with these overrides.
fn only_fault(overrides: &[&str]) -> String {
    let mut faults = faults(MINIMAL, overrides);
    assert_eq!(faults.len(), 1, "{faults:#?}");
    faults.remove(0)
}

#[test]
fn a_short_file_gets_the_papers_values() {
    let resolved = resolve(MINIMAL, &[]).unwrap();
    let supervisor = resolved.supervisor.as_ref().unwrap();
    assert_eq!(supervisor.family, proxytune::models::sd3::FAMILY);
    assert_eq!(supervisor.training.learning_rate, 4e-4);
    assert_eq!(
        (supervisor.training.steps, supervisor.training.batch_size),
        (500, 4)
    );
    let student = &resolved.student;
    assert_eq!(student.training.learning_rate, 1e-4);
    assert_eq!(
        (student.training.steps, student.training.batch_size),
        (1250, 8)
    );
    assert_eq!((student.training.rank, student.training.alpha), (16, 16.0));
    assert_eq!((student.overlap, student.source), (0.5, Source::Proxies));
    assert_eq!(resolved.subjects[0].token, "sks");
    assert_eq!(
        resolved.proxies.as_ref().unwrap().prompts,
        ["a {token} {class}"]
    );
    assert!(resolved.direct().is_some());
    assert!(resolved.threads >= 1);
    let sdxl = resolve(
        MINIMAL,
        &["supervisor.model=sdxl", "student.model=lumina-mgpt-7b-768"],
    )
    .unwrap();
    assert_eq!(sdxl.supervisor.unwrap().training.learning_rate, 1e-4);
    assert_eq!(sdxl.student.training.learning_rate, 2e-5);
    assert_eq!(
        (
            sdxl.student.training.steps,
            sdxl.student.training.batch_size
        ),
        (2500, 4)
    );
}

#[test]
fn the_resolved_file_reads_back_as_itself() {
    let prior = "supervisor.prior_preservation={weight=0.5}";
    let second = [
        "subject.Cat-2.images=\"a \\\"b\\\"\"",
        "subject.Cat-2.class=cat",
    ];
    for overrides in [
        vec![],
        vec![prior, second[0], second[1], "seed=9223372036854775807"],
        vec!["student.source=augmented", "student.tuning=full"],
        vec![
            "student.dtype=bf16",
            "supervisor.dtype=f16",
            "student.memory=fit",
            "direct.memory=fast",
        ],
        vec![
            "student.model=sdxl",
            "student.negative_prompt=blurry",
            "student.rank=4",
        ],
        vec!["supervisor.model=flux.1-dev", "supervisor.rank=4"],
        vec![
            "evaluation.prompts=[\"a {token} {class}\", \"ein {class}\"]",
            "supervisor.device=cuda:1",
        ],
    ] {
        let resolved = resolve(MINIMAL, &overrides).unwrap();
        let text = resolved.to_toml().unwrap();
        let again = resolve(&text, &[]).unwrap();
        assert_eq!(again, resolved, "{text}");
        assert_eq!(again.to_toml().unwrap(), text);
    }
}

#[test]
fn every_pipeline_that_ships_resolves_and_says_what_it_is_for() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("pipelines");
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(
            text.starts_with("# "),
            "{} opens without a comment",
            path.display()
        );
        // the training of the nano checkpoints has a file format of its own
        if path.file_name().unwrap() != "nano-pretrain.toml" {
            if let Err(error) = Document::open(&path, &[], &proxytune::models::Registry)
                .and_then(|document| document.resolve())
            {
                panic!("{error}");
            }
            seen += 1;
        }
    }
    assert!(seen >= 5);
}

#[test]
fn all_faults_are_named_at_once_with_line_column_and_hint() {
    let text = r#"seed = -1
[subject.dog6]
imags = "photos/dog6"
class = "dog"
[subject.cat]
images = 3
class = "cat"
[supervisor]
model = "sd3-medum"
steps = "many"
[proxies]
count = 0
[student]
model = "llamagen-xl"
source = "proxys"
top_p = 1.5
learning_rate = 0
[studnt]
"#;
    let expected = [
        (
            "test.toml:1:8: seed = -1 is out of range",
            "a whole number from 0",
        ),
        (
            "test.toml:2:10: subject.dog6.images is missing",
            "add a line such as images",
        ),
        (
            "test.toml:3:1: unknown field subject.dog6.imags",
            "did you mean images?",
        ),
        (
            "test.toml:6:10: subject.cat.images must be a text, not a whole number",
            "images = \"3\"",
        ),
        (
            "test.toml:9:9: \"sd3-medum\" is neither a known model nor a directory",
            "did you mean sd3-medium?",
        ),
        (
            "test.toml:10:9: supervisor.steps must be a whole number, not a text",
            "steps = 1",
        ),
        (
            "test.toml:12:9: proxies.count = 0 is out of range",
            "a whole number from 1",
        ),
        (
            "test.toml:15:10: student.source = \"proxys\" is not a choice",
            "did you mean proxies?",
        ),
        (
            "test.toml:16:9: student.top_p = 1.5 is out of range",
            "above 0 and at most 1",
        ),
        (
            "test.toml:17:17: student.learning_rate = 0 is out of range",
            "above 0",
        ),
        (
            "test.toml:18:2: unknown field studnt",
            "did you mean student?",
        ),
    ];
    let faults = faults(text, &[]);
    assert_eq!(faults.len(), expected.len(), "{faults:#?}");
    for (fault, (what, hint)) in faults.iter().zip(expected) {
        let (found, found_hint) = fault.split_once("\n  hint: ").unwrap();
        assert_eq!(found, what);
        assert!(
            found_hint.contains(hint),
            "{found_hint:?} should contain {hint:?}"
        );
    }
}

#[test]
fn broken_syntax_is_named_alone() {
    let faults = faults("seed = \n[student\nmodel = \"nano-llamagen\"\n", &[]);
    assert!(faults[0].starts_with("test.toml:1:"), "{faults:#?}");
    assert!(
        faults
            .iter()
            .all(|fault| !fault.contains("missing") && !fault.contains("unknown")),
        "{faults:#?}"
    );
}

#[test]
fn columns_count_characters_and_not_bytes() {
    let faults = faults(
        "\"größe\" = 1\nstudent = { \"ü\" = 1, model = \"llamagen-xl\" }",
        &["student.source=references"],
    );
    assert!(
        faults
            .iter()
            .any(|fault| fault.starts_with("test.toml:1:1: unknown field größe")),
        "{faults:#?}"
    );
    assert!(
        faults
            .iter()
            .any(|fault| fault.starts_with("test.toml:2:13: unknown field student.ü")),
        "{faults:#?}"
    );
}

#[test]
fn a_negative_prompt_for_flux_has_no_effect() {
    let fault = only_fault(&[
        "supervisor.model=flux.1-dev",
        "proxies.negative_prompt=blurry",
    ]);
    assert!(
        fault.contains("proxies.negative_prompt has no effect"),
        "{fault}"
    );
}

#[test]
fn overrides_are_read_as_toml_or_else_as_text_and_faults_name_them() {
    let resolved = resolve(
        MINIMAL,
        &[
            "subject.rex.images=/tmp/my photos",
            "subject.rex.class=dog",
            "student.steps=12",
            "supervisor.device=cuda:1",
            "evaluation.every = 3",
            "proxies.negative_prompt=",
        ],
    )
    .unwrap();
    assert_eq!(resolved.subjects[1].images, Path::new("/tmp/my photos"));
    assert_ne!(resolved.subjects[1].token, resolved.subjects[0].token);
    assert_eq!(resolved.student.training.steps, 12);
    assert_eq!(
        resolved.supervisor.as_ref().unwrap().device,
        Device::Cuda(1)
    );
    assert_eq!(resolved.evaluation.every, 3);

    assert!(
        only_fault(&["student.stesp=3"])
            .starts_with("--set student.stesp=3: unknown field student.stesp")
    );
    assert!(only_fault(&["student.steps=3.5"]).contains("must be a whole number, not a number"));
    assert!(only_fault(&["student.steps"]).contains("PATH=VALUE"));
    assert!(only_fault(&["seed.a=1"]).contains("seed must be a whole number"));
    assert!(only_fault(&["student.model.a=1"]).contains("model is a text, not a table"));
    assert!(only_fault(&["student..a=1"]).contains("empty part"));
}

#[test]
fn an_override_that_looks_like_a_number_is_a_text_where_a_text_is_wanted() {
    for text in ["2024", "1e5", "0x10", "true", "inf", "2024-01-01", "007"] {
        let [name, class, token, images] = ["a2024", "class", "token", "images"];
        let set = |field: &str| format!("subject.{name}.{field}={text}");
        let class = format!("subject.{name}.{class}=robot");
        let resolved = resolve(MINIMAL, &[&set(images), &class, &set(token)]).unwrap();
        let subject = &resolved.subjects[1];
        assert_eq!(subject.token, text);
        assert_eq!(subject.images, Path::new(text));
        let again = resolve(&resolved.to_toml().unwrap(), &[]).unwrap();
        assert_eq!(again, resolved);
    }
    let named = resolve(MINIMAL, &["subject.2024.images=x", "subject.2024.class=7"]).unwrap();
    assert_eq!(
        (
            named.subjects[1].name.as_str(),
            named.subjects[1].class.as_str()
        ),
        ("2024", "7")
    );
    // In a file, where quotes are not lost on the way, a number stays one.
    let file = MINIMAL.replace("\"dog\"", "2024");
    assert!(faults(&file, &[])[0].contains("class must be a text, not a whole number"));
}

#[test]
fn numbers_that_no_run_survives_are_out_of_range_alone_or_together() {
    for (overrides, part) in [
        (
            vec!["student.steps=9223372036854775807"],
            "from 1 to 1000000: ",
        ),
        (vec!["proxies.count=1000000000000"], "from 1 to 1000000: "),
        (vec!["threads=1000000"], "from 0 to 1024: "),
        (vec!["student.batch_size=100000"], "from 1 to 1024: "),
        (vec!["student.rank=1000000"], "from 1 to 4096: "),
        (vec!["supervisor.resolution=1000000"], "from 8 to 4096: "),
        (
            vec!["proxies.num_inference_steps=1000000"],
            "from 1 to 1000: ",
        ),
        (
            vec!["evaluation.images_per_prompt=1000000000"],
            "from 1 to 100000: ",
        ),
        (
            vec!["channels.tokens=9223372036854775807"],
            "from 1 to 65536: ",
        ),
        (vec!["student.guidance_scale=1e300"], "at most 1000"),
        (vec!["student.learning_rate=1e300"], "at most 1"),
        (
            vec![
                "student.steps=1000000",
                "student.batch_size=1000",
                "direct.enabled=false",
            ],
            "at most 16777216 can be planned",
        ),
        (
            vec!["supervisor.steps=100000", "supervisor.batch_size=1000"],
            "at most 16777216 can be planned",
        ),
        (
            vec!["evaluation.images_per_prompt=100000"],
            "at most 2000000 can be planned",
        ),
    ] {
        let fault = only_fault(&overrides);
        assert!(fault.contains(part), "{overrides:?}: {fault}");
        assert!(
            fault.starts_with(&format!("--set {}", overrides[0])),
            "{fault}"
        );
    }
}

#[test]
fn a_pipeline_of_very_many_or_very_deep_keys_is_refused_at_once() {
    let start = std::time::Instant::now();
    let flat: String = (0..50_000)
        .map(|i| format!("unknown_key_{i} = 1\n"))
        .collect();
    let inline = (0..50_000)
        .map(|i| format!("k{i}=1"))
        .collect::<Vec<_>>()
        .join(",");
    let subjects: String = (0..30_000).map(|i| format!("[subject.s{i}]\n")).collect();
    let deep = [
        format!(
            "{}1{}",
            "a=[".to_string() + &"[".repeat(100_000),
            "]".repeat(100_001)
        ),
        format!("{}a = 1", "a.".repeat(100_000)),
        format!("[{}a]", "a.".repeat(100_000)),
        format!("a = {}1{}", "{a=".repeat(100_000), "}".repeat(100_000)),
        format!("{} = 1", "k".repeat(1_000_000)),
        "[".repeat(500_000),
        "= ".repeat(400_000),
    ];
    let many = [flat, format!("student = {{{inline}}}\n"), subjects];
    for text in many.iter().chain(&deep) {
        let faults = faults(&format!("{text}\n"), &[]);
        assert!(faults.len() <= 102, "{}", faults.len());
        assert!(faults.iter().all(|fault| fault.len() < 5000));
    }
    for path in [
        "a.".repeat(40_000) + "a=1",
        "=".repeat(60_000),
        "a.".repeat(60_000),
    ] {
        assert!(!faults(MINIMAL, &[&path]).is_empty());
    }
    assert!(start.elapsed().as_secs() < 60, "{:?}", start.elapsed());
}

#[test]
fn an_override_of_very_many_parts_or_values_takes_the_memory_of_its_text() {
    let deep = format!("{}=1", vec!["a"; 60_000].join("."));
    let long = format!("student.steps=[{}]", "1,".repeat(60_000));
    let tables = format!("student={{{}}}", "a.a.a.a={},".repeat(10_000));
    for (text, what) in [
        (deep, "60000 parts"),
        (long, "student.steps"),
        (tables, "student"),
    ] {
        let (mut faults, peak) = crate::support::memory::peak_of(|| faults(MINIMAL, &[&text]));
        assert!(faults.remove(0).contains(what), "{what}");
        assert!(peak < 200 << 20, "{what}: {} MiB", peak >> 20);
    }
}

#[test]
fn subjects_of_the_command_line_take_the_place_of_the_files() {
    let typed = [
        "rex=photos/rex:dog",
        "tom=photos/tom:cat:<new1>",
        "blob=b:toy",
    ];
    let typed = typed.map(String::from);
    let overrides = ["subject.rex.replay=5".to_string()];
    let with = |subjects: &[String]| {
        let changes = Changes {
            subjects,
            overrides: &overrides,
            ..Changes::default()
        };
        Document::with_changes(MINIMAL, "test.toml", &changes, &proxytune::models::Registry)
            .resolve()
    };
    let resolved = with(&typed).unwrap();
    let found: Vec<_> = resolved
        .subjects
        .iter()
        .map(|s| {
            (
                s.name.as_str(),
                s.class.as_str(),
                s.token.as_str(),
                s.replay,
            )
        })
        .collect();
    assert_eq!(
        found,
        [
            ("rex", "dog", "sks", Some(5)),
            ("tom", "cat", "<new1>", None),
            ("blob", "toy", "ohw", None)
        ]
    );
    for (subjects, part) in [
        (
            vec!["rex"],
            "--subject rex: a subject has the form NAME=DIR:CLASS",
        ),
        (
            vec!["rex=a:dog", "rex=b:dog"],
            "--subject rex=b:dog: two subjects are called rex",
        ),
        (vec!["rex=a:dog", "a/b=b:dog"], "cannot be a subject's name"),
        (vec!["rex=a:dog:dog"], "class's word"),
        (vec!["rex=a:dog:two words"], "must be one word"),
    ] {
        let subjects: Vec<String> = subjects.into_iter().map(String::from).collect();
        match with(&subjects) {
            Err(Error::Config(faults)) => {
                let named = faults.iter().any(|fault| fault.contains(part));
                assert!(named, "{faults:?}");
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_folder_of_classes_and_subjects_gives_each_a_name_and_a_token_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    for folder in [
        "dog/rex",
        "dog/blob",
        "stuffed_animal/rex",
        "cat/Ж1",
        "$RECYCLE.BIN/x",
        ".trash/y",
    ] {
        std::fs::create_dir_all(dir.path().join(folder)).unwrap();
    }
    let read = || {
        let changes = Changes {
            subjects_dir: Some(dir.path()),
            ..Changes::default()
        };
        Document::with_changes(MINIMAL, "test.toml", &changes, &proxytune::models::Registry)
            .resolve()
    };
    let resolved = read().unwrap();
    let found: Vec<_> = resolved
        .subjects
        .iter()
        .map(|s| (s.name.as_str(), s.class.as_str()))
        .collect();
    let expected = [
        ("-1", "cat"),
        ("blob", "dog"),
        ("rex", "dog"),
        ("rex-2", "stuffed animal"),
    ];
    assert_eq!(found, expected);
    let tokens: std::collections::BTreeSet<_> =
        resolved.subjects.iter().map(|s| &s.token).collect();
    assert_eq!(tokens.len(), 4);
    std::fs::write(dir.path().join("dog/1.jpg"), "").unwrap();
    let Err(Error::Config(faults)) = read() else {
        panic!("the photos lie a folder too high")
    };
    assert!(
        faults
            .iter()
            .any(|fault| fault.contains("dog holds photos, not folders of subjects")),
        "{faults:?}"
    );
}

#[test]
fn a_name_that_no_path_takes_is_a_fault_of_its_subject_alone() {
    let long = "x".repeat(200);
    let set = |field: &str, value: &str| format!("subject.{long}.{field}={value}");
    let fault = only_fault(&[&set("images", "a"), &set("class", "dog")]);
    assert!(
        fault.contains("has 200 bytes") && fault.contains("at most 100"),
        "{fault}"
    );
    assert!(only_fault(&["subject.dog6.class=a\u{7}dog"]).contains("cannot be a class"));
    assert!(only_fault(&["subject.dog6.token=s\u{1b}ks"]).contains("must be one word"));
    let token = format!("subject.dog6.token={long}");
    assert!(only_fault(&[&token]).contains("at most 100 bytes"));
}

#[test]
fn a_prompt_file_is_the_same_from_every_editor() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompts.txt");
    let set = format!("evaluation.prompts={}", file.display());
    std::fs::write(
        &file,
        "\u{feff}# mine\r\na {token} {class} asleep\r\n\r\na {class}\r\n",
    )
    .unwrap();
    let resolved = resolve(MINIMAL, &[&set]).unwrap();
    let templates = resolved.evaluation.prompts.templates("dog");
    assert_eq!(templates, ["a {token} {class} asleep", "a {class}"]);
    for (bytes, part) in [
        (b"\xFF\xFEa\0".as_slice(), "UTF-16"),
        (b"a d\xF6g\n", "Latin-1"),
        (b"\xEF\xBB\xBF\r\n", "has no prompts"),
    ] {
        std::fs::write(&file, bytes).unwrap();
        let fault = only_fault(&[&set]);
        assert!(
            fault.contains("prompts.txt") && fault.contains(part),
            "{fault}"
        );
    }
}

#[test]
fn two_subjects_never_share_a_token() {
    let text = format!(
        "{MINIMAL}\n[subject.a]\nimages = \"a\"\nclass = \"cat\"\n[subject.b]\nimages = \"b\"\nclass = \"can\"\n"
    );
    let resolved = resolve(&text, &["subject.b.token=sks"]).unwrap();
    let tokens: Vec<&str> = resolved
        .subjects
        .iter()
        .map(|subject| subject.token.as_str())
        .collect();
    assert_eq!(tokens, ["ohw", "zwx", "sks"]);
    let clash = faults(&text, &["subject.a.token=sks", "subject.b.token=sks"]);
    assert_eq!(clash.len(), 1);
    assert!(
        clash[0].contains("subject.b has the token \"sks\" of another subject"),
        "{clash:?}"
    );
    assert!(only_fault(&["subject.dog6.token=two words"]).contains("must be one word"));
    assert!(only_fault(&["subject.dog6.token=dog"]).contains("class's word"));
}

#[test]
fn what_cannot_work_is_a_fault() {
    for (overrides, what) in [
        (
            vec!["student.prodigy_d_coef=2"],
            "student.prodigy_d_coef has no effect without optimizer = \"prodigy\"",
        ),
        (
            vec!["student.optimizer=prodigy", "student.prodigy_d0=0"],
            "student.prodigy_d0 = 0 is out of range",
        ),
        (
            vec!["supervisor.model=llamagen-xl"],
            "cannot be the supervisor",
        ),
        (vec!["student.model=dino-vits16"], "cannot be the student"),
        (
            vec!["evaluation.clip=dino-vits16"],
            "cannot be the CLIP of the evaluation",
        ),
        (
            vec!["student.warmup_steps=10"],
            "no effect with lr_scheduler",
        ),
        (
            vec![
                "student.warmup_steps=10",
                "student.steps=5",
                "student.lr_scheduler=cosine",
            ],
            "more than all 5 steps",
        ),
        (
            vec!["student.num_inference_steps=5"],
            "has no effect on a LlamaGen model",
        ),
        (
            vec!["student.model=sdxl", "student.top_k=5"],
            "has no effect on a SDXL model",
        ),
        (vec!["direct.source=proxies"], "would not be direct"),
        (vec!["supervisor.prompt=a dog"], "does not contain {token}"),
        (vec!["proxies.prompts=[\"a {token} {clas}\"]"], "{clas} in"),
        (vec!["proxies.prompts=[]"], "proxies.prompts is empty"),
        (
            vec!["proxies.prompts=[1]"],
            "must be a text, not a whole number",
        ),
        (
            vec!["supervisor.prior_preservation.prompt=a {token} {class}"],
            "contains {token}",
        ),
        (
            vec!["evaluation.prompts=dreamboth"],
            "neither a list of prompts that ships nor a file",
        ),
        (
            vec!["student.device=gpu"],
            "student.device = \"gpu\" is not a device",
        ),
        (vec!["supervisor.resolution=100"], "not a multiple of 8"),
        (
            vec!["channels.proxies=0"],
            "channels.proxies = 0 is out of range",
        ),
        (vec!["student.dropout=1.0"], "out of range"),
        (
            vec!["student.dtype=f64"],
            "student.dtype = \"f64\" is not a choice",
        ),
        (
            vec!["student.memory=small"],
            "student.memory = \"small\" is not a choice",
        ),
        (
            vec!["supervisor.dtype=bf16", "supervisor.tuning=full"],
            "supervisor.dtype has no effect with tuning = \"full\"",
        ),
        (vec!["student.learning_rate=nan"], "out of range"),
        (vec!["seed=9223372036854775808"], "out of range"),
        (
            vec!["direct=3"],
            "direct must be a table, not a whole number",
        ),
        (vec!["student.model="], "student.model is empty"),
    ] {
        let fault = only_fault(&overrides);
        assert!(fault.contains(what), "{overrides:?} gives {fault:?}");
        assert!(fault.contains("\n  hint: "), "{fault:?}");
    }
    let bad_name = faults(MINIMAL, &["subject.a/b.images=x", "subject.a/b.class=dog"]);
    assert!(bad_name[0].contains("cannot be a subject's name"));
    let nothing = faults("", &[]);
    assert_eq!(nothing.len(), 3, "{nothing:#?}");
}

#[test]
fn a_student_of_references_needs_no_supervisor() {
    let resolved = resolve(MINIMAL, &["student.source=references"]).unwrap();
    assert!(resolved.teacher().is_none());
    assert!(resolved.direct().is_none());
    assert!(!resolved.to_toml().unwrap().contains("[supervisor]"));
}

#[test]
fn a_diffusion_model_may_be_the_student() {
    let resolved = resolve(MINIMAL, &["student.model=sd3-medium"]).unwrap();
    assert!(matches!(resolved.student.sampling, Sampling::Diffusion(_)));
    assert_eq!(resolved.student.training.steps, 500);
}

#[test]
fn the_baseline_learns_as_the_student_does_unless_told_otherwise() {
    let resolved = resolve(
        MINIMAL,
        &[
            "student.rank=4",
            "student.steps=77",
            "direct.learning_rate=1e-5",
        ],
    )
    .unwrap();
    assert_eq!(resolved.direct.training.rank, 4);
    assert_eq!(resolved.direct.training.steps, 77);
    assert_eq!(resolved.direct.training.learning_rate, 1e-5);
    let ranked = resolve(MINIMAL, &["student.rank=4", "direct.rank=8"]).unwrap();
    assert_eq!(ranked.direct.training.alpha, 8.0);
}

#[test]
fn a_prompt_file_is_kept_as_a_list() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompts.txt");
    std::fs::write(&file, "# mine\na {token} {class} asleep\n\n a {class} \n").unwrap();
    let set = format!("evaluation.prompts={}", file.display());
    let resolved = resolve(MINIMAL, &[&set]).unwrap();
    assert_eq!(
        resolved.evaluation.prompts.templates("dog"),
        ["a {token} {class} asleep", "a {class}"]
    );
    std::fs::write(&file, "a {token} {class}\na {colour} {class}\n").unwrap();
    let fault = only_fault(&[&set]);
    assert!(fault.contains("prompts.txt:2:1: {colour} in"), "{fault}");
    assert!(!fault.contains("test.toml"));
}

#[test]
fn dreambooth_has_25_prompts_for_objects_and_for_live_subjects() {
    let resolved = resolve(MINIMAL, &[]).unwrap();
    let dog = resolved.evaluation.prompts.templates("dog");
    let can = resolved.evaluation.prompts.templates("can");
    assert_eq!((dog.len(), can.len()), (25, 25));
    assert_eq!(dog[..10], can[..10]);
    assert_eq!(
        prompts::fill(&dog[10], "sks", "dog"),
        "a sks dog wearing a red hat"
    );
    assert_eq!(
        prompts::fill_without_token(&can[24], "can"),
        "a cube shaped can"
    );
}

#[test]
fn the_rare_tokens_differ() {
    let distinct: std::collections::BTreeSet<_> = prompts::RARE_TOKENS.iter().collect();
    assert_eq!(distinct.len(), 64);
}

#[test]
fn a_missing_checkpoint_says_which_files_go_where() {
    let error = proxytune::models::locate("llamagen-xl").unwrap_err();
    assert!(
        error.to_string().contains("t2i_XL_stage2_512.pt"),
        "{error}"
    );
    let hint = error.hint().unwrap();
    assert!(
        hint.contains("huggingface.co/peizesun/llamagen_t2i"),
        "{hint}"
    );
    assert!(hint.contains("datasets/checkpoints/llamagen-xl"), "{hint}");
    proxytune::models::locate("nano-lumina").unwrap();
    let unknown = proxytune::models::locate("no-such-thing").unwrap_err();
    assert!(unknown.hint().unwrap().contains("nano-sd3"));
}

#[test]
fn a_directory_tells_its_family() {
    let folder = tempfile::tempdir().unwrap();
    let set = format!("supervisor.model={}", folder.path().display());
    assert!(only_fault(&[&set]).contains("tells no known model family"));
    std::fs::write(
        folder.path().join("model_index.json"),
        r#"{"_class_name": "StableDiffusion3Pipeline"}"#,
    )
    .unwrap();
    let resolved = resolve(MINIMAL, &[&set]).unwrap();
    let supervisor = resolved.supervisor.unwrap();
    assert_eq!(
        (supervisor.family, supervisor.resolution),
        (proxytune::models::sd3::FAMILY, None)
    );
}

#[test]
fn a_directory_with_nano_files_is_scored_by_the_nano_evaluators() {
    let evaluators = |model: &str| {
        let resolved = resolve(MINIMAL, &[&format!("student.model={model}")]).unwrap();
        (resolved.evaluation.clip, resolved.evaluation.dino)
    };
    let nano = ("nano-clip".to_string(), "nano-dino".to_string());
    let root = env!("CARGO_MANIFEST_DIR");
    for checkpoint in ["llamagen", "sd3"] {
        let folder = format!("{root}/datasets/nano/checkpoints/{checkpoint}");
        assert_eq!(evaluators(&folder), nano, "{checkpoint}");
    }
    let merged = tempfile::tempdir().unwrap();
    std::fs::write(
        merged.path().join("config.json"),
        r#"{"model_type": "chameleon"}"#,
    )
    .unwrap();
    std::fs::write(
        merged.path().join("tokenizer.json"),
        r#"{"model": {"type": "WordLevel", "vocab": {}}}"#,
    )
    .unwrap();
    assert_eq!(evaluators(merged.path().to_str().unwrap()), nano);
    let large = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = large.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    write(
        "config.json",
        r#"{"cls_token_num": 120, "block_size": 256}"#,
    );
    write("vq/config.json", r#"{"encoder_ch_mult": [1, 1, 2]}"#);
    write("t5/tokenizer.json", r#"{"model": {"type": "Unigram"}}"#);
    assert_eq!(
        evaluators(large.path().to_str().unwrap()).0,
        "clip-vit-base-patch32"
    );
}

#[test]
fn a_repository_that_is_not_here_says_how_to_get_it() {
    let set = "student.model=no-such-owner/no-such-name@v1";
    let fault = only_fault(&[set]);
    assert!(
        fault.contains("no-such-owner/no-such-name@v1 is not on this machine"),
        "{fault}"
    );
    assert!(
        fault.contains("proxytune models --download no-such-owner/no-such-name@v1"),
        "{fault}"
    );
    let document = Document::parse(
        MINIMAL,
        "test.toml",
        &[set.to_string()],
        &proxytune::models::Registry,
    );
    assert_eq!(document.repositories(), ["no-such-owner/no-such-name@v1"]);
    assert!(only_fault(&["student.model=./no/such"]).contains("neither a known model"));
}

#[test]
fn guidance_may_end_within_an_image_of_llamagen_alone() {
    let resolved = resolve(MINIMAL, &["student.guidance_interval=100"]).unwrap();
    let Sampling::Autoregressive(sampling) = &resolved.student.sampling else {
        panic!("{:?}", resolved.student.sampling);
    };
    assert_eq!(sampling.guidance_interval, Some(100));
    let again = resolve(&resolved.to_toml().unwrap(), &[]).unwrap();
    assert_eq!(again, resolved);
    for model in ["sdxl", "lumina-mgpt-7b-768"] {
        let model = format!("student.model={model}");
        let fault = only_fault(&[&model, "student.guidance_interval=100"]);
        assert!(fault.contains("guidance_interval has no effect"), "{fault}");
    }
}

#[test]
fn check_prints_the_full_file_and_notes_what_is_not_there() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("p.toml");
    std::fs::write(&file, MINIMAL).unwrap();
    let args = |overrides: &[&str]| CheckArgs {
        pipeline: PipelineArgs {
            file: file.clone(),
            overrides: overrides.iter().map(|text| text.to_string()).collect(),
            ..PipelineArgs::default()
        },
        store: StoreArgs {
            store: Some(folder.path().join("store")),
        },
        out: folder.path().join("runs"),
    };
    let (mut out, mut notes) = (Vec::new(), Vec::new());
    check(&args(&[]), &mut out, &mut notes).unwrap();
    let printed = String::from_utf8(out).unwrap();
    assert_eq!(
        resolve(&printed, &[]).unwrap(),
        resolve(MINIMAL, &[]).unwrap()
    );
    let notes = String::from_utf8(notes).unwrap();
    assert!(
        notes.contains("p.toml:3:10: there is no folder photos/dog6"),
        "{notes}"
    );
    let (mut out, mut notes) = (Vec::new(), Vec::new());
    let error = check(&args(&["student.steps=x"]), &mut out, &mut notes).unwrap_err();
    assert!(matches!(error, Error::Config(_)) && out.is_empty());
}

#[test]
fn the_command_line_is_sound_and_shows_examples() {
    let mut command = <Cli as clap::CommandFactory>::command();
    command.build();
    command.clone().debug_assert();
    for command in command
        .get_subcommands()
        .filter(|command| command.get_name() != "help")
    {
        let shown = command
            .get_after_help()
            .map(|text| text.to_string())
            .unwrap_or_default();
        assert!(
            shown.contains("Example"),
            "{} shows no example",
            command.get_name()
        );
    }
    let parsed = <Cli as clap::Parser>::try_parse_from([
        "proxytune",
        "run",
        "p.toml",
        "--set",
        "a=1",
        "--set",
        "b=2",
    ]);
    let Command::Run(args) = parsed.unwrap().command else {
        panic!("run was typed")
    };
    assert_eq!(args.pipeline.overrides, ["a=1", "b=2"]);
}

#[test]
fn the_graph_names_every_channel_with_its_capacity() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("p.toml");
    std::fs::write(&file, MINIMAL).unwrap();
    let drawn = |form: &str, overrides: &[&str]| {
        let overrides = overrides.iter().map(|text| text.to_string()).collect();
        let mut out = Vec::new();
        graph(
            &GraphArgs {
                pipeline: PipelineArgs {
                    file: file.clone(),
                    overrides,
                    ..PipelineArgs::default()
                },
                dot: form == "dot",
                mermaid: form == "mermaid",
            },
            &mut out,
        )
        .unwrap();
        String::from_utf8(out).unwrap()
    };
    let text = drawn("text", &["channels.proxies=9"]);
    assert!(text.contains("──proxies[9]──▶ keep"), "{text}");
    for stage in [
        "references",
        "supervise",
        "synthesize",
        "tokenize",
        "train",
        "evaluate",
        "report",
        "direct",
    ] {
        assert!(text.lines().any(|line| line.starts_with(stage)), "{text}");
    }
    let direct = drawn("text", &["student.source=references"]);
    assert!(
        !direct.contains("synthesize") && direct.contains("references[4]──▶ train"),
        "{direct}"
    );
    let mermaid = drawn("mermaid", &[]);
    assert!(
        mermaid.starts_with("flowchart LR\n")
            && mermaid.contains("synthesize -->|\"proxies [2]\"| keep"),
        "{mermaid}"
    );
    let dot = drawn("dot", &[]);
    assert!(
        dot.contains("synthesize -> keep [label=\"proxies [2]\"]") && dot.ends_with("}\n"),
        "{dot}"
    );
    print!("{text}\n{dot}");
}

#[test]
fn a_student_that_goes_on_from_an_adapter_is_known_by_the_adapters_content() {
    let dir = tempfile::tempdir().unwrap();
    let init = format!("student.init={:?}", dir.path().display().to_string());
    let digest = |overrides: &[&str]| {
        let resolved = resolve(MINIMAL, overrides).unwrap();
        let again = resolve(&resolved.to_toml().unwrap(), &[]).unwrap();
        assert_eq!(again, resolved);
        resolved.student.init_digest.unwrap()
    };
    std::fs::write(dir.path().join("adapter_model.safetensors"), "one").unwrap();
    std::fs::write(dir.path().join(".hidden"), "?").unwrap();
    let one = digest(&[&init]);
    assert_eq!(one.len(), 64);
    // What was written down counts, even where the folder is no longer there.
    let written = format!("student.init_digest={one}");
    assert_eq!(digest(&["student.init=gone", &written]), one);
    std::fs::write(dir.path().join("adapter_model.safetensors"), "two").unwrap();
    assert_ne!(digest(&[&init]), one);

    let fault = only_fault(&["student.init=gone"]);
    assert!(
        fault.contains("student.init cannot be read: gone"),
        "{fault}"
    );
    let fault = only_fault(&[&written]);
    assert!(
        fault.contains("has no effect without student.init"),
        "{fault}"
    );
    let fault = only_fault(&["student.source=references", "subject.dog6.replay=5"]);
    assert!(
        fault.contains("subject.dog6.replay has no effect without proxies"),
        "{fault}"
    );
}

/// The paper's Tables 2 and 3: every supervisor with every student, with the numbers of Table 8.
#[test]
fn every_supervisor_and_student_of_the_paper_has_a_pipeline_with_its_values() {
    let supervisors = [
        ("sdxl", 1e-4, Optimizer::Adamw, "-sdxl"),
        ("sd3-medium", 4e-4, Optimizer::Adamw, ""),
        ("sd3.5-large", 4e-4, Optimizer::Adamw, "-sd3.5"),
        ("flux.1-dev", 1.0, Optimizer::Prodigy, "-flux"),
    ];
    let students = [
        ("llamagen-xl", "llamagen-xl", 1e-4, 8, 1250),
        ("lumina-mgpt-7b-768", "lumina-mgpt-7b", 2e-5, 4, 2500),
    ];
    for (supervisor, learning_rate, optimizer, ending) in supervisors {
        for (student, file, student_rate, batch_size, steps) in students {
            let path = format!("pipelines/{file}{ending}.toml");
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
            let resolved = Document::open(&path, &[], &proxytune::models::Registry)
                .unwrap()
                .resolve()
                .unwrap();
            let (teacher, ..) = resolved.teacher().unwrap();
            let learner = &resolved.student;
            assert_eq!(
                (teacher.model.as_str(), learner.model.as_str()),
                (supervisor, student)
            );
            let (taught, learnt) = (&teacher.training, &learner.training);
            assert_eq!(
                (
                    taught.learning_rate,
                    taught.batch_size,
                    taught.steps,
                    taught.optimizer
                ),
                (learning_rate, 4, 500, optimizer)
            );
            assert_eq!(
                (
                    learnt.learning_rate,
                    learnt.batch_size,
                    learnt.steps,
                    learnt.optimizer
                ),
                (student_rate, batch_size, steps, Optimizer::Adamw)
            );
        }
    }
}
