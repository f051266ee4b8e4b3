//! An adapter that somebody else has trained makes a run's proxies, and one that a student starts from fits it: `check` and
//! `run` say before any work where it does not.

use std::path::Path;

use candle_core::{Device, Tensor};
use proxytune::files;

use crate::lora_layouts::{Tensors, assert_same, changes, factors, theirs};
use crate::support::{Place, Running, SMOKE, Said, find, program, say, tables};

/// Few proxies and steps.
const SMALL: [&str; 5] = [
    "proxies.count=4",
    "student.steps=2",
    "direct.enabled=false",
    "evaluation.every=0",
    "evaluation.prompts=[\"a {token} {class}\"]",
];

#[tokio::test]
async fn what_somebody_else_trained_makes_the_proxies_and_streaming_and_resuming_change_nothing() {
    let place = Place::new();
    let given = format!(
        "supervisor.adapter={}",
        theirs(place.path(), "theirs.safetensors").display()
    );
    let overrides: Vec<&str> = SMALL.into_iter().chain([given.as_str()]).collect();
    let outcome = place.run(&overrides, false).await.unwrap();
    let steps = outcome
        .summary
        .stages
        .iter()
        .find(|stage| stage.stage == "supervise");
    assert_eq!(
        steps.map_or(0, |stage| stage.done),
        0,
        "nothing was trained"
    );
    // The store has it in diffusers' layout, and so has the run.
    let kept = find(&place.store().join("adapters"), &|name| {
        name.ends_with(".safetensors")
    });
    assert_eq!(kept.len(), 1, "{kept:?}");
    assert_same(
        &changes(&kept[0]),
        &changes(&place.path().join("theirs.safetensors")),
        "kept",
    );
    let run = place.only_run();
    assert!(
        !find(&run.join("supervisor"), &|name| name
            .ends_with(".safetensors"))
        .is_empty()
    );
    let resolved = std::fs::read_to_string(run.join("resolved.toml")).unwrap();
    assert!(resolved.contains("adapter_digest = "), "{resolved}");
    let first = place.remains().await;
    // Again: all is there.
    let again = place.run(&overrides, false).await.unwrap();
    let drawn = again
        .summary
        .stages
        .iter()
        .find(|stage| stage.stage == "synthesize");
    assert!(drawn.is_some_and(|stage| stage.done == 4 && stage.reused == 4));
    let other = Place::new();
    other.run(&overrides, true).await.unwrap();
    other
        .remains()
        .await
        .assert_equal(&first, "one stage after another");
    let third = Place::new();
    let mut command = third.command(&overrides);
    command.env("RUST_LOG", "off");
    let mut running = Running::start(command);
    let adapters = third.store().join("adapters");
    running.runs_until(|| adapters.is_dir());
    running.kill();
    third.run(&overrides, false).await.unwrap();
    third
        .remains()
        .await
        .assert_equal(&first, "killed and gone on with");
    let shared = Place::new();
    let shards = ["1/2", "2/2"].map(|shard| {
        let mut command = program();
        command.args([
            "generate",
            SMOKE,
            "--keep-free",
            "0",
            "--shard",
            shard,
            "--store",
        ]);
        command.arg(shared.store()).arg("--out").arg(shared.out());
        overrides.iter().for_each(|text| {
            command.args(["--set", text]);
        });
        Running::start(command)
    });
    for shard in shards {
        let (status, said) = shard.wait();
        assert!(status.success(), "{said}");
    }
    let made = tables(&shared.store()).await;
    assert_eq!(made["proxies"], tables(&place.store()).await["proxies"]);
    // Another adapter makes other proxies.
    let plain = Place::new();
    let untrained: Vec<&str> = SMALL.into_iter().chain(["supervisor.steps=1"]).collect();
    plain.run(&untrained, false).await.unwrap();
    let others = tables(&plain.store()).await;
    assert_ne!(others["proxies"], tables(&place.store()).await["proxies"]);
}

fn check(place: &Place, overrides: &[&str]) -> Said {
    let mut command = program();
    command.args(["check", SMOKE, "--store"]).arg(place.store());
    command.arg("--out").arg(place.out());
    overrides.iter().for_each(|text| {
        command.args(["--set", text]);
    });
    say(command)
}

