//! What the store promises: rows come back as they went in, once each, whoever else writes and whenever it is killed.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lance::dataset::{InsertBuilder, WriteMode, WriteParams};
use proxytune::Error;
use proxytune::store::{
    Columns, EvaluationRow, Limits, Method, MetricRow, MetricStage, PictureKind, ProxyRow, Row,
    RunRow, RunStatus, SCHEMA_VERSION, Store, SubjectRow, Table, TokenRow, Writer,
};
use rand::seq::SliceRandom;
use rand::{RngCore, SeedableRng};

const DIGEST: &str = "0123456789abcdef";

fn proxy(number: u64) -> ProxyRow {
    let mut image = vec![0; 1500];
    rand_chacha::ChaCha8Rng::seed_from_u64(number).fill_bytes(&mut image);
    ProxyRow {
        key: blake3::hash(&number.to_le_bytes()).to_hex().to_string(),
        supervisor: "5up".into(),
        run: "run-1".into(),
        subject: format!("dog{}", number % 3),
        class: "dog".into(),
        token: "sks".into(),
        number,
        prompt: "a photo of sks dog on the beach".into(),
        seed: u64::MAX - number,
        settings: r#"{"guidance_scale":7.5}"#.into(),
        width: 32,
        height: 32,
        content: blake3::hash(&image).to_hex().to_string(),
        image,
        created_us: 1_700_000_000_000_000 + number as i64,
    }
}

fn proxies(numbers: std::ops::Range<u64>) -> Vec<ProxyRow> {
    numbers.map(proxy).collect()
}

fn numbers(rows: &[ProxyRow]) -> Vec<u64> {
    rows.iter().map(|row| row.number).collect()
}

fn token(number: u64, n: usize) -> TokenRow {
    let proxy = proxy(number);
    TokenRow {
        key: proxy.key,
        content: proxy.content,
        grid_height: 8,
        grid_width: 8,
        tokens: (0..n as u32)
            .map(|i| (i * 97 + number as u32) % 16384)
            .collect(),
        run: "run-1".into(),
        created_us: 7,
    }
}

fn metric(step: u64) -> MetricRow {
    MetricRow {
        run: "run-1".into(),
        stage: MetricStage::Supervise("dog1".into()),
        step,
        name: "loss".into(),
        value: 1.0 / (step + 1) as f64,
        created_us: 3,
    }
}

async fn proxies_of(dir: &Path) -> Table<ProxyRow> {
    Store::open(dir).await.unwrap().proxies().await.unwrap()
}

async fn all<R: Row>(table: &Table<R>) -> Vec<R> {
    table.rows(None, Columns::All).await.unwrap()
}

async fn comes_back<R: Row + PartialEq + std::fmt::Debug>(table: Table<R>, rows: &[R]) {
    assert_eq!(table.append(rows).await.unwrap(), rows.len());
    assert_eq!(table.append(rows).await.unwrap(), 0, "nothing is twice");
    assert_eq!(all(&table).await, rows);
    let keys: Vec<String> = rows.iter().map(R::key).collect();
    assert_eq!(table.keys().await.unwrap(), keys);
    let got = table.get(&keys, Columns::All).await.unwrap();
    assert_eq!(got.into_iter().flatten().collect::<Vec<_>>(), rows);
    let schema = table.schema();
    let described =
        |f: &arrow::datatypes::Field| !f.metadata()[proxytune::store::DESCRIPTION].is_empty();
    assert!(schema.fields().iter().all(|f| described(f)));
}

#[tokio::test]
async fn every_kind_of_row_comes_back_as_it_went_in() {
    let dir = tempfile::tempdir().unwrap();
    // A directory whose name means something in a URL.
    for place in [dir.path().join("a %23 #é?"), "memory://".into()] {
        rows_come_back(Store::open(place).await.unwrap()).await;
    }
}

