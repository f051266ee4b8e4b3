//! All words that nano models know, as tokenizer files in the layout of the tokenizers library.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::identity::{Class, Colour, Pattern};
use super::world::{Accessory, Recolour, Setting};
use crate::config::PromptList;
use crate::config::prompts::{self, RARE_TOKENS};
use crate::models::chameleon::grammar::name_of_code;
use crate::{Error, Result};

/// Words of captions that no prompt has.
const MORE: [&str; 3] = ["an", "photo", "picture"];

/// What Lumina-mGPT is asked with: "Generate an image of 32x32 according to the following prompt:".
const REQUEST: [&str; 9] = [
    "generate",
    "image",
    "of",
    "32x32",
    "according",
    "to",
    "following",
    "prompt",
    ":",
];

/// The class words of all subjects of the DreamBooth dataset, drawn here or not.
const CLASSES: [&str; 15] = [
    "backpack",
    "stuffed animal",
    "bowl",
    "can",
    "candle",
    "cat",
    "clock",
    "sneaker",
    "dog",
    "toy",
    "boot",
    "glasses",
    "cartoon",
    "teapot",
    "vase",
];

/// Every word, in the order of its id: punctuation, the words of prompts and captions, subject tokens.
pub fn words() -> Vec<String> {
    let mut texts: Vec<String> = ["!", ",", ".", "'", "-"].map(String::from).to_vec();
    for class in ["dog", "teapot"] {
        let templates = PromptList::DreamBooth.templates(class);
        texts.extend(
            templates
                .iter()
                .map(|template| prompts::fill(template, "", "")),
        );
    }
    texts.extend(CLASSES.map(String::from));
    texts.extend(Class::ALL.map(|class| class.word().to_string()));
    texts.extend(Setting::ALL.map(|setting| setting.phrase().to_string()));
    texts.extend(Accessory::ALL.map(|accessory| accessory.phrase().to_string()));
    texts.extend(Recolour::ALL.map(|recolour| recolour.word().to_string()));
    texts.extend(Colour::ALL.map(|colour| colour.word().to_string()));
    texts.extend(
        Pattern::ALL
            .iter()
            .filter_map(|pattern| pattern.word())
            .map(String::from),
    );
    texts.extend(MORE.map(String::from));
    texts.extend(RARE_TOKENS.map(String::from));
    let mut seen = BTreeSet::new();
    texts
        .iter()
        .flat_map(|text| text.split_whitespace())
        .map(str::to_lowercase)
        .filter(|word| seen.insert(word.clone()))
        .collect()
}

/// `tokenizer.json` in the manner of CLIP: `<|startoftext|>` words `<|endoftext|>`. As in CLIP's own, the end has
/// the largest id, serves as padding too, and `!` is id 0; unlike there, unknown words have a token of their own.
pub fn clip_tokenizer() -> Value {
    let mut tokens = words();
    let unknown = tokens.len();
    tokens.extend(["<|unk|>", "<|startoftext|>", "<|endoftext|>"].map(String::from));
    let specials = [
        (unknown, "<|unk|>"),
        (unknown + 1, "<|startoftext|>"),
        (unknown + 2, "<|endoftext|>"),
    ];
    tokenizer(
        &tokens,
        &specials,
        "<|unk|>",
        Some("<|startoftext|>"),
        "<|endoftext|>",
    )
}

/// `tokenizer.json` in the manner of T5: words `</s>`; `<pad>` is id 0, `</s>` 1, `<unk>` 2.
pub fn t5_tokenizer() -> Value {
    let mut tokens: Vec<String> = ["<pad>", "</s>", "<unk>"].map(String::from).to_vec();
    tokens.extend(words());
    let specials = [(0, "<pad>"), (1, "</s>"), (2, "<unk>")];
    tokenizer(&tokens, &specials, "<unk>", None, "</s>")
}

/// `tokenizer.json` in the manner of Chameleon: `<s>` words `</s>`, with the names of `codes` image codes and of the
/// tokens that frame an image of up to `units` units of height and width. As in Chameleon's own, codes follow the first
/// special tokens.
pub fn chameleon_tokenizer(codes: usize, units: usize) -> Value {
    let mut tokens: Vec<String> = ["<s>", "<pad>", "</s>", "<unk>"].map(String::from).to_vec();
    tokens.extend((0..codes).map(name_of_code));
    let frame = [
        "<eoss>",
        "<racm3:break>",
        "<reserved08706>",
        "<reserved08799>",
    ];
    tokens.extend(frame.map(String::from));
    tokens.extend((1..=units).map(|n| format!("<reserved{:05}>", 8800 + n)));
    let own: Vec<String> = tokens.clone();
    tokens.extend(words());
    let known: BTreeSet<String> = tokens.iter().cloned().collect();
    let request = REQUEST.map(String::from).into_iter();
    tokens.extend(request.filter(|word| !known.contains(word)));
    let specials: Vec<(usize, &str)> = own
        .iter()
        .enumerate()
        .filter(|(_, token)| token.starts_with('<'))
        .map(|(id, token)| (id, token.as_str()))
        .collect();
    tokenizer(&tokens, &specials, "<unk>", Some("<s>"), "</s>")
}

/// Writes both files under `folder`, as `clip/tokenizer.json` and `t5/tokenizer.json`.
///
/// # Errors
/// Where the folder or a file cannot be written.
pub fn write_tokenizers(folder: &Path) -> Result<()> {
    for (name, tokenizer) in [("clip", clip_tokenizer()), ("t5", t5_tokenizer())] {
        let folder = folder.join(name);
        std::fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        let file = folder.join("tokenizer.json");
        std::fs::write(&file, format!("{tokenizer:#}\n")).map_err(Error::io(&file))?;
    }
    Ok(())
}

