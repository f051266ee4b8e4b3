//! Keys stay what they are: stores that took days are addressed by them.

use std::collections::BTreeSet;
use std::path::Path;

use proxytune::config::{Document, Dtype, Resolved, Sampling};
use proxytune::plan::{
    Digest, Plan, Sampled, Versions, captioned_photos_digest, checkpoint_digest, drawing_key,
    evaluators_key, photos_digest, proxy_keys, reference_key, sample_keys, settings_digest,
    student_key, supervisor_keys, tokens_key,
};

use crate::support;

const PIPELINE: &str = r#"
seed = 7
threads = 2
[subject.dog]
images = "photos/dog"
class = "dog"
[supervisor]
model = "nano-sd3"
[proxies]
count = 6
batch_size = 4
[student]
model = "nano-llamagen"
steps = 10
[evaluation]
prompts = "nano-10"
images_per_prompt = 1
"#;

fn with(overrides: &[&str]) -> Resolved {
    let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
    Document::parse(
        PIPELINE,
        "keys.toml",
        &overrides,
        &proxytune::models::Registry,
    )
    .resolve()
    .unwrap()
}

fn plan(resolved: &Resolved) -> Plan {
    Plan::new(resolved, &[("dog".to_string(), 3)]).unwrap()
}

fn supervisor(resolved: &Resolved) -> Versions<String> {
    let (supervisor, _, sampling) = resolved.teacher().unwrap();
    let subject = &resolved.subjects[0];
    supervisor_keys(
        "photos",
        "base",
        subject,
        supervisor,
        sampling,
        resolved.seed,
    )
}

/// The newest keys of everything that the pipeline makes, by the kind of thing.
fn keys(overrides: &[&str]) -> Vec<(&'static str, String)> {
    let resolved = with(overrides);
    let plan = plan(&resolved);
    let supervisor = supervisor(&resolved);
    let (_, _, drawn) = resolved.teacher().unwrap();
    let made = proxy_keys(&plan, 1, &supervisor, Some(drawn));
    let student = resolved.student.sampling.clone();
    let diffusion = Sampling::Diffusion(drawn.clone());
    let sampled = |method, sampling| {
        let keys = sample_keys(&Sampled {
            method,
            model: "model",
            adapter: "adapter",
            step: 10,
            sampling,
            photos: &["a".to_string(), "b".to_string()],
            images: &plan.evaluation().images[..plan.evaluation().images.len().min(2)],
        });
        keys.newest().last().unwrap().clone()
    };
    vec![
        ("supervisor", supervisor.newest().clone()),
        ("proxy", made.newest()[1].clone()),
        ("sample of the student", sampled("student", &student)),
        (
            "sample of the supervisor",
            sampled("supervisor", &diffusion),
        ),
        ("settings", settings_digest(&resolved)),
        ("plan", plan.digest().to_string()),
    ]
}

/// Keys that do not depend on a pipeline.
fn others() -> Vec<(&'static str, String)> {
    let folder = tempfile::tempdir().unwrap();
    let inside = folder.path().join("inside");
    std::fs::create_dir(&inside).unwrap();
    std::fs::write(folder.path().join("config.json"), "{}").unwrap();
    std::fs::write(inside.join("model.safetensors"), [7u8; 100]).unwrap();
    let photos = ["a".to_string(), "b".to_string()];
    let supervisor = "supervisor".to_string();
    vec![
        ("photos", photos_digest(&photos)),
        ("reference", reference_key("dog", "photo")),
        (
            "drawing",
            drawing_key("base", Some(64), Dtype::Bf16, "cuda"),
        ),
        (
            "student",
            student_key("plan", "base", &photos, &[&supervisor]),
        ),
        ("checkpoint", checkpoint_digest(folder.path()).unwrap()),
        (
            "evaluators",
            evaluators_key(folder.path(), &inside).unwrap(),
        ),
    ]
}

