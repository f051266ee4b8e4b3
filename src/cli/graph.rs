//! `proxytune graph`: the stages of a pipeline and the channels between them.

use std::io::Write;

use super::{GraphArgs, output_failed};
use crate::Result;
use crate::pipeline::topology::Topology;

/// Writes the graph of the pipeline to `out`.
///
/// # Errors
/// As [`check`](super::check::check).
pub fn graph(args: &GraphArgs, out: &mut impl Write) -> Result<()> {
    let resolved = args.pipeline.open(None)?.1.resolve()?;
    let topology = Topology::of_run(&resolved);
    let text = match (args.dot, args.mermaid) {
        (true, _) => topology.to_dot(),
        (_, true) => topology.to_mermaid(),
        _ => topology.to_text(),
    };
    out.write_all(text.as_bytes()).map_err(output_failed)
}
