//! Chosen proxies as files: pictures with captions, in the layouts that other trainers read.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{Array, AsArray};
use arrow::datatypes::{Float32Type, Int64Type, UInt64Type};
use futures::TryStreamExt;
use futures::future::BoxFuture;
use lance::dataset::ProjectionRequest;
use serde_json::json;

use super::columns::{broken, column, strings, text};
use super::failure::failed;
use super::query::{Neighbour, Snapshot};
use super::quoted;
use crate::{Error, Result, files};

/// Pictures in memory at once.
const AT_ONCE: usize = 32;

/// Where a trainer looks for pictures and captions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Layout {
    /// A folder `REPEATS_TOKEN CLASS` for each subject, a .txt beside each picture
    Kohya,
    /// A folder for each subject, a .txt beside each picture
    AiToolkit,
    /// Hugging Face: one folder with metadata.jsonl
    Imagefolder,
}

/// Which proxies, and in which order.
#[derive(Clone, Debug, Default)]
pub struct Choice {
    /// Only these subjects; all when empty.
    pub subjects: Vec<String>,
    /// SQL over the view `scored`.
    pub filter: Option<String>,
    /// What follows ORDER BY; without it by likeness if there is one, else by subject and number.
    pub order: Option<String>,
    pub limit: Option<usize>,
}

impl Choice {
    /// The subjects and the filter as one condition; none when every proxy is meant.
    pub fn condition(&self) -> Option<String> {
        let mut parts = Vec::new();
        if !self.subjects.is_empty() {
            let names: Vec<String> = self.subjects.iter().map(|name| quoted(name)).collect();
            parts.push(format!("subject IN ({})", names.join(", ")));
        }
        // On a line of its own: a comment in it must not swallow the bracket.
        parts.extend(self.filter.iter().map(|filter| format!("(\n{filter}\n)")));
        (!parts.is_empty()).then(|| parts.join(" AND "))
    }
}

/// A proxy on its way out; its picture is still in the store.
#[derive(Clone, Debug, PartialEq)]
pub struct Chosen {
    pub key: String,
    pub subject: String,
    pub class: String,
    pub token: String,
    pub number: u64,
    pub prompt: String,
    pub seed: u64,
    pub width: u32,
    pub height: u32,
    pub clip_i: Option<f32>,
    pub clip_t: Option<f32>,
    pub dino: Option<f32>,
    /// Cosine to what it is to be like.
    pub similarity: Option<f32>,
}

impl Chosen {
    /// The name of its files, without ending: no two proxies have the same.
    fn stem(&self) -> String {
        let digits = self.key.get(..12).unwrap_or(&self.key);
        format!("{}-{:05}-{digits}", safe(&self.subject), self.number)
    }
}

/// The proxies of `choice`; among `near` alone, if given.
///
/// Errors: a condition or an order that cannot be understood; files that cannot be read.
pub fn choose<'a>(
    snapshot: &'a Snapshot,
    choice: &'a Choice,
    near: Option<&'a [Neighbour]>,
) -> BoxFuture<'a, Result<Vec<Chosen>>> {
    Box::pin(async move {
        let (mut similarity, mut join) = ("CAST(NULL AS REAL)", "");
        if let Some(near) = near {
            snapshot.add_neighbours(near)?;
            (similarity, join) = ("near.similarity", " JOIN near ON near.key = scored.key");
        }
        let condition = choice.condition().unwrap_or_else(|| "true".into());
        let order = match (&choice.order, near) {
            (Some(order), _) => order.as_str(),
            (None, Some(_)) => "similarity DESC, key",
            (None, None) => "subject, number, key",
        };
        let limit = choice
            .limit
            .map(|limit| format!(" LIMIT {limit}"))
            .unwrap_or_default();
        let sql = format!(
            "SELECT key, subject, class, token, number, prompt, seed, width, height, clip_i, clip_t, dino, similarity \
             FROM (SELECT scored.*, {similarity} AS similarity FROM scored{join}) AS scored \
             WHERE {condition} ORDER BY {order}\n{limit}"
        );
        let mut chosen = Vec::new();
        for batch in snapshot.sql(&sql).await?.all().await? {
            let text = |name| text(&batch, name);
            let (key, subject, class) = (text("key")?, text("subject")?, text("class")?);
            let (token, prompt) = (text("token")?, text("prompt")?);
            let count = |name: &str, i| batch[name].as_primitive::<Int64Type>().value(i) as u64;
            let seed = batch["seed"].as_primitive::<UInt64Type>();
            let score = |name: &str, i| {
                let values = batch[name].as_primitive::<Float32Type>();
                values.is_valid(i).then(|| values.value(i))
            };
            for i in 0..batch.num_rows() {
                chosen.push(Chosen {
                    key: key(i),
                    subject: subject(i),
                    class: class(i),
                    token: token(i),
                    number: count("number", i),
                    prompt: prompt(i),
                    seed: seed.value(i),
                    width: count("width", i) as u32,
                    height: count("height", i) as u32,
                    clip_i: score("clip_i", i),
                    clip_t: score("clip_t", i),
                    dino: score("dino", i),
                    similarity: score("similarity", i),
                });
            }
        }
        Ok(chosen)
    })
}

