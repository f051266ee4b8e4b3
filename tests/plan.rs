//! The plan: the same input gives the same plan, and growth leaves what was there as it was.

use std::collections::BTreeSet;

use proptest::prelude::*;
use proxytune::config::{Document, Resolved};
use proxytune::plan::{
    Digest, Plan, Versions, checkpoint_digest, derive_seed, photos_digest, proxy_keys, step_seed,
    supervisor_keys,
};

const PIPELINE: &str = r#"
seed = 7
[subject.dog]
images = "photos/dog"
class = "dog"
[subject.can]
images = "photos/can"
class = "can"
[supervisor]
model = "nano-sd3"
[proxies]
count = 20
batch_size = 8
prompts = ["a {token} {class}", "a photo of a {token} {class}"]
[student]
model = "nano-llamagen"
steps = 40
batch_size = 4
[evaluation]
prompts = "nano-10"
images_per_prompt = 2
batch_size = 3
"#;

fn resolve(overrides: &[String]) -> Resolved {
    Document::parse(
        PIPELINE,
        "plan.toml",
        overrides,
        &proxytune::models::Registry,
    )
    .resolve()
    .unwrap()
}

fn with(overrides: &[&str]) -> Resolved {
    resolve(
        &overrides
            .iter()
            .map(|text| text.to_string())
            .collect::<Vec<_>>(),
    )
}

fn plan(resolved: &Resolved) -> Plan {
    let photos: Vec<(String, usize)> = resolved
        .subjects
        .iter()
        .map(|s| (s.name.clone(), 5))
        .collect();
    Plan::new(resolved, &photos).unwrap()
}

fn plan_with(overrides: &[&str]) -> Plan {
    plan(&with(overrides))
}

#[test]
fn the_same_input_gives_the_same_plan() {
    assert_eq!(plan_with(&[]), plan_with(&[]));
}

#[test]
fn the_digest_changes_with_every_setting_that_affects_the_result_and_with_no_other() {
    let digest = plan_with(&[]).digest().to_string();
    for affecting in [
        "seed=8",
        "subject.dog.token=vok",
        "supervisor.rank=8",
        "supervisor.prior_preservation={}",
        "proxies.count=21",
        "proxies.guidance_scale=2.5",
        "student.steps=41",
        "student.overlap=0.25",
        "student.dropout=0.2",
        "student.device=cuda",
        "student.dtype=bf16",
        "supervisor.dtype=f32",
        "direct.steps=3",
        "direct.enabled=false",
        "evaluation.images_per_prompt=1",
        "evaluation.every=10",
    ] {
        assert_ne!(plan_with(&[affecting]).digest(), digest, "{affecting}");
    }
    for harmless in [
        "channels.proxies=1",
        "student.checkpoint_every=3",
        "student.memory=fit",
        "direct.memory=fast",
        "student.dtype=auto",
    ] {
        assert_eq!(plan_with(&[harmless]).digest(), digest, "{harmless}");
    }
    let resolved = with(&[]);
    let other_photos = [("dog".to_string(), 5), ("can".to_string(), 4)];
    assert_ne!(
        Plan::new(&resolved, &other_photos).unwrap().digest(),
        digest
    );
}

#[test]
fn subjects_take_turns_and_batches_never_mix_them() {
    let plan = plan_with(&[]);
    assert_eq!((plan.proxies().len(), plan.batches()), (40, 6));
    let subjects: Vec<usize> = (0..6).map(|batch| plan.batch(batch).subject).collect();
    assert_eq!(subjects, [0, 1, 0, 1, 0, 1]);
    for number in 0..plan.batches() {
        let batch = plan.batch(number);
        for proxy in &plan.proxies()[batch.numbers.clone()] {
            assert_eq!((proxy.batch, proxy.subject), (number, batch.subject));
        }
    }
    assert_eq!(plan.proxy(8).prompt, "a ohw can");
    assert_eq!(plan.proxy(9).prompt, "a photo of a ohw can");
}