#[test]
fn an_adapter_that_does_not_fit_is_a_fault_of_check_and_run_before_work() {
    let place = Place::new();
    let fits = theirs(place.path(), "theirs.safetensors");
    let given = |path: &Path| format!("supervisor.adapter={}", path.display());
    let checked = check(&place, &[&given(&fits)]);
    checked.says(0, &[]);
    for part in ["adapter = ", "adapter_digest = ", "theirs.safetensors"] {
        assert!(checked.out.contains(part), "{}", checked.out);
    }
    // What the file says of learning has no effect, and what is typed beside it is a fault.
    let parts = ["how the supervisor learns has no effect with supervisor.adapter"];
    check(&place, &[&given(&fits), "supervisor.steps=3"]).says(2, &parts);
    let parts = ["supervisor.adapter_digest has no effect without supervisor.adapter"];
    check(&place, &["supervisor.adapter_digest=abc"]).says(2, &parts);
    let (tensors, _) = files::read_tensors(&fits).unwrap();
    let changed = |name: &str, change: &dyn Fn(&mut Tensors)| {
        let mut tensors = tensors.clone();
        change(&mut tensors);
        let path = place.path().join(name);
        files::write_tensors(&path, &tensors, &[]).unwrap();
        path
    };
    let value = |value: f32, shape: &[usize]| Tensor::full(value, shape, &Device::Cpu).unwrap();
    let fc1 = "lora_unet_joint_blocks_2_x_block_mlp_fc1";
    let deeper = changed("deeper.safetensors", &|tensors| {
        let name = |part: &str| format!("{}.{part}.weight", fc1.replace('2', "9"));
        tensors.insert(name("lora_down"), value(0.1, &[3, 128]));
        tensors.insert(name("lora_up"), value(0.1, &[512, 3]));
    });
    let wide = changed("wide.safetensors", &|tensors| {
        tensors.insert(format!("{fc1}.lora_up.weight"), value(0.1, &[600, 3]));
    });
    let nan = changed("nan.safetensors", &|tensors| {
        tensors.insert(format!("{fc1}.lora_up.weight"), value(f32::NAN, &[512, 3]));
    });
    for (file, parts) in [
        (
            &deeper,
            [
                "transformer_blocks.9.ff.net.0.proj: the model has no such layer",
                "supervisor.adapter",
            ],
        ),
        (
            &wide,
            [
                "[600, 128], the model's has [512, 128]",
                "supervisor.adapter",
            ],
        ),
        (&nan, [fc1, "not finite"]),
    ] {
        check(&place, &[&given(file)]).says(2, &parts);
        say(place.command(&[&given(file)])).says(2, &parts[..1]);
    }
    let absent = place.path().join("absent.safetensors");
    check(&place, &[&given(&absent)]).says(2, &["supervisor.adapter cannot be read", "hint: "]);
    assert!(!place.out().exists());
}

#[test]
fn an_init_that_does_not_fit_is_refused_before_work() {
    let place = Place::new();
    let wo = ["layers.0.attention.wo", "layers.9.attention.wo"];
    let deeper = factors(place.path(), "deeper", &wo);
    let all: Vec<String> = (0..6).map(|i| format!("layers.{i}.attention.wo")).collect();
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    let whole = factors(place.path(), "whole", &all);
    let file = whole.join("adapter_model.safetensors");
    let begin = |init: &Path, rank: usize| {
        let overrides = [
            format!("student.init={}", init.display()),
            format!("student.rank={rank}"),
            "student.targets=[\"attention.wo\"]".to_string(),
        ];
        let overrides: Vec<&str> = overrides.iter().map(String::as_str).collect();
        check(&place, &overrides)
    };
    begin(&deeper, 2).says(2, &["layers.9.attention.wo: the model has no such layer"]);
    let parts = ["layers.0.attention.wo: its rank is 2, here 4 (and 5 more of other blocks)"];
    begin(&whole, 4).says(2, &parts);
    begin(&whole, 2).says(0, &[]);
    begin(&file, 2).says(0, &[]);
    let few = factors(place.path(), "few", &all[..2]);
    begin(&few, 2).says(
        2,
        &["layers.2.attention.wo is a target here, and not adapted by it"],
    );
    assert!(!place.out().exists());
}

#[test]
fn a_watched_folder_is_learnt_from_what_somebody_else_trained() {
    let place = Place::new();
    let photos = place.path().join("photos/dog/rex");
    crate::support::copy_tree(Path::new("datasets/nano/subjects/dog1"), &photos);
    let adapter = theirs(place.path(), "theirs.safetensors");
    let mut command = program();
    command.arg("watch").arg(place.path().join("photos"));
    command.args(["--once", "--settle", "0.1", "--pipeline", SMOKE, "--store"]);
    command.arg(place.store());
    let given = format!("supervisor.adapter={}", adapter.display());
    for text in SMALL.into_iter().chain([given.as_str()]) {
        // A watch has no baseline of its own.
        if !text.starts_with("direct.") {
            command.args(["--set", text]);
        }
    }
    let said = say(command);
    assert_eq!(said.code, Some(0), "{said:?}");
    let kept = find(&place.store().join("adapters"), &|name| {
        name.ends_with(".safetensors")
    });
    assert_eq!(kept.len(), 1, "{kept:?}");
    assert_same(&changes(&kept[0]), &changes(&adapter), "kept");
    let published = place.path().join("photos/.proxytune/published");
    assert!(published.is_dir(), "{said:?}");
}