#[tokio::test]
async fn a_store_in_memory_is_its_own_and_leaves_nothing() {
    let (one, other) = (
        Store::open("memory://").await,
        Store::open("memory://").await,
    );
    let (one, other) = (one.unwrap(), other.unwrap());
    let rows = proxies(0..3);
    one.proxies()
        .await
        .unwrap()
        .append(&rows[..2])
        .await
        .unwrap();
    one.proxies()
        .await
        .unwrap()
        .append(&rows[2..])
        .await
        .unwrap();
    assert_eq!(all(&one.proxies().await.unwrap()).await, rows);
    assert_eq!(other.proxies().await.unwrap().count(), 0);
    let claim = one.locks().try_claim("a").unwrap();
    assert!(claim.is_some() && one.locks().try_claim("a").unwrap().is_none());
    let folder = one.path().to_path_buf();
    assert!(folder.is_dir() && folder != other.path());
    drop((claim, one));
    assert!(!folder.exists());
    let refused = Store::open("memory://a").await.err().unwrap();
    assert!(refused.to_string().contains("is a URL"), "{refused}");
}

async fn rows_come_back(store: Store) {
    let subject = |index| SubjectRow {
        key: format!("{index:064}"),
        subject: "dog6".into(),
        class: "dog".into(),
        token: "sks".into(),
        index,
        file_name: "00.jpg".into(),
        width: 4000,
        height: 3000,
        image: vec![255, 216, index as u8],
        created_us: 1,
    };
    comes_back(store.subjects().await.unwrap(), &[subject(0), subject(1)]).await;
    comes_back(store.proxies().await.unwrap(), &proxies(0..3)).await;
    let tokens = store.tokens(DIGEST, 64).await.unwrap();
    comes_back(tokens, &[token(0, 64), token(1, 64)]).await;
    let scored = EvaluationRow {
        key: "a".into(),
        kind: PictureKind::Sample,
        run: "run-1".into(),
        method: Some(Method::Student),
        step: 1250,
        subject: "dog6".into(),
        prompt: "a dog".into(),
        seed: 9,
        clip_i: Some(0.75),
        clip_t: Some(-0.25),
        dino: Some(0.5),
        clip_embedding: Some(vec![0.5; 16]),
        dino_embedding: Some(vec![0.25; 8]),
        image: Some(vec![1, 2, 3]),
        created_us: 2,
        adapter: Some("d".repeat(64)),
    };
    let unscored = EvaluationRow {
        key: "b".into(),
        clip_i: None,
        clip_t: None,
        dino: None,
        clip_embedding: None,
        dino_embedding: None,
        image: None,
        adapter: None,
        ..scored.clone()
    };
    let evaluations = store.evaluations(DIGEST, 16, 8).await.unwrap();
    comes_back(evaluations, &[scored, unscored]).await;
    let metrics = [metric(0), metric(1), metric(10)];
    comes_back(store.metrics().await.unwrap(), &metrics).await;
    let run = |status, event_us| RunRow {
        run: "run-1".into(),
        pipeline: "seed = 7".into(),
        resolved: "seed = 7\nsteps = 5".into(),
        plan_digest: "d1".into(),
        versions: "{}".into(),
        status,
        event_us,
    };
    let runs = [run(RunStatus::Started, 5), run(RunStatus::Complete, 9)];
    comes_back(store.runs().await.unwrap(), &runs).await;
    assert_eq!(
        store.latest_runs().await.unwrap()["run-1"].status,
        RunStatus::Complete
    );
    let names = [
        "evaluations_0123456789ab",
        "metrics",
        "proxies",
        "runs",
        "subjects",
        "tokens_0123456789ab",
    ];
    assert_eq!(store.table_names().await.unwrap(), names);
}

