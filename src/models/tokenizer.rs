//! Text to token ids, by a `tokenizer.json` of Hugging Face's tokenizers, or by CLIP's `vocab.json` and `merges.txt`.

use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::sync::Once;

use candle_core::{Device, Tensor};
use serde::Deserialize;
use serde_json::Value;
use tokenizers::{PostProcessor, Tokenizer, TruncationDirection};

use super::clip_tokenizer;
use crate::{Error, Result};

/// The ids of one text, and which of them are not padding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// As many ids as asked for, padding on the right.
    pub ids: Vec<u32>,
    /// 1 for each id of the text, 0 for padding.
    pub mask: Vec<u32>,
}

/// A tokenizer. Which tokens open and close a text (CLIP's start and end, T5's `</s>`) is the file's own affair.
#[derive(Clone)]
pub struct TextTokenizer {
    tokenizer: Tokenizer,
    unknown: Option<u32>,
}

/// What a `tokenizer.json` says of words that it does not know.
#[derive(Deserialize)]
struct Described {
    model: DescribedModel,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct DescribedModel {
    unk_token: Value,
    unk_id: Value,
}

impl TextTokenizer {
    /// Reads the tokenizer in `folder`: `tokenizer.json`, or else CLIP's `vocab.json` and `merges.txt`.
    ///
    /// # Errors
    /// When neither is there, or a file is not what its name says.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let whole = folder.join("tokenizer.json");
        let parts = ["vocab.json", "merges.txt"].map(|name| folder.join(name));
        if whole.is_file() {
            return Self::from_file(&whole);
        }
        if parts.iter().all(|part| part.is_file()) {
            let described = clip_tokenizer::describe(folder)?.to_string();
            return Self::from_json(described.as_bytes(), &parts[0]);
        }
        let sentencepiece = folder.join("spiece.model").is_file();
        let beside = if sentencepiece {
            "; spiece.model alone is not read: take tokenizer.json from where it comes from"
        } else {
            ""
        };
        Err(Error::Checkpoint {
            path: folder.to_path_buf(),
            faults: vec![format!(
                "neither tokenizer.json nor vocab.json with merges.txt is there{beside}"
            )],
        })
    }

    /// Reads a `tokenizer.json`. Truncation and padding written in it are dropped: both are arguments of
    /// [`TextTokenizer::encode`].
    pub fn from_file(path: &Path) -> Result<Self> {
        Self::from_json(
            &crate::files::read(path, crate::files::LISTS).map_err(Error::io(path))?,
            path,
        )
    }

    fn from_json(text: &[u8], path: &Path) -> Result<Self> {
        let fault = |what: String| Error::Checkpoint {
            path: path.to_path_buf(),
            faults: vec![format!("not a tokenizer: {what}")],
        };
        let Described { model } = serde_json::from_slice(text).map_err(|e| fault(e.to_string()))?;
        let mut tokenizer = guarded(|| Tokenizer::from_bytes(text)).map_err(fault)?;
        tokenizer
            .with_truncation(None)
            .map_err(|e| fault(e.to_string()))?;
        tokenizer.with_padding(None);
        // A word that it does not know may be an error to it; what it adds around a text may not.
        guarded(|| Ok(tokenizer.encode("a", true).is_ok())).map_err(fault)?;
        let unknown = match model.unk_token.as_str() {
            Some(token) => tokenizer.token_to_id(token),
            None => model.unk_id.as_u64().and_then(|id| id.try_into().ok()),
        };
        Ok(Self { tokenizer, unknown })
    }

    /// The ids of `text`, its words cut so that with the special tokens they are at most `max_length`.
    pub fn ids(&self, text: &str, max_length: usize) -> Result<Vec<u32>> {
        let failed = |e: String| {
            Error::invalid(
                format!("text {text:?} cannot be tokenized: {e}"),
                "use a plainer text",
            )
        };
        let special = self.special();
        if max_length < special.max(1) {
            return Err(Error::invalid(
                format!("a text length of {max_length} tokens"),
                format!("{special} of them are special tokens"),
            ));
        }
        let mut encoding = self.encoding(text)?;
        encoding.truncate(max_length - special, 0, TruncationDirection::Right);
        let encoding = guarded(|| self.tokenizer.post_process(encoding, None, true));
        let encoding = encoding.map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The ids of `text` alone: nothing is added before or after, and nothing is cut.
    pub fn plain_ids(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.encoding(text)?.get_ids().to_vec())
    }

