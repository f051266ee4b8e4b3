//! Nearest neighbours by embedding: exactly, or through the index.

use std::collections::{BTreeMap, HashSet};

use arrow::array::{Array, AsArray, Float32Array, StringArray, UInt64Array};
use arrow::datatypes::{Float32Type, UInt64Type};
use futures::TryStreamExt;
use futures::future::BoxFuture;
use lance::Dataset;
use lance::dataset::ProjectionRequest;
use lance::dataset::scanner::{RowAddrMask, RowAddrTreeMap};

use super::Snapshot;
use super::index::{MEASURED_NEIGHBOURS, probes};
use super::tables::{BATCH_BYTES, ROW_ID};
use super::views::{nothing_there, scored_rows};
use crate::store::columns::column;
use crate::store::failure::failed;
use crate::store::quoted;
use crate::{Error, Result};

/// Digits of a key that is told.
const TOLD: usize = 16;

/// Rows asked for beyond the limit, in case a key is there twice.
const SPARE: usize = 4;

/// More than these are looked for exactly: the recall of the index was measured for few, and the groups that it compares
/// may not even hold many.
const INDEXED_NEIGHBOURS: usize = 4 * MEASURED_NEIGHBOURS;

/// Which embedding likeness is taken by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Space {
    /// What is shown, texts included
    Clip,
    /// How it looks
    Dino,
}

impl Space {
    /// The column of the evaluations tables.
    pub fn column(self) -> &'static str {
        match self {
            Space::Clip => "clip_embedding",
            Space::Dino => "dino_embedding",
        }
    }
}

/// A proxy that is near.
#[derive(Clone, Debug, PartialEq)]
pub struct Neighbour {
    pub key: String,
    /// Cosine, -1 to 1.
    pub similarity: f32,
}

/// Whether the index may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Search {
    /// Every embedding is compared.
    Exact,
    /// Through the index where there is one and few neighbours are asked for.
    Fast,
}