fn tokenizer(
    tokens: &[String],
    specials: &[(usize, &str)],
    unknown: &str,
    start: Option<&str>,
    end: &str,
) -> Value {
    let vocabulary: Map<String, Value> = tokens
        .iter()
        .enumerate()
        .map(|(id, token)| (token.clone(), json!(id)))
        .collect();
    let added: Vec<Value> = specials
        .iter()
        .map(|(id, token)| {
            json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true
            })
        })
        .collect();
    let special = |token: &str| json!({ "SpecialToken": { "id": token, "type_id": 0 } });
    let sequence = |name: &str| json!({ "Sequence": { "id": name, "type_id": 0 } });
    let frame = |names: &[&str]| -> Vec<Value> {
        start
            .map(special)
            .into_iter()
            .chain(names.iter().map(|name| sequence(name)))
            .chain([special(end)])
            .collect()
    };
    let ids: Map<String, Value> = start
        .into_iter()
        .chain([end])
        .map(|token| {
            let id = &vocabulary[token];
            (
                token.to_string(),
                json!({ "id": token, "ids": [id], "tokens": [token] }),
            )
        })
        .collect();
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": { "type": "Lowercase" },
        "pre_tokenizer": { "type": "Whitespace" },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": frame(&["A"]),
            "pair": frame(&["A", "B"]),
            "special_tokens": ids
        },
        "decoder": null,
        "model": { "type": "WordLevel", "vocab": vocabulary, "unk_token": unknown }
    })
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use tokenizers::Tokenizer;

    use super::*;

    fn committed(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("datasets/nano/tokenizer")
            .join(name)
            .join("tokenizer.json")
    }

    #[test]
    fn committed_tokenizers_are_what_the_word_list_makes() {
        let folder = tempfile::tempdir().unwrap();
        write_tokenizers(folder.path()).unwrap();
        for name in ["clip", "t5"] {
            let made =
                std::fs::read_to_string(folder.path().join(name).join("tokenizer.json")).unwrap();
            assert_eq!(made, std::fs::read_to_string(committed(name)).unwrap());
        }
    }

    #[test]
    fn every_prompt_tokenizes_without_unknown_words() {
        for (name, unknown) in [("clip", "<|unk|>"), ("t5", "<unk>")] {
            let tokenizer = Tokenizer::from_file(committed(name)).unwrap();
            let unknown = tokenizer.token_to_id(unknown).unwrap();
            for class in CLASSES {
                for list in [PromptList::DreamBooth, PromptList::Nano10] {
                    for template in list.templates(class) {
                        for token in RARE_TOKENS {
                            let prompt = prompts::fill(&template, token, class);
                            let encoding = tokenizer.encode(prompt.as_str(), true).unwrap();
                            assert!(!encoding.get_ids().contains(&unknown), "{prompt}");
                            assert!(encoding.get_ids().len() <= 24, "{prompt}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn texts_are_framed_as_each_family_does() {
        let clip = Tokenizer::from_file(committed("clip")).unwrap();
        let t5 = Tokenizer::from_file(committed("t5")).unwrap();
        let prompt = "A dog with the Eiffel Tower in the background";
        let (clip_ids, t5_ids) = (
            clip.encode(prompt, true).unwrap(),
            t5.encode(prompt, true).unwrap(),
        );
        let (clip_ids, t5_ids) = (clip_ids.get_ids(), t5_ids.get_ids());
        let end = clip.token_to_id("<|endoftext|>").unwrap();
        assert_eq!(end as usize + 1, clip.get_vocab_size(true));
        assert_eq!(clip_ids.first(), Some(&(end - 1)));
        assert_eq!(clip_ids.last(), Some(&end));
        assert_eq!(t5_ids.last(), Some(&1));
        // The same words in the same order, three special tokens apart.
        let words: Vec<u32> = clip_ids[1..clip_ids.len() - 1]
            .iter()
            .map(|id| id + 3)
            .collect();
        assert_eq!(words, t5_ids[..t5_ids.len() - 1]);
    }

    #[test]
    fn chameleons_tokenizer_knows_its_codes_and_every_request() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tokenizer.json");
        std::fs::write(&file, chameleon_tokenizer(20, 4).to_string()).unwrap();
        let tokenizer = Tokenizer::from_file(&file).unwrap();
        assert_eq!(tokenizer.token_to_id("IMGIMGBJZ"), Some(4 + 19));
        assert_eq!(tokenizer.token_to_id("<reserved08804>"), Some(31));
        let text =
            "Generate an image of 32x32 according to the following prompt:\na sks dog in the snow";
        let encoding = tokenizer.encode(text, false).unwrap();
        let unknown = tokenizer.token_to_id("<unk>").unwrap();
        assert!(!encoding.get_ids().contains(&unknown));
        assert_eq!(encoding.get_ids().len(), 17);
    }

    #[test]
    fn subject_tokens_are_distinct_and_are_no_other_words() {
        let all = words();
        let others: BTreeSet<&String> = all[..all.len() - RARE_TOKENS.len()].iter().collect();
        assert_eq!(
            all[all.len() - RARE_TOKENS.len()..],
            RARE_TOKENS.map(String::from)
        );
        assert!(
            RARE_TOKENS
                .iter()
                .all(|token| !others.contains(&token.to_string()))
        );
    }

    /// Run with `--ignored` after a change of the word list; models trained before do not fit the new files.
    #[test]
    #[ignore = "writes into datasets/"]
    fn write_the_committed_tokenizers() {
        write_tokenizers(&Path::new(env!("CARGO_MANIFEST_DIR")).join("datasets/nano/tokenizer"))
            .unwrap();
    }
}