/// The keys of version 1.
const GOLDEN: [(&str, &str); 14] = [
    (
        "supervisor",
        "93932af94fa8e906c49f9784c36119232146879350e288771eecd0dfad28b56d",
    ),
    (
        "proxy",
        "e851698eec13dd07d35ce0136e5f430bf2383543dc8002c053598921a399e9ed",
    ),
    (
        "sample of the student",
        "76d533dad64b32ec78740b6cacb3e3b678344f90d3bdea958c13cba53043e08a",
    ),
    (
        "sample of the supervisor",
        "90b01edd0a30279f76a7086c5af6113b3d456f975dbff7bd844db09fe2094369",
    ),
    (
        "settings",
        "f7c68b18cd1dcc43d5f09da940a07ce26a5fb90f0a3e02027f23d935dcd131c8",
    ),
    (
        "plan",
        "97a23e6bf8f7326b8b698fa5f2e710379e56302ed1d407922744e0287bdca5c5",
    ),
    (
        "supervisor with every option",
        "b06547b465a65ecdb1d74f6ab93ce5d075fce5f9c9fbdd05b0868e38d4d6fb14",
    ),
    (
        "plan with every option",
        "250dc7e1ddfde36d3a713e9f5801334c5641977c6669cb7cf8ac2252b357a9f1",
    ),
    (
        "photos",
        "045a427df2110567f7c42f463e4d17ff8ffe81b2da60aad6045d95f80f342716",
    ),
    (
        "reference",
        "e6fd01e5b399dcbe08e1f49ceafd21074db68dd8ddd0ad206d0ac6470369336d",
    ),
    (
        "drawing",
        "109feee81ff88a4e4c4d5de219aa20da09b0f9ba4a4dd34374358e7c5a1a7bac",
    ),
    (
        "student",
        "085c8911207c729cbb35f69ca2a5411b24367b7d5f23f2cea8a3b023c293b0d0",
    ),
    (
        "checkpoint",
        "f96cf2e6cbb73fe217c4045676e12634479f73fb0baf406fcaea1dde4f1105a7",
    ),
    (
        "evaluators",
        "9f516d2a802ee2b1ce3e21cf37c62b08ea465ba5021bd49bedae335316201d62",
    ),
];

/// Every optional field of version 1 and every choice that is not the default.
const EVERY_OPTION: [&str; 30] = [
    "subject.dog.replay=3",
    "supervisor.device=cuda",
    "supervisor.dtype=bf16",
    "supervisor.resolution=64",
    "supervisor.lr_scheduler=cosine",
    "supervisor.warmup_steps=2",
    "supervisor.optimizer=prodigy",
    "supervisor.prodigy_beta3=0.9",
    "supervisor.prodigy_growth_rate=1.5",
    "supervisor.prodigy_safeguard_warmup=false",
    "supervisor.prior_preservation={class_images=5}",
    "student.tuning=full",
    "student.device=cuda",
    "student.dtype=f32",
    "student.resolution=32",
    "student.init=a/folder",
    "student.init_digest=digest",
    "student.lr_scheduler=linear",
    "student.optimizer=muon",
    "student.condition_dropout=0.2",
    "student.dropout=0.1",
    "student.overlap=0.25",
    "student.top_k=9",
    "student.top_p=0.5",
    "student.guidance_interval=4",
    "direct.optimizer=adamw",
    "direct.source=augmented",
    "evaluation.prompts=[\"a {token} {class}\"]",
    "evaluation.every=5",
    "evaluation.device=cuda",
];

/// A key that changes orphans everything that stores have under it: supervisors and proxies that took days are made
/// again. Where that is not meant, undo what changed it. Where things are now made in another way, give the kind a new
/// version in `plan/key/kinds.rs`, keep what the old one wrote, and add values here.
#[test]
fn keys_are_those_under_which_stores_have_what_was_made() {
    let every = keys(&EVERY_OPTION);
    let renamed = [
        (0, "supervisor with every option"),
        (5, "plan with every option"),
    ];
    let renamed = renamed.map(|(place, name)| (name, every[place].1.clone()));
    let found: Vec<(&str, String)> = keys(&[])
        .into_iter()
        .chain(renamed)
        .chain(others())
        .collect();
    let golden: Vec<(&str, String)> = GOLDEN
        .iter()
        .map(|(kind, key)| (*kind, key.to_string()))
        .collect();
    assert_eq!(
        found, golden,
        "a changed key orphans stores: see this test's comment"
    );
}

