//! Compacting a table in passing, and erasing rows from all its versions.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use arrow::datatypes::Schema;
use futures::future::BoxFuture;
use lance::Dataset;
use lance::dataset::builder::DatasetBuilder;
use lance::dataset::cleanup::CleanupPolicy;
use lance::dataset::optimize::{CompactionOptions, compact_files};
use lance::index::DatasetIndexExt;
use lance::session::Session;
use lance::table::format::Fragment;

use super::dataset::Change;
use super::failure::failed;
use super::query::is_of_an_index;
use crate::{Error, Result};

/// A fragment at least this large is read well enough as it is, and dear to rewrite.
const LARGE_FRAGMENT_BYTES: u64 = 16 << 20;
/// Compaction makes fragments of about this many rows.
const ROWS_PER_FRAGMENT: usize = 8192;
/// So many small fragments make a compaction worth its while when one is asked for.
const SMALL_FRAGMENTS: usize = 32;
/// Rows that compaction holds at once; with the limit on fragments, at most 256 MiB.
const COMPACTION_BATCH_ROWS: usize = 16;

/// What compaction did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compacted {
    /// Fragments before and after.
    pub fragments_before: usize,
    pub fragments_after: usize,
    /// Bytes of older versions that were removed from disk.
    pub bytes_removed: u64,
}

impl Change<'_> {
    /// Puts small fragments together once there are many of them, then removes the versions that were out of date for
    /// longer than `keep`; does nothing while another process is at it.
    pub fn compact<'a>(&'a self, keep: Duration) -> BoxFuture<'a, Result<Compacted>> {
        Box::pin(async move {
            let table = self.table;
            let Some(dataset) = table.dataset() else {
                return Ok(Compacted::default());
            };
            let mut latest = Dataset::clone(&dataset);
            let before = latest.count_fragments();
            let Some(_turn) = table.locks.try_claim(&table.lock_name("compact"))? else {
                return Ok(Compacted {
                    fragments_before: before,
                    fragments_after: before,
                    bytes_removed: 0,
                });
            };
            let failed = |e| failed("compact", table.path(), e);
            let (large, small): (Vec<_>, Vec<_>) =
                latest.fragments().iter().partition(|f| is_large(f));
            if small.len() >= SMALL_FRAGMENTS {
                let options = CompactionOptions {
                    target_rows_per_fragment: ROWS_PER_FRAGMENT,
                    batch_size: Some(COMPACTION_BATCH_ROWS),
                    num_threads: Some(1),
                    excluded_fragment_ids: large.iter().map(|f| f.id as u32).collect(),
                    ..CompactionOptions::default()
                };
                Box::pin(compact_files(&mut latest, options, None))
                    .await
                    .map_err(failed)?;
            }
            let oldest_us = super::rows::now_us() - keep.as_micros() as i64;
            let versions = latest.versions().await.map_err(failed)?;
            // The newest of the older ones was the latest until the next was committed: readers may be at work on it.
            let oldest_kept = versions
                .iter()
                .rfind(|v| v.timestamp.timestamp_micros() < oldest_us)
                .or(versions.first());
            let policy = CleanupPolicy {
                before_version: Some(oldest_kept.map_or(latest.version_id(), |v| v.version)),
                error_if_tagged_old_versions: false,
                ..CleanupPolicy::default()
            };
            let removed = latest.cleanup_with_policy(policy).await.map_err(failed)?;
            let bytes_removed = removed.bytes_removed;
            let after = latest.count_fragments();
            table.take_up(Arc::new(latest)).await?;
            Ok(Compacted {
                fragments_before: before,
                fragments_after: after,
                bytes_removed,
            })
        })
    }
}

/// Whether a fragment is read well enough as it is, and dear to rewrite.
pub(super) fn is_large(fragment: &Fragment) -> bool {
    let sizes = fragment.files.iter();
    let sizes = sizes.filter_map(|f| f.file_size_bytes.get());
    sizes.map(u64::from).sum::<u64>() >= LARGE_FRAGMENT_BYTES
        || fragment.num_rows().is_some_and(|n| n >= ROWS_PER_FRAGMENT)
}

/// What erasing came to in one table.
#[derive(Default)]
pub(super) struct Erased {
    /// How many rows there were.
    pub rows: usize,
    /// The tags that are gone.
    pub tags: Vec<String>,
    /// The branches that hold such rows still.
    pub branches: Vec<String>,
}

