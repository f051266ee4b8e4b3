//! Removing a subject leaves nothing of it on disk, and everything else as it was.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use lance::dataset::{InsertBuilder, WriteMode, WriteParams};
use proxytune::store::query::Snapshot;
use proxytune::store::{
    Columns, EvaluationRow, Method, MetricRow, MetricStage, PictureKind, ProxyRow, Row, RunRow,
    RunStatus, Store, SubjectRow, TokenRow,
};

const DIGEST: &str = "0123456789abcdef";

/// Words that compression cannot hide: they stand in pictures, which are stored as they are.
fn picture(subject: &str, number: u64) -> Vec<u8> {
    let mut bytes = blake3::hash(&number.to_le_bytes()).as_bytes().repeat(8);
    bytes.extend(format!("PICTURE-OF-{subject}").as_bytes());
    bytes
}

fn prompt(subject: &str) -> String {
    format!("a xqzw{subject}wzqx dog on the beach")
}

fn proxy(subject: &str, number: u64) -> ProxyRow {
    ProxyRow {
        key: blake3::hash(format!("{subject}{number}").as_bytes())
            .to_hex()
            .to_string(),
        supervisor: format!("5upervisor-of-{subject}"),
        run: "run-1".into(),
        subject: subject.into(),
        class: "dog".into(),
        token: "sks".into(),
        number,
        prompt: prompt(subject),
        seed: number,
        settings: "{}".into(),
        width: 1,
        height: 1,
        image: picture(subject, number),
        content: "c0".into(),
        created_us: 1,
    }
}

fn token(subject: &str, number: u64) -> TokenRow {
    TokenRow {
        key: proxy(subject, number).key,
        content: "c0".into(),
        grid_height: 1,
        grid_width: 2,
        tokens: vec![number as u32, 7],
        run: "run-1".into(),
        created_us: 1,
    }
}

fn sample(subject: &str, number: u64) -> EvaluationRow {
    EvaluationRow {
        key: format!("5ample-{subject}-{number}"),
        kind: PictureKind::Sample,
        run: "run-1".into(),
        method: Some(Method::Student),
        step: 1,
        subject: subject.into(),
        prompt: prompt(subject),
        seed: 1,
        adapter: None,
        clip_i: Some(0.5),
        clip_t: None,
        dino: Some(0.5),
        clip_embedding: Some(vec![0.5, 0.5]),
        dino_embedding: Some(vec![0.5, 0.5]),
        image: Some(picture(subject, number)),
        created_us: 1,
    }
}

fn photo(subject: &str) -> SubjectRow {
    SubjectRow {
        key: format!("ph0to-{subject}"),
        subject: subject.into(),
        class: "dog".into(),
        token: "sks".into(),
        index: 0,
        file_name: "00.jpg".into(),
        width: 1,
        height: 1,
        image: picture(subject, 0),
        created_us: 1,
    }
}

fn curve(subject: &str) -> MetricRow {
    MetricRow {
        run: format!("5upervisor-of-{subject}"),
        stage: MetricStage::Supervise(subject.into()),
        step: 0,
        name: "loss".into(),
        value: 1.0,
        created_us: 1,
    }
}

fn run(name: &str, subjects: &[&str]) -> RunRow {
    let resolved = subjects
        .iter()
        .map(|subject| format!("[subject.{subject}]\nclass = \"dog\"\n"))
        .collect();
    RunRow {
        run: name.into(),
        pipeline: String::new(),
        resolved,
        plan_digest: String::new(),
        versions: "{}".into(),
        status: RunStatus::Complete,
        event_us: 1,
    }
}

/// Commits row by row, so that there are many versions.
async fn fill(store: &Store, subject: &str) {
    for number in 0..6 {
        let proxies = store.proxies().await.unwrap();
        proxies.append(&[proxy(subject, number)]).await.unwrap();
        let tokens = store.tokens(DIGEST, 2).await.unwrap();
        tokens.append(&[token(subject, number)]).await.unwrap();
        let samples = store.evaluations(DIGEST, 2, 2).await.unwrap();
        samples.append(&[sample(subject, number)]).await.unwrap();
    }
    store
        .subjects()
        .await
        .unwrap()
        .append(&[photo(subject)])
        .await
        .unwrap();
    store
        .metrics()
        .await
        .unwrap()
        .append(&[curve(subject)])
        .await
        .unwrap();
    let adapter = store
        .path()
        .join(format!("adapters/5upervisor-of-{subject}"));
    std::fs::create_dir_all(&adapter).unwrap();
    std::fs::write(adapter.join("weights"), picture(subject, 0)).unwrap();
}

/// Files below `dir` that contain `words`.
fn holding(dir: &Path, words: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(holding(&path, words));
        } else {
            let bytes = std::fs::read(&path).unwrap();
            if bytes
                .windows(words.len())
                .any(|part| part == words.as_bytes())
            {
                found.push(path);
            }
        }
    }
    found
}

async fn rows<R: Row>(table: proxytune::store::Table<R>) -> Vec<R> {
    table.rows(None, Columns::All).await.unwrap()
}

