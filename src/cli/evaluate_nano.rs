//! `proxytune evaluate --nano`: how good the nano checkpoints are, row by row of the table in their README.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;

use super::pretrain::chosen;
use super::{ComputeArgs, Ended, FOR_DRAWING, block_on, output_failed};
use crate::nano::measure::{Row, adaptation, models, table};
use crate::nano::pretrain::{Context, Model, Settings};
use crate::pipeline::{device, use_threads};
use crate::{Error, Result};

/// What belongs to `--nano` alone.
#[derive(Debug, Clone, Args)]
pub struct NanoArgs {
    /// Measure the nano checkpoints on scenes that no training saw, beside what they aim at
    #[arg(
        long,
        conflicts_with_all = ["references", "class", "images", "model", "adapter", "token", "clip", "dino"],
        conflicts_with_all = FOR_DRAWING
    )]
    pub nano: bool,
    /// Only these checkpoints
    #[arg(long, value_name = "LIST", value_delimiter = ',', requires = "nano")]
    pub only: Vec<Model>,
    /// How often the nano job is run for the rows about adaptation: four subjects, then another seed. 0 leaves
    /// these rows out; by default 12 without --only
    #[arg(long, value_name = "N", requires = "nano")]
    pub runs: Option<usize>,
    /// Where the checkpoints are; by default what the settings say
    #[arg(long, value_name = "DIR", requires = "nano")]
    pub checkpoints: Option<PathBuf>,
    /// Draw sheets of reconstructions and samples into this folder
    #[arg(long, value_name = "DIR", requires = "nano")]
    pub sheets: Option<PathBuf>,
    /// The settings that the checkpoints were trained with. Default: pipelines/nano-pretrain.toml
    #[arg(long, value_name = "FILE", requires = "nano")]
    pub settings: Option<PathBuf>,
    /// The nano job. Default: pipelines/nano.toml
    #[arg(long, value_name = "FILE", requires = "nano")]
    pub job: Option<PathBuf>,
    /// Print JSON instead of a table
    #[arg(long, requires = "nano")]
    pub json: bool,
}

const SETTINGS: &str = "pipelines/nano-pretrain.toml";
const JOB: &str = "pipelines/nano.toml";

impl NanoArgs {
    /// Refuses what was typed and has no effect without --nano. (clap lets a requirement go where the option that is
    /// required conflicts with another that is there.)
    ///
    /// # Errors
    /// With the first such option.
    pub(super) fn check(&self) -> Result<()> {
        let typed = [
            ("--only", !self.only.is_empty()),
            ("--runs", self.runs.is_some()),
            ("--checkpoints", self.checkpoints.is_some()),
            ("--sheets", self.sheets.is_some()),
            ("--settings", self.settings.is_some()),
            ("--job", self.job.is_some()),
            ("--json", self.json),
        ];
        match typed.iter().find(|(_, is_typed)| *is_typed && !self.nano) {
            None => Ok(()),
            Some((option, _)) => Err(Error::invalid(
                format!("{option} has no effect without --nano"),
                "leave it out",
            )),
        }
    }
}

pub(super) fn evaluate_nano(
    args: &NanoArgs,
    compute: &ComputeArgs,
    out: &mut impl Write,
) -> Result<Ended> {
    if compute.threads > 0 {
        use_threads(compute.threads);
    }
    let settings = Settings::read(args.settings.as_deref().unwrap_or(Path::new(SETTINGS)))?;
    let context = Context {
        out: args
            .checkpoints
            .clone()
            .unwrap_or_else(|| settings.out.clone()),
        settings,
        device: device(compute.device)?,
        named_device: compute.device,
        budget: None,
        machine: String::new(),
        curves: None,
    };
    let job = args.job.as_deref().unwrap_or(Path::new(JOB));
    let runs = match (args.runs, args.only.is_empty()) {
        (Some(runs), _) => runs,
        (None, true) => adaptation::RUNS,
        (None, false) => 0,
    };
    if runs == 1 {
        return Err(Error::invalid(
            "--runs 1 gives no standard error",
            "run the job at least twice, or 0 times",
        ));
    }
    let mut rows: Vec<Row> = Vec::new();
    for model in chosen(&args.only) {
        rows.extend(models::rows(&context, model, args.sheets.as_deref())?);
    }
    if runs > 0 {
        rows.extend(block_on(adaptation::rows(&context, job, runs))?);
    }
    let text = match args.json {
        false => table(&rows),
        true => json(&rows)?,
    };
    write!(out, "{text}").map_err(output_failed)?;
    Ok(Ended::Well)
}

/// The rows, each with `met`.
fn json(rows: &[Row]) -> Result<String> {
    let failed = |e: serde_json::Error| Error::Invalid {
        what: format!("the table as JSON: {e}"),
        hint: None,
    };
    let mut values = Vec::with_capacity(rows.len());
    for row in rows {
        let mut value = serde_json::to_value(row).map_err(failed)?;
        value["met"] = row.met().into();
        values.push(value);
    }
    Ok(format!(
        "{}\n",
        serde_json::to_string_pretty(&values).map_err(failed)?
    ))
}