/// Whether a file of this version may hold rows that satisfy one of `filters`: those that were deleted are in it still.
async fn holds(version: &Dataset, filters: &[String]) -> lance::Result<bool> {
    for filter in filters {
        if Box::pin(version.count_rows(Some(filter.clone()))).await? > 0 {
            return Ok(true);
        }
    }
    let mut fragments = version.fragments().iter();
    Ok(!filters.is_empty() && fragments.any(|fragment| fragment.deletion_file.is_some()))
}

/// Deletes the tags that keep rows of `filters`, and names the branches that do.
async fn release(dataset: &Dataset, filters: &[String], erased: &mut Erased) -> lance::Result<()> {
    let tags: BTreeMap<_, _> = dataset.tags().list().await?.into_iter().collect();
    for (name, tag) in tags {
        // What is tagged in a branch goes with the branch.
        if tag.branch.is_some() {
            continue;
        }
        let version = Box::pin(dataset.checkout_version(tag.version)).await?;
        if holds(&version, filters).await? {
            dataset.tags().delete(&name).await?;
            erased.tags.push(name);
        }
    }
    let branches: BTreeMap<_, _> = dataset.list_branches().await?.into_iter().collect();
    for name in branches.into_keys() {
        let latest = Box::pin(dataset.checkout_branch(&name)).await?;
        for version in latest.versions().await? {
            let version = Box::pin(latest.checkout_version(version.version)).await?;
            if holds(&version, filters).await? {
                erased.branches.push(name);
                break;
            }
        }
    }
    Ok(())
}

/// Erases the rows of the table at `path` that satisfy any of `filters` (SQL over the columns), so that no file holds
/// them any more: fragments are rewritten without them, and all older versions and what no version knows removed.
/// Indexes over the table are dropped when rows go, as they hold copies. Nobody else may have the table open.
///
/// A tag that keeps an older version with such rows is deleted. A branch may hold what was never anywhere else, so it is
/// left, and told of.
pub(super) async fn erase(
    path: &Path,
    session: Arc<Session>,
    filters: impl Fn(&Schema) -> Vec<String>,
) -> Result<Erased> {
    let failed = |e| failed("erase from", path, e);
    let uri = path.to_str().ok_or_else(|| {
        Error::invalid(
            "the store's path is not UTF-8",
            "choose another directory with --store",
        )
    })?;
    let loading = DatasetBuilder::from_uri(uri).with_session(session);
    let mut dataset = match Box::pin(loading.load()).await {
        Ok(dataset) => dataset,
        Err(lance::Error::DatasetNotFound { .. } | lance::Error::NotFound { .. }) => {
            return Ok(Erased::default());
        }
        Err(e) => return Err(failed(e)),
    };
    let filters = filters(&dataset.schema().into());
    let mut erased = Erased::default();
    release(&dataset, &filters, &mut erased)
        .await
        .map_err(failed)?;
    for filter in filters {
        let rows = Box::pin(dataset.count_rows(Some(filter.clone()))).await;
        let rows = rows.map_err(failed)?;
        if rows == 0 {
            continue;
        }
        if erased.rows == 0 {
            let indices = dataset.load_indices().await.map_err(failed)?;
            let names: BTreeSet<&String> = indices.iter().map(|index| &index.name).collect();
            for name in names {
                dataset.drop_index(name).await.map_err(failed)?;
            }
        }
        Box::pin(dataset.delete(&filter)).await.map_err(failed)?;
        erased.rows += rows;
    }
    // The filters stand in the version that they made: one more, so that it is an older one.
    let now = super::rows::now_us().to_string();
    let mut notes = vec![("proxytune.erased_us".to_string(), Some(now))];
    if dataset.load_indices().await.map_err(failed)?.is_empty() {
        let of_indexes = dataset.config().keys().filter(|key| is_of_an_index(key));
        notes.extend(of_indexes.map(|key| (key.clone(), None)));
    }
    dataset.update_config(notes).await.map_err(failed)?;
    let options = CompactionOptions {
        target_rows_per_fragment: ROWS_PER_FRAGMENT,
        batch_size: Some(COMPACTION_BATCH_ROWS),
        num_threads: Some(1),
        materialize_deletions: true,
        materialize_deletions_threshold: 0.0,
        ..CompactionOptions::default()
    };
    Box::pin(compact_files(&mut dataset, options, None))
        .await
        .map_err(failed)?;
    let policy = CleanupPolicy {
        before_version: Some(dataset.version_id()),
        // also what a killed writer left behind
        delete_unverified: true,
        error_if_tagged_old_versions: false,
        ..CleanupPolicy::default()
    };
    dataset.cleanup_with_policy(policy).await.map_err(failed)?;
    Ok(erased)
}
