//! What nearest-neighbour search promises: the nearest are found, with an index and without, whatever came after it, and
//! pictures and texts are embedded by the models of the store.

use std::path::Path;

use proxytune::store::query::{Neighbour, Search, Snapshot, Space};
use proxytune::store::{EvaluationRow, ProxyRow, Store};

use crate::support::filled;
use crate::support::filled::{EVALUATORS, SMALL, ask, asked, clip_of, dino_of, key, small_store};

fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// The nearest of `numbers` to `vector` by DINO, by comparing all.
fn nearest_of(numbers: impl Iterator<Item = u64>, vector: &[f32], limit: usize) -> Vec<String> {
    let mut all: Vec<(f32, u64)> = numbers
        .map(|number| (cosine(vector, &dino_of(SMALL, number)), number))
        .collect();
    all.sort_by(|a, b| b.0.total_cmp(&a.0));
    all.into_iter()
        .take(limit)
        .map(|(_, number)| key(number))
        .collect()
}

#[tokio::test]
async fn the_nearest_are_the_nearest_with_and_without_an_index() {
    const COUNT: u64 = 3000;
    let dir = small_store(COUNT).await;
    let snapshot = Snapshot::open(dir.path(), None).await.unwrap();
    let asked = dino_of(SMALL, 77);
    let keys = |near: Vec<Neighbour>| near.into_iter().map(|near| near.key).collect::<Vec<_>>();
    let exact = nearest_of(0..COUNT, &asked, 10);
    assert_eq!(exact[0], key(77));
    let found = snapshot
        .nearest(Space::Dino, &asked, 10, None, Search::Fast)
        .await
        .unwrap();
    assert!((found[0].similarity - 1.0).abs() < 1e-5, "{found:?}");
    assert_eq!(keys(found), exact);
    let filter = "subject = 'dog1' AND prompt LIKE '%place 2_'";
    let some = nearest_of(
        (0..COUNT).filter(|n| n % 4 == 1 && (20..30).contains(&(n % 50))),
        &asked,
        10,
    );
    let found = snapshot
        .nearest(Space::Dino, &asked, 10, Some(filter), Search::Fast)
        .await
        .unwrap();
    assert_eq!(keys(found), some);
    // Conditions that few satisfy, that all do, and that none does, with comments and nested queries in them.
    let by_number: [(&str, &dyn Fn(u64) -> bool); 6] = [
        ("number < 2", &|n| n / 4 < 2),
        ("true -- all", &|_| true),
        ("dino > 0.5 OR clip_t IS NULL", &|n| {
            (n % 61) as f32 / 61.0 > 0.5
        }),
        ("scored.class = 'dog' AND scored.number >= 0", &|_| true),
        (
            "key IN (SELECT key FROM scored WHERE clip_i > 0.985)",
            &|n| n % 100 == 99,
        ),
        ("subject = 'nobody'", &|_| false),
    ];
    for (filter, holds) in &by_number[..] {
        let found = snapshot
            .nearest(Space::Dino, &asked, 10, Some(filter), Search::Fast)
            .await
            .unwrap();
        let expected = nearest_of((0..COUNT).filter(|n| holds(*n)), &asked, 10);
        assert_eq!(keys(found), expected, "{filter}");
    }
    assert_eq!(snapshot.recall(Space::Dino).await.unwrap(), None);

    let report = snapshot.build_index(Space::Dino).await.unwrap();
    assert_eq!(report.rows as u64, COUNT);
    let (groups, probed) = report.groups.unwrap();
    assert!(probed < groups, "{report:?}");
    assert!(report.recall.unwrap().recall >= 0.95, "{report:?}");
    // The store goes on growing and is compacted: what is new is found, and what was is not lost.
    let store = Store::open(dir.path()).await.unwrap();
    filled::add(&store, SMALL, COUNT..COUNT + 40).await;
    let table = store
        .evaluations(EVALUATORS, SMALL.clip, SMALL.dino)
        .await
        .unwrap();
    table.compact(std::time::Duration::ZERO).await.unwrap();
    drop(snapshot);
    let snapshot = Snapshot::open(dir.path(), None).await.unwrap();
    for number in [77, COUNT + 39] {
        let asked = dino_of(SMALL, number);
        let found = keys(
            snapshot
                .nearest(Space::Dino, &asked, 10, None, Search::Fast)
                .await
                .unwrap(),
        );
        assert_eq!(found[0], key(number));
        let exact = keys(
            snapshot
                .nearest(Space::Dino, &asked, 10, None, Search::Exact)
                .await
                .unwrap(),
        );
        assert_eq!(exact, nearest_of(0..COUNT + 40, &asked, 10));
    }
    // More than the groups that the index compares can hold.
    for limit in [COUNT as usize - 10, usize::MAX] {
        let found = snapshot
            .nearest(Space::Dino, &asked, limit, None, Search::Fast)
            .await
            .unwrap();
        assert_eq!(found.len(), limit.min(COUNT as usize + 40));
    }
    let recall = snapshot.recall(Space::Dino).await.unwrap().unwrap();
    assert!(recall.recall >= 0.95, "{recall:?}");
    let wrong = snapshot
        .nearest(Space::Dino, &asked[1..], 10, None, Search::Fast)
        .await
        .unwrap_err();
    assert!(
        wrong.to_string().contains("23 numbers for a table with 24"),
        "{wrong}"
    );
    // With a subject its index goes, and what was noted of it.
    drop((snapshot, table, store));
    let store = Store::open_alone(dir.path()).await.unwrap();
    store.remove_subject("dog1").await.unwrap();
    drop(store);
    let snapshot = Snapshot::open(dir.path(), None).await.unwrap();
    assert!(!snapshot.indexed(Space::Dino).await.unwrap().0);
    assert_eq!(snapshot.recall(Space::Dino).await.unwrap(), None);
    let found = snapshot
        .nearest(Space::Dino, &asked, 10, None, Search::Fast)
        .await
        .unwrap();
    let left = (0..COUNT + 40).filter(|number| number % 4 != 1);
    assert_eq!(keys(found), nearest_of(left, &asked, 10));
}