#[test]
fn an_option_that_came_later_changes_no_key_before_it_is_used() {
    let later = [(
        "gradient_accumulation_steps=1",
        "gradient_accumulation_steps=2",
    )];
    for (unused, used) in later {
        let of = |value: &str| {
            let sections = ["supervisor", "student", "direct"];
            let overrides = sections.map(|section| format!("{section}.{value}"));
            keys(&overrides.each_ref().map(String::as_str))
        };
        assert_eq!(of(unused), keys(&[]), "{unused}");
        for ((kind, key), (_, other)) in of(used).iter().zip(keys(&[])) {
            assert_eq!(*key == other, kind.starts_with("sample"), "{used}: {kind}");
        }
    }
    let plain = Digest::new("k 1").number("a", 1);
    let added = |value: u64| {
        let write = |digest: Digest, value: &u64| digest.number("b", *value);
        plain.clone().added(&value, &5, write).finish()
    };
    assert_eq!(added(5), plain.finish());
    assert_ne!(added(6), plain.finish());
    assert_ne!(added(6), added(7));
}

#[test]
fn every_setting_of_a_supervisors_training_is_in_its_key() {
    let mut seen = BTreeSet::from([supervisor(&with(&[])).newest().clone()]);
    let prodigy = [
        "supervisor.optimizer=prodigy",
        "supervisor.learning_rate=1e-4",
    ];
    seen.insert(supervisor(&with(&prodigy)).newest().clone());
    let mut count = seen.len();
    for (changed, optimizer) in [
        ("steps=3", "adamw"),
        ("batch_size=3", "adamw"),
        ("gradient_accumulation_steps=3", "adamw"),
        ("learning_rate=0.3", "adamw"),
        ("adam_beta1=0.3", "adamw"),
        ("adam_beta2=0.3", "adamw"),
        ("adam_epsilon=0.3", "adamw"),
        ("weight_decay=0.3", "adamw"),
        ("max_grad_norm=0.3", "adamw"),
        ("lr_scheduler=linear", "adamw"),
        ("lr_scheduler=cosine", "adamw"),
        ("lr_scheduler=constant_with_warmup", "adamw"),
        ("rank=3", "adamw"),
        ("alpha=0.3", "adamw"),
        ("targets=[\"attn.to_k\"]", "adamw"),
        ("tuning=full", "adamw"),
        ("rank=16", "muon"),
        ("prodigy_beta3=0.3", "prodigy"),
        ("prodigy_d0=0.3", "prodigy"),
        ("prodigy_d_coef=0.3", "prodigy"),
        ("prodigy_growth_rate=3", "prodigy"),
        ("prodigy_decouple=false", "prodigy"),
        ("prodigy_use_bias_correction=false", "prodigy"),
        ("prodigy_safeguard_warmup=false", "prodigy"),
    ] {
        let optimizer = format!("supervisor.optimizer={optimizer}");
        let changed = format!("supervisor.{changed}");
        let rate = match changed.contains("learning_rate") {
            true => "seed=7",
            false => "supervisor.learning_rate=1e-4",
        };
        seen.insert(
            supervisor(&with(&[&optimizer, rate, &changed]))
                .newest()
                .clone(),
        );
        count += 1;
        assert_eq!(seen.len(), count, "{optimizer} {changed}");
    }
    // A warm-up of its own length.
    let warm = |steps: usize| {
        let steps = format!("supervisor.warmup_steps={steps}");
        supervisor(&with(&["supervisor.lr_scheduler=linear", &steps]))
            .newest()
            .clone()
    };
    assert_ne!(warm(1), warm(2));
}

