//! Chosen pictures of a store as files with captions, in the layouts that other trainers read.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{Array, AsArray};
use arrow::datatypes::{Float32Type, Int64Type, UInt64Type};
use arrow::record_batch::RecordBatch;
use datafusion::sql::sqlparser::dialect::GenericDialect;
use datafusion::sql::sqlparser::tokenizer::{Token, Tokenizer};
use futures::TryStreamExt;
use futures::future::BoxFuture;
use lance::dataset::ProjectionRequest;
use serde_json::json;

use super::columns::{broken, column, maybe_text, strings, text};
use super::failure::failed;
use super::query::{Neighbour, PictureKind, Snapshot};
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

/// Which pictures, and in which order.
#[derive(Clone, Debug, Default)]
pub struct Choice {
    /// Only these subjects; all when empty.
    pub subjects: Vec<String>,
    /// Only these kinds; when empty those that the filter asks for, or else proxies.
    pub kinds: Vec<PictureKind>,
    /// SQL over the view `scored`, which knows kind, method, step and run here, too.
    pub filter: Option<String>,
    /// What follows ORDER BY; without it by likeness if there is one, else by subject, kind and number.
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

    /// The kinds that are meant.
    fn kinds(&self) -> Vec<PictureKind> {
        let says_kind = self.filter.as_deref().is_some_and(|filter| {
            let tokens = Tokenizer::new(&GenericDialect {}, filter).tokenize();
            // What is no SQL is told of when it is asked.
            tokens.unwrap_or_default().iter().any(
                |token| matches!(token, Token::Word(word) if word.value.eq_ignore_ascii_case("kind")),
            )
        });
        match (self.kinds.is_empty(), says_kind) {
            (false, _) => self.kinds.clone(),
            (true, true) => PictureKind::ALL.to_vec(),
            (true, false) => vec![PictureKind::Proxy],
        }
    }
}

/// A picture on its way out; it is still in the store itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Chosen {
    pub key: String,
    pub kind: PictureKind,
    pub subject: String,
    pub class: String,
    pub token: String,
    /// Of a proxy or reference, its number among the subject's; of a sample, the steps of what drew it.
    pub number: u64,
    pub prompt: String,
    /// None of references.
    pub seed: Option<u64>,
    /// What drew it; none of references.
    pub method: Option<String>,
    /// The run that drew it, or scored it first; none of references.
    pub run: Option<String>,
    pub clip_i: Option<f32>,
    pub clip_t: Option<f32>,
    pub dino: Option<f32>,
    /// Cosine to what it is to be like.
    pub similarity: Option<f32>,
}

impl Chosen {
    /// The name of its files, without ending: no two pictures have the same.
    fn stem(&self) -> String {
        let digits = self.key.get(..12).unwrap_or(&self.key);
        let what = match (self.kind, &self.method) {
            (PictureKind::Proxy, _) => String::new(),
            (PictureKind::Reference, _) => "reference-".to_string(),
            (PictureKind::Sample, method) => {
                format!("{}-", safe(method.as_deref().unwrap_or("sample")))
            }
        };
        format!("{}-{what}{:05}-{digits}", safe(&self.subject), self.number)
    }
}

/// The pictures of `choice`; among the proxies `near` alone, if given.
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
            (None, None) => "subject, kind, number, step, key",
        };
        let limit = choice
            .limit
            .map(|limit| format!(" LIMIT {limit}"))
            .unwrap_or_default();
        let pictures = snapshot.pictures_sql(&choice.kinds()).await?;
        let sql = format!(
            "SELECT key, kind, subject, class, token, number, prompt, seed, method, step, run, clip_i, clip_t, dino, \
             similarity FROM (SELECT scored.*, {similarity} AS similarity FROM ({pictures}) AS scored{join}) AS scored \
             WHERE {condition} ORDER BY {order}\n{limit}"
        );
        let mut chosen = Vec::new();
        for batch in snapshot.sql(&sql).await?.all().await? {
            chosen.extend(chosen_of(&batch)?);
        }
        Ok(chosen)
    })
}

