//! What questions to a store promise: every table and view answers, nothing is changed, what is hidden and shown, that
//! the nearest are the nearest, and that older tables are understood.

#[path = "support/filled.rs"]
mod filled;
mod support;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{AsArray, LargeBinaryArray, RecordBatch};
use arrow::datatypes::{Float32Type, Int64Type};
use filled::{EVALUATORS, SMALL, clip_of, dino_of, key};
use lance::dataset::{InsertBuilder, WriteMode, WriteParams};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use proxytune::store::query::{Format, Search, Snapshot, Space, write};
use proxytune::store::{Columns, EvaluationRow, ProxyRow, Row, SCHEMA_VERSION, Store, query};
use support::{Said, program, say};
use tempfile::TempDir;

async fn small_store(count: u64) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    filled::store(dir.path(), SMALL, count).await;
    dir
}

async fn ask(dir: &Path, sql: &str) -> RecordBatch {
    let snapshot = Snapshot::open(dir, None).await.unwrap();
    let answer = snapshot.sql(sql).await.unwrap();
    let schema = answer.schema.clone();
    arrow::compute::concat_batches(&schema, &answer.all().await.unwrap()).unwrap()
}

async fn count(dir: &Path, sql: &str) -> i64 {
    let batch = ask(dir, sql).await;
    assert_eq!(batch.num_rows(), 1, "{sql}");
    batch.column(0).as_primitive::<Int64Type>().value(0)
}

async fn written(dir: &Path, sql: &str, format: Format) -> Vec<u8> {
    let snapshot = Snapshot::open(dir, None).await.unwrap();
    let mut bytes = Vec::new();
    write(snapshot.sql(sql).await.unwrap(), format, &mut bytes)
        .await
        .unwrap();
    bytes
}

fn asked(dir: &Path, arguments: &[&str]) -> Said {
    let mut command = program();
    command.arg("query").args(arguments).arg("--store").arg(dir);
    say(command)
}

#[tokio::test]
async fn every_table_and_view_answers_and_explains_its_columns() {
    let dir = small_store(8).await;
    let snapshot = Snapshot::open(dir.path(), None).await.unwrap();
    let tables = snapshot.tables().await.unwrap();
    let names: Vec<&str> = tables.iter().map(|table| table.name.as_str()).collect();
    let expected = [
        "evaluations_e0e0e0e0e0e0",
        "metrics",
        "proxies",
        "runs",
        "tokens_707070707070",
        "evaluations",
        "latest_runs",
        "scored",
        "scores",
        "settings",
        "tokens",
    ];
    assert_eq!(names, expected);
    for table in &tables {
        assert!(!table.columns.is_empty(), "{}", table.name);
        for column in &table.columns {
            let (table, column, text) = (&table.name, &column.name, &column.description);
            assert!(!text.is_empty(), "{table}.{column} is not explained");
        }
        let batch = ask(dir.path(), &format!("SELECT * FROM {}", table.name)).await;
        assert!(batch.num_rows() > 0, "{}", table.name);
    }
    let proxies = tables.iter().find(|table| table.name == "proxies").unwrap();
    let (rows, bytes) = proxies.size.unwrap();
    assert_eq!(rows, 8);
    assert!(bytes > 8 * 300, "{bytes}");
    let text = query::tables_text(&tables);
    assert!(text.contains("proxies  (8 rows"), "{text}");
    assert!(text.contains("microseconds since 1970"), "{text}");
}

#[tokio::test]
async fn runs_that_differ_in_one_setting_are_found() {
    let dir = small_store(1).await;
    let sql = "SELECT a.setting, a.value, b.value FROM settings a JOIN settings b ON a.setting = b.setting \
               AND a.run < b.run WHERE a.value <> b.value";
    let text = String::from_utf8(written(dir.path(), sql, Format::Csv).await).unwrap();
    assert_eq!(text, "setting,value,value\nstudent.steps,200,100\n");
    let sql = "SELECT step / 50 * 50 AS from_step, count(*) AS n FROM metrics WHERE step - 60 > 0 GROUP BY 1 ORDER BY 1";
    let text = String::from_utf8(written(dir.path(), sql, Format::Csv).await).unwrap();
    assert_eq!(text, "from_step,n\n50,39\n100,50\n150,50\n");
    let sql = "SELECT status FROM latest_runs ORDER BY run";
    let text = String::from_utf8(written(dir.path(), sql, Format::Csv).await).unwrap();
    assert_eq!(text, "status\nfinished\ninterrupted\n");
    let sql = "SELECT DISTINCT json_text(settings, 'guidance_scale') AS g FROM proxies";
    let text = String::from_utf8(written(dir.path(), sql, Format::Csv).await).unwrap();
    assert_eq!(text, "g\n2.0\n");
}