#[tokio::test]
async fn what_is_removed_is_in_no_file_of_the_store_and_the_rest_is_untouched() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).await.unwrap();
    for subject in ["rex", "mia"] {
        fill(&store, subject).await;
    }
    let runs = [
        run("one", &["rex"]),
        run("both", &["rex", "mia"]),
        run("other", &["mia"]),
    ];
    store.runs().await.unwrap().append(&runs).await.unwrap();
    // Fragments that were compacted before, versions beside the latest, and what a killed writer left in no version.
    let proxies = store.proxies().await.unwrap();
    proxies.compact(Duration::from_secs(3600)).await.unwrap();
    let dataset = Arc::new(
        lance::Dataset::open(proxies.path().to_str().unwrap())
            .await
            .unwrap(),
    );
    let batch = ProxyRow::to_batch(&[&proxy("rex", 99)], &proxies.schema()).unwrap();
    let params = WriteParams {
        mode: WriteMode::Append,
        ..WriteParams::default()
    };
    let insert = InsertBuilder::new(dataset).with_params(&params);
    insert.execute_uncommitted(vec![batch]).await.unwrap();
    for words in ["PICTURE-OF-rex", "xqzwrexwzqx", "5upervisor-of-rex"] {
        assert!(
            !holding(dir.path(), words).is_empty(),
            "{words} cannot be found before either"
        );
    }
    let [mia_proxies, mia_samples] =
        ["PICTURE-OF-mia", "xqzwmiawzqx"].map(|words| holding(dir.path(), words).len());
    assert!(mia_proxies > 0 && mia_samples > 0);

    let refused = Store::open_alone(dir.path()).await.err().unwrap();
    assert!(refused.to_string().contains("in use"), "{refused}");
    let refused = store.remove_subject("rex").await.expect_err("it is shared");
    assert!(refused.to_string().contains("nobody else"), "{refused}");
    drop((store, proxies));
    let question = Snapshot::open(dir.path(), None).await.unwrap();
    let refused = Store::open_alone(dir.path()).await.err().unwrap();
    assert!(refused.to_string().contains("in use"), "{refused}");
    drop(question);
    let store = Store::open_alone(dir.path()).await.unwrap();
    let removed = store.remove_subject("rex").await.unwrap();
    let digits = &DIGEST[..12];
    let expected = [
        (format!("evaluations_{digits}"), 6),
        ("metrics".into(), 1),
        ("proxies".into(), 6),
        ("runs".into(), 1),
        ("subjects".into(), 1),
        (format!("tokens_{digits}"), 6),
    ];
    assert_eq!(removed.rows, expected);
    assert_eq!(
        (removed.adapters, removed.runs),
        (1, vec!["both".to_string(), "one".into()])
    );

    for words in [
        "PICTURE-OF-rex",
        "xqzwrexwzqx",
        "5upervisor-of-rex",
        "5ample-rex",
        "supervise:rex",
    ] {
        assert_eq!(holding(dir.path(), words), Vec::<PathBuf>::new(), "{words}");
    }
    for number in 0..6 {
        let key = proxy("rex", number).key;
        assert_eq!(holding(dir.path(), &key), Vec::<PathBuf>::new());
    }
    let numbers: Vec<_> = (0..6).collect();
    let mia: Vec<ProxyRow> = numbers.iter().map(|number| proxy("mia", *number)).collect();
    assert_eq!(rows(store.proxies().await.unwrap()).await, mia);
    let mia: Vec<TokenRow> = numbers.iter().map(|number| token("mia", *number)).collect();
    assert_eq!(rows(store.tokens(DIGEST, 2).await.unwrap()).await, mia);
    let mia: Vec<EvaluationRow> = numbers
        .iter()
        .map(|number| sample("mia", *number))
        .collect();
    assert_eq!(
        rows(store.evaluations(DIGEST, 2, 2).await.unwrap()).await,
        mia
    );
    assert_eq!(rows(store.subjects().await.unwrap()).await, [photo("mia")]);
    assert_eq!(rows(store.metrics().await.unwrap()).await, [curve("mia")]);
    assert_eq!(rows(store.runs().await.unwrap()).await, runs[1..]);

    // Again, as after a kill: nothing is left to do. What is made anew afterwards is taken like any row.
    let again = store.remove_subject("rex").await.unwrap();
    assert_eq!(again.rows.iter().map(|(_, rows)| rows).sum::<usize>(), 0);
    fill(&store, "rex").await;
    assert_eq!(store.proxies().await.unwrap().count(), 12);
}

#[tokio::test]
async fn a_tag_that_keeps_rows_goes_with_them_and_a_branch_is_told_of() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).await.unwrap();
    fill(&store, "mia").await;
    let proxies = store.proxies().await.unwrap().path().to_path_buf();
    let open = async || {
        lance::Dataset::open(proxies.to_str().unwrap())
            .await
            .unwrap()
    };
    let mut dataset = open().await;
    dataset
        .tags()
        .create("before", dataset.version_id())
        .await
        .unwrap();
    fill(&store, "rex").await;
    dataset.checkout_latest().await.unwrap();
    let latest = dataset.version_id();
    dataset.tags().create("keeps", latest).await.unwrap();
    dataset.create_branch("mine", latest, None).await.unwrap();
    drop((store, dataset));

    let store = Store::open_alone(dir.path()).await.unwrap();
    let removed = store.remove_subject("rex").await.unwrap();
    assert_eq!(removed.tags, ["keeps of proxies"]);
    assert_eq!(removed.left.len(), 1, "{:?}", removed.left);
    assert!(
        removed.left[0].contains("the branch mine of"),
        "{:?}",
        removed.left
    );
    assert!(!holding(&proxies, "PICTURE-OF-rex").is_empty());
    let mut dataset = open().await;
    let tags = dataset.tags().list().await.unwrap();
    assert_eq!(tags.keys().collect::<Vec<_>>(), ["before"]);
    dataset.delete_branch("mine").await.unwrap();
    drop(dataset);
    let again = store.remove_subject("rex").await.unwrap();
    assert_eq!((again.tags.len(), again.left.len()), (0, 0));
    for words in ["PICTURE-OF-rex", "xqzwrexwzqx"] {
        assert_eq!(holding(dir.path(), words), Vec::<PathBuf>::new(), "{words}");
    }
    assert!(!holding(&proxies, "PICTURE-OF-mia").is_empty());
}