#[test]
fn more_proxies_or_subjects_leave_existing_seeds_as_they_are() {
    let seeds = |plan: &Plan, subject: usize| -> Vec<u64> {
        let proxies = plan
            .proxies()
            .iter()
            .filter(|proxy| proxy.subject == subject);
        proxies.map(|proxy| proxy.seed).collect()
    };
    let before = plan_with(&[]);
    let after = plan_with(&[
        "proxies.count=50",
        "proxies.batch_size=4",
        "subject.x.images=x",
        "subject.x.class=cat",
    ]);
    for subject in 0..2 {
        assert_eq!(seeds(&after, subject)[..20], seeds(&before, subject)[..]);
    }
    assert_ne!(seeds(&before, 0), seeds(&before, 1));
}

#[test]
fn keys_of_whole_batches_survive_more_proxies_and_more_subjects() {
    let keys = |resolved: &Resolved, plan: &Plan, batch: usize| {
        let sampling = resolved.proxies.as_ref().unwrap().sampling.as_ref();
        let supervisor = Versions::new("supervisor".to_string(), Vec::new());
        proxy_keys(plan, batch, &supervisor, sampling)
            .newest()
            .clone()
    };
    let before = with(&[]);
    let after = with(&[
        "proxies.count=24",
        "subject.x.images=x",
        "subject.x.class=cat",
    ]);
    let (plan_before, plan_after) = (plan(&before), plan(&after));
    let first = keys(&before, &plan_before, 0);
    assert_eq!(first.len(), 8);
    assert_eq!(keys(&after, &plan_after, 0), first);
    // the second subject's second batch: 3rd of 2 subjects, 4th of 3
    assert_eq!(keys(&after, &plan_after, 4), keys(&before, &plan_before, 3));
    // the last batch of 20 proxies was not whole, so it is another batch now
    assert_ne!(
        keys(&after, &plan_after, 6)[..4],
        keys(&before, &plan_before, 4)[..]
    );
    let distinct: std::collections::BTreeSet<String> = (0..plan_before.batches())
        .flat_map(|batch| keys(&before, &plan_before, batch))
        .collect();
    assert_eq!(distinct.len(), 40);
}

#[test]
fn proxies_are_new_when_how_they_are_made_changes_and_only_then() {
    let key = |overrides: &[&str]| {
        let resolved = with(overrides);
        let (supervisor, _, sampling) = resolved.teacher().unwrap();
        let made = supervisor_keys(
            "photos",
            "base",
            &resolved.subjects[0],
            supervisor,
            sampling,
            resolved.seed,
        );
        let drawn = proxy_keys(&plan(&resolved), 0, &made, Some(sampling));
        (made.newest().clone(), drawn.newest()[0].clone())
    };
    let (supervisor, proxy) = key(&[]);
    for same in [
        "student.steps=3",
        "student.rank=2",
        "evaluation.every=1",
        "supervisor.checkpoint_every=7",
        "supervisor.memory=fit",
        "student.dtype=bf16",
    ] {
        assert_eq!(key(&[same]), (supervisor.clone(), proxy.clone()), "{same}");
    }
    for sampling in [
        "proxies.guidance_scale=2",
        "proxies.num_inference_steps=3",
        "proxies.negative_prompt=x",
    ] {
        let (made, drawn) = key(&[sampling]);
        assert_eq!(made, supervisor, "{sampling}");
        assert_ne!(drawn, proxy, "{sampling}");
    }
    for training in [
        "seed=8",
        "supervisor.steps=3",
        "supervisor.rank=2",
        "supervisor.learning_rate=1e-3",
        "supervisor.prompt=one {token} {class}",
        "supervisor.prior_preservation={}",
        "supervisor.resolution=64",
        "supervisor.device=cuda",
        "supervisor.dtype=bf16",
        "supervisor.targets=[\"attn.to_q\"]",
        "subject.dog.token=vok",
        "subject.dog.class=puppy",
    ] {
        let (made, drawn) = key(&[training]);
        assert_ne!(made, supervisor, "{training}");
        assert_ne!(drawn, proxy, "{training}");
    }
    assert_eq!(
        key(&["supervisor.device=cuda"]),
        key(&["supervisor.device=cuda:1"])
    );
    let resolved = with(&[]);
    let teacher = resolved.supervisor.as_ref().unwrap();
    let (_, _, sampling) = resolved.teacher().unwrap();
    let of = |photos, base| {
        let keys = supervisor_keys(photos, base, &resolved.subjects[0], teacher, sampling, 7);
        keys.newest().clone()
    };
    assert_ne!(of("photos", "base"), of("photos", "other"));
    assert_ne!(of("photos", "base"), of("other", "base"));
}