#[tokio::test]
async fn pictures_and_vectors_are_shown_as_sizes_and_kept_in_parquet() {
    let dir = small_store(3).await;
    let sql = "SELECT p.number, p.image, e.clip_embedding, e.image AS none FROM proxies p \
               JOIN evaluations e ON p.key = e.key WHERE p.subject = 'dog2'";
    let size = filled::proxy(2).image.len();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    assert_eq!(
        text(written(dir.path(), sql, Format::Csv).await),
        format!("number,image,clip_embedding,none\n0,{size} bytes,16 x f32,\n")
    );
    assert_eq!(
        text(written(dir.path(), sql, Format::Jsonl).await),
        format!(
            "{{\"number\":0,\"image\":\"{size} bytes\",\"clip_embedding\":\"16 x f32\",\"none\":null}}\n"
        )
    );
    let table = text(written(dir.path(), sql, Format::Table).await);
    let lines: Vec<&str> = table.lines().collect();
    assert!(lines[2].contains(&format!("{size} bytes")), "{table}");
    assert_eq!(lines[3], "(1 row)");

    let bytes = written(dir.path(), sql, Format::Parquet).await;
    let reader = ParquetRecordBatchReaderBuilder::try_new(bytes_of(bytes))
        .unwrap()
        .build()
        .unwrap();
    let batches: Vec<RecordBatch> = reader.map(|batch| batch.unwrap()).collect();
    assert_eq!(batches.len(), 1);
    let images: &LargeBinaryArray = batches[0]["image"].as_binary();
    assert_eq!(images.value(0), filled::proxy(2).image);
    let vectors = batches[0]["clip_embedding"].as_fixed_size_list();
    assert_eq!(
        vectors.value(0).as_primitive::<Float32Type>().values(),
        clip_of(SMALL, 2).as_slice()
    );
    let empty = written(
        dir.path(),
        "SELECT key FROM proxies WHERE false",
        Format::Csv,
    )
    .await;
    assert_eq!(text(empty), "key\n");
}

fn bytes_of(bytes: Vec<u8>) -> std::fs::File {
    use std::io::Write;
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&bytes).unwrap();
    file
}

#[tokio::test]
async fn whatever_is_no_query_is_refused_and_changes_nothing() {
    let dir = small_store(2).await;
    let before = files_of(dir.path());
    let snapshot = Snapshot::open(dir.path(), None).await.unwrap();
    let out = dir.path().join("out.csv");
    let copy = format!("COPY proxies TO '{}'", out.display());
    let external = format!(
        "CREATE EXTERNAL TABLE x STORED AS CSV LOCATION '{}'",
        out.display()
    );
    let statements = [
        "DELETE FROM proxies",
        "UPDATE proxies SET prompt = 'x'",
        "INSERT INTO proxies SELECT * FROM proxies",
        "DROP TABLE proxies",
        "CREATE TABLE x AS SELECT * FROM proxies",
        "CREATE VIEW x AS SELECT * FROM proxies",
        "SELECT * INTO x FROM proxies",
        "SET datafusion.execution.batch_size = 1",
        "EXPLAIN ANALYZE DELETE FROM proxies",
        "TRUNCATE TABLE proxies",
        &copy,
        &external,
    ];
    for statement in statements {
        let refused = match snapshot.sql(statement).await {
            Ok(answer) => answer.all().await.map(|_| ()),
            Err(error) => Err(error),
        };
        let error = refused.expect_err(statement);
        assert!(
            error.to_string().contains("only queries are answered"),
            "{statement}: {error}"
        );
    }
    let two = snapshot
        .sql("SELECT 1; DELETE FROM proxies")
        .await
        .map(|_| ())
        .unwrap_err();
    assert!(two.to_string().contains("more than one statement"), "{two}");
    let outside = snapshot
        .sql("SELECT * FROM '/etc/passwd'")
        .await
        .map(|_| ())
        .unwrap_err();
    assert!(outside.to_string().contains("no table"), "{outside}");
    assert_eq!(files_of(dir.path()), before);
}

fn files_of(dir: &Path) -> Vec<(String, u64)> {
    let mut files: Vec<(String, u64)> = support::find(dir, &|_| true)
        .into_iter()
        .map(|path| (path.display().to_string(), path.metadata().unwrap().len()))
        .collect();
    files.sort();
    files
}

