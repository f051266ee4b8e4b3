//! Views: what the tables say, put together as people ask for it.

use super::tables::ROW_ID;
use super::{PictureKind, Snapshot};
use crate::{Error, Result};

/// A name that SQL may use beside the tables'.
pub(super) struct View {
    pub name: &'static str,
    /// What a row is.
    pub row: &'static str,
    /// Columns that no table has, and what they hold.
    pub columns: &'static [(&'static str, &'static str)],
}

/// The one view that is no SQL: it is read out of the resolved files.
pub(super) const SETTINGS: &str = "settings";

pub(super) const VIEWS: &[View] = &[
    View {
        name: "evaluations",
        row: "scores and embeddings by the evaluators that are asked (--evaluators)",
        columns: &[],
    },
    View {
        name: "latest_runs",
        row: "a run with its latest status",
        columns: &[(
            "started_us",
            "when it was first started, microseconds since 1970, UTC",
        )],
    },
    View {
        name: "scored",
        row: "a proxy with the scores that the asked evaluators give it",
        columns: &[],
    },
    View {
        name: "scores",
        row: "the scores of an image by any evaluators, without embeddings and pictures",
        columns: &[("evaluators", "the end of the name of the table it is in")],
    },
    View {
        name: SETTINGS,
        row: "one setting of a run, every default included",
        columns: &[
            ("run", "the run"),
            (
                "setting",
                "its path in the pipeline file, such as student.steps",
            ),
            ("value", "its value, as text"),
        ],
    },
    View {
        name: "tokens",
        row: "the tokens of a proxy, where there is one tokenizer",
        columns: &[],
    },
];

pub(super) fn names() -> impl Iterator<Item = &'static str> {
    VIEWS.iter().map(|view| view.name)
}

/// The query behind the view `name`; none when it is no such view.
///
/// Errors: it has nothing to show in this store.
pub(super) async fn sql(snapshot: &Snapshot, name: &str) -> Result<Option<String>> {
    Ok(Some(match name {
        "evaluations" | "tokens" => match alias(snapshot, name).await? {
            Some(table) => format!("SELECT * FROM {table}"),
            None => return Err(nothing_there()),
        },
        "scores" => {
            let columns = "key, kind, run, method, step, subject, prompt, seed, clip_i, clip_t, dino, adapter, created_us";
            let of = |digits: &str| {
                format!("SELECT '{digits}' AS evaluators, {columns} FROM evaluations_{digits}")
            };
            let parts: Vec<String> = snapshot.all_evaluators().map(of).collect();
            if parts.is_empty() {
                return Err(nothing_there());
            }
            parts.join(" UNION ALL ")
        }
        "scored" => match snapshot.evaluations().await? {
            Some(table) => format!(
                "SELECT proxies.*, e.clip_i, e.clip_t, e.dino FROM proxies LEFT JOIN {table} e ON proxies.key = e.key"
            ),
            None => "SELECT proxies.*, CAST(NULL AS REAL) AS clip_i, CAST(NULL AS REAL) AS clip_t, \
                     CAST(NULL AS REAL) AS dino FROM proxies"
                .to_string(),
        },
        "latest_runs" => "SELECT run, status, started_us, event_us, pipeline, resolved, plan_digest, versions FROM \
             (SELECT *, min(event_us) OVER (PARTITION BY run) AS started_us, \
             row_number() OVER (PARTITION BY run ORDER BY event_us DESC) AS place FROM runs) WHERE place = 1"
            .to_string(),
        _ => return Ok(None),
    }))
}