impl Snapshot {
    /// Makes `near` the table `near`, with the columns key and similarity, for queries.
    ///
    /// Errors: there is one already.
    pub fn add_neighbours(&self, near: &[Neighbour]) -> Result<()> {
        use arrow::array::Float32Array;
        use arrow::datatypes::{DataType, Field, Schema};
        let schema = Arc::new(Schema::new(vec![
            Field::new("key", DataType::Utf8, false),
            Field::new("similarity", DataType::Float32, false),
        ]));
        let similarity = Float32Array::from_iter_values(near.iter().map(|near| near.similarity));
        let columns = vec![
            strings(near.iter().map(|near| near.key.as_str())),
            Arc::new(similarity) as _,
        ];
        self.add_table("near", super::columns::batch(&schema, columns)?)
    }

    /// Calls `take` with the position and the encoded picture of each of `chosen`, in their order; few are in memory at
    /// once.
    ///
    /// Errors: those of `take`; a row that was deleted meanwhile; files that cannot be read.
    pub async fn pictures(
        &self,
        chosen: &[Chosen],
        mut take: impl FnMut(usize, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let path = self.path().join("proxies.lance");
        let Some(dataset) = self.dataset("proxies").await? else {
            return Ok(());
        };
        let failed = |e| failed("read", &path, e);
        let mut rows: HashMap<String, u64> = HashMap::new();
        let mut scan = dataset.scan();
        scan.with_row_id();
        scan.project(&["key"]).map_err(failed)?;
        let mut batches = Box::pin(scan.try_into_stream()).await.map_err(failed)?;
        while let Some(batch) = batches.try_next().await.map_err(failed)? {
            let key = text(&batch, "key")?;
            let ids = batch["_rowid"].as_primitive::<UInt64Type>();
            for (i, id) in ids.values().iter().enumerate() {
                let first = rows.entry(key(i)).or_insert(*id);
                *first = (*first).min(*id);
            }
        }
        for (place, part) in chosen.chunks(AT_ONCE).enumerate() {
            let ids: Option<Vec<u64>> =
                part.iter().map(|one| rows.get(&one.key).copied()).collect();
            let ids =
                ids.ok_or_else(|| broken("a chosen proxy is not in the store any more".into()))?;
            let wanted = ProjectionRequest::from_columns(["image"], dataset.schema());
            let batch = Box::pin(dataset.take_rows(&ids, wanted))
                .await
                .map_err(failed)?;
            let images: &arrow::array::LargeBinaryArray = column(&batch, "image")?;
            if batch.num_rows() != part.len() {
                return Err(broken("a chosen proxy is not in the store any more".into()));
            }
            for i in 0..part.len() {
                take(place * AT_ONCE + i, images.value(i))?;
            }
        }
        Ok(())
    }
}

/// Writes `chosen` as the folder `dir`, wholly or not at all, in the layout of a trainer; kohya's folders tell it to
/// repeat each picture `repeats` times an epoch.
///
/// Errors: `dir` is there already; those of [`Snapshot::pictures`]; a full disk.
pub fn export<'a>(
    snapshot: &'a Snapshot,
    chosen: &'a [Chosen],
    layout: Layout,
    repeats: usize,
    dir: &'a Path,
) -> BoxFuture<'a, Result<()>> {
    Box::pin(async move {
        refuse_existing(dir)?;
        let aside = fresh_aside(dir)?;
        let written = fill(snapshot, chosen, layout, repeats, &aside).await;
        let moved = written.and_then(|()| {
            // Once more: it may have come into being meanwhile. Renaming replaces an empty folder at most.
            refuse_existing(dir)?;
            fs::rename(&aside, dir).map_err(Error::io(dir))
        });
        if moved.is_err() {
            // What failed is told; that its remains cannot be removed either is of no use to anyone.
            let _ = fs::remove_dir_all(&aside);
        }
        moved
    })
}