#[tokio::test]
async fn an_unknown_name_is_answered_with_the_nearest_one() {
    let dir = small_store(2).await;
    for (sql, what, hint) in [
        (
            "SELECT * FROM proxys",
            "no table proxys",
            "did you mean proxies?",
        ),
        (
            "SELECT * FROM nothing_like_it",
            "no table",
            "tables: evaluations,",
        ),
        (
            "SELECT promt FROM proxies",
            "no column promt",
            "did you mean prompt?",
        ),
        (
            "SELECT zzz FROM metrics",
            "no column zzz",
            "columns here: created_us, name,",
        ),
        (
            "SELECT key FROM proxies p JOIN scores s ON p.key = s.key",
            "column key",
            "in front",
        ),
        ("SELEC 1", "query:", "one SELECT is wanted"),
    ] {
        asked(dir.path(), &[sql]).says(1, &[what, hint]);
    }
    let nowhere = dir.path().join("nowhere");
    asked(&nowhere, &["SELECT 1"]).says(1, &["there is no store in", "--store"]);
    assert!(!nowhere.exists(), "a question makes no store");
}

/// Commits rows as another process would that has not seen the latest version.
async fn append_blindly<R: Row>(
    dir: &Path,
    table: &str,
    schema: arrow::datatypes::SchemaRef,
    rows: &[R],
) {
    let rows: Vec<_> = rows.iter().collect();
    let batch = R::to_batch(&rows, &schema).unwrap();
    let params = WriteParams {
        mode: WriteMode::Append,
        ..WriteParams::default()
    };
    let path = dir.join(format!("{table}.lance"));
    let insert = InsertBuilder::new(path.to_str().unwrap()).with_params(&params);
    insert.execute(vec![batch]).await.unwrap();
}

#[tokio::test]
async fn of_rows_with_one_key_the_first_is_shown() {
    let dir = small_store(6).await;
    let again = |number| ProxyRow {
        prompt: "the later one".into(),
        ..filled::proxy(number)
    };
    append_blindly(
        dir.path(),
        "proxies",
        ProxyRow::schema(),
        &[again(3), again(4), filled::proxy(6)],
    )
    .await;
    let evaluations = EvaluationRow::schema(SMALL.clip, SMALL.dino);
    let name = format!("evaluations_{}", &EVALUATORS[..12]);
    append_blindly(
        dir.path(),
        &name,
        evaluations,
        &[filled::evaluation(SMALL, 3)],
    )
    .await;
    assert_eq!(count(dir.path(), "SELECT count(*) FROM proxies").await, 7);
    assert_eq!(
        count(
            dir.path(),
            "SELECT count(*) FROM proxies WHERE prompt = 'the later one'"
        )
        .await,
        0
    );
    assert_eq!(count(dir.path(), "SELECT count(*) FROM scored").await, 7);
    assert_eq!(
        count(
            dir.path(),
            "SELECT count(image) FROM proxies WHERE number >= 0"
        )
        .await,
        7
    );
    let snapshot = Snapshot::open(dir.path(), None).await.unwrap();
    let near = snapshot
        .nearest(Space::Clip, &clip_of(SMALL, 3), 6, None, Search::Fast)
        .await
        .unwrap();
    let mut keys: Vec<&str> = near.iter().map(|near| near.key.as_str()).collect();
    keys.dedup();
    assert_eq!(keys.len(), 6);
    assert_eq!(keys[0], key(3));
}

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
    let keys =
        |near: Vec<query::Neighbour>| near.into_iter().map(|near| near.key).collect::<Vec<_>>();
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
async fn an_answer_does_not_replace_a_file() {
    let dir = small_store(2).await;
    let out = dir.path().join("answer.csv");
    let arguments = [
        "SELECT count(*) AS n FROM proxies",
        "--format",
        "csv",
        "--out",
        out.to_str().unwrap(),
    ];
    let said = asked(dir.path(), &arguments);
    assert_eq!(said.code, Some(0), "{said:?}");
    assert_eq!(std::fs::read_to_string(&out).unwrap(), "n\n2\n");
    asked(dir.path(), &arguments).says(1, &["answer.csv is there already", "choose another name"]);
    let failing = dir.path().join("failing.csv");
    let arguments = ["SELECT no FROM proxies", "--out", failing.to_str().unwrap()];
    assert_eq!(asked(dir.path(), &arguments).code, Some(1));
    let left = support::find(dir.path(), &|name| {
        name.contains("failing") || name.ends_with(".tmp")
    });
    assert_eq!(left, Vec::<std::path::PathBuf>::new());
}