    /// Where in `text` the words begin of which [`TextTokenizer::ids`] cuts off anything: the byte of the first one.
    pub fn cut_at(&self, text: &str, max_length: usize) -> Result<Option<usize>> {
        self.plain_cut_at(text, max_length.saturating_sub(self.special()))
    }

    /// Where in `text` the words begin that are not wholly among its first `length` tokens: the byte of the first one.
    pub fn plain_cut_at(&self, text: &str, length: usize) -> Result<Option<usize>> {
        let encoding = self.encoding(text)?;
        let Some(&(start, _)) = encoding.get_offsets().get(length) else {
            return Ok(None);
        };
        let start = (0..=start.min(text.len()))
            .rev()
            .find(|at| text.is_char_boundary(*at))
            .unwrap_or(0);
        // A token may begin with the space before its word, or in the middle of a word.
        let rest = &text[start..];
        let start = start + (rest.len() - rest.trim_start().len());
        let of_word = text[..start]
            .char_indices()
            .rev()
            .take_while(|(_, c)| !c.is_whitespace())
            .last();
        Ok(Some(of_word.map_or(start, |(at, _)| at)))
    }

    /// How many tokens the tokenizer adds to a text.
    fn special(&self) -> usize {
        let processor = self.tokenizer.get_post_processor();
        processor.map_or(0, |processor| processor.added_tokens(false))
    }

    /// The tokens of `text` alone.
    fn encoding(&self, text: &str) -> Result<tokenizers::Encoding> {
        guarded(|| self.tokenizer.encode(text, false)).map_err(|e| {
            Error::invalid(
                format!("text {text:?} cannot be tokenized: {e}"),
                "use a plainer text",
            )
        })
    }

    /// [`TextTokenizer::ids`], padded on the right with `padding` to exactly `max_length`.
    pub fn encode(&self, text: &str, max_length: usize, padding: u32) -> Result<Encoded> {
        let mut ids = self.ids(text, max_length)?;
        let mut mask = vec![1; ids.len()];
        ids.resize(max_length, padding);
        mask.resize(max_length, 0);
        Ok(Encoded { ids, mask })
    }

    /// [`TextTokenizer::encode`] for several texts: ids and mask, both (b, max_length) of u32.
    pub fn encode_batch(
        &self,
        texts: &[String],
        max_length: usize,
        padding: u32,
        device: &Device,
    ) -> Result<(Tensor, Tensor)> {
        let (mut ids, mut mask) = (Vec::new(), Vec::new());
        for text in texts {
            let encoded = self.encode(text, max_length, padding)?;
            ids.extend(encoded.ids);
            mask.extend(encoded.mask);
        }
        let shape = (texts.len(), max_length);
        Ok((
            Tensor::from_vec(ids, shape, device)?,
            Tensor::from_vec(mask, shape, device)?,
        ))
    }

    /// The id of `token`, if the vocabulary has it.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// Number of tokens, special ones included.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// The parts of `text` that the vocabulary has no token for, in their order, each once.
    pub fn unknown_words(&self, text: &str) -> Result<Vec<String>> {
        let Some(unknown) = self.unknown else {
            return Ok(Vec::new());
        };
        let encoding = self.encoding(text)?;
        let mut words: Vec<String> = Vec::new();
        for (&id, &(start, end)) in encoding.get_ids().iter().zip(encoding.get_offsets()) {
            let word = text.get(start..end).unwrap_or_default().trim();
            if id == unknown && !word.is_empty() && !words.iter().any(|known| known == word) {
                words.push(word.to_string());
            }
        }
        Ok(words)
    }
}

