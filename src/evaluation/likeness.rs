//! What proxies are to be like, as an embedding: of a picture, of a text, or of a proxy that has one already. Pictures
//! and texts are embedded by the very models that made the store's embeddings.

use std::path::{Path, PathBuf};

use candle_core::Device;

use super::embed::{ImageEmbedder, TextEmbedder};
use super::embedders::{ClipEmbedder, DinoEmbedder};
use crate::images;
use crate::models::locate;
use crate::models::reading::{clip_reader, unread};
use crate::plan::evaluators_key;
use crate::store::query::{Snapshot, Space};
use crate::{Error, Result};

/// The fewest hex digits that are taken for a key's, and the fewest of which all may be letters: "cafe" is a word.
const KEY_DIGITS: usize = 4;
const KEY_LETTERS: usize = 8;
/// What tables put behind digits that they have cut, and what people type for it.
const CUT: [&str; 2] = ["…", "..."];
/// Evaluators that are tried where no run says which there were.
const USUAL: [(&str, &str); 2] = [
    ("nano-clip", "nano-dino"),
    ("clip-vit-base-patch32", "dino-vits16"),
];

/// What proxies are to be like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Like {
    Image(PathBuf),
    /// The beginning of a proxy's key.
    Key(String),
    Text(String),
}

impl Like {
    /// What `typed` means: a file that exists, a name of a picture (an error if there is none), the first digits of a key
    /// (as tables print them; at least four, and eight if all are letters), or else a text.
    ///
    /// Errors: there is no such picture; an empty text; fewer digits than four with a sign that more follow.
    pub fn parse(typed: &str) -> Result<Self> {
        let path = Path::new(typed);
        if path.is_file() {
            return Ok(Like::Image(path.to_path_buf()));
        }
        if std::fs::metadata(path).is_ok_and(|found| !found.is_dir()) {
            return Err(Error::invalid(
                format!("{typed} is a pipe, a socket or a device, not a file"),
                "give a picture's file, the digits of a proxy's key, or a text in quotes",
            ));
        }
        if images::is_photo_name(path) {
            return Err(Error::invalid(
                format!("there is no picture {typed}"),
                "give a file, the digits of a proxy's key, or a text in quotes",
            ));
        }
        let typed = typed.trim();
        let cut = CUT.iter().find_map(|mark| typed.strip_suffix(mark));
        let digits = cut.unwrap_or(typed);
        if !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            let has_number = digits.bytes().any(|byte| byte.is_ascii_digit());
            let is_long = digits.len() >= KEY_DIGITS;
            if is_long && (has_number || cut.is_some() || digits.len() >= KEY_LETTERS) {
                return Ok(Like::Key(digits.to_ascii_lowercase()));
            }
            if cut.is_some() {
                return Err(Error::invalid(
                    format!("{digits} is too little of a key"),
                    format!("give at least {KEY_DIGITS} of its digits"),
                ));
            }
        }
        if typed.trim().is_empty() {
            return Err(Error::invalid(
                "--like is empty",
                "give a picture, the digits of a key, or a text",
            ));
        }
        Ok(Like::Text(typed.to_string()))
    }

    /// The embedding that is asked where nothing else is said: texts have one by CLIP alone.
    pub fn usual_space(&self) -> Space {
        match self {
            Like::Text(_) => Space::Clip,
            Like::Image(_) | Like::Key(_) => Space::Dino,
        }
    }

    /// The embedding in `space`.
    ///
    /// Errors: a text by DINO; an unknown key; a picture that cannot be read; models that are not here any more.
    pub async fn embedding(&self, snapshot: &Snapshot, space: Space) -> Result<Vec<f32>> {
        match (self, space) {
            (Like::Key(key), _) => snapshot.embedding(space, key).await?.ok_or_else(|| {
                Error::invalid(
                    format!("no proxy, sample or reference with an embedding has a key that begins with {key}"),
                    "the column key of the tables proxies and evaluations has all; to look for it as a text, add a word",
                )
            }),
            (Like::Text(_), Space::Dino) => Err(Error::invalid(
                "DINO has no embeddings of texts",
                "leave --by out, or give --by clip",
            )),
            (Like::Text(text), Space::Clip) => {
                let clip = ClipEmbedder::load(&models(snapshot).await?.0, &Device::Cpu)?;
                first(clip.texts(std::slice::from_ref(text))?)
            }
            (Like::Image(path), space) => {
                let image = images::load(path)?;
                let (clip, dino) = models(snapshot).await?;
                let embedder: Box<dyn ImageEmbedder> = match space {
                    Space::Clip => Box::new(ClipEmbedder::load(&clip, &Device::Cpu)?),
                    Space::Dino => Box::new(DinoEmbedder::load(&dino, &Device::Cpu)?),
                };
                first(embedder.images(&[image])?)
            }
        }
    }
}

impl Like {
    /// Words of a text that is compared by CLIP which are not read: see [`unread`].
    ///
    /// # Errors
    /// When the models are not here any more.
    pub async fn unread(&self, snapshot: &Snapshot, space: Space) -> Result<Vec<String>> {
        let (Like::Text(text), Space::Clip) = (self, space) else {
            return Ok(Vec::new());
        };
        let clip = models(snapshot).await?.0;
        let name = clip.file_name().unwrap_or_default().to_string_lossy();
        let found = unread(&name, &[clip_reader(&clip)?], &[text.as_str().into()])?;
        Ok(found.warnings)
    }
}

fn first(embeddings: Vec<Vec<f32>>) -> Result<Vec<f32>> {
    embeddings.into_iter().next().ok_or_else(|| Error::Invalid {
        what: "an embedder gave no embedding".into(),
        hint: None,
    })
}

/// The folders of CLIP and DINO that made the embeddings of `snapshot`: their digests are those of the table.
async fn models(snapshot: &Snapshot) -> Result<(PathBuf, PathBuf)> {
    let table = snapshot.evaluations().await?.unwrap_or_default();
    let digits = table.trim_start_matches("evaluations_");
    let mut named = snapshot.evaluator_names(digits).await?;
    named.extend(USUAL.map(|(clip, dino)| (clip.to_string(), dino.to_string())));
    named.dedup();
    for (clip, dino) in &named {
        let (Ok(clip), Ok(dino)) = (locate(clip), locate(dino)) else {
            continue;
        };
        if evaluators_key(&clip, &dino)?.starts_with(digits) {
            return Ok((clip, dino));
        }
    }
    let named: Vec<String> = named
        .iter()
        .map(|(clip, dino)| format!("{clip} and {dino}"))
        .collect();
    Err(Error::invalid(
        format!("the models that made the embeddings of {table} are not here"),
        format!(
            "tried: {}; start where the store's runs were started, or give the digits of a proxy's key",
            named.join("; ")
        ),
    ))
}