async fn fill(
    snapshot: &Snapshot,
    chosen: &[Chosen],
    layout: Layout,
    repeats: usize,
    dir: &Path,
) -> Result<()> {
    let mut index = String::new();
    let mut folders: Vec<PathBuf> = vec![dir.to_path_buf()];
    snapshot
        .pictures(chosen, |i, picture| {
            let one = &chosen[i];
            let folder = match layout {
                Layout::Kohya => dir.join(format!(
                    "{repeats}_{} {}",
                    safe(&one.token),
                    safe(&one.class)
                )),
                Layout::AiToolkit => dir.join(safe(&one.subject)),
                Layout::Imagefolder => dir.to_path_buf(),
            };
            if !folders.contains(&folder) {
                files::create_dir(&folder)?;
                folders.push(folder.clone());
            }
            let file = folder.join(format!("{}.png", one.stem()));
            fs::write(&file, picture).map_err(Error::io(&file))?;
            match layout {
                Layout::Kohya | Layout::AiToolkit => {
                    let caption = file.with_extension("txt");
                    fs::write(&caption, &one.prompt).map_err(Error::io(&caption))
                }
                Layout::Imagefolder => {
                    index += &metadata(one);
                    index.push('\n');
                    Ok(())
                }
            }
        })
        .await?;
    if layout == Layout::Imagefolder {
        files::write(&dir.join("metadata.jsonl"), index.as_bytes())?;
    }
    for folder in folders {
        fs::File::open(&folder)
            .and_then(|opened| opened.sync_all())
            .map_err(Error::io(&folder))?;
    }
    Ok(())
}

/// The line of `metadata.jsonl` for `one`: `file_name` and `text` as the library wants them, and what else is known.
fn metadata(one: &Chosen) -> String {
    // Six places are all that a score in f32 has.
    let score = |score: Option<f32>| score.map(|score| (f64::from(score) * 1e6).round() / 1e6);
    json!({
        "file_name": format!("{}.png", one.stem()),
        "text": one.prompt,
        "subject": one.subject,
        "class": one.class,
        "token": one.token,
        // As text: readers that take numbers for floats would round it.
        "seed": one.seed.to_string(),
        "clip_i": score(one.clip_i),
        "clip_t": score(one.clip_t),
        "dino": score(one.dino),
        "key": one.key,
    })
    .to_string()
}

/// Nothing is replaced.
///
/// Errors: something is at `path`.
pub fn refuse_existing(path: &Path) -> Result<()> {
    match path.symlink_metadata() {
        Ok(_) => Err(Error::invalid(
            format!("{} is there already", path.display()),
            "choose another name, or remove it first",
        )),
        Err(_) => Ok(()),
    }
}

/// A new folder beside `dir`, hidden, on the same disk.
fn fresh_aside(dir: &Path) -> Result<PathBuf> {
    if dir.file_name().is_none() {
        return Err(Error::invalid(
            format!("{} names no folder", dir.display()),
            "end it with a name",
        ));
    }
    let aside = files::aside(dir);
    if aside.exists() {
        fs::remove_dir_all(&aside).map_err(Error::io(&aside))?;
    }
    files::create_dir(&aside)?;
    Ok(aside)
}

/// `name` as a part of a file's name.
fn safe(name: &str) -> String {
    name.chars()
        .map(|c| match c {
            '/' | '\\' | ':' | '*' | '?' | '"' | '<' | '>' | '|' => '_',
            c if c.is_control() => '_',
            c => c,
        })
        .collect()
}
