//! What was typed and would change nothing is a fault, unless an override switched it off for one run.

use proxytune::Error;
use proxytune::config::{Document, Resolved};

const FILE: &str = r#"
[subject.dog6]
images = "photos/dog6"
class = "dog"
[supervisor]
model = "sd3-medium"
[proxies]
count = 5
[student]
model = "llamagen-xl"
rank = 4
overlap = 0.2
dropout = 0.2
[direct]
steps = 7
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

#[test]
fn an_override_that_switches_something_off_does_not_fault_the_file() {
    for overrides in [
        &["student.source=references"][..],
        &["student.tuning=full"],
        &["direct.enabled=false"],
        &["student.model=sd3-medium"],
    ] {
        let resolved = resolve(FILE, overrides).unwrap();
        let text = resolved.to_toml().unwrap();
        assert_eq!(resolve(&text, &[]).unwrap(), resolved, "{text}");
    }
    let resolved = resolve(FILE, &["direct.enabled=false"]).unwrap();
    assert_eq!(resolved.direct.training, resolved.student.training);
}

#[test]
fn what_a_file_says_for_nothing_is_a_fault() {
    let with = |section: &str, line: &str| {
        FILE.replace(&format!("[{section}]\n"), &format!("[{section}]\n{line}\n"))
    };
    for (section, line, expected) in [
        (
            "student",
            "source = \"references\"",
            &["[supervisor]", "[proxies]", "student.overlap", "[direct]"][..],
        ),
        ("student", "tuning = \"full\"", &["student.rank"]),
        ("direct", "enabled = false", &["[direct]"]),
    ] {
        let found = faults(&with(section, line), &[]);
        assert_eq!(found.len(), expected.len(), "{found:#?}");
        for (fault, what) in found.iter().zip(expected) {
            assert!(fault.contains(&format!("{what} has no effect")), "{fault}");
        }
    }
    let diffusion = FILE.replace("llamagen-xl", "sd3-medium");
    let found = faults(&diffusion, &[]);
    assert!(
        found.len() == 1 && found[0].contains("student.dropout has no effect on a SD3 model"),
        "{found:#?}"
    );
}

#[test]
fn overrides_that_work_against_each_other_are_a_fault() {
    for (overrides, what) in [
        (
            ["student.source=references", "student.overlap=0.9"],
            "student.overlap",
        ),
        (["student.tuning=full", "student.rank=8"], "student.rank"),
        (["direct.tuning=full", "direct.alpha=3"], "direct.alpha"),
        (["direct.enabled=false", "direct.steps=9"], "[direct]"),
    ] {
        let found = faults(FILE, &overrides);
        assert_eq!(found.len(), 1, "{found:#?}");
        let start = format!("--set {}: {what} has no effect", overrides[1]);
        assert!(found[0].starts_with(&start), "{found:#?}");
    }
}

#[test]
fn what_is_said_of_learning_beside_an_adapter_that_is_learnt_is_a_fault_unless_overridden() {
    let given = [
        "supervisor.adapter=a.safetensors",
        "supervisor.adapter_digest=digest",
    ];
    let learns = "steps = 3\nprompt = \"the {token} {class}\"\n[supervisor.prior_preservation]\n";
    let text = FILE.replace("[proxies]\n", &format!("{learns}[proxies]\n"));
    let resolved = resolve(&text, &given).unwrap();
    let supervisor = resolved.supervisor.as_ref().unwrap();
    let untouched = resolve(FILE, &[]).unwrap().supervisor.unwrap();
    assert_eq!(supervisor.training, untouched.training);
    assert_eq!((supervisor.steps(), untouched.steps()), (0, 500));
    let again = resolved.to_toml().unwrap();
    assert_eq!(resolve(&again, &[]).unwrap(), resolved, "{again}");
    let lines = "adapter = \"a.safetensors\"\nadapter_digest = \"digest\"\n";
    let found = faults(
        &text.replace("steps = 3\n", &format!("{lines}steps = 3\n")),
        &[],
    );
    assert_eq!(found.len(), 3, "{found:#?}");
    for (fault, what) in found.iter().zip([
        "how the supervisor learns",
        "supervisor.prompt",
        "prior_preservation",
    ]) {
        assert!(
            fault.contains(what) && fault.contains("has no effect with supervisor.adapter"),
            "{fault}"
        );
    }
}

#[test]
fn an_adapter_that_the_baseline_alone_learns_may_be_described_in_the_student() {
    let resolved = resolve(FILE, &["student.tuning=full", "direct.tuning=lora"]).unwrap();
    assert_eq!(resolved.direct.training.rank, 4);
    let text = resolved.to_toml().unwrap();
    assert_eq!(resolve(&text, &[]).unwrap(), resolved, "{text}");
}

#[test]
fn a_warm_up_that_the_baseline_inherits_must_fit_its_own_steps() {
    let warm = ["student.lr_scheduler=cosine", "student.warmup_steps=8"];
    let found = faults(FILE, &warm);
    assert_eq!(found.len(), 1, "{found:#?}");
    let start = "test.toml:15:9: 8 warm-up steps are more than all 7 steps";
    assert!(found[0].starts_with(start), "{found:#?}");
    let short = [warm[0], warm[1], "direct.warmup_steps=7"];
    assert_eq!(
        resolve(FILE, &short).unwrap().direct.training.warmup_steps,
        7
    );
    let constant = [warm[0], warm[1], "direct.lr_scheduler=constant"];
    let resolved = resolve(FILE, &constant).unwrap();
    let text = resolved.to_toml().unwrap();
    assert_eq!(resolve(&text, &[]).unwrap(), resolved, "{text}");
}

#[test]
fn guidance_below_one_is_out_of_range_for_every_family() {
    for model in ["sd3-medium", "llamagen-xl", "lumina-mgpt-7b-768"] {
        let model = format!("student.model={model}");
        let found = faults(FILE, &[&model, "student.guidance_scale=0.5"]);
        assert!(found[0].contains("of at least 1"), "{found:#?}");
    }
}

#[test]
fn a_key_in_quotes_may_hold_dots_and_equals_signs() {
    let text = FILE.replace("[subject.dog6]", "[subject.\"dog.v2\"]");
    let overrides = ["subject.\"dog.v2\".images=a=b", "student . steps = 12"];
    let resolved = resolve(&text, &overrides).unwrap();
    assert_eq!(resolved.subjects.len(), 1);
    assert_eq!(resolved.subjects[0].name, "dog.v2");
    assert_eq!(resolved.subjects[0].images.to_str(), Some("a=b"));
    assert_eq!(resolved.student.training.steps, 12);
    let odd = faults(
        FILE,
        &["subject.'a=b.c'.images=x", "subject.'a=b.c'.class=dog"],
    );
    assert!(
        odd[0].contains("\"a=b.c\" cannot be a subject's name"),
        "{odd:#?}"
    );
}

#[test]
fn a_faulty_override_hides_no_fault_of_the_file() {
    let text = FILE.replace("count = 5", "count = 0");
    let found = faults(&text, &["student.steps", "student..rank=3"]);
    assert_eq!(found.len(), 3, "{found:#?}");
    assert!(found[0].contains("proxies.count = 0 is out of range"));
}
