//! What becomes of tables of other layouts: older ones are read as they are and upgraded when they are written, newer
//! ones refused.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use arrow::array::RecordBatch;
use lance::dataset::{InsertBuilder, WriteParams};
use proxytune::store::{Columns, EvaluationRow, Row, SCHEMA_VERSION, Store};

use crate::support::filled;
use crate::support::filled::{EVALUATORS, SMALL, asked, count, files_of, small_store};

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
    let batch = RecordBatch::try_new(schema, batch.columns().to_vec()).unwrap();
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
    // A question takes a lock, whose file is empty and stays.
    let files = |dir: &std::path::Path| -> Vec<(String, u64)> {
        let all = files_of(dir).into_iter();
        all.filter(|(name, _)| !name.ends_with(".in-use.lock"))
            .collect()
    };
    let before = files(dir.path());
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
    assert_eq!(files(dir.path()), before, "a question does not upgrade");

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
