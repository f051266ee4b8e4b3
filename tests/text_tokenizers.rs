//! Text tokenizers give the ids that transformers gives. The cases and the program that made them are in
//! `tests/golden`.

use std::collections::BTreeMap;
use std::path::Path;

use proxytune::models::tokenizer::TextTokenizer;

#[test]
fn clips_tokenizer_from_its_two_files_gives_transformers_ids() {
    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/clip-tokenizer");
    let mut seen = 0;
    for case in std::fs::read_dir(cases).unwrap() {
        let case = case.unwrap().path();
        let tokenizer = TextTokenizer::from_folder(&case).unwrap();
        let ids = std::fs::read_to_string(case.join("ids.json")).unwrap();
        let ids: BTreeMap<String, Vec<u32>> = serde_json::from_str(&ids).unwrap();
        for (text, expected) in ids {
            let found = tokenizer.ids(&text, 1000).unwrap();
            assert_eq!(found, expected, "{text:?} in {}", case.display());
            seen += 1;
        }
    }
    assert_eq!(seen, 3 * 22);
}

#[test]
fn a_long_text_is_cut_and_keeps_its_end() {
    let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/clip-tokenizer/plain");
    let tokenizer = TextTokenizer::from_folder(&case).unwrap();
    let (start, end) = (
        tokenizer.id("<|startoftext|>").unwrap(),
        tokenizer.id("<|endoftext|>").unwrap(),
    );
    let ids = tokenizer.ids("dog cat dog cat dog cat", 5).unwrap();
    assert_eq!((ids.len(), ids[0], ids[4]), (5, start, end));
}

#[test]
fn a_folder_with_sentencepieces_model_alone_says_what_is_needed() {
    let folder = tempfile::tempdir().unwrap();
    let error = TextTokenizer::from_folder(folder.path()).err().unwrap();
    assert!(error.to_string().contains("tokenizer.json"), "{error}");
    std::fs::write(folder.path().join("spiece.model"), "x").unwrap();
    let error = TextTokenizer::from_folder(folder.path()).err().unwrap();
    assert!(error.to_string().contains("spiece.model alone"), "{error}");
    std::fs::write(folder.path().join("vocab.json"), "{\"a\": 0}").unwrap();
    std::fs::write(folder.path().join("merges.txt"), "#version: 0.2\n").unwrap();
    let error = TextTokenizer::from_folder(folder.path()).err().unwrap();
    assert!(error.to_string().contains("<|endoftext|>"), "{error}");
}
