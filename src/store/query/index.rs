//! The index behind nearest-neighbour search, and what it finds.
//!
//! It is Lance's IVF with whole vectors (`IVF_FLAT`): the embeddings lie in groups around centroids, and only the groups
//! nearest to what is asked are compared, exactly. How many groups is found at the end of the building: the fewest with
//! which the recall of a sample is high enough. Rows that came after the index are compared all.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use arrow::array::AsArray;
use arrow::datatypes::{Float32Type, UInt64Type};
use futures::TryStreamExt;
use futures::future::BoxFuture;
use lance::Dataset;
use lance::dataset::ProjectionRequest;
use lance::index::DatasetIndexExt;
use lance::index::vector::VectorIndexParams;

use super::Snapshot;
use super::nearest::{Space, search_one};
use crate::store::failure::failed;
use crate::{Error, Result};

/// Fewer embeddings than these are compared all, in less time than an index takes to open.
const WORTH_AN_INDEX: usize = 1000;
/// Embeddings of which neighbours are looked for both ways, to measure the recall.
const SAMPLE: usize = 100;
/// Neighbours looked for in the measurement.
pub(super) const MEASURED_NEIGHBOURS: usize = 10;
/// The recall with which the measurement is content.
const ENOUGH: f64 = 0.98;
/// What was measured against the exact search.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Recall {
    /// The share of the nearest [`Recall::neighbours`] that the index finds, 0 to 1, over the sample.
    pub recall: f64,
    pub neighbours: usize,
    pub sample: usize,
    /// Time of one search through the index.
    pub fast: Duration,
    /// Time of one exact search.
    pub exact: Duration,
}

/// An index, as it was built or found.
#[derive(Clone, Debug, PartialEq)]
pub struct IndexReport {
    pub table: String,
    pub space: Space,
    /// Embeddings in the table.
    pub rows: usize,
    /// Groups, and how many of them a search compares; none where an index is not worth its while.
    pub groups: Option<(usize, usize)>,
    /// None without an index.
    pub recall: Option<Recall>,
    pub built_in: Duration,
}

impl Snapshot {
    /// Builds the index of `space`, in place of an older one, and measures what it finds.
    ///
    /// Errors: nothing is evaluated; a read-only directory; a full disk; a disk without locks.
    pub fn build_index<'a>(&'a self, space: Space) -> BoxFuture<'a, Result<IndexReport>> {
        Box::pin(async move {
            if self.in_use.is_none() {
                return Err(Error::Store {
                    what: format!("{} cannot be locked, only read", self.path.display()),
                    hint: Some(
                        "an index is built where the store can be written and has locks".into(),
                    ),
                });
            }
            let (table, dataset) = self.evaluated().await?;
            let path = self.path.join(format!("{table}.lance"));
            let begun = Instant::now();
            let filter = format!("{} IS NOT NULL", space.column());
            let rows = dataset
                .count_rows(Some(filter))
                .await
                .map_err(|e| failed("count", &path, e))?;
            let mut report = IndexReport {
                table: table.clone(),
                space,
                rows,
                groups: None,
                recall: None,
                built_in: Duration::ZERO,
            };
            if rows < WORTH_AN_INDEX {
                return Ok(report);
            }
            let failed = |e| failed("index", &path, e);
            let groups = (rows as f64).sqrt().round() as usize;
            let mut latest = Dataset::clone(&dataset);
            build(&mut latest, space, groups).await.map_err(failed)?;
            let sample = sample(&latest, space).await.map_err(failed)?;
            let (truth, exact) = search_all(&latest, space, &sample, None)
                .await
                .map_err(failed)?;
            let mut probed = 1;
            let measured = loop {
                let (found, fast) = search_all(&latest, space, &sample, Some(probed))
                    .await
                    .map_err(failed)?;
                let recall = agreement(&truth, &found);
                if recall >= ENOUGH || probed >= groups {
                    break Recall {
                        recall,
                        neighbours: MEASURED_NEIGHBOURS,
                        sample: sample.len(),
                        fast,
                        exact,
                    };
                }
                probed = (probed * 3 / 2 + 1).min(groups);
            };
            let note = [(probes_key(space), probed.to_string())];
            latest.update_config(note).await.map_err(failed)?;
            self.replace(&table, latest);
            report.groups = Some((groups, probed));
            report.recall = Some(measured);
            report.built_in = begun.elapsed();
            Ok(report)
        })
    }

    /// Measures the index of `space` as it is now, with the rows that came after it; none without an index.
    ///
    /// Errors: nothing is evaluated; files that cannot be read.
    pub fn recall<'a>(&'a self, space: Space) -> BoxFuture<'a, Result<Option<Recall>>> {
        Box::pin(async move {
            let (table, dataset) = self.evaluated().await?;
            let failed = |e| failed("search", &self.path.join(format!("{table}.lance")), e);
            let Some(probed) = probes(&dataset, space) else {
                return Ok(None);
            };
            let sample = sample(&dataset, space).await.map_err(failed)?;
            let (truth, exact) = search_all(&dataset, space, &sample, None)
                .await
                .map_err(failed)?;
            let (found, fast) = search_all(&dataset, space, &sample, Some(probed))
                .await
                .map_err(failed)?;
            Ok(Some(Recall {
                recall: agreement(&truth, &found),
                neighbours: MEASURED_NEIGHBOURS,
                sample: sample.len(),
                fast,
                exact,
            }))
        })
    }

    /// Whether there is an index of `space`, and how many rows there are in all.
    ///
    /// Errors: nothing is evaluated; files that cannot be read.
    pub fn indexed<'a>(&'a self, space: Space) -> BoxFuture<'a, Result<(bool, usize)>> {
        Box::pin(async move {
            let (table, dataset) = self.evaluated().await?;
            let rows = dataset.count_rows(None).await;
            let rows = rows.map_err(|e| failed("count", &self.path.join(&table), e))?;
            Ok((probes(&dataset, space).is_some(), rows))
        })
    }
}

