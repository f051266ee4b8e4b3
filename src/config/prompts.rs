//! Prompt templates and the lists that pipelines name; the rare words that stand for subjects.

use serde::{Serialize, Serializer};

/// The prompts of an evaluation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PromptList {
    /// DreamBooth's 25 prompts for objects or for live subjects, by class.
    DreamBooth,
    /// The first ten of DreamBooth's prompts, which objects and live subjects share and nano models know.
    Nano10,
    /// These templates.
    Listed(Vec<String>),
}

impl PromptList {
    /// The templates for a subject of this class, with `{token}` and `{class}` in them.
    pub fn templates(&self, class: &str) -> Vec<String> {
        let shipped = match self {
            PromptList::DreamBooth if LIVE_CLASSES.contains(&class) => LIVE,
            PromptList::DreamBooth => OBJECT,
            PromptList::Nano10 => NANO_10,
            PromptList::Listed(templates) => return templates.clone(),
        };
        lines(shipped)
            .map(|(_, template)| template.to_string())
            .collect()
    }

    /// The name a pipeline file gives to a list that ships.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "dreambooth" => Some(PromptList::DreamBooth),
            "nano-10" => Some(PromptList::Nano10),
            _ => None,
        }
    }
}

impl Serialize for PromptList {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            PromptList::DreamBooth => serializer.serialize_str("dreambooth"),
            PromptList::Nano10 => serializer.serialize_str("nano-10"),
            PromptList::Listed(templates) => templates.serialize(serializer),
        }
    }
}

/// The templates in the text of a prompt file, each with its line, from 1. Empty lines and lines that begin with `#`
/// do not count.
pub fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let numbered = text.lines().enumerate();
    numbered
        .map(|(index, line)| (index + 1, line.trim()))
        .filter(|(_, template)| !template.is_empty() && !template.starts_with('#'))
}

/// The prompt of a template: `{token}` and `{class}` replaced.
pub fn fill(template: &str, token: &str, class: &str) -> String {
    template.replace("{token}", token).replace("{class}", class)
}