#[tokio::test]
async fn likeness_by_key_and_by_text_says_what_it_needs() {
    let dir = small_store(5).await;
    let found = asked(
        dir.path(),
        &["--like", &key(3)[..10], "--limit", "2", "--format", "csv"],
    );
    assert_eq!(found.code, Some(0), "{found:?}");
    let lines: Vec<&str> = found.out.lines().collect();
    assert_eq!(lines.len(), 3, "{found:?}");
    assert!(lines[1].contains(&key(3)), "{found:?}");
    let joined = asked(
        dir.path(),
        &[
            "SELECT count(*) AS n FROM near JOIN tokens USING (key)",
            "--like",
            &key(3),
            "--format",
            "csv",
        ],
    );
    assert_eq!(joined.out, "n\n5\n", "{joined:?}");
    // No run here was evaluated with models that can be found.
    asked(dir.path(), &["--like", "a dog"]).says(
        1,
        &[
            "the models that made the embeddings",
            "nano-clip and nano-dino",
        ],
    );
    asked(dir.path(), &["--like", "a dog", "--by", "dino"])
        .says(1, &["DINO has no embeddings of texts"]);
    asked(dir.path(), &["--like", "missing.png"]).says(1, &["there is no picture missing.png"]);
    asked(dir.path(), &["SELECT 1", "--limit", "3"]).says(1, &["go with --like"]);
    asked(dir.path(), &[]).says(1, &["there is nothing to ask", "--tables"]);
}

