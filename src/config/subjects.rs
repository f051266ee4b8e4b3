//! From the subjects that were typed to subjects with a token each.

use std::collections::BTreeSet;
use std::path::PathBuf;

use super::limits::NAME_BYTES;
use super::prompts;
use super::reader::Faults;
use super::resolve::place_of;
use super::resolved::Subject;
use super::typed;

/// The subjects in the order of the file, each with a token of its own. `None`, with a fault, when there are none.
pub(super) fn resolve(typed: &typed::Pipeline, faults: &Faults) -> Option<Vec<Subject>> {
    if typed.subjects.is_empty() {
        faults.push(
            &typed.start,
            "there is no subject",
            "add the lines [subject.dog1], images = \"photos/dog1\" and class = \"dog\"",
        );
        return None;
    }
    let mut taken = BTreeSet::new();
    for subject in &typed.subjects {
        check_name(subject, faults);
        if let Some(token) = &subject.token {
            if let Err(what) = prompts::check_token(&token.value) {
                faults.push(&token.place, what, "for example token = \"sks\"");
            }
            if !taken.insert(token.value.clone()) {
                faults.push(
                    &token.place,
                    format!("subject.{} has the token {:?} of another subject", subject.name, token.value),
                    "give every subject its own, or remove the line: then one that is free is chosen",
                );
            }
        }
    }
    let source = typed
        .student
        .as_ref()
        .and_then(|student| student.source.as_ref());
    let learns_from_photos = source.is_some_and(|source| !source.value.makes_proxies());
    let mut resolved = Vec::new();
    for subject in &typed.subjects {
        let token = match &subject.token {
            Some(token) => Some(token.value.clone()),
            None => prompts::RARE_TOKENS
                .iter()
                .map(|token| token.to_string())
                .find(|token| !taken.contains(token)),
        };
        if token.is_none() {
            faults.push(
                &subject.place,
                format!("all {} rare tokens are taken", prompts::RARE_TOKENS.len()),
                "set token to a word that the models know and that no prompt contains",
            );
        }
        // what is missing here has been reported when the section was read
        let (Some(images), Some(class), Some(token)) = (&subject.images, &subject.class, token)
        else {
            continue;
        };
        if class.value.contains(char::is_control) || class.value.len() > CLASS_BYTES {
            faults.push(
                &class.place,
                format!("{:?} cannot be a class", excerpt(&class.value)),
                format!("a class is a few words of at most {CLASS_BYTES} bytes, such as dog"),
            );
        }
        if class.value.split_whitespace().any(|word| word == token) {
            faults.push(
                place_of(&subject.token, &class.place),
                format!(
                    "subject.{} has its class's word {token:?} as token",
                    subject.name
                ),
                "the token must not mean anything yet; remove the line to get one that does not",
            );
        }
        if let Some(replay) = &subject.replay
            && learns_from_photos
        {
            faults.push(
                &replay.place,
                format!(
                    "subject.{}.replay has no effect without proxies",
                    subject.name
                ),
                "remove the line",
            );
        }
        taken.insert(token.clone());
        resolved.push(Subject {
            name: subject.name.clone(),
            images: PathBuf::from(&images.value),
            class: class.value.clone(),
            token,
            replay: subject.replay.as_ref().map(|at| at.value),
        });
    }
    Some(resolved)
}

/// The most bytes of a class, which stands in every prompt.
const CLASS_BYTES: usize = 200;

/// The beginning of `text`, for a fault.
fn excerpt(text: &str) -> String {
    match text.char_indices().nth(40) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_string(),
    }
}

fn check_name(subject: &typed::Subject, faults: &Faults) {
    let name = &subject.name;
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
        faults.push(
            &subject.place,
            format!("{:?} cannot be a subject's name", excerpt(name)),
            "names consist of letters, digits, _, - and ., and do not begin with a dot: folders are called after them",
        );
    } else if name.len() > NAME_BYTES {
        faults.push(
            &subject.place,
            format!(
                "the name of subject {} has {} bytes",
                excerpt(name),
                name.len()
            ),
            format!("at most {NAME_BYTES} are taken: folders are called after it"),
        );
    }
}