/// The rows of `batch`, an answer to [`choose`].
fn chosen_of(batch: &RecordBatch) -> Result<Vec<Chosen>> {
    let text = |name| text(batch, name);
    let (key, kind, subject) = (text("key")?, text("kind")?, text("subject")?);
    let prompt = text("prompt")?;
    let maybe = |name| maybe_text(batch, name);
    let (class, token) = (maybe("class")?, maybe("token")?);
    let (method, run) = (maybe("method")?, maybe("run")?);
    let count = |name: &str, i| {
        let values = batch[name].as_primitive::<Int64Type>();
        values.is_valid(i).then(|| values.value(i) as u64)
    };
    let seed = batch["seed"].as_primitive::<UInt64Type>();
    let score = |name: &str, i| {
        let values = batch[name].as_primitive::<Float32Type>();
        values.is_valid(i).then(|| values.value(i))
    };
    let one = |i| {
        let name = kind(i);
        let kind = PictureKind::ALL
            .into_iter()
            .find(|kind| kind.name() == name)
            .ok_or_else(|| broken(format!("a picture of the kind {name:?}")))?;
        Ok(Chosen {
            key: key(i),
            kind,
            subject: subject(i),
            class: class(i).unwrap_or_default(),
            token: token(i).unwrap_or_default(),
            number: count("number", i).or(count("step", i)).unwrap_or(0),
            prompt: prompt(i),
            seed: seed.is_valid(i).then(|| seed.value(i)),
            method: method(i),
            run: run(i),
            clip_i: score("clip_i", i),
            clip_t: score("clip_t", i),
            dino: score("dino", i),
            similarity: score("similarity", i),
        })
    };
    (0..batch.num_rows()).map(one).collect()
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
        let mut rows = BTreeMap::new();
        let kinds: BTreeSet<PictureKind> = chosen.iter().map(|one| one.kind).collect();
        for kind in kinds {
            if let Some(found) = self.picture_rows(kind).await? {
                rows.insert(kind, found);
            }
        }
        let gone = || broken("a chosen picture is not in the store any more".into());
        for (place, part) in chosen.chunks(AT_ONCE).enumerate() {
            let mut pictures: Vec<Option<Vec<u8>>> = vec![None; part.len()];
            for (kind, (path, dataset, ids)) in &rows {
                let own = part.iter().enumerate().filter(|(_, one)| one.kind == *kind);
                let (places, keys): (Vec<usize>, Vec<&String>) =
                    own.map(|(place, one)| (place, &one.key)).unzip();
                let wanted: Option<Vec<u64>> =
                    keys.into_iter().map(|key| ids.get(key).copied()).collect();
                let wanted = wanted.ok_or_else(gone)?;
                if wanted.is_empty() {
                    continue;
                }
                let columns = ProjectionRequest::from_columns(["image"], dataset.schema());
                let taken = Box::pin(dataset.take_rows(&wanted, columns)).await;
                let batch = taken.map_err(|e| failed("read", path, e))?;
                let images: &arrow::array::LargeBinaryArray = column(&batch, "image")?;
                for (i, place) in places.into_iter().enumerate().take(images.len()) {
                    pictures[place] = images.is_valid(i).then(|| images.value(i).to_vec());
                }
            }
            for (i, picture) in pictures.into_iter().enumerate() {
                take(place * AT_ONCE + i, &picture.ok_or_else(gone)?)?;
            }
        }
        Ok(())
    }

    /// The table of the pictures of `kind`, with its path, and Lance's ids of its rows by their keys.
    async fn picture_rows(&self, kind: PictureKind) -> Result<Option<PictureRows>> {
        let Some(table) = self.table_of(kind).await? else {
            return Ok(None);
        };
        let path = self.path().join(format!("{table}.lance"));
        let Some(dataset) = self.dataset(&table).await? else {
            return Ok(None);
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
        Ok(Some((path, dataset, rows)))
    }
}

/// A table's path, the table, and ids of rows by their keys.
type PictureRows = (PathBuf, Arc<lance::Dataset>, HashMap<String, u64>);

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
        "seed": one.seed.map(|seed| seed.to_string()),
        "clip_i": score(one.clip_i),
        "clip_t": score(one.clip_t),
        "dino": score(one.dino),
        "key": one.key,
        "kind": one.kind.name(),
        "method": one.method,
        "step": (one.kind == PictureKind::Sample).then_some(one.number),
        "run": one.run,
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

/// Bytes of a name that become part of a file's: systems limit that to 255.
const NAME: usize = 80;

/// `name` as a part of a file's name: it leads nowhere else, and is not hidden.
fn safe(name: &str) -> String {
    let mut safe: String = name
        .chars()
        .map(|c| match c {
            '/' | '\\' | ':' | '*' | '?' | '"' | '<' | '>' | '|' => '_',
            c if c.is_control() => '_',
            c => c,
        })
        .collect();
    if safe.starts_with('.') || safe.is_empty() {
        safe.insert(0, '_');
    }
    safe.truncate(safe.floor_char_boundary(NAME));
    safe
}