#[tokio::test]
async fn a_reopened_store_gives_rows_in_the_order_of_their_commits() {
    let dir = tempfile::tempdir().unwrap();
    let table = proxies_of(dir.path()).await;
    assert_eq!(all(&table).await, []);
    assert_eq!(
        table.get(&["none".into()], Columns::All).await.unwrap(),
        [None]
    );
    for number in [4, 2, 9] {
        table.append(&[proxy(number)]).await.unwrap();
    }
    let again = proxies_of(dir.path()).await;
    assert_eq!(numbers(&all(&again).await), [4, 2, 9]);
    let filter = Some("number > 3 AND subject = 'dog1'");
    let some = again.rows(filter, Columns::WithoutPictures).await.unwrap();
    assert_eq!(numbers(&some), [4]);
    assert!(some[0].image.is_empty());
    let wrong = again.rows(Some("no_such_column = 1"), Columns::All).await;
    let wrong = wrong.unwrap_err().to_string();
    assert!(wrong.contains("no_such_column"), "{wrong}");
}

/// Commits rows as another process would that has not seen the latest version: past the check for known keys.
async fn append_blindly(table: &Table<ProxyRow>, rows: &[ProxyRow]) {
    let rows: Vec<_> = rows.iter().collect();
    let batch = ProxyRow::to_batch(&rows, &table.schema()).unwrap();
    let params = WriteParams {
        mode: WriteMode::Append,
        ..WriteParams::default()
    };
    let insert = InsertBuilder::new(table.path().to_str().unwrap()).with_params(&params);
    insert.execute(vec![batch]).await.unwrap();
}

#[tokio::test]
async fn the_first_row_of_a_key_wins_everywhere() {
    let dir = tempfile::tempdir().unwrap();
    let table = proxies_of(dir.path()).await;
    table.append(&proxies(0..5)).await.unwrap();
    let other = ProxyRow {
        prompt: "another".into(),
        ..proxy(3)
    };
    append_blindly(&table, &[other, proxy(5), proxy(5)]).await;
    table.refresh().await.unwrap();
    for table in [table, proxies_of(dir.path()).await] {
        assert_eq!(table.count(), 6);
        assert_eq!(all(&table).await, proxies(0..6));
        let another = table.rows(Some("prompt = 'another'"), Columns::All).await;
        assert_eq!(another.unwrap(), []);
        assert_eq!(table.keys().await.unwrap().len(), 6);
        let got = table.get(&[proxy(3).key], Columns::All).await.unwrap();
        assert_eq!(got, [Some(proxy(3))]);
    }
}

#[tokio::test]
async fn equal_rows_have_equal_digests_whatever_their_order_run_and_time() {
    let dir = tempfile::tempdir().unwrap();
    let mut digests = Vec::new();
    for (name, order) in [("a", [1, 2, 3]), ("b", [3, 1, 2]), ("c", [3, 1, 4])] {
        let table = proxies_of(&dir.path().join(name)).await;
        for number in order {
            let row = ProxyRow {
                run: name.into(),
                created_us: order[0] as i64,
                ..proxy(number)
            };
            table.append(&[row]).await.unwrap();
        }
        digests.push(table.digest().await.unwrap());
    }
    assert_eq!(digests[0], digests[1]);
    assert_ne!(digests[0], digests[2]);
}

