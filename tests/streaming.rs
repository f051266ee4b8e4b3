//! Time does not change the result: all stages at once, or one after another.

use std::collections::BTreeSet;

use proxytune::store::Columns;

use crate::support::{PROXIES, Place};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streaming_and_sequential_runs_leave_equal_bytes_and_equal_rows() {
    let (streaming, sequential) = (Place::new(), Place::new());
    let outcome = streaming.run(&[], false).await.unwrap();
    let (first, planned) = outcome.summary.first_training_proxy.unwrap();
    assert!(
        first < planned && planned == PROXIES,
        "training began with {first} of {planned} proxies"
    );
    let outcome = sequential.run(&[], true).await.unwrap();
    assert_eq!(outcome.summary.first_training_proxy.unwrap().1, PROXIES);

    let remains = streaming.remains().await;
    remains.assert_equal(&sequential.remains().await, "sequential");
    let adapters: Vec<&String> = remains.adapters.keys().collect();
    for name in [
        "student/adapter_model.safetensors",
        "direct/adapter_model.safetensors",
    ] {
        assert!(remains.adapters.contains_key(name), "{adapters:?}");
    }
    assert!(
        adapters
            .iter()
            .any(|name| name.starts_with("store/") && name.ends_with(".safetensors")),
        "{adapters:?}"
    );
    let tables: Vec<&str> = remains
        .tables
        .keys()
        .map(|name| name.split('_').next().unwrap())
        .collect();
    assert_eq!(
        tables,
        ["evaluations", "metrics", "proxies", "subjects", "tokens"]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_student_reuses_all_proxies_and_another_guidance_makes_new_ones() {
    let place = Place::new();
    place.run(&[], false).await.unwrap();
    let proxies = place.proxies().await;
    assert_eq!(proxies.count(), PROXIES);
    let before = proxies.digest().await.unwrap();

    let outcome = place
        .run(&["student.steps=3", "direct.enabled=false"], false)
        .await
        .unwrap();
    let proxies = place.proxies().await;
    assert_eq!(proxies.count(), PROXIES);
    assert_eq!(proxies.digest().await.unwrap(), before);
    for name in ["supervise", "synthesize", "tokenize", "score"] {
        let stage = outcome
            .summary
            .stages
            .iter()
            .find(|stage| stage.stage == name)
            .unwrap();
        assert!(stage.done > 0 && stage.done == stage.reused, "{stage:?}");
    }

    let changed = [
        "student.steps=1",
        "direct.enabled=false",
        "proxies.guidance_scale=2.5",
    ];
    place.run(&changed, false).await.unwrap();
    assert_eq!(place.proxies().await.count(), 2 * PROXIES);
    assert_eq!(place.runs().len(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_subjects_share_one_student_and_each_has_its_proxies() {
    let place = Place::new();
    let overrides = [
        "subject.cat1.images=datasets/nano/subjects/cat1",
        "subject.cat1.class=cat",
        "direct.enabled=false",
        "evaluation.every=0",
    ];
    let outcome = place.run(&overrides, false).await.unwrap();
    assert!(
        outcome
            .dir
            .join("student/adapter_model.safetensors")
            .is_file()
    );
    let rows = place
        .proxies()
        .await
        .rows(None, Columns::WithoutPictures)
        .await
        .unwrap();
    let of = |name: &str| rows.iter().filter(|row| row.subject == name).count();
    let (dog, cat) = (of("dog1"), of("cat1"));
    assert!(
        dog > 0 && cat > 0 && dog + cat == rows.len(),
        "{dog} + {cat} of {}",
        rows.len()
    );
    let supervisors: BTreeSet<&String> = rows.iter().map(|row| &row.supervisor).collect();
    let tokens: BTreeSet<&String> = rows.iter().map(|row| &row.token).collect();
    assert_eq!((supervisors.len(), tokens.len()), (2, 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sdxl_teaches_and_is_taught_and_streaming_equals_sequential() {
    let model = "tests/golden/text-to-image/sdxl-euler/model";
    let supervisor = format!("supervisor.model={model}");
    let student = format!("student.model={model}");
    let as_supervisor = vec![
        supervisor.as_str(),
        "supervisor.resolution=32",
        "direct.enabled=false",
    ];
    let as_student = vec![
        student.as_str(),
        "student.resolution=32",
        "evaluation.clip=nano-clip",
        "evaluation.dino=nano-dino",
    ];
    for (overrides, kept) in [
        (as_supervisor, "store/"),
        (as_student, "student/pytorch_lora_weights.safetensors"),
    ] {
        let (streaming, sequential) = (Place::new(), Place::new());
        streaming.run(&overrides, false).await.unwrap();
        sequential.run(&overrides, true).await.unwrap();
        assert_eq!(streaming.proxies().await.count(), PROXIES);
        let remains = streaming.remains().await;
        remains.assert_equal(&sequential.remains().await, kept);
        let names: Vec<&String> = remains.adapters.keys().collect();
        assert!(names.iter().any(|name| name.starts_with(kept)), "{names:?}");
    }
}