thread_local! {
    /// Whether a panic of this thread is caught and told as an error.
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// What `work` comes to; a panic in it is an error, and nothing is printed. The tokenizers panic at parts of a
/// `tokenizer.json` that contradict one another: a template with a token that it does not define, a damaged table of
/// characters.
fn guarded<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let told = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            if !GUARDED.get() {
                told(panic);
            }
        }));
    });
    GUARDED.set(true);
    let done = panic::catch_unwind(AssertUnwindSafe(work));
    GUARDED.set(false);
    match done {
        Ok(done) => done.map_err(|e| e.to_string()),
        Err(_) => Err("its parts contradict one another".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word_level() -> (tempfile::TempDir, TextTokenizer) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tokenizer.json");
        let json = serde_json::json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": [],
            "normalizer": {"type": "Lowercase"},
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
                "pair": [],
                "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}
            },
            "decoder": null,
            "model": {
                "type": "WordLevel",
                "vocab": {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "dog": 4, "in": 5},
                "unk_token": "<unk>"
            }
        });
        std::fs::write(&path, json.to_string()).unwrap();
        let tokenizer = TextTokenizer::from_file(&path).unwrap();
        (directory, tokenizer)
    }

    /// Each of these is a panic in the tokenizers.
    #[test]
    fn a_tokenizer_that_contradicts_itself_is_refused() {
        let (directory, _) = word_level();
        let path = directory.path().join("tokenizer.json");
        let right = std::fs::read_to_string(&path).unwrap();
        for (part, other) in [
            (r#"{"</s>":{"id""#, r#"{"</t>":{"id""#),
            (r#"{"Sequence":{"id":"A""#, r#"{"Sequence":{"id":"B""#),
            (r#""decoder":null"#, r#""decoder":nul"#),
            (
                r#"{"type":"Lowercase"}"#,
                r#"{"type":"Precompiled","precompiled_charsmap":"AAA"}"#,
            ),
        ] {
            assert!(right.contains(part), "{part} is not in {right}");
            std::fs::write(&path, right.replace(part, other)).unwrap();
            let error = TextTokenizer::from_file(&path).err().unwrap();
            assert!(error.to_string().contains("not a tokenizer"), "{error}");
        }
    }

    #[test]
    fn a_text_is_padded_to_its_length_and_keeps_its_end_token_when_cut() {
        let (_directory, tokenizer) = word_level();
        let padded = tokenizer.encode("A dog", 5, 0).unwrap();
        assert_eq!(padded.ids, [3, 4, 1, 0, 0]);
        assert_eq!(padded.mask, [1, 1, 1, 0, 0]);
        let cut = tokenizer.encode("a dog in a dog", 3, 0).unwrap();
        assert_eq!(cut.ids, [3, 4, 1]);
        assert_eq!(tokenizer.ids("a dog", 5).unwrap(), [3, 4, 1]);
        assert!(tokenizer.encode("a", 0, 0).is_err());
    }

    #[test]
    fn words_that_are_cut_are_known_by_where_the_first_begins() {
        let (_directory, tokenizer) = word_level();
        // The end token takes one of the places.
        let text = "a dog in  a dog, in a";
        for (length, words) in [(3, "in  a dog, in a"), (4, "a dog, in a"), (6, "dog, in a")] {
            let at = tokenizer.cut_at(text, length).unwrap().unwrap();
            assert_eq!(&text[at..], words, "{length}");
        }
        assert_eq!(tokenizer.cut_at(text, 9).unwrap(), None);
        assert_eq!(tokenizer.cut_at("", 1).unwrap(), None);
    }

    #[test]
    fn words_without_a_token_are_named_once() {
        let (_directory, tokenizer) = word_level();
        let words = tokenizer
            .unknown_words("a Zebra in zürich, a Zebra")
            .unwrap();
        assert_eq!(words, ["Zebra", "zürich", ","]);
    }

    #[test]
    fn a_file_that_is_no_tokenizer_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tokenizer.json");
        std::fs::write(&path, "{}").unwrap();
        let error = TextTokenizer::from_file(&path).err().unwrap();
        assert!(error.to_string().contains("tokenizer.json"), "{error}");
    }
}