#[test]
fn an_adapter_that_is_given_is_in_keys_by_its_digest_in_place_of_all_that_is_said_of_learning() {
    let given = |digest: &str, more: &[&str]| {
        let digest = format!("supervisor.adapter_digest={digest}");
        let mut overrides = vec!["supervisor.adapter=a/file.safetensors", digest.as_str()];
        overrides.extend(more);
        keys(&overrides)
    };
    let one = given("one", &[]);
    assert_eq!(one, given("one", &["supervisor.adapter=b/folder"]));
    for ((kind, key), (_, other)) in one.iter().zip(given("two", &[])) {
        assert_eq!(*key == other, kind.starts_with("sample"), "{kind}");
    }
    assert!(
        one.iter()
            .zip(keys(&[]))
            .all(|((kind, key), (_, plain))| { *key != plain || kind.starts_with("sample") })
    );
    let key = |photos: &str, seed: u64, overrides: &[&str]| {
        let overrides = ["supervisor.adapter=a", "supervisor.adapter_digest=one"]
            .into_iter()
            .chain(overrides.iter().copied());
        let resolved = with(&overrides.collect::<Vec<_>>());
        let (supervisor, _, sampling) = resolved.teacher().unwrap();
        let subject = &resolved.subjects[0];
        let keys = supervisor_keys(photos, "base", subject, supervisor, sampling, seed);
        keys.newest().clone()
    };
    let here = key("photos", 7, &[]);
    assert_eq!(here, GIVEN);
    assert_eq!(here, key("other photos", 8, &[]));
    assert_ne!(here, key("photos", 7, &["supervisor.dtype=bf16"]));
    assert_ne!(here, key("photos", 7, &["supervisor.resolution=64"]));
    assert_ne!(here, key("photos", 7, &["subject.dog.token=xyz"]));
}

/// The key of a supervisor whose adapter is given, in version 1.
const GIVEN: &str = "8e9bfdd4e60001fd89be110d8a7767f3951037a057465e1b0b95ea43485d3428";

#[test]
fn noise_levels_are_in_keys_where_they_are_not_those_of_before() {
    let of = |overrides: &[&str]| supervisor(&with(overrides)).newest().clone();
    let plain = of(&[]);
    for unused in [
        "supervisor.weighting_scheme=logit_normal",
        "supervisor.logit_mean=0",
        "supervisor.logit_std=1",
    ] {
        assert_eq!(of(&[unused]), plain, "{unused}");
    }
    let mode = "supervisor.weighting_scheme=mode";
    let used: [&[&str]; 8] = [
        &[],
        &["supervisor.weighting_scheme=none"],
        &["supervisor.weighting_scheme=cosmap"],
        &["supervisor.weighting_scheme=sigma_sqrt"],
        &[mode],
        &[mode, "supervisor.mode_scale=1"],
        &["supervisor.logit_mean=0.5"],
        &["supervisor.logit_std=0.5"],
    ];
    let distinct: BTreeSet<String> = used.iter().map(|overrides| of(overrides)).collect();
    assert_eq!(distinct.len(), used.len());
    let sdxl = "supervisor.model=sdxl";
    assert_ne!(of(&[sdxl]), of(&[sdxl, "supervisor.snr_gamma=5"]));
    // How pictures are guided is in the keys of pictures.
    let drawn = |overrides: &[&str]| keys(overrides)[1].1.clone();
    assert_eq!(drawn(&["proxies.guidance_stop=1"]), drawn(&[]));
    let parts: BTreeSet<String> = [
        &[][..],
        &["proxies.guidance_stop=0.5"],
        &["proxies.guidance_start=0.5"],
    ]
    .into_iter()
    .map(drawn)
    .collect();
    assert_eq!(parts.len(), 3);
}

#[test]
fn captions_and_cuts_of_photos_are_in_the_keys_of_what_learnt_them() {
    let photos = ["a".to_string(), "b".to_string()];
    let of = |captions: [Option<&str>; 2]| {
        captioned_photos_digest(&photos, &captions.map(|caption| caption.map(String::from)))
    };
    assert_eq!(of([None, None]), photos_digest(&photos));
    let captioned = [
        of([None, None]),
        of([Some("x"), None]),
        of([None, Some("x")]),
        of([Some("x"), Some("x")]),
    ];
    assert_eq!(BTreeSet::from(captioned).len(), 4);
    let cut = |overrides: &[&str]| supervisor(&with(overrides)).newest().clone();
    assert_eq!(
        cut(&[
            "supervisor.center_crop=true",
            "supervisor.random_flip=false"
        ]),
        cut(&[])
    );
    let ways = [
        cut(&[]),
        cut(&["supervisor.center_crop=false"]),
        cut(&["supervisor.random_flip=true"]),
    ];
    assert_eq!(BTreeSet::from(ways).len(), 3);
}