#[tokio::test]
async fn two_thousand_proxies_are_read_at_random_in_milliseconds() {
    let dir = tempfile::tempdir().unwrap();
    let table = proxies_of(dir.path()).await;
    let rows = proxies(0..2000);
    let start = Instant::now();
    for rows in rows.chunks(64) {
        table.append(rows).await.unwrap();
    }
    eprintln!("2,000 proxies in commits of 64: {:?}", start.elapsed());
    assert_eq!(
        table.dataset().unwrap().count_fragments(),
        2000_usize.div_ceil(64)
    );
    let mut shuffled: Vec<usize> = (0..2000).collect();
    shuffled.shuffle(&mut rand_chacha::ChaCha8Rng::seed_from_u64(1));
    for compacted in [false, true] {
        if compacted {
            let start = Instant::now();
            let done = table.compact(Duration::ZERO).await.unwrap();
            eprintln!("compaction: {:?}, {done:?}", start.elapsed());
            assert_eq!(done.fragments_after, 1);
        }
        let start = Instant::now();
        let fresh = proxies_of(dir.path()).await;
        eprintln!("opening: {:?}", start.elapsed());
        let mut times = Vec::new();
        for picked in shuffled.chunks(32).take(10) {
            let keys: Vec<String> = picked.iter().map(|i| rows[*i].key.clone()).collect();
            let start = Instant::now();
            let got = fresh.get(&keys, Columns::All).await.unwrap();
            times.push(start.elapsed());
            let expected: Vec<_> = picked.iter().map(|i| Some(rows[*i].clone())).collect();
            assert_eq!(got, expected, "random rows equal the rows of the scan");
        }
        eprintln!("32 random rows: {times:?}");
        times.sort();
        // Half of them, since other work may share this machine.
        assert!(times[5] < Duration::from_millis(50), "{times:?}");
        let start = Instant::now();
        assert_eq!(all(&fresh).await, rows);
        eprintln!("scan: {:?}", start.elapsed());
    }
}

#[tokio::test]
async fn compaction_keeps_rows_order_and_keys_while_others_read_and_write() {
    let dir = tempfile::tempdir().unwrap();
    let table = proxies_of(dir.path()).await;
    let reader = proxies_of(dir.path()).await;
    for number in 0..40 {
        table.append(&[proxy(number)]).await.unwrap();
    }
    reader.refresh().await.unwrap();
    let other = proxies_of(dir.path()).await;
    let late = proxies(40..44);
    let (compacted, appended) = tokio::join!(table.compact(Duration::ZERO), async {
        for row in &late {
            other.append(std::slice::from_ref(row)).await?;
        }
        Ok::<_, Error>(())
    });
    appended.unwrap();
    let compacted = compacted.unwrap();
    assert_eq!(compacted.fragments_before, 40);
    assert!(compacted.fragments_after < 6, "{compacted:?}");
    let another = ProxyRow {
        prompt: "another".into(),
        ..proxy(0)
    };
    append_blindly(&table, &[another]).await;
    // The reader knows a version that is no longer on disk.
    let keys: Vec<String> = proxies(0..44).iter().map(Row::key).collect();
    let got = reader.get(&keys[..40], Columns::All).await.unwrap();
    assert_eq!(
        got.into_iter().flatten().collect::<Vec<_>>(),
        proxies(0..40)
    );
    table.refresh().await.unwrap();
    for table in [table, proxies_of(dir.path()).await] {
        assert_eq!(all(&table).await, proxies(0..44));
        assert_eq!(table.keys().await.unwrap(), keys);
    }
}

#[tokio::test]
async fn rows_keep_their_order_around_fragments_too_large_to_compact() {
    let dir = tempfile::tempdir().unwrap();
    let table = proxies_of(dir.path()).await;
    for number in 0..60 {
        let large = vec![number as u8; 17 << 20];
        let row = ProxyRow {
            image: if number % 15 == 10 { large } else { vec![1] },
            ..proxy(number)
        };
        table.append(&[row]).await.unwrap();
    }
    let compacted = table.compact(Duration::ZERO).await.unwrap();
    let runs = "four large ones and five runs of small ones";
    assert_eq!(compacted.fragments_after, 9, "{runs}");
    let expected: Vec<u64> = (0..60).collect();
    for table in [table, proxies_of(dir.path()).await] {
        let rows = table.rows(None, Columns::WithoutPictures).await.unwrap();
        assert_eq!(numbers(&rows), expected);
        let rows = all(&table).await;
        let own = |row: &ProxyRow| row.image.len() == 1 || row.image[0] as u64 == row.number;
        assert!(rows.iter().all(own));
        assert_eq!(numbers(&rows), expected);
    }
}

