//! Prompt lists: one template per line, with `{token}` and `{class}` where the subject stands.

use std::path::Path;

use crate::{Error, Result};

/// The 25 prompts of DreamBooth for live subjects (Ruiz et al. 2023, the dataset's prompt list).
const DREAMBOOTH_LIVE: &str = include_str!("../../datasets/prompts/dreambooth-live.txt");
/// The 25 prompts of DreamBooth for objects.
const DREAMBOOTH_OBJECT: &str = include_str!("../../datasets/prompts/dreambooth-object.txt");
/// The ten settings that live subjects and objects share.
const NANO_10: &str = include_str!("../../datasets/prompts/nano-10.txt");

/// The templates of a list, for subjects of `class`: `"dreambooth"` chooses between the list for live subjects and
/// the one for objects, `"nano-10"` is the same for both, and anything else is the path of a text file with one
/// template per line (empty lines and lines that begin with `#` are skipped).
///
/// # Errors
/// If the file cannot be read, holds no template, or holds one without `{class}`.
pub fn prompts(name: &str, class: &str) -> Result<Vec<String>> {
    match name {
        "dreambooth" => Ok(for_class(class)),
        "nano-10" => Ok(lines(NANO_10)),
        path => from_file(Path::new(path)),
    }
}

/// The 25 DreamBooth templates that fit `class`; cats and dogs are the live ones.
pub fn for_class(class: &str) -> Vec<String> {
    lines(match class {
        "cat" | "dog" => DREAMBOOTH_LIVE,
        _ => DREAMBOOTH_OBJECT,
    })
}

/// A template's prompt for a subject. An empty `token` leaves no gap.
pub fn fill(template: &str, token: &str, class: &str) -> String {
    single_spaced(&template.replace("{token}", token).replace("{class}", class))
}

/// `prompt` without the word `token`, as CLIP-T reads it.
pub fn without_token(prompt: &str, token: &str) -> String {
    let kept: Vec<&str> = prompt
        .split_whitespace()
        .filter(|&word| word != token)
        .collect();
    kept.join(" ")
}

fn from_file(path: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let templates = lines(&text);
    if templates.is_empty() {
        return Err(Error::invalid(
            format!("{}: no prompts in it", path.display()),
            "write one prompt per line, for example: a {token} {class} in the snow",
        ));
    }
    match templates
        .iter()
        .find(|template| !template.contains("{class}"))
    {
        None => Ok(templates),
        Some(template) => Err(Error::invalid(
            format!(
                "{}: the prompt {template:?} names no {{class}}",
                path.display()
            ),
            "write {token} {class} where the subject stands, for example: a {token} {class} in the snow",
        )),
    }
}

fn lines(text: &str) -> Vec<String> {
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(String::from)
        .collect()
}

fn single_spaced(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dreambooth_chooses_by_class() {
        let (live, object) = (for_class("dog"), for_class("teapot"));
        assert_eq!((live.len(), object.len()), (25, 25));
        assert_eq!(live[..10], object[..10]);
        assert_eq!(live[20..], object[20..]);
        assert_eq!(live[10], "a {token} {class} wearing a red hat");
        assert_eq!(
            object[10],
            "a {token} {class} with a wheat field in the background"
        );
        assert_eq!(prompts("nano-10", "dog").unwrap(), live[..10]);
    }

    #[test]
    fn tokens_go_in_and_come_out_again() {
        let prompt = fill("a red {token} {class}", "sks", "stuffed animal");
        assert_eq!(prompt, "a red sks stuffed animal");
        assert_eq!(without_token(&prompt, "sks"), "a red stuffed animal");
        assert_eq!(
            fill("a {token} {class} in the snow", "", "dog"),
            "a dog in the snow"
        );
    }

    #[test]
    fn a_list_of_ones_own_is_read_and_its_faults_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mine.txt");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            prompts(&path.to_string_lossy(), "dog")
        };
        assert_eq!(
            read("# mine\n\n a {token} {class} at sea \n").unwrap(),
            ["a {token} {class} at sea"]
        );
        assert!(read("\n").unwrap_err().to_string().contains("no prompts"));
        assert!(read("a dog").unwrap_err().to_string().contains("{class}"));
    }
}