#[test]
fn tokens_of_resized_proxies_have_a_key_of_their_own() {
    assert_eq!(tokens_key("tokenizer", 512, 512), "tokenizer");
    assert_eq!(
        tokens_key("tokenizer", 512, 768),
        "67f29fce58667174203590233fb56d18825baccdc44ab402f1210c11886cacfc"
    );
    assert_ne!(
        tokens_key("tokenizer", 512, 768),
        tokens_key("tokenizer", 1024, 768)
    );
    assert_ne!(
        tokens_key("tokenizer", 512, 768),
        tokens_key("other", 512, 768)
    );
}

#[test]
fn class_images_of_prior_preservation_are_drawn_as_the_key_says() {
    let of = |overrides: &[&str]| supervisor(&with(overrides)).newest().clone();
    let prior = "supervisor.prior_preservation={class_images=5}";
    let guided = "proxies.guidance_scale=2.5";
    assert_eq!(of(&[]), of(&[guided]));
    assert_ne!(of(&[prior]), of(&[prior, guided]));
    assert_ne!(
        of(&[prior]),
        of(&["supervisor.prior_preservation={class_images=6}"])
    );
}

#[test]
fn what_was_made_under_an_older_version_is_found_and_new_things_go_under_the_newest() {
    let keys = Versions::new(3, vec![2, 1]);
    let found = |there: &[i32]| *keys.found(|key| there.contains(key));
    assert_eq!(found(&[]), 3);
    assert_eq!(found(&[1]), 1);
    assert_eq!(found(&[2, 1]), 2);
    assert_eq!(found(&[1, 2, 3]), 3);
    // Proxies are known by every known key of their supervisor, in whichever version that is.
    let resolved = with(&[]);
    let (plan, sampling) = (
        plan(&resolved),
        resolved.proxies.as_ref().unwrap().sampling.as_ref(),
    );
    let of = |supervisors: &Versions<String>| proxy_keys(&plan, 0, supervisors, sampling);
    let only = |key: &str| Versions::new(key.to_string(), Vec::new());
    let both = of(&Versions::new("new".into(), vec!["old".into()]));
    let (new, old) = (of(&only("new")), of(&only("old")));
    assert_eq!(both.newest(), new.newest());
    assert!(old.all().all(|keys| both.all().any(|known| known == keys)));
}

/// The store was made when version 1 of all keys was the newest.
#[test]
fn a_store_of_version_1_has_all_that_its_pipeline_comes_to_today() {
    let place = tempfile::tempdir().unwrap();
    let (folder, store) = (
        Path::new("tests/stores/version-1"),
        place.path().join("store"),
    );
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    support::copy_tree(&root.join(folder).join("store"), &store);
    let adapters = || {
        let entries = std::fs::read_dir(store.join("adapters")).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name())
            .collect::<Vec<_>>()
    };
    let before = adapters();
    assert_eq!(before.len(), 1);
    let generate = |count: &str| {
        let mut command = support::program();
        command.arg("generate").arg(folder.join("pipeline.toml"));
        command.args(["--count", count, "--keep-free", "0", "--store"]);
        command
            .arg(&store)
            .arg("--out")
            .arg(place.path().join("runs"));
        let said = support::say(command);
        // The small tokenizers of this model lack a word of the prompt, which is told.
        assert_eq!(said.code, Some(3), "{said:?}");
        said.out
    };
    let said = generate("4");
    assert!(said.contains("4 were there, 0 made here"), "{said}");
    // More of them are made by the supervisor that is there.
    let said = generate("6");
    assert!(said.contains("4 were there, 2 made here"), "{said}");
    assert_eq!(adapters(), before);
}
