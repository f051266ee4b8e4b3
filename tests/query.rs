//! What questions to a store promise: every table and view answers, what is shown and hidden, and that nothing is changed.

use std::path::Path;

use arrow::array::{AsArray, LargeBinaryArray, RecordBatch};
use arrow::datatypes::Float32Type;
use lance::dataset::{InsertBuilder, WriteMode, WriteParams};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use proxytune::store::query::{Format, Search, Snapshot, Space, tables_text, write};
use proxytune::store::{EvaluationRow, ProxyRow, Row};

use crate::support;
use crate::support::filled;
use crate::support::filled::{
    EVALUATORS, SMALL, ask, asked, clip_of, count, files_of, key, small_store,
};

async fn written(dir: &Path, sql: &str, format: Format) -> Vec<u8> {
    let snapshot = Snapshot::open(dir, None).await.unwrap();
    let mut bytes = Vec::new();
    write(snapshot.sql(sql).await.unwrap(), format, &mut bytes)
        .await
        .unwrap();
    bytes
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
    let text = tables_text(&tables);
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
    assert_eq!(text, "status\ncomplete\ninterrupted\n");
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

#[tokio::test]
async fn a_query_without_end_stops_in_time_and_says_which_option_allows_more() {
    let dir = small_store(2).await;
    let start = std::time::Instant::now();
    let endless = "SELECT count(*) FROM metrics a, metrics b, metrics c, metrics d, metrics e WHERE a.value + b.value > c.value + d.value";
    let said = asked(dir.path(), &[endless, "--timeout", "1"]);
    said.says(1, &["no whole answer within 1 s", "--timeout SECONDS"]);
    let endless = "SELECT a.step FROM metrics a, metrics b, metrics c, metrics d, metrics e WHERE a.value + b.value + c.value + d.value + e.value < 0";
    let said = asked(dir.path(), &[endless, "--timeout", "1", "--format", "csv"]);
    said.says(1, &["no whole answer within 1 s"]);
    let like = [
        "--like",
        &key(1),
        "--where",
        "number IN (SELECT a.step FROM metrics a, metrics b, metrics c, metrics d)",
    ];
    let said = asked(dir.path(), &[&like[..], &["--timeout", "1"]].concat());
    said.says(1, &["no whole answer within 1 s"]);
    assert!(start.elapsed().as_secs() < 30, "{:?}", start.elapsed());
    assert_eq!(
        asked(dir.path(), &["SELECT 1", "--timeout", "0"]).code,
        Some(2)
    );
}

#[tokio::test]
async fn a_query_that_wants_too_much_memory_ends_and_says_which_option_allows_more() {
    let dir = small_store(2).await;
    let greedy = [
        // Rows that an operator holds, a constant that a function makes, and rows for the terminal.
        "WITH many AS (SELECT a.step * 1000003 + b.step * 1009 + c.step AS x FROM metrics a, metrics b, metrics c)
         SELECT count(*) FROM many l JOIN many r USING (x)",
        "SELECT length(repeat('a', 900000000) || repeat('b', 900000000))",
        "SELECT a.name, b.name, c.name FROM metrics a, metrics b, metrics c",
    ];
    for sql in greedy {
        let said = asked(dir.path(), &[sql, "--memory", "0.05", "--timeout", "300"]);
        said.says(1, &["memory", "--memory GIB"]);
    }
}