#[tokio::test]
async fn a_picture_finds_itself_and_a_text_what_it_says_with_the_models_of_the_store() {
    use proxytune::evaluation::embed::{ImageEmbedder, TextEmbedder};
    use proxytune::evaluation::embedders::{ClipEmbedder, DinoEmbedder};
    let (clip, dino) = (
        Path::new("datasets/nano/checkpoints/clip"),
        Path::new("datasets/nano/checkpoints/dino"),
    );
    let digest = proxytune::plan::evaluators_key(clip, dino).unwrap();
    let device = candle_core::Device::Cpu;
    let (clip, dino) = (
        ClipEmbedder::load(clip, &device).unwrap(),
        DinoEmbedder::load(dino, &device).unwrap(),
    );
    let mut photos = Vec::new();
    for subject in ["dog1", "cat1", "teapot1", "vase1"] {
        let folder =
            proxytune::images::folder(&Path::new("datasets/nano/subjects").join(subject), Ok)
                .unwrap();
        photos.extend(folder.photos.into_iter().take(3));
    }
    let images: Vec<image::RgbImage> = photos.iter().map(|photo| photo.image.clone()).collect();
    let (clips, dinos) = (clip.images(&images).unwrap(), dino.images(&images).unwrap());
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).await.unwrap();
    let proxies: Vec<ProxyRow> = (0..images.len() as u64).map(filled::proxy).collect();
    store
        .proxies()
        .await
        .unwrap()
        .append(&proxies)
        .await
        .unwrap();
    let row = |n: usize| EvaluationRow {
        clip_embedding: Some(clips[n].clone()),
        dino_embedding: Some(dinos[n].clone()),
        ..filled::evaluation(SMALL, n as u64)
    };
    let rows: Vec<EvaluationRow> = (0..images.len()).map(row).collect();
    let table = store
        .evaluations(&digest, clips[0].len(), dinos[0].len())
        .await
        .unwrap();
    table.append(&rows).await.unwrap();

    for by in ["clip", "dino"] {
        let path = photos[4].path.to_str().unwrap();
        let said = asked(
            dir.path(),
            &[
                "--like", path, "--by", by, "--limit", "3", "--format", "csv",
            ],
        );
        let first = said
            .out
            .lines()
            .nth(1)
            .unwrap_or_else(|| panic!("{said:?}"));
        assert!(first.contains(&key(4)), "{by}: {said:?}");
        let similarity: f32 = first.split(',').next().unwrap().parse().unwrap();
        assert!(similarity > 0.999, "{by}: {similarity}");
    }
    let text = "a teapot".to_string();
    let embedding = clip.texts(std::slice::from_ref(&text)).unwrap().remove(0);
    let best = (0..images.len())
        .max_by(|a, b| cosine(&clips[*a], &embedding).total_cmp(&cosine(&clips[*b], &embedding)))
        .unwrap();
    let said = asked(
        dir.path(),
        &["--like", &text, "--limit", "1", "--format", "csv"],
    );
    assert!(said.out.contains(&key(best as u64)), "{said:?}");
}