/// The pictures of `kinds` with the scores that the asked evaluators give them. Samples and references have nulls where
/// only proxies have something.
///
/// Errors: files that cannot be read.
pub(super) async fn pictures(snapshot: &Snapshot, kinds: &[PictureKind]) -> Result<String> {
    let evaluations = snapshot.evaluations().await?;
    let (scores, join) = match &evaluations {
        Some(table) => (
            "e.clip_i, e.clip_t, e.dino, e.adapter",
            format!("LEFT JOIN {table} e ON p.key = e.key"),
        ),
        None => (
            "CAST(NULL AS REAL) AS clip_i, CAST(NULL AS REAL) AS clip_t, CAST(NULL AS REAL) AS dino, \
             nullif('', '') AS adapter",
            String::new(),
        ),
    };
    const NO_TEXT: &str = "nullif('', '')";
    const NO_COUNT: &str = "CAST(NULL AS BIGINT)";
    let mut parts = Vec::new();
    for kind in kinds {
        parts.extend(match (kind, &evaluations) {
            (PictureKind::Proxy, _) => Some(format!(
                "SELECT p.key, 'proxy' AS kind, p.run, 'supervisor' AS method, CAST(0 AS BIGINT) AS step, p.supervisor, \
                 p.subject, p.class, p.token, p.number, p.prompt, p.seed, p.settings, p.width, p.height, p.content, \
                 p.created_us, p.image, {scores} FROM proxies p {join}"
            )),
            (PictureKind::Sample, None) => None,
            (PictureKind::Sample, Some(table)) => Some(format!(
                "SELECT e.key, e.kind, e.run, e.method, e.step, {NO_TEXT} AS supervisor, e.subject, s.class, s.token, \
                 {NO_COUNT} AS number, e.prompt, e.seed, {NO_TEXT} AS settings, {NO_COUNT} AS width, \
                 {NO_COUNT} AS height, {NO_TEXT} AS content, e.created_us, e.image, {scores} FROM {table} e \
                 LEFT JOIN (SELECT subject, min(class) AS class, min(token) AS token FROM subjects GROUP BY subject) s \
                 ON s.subject = e.subject WHERE e.kind = 'sample'"
            )),
            (PictureKind::Reference, _) => Some(format!(
                "SELECT p.key, 'reference' AS kind, {NO_TEXT} AS run, {NO_TEXT} AS method, {NO_COUNT} AS step, \
                 {NO_TEXT} AS supervisor, p.subject, p.class, p.token, p.\"index\" AS number, \
                 'a ' || p.token || ' ' || p.class AS prompt, CAST(NULL AS BIGINT UNSIGNED) AS seed, \
                 {NO_TEXT} AS settings, p.width, p.height, {NO_TEXT} AS content, p.created_us, p.image, {scores} \
                 FROM subjects p {join}"
            )),
        });
    }
    match parts.is_empty() {
        true => Err(nothing_there()),
        false => Ok(parts.join(" UNION ALL ")),
    }
}

/// The view `scored` over `rows`, a table of evaluations with row ids, without the proxies that have none, and with
/// these ids.
pub(super) fn scored_rows(rows: &str) -> String {
    format!(
        "SELECT proxies.*, e.clip_i, e.clip_t, e.dino, e.{ROW_ID} FROM proxies JOIN {rows} e ON proxies.key = e.key \
         WHERE e.kind = 'proxy'"
    )
}

/// The table that the view `name` is another name of; none where there is no such table, or the view is more.
///
/// Errors: tokens of more than one tokenizer; files that cannot be read.
pub(super) async fn alias(snapshot: &Snapshot, name: &str) -> Result<Option<String>> {
    match name {
        "evaluations" => snapshot.evaluations().await,
        "tokens" => {
            let names = snapshot.names.iter().map(String::as_str);
            let known: Vec<&str> = names.filter(|name| name.starts_with("tokens_")).collect();
            match known.as_slice() {
                [only] => Ok(Some(only.to_string())),
                [] => Ok(None),
                several => Err(Error::invalid(
                    "query: there are tokens of more than one tokenizer",
                    format!("name one of: {}", several.join(", ")),
                )),
            }
        }
        _ => Ok(None),
    }
}

pub(super) fn nothing_there() -> Error {
    Error::invalid(
        "query: there are no scores, embeddings or tokens in this store yet",
        "proxies are scored and tokenized while a pipeline runs; a store of proxies alone has none of these",
    )
}