#[test]
fn evaluation_draws_the_same_seeds_whatever_else_is_planned() {
    let plan = plan_with(&[]);
    let images = &plan.evaluation().images;
    assert_eq!(images.len(), 2 * 10 * 2);
    assert_eq!(images[0].prompt, "a sks dog in the jungle");
    assert_eq!(images[0].text, "a dog in the jungle");
    let mut covered = Vec::new();
    for batch in &plan.evaluation().batches {
        assert!(
            images[batch.clone()]
                .iter()
                .all(|image| image.subject == images[batch.start].subject)
        );
        covered.extend(batch.clone());
    }
    assert_eq!(covered, (0..images.len()).collect::<Vec<_>>());
    let other = plan_with(&["student.steps=3", "proxies.count=3"]);
    assert_eq!(other.evaluation(), plan.evaluation());
}

#[test]
fn a_replayed_subject_teaches_some_of_its_proxies_as_they_were_made() {
    let replay = |digest: &str| {
        plan_with(&[
            "subject.can.replay=5",
            "student.init=a/folder",
            &format!("student.init_digest={digest}"),
        ])
    };
    let (whole, plan) = (plan_with(&[]), replay("d1"));
    // The positions within the subject of what a student of `plan` learns.
    let of = |subject: usize, plan: &Plan| -> BTreeSet<usize> {
        let learnt = (0..40).flat_map(|step| plan.examples(step));
        let proxies = learnt.map(|number| plan.proxy(*number));
        proxies
            .filter(|proxy| proxy.subject == subject)
            .map(|proxy| proxy.index)
            .collect()
    };
    assert_eq!((of(0, &plan).len(), of(1, &plan).len()), (20, 5));
    // Its batches are those that were made before, whole, so that they are found in the store.
    let keys = |plan: &Plan| -> BTreeSet<String> {
        let sampling = with(&[]).proxies.unwrap().sampling;
        let supervisor = Versions::new("sup".to_string(), Vec::new());
        (0..plan.batches())
            .flat_map(|batch| {
                proxy_keys(plan, batch, &supervisor, sampling.as_ref())
                    .newest()
                    .clone()
            })
            .collect()
    };
    assert!(keys(&plan).is_subset(&keys(&whole)));
    // Every step finds what it needs, and uses nothing that has not come.
    for step in 0..40 {
        let end = plan.batch(plan.needs(step) - 1).numbers.end;
        assert!(
            plan.examples(step).iter().all(|number| *number < end),
            "step {step}"
        );
    }
    // Other ones for another adapter, and the same for the same one wherever it lies.
    assert_ne!(of(1, &plan), of(1, &replay("d2")));
    assert_ne!(plan.digest(), replay("d2").digest());
    assert_ne!(plan.student_seed(), whole.student_seed());
    let moved = plan_with(&[
        "subject.can.replay=5",
        "student.init=elsewhere",
        "student.init_digest=d1",
    ]);
    assert_eq!(moved, plan);
    // More than there are is all of them.
    let all = plan_with(&["subject.can.replay=100"]);
    assert_eq!(all.examples(39), whole.examples(39));
}