/// Figures for the README: `cargo test --release nearest -- --ignored --nocapture`.
#[tokio::test]
#[ignore = "makes a store of 20,000 proxies, and its times mean something on an idle machine alone"]
async fn twenty_thousand_proxies_are_asked_in_time() {
    use std::time::Instant;
    const COUNT: u64 = 20_000;
    let widths = filled::Widths {
        clip: 512,
        dino: 384,
    };
    let dir = tempfile::tempdir().unwrap();
    filled::store(dir.path(), widths, COUNT).await;
    let median = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let timed = |begun: Instant| begun.elapsed().as_secs_f64() * 1e3;
    let queries = [
        "SELECT count(*) FROM proxies",
        "SELECT subject, count(*), avg(dino), avg(clip_t) FROM scored GROUP BY subject",
        "SELECT prompt, avg(clip_t) AS t FROM scored GROUP BY prompt ORDER BY t DESC LIMIT 10",
        "SELECT key, subject, prompt, dino FROM scored ORDER BY dino DESC, clip_t DESC LIMIT 20",
        "SELECT prompt, seed, settings FROM proxies WHERE starts_with(key, 'ab12')",
        "SELECT number, image FROM proxies WHERE subject = 'dog1' AND number < 20",
    ];
    for sql in queries {
        let (mut inner, mut process) = (Vec::new(), Vec::new());
        for _ in 0..9 {
            let begun = Instant::now();
            ask(dir.path(), sql).await;
            inner.push(timed(begun));
            let begun = Instant::now();
            assert_eq!(asked(dir.path(), &[sql]).code, Some(0));
            process.push(timed(begun));
        }
        let (inner, process) = (median(inner), median(process));
        println!("{inner:6.1} ms, whole process {process:6.1} ms: {sql}");
        assert!(
            inner < 100.0 && process < 150.0,
            "{sql}: {inner} and {process} ms"
        );
    }
    let snapshot = Snapshot::open(dir.path(), None).await.unwrap();
    for space in [Space::Clip, Space::Dino] {
        let report = snapshot.build_index(space).await.unwrap();
        println!("{report:?}");
        let recall = report.recall.unwrap();
        assert!(recall.recall >= 0.95, "{recall:?}");
        assert!(recall.fast.as_secs_f64() < 0.05, "{recall:?}");
    }
    let filter = "subject = 'dog1' AND clip_t > 0.5";
    for (what, filter, search) in [
        ("index", None, Search::Fast),
        ("exact", None, Search::Exact),
        ("with a condition", Some(filter), Search::Exact),
    ] {
        let mut times = Vec::new();
        for number in 0..9 {
            let snapshot = Snapshot::open(dir.path(), None).await.unwrap();
            let asked = clip_of(widths, number * 1000);
            let begun = Instant::now();
            let near = snapshot
                .nearest(Space::Clip, &asked, 10, filter, search)
                .await
                .unwrap();
            times.push(timed(begun));
            assert_eq!(near.len(), 10);
        }
        println!(
            "{:6.1} ms: the 10 nearest of 20,000 by 512 numbers, {what}, opening included",
            median(times)
        );
    }
    let mut process = Vec::new();
    for number in 0..9 {
        let begun = Instant::now();
        let said = asked(dir.path(), &["--like", &key(number), "--by", "clip"]);
        process.push(timed(begun));
        assert_eq!(said.code, Some(0), "{said:?}");
    }
    println!(
        "{:6.1} ms: query --like KEY, whole process",
        median(process)
    );
}

#[tokio::test]
async fn a_key_is_taken_as_tables_print_it_and_by_its_first_digits() {
    let dir = small_store(400).await;
    let like = |typed: &str| {
        asked(
            dir.path(),
            &["--like", typed, "--limit", "1", "--format", "csv"],
        )
    };
    let is_unique = |digits: &str| (0..400).filter(|n| key(*n).starts_with(digits)).count() == 1;
    let has_number = |digits: &str| digits.bytes().any(|b| b.is_ascii_digit());
    let number = (0..400)
        .find(|n| is_unique(&key(*n)[..4]) && has_number(&key(*n)[..4]))
        .unwrap();
    let key_of = key(number);
    let (few, upper) = (key_of[..4].to_string(), key_of[..9].to_uppercase());
    for typed in [
        format!("{}…", &key_of[..12]),
        format!("{}...", &key_of[..8]),
        format!("{few}…"),
        few,
        upper,
        format!(" {} ", &key_of[..7]),
    ] {
        let said = like(&typed);
        said.says(0, &[]);
        assert!(said.out.contains(&key_of), "{typed}: {}", said.out);
    }
    let shared = (0..400)
        .map(|n| key(n)[..4].to_string())
        .find(|digits| has_number(digits) && !is_unique(digits));
    if let Some(digits) = shared {
        like(&digits).says(1, &["more than one key begins with", "give more digits"]);
    }
    let unknown = (0..u16::MAX)
        .map(|n| format!("{n:04x}"))
        .find(|digits| has_number(digits) && (0..400).all(|n| !key(n).starts_with(digits)))
        .unwrap();
    like(&unknown).says(1, &["has a key that begins with", &unknown]);
    like("ab…").says(1, &["too little of a key"]);
}
