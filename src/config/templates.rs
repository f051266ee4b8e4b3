//! Prompt templates: files of them, and what may stand in them.

use std::path::Path;
use std::sync::Arc;

use super::prompts::{self, PromptList};
use super::reader::{At, Faults, did_you_mean};
use super::surroundings::Surroundings;
use super::tree::Place;
use crate::{Error, Result};

/// The list of prompts called `list`: one that ships, or a file with one template per line.
///
/// # Errors
/// [`Error::Config`] with every fault of the file, each as `FILE:LINE:COLUMN: what` and `hint: …`, or that there is none.
pub fn prompt_list(list: &str, surroundings: &dyn Surroundings) -> Result<PromptList> {
    let faults = Faults::default();
    let name = At {
        value: list.to_string(),
        place: Place::Argument(format!("--prompts {list}").into()),
    };
    let templates = read(&name, surroundings, &faults);
    let lines = faults.into_lines();
    match templates {
        Some(templates) if lines.is_empty() => Ok(templates),
        _ => Err(Error::Config(lines)),
    }
}

/// The list of prompts called `name`; `None`, with a fault, when it is a file that cannot be read.
pub(super) fn read(
    name: &At<String>,
    surroundings: &dyn Surroundings,
    faults: &Faults,
) -> Option<PromptList> {
    if let Some(list) = PromptList::named(&name.value) {
        return Some(list);
    }
    let text = match surroundings.text(Path::new(&name.value)) {
        Ok(Some(text)) => text,
        Ok(None) => {
            faults.push(
                &name.place,
                format!(
                    "{:?} is neither a list of prompts that ships nor a file",
                    name.value
                ),
                did_you_mean(
                    &name.value,
                    ["dreambooth", "nano-10"].into_iter(),
                    "the lists are",
                ),
            );
            return None;
        }
        Err(error) => {
            let hint = error.hint().unwrap_or_default();
            faults.push(&name.place, error.to_string(), hint);
            return None;
        }
    };
    let mut templates = Vec::new();
    let file: Arc<str> = name.value.as_str().into();
    for (line, template) in prompts::lines(&text) {
        let place = Place::File {
            file: file.clone(),
            line,
            column: 1,
        };
        check(
            &At {
                value: template.to_string(),
                place,
            },
            Token::Allowed,
            faults,
        );
        templates.push(template.to_string());
    }
    if templates.is_empty() {
        faults.push(
            &name.place,
            format!("{} has no prompts", name.value),
            "write one per line, such as: a {token} {class} on the beach",
        );
    }
    Some(PromptList::Listed(templates))
}

/// What a template does with the subject's token.
#[derive(PartialEq)]
pub(super) enum Token {
    Required,
    Allowed,
    Forbidden,
}

/// Reports placeholders that mean nothing, and a token that is missing or must not be there.
pub(super) fn check(template: &At<String>, token: Token, faults: &Faults) {
    if let Some(placeholder) = prompts::unknown_placeholder(&template.value) {
        faults.push(
            &template.place,
            format!("{placeholder} in {:?} means nothing", template.value),
            "the placeholders are {token} and {class}",
        );
    }
    let has_token = template.value.contains("{token}");
    if token == Token::Required && !has_token {
        faults.push(
            &template.place,
            format!("{:?} does not contain {{token}}", template.value),
            "without it the subject cannot be learned; for example \"a {token} {class}\"",
        );
    }
    if token == Token::Forbidden && has_token {
        faults.push(
            &template.place,
            format!("{:?} contains {{token}}", template.value),
            "class images must not show the subject; for example \"a {class}\"",
        );
    }
}