/// The prompt without the subject's token, as CLIP-T reads it: "a dog in the jungle".
pub fn fill_without_token(template: &str, class: &str) -> String {
    let filled = without_token(&template.replace("{class}", class), "{token}");
    // What is left of it is part of a word.
    let filled = filled.replace("{token}", " ");
    filled.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// `text` without `token`, in whatever case: "a dog on the beach" of "a sks dog on the beach". The token may be spelt in
/// any characters (`<new1>`, `[V]`); punctuation between it and other words goes with it ("a sks-dog"), and so does the
/// 's after it.
pub fn without_token(text: &str, token: &str) -> String {
    let token = token.to_lowercase();
    let kept = |word: &str| -> Option<String> {
        let small = word.to_lowercase();
        let is_letter = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
        // A letter beside it: it is part of another word.
        let is_own = |(at, _): &(usize, &str)| {
            let (before, after) = (&small[..*at], &small[at + token.len()..]);
            !is_letter(before.chars().next_back()) && !is_letter(after.chars().next())
        };
        let Some((at, _)) = small.match_indices(&token).find(is_own) else {
            return Some(word.to_string());
        };
        // Where small letters take other numbers of bytes, the word is kept in them.
        let word = if small.len() == word.len() && word.is_char_boundary(at) {
            word
        } else {
            &small
        };
        let (before, after) = (word.get(..at)?, word.get(at + token.len()..)?);
        let owned = ["'s", "\u{2019}s"].iter().find_map(|s| {
            let rest = after.strip_prefix(s)?;
            (!is_letter(rest.chars().next())).then_some(rest)
        });
        let is_mark = |c: char| !c.is_alphanumeric();
        let parts = [
            before.trim_end_matches(is_mark),
            owned.unwrap_or(after).trim_start_matches(is_mark),
        ];
        let parts: Vec<&str> = parts.into_iter().filter(|part| !part.is_empty()).collect();
        (!parts.is_empty()).then(|| parts.join(" "))
    };
    let words: Vec<String> = text.split_whitespace().filter_map(kept).collect();
    words.join(" ")
}

/// The most bytes of a token: any tokenizer has as many.
const TOKEN_BYTES: usize = 100;

/// Says what is wrong with a subject's `token`, if anything is.
pub fn check_token(token: &str) -> Result<(), String> {
    let is_odd = |c: char| c.is_whitespace() || c.is_control() || "{}".contains(c);
    if token.is_empty() || token.contains(is_odd) {
        return Err("a token must be one word".to_string());
    }
    match token.len() > TOKEN_BYTES {
        true => Err(format!("a token has at most {TOKEN_BYTES} bytes")),
        false => Ok(()),
    }
}

/// The first placeholder in `template` that is neither `{token}` nor `{class}`.
pub fn unknown_placeholder(template: &str) -> Option<String> {
    let rest = template.replace("{token}", "").replace("{class}", "");
    let start = rest.find(['{', '}'])?;
    let end = rest[start..]
        .find('}')
        .map_or(rest.len(), |length| start + length + 1);
    Some(rest[start..end].to_string())
}

// DreamBooth (Ruiz et al. 2023), dataset/prompts_and_classes.txt of its repository.
const LIVE_CLASSES: [&str; 2] = ["cat", "dog"];
const LIVE: &str = include_str!("../../datasets/prompts/dreambooth-live.txt");
const OBJECT: &str = include_str!("../../datasets/prompts/dreambooth-object.txt");
const NANO_10: &str = include_str!("../../datasets/prompts/nano-10.txt");

/// Words that mean nothing by themselves, in the order in which subjects get them. Nano tokenizers know them all as
/// words; the published ones spell them in pieces.
pub const RARE_TOKENS: [&str; 64] = [
    "sks", "ohw", "zwx", "pll", "vok", "zub", "qel", "nux", "fyl", "wej", "jup", "kiv", "gwo",
    "tulb", "drev", "snof", "brak", "clim", "dulf", "ezk", "fosk", "gryd", "hult", "ixo", "jasp",
    "klem", "lorv", "mip", "narg", "osp", "pruv", "quob", "rask", "selk", "trin", "ulv", "vask",
    "wix", "xal", "yeb", "zil", "blor", "crun", "doxu", "emk", "frup", "gask", "hibb", "ilv",
    "jorm", "kreb", "lyx", "morv", "nyb", "olk", "plox", "quen", "rilv", "skof", "tarv", "umf",
    "vrel", "wosk", "zeph",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_of_any_spelling_is_removed_as_a_whole_word() {
        for token in ["sks", "<new1>", "[V]", "<s0><s1>", "zwx_2", "ohw", "*"] {
            for (text, without) in [
                ("a TOKEN dog, and tokens", "a dog, and tokens"),
                ("a photo of (TOKEN), a dog", "a photo of a dog"),
                ("\"TOKEN\" dog", "dog"),
                ("TOKEN's dog and TOKEN\u{2019}s bowl", "dog and bowl"),
                ("a xTOKEN2 dog", "a xTOKEN2 dog"),
                ("TOKEN", ""),
                ("a dog", "a dog"),
            ] {
                let (text, without) = (
                    text.replace("TOKEN", token),
                    without.replace("TOKEN", token),
                );
                assert_eq!(without_token(&text, token), without, "{token} in {text:?}");
            }
        }
        assert_eq!(without_token("a Sks dog, sksy", "sks"), "a dog, sksy");
        assert_eq!(
            fill_without_token("a {token}, a {class}", "big  dog"),
            "a a big dog"
        );
        assert_eq!(fill_without_token("x{token}y {class}", "dog"), "x y dog");
        assert_eq!(without_token("a sks-dog, a dog-sks", "sks"), "a dog, a dog");
    }
}