#[tokio::test]
async fn many_small_commits_are_compacted_in_passing() {
    let dir = tempfile::tempdir().unwrap();
    let table = proxies_of(dir.path()).await;
    let limits = Limits {
        rows: 1,
        age: Duration::from_secs(3600),
    };
    let writer = Writer::with_limits(table.clone(), limits);
    for row in proxies(0..150) {
        writer.push(row).await.unwrap();
    }
    assert!(table.dataset().unwrap().count_fragments() < 64);
    assert_eq!(all(&table).await, proxies(0..150));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_stores_append_at_once_and_nothing_is_lost_or_doubled() {
    let dir = tempfile::tempdir().unwrap();
    let write = |start: u64| {
        let path = dir.path().to_path_buf();
        tokio::spawn(async move {
            let table = proxies_of(&path).await;
            for number in 0..15 {
                // Both write the last rows.
                let number = if number < 12 {
                    start + number
                } else {
                    1000 + number
                };
                table.append(&[proxy(number)]).await.unwrap();
            }
        })
    };
    let (a, b) = (write(0), write(100));
    a.await.unwrap();
    b.await.unwrap();
    let table = proxies_of(dir.path()).await;
    let mut found = numbers(&all(&table).await);
    found.sort();
    let expected: Vec<u64> = (0..12).chain(100..112).chain(1012..1015).collect();
    assert_eq!(found, expected);
    let rows = table.dataset().unwrap().count_rows(None).await.unwrap();
    assert_eq!(rows, expected.len(), "as other readers of Lance see it");
}

#[tokio::test]
async fn what_others_compact_and_delete_is_taken_up() {
    let dir = tempfile::tempdir().unwrap();
    let (table, other) = (proxies_of(dir.path()).await, proxies_of(dir.path()).await);
    for number in 0..40 {
        table.append(&[proxy(number)]).await.unwrap();
    }
    let another = ProxyRow {
        prompt: "another".into(),
        ..proxy(3)
    };
    append_blindly(&table, std::slice::from_ref(&another)).await;
    table.refresh().await.unwrap();
    other.compact(Duration::ZERO).await.unwrap();
    other.append(&proxies(40..42)).await.unwrap();
    table.refresh().await.unwrap();
    assert_eq!(table.dataset().unwrap().count_fragments(), 2);
    assert_eq!(
        all(&table).await,
        proxies(0..42),
        "compacted and appended to"
    );

    let delete = async |filter: &str| {
        let uri = table.path().to_str().unwrap();
        let mut dataset = lance::Dataset::open(uri).await.unwrap();
        dataset.delete(filter).await.unwrap();
        table.refresh().await.unwrap();
    };
    delete("number = 3 AND prompt <> 'another'").await;
    assert_eq!(table.count(), 42);
    let got = table.get(&[proxy(3).key], Columns::All).await.unwrap();
    assert_eq!(
        got,
        [Some(another)],
        "the next row of the key is the first now"
    );
    delete("number < 5").await;
    assert_eq!(table.count(), 37);
    assert_eq!(all(&table).await, proxies(5..42));
    assert_eq!(table.append(&proxies(0..6)).await.unwrap(), 5);
    let fresh = proxies_of(dir.path()).await;
    assert_eq!(all(&table).await, all(&fresh).await);
    assert_eq!(fresh.count(), 42);
}

#[tokio::test]
async fn compaction_leaves_the_version_that_was_the_latest_until_just_now() {
    let dir = tempfile::tempdir().unwrap();
    let (table, reader) = (proxies_of(dir.path()).await, proxies_of(dir.path()).await);
    for number in 0..40 {
        table.append(&[proxy(number)]).await.unwrap();
    }
    reader.refresh().await.unwrap();
    let known = reader.dataset().unwrap();
    let keep = Duration::from_millis(500);
    tokio::time::sleep(2 * keep).await;
    table.append(&[proxy(40)]).await.unwrap();
    table.compact(keep).await.unwrap();
    let uri = table.path().to_str().unwrap();
    let version = known.version().version;
    let is_there = async |version: u64| {
        let latest = lance::Dataset::open(uri).await.unwrap();
        latest.checkout_version(version).await.is_ok()
    };
    assert!(is_there(version).await && !is_there(version - 1).await);
    assert_eq!(known.count_rows(None).await.unwrap(), 40);
    // It was out of date for long enough now.
    tokio::time::sleep(2 * keep).await;
    table.compact(keep).await.unwrap();
    assert!(!is_there(version).await);
}

/// Not a test of its own: what the next one kills.
#[tokio::test]
#[ignore = "runs in a child process"]
async fn appends_until_killed() {
    let Ok(dir) = std::env::var("STORE_TO_FILL") else {
        return;
    };
    let table = proxies_of(Path::new(&dir)).await;
    let start = table.count() as u64;
    for number in start..start + 100_000 {
        table.append(&[proxy(number)]).await.unwrap();
    }
}

#[tokio::test]
async fn a_writer_killed_at_any_moment_leaves_a_whole_table() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("proxies.lance");
    let mut seen = 0;
    for life in 0..8_usize {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "store::appends_until_killed", "--ignored"])
            .env("STORE_TO_FILL", dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        // The first lives end before or while the table is made, the others between or within commits.
        while life > 0 && !path.exists() {
            tokio::task::yield_now().await;
        }
        let watched = proxies_of(dir.path()).await;
        while watched.count() < seen + life.saturating_sub(2) {
            watched.refresh().await.unwrap();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let table = proxies_of(dir.path()).await;
        assert!(table.count() >= seen);
        seen = table.count();
        assert_eq!(all(&table).await, proxies(0..seen as u64));
    }
    assert!(seen >= 15, "{seen}");
}

