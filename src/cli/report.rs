//! `proxytune report`: the report of a run, written again.

use std::io::Write;

use super::{Ended, ReportArgs, block_on, output_failed};
use crate::{Result, pipeline};

pub(super) fn report(args: &ReportArgs, out: &mut impl Write) -> Result<Ended> {
    let report = block_on(pipeline::report_again(
        &args.run,
        args.store.store.as_deref(),
    ))?;
    writeln!(
        out,
        "{}{}",
        report.text(),
        args.run.join("report.html").display()
    )
    .map_err(output_failed)?;
    Ok(Ended::Well)
}