impl Snapshot {
    /// The `limit` proxies whose embeddings are nearest to `vector` by cosine, nearest first. With `filter` (SQL over
    /// the view `scored`) only proxies that satisfy it are compared, and all of them, exactly.
    ///
    /// Errors: nothing is evaluated; `vector` has another length; a filter that cannot be understood.
    pub fn nearest<'a>(
        &'a self,
        space: Space,
        vector: &'a [f32],
        limit: usize,
        filter: Option<&'a str>,
        search: Search,
    ) -> BoxFuture<'a, Result<Vec<Neighbour>>> {
        Box::pin(async move {
            let (table, dataset) = self.evaluated().await?;
            let width = crate::store::columns::width_of(&dataset.schema().into(), space.column())?;
            if vector.len() != width {
                return Err(Error::invalid(
                    format!(
                        "an embedding of {} numbers for a table with {width}",
                        vector.len()
                    ),
                    "embed it with the models that the store's runs were evaluated with",
                ));
            }
            if limit == 0 {
                return Ok(Vec::new());
            }
            match filter {
                Some(filter) => {
                    self.nearest_among(&table, &dataset, space, vector, limit, filter)
                        .await
                }
                None => {
                    let counted = dataset.count_rows(None).await;
                    let rows = counted.map_err(|e| failed("count", &self.path.join(&table), e))?;
                    let mut asked = limit.saturating_add(SPARE).min(rows + 1);
                    loop {
                        let found = nearest(&dataset, space, vector, asked, search).await;
                        let found =
                            found.map_err(|e| failed("search", &self.path.join(&table), e))?;
                        let all = found.len() < asked;
                        let mut seen = HashSet::new();
                        let mut distinct: Vec<Neighbour> = found
                            .into_iter()
                            .filter(|near| seen.insert(near.key.clone()))
                            .collect();
                        if all || distinct.len() >= limit {
                            distinct.truncate(limit);
                            return Ok(distinct);
                        }
                        asked = asked.saturating_mul(2).min(rows + 1);
                    }
                }
            }
        })
    }

    /// Compares `vector` with every proxy that satisfies `filter`. Which do is asked of narrow columns alone; then the
    /// embeddings of these rows are read, and of no others.
    async fn nearest_among(
        &self,
        table: &str,
        dataset: &Dataset,
        space: Space,
        vector: &[f32],
        limit: usize,
        filter: &str,
    ) -> Result<Vec<Neighbour>> {
        let with_ids = self.with_row_ids(table).await?;
        // On lines of their own: a comment in the filter must not swallow the bracket.
        let sql = format!(
            "SELECT key, {ROW_ID} FROM ({}) AS scored WHERE (\n{filter}\n)",
            scored_rows(&with_ids)
        );
        let matching = self.sql(&sql).await?.all().await?;
        let mut keys: Vec<(u64, &str)> = Vec::new();
        for batch in &matching {
            let names: &StringArray = column(batch, "key")?;
            let ids: &UInt64Array = column(batch, ROW_ID)?;
            keys.extend(ids.values().iter().copied().zip(names.iter().flatten()));
        }
        if keys.is_empty() {
            return Ok(Vec::new());
        }
        keys.sort_unstable();
        let rows: RowAddrTreeMap = keys.iter().map(|(id, _)| *id).collect();
        let similar = similarities(dataset, space, vector, rows).await;
        let similar = similar.map_err(|e| failed("search", &self.path.join(table), e))?;
        let mut found: Vec<(f32, &str)> = similar
            .into_iter()
            .filter_map(|(id, similarity)| {
                let place = keys.binary_search_by_key(&id, |(id, _)| *id).ok()?;
                Some((similarity, keys[place].1))
            })
            .collect();
        found.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(b.1)));
        let near = |(similarity, key): (f32, &str)| Neighbour {
            key: key.to_string(),
            similarity,
        };
        Ok(found.into_iter().take(limit).map(near).collect())
    }

    /// The embedding of the one proxy, sample or reference whose key begins with `key`; none when there is no such key.
    ///
    /// Errors: nothing is evaluated; more than one key begins so.
    pub fn embedding<'a>(
        &'a self,
        space: Space,
        key: &'a str,
    ) -> BoxFuture<'a, Result<Option<Vec<f32>>>> {
        Box::pin(async move {
            let (table, dataset) = self.evaluated().await?;
            let found = starting_with(&dataset, space, key).await;
            let found = found.map_err(|e| failed("read", &self.path.join(&table), e))?;
            match found.len() {
                2.. => {
                    let cut = |key: &String| format!("{}…", key.get(..TOLD).unwrap_or(key));
                    let several: Vec<String> = found.keys().map(cut).collect();
                    Err(Error::invalid(
                        format!("more than one key begins with {key}"),
                        format!(
                            "give more digits, such as those of {}",
                            several.join(" or ")
                        ),
                    ))
                }
                _ => Ok(found.into_values().next()),
            }
        })
    }

    /// Whether any proxy, sample or reference has a key that begins with `digits`.
    ///
    /// Errors: nothing is evaluated; files that cannot be read.
    pub async fn is_key(&self, digits: &str) -> Result<bool> {
        let (table, dataset) = self.evaluated().await?;
        let filter = format!("starts_with(key, {})", quoted(digits));
        let count = Box::pin(dataset.count_rows(Some(filter))).await;
        Ok(count.map_err(|e| failed("read", &self.path.join(&table), e))? > 0)
    }

    /// The table that is asked, by name and opened.
    pub(super) async fn evaluated(&self) -> Result<(String, std::sync::Arc<Dataset>)> {
        let table = self.evaluations().await?.ok_or_else(nothing_there)?;
        let dataset = self.dataset(&table).await?.ok_or_else(nothing_there)?;
        Ok((table, dataset))
    }
}