fn files(dir: &Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    entries
        .flat_map(|p| if p.is_dir() { files(&p) } else { vec![p] })
        .collect()
}

#[tokio::test]
async fn a_directory_without_a_committed_version_counts_as_absent() {
    let dir = tempfile::tempdir().unwrap();
    let table = proxies_of(dir.path()).await;
    table.append(&proxies(0..3)).await.unwrap();
    for file in files(&table.path().join("_versions")) {
        // As a writer leaves it that is killed before it puts the manifest in place.
        let staged = format!("{}#1", file.display());
        std::fs::rename(file, staged).unwrap();
    }
    let table = proxies_of(dir.path()).await;
    assert_eq!(table.count(), 0);
    table.append(&proxies(3..5)).await.unwrap();
    assert_eq!(all(&proxies_of(dir.path()).await).await, proxies(3..5));
}

#[tokio::test]
async fn a_newer_schema_version_and_none_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("proxies.lance");
    let newer = (SCHEMA_VERSION + 1).to_string();
    let named = format!("schema version {newer}");
    for (version, found) in [
        (Some(newer.as_str()), named.as_str()),
        (None, "no schema version"),
    ] {
        let ours = ProxyRow::schema();
        let keys = ours.metadata().keys().cloned();
        let metadata = keys
            .filter_map(|key| Some((key, version?.to_string())))
            .collect();
        let schema = Arc::new(ours.as_ref().clone().with_metadata(metadata));
        let batch = ProxyRow::to_batch(&[&proxy(0)], &schema).unwrap();
        let params = WriteParams {
            mode: WriteMode::Overwrite,
            ..WriteParams::default()
        };
        let insert = InsertBuilder::new(path.to_str().unwrap()).with_params(&params);
        insert.execute(vec![batch]).await.unwrap();
        let opened = Store::open(dir.path()).await.unwrap().proxies().await;
        let error = opened.map(|_| ()).unwrap_err();
        assert!(error.to_string().contains(found), "{error}");
        let ours = format!("reads versions up to {SCHEMA_VERSION}");
        assert!(error.to_string().contains(&ours), "{error}");
        assert!(error.hint().unwrap().contains("--store"));
        std::fs::remove_dir_all(&path).unwrap();
    }
}

