//! `proxytune merge`: a checkpoint with an adapter worked into its weights.

use std::io::Write;

use super::{MergeArgs, output_failed};
use crate::hub::human_bytes;
use crate::models::adapters::CHECKPOINT_WEIGHTS;
use crate::models::lora_file::LoraFile;
use crate::models::merge;
use crate::models::registry::known;
use crate::models::{family, locate};
use crate::{Error, Result};

pub(super) fn merge(args: &MergeArgs, out: &mut impl Write) -> Result<()> {
    locate::make_present(&args.model)?;
    if args.adapter.join(CHECKPOINT_WEIGHTS).is_file() {
        return Err(Error::invalid(
            format!("{} holds whole weights, no adapter", args.adapter.display()),
            "use it as it is; only adapters are merged",
        ));
    }
    let adapter = LoraFile::read(&args.adapter)?;
    let side = known(&args.model).and_then(|model| model.resolution);
    let merged = merge::merge(
        &locate(&args.model)?,
        family(&args.model)?,
        side.map(|side| side as u32),
        &adapter,
        &args.out,
        args.dtype.map(Into::into),
    )?;
    writeln!(
        out,
        "{}: {} layers of {} changed, backbone {}",
        args.out.display(),
        merged.layers,
        args.model,
        human_bytes(merged.bytes)
    )
    .map_err(output_failed)
}