#[test]
fn references_come_in_shuffled_epochs() {
    let plan = plan_with(&[
        "supervisor.steps=10",
        "supervisor.batch_size=3",
        "supervisor.prior_preservation={class_images=7}",
    ]);
    let supervisor = plan.supervisor(1).unwrap();
    let uses: Vec<usize> = (0..10)
        .flat_map(|step| supervisor.references.batch(step).to_vec())
        .collect();
    for epoch in uses.chunks(5) {
        let mut sorted = epoch.to_vec();
        sorted.sort_unstable();
        assert_eq!(sorted, [0, 1, 2, 3, 4]);
    }
    assert_ne!(uses[..5], uses[5..10]);
    assert_eq!(supervisor.class_seeds.len(), 7);
    assert_eq!(supervisor.class_images.as_ref().unwrap().batch(9).len(), 3);
    assert!(plan.supervisor(0).unwrap().references != supervisor.references);
    assert_eq!(plan.references().len(), 10);
    assert_eq!(plan.direct().unwrap().steps(), 40);
}

#[test]
fn a_student_of_references_needs_no_batches() {
    let plan = plan_with(&["student.source=references"]);
    assert_eq!((plan.batches(), plan.needs(0), plan.needs(39)), (0, 0, 0));
    assert_eq!(plan.examples(39).len(), 4);
    assert!(plan.examples(0).iter().all(|reference| *reference < 10));
}

#[test]
fn without_overlap_everything_is_there_before_the_first_step() {
    let plan = plan_with(&["student.overlap=0"]);
    assert_eq!(plan.needs(0), plan.batches());
    // 40 steps of 4 are exactly 4 epochs of 40
    let mut uses = [0; 40];
    for step in 0..40 {
        plan.examples(step)
            .iter()
            .for_each(|proxy| uses[*proxy] += 1);
        let (least, most) = (uses.iter().min().unwrap(), uses.iter().max().unwrap());
        assert!(most - least <= 1, "step {step}");
    }
}

#[test]
fn a_step_learns_from_as_many_batches_as_gradients_are_accumulated_over() {
    let plan = plan_with(&[
        "student.gradient_accumulation_steps=3",
        "supervisor.batch_size=2",
        "supervisor.gradient_accumulation_steps=2",
        "supervisor.prior_preservation={class_images=7}",
        "direct.gradient_accumulation_steps=1",
    ]);
    let supervisor = plan.supervisor(0).unwrap();
    let class_images = supervisor.class_images.as_ref().unwrap();
    assert_eq!(plan.examples(39).len(), 12);
    assert_eq!(supervisor.references.batch(0).len(), 4);
    assert_eq!(class_images.batch(0).len(), 4);
    assert_eq!(plan.direct().unwrap().batch(0).len(), 4);
}

#[test]
fn photos_must_be_those_of_the_subjects() {
    let resolved = with(&[]);
    assert!(Plan::new(&resolved, &[("dog".to_string(), 3)]).is_err());
    assert!(Plan::new(&resolved, &[("can".to_string(), 3), ("dog".to_string(), 3)]).is_err());
    let error =
        Plan::new(&resolved, &[("dog".to_string(), 3), ("can".to_string(), 0)]).unwrap_err();
    assert!(error.to_string().contains("can"));
}

#[test]
fn twenty_thousand_proxies_are_planned_in_a_moment() {
    let start = std::time::Instant::now();
    let plan = plan_with(&[
        "proxies.count=10000",
        "student.steps=10000",
        "student.batch_size=8",
    ]);
    assert_eq!(plan.proxies().len(), 20_000);
    assert_eq!(plan.examples(9_999).len(), 8);
    assert!(start.elapsed().as_secs() < 5, "{:?}", start.elapsed());
}

#[test]
fn digests_tell_fields_apart() {
    let one = Digest::new("k").field("a", "b").field("c", "d").finish();
    assert_eq!(one.len(), 64);
    assert_eq!(
        one,
        Digest::new("k").field("a", "b").field("c", "d").finish()
    );
    assert_ne!(
        one,
        Digest::new("k").field("ab", "").field("c", "d").finish()
    );
    assert_ne!(
        one,
        Digest::new("k").field("c", "d").field("a", "b").finish()
    );
    assert_ne!(
        one,
        Digest::new("kk").field("a", "b").field("c", "d").finish()
    );
    let photos = |list: &[&str]| {
        photos_digest(&list.iter().map(|text| text.to_string()).collect::<Vec<_>>())
    };
    assert_ne!(photos(&["a", "b"]), photos(&["b", "a"]));
    assert_ne!(photos(&["ab"]), photos(&["a", "b"]));
    assert_ne!(step_seed(1, "train", 0), step_seed(1, "train", 1));
    assert_ne!(derive_seed(1, "a", 0), derive_seed(2, "a", 0));
}