/// An evaluations table as version 0.1 wrote it: layout 1, without the column `adapter`.
async fn write_in_layout_1(dir: &Path, rows: &[EvaluationRow]) {
    let present = EvaluationRow::schema(SMALL.clip, SMALL.dino);
    let rows: Vec<&EvaluationRow> = rows.iter().collect();
    let batch = EvaluationRow::to_batch(&rows, &present).unwrap();
    let kept: Vec<usize> = (0..present.fields().len())
        .filter(|i| present.field(*i).name() != "adapter")
        .collect();
    let batch = batch.project(&kept).unwrap();
    let metadata: HashMap<String, String> =
        [("proxytune.schema_version".to_string(), "1".to_string())].into();
    let schema = Arc::new(batch.schema().as_ref().clone().with_metadata(metadata));
    let batch = batch.with_schema(schema).unwrap();
    let path = dir.join(format!("evaluations_{}.lance", &EVALUATORS[..12]));
    let params = WriteParams {
        enable_stable_row_ids: true,
        ..WriteParams::default()
    };
    InsertBuilder::new(path.to_str().unwrap())
        .with_params(&params)
        .execute(vec![batch])
        .await
        .unwrap();
}

#[tokio::test]
async fn a_table_of_layout_1_is_read_as_it_is_and_upgraded_when_it_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let rows: Vec<EvaluationRow> = (0..3).map(|n| filled::evaluation(SMALL, n)).collect();
    write_in_layout_1(dir.path(), &rows).await;
    let before = files_of(dir.path());
    assert_eq!(
        count(
            dir.path(),
            "SELECT count(*) FROM evaluations WHERE adapter IS NULL"
        )
        .await,
        3
    );
    assert_eq!(
        count(dir.path(), "SELECT count(*) FROM scores WHERE dino >= 0").await,
        3
    );
    assert_eq!(files_of(dir.path()), before, "a question does not upgrade");

    let store = Store::open(dir.path()).await.unwrap();
    let table = store
        .evaluations(EVALUATORS, SMALL.clip, SMALL.dino)
        .await
        .unwrap();
    assert_eq!(table.rows(None, Columns::All).await.unwrap(), rows);
    let fresh = EvaluationRow {
        adapter: Some("ad".repeat(32)),
        ..filled::evaluation(SMALL, 9)
    };
    assert_eq!(
        table
            .append(&[fresh.clone(), rows[1].clone()])
            .await
            .unwrap(),
        1
    );
    let again = Store::open(dir.path()).await.unwrap();
    let table = again
        .evaluations(EVALUATORS, SMALL.clip, SMALL.dino)
        .await
        .unwrap();
    assert_eq!(
        table.rows(None, Columns::All).await.unwrap(),
        [rows, vec![fresh]].concat()
    );
    assert_eq!(
        count(dir.path(), "SELECT count(adapter) FROM evaluations").await,
        1
    );
    let dataset = table.dataset().unwrap();
    assert_eq!(
        dataset.schema().metadata["proxytune.schema_version"],
        SCHEMA_VERSION.to_string()
    );
    let adapter = dataset.schema().field("adapter").unwrap();
    assert!(adapter.metadata[proxytune::store::DESCRIPTION].contains("digest"));
}

#[tokio::test]
async fn several_openings_of_a_layout_1_table_upgrade_it_once() {
    let dir = tempfile::tempdir().unwrap();
    let rows: Vec<EvaluationRow> = (0..3).map(|n| filled::evaluation(SMALL, n)).collect();
    write_in_layout_1(dir.path(), &rows).await;
    let open = || async {
        let store = Store::open(dir.path()).await.unwrap();
        let table = store
            .evaluations(EVALUATORS, SMALL.clip, SMALL.dino)
            .await
            .unwrap();
        table.count()
    };
    assert_eq!(tokio::join!(open(), open(), open()), (3, 3, 3));
    assert_eq!(
        count(
            dir.path(),
            "SELECT count(*) FROM evaluations WHERE adapter IS NULL"
        )
        .await,
        3
    );
}

#[tokio::test]
async fn a_query_refuses_a_table_of_a_newer_layout() {
    let dir = small_store(2).await;
    let path = dir.path().join("metrics.lance");
    let mut dataset = lance::Dataset::open(path.to_str().unwrap()).await.unwrap();
    dataset
        .update_schema_metadata([("proxytune.schema_version", "99")])
        .await
        .unwrap();
    let refused = asked(dir.path(), &["SELECT count(*) FROM metrics"]);
    refused.says(
        1,
        &[
            "metrics.lance has schema version 99",
            "use the newer version",
        ],
    );
    assert_eq!(count(dir.path(), "SELECT count(*) FROM proxies").await, 2);
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
            proxytune::images::folder(Path::new("datasets/nano/subjects").join(subject).as_path())
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

/// Figures for the README: `cargo test --release --test query -- --ignored --nocapture`.
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
