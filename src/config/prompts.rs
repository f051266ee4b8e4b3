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
    let filled = template.replace("{token}", " ").replace("{class}", class);
    filled.split_whitespace().collect::<Vec<_>>().join(" ")
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
