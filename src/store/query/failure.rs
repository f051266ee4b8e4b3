//! What DataFusion reports, as this crate's errors: with the names that exist, and the nearest of them.

use datafusion::common::SchemaError;
use datafusion::error::DataFusionError;

use super::Snapshot;
use super::limits::is_exhausted;
use crate::Error;
use crate::config::did_you_mean;
use crate::store::failure::first_line;

/// `cause` in one line. With the `snapshot`, unknown names are answered with known ones.
pub(super) fn explained(cause: DataFusionError, snapshot: Option<&Snapshot>) -> Error {
    let root = cause.find_root();
    if let DataFusionError::SchemaError(error, _) = root {
        return schema_error(error);
    }
    let text = unlabelled(&root.strip_backtrace());
    if text.contains("single SQL statement") {
        return Error::invalid(
            "query: there is more than one statement",
            "ask one at a time",
        );
    }
    let missing = text
        .split_once("table '")
        .and_then(|(_, rest)| rest.split_once("' not found"))
        .map(|(name, _)| name.rsplit('.').next().unwrap_or(name));
    if let (Some(name), Some(snapshot)) = (missing, snapshot) {
        return unknown_table(snapshot, name);
    }
    let hint = match root {
        DataFusionError::SQL(..) => {
            Some("one SELECT is wanted, in quotes: proxytune query \"SELECT subject, count(*) FROM proxies GROUP BY subject\"".into())
        }
        cause if is_exhausted(cause) => {
            return Error::invalid(
                format!("query: it takes more memory than it may: {text}"),
                "ask for fewer rows, leave the image column out, or allow more with --memory GIB",
            );
        }
        _ => None,
    };
    Error::Invalid {
        what: format!("query: {text}"),
        hint,
    }
}

fn schema_error(error: &SchemaError) -> Error {
    match error {
        SchemaError::FieldNotFound {
            field,
            valid_fields,
        } => {
            let known = valid_fields.iter().map(|column| column.name.as_str());
            let hint = match valid_fields.is_empty() {
                true => "proxytune query --tables names all columns".to_string(),
                false => did_you_mean(&field.name, known, "columns here:"),
            };
            let mut hint = hint;
            if valid_fields.iter().any(|column| column.name == field.name) {
                hint = "the table in front of the dot has no such column; another one in this query has".to_string();
            }
            Error::invalid(
                format!("query: there is no column {}", field.flat_name()),
                hint,
            )
        }
        SchemaError::AmbiguousReference { field } => Error::invalid(
            format!(
                "query: column {} is in more than one of the tables",
                field.name
            ),
            format!("put the table's name in front: proxies.{}", field.name),
        ),
        other => Error::invalid(
            format!("query: {other}"),
            "give each column of the answer a name of its own with AS",
        ),
    }
}

/// A table that neither exists nor could.
pub(super) fn unknown_table(snapshot: &Snapshot, name: &str) -> Error {
    let names = snapshot.all_names();
    Error::invalid(
        format!(
            "query: there is no table {name} in {}",
            snapshot.path().display()
        ),
        did_you_mean(name, names.iter().map(String::as_str), "tables:"),
    )
}

/// A statement that does not ask, or does more than ask.
pub(super) fn not_a_query() -> Error {
    Error::invalid(
        "query: only queries are answered: nothing in a store can be changed or written this way",
        "SELECT, WITH, EXPLAIN and DESCRIBE can be asked; --tables names the tables, --out FILE writes an answer to a file",
    )
}

/// The first line without the labels that DataFusion puts in front.
fn unlabelled(text: &str) -> String {
    let labels = [
        "Error during planning: ",
        "SQL error: ",
        "Arrow error: ",
        "Execution error: ",
        "External error: ",
        "This feature is not implemented: ",
        "Schema error: ",
    ];
    let mut line = first_line(text);
    while let Some(rest) = labels.iter().find_map(|label| line.strip_prefix(label)) {
        line = rest;
    }
    line.to_string()
}
