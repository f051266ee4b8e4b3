//! Removing a subject from all tables and versions, so that nothing of it is left on disk.

use std::collections::BTreeSet;

use arrow::datatypes::Schema;

use super::query::TableKind;
use super::{Access, Columns, MetricStage, RunRow, Store, upkeep};
use crate::{Error, Result, files};
use futures::future::BoxFuture;

/// Keys in one filter.
const KEYS_AT_ONCE: usize = 1000;

/// What was removed with a subject.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Erased rows by table.
    pub rows: Vec<(String, usize)>,
    /// Supervisor adapters.
    pub adapters: usize,
    /// Runs that used the subject, alone or with others: their directories are not the store's.
    pub runs: Vec<String>,
    /// Tags of tables that kept versions with its rows, and are gone.
    pub tags: Vec<String>,
    /// What could not be removed, with the reason and what to do.
    pub left: Vec<String>,
}

impl Store {
    /// Erases the photos, proxies, tokens, scores, samples, curves and supervisor adapters of the subject called
    /// `name` from all versions of all tables, and the runs that had no other subject. The store must have been opened
    /// by [`Store::open_alone`]. What is interrupted is completed by the same call.
    ///
    /// # Errors
    /// When the store is shared; a full disk, a read-only directory.
    pub fn remove_subject<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Removed>> {
        Box::pin(async move {
            if self.access != Access::Alone {
                return Err(Error::Store {
                    what: "rows can only be erased from a store that nobody else has open".into(),
                    hint: None,
                });
            }
            let is_subject = format!("subject = {}", quoted(name));
            let is_stage = format!(
                "stage = {}",
                quoted(&MetricStage::Supervise(name.into()).to_string())
            );
            let proxies = self
                .proxies()
                .await?
                .rows(Some(&is_subject), Columns::WithoutPictures)
                .await?;
            let curves = self
                .metrics()
                .await?
                .rows(Some(&is_stage), Columns::All)
                .await?;
            let supervisors: BTreeSet<&String> = proxies
                .iter()
                .map(|row| &row.supervisor)
                .chain(curves.iter().map(|row| &row.run))
                .collect();
            let mut removed = Removed::default();
            let (mut alone, mut runs) = (BTreeSet::new(), BTreeSet::new());
            for row in self.runs().await?.rows(None, Columns::All).await? {
                let subjects = subjects_of(&row);
                if subjects.contains(name) {
                    if subjects.len() == 1 {
                        alone.insert(row.run.clone());
                    }
                    runs.insert(row.run);
                }
            }
            removed.runs = runs.into_iter().collect();
            removed.adapters = self.remove_adapters(&supervisors)?;
            let proxies: Vec<&String> = proxies.iter().map(|row| &row.key).collect();
            let alone: Vec<&String> = alone.iter().collect();
            let of_proxies = one_of("key", &proxies);
            let of_runs = one_of("run", &alone);
            // Last come the tables that say what belongs to the subject, so that nothing is forgotten when this is cut short.
            let mut tables = self.table_names().await?;
            tables.sort_by_key(|table| {
                [TableKind::Metrics, TableKind::Runs, TableKind::Proxies]
                    .iter()
                    .position(|last| *last == TableKind::of(table))
            });
            for table in tables {
                let filters = |schema: &Schema| match TableKind::of(&table) {
                    TableKind::Metrics => [vec![is_stage.clone()], of_runs.clone()].concat(),
                    TableKind::Runs => of_runs.clone(),
                    TableKind::Tokens => of_proxies.clone(),
                    _ if schema.column_with_name("subject").is_some() => vec![is_subject.clone()],
                    _ => Vec::new(),
                };
                let path = self.path.join(format!("{table}.lance"));
                let erased = upkeep::erase(&path, self.session.clone(), filters).await?;
                let tags = erased.tags.iter().map(|tag| format!("{tag} of {table}"));
                removed.tags.extend(tags);
                removed.left.extend(erased.branches.iter().map(|branch| {
                    format!(
                        "the branch {branch} of {}: if it may go, delete it \
                         (lance.dataset(...).branches.delete({branch:?}) in Python) and do this again",
                        path.display()
                    )
                }));
                removed.rows.push((table, erased.rows));
            }
            // What was read above is of versions that are gone.
            self.open.lock().await.clear();
            removed.rows.sort();
            Ok(removed)
        })
    }

    /// Removes the adapters of these supervisors, the checkpoints of those that were not learnt to the end, and what
    /// killed processes left of either.
    fn remove_adapters(&self, supervisors: &BTreeSet<&String>) -> Result<usize> {
        let mut count = 0;
        for folder in ["adapters", "training"] {
            for (name, path) in files::list(&self.path.join(folder))? {
                let key = name.trim_start_matches('.').split('.').next();
                let key = key.unwrap_or_default().to_string();
                if supervisors.contains(&key) {
                    std::fs::remove_dir_all(&path).map_err(Error::io(&path))?;
                    count += usize::from(folder == "adapters" && !name.starts_with('.'));
                }
            }
        }
        Ok(count)
    }
}

/// The names of the subjects of a run.
fn subjects_of(row: &RunRow) -> BTreeSet<String> {
    let resolved: toml::Table = row.resolved.parse().unwrap_or_default();
    let subjects = resolved.get("subject").and_then(toml::Value::as_table);
    subjects.map_or_else(BTreeSet::new, |table| table.keys().cloned().collect())
}

/// `text` as SQL writes it.
pub(crate) fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// Filters that together say that `column` is one of `values`.
pub(crate) fn one_of(column: &str, values: &[&String]) -> Vec<String> {
    let list = |values: &[&String]| {
        values
            .iter()
            .map(|value| quoted(value))
            .collect::<Vec<_>>()
            .join(", ")
    };
    values
        .chunks(KEYS_AT_ONCE)
        .map(|values| format!("{column} IN ({})", list(values)))
        .collect()
}
