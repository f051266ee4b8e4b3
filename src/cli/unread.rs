//! What of prompts a model will not read: said before anything is drawn or compared.

use super::Ended;
use super::models::make_ready;
use crate::console;
use crate::models::reading::{Prompt, TextReader, clip_reader, unread};
use crate::models::{architecture, family, locate};
use crate::{Error, Result};

/// Names the words of `prompts` that `model`, which is downloaded if need be, does not read.
///
/// # Errors
/// [`Error::Config`] when a prompt loses its subject's token, or is refused; when there is no such model.
pub(super) fn say_unread(model: &str, prompts: &[Prompt]) -> Result<Ended> {
    make_ready([model])?;
    let readers = (architecture(family(model)?)?.readers)(&locate(model)?, None, false)?;
    say(model, &readers, prompts)
}

/// Names the words of `texts` that the CLIP called `clip`, which scores with them, does not read.
///
/// # Errors
/// When there is no such model.
pub(super) fn say_unscored(clip: &str, texts: &[String]) -> Result<Ended> {
    let prompts: Vec<Prompt> = texts.iter().map(|text| text.as_str().into()).collect();
    say(clip, &[clip_reader(&locate(clip)?)?], &prompts)
}

fn say(model: &str, readers: &[TextReader], prompts: &[Prompt]) -> Result<Ended> {
    let found = unread(model, readers, prompts)?;
    for warning in &found.warnings {
        console::note(format!("warning: {warning}"));
    }
    let faults: Vec<String> = found
        .faults
        .iter()
        .map(|fault| format!("{fault}\n  hint: {}", fault.hint().unwrap_or_default()))
        .collect();
    match (faults.is_empty(), found.warnings.is_empty()) {
        (false, _) => Err(Error::Config(faults)),
        (true, false) => Ok(Ended::WithWarnings),
        (true, true) => Ok(Ended::Well),
    }
}

impl Ended {
    /// How two parts of a command ended together.
    pub(super) fn and(self, other: Ended) -> Ended {
        match (self, other) {
            (Ended::Well, Ended::Well) => Ended::Well,
            _ => Ended::WithWarnings,
        }
    }
}