#[test]
fn a_checkpoints_digest_is_of_its_names_and_contents() {
    let folder = tempfile::tempdir().unwrap();
    let inside = folder.path().join("transformer");
    std::fs::create_dir(&inside).unwrap();
    assert!(checkpoint_digest(folder.path()).is_err());
    let config = folder.path().join("config.json");
    std::fs::write(&config, "{}").unwrap();
    std::fs::write(inside.join("model.safetensors"), [0u8; 64]).unwrap();
    let first = checkpoint_digest(folder.path()).unwrap();
    std::fs::write(folder.path().join("README.md"), "hello").unwrap();
    assert_eq!(checkpoint_digest(folder.path()).unwrap(), first);
    std::fs::write(inside.join("model.safetensors"), [1u8; 64]).unwrap();
    let second = checkpoint_digest(folder.path()).unwrap();
    assert_ne!(second, first);
    std::fs::rename(&config, folder.path().join("other.json")).unwrap();
    assert_ne!(checkpoint_digest(folder.path()).unwrap(), second);
    assert!(checkpoint_digest(&folder.path().join("nowhere")).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    /// What a step uses has been made, what is made only grows, and the least used come first.
    #[test]
    fn every_step_takes_the_least_used_of_what_is_there(
        seed in 0u64..1000,
        count in 1usize..40,
        generated in 1usize..12,
        steps in 1usize..60,
        batch in 1usize..9,
        overlap in 0.0f64..=1.0,
    ) {
        let plan = plan(&resolve(&[
            format!("seed={seed}"),
            format!("proxies.count={count}"),
            format!("proxies.batch_size={generated}"),
            format!("student.steps={steps}"),
            format!("student.batch_size={batch}"),
            format!("student.overlap={overlap:?}"),
        ]));
        let all = plan.proxies().len();
        let mut uses = vec![0usize; all];
        let mut before = 0;
        for step in 0..steps {
            let needs = plan.needs(step);
            prop_assert!(needs >= 1 && needs >= before && needs <= plan.batches());
            before = needs;
            let available = plan.batch(needs - 1).numbers.end;
            prop_assert_eq!(plan.examples(step).len(), batch);
            for &proxy in plan.examples(step) {
                prop_assert!(proxy < available);
                let least = uses[..available].iter().min().copied().unwrap_or(0);
                prop_assert_eq!(uses[proxy], least);
                uses[proxy] += 1;
            }
            if (step as f64) >= overlap * steps as f64 {
                prop_assert_eq!(needs, plan.batches());
            }
        }
        if overlap > 0.0 && (overlap * steps as f64) > 0.0 {
            prop_assert_eq!(plan.needs(0), 1);
        }
    }

    /// n(s) grows as a line: no more is asked for than the line, and a whole batch more would be above it.
    #[test]
    fn what_a_step_needs_follows_the_line(count in 1usize..60, generated in 1usize..12, steps in 1usize..80) {
        let plan = plan(&resolve(&[
            format!("proxies.count={count}"),
            format!("proxies.batch_size={generated}"),
            format!("student.steps={steps}"),
            "student.overlap=1.0".to_string(),
        ]));
        let first = plan.batch(0).numbers.end as f64;
        let all = plan.proxies().len() as f64;
        for step in 0..steps {
            let line = first + (all - first) * step as f64 / steps as f64;
            let needs = plan.needs(step);
            prop_assert!(plan.batch(needs - 1).numbers.end as f64 <= line + 1e-6);
            if needs < plan.batches() {
                prop_assert!(plan.batch(needs).numbers.end as f64 > line - 1e-6);
            }
        }
    }
}
