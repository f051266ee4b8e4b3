//! CLIP's tokenizer from `vocab.json` and `merges.txt`, as Stable Diffusion's checkpoints publish it: byte-level BPE
//! with `</w>` at the end of words. Reference: `CLIPTokenizer` of transformers, which this describes in the form of a
//! `tokenizer.json`.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::files::{LISTS, read_json, read_text};
use crate::{Error, Result};

/// What splits a text into words once it is lowercase.
const WORDS: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// The `tokenizer.json` that says what the files in `folder` say. Special tokens are those that
/// `tokenizer_config.json` or `special_tokens_map.json` name, else CLIP's own. A padding token is one wherever it
/// stands: with SD3's second tokenizer, which pads with `!`, every `!` of a text is the same token as its padding.
///
/// # Errors
/// When a file cannot be read, or a special token is not in the vocabulary.
pub(super) fn describe(folder: &Path) -> Result<Value> {
    let vocabulary: Map<String, Value> = read_json(&folder.join("vocab.json"))?;
    let path = folder.join("merges.txt");
    let merges = read_text(&path, LISTS)?;
    // The first line says which version of the format it is.
    let merges: Vec<&str> = merges
        .lines()
        .enumerate()
        .filter(|(number, line)| {
            !(line.trim().is_empty() || *number == 0 && line.starts_with("#version"))
        })
        .map(|(_, line)| line)
        .collect();
    let settings = Settings::read(folder)?;
    let mut special = Vec::new();
    let [start, end, unknown, padding] = [
        ("bos_token", "<|startoftext|>"),
        ("eos_token", "<|endoftext|>"),
        ("unk_token", "<|endoftext|>"),
        ("pad_token", "<|endoftext|>"),
    ]
    .map(|(role, usual)| settings.token(role).unwrap_or_else(|| usual.to_string()));
    let mut faults = Vec::new();
    for token in [&start, &end, &unknown, &padding] {
        let Some(id) = vocabulary.get(token) else {
            faults.push(format!("the special token {token:?} is not in it"));
            continue;
        };
        let known = |entry: &Value| entry["content"] == token.as_str();
        if !special.iter().any(known) {
            special.push(json!({
                "id": id,
                "content": token,
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": settings.normalized(token),
                "special": true,
            }));
        }
    }
    if !faults.is_empty() {
        return Err(Error::Checkpoint {
            path: folder.join("vocab.json"),
            faults,
        });
    }
    let ends = [
        json!([end, vocabulary[&end]]),
        json!([start, vocabulary[&start]]),
    ];
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": special,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Removed", "invert": true},
                {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            ],
        },
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": ends[0],
            "cls": ends[1],
            "trim_offsets": false,
            "add_prefix_space": false,
        },
        "decoder": {
            "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true,
        },
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": unknown,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": false,
            "vocab": vocabulary,
            "merges": merges,
        },
    }))
}

/// `tokenizer_config.json` and `special_tokens_map.json`, as far as they are there.
struct Settings(Vec<Value>);

impl Settings {
    fn read(folder: &Path) -> Result<Self> {
        let files = ["tokenizer_config.json", "special_tokens_map.json"];
        let present = files.map(|name| folder.join(name));
        let present = present.iter().filter(|path| path.is_file());
        Ok(Self(
            present.map(|path| read_json(path)).collect::<Result<_>>()?,
        ))
    }

    fn entry(&self, role: &str) -> Option<&Value> {
        let mut entries = self.0.iter().filter_map(|file| file.get(role));
        entries.find(|entry| !entry.is_null())
    }

    fn token(&self, role: &str) -> Option<String> {
        let entry = self.entry(role)?;
        let text = entry.as_str().or_else(|| entry.get("content")?.as_str());
        text.map(String::from)
    }

    /// Whether the token is looked for in the lowercased text instead of the text as it was typed.
    fn normalized(&self, token: &str) -> bool {
        let decoders = self
            .0
            .iter()
            .filter_map(|file| file.get("added_tokens_decoder"));
        let decoders = decoders.filter_map(Value::as_object).flat_map(Map::values);
        let roles = ["bos_token", "eos_token", "unk_token", "pad_token"];
        let typed = roles.into_iter().filter_map(|role| self.entry(role));
        decoders
            .chain(typed)
            .find(|entry| entry.get("content").and_then(Value::as_str) == Some(token))
            .and_then(|entry| entry.get("normalized")?.as_bool())
            .unwrap_or(false)
    }
}
