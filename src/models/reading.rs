//! Which words of a prompt a model reads. What is beyond the length of its text encoder is cut off, and a vocabulary of
//! whole words lacks most words. Known from the tokenizers alone, before any weights are opened.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::tokenizer::TextTokenizer;
use super::{chameleon, clip};
use crate::config::prompts;
use crate::files::read_json;
use crate::{Error, Result};

/// A text for a model to read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    pub text: String,
    /// Where the subject's token stands in it, for the first time.
    pub token: Option<Range<usize>>,
}

impl Prompt {
    /// The prompt of `template` for a subject: see [`prompts::fill`].
    pub fn of(template: &str, token: &str, class: &str) -> Self {
        let place = template.find("{token}").map(|at| {
            let start = prompts::fill(&template[..at], token, class).len();
            start..start + token.len()
        });
        Self {
            text: prompts::fill(template, token, class),
            token: place,
        }
    }
}

impl From<&str> for Prompt {
    fn from(text: &str) -> Self {
        Self {
            text: text.to_string(),
            token: None,
        }
    }
}

/// What frames a text.
enum Frame {
    /// The tokenizer's own special tokens.
    Special,
    /// Lumina-mGPT's request, which is never cut: a longer one is refused.
    Request(chameleon::Format),
}

/// A text encoder, as far as it decides what is read.
pub struct TextReader {
    /// What reports call it, such as "CLIP".
    name: &'static str,
    tokenizer: TextTokenizer,
    /// Tokens that it takes, with those of the frame that are the tokenizer's.
    length: usize,
    frame: Frame,
}

impl TextReader {
    /// The readers of text encoders: what reports call each, its tokenizer's folder, and the tokens that it takes.
    ///
    /// # Errors
    /// When a tokenizer is missing or damaged.
    pub fn of_encoders(
        encoders: impl IntoIterator<Item = (&'static str, PathBuf, usize)>,
    ) -> Result<Vec<Self>> {
        let readers = encoders.into_iter().map(|(name, folder, length)| {
            Ok(Self {
                name,
                tokenizer: TextTokenizer::from_folder(&folder)?,
                length,
                frame: Frame::Special,
            })
        });
        readers.collect()
    }

    /// The reader of Lumina-mGPT's requests, as many `positions` as the model has; for learning, which takes a few more,
    /// or for drawing alone.
    ///
    /// # Errors
    /// When an image takes all positions.
    pub fn of_requests(
        (tokenizer, format, positions): (TextTokenizer, chameleon::Format, usize),
        learns: bool,
    ) -> Result<Vec<Self>> {
        let length = positions.saturating_sub(format.tokens_beside_words(learns));
        if length == 0 {
            return Err(Error::invalid(
                format!(
                    "an image of {} pixels takes all {positions} positions of the model",
                    format.side()
                ),
                "choose a smaller resolution",
            ));
        }
        Ok(vec![Self {
            name: "Chameleon",
            tokenizer,
            length,
            frame: Frame::Request(format),
        }])
    }

    /// Where in `text` the words begin that are not read.
    fn cut_at(&self, text: &str) -> Result<Option<usize>> {
        match &self.frame {
            Frame::Special => self.tokenizer.cut_at(text, self.length),
            Frame::Request(format) => {
                let request = format.request(text);
                let before = request.len() - text.len();
                let cut = self.tokenizer.plain_cut_at(&request, self.length)?;
                Ok(cut.map(|at| at.saturating_sub(before)))
            }
        }
    }
}

/// The reader of texts of the CLIP in `dir`.
pub fn clip_reader(dir: &Path) -> Result<TextReader> {
    let config: clip::Config = read_json(&dir.join("config.json"))?;
    Ok(TextReader {
        name: "CLIP",
        tokenizer: TextTokenizer::from_folder(dir)?,
        length: config.text_config.max_position_embeddings,
        frame: Frame::Special,
    })
}

/// What is not read of some prompts.
#[derive(Debug, Default)]
pub struct Unread {
    /// Words that are cut off or unknown.
    pub warnings: Vec<String>,
    /// Prompts that lose their subject's token, or that are refused.
    pub faults: Vec<Error>,
}

/// Prompts of a kind that are told one by one.
const MOST_PROMPTS: usize = 5;
/// Unknown words that are told.
const MOST_WORDS: usize = 40;

/// What `readers`, all those of the model that reports call `model`, do not read of `prompts`.
///
/// # Errors
/// When a prompt cannot be tokenized.
pub fn unread(model: &str, readers: &[TextReader], prompts: &[Prompt]) -> Result<Unread> {
    let mut found = Unread::default();
    let start = |prompt: &Prompt| prompt.token.as_ref().map(|token| token.start);
    let distinct: BTreeMap<(&str, Option<usize>), &Prompt> = prompts
        .iter()
        .map(|prompt| ((prompt.text.as_str(), start(prompt)), prompt))
        .collect();
    for reader in readers {
        let name = format!("{} of {model}", reader.name);
        let mut cut = Vec::new();
        let mut unknown: Vec<String> = Vec::new();
        for prompt in distinct.values() {
            let words = reader.tokenizer.unknown_words(&prompt.text)?;
            unknown.extend(
                words
                    .into_iter()
                    .filter(|word| !unknown.contains(word))
                    .collect::<Vec<_>>(),
            );
            if let Some(at) = reader.cut_at(&prompt.text)? {
                cut.push((&prompt.text, at));
            }
        }
        for (text, at) in cut.iter().take(MOST_PROMPTS) {
            let what = format!(
                "{:?} is longer than the {} tokens that {name} takes: {:?} is cut off",
                beginning(text, 80),
                reader.length,
                beginning(&text[*at..], 400)
            );
            match reader.frame {
                Frame::Special => found.warnings.push(what),
                Frame::Request(_) => found.faults.push(too_long(&what)),
            }
        }
        if let Some(more @ 1..) = cut.len().checked_sub(MOST_PROMPTS) {
            found.warnings.push(format!(
                "{more} more prompts are longer than {name} takes, and cut off"
            ));
        }
        if !unknown.is_empty() {
            let more = unknown.len().saturating_sub(MOST_WORDS);
            unknown.truncate(MOST_WORDS);
            let mut words = unknown.join(", ");
            if more > 0 {
                words += &format!(" and {more} more");
            }
            found
                .warnings
                .push(format!("{name} does not know these words: {words}"));
        }
    }
    for prompt in distinct.values() {
        if let Some(token) = &prompt.token
            && !readers.is_empty()
            && is_lost(readers, &prompt.text, token)?
            && found.faults.len() < MOST_PROMPTS
        {
            found.faults.push(too_long(&format!(
                "the subject's token {:?} is cut off from {:?}: {model} does not read so far",
                &prompt.text[token.clone()],
                beginning(&prompt.text, 400)
            )));
        }
    }
    Ok(found)
}

/// The first `most` characters of `text`.
fn beginning(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_string(),
    }
}

fn too_long(what: &str) -> Error {
    Error::invalid(
        what,
        "make the prompt shorter, with {token} near its beginning",
    )
}

/// Whether no reader reads the whole token.
fn is_lost(readers: &[TextReader], text: &str, token: &Range<usize>) -> Result<bool> {
    for reader in readers {
        if reader.cut_at(text)?.is_none_or(|at| at >= token.end) {
            return Ok(false);
        }
    }
    Ok(true)
}
