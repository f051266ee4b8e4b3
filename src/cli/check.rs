//! `proxytune check`: the full pipeline, or every fault in it.

use std::io::Write;

use super::models::present;
use super::{CheckArgs, Ended, output_failed};
use crate::config::Document;
use crate::pipeline::{Obstacle, Options, Preflight, Purpose, preflight};
use crate::{Error, Result};

/// Writes the resolved pipeline to `out`. On `notes` are downloaded checkpoints with their sizes, folders and
/// checkpoints that are not there (a pipeline may be checked before its files arrive), and warnings.
///
/// # Errors
/// [`Error::Config`] with every fault of the file, and everything else that a run would refuse to begin with;
/// [`Error::Io`] when the file cannot be read or the output cannot be written.
pub fn check(args: &CheckArgs, out: &mut impl Write, notes: &mut impl Write) -> Result<Ended> {
    let (text, document) = args.pipeline.open(None)?;
    let resolved = document.resolve()?;
    let options = Options {
        pipeline: args.pipeline.file.clone(),
        text,
        resolved,
        store: args.store.store.clone(),
        out: args.out.clone(),
        new: false,
        sequential: false,
        progress: false,
    };
    let found = preflight(&options, Purpose::Run);
    let at = |obstacle: &Obstacle| at_its_place(&document, obstacle);
    for line in present(&options.resolved)? {
        writeln!(notes, "{line}").map_err(output_failed)?;
    }
    for obstacle in &found.absent {
        writeln!(notes, "not here yet: {}", at(obstacle)).map_err(output_failed)?;
    }
    for warning in &found.warnings {
        writeln!(notes, "warning: {warning}").map_err(output_failed)?;
    }
    if !found.faults.is_empty() {
        return Err(Error::Config(found.faults.iter().map(at).collect()));
    }
    out.write_all(options.resolved.to_toml()?.as_bytes())
        .map_err(output_failed)?;
    Ok(ended(&found))
}

/// What a run downloads by itself is nothing to warn of.
fn ended(found: &Preflight) -> Ended {
    match found.warnings.is_empty() && found.absent.len() == found.downloads.len() {
        true => Ended::Well,
        false => Ended::WithWarnings,
    }
}

/// The obstacle as a fault of the file, with line and column.
fn at_its_place(document: &Document, obstacle: &Obstacle) -> String {
    let Obstacle { field, what, hint } = obstacle;
    match field.first() {
        Some(option) if field.len() == 1 && option.starts_with('-') => obstacle.to_string(),
        _ => format!("{}: {what}\n  hint: {hint}", document.place(field)),
    }
}