#[tokio::test]
async fn a_table_of_other_lengths_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).await.unwrap();
    let table = store.tokens(DIGEST, 64).await.unwrap();
    table.append(&[token(0, 64)]).await.unwrap();
    let error = store.tokens(DIGEST, 256).await.map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("column tokens"), "{error}");
    let error = table.append(&[token(1, 65)]).await.unwrap_err().to_string();
    assert!(
        error.contains("64 values per row, but a row has 65"),
        "{error}"
    );
}

#[tokio::test]
async fn a_url_is_refused_with_a_hint() {
    let error = Store::open("s3://bucket/store")
        .await
        .map(|_| ())
        .unwrap_err();
    assert!(error.to_string().contains("local directory"), "{error}");
    assert!(error.hint().is_some());
}

#[cfg(unix)]
#[tokio::test]
async fn a_read_only_directory_has_a_hint() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let table = proxies_of(dir.path()).await;
    table.append(&[proxy(0)]).await.unwrap();
    let set = |mode| {
        for name in ["data", "_versions", "_transactions", ""] {
            let permissions = std::fs::Permissions::from_mode(mode);
            let _ = std::fs::set_permissions(table.path().join(name), permissions);
        }
    };
    set(0o555);
    let root = std::fs::write(table.path().join("probe"), "").is_ok();
    let appended = table.append(&[proxy(1)]).await;
    set(0o755);
    if !root {
        let error = appended.unwrap_err();
        let Error::Io { source, .. } = &error else {
            panic!("{error:?}");
        };
        assert_eq!(source.kind(), std::io::ErrorKind::PermissionDenied);
        assert!(error.hint().unwrap().contains("writable"), "{error}");
        assert_eq!(numbers(&all(&table).await), [0]);
    }
}

#[tokio::test]
async fn a_writer_commits_at_its_limits_and_on_demand() {
    let dir = tempfile::tempdir().unwrap();
    let table = proxies_of(dir.path()).await;
    table.append(&[proxy(0)]).await.unwrap();
    let limits = Limits {
        rows: 4,
        age: Duration::from_secs(3600),
    };
    let writer = Writer::with_limits(table.clone(), limits);
    for number in [0, 1, 1, 2, 3] {
        writer.push(proxy(number)).await.unwrap();
    }
    assert_eq!(table.count(), 1, "three new rows wait");
    writer.push(proxy(4)).await.unwrap();
    assert_eq!(table.count(), 5, "the fourth commits them");
    writer.push(proxy(5)).await.unwrap();
    writer.flush().await.unwrap();
    assert_eq!(table.count(), 6);

    // A row does not make the others wait longer than their time.
    let limits = Limits {
        rows: 64,
        age: Duration::from_millis(1),
    };
    let writer = Writer::with_limits(table.clone(), limits);
    writer.push(proxy(6)).await.unwrap();
    tokio::time::sleep(2 * limits.age).await;
    writer.push(proxy(7)).await.unwrap();
    assert_eq!(table.count(), 8);
}

#[tokio::test]
async fn a_failed_commit_leaves_the_buffer_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let table = proxies_of(dir.path()).await;
    // A file where the table's directory would go.
    std::fs::write(dir.path().join("proxies.lance"), "").unwrap();
    let limits = Limits {
        rows: 2,
        age: Duration::from_secs(3600),
    };
    let writer = Writer::with_limits(table.clone(), limits);
    writer.push(proxy(0)).await.unwrap();
    writer.push(proxy(1)).await.unwrap_err();
    writer.flush().await.unwrap_err();
    assert!(!writer.push(proxy(1)).await.unwrap(), "it is in the buffer");
    std::fs::remove_file(dir.path().join("proxies.lance")).unwrap();
    writer.flush().await.unwrap();
    assert_eq!(all(&table).await, proxies(0..2));
}