/// The embeddings of the first two keys that begin with `digits`. Only their rows are read, not the whole column.
async fn starting_with(
    dataset: &Dataset,
    space: Space,
    digits: &str,
) -> lance::Result<BTreeMap<String, Vec<f32>>> {
    let mut scan = dataset.scan();
    scan.filter(&format!("starts_with(key, {})", quoted(digits)))?;
    scan.project(&["key"])?;
    scan.with_row_id();
    let mut rows: BTreeMap<String, u64> = BTreeMap::new();
    let mut batches = Box::pin(scan.try_into_stream()).await?;
    while let Some(batch) = batches.try_next().await? {
        let keys = batch["key"].as_string::<i32>();
        let ids = batch[ROW_ID].as_primitive::<UInt64Type>();
        for (key, id) in keys.iter().flatten().zip(ids.values()) {
            let first = rows.entry(key.to_string()).or_insert(*id);
            *first = (*first).min(*id);
        }
    }
    let mut found = BTreeMap::new();
    for (key, id) in rows.into_iter().take(2) {
        let wanted = ProjectionRequest::from_columns([space.column()], dataset.schema());
        let batch = Box::pin(dataset.take_rows(&[id], wanted)).await?;
        let vectors = batch[space.column()].as_fixed_size_list();
        if vectors.is_valid(0) {
            let vector = vectors.value(0);
            found.insert(key, vector.as_primitive::<Float32Type>().values().to_vec());
        }
    }
    Ok(found)
}

async fn nearest(
    dataset: &Dataset,
    space: Space,
    vector: &[f32],
    count: usize,
    search: Search,
) -> lance::Result<Vec<Neighbour>> {
    let probed = match search {
        Search::Fast if count <= INDEXED_NEIGHBOURS => probes(dataset, space),
        _ => None,
    };
    let found = search_one(dataset, space, vector, count, probed).await?;
    // The groups that were compared may hold fewer than all groups do.
    match probed.is_some() && found.len() < count {
        true => search_one(dataset, space, vector, count, None).await,
        false => Ok(found),
    }
}

/// The `count` nearest proxies, comparing `probed` groups of the index, or everything.
pub(super) async fn search_one(
    dataset: &Dataset,
    space: Space,
    vector: &[f32],
    count: usize,
    probed: Option<usize>,
) -> lance::Result<Vec<Neighbour>> {
    let mut scan = dataset.scan();
    scan.prefilter(true).filter("kind = 'proxy'")?;
    scan.project(&["key", "_distance"])?;
    scan.nearest(space.column(), &Float32Array::from(vector.to_vec()), count)?;
    scan.distance_metric("cosine".try_into()?);
    match probed {
        Some(probed) => scan.nprobes(probed),
        None => scan.use_index(false),
    };
    let mut batches = Box::pin(scan.try_into_stream()).await?;
    let mut found = Vec::new();
    while let Some(batch) = batches.try_next().await? {
        let keys = batch["key"].as_string::<i32>();
        let distances = batch["_distance"].as_primitive::<Float32Type>();
        let near = |i: usize| Neighbour {
            key: keys.value(i).to_string(),
            similarity: 1.0 - distances.value(i),
        };
        found.extend((0..batch.num_rows()).map(near));
    }
    Ok(found)
}

/// The cosines of `vector` with the embeddings of `rows`, by row id; rows without an embedding are left out.
async fn similarities(
    dataset: &Dataset,
    space: Space,
    vector: &[f32],
    rows: RowAddrTreeMap,
) -> lance::Result<Vec<(u64, f32)>> {
    let mut found = Vec::new();
    let length = norm(vector);
    let mut scan = dataset.scan();
    scan.with_row_id_prefilter(RowAddrMask::from_allowed(rows));
    scan.project(&[space.column()])?;
    scan.with_row_id().scan_in_order(false);
    scan.batch_size_bytes(BATCH_BYTES);
    let mut batches = Box::pin(scan.try_into_stream()).await?;
    while let Some(batch) = batches.try_next().await? {
        let ids = batch[ROW_ID].as_primitive::<UInt64Type>();
        let vectors = batch[space.column()].as_fixed_size_list();
        let width = vectors.value_length() as usize;
        let values = vectors.values().as_primitive::<Float32Type>().values();
        for (i, id) in ids.values().iter().enumerate() {
            if vectors.is_valid(i) {
                let start = vectors.value_offset(i) as usize;
                let other = &values[start..start + width];
                let lengths = (length * norm(other)).max(f32::MIN_POSITIVE);
                found.push((*id, dot(vector, other) / lengths));
            }
        }
    }
    Ok(found)
}

/// The sum of the products, in several sums side by side: one alone could only be added to in order, number by number.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sums = [0.0; LANES];
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

fn norm(a: &[f32]) -> f32 {
    dot(a, a).sqrt()
}