fn probes_key(space: Space) -> String {
    format!("proxytune.{}.probes", space.column())
}

/// Whether `key` of a table's configuration speaks of an index: without it, it says nothing.
pub(in crate::store) fn is_of_an_index(key: &str) -> bool {
    [Space::Clip, Space::Dino]
        .map(probes_key)
        .contains(&key.to_string())
}

/// How many groups a search through the index of `space` compares; none without an index.
pub(super) fn probes(dataset: &Dataset, space: Space) -> Option<usize> {
    dataset.config().get(&probes_key(space))?.parse().ok()
}

async fn build(dataset: &mut Dataset, space: Space, groups: usize) -> lance::Result<()> {
    let params = VectorIndexParams::ivf_flat(groups, "cosine".try_into()?);
    let (kind, name) = (params.index_type(), format!("{}_ivf", space.column()));
    let columns = [space.column()];
    let building: BoxFuture<'_, _> =
        Box::pin(dataset.create_index(&columns, kind, Some(name), &params, true));
    building.await.map(drop)
}

/// Embeddings of up to [`SAMPLE`] proxies, spread over the table.
async fn sample(dataset: &Dataset, space: Space) -> lance::Result<Vec<(String, Vec<f32>)>> {
    let mut scan = dataset.scan();
    scan.filter(&format!(
        "kind = 'proxy' AND {} IS NOT NULL",
        space.column()
    ))?;
    scan.project(&["key"])?;
    scan.with_row_id();
    let mut ids = Vec::new();
    let mut batches = Box::pin(scan.try_into_stream()).await?;
    while let Some(batch) = batches.try_next().await? {
        ids.extend(batch["_rowid"].as_primitive::<UInt64Type>().values());
    }
    let step = (ids.len() / SAMPLE).max(1);
    let chosen: Vec<u64> = ids.into_iter().step_by(step).take(SAMPLE).collect();
    let columns = ["key", space.column()];
    let wanted = ProjectionRequest::from_columns(columns, dataset.schema());
    let batch = Box::pin(dataset.take_rows(&chosen, wanted)).await?;
    let keys = batch["key"].as_string::<i32>();
    let vectors = batch[space.column()].as_fixed_size_list();
    let vector = |i| {
        vectors
            .value(i)
            .as_primitive::<Float32Type>()
            .values()
            .to_vec()
    };
    Ok((0..batch.num_rows())
        .map(|i| (keys.value(i).to_string(), vector(i)))
        .collect())
}

/// The neighbours of each of `sample` but itself, and the time of one search.
async fn search_all(
    dataset: &Dataset,
    space: Space,
    sample: &[(String, Vec<f32>)],
    probed: Option<usize>,
) -> lance::Result<(Vec<HashSet<String>>, Duration)> {
    let mut found = Vec::with_capacity(sample.len());
    let mut times = Vec::with_capacity(sample.len());
    for (own, vector) in sample {
        let begun = Instant::now();
        let near = search_one(dataset, space, vector, MEASURED_NEIGHBOURS + 1, probed).await?;
        times.push(begun.elapsed());
        let others = near
            .into_iter()
            .map(|near| near.key)
            .filter(|key| key != own);
        found.push(others.take(MEASURED_NEIGHBOURS).collect());
    }
    times.sort_unstable();
    Ok((
        found,
        times.get(times.len() / 2).copied().unwrap_or_default(),
    ))
}

/// The share of `truth` that is in `found`.
fn agreement(truth: &[HashSet<String>], found: &[HashSet<String>]) -> f64 {
    let all: usize = truth.iter().map(HashSet::len).sum();
    let both: usize = truth
        .iter()
        .zip(found)
        .map(|(a, b)| a.intersection(b).count())
        .sum();
    both as f64 / all.max(1) as f64
}
