//! `proxytune check`: the full pipeline, or every fault in it.

use std::io::Write;

use super::models::present;
use super::{CheckArgs, output_failed};
use crate::Result;

/// Writes the resolved pipeline to `out`. Downloaded checkpoints with their sizes, and folders and checkpoints that
/// are not there, are named on `notes`: a pipeline may be checked before its files arrive.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) with every fault of the file; [`Error::Io`](crate::Error::Io) when it
/// cannot be read or the output cannot be written.
pub fn check(args: &CheckArgs, out: &mut impl Write, notes: &mut impl Write) -> Result<()> {
    let document = args.pipeline.open()?;
    let resolved = document.resolve()?;
    out.write_all(resolved.to_toml()?.as_bytes())
        .map_err(output_failed)?;
    for line in present(&resolved)? {
        writeln!(notes, "{line}").map_err(output_failed)?;
    }
    for missing in document.missing_files(&resolved) {
        writeln!(notes, "not here yet: {missing}").map_err(output_failed)?;
    }
    Ok(())
}
