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
        match self {
            PromptList::DreamBooth => {
                let middle = if LIVE_CLASSES.contains(&class) {
                    &LIVE
                } else {
                    &OBJECTS
                };
                let settings = SHARED.iter().chain(middle.iter());
                settings
                    .map(|setting| format!("a {{token}} {{class}} {setting}"))
                    .chain(
                        PROPERTIES
                            .iter()
                            .map(|property| format!("a {property} {{token}} {{class}}")),
                    )
                    .collect()
            }
            PromptList::Nano10 => SHARED
                .iter()
                .map(|setting| format!("a {{token}} {{class}} {setting}"))
                .collect(),
            PromptList::Listed(templates) => templates.clone(),
        }
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
const SHARED: [&str; 10] = [
    "in the jungle",
    "in the snow",
    "on the beach",
    "on a cobblestone street",
    "on top of pink fabric",
    "on top of a wooden floor",
    "with a city in the background",
    "with a mountain in the background",
    "with a blue house in the background",
    "on top of a purple rug in a forest",
];
const OBJECTS: [&str; 10] = [
    "with a wheat field in the background",
    "with a tree and autumn leaves in the background",
    "with the Eiffel Tower in the background",
    "floating on top of water",
    "floating in an ocean of milk",
    "on top of green grass with sunflowers around it",
    "on top of a mirror",
    "on top of the sidewalk in a crowded street",
    "on top of a dirt road",
    "on top of a white rug",
];
const LIVE: [&str; 10] = [
    "wearing a red hat",
    "wearing a santa hat",
    "wearing a rainbow scarf",
    "wearing a black top hat and a monocle",
    "in a chef outfit",
    "in a firefighter outfit",
    "in a police outfit",
    "wearing pink glasses",
    "wearing a yellow shirt",
    "in a purple wizard outfit",
];
const PROPERTIES: [&str; 5] = ["red", "purple", "shiny", "wet", "cube shaped"];

/// Words that the text encoders know and that mean nothing, in the order in which subjects get them.
pub const RARE_TOKENS: [&str; 64] = [
    "sks", "ohwx", "zwx", "phol", "kta", "ktn", "hta", "uhn", "vdn", "rff", "jcz", "ucl", "ngl",
    "trm", "bnha", "dpr", "olis", "crg", "shul", "ymc", "pls", "waj", "drv", "mnt", "fpv", "gsw",
    "hws", "jts", "kbz", "lvx", "mqr", "nkd", "oxw", "pjn", "qlm", "rgk", "svb", "tkz", "udx",
    "vqp", "wmh", "xjr", "ybt", "zfn", "blq", "cvk", "djx", "egz", "fhk", "gmv", "hqn", "ivr",
    "jwl", "kxd", "lzb", "mbw", "ncf", "odj", "pgx", "qht", "rkv", "slz", "tnq", "uwp",
];
