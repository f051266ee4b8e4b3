//! `proxytune run`: a pipeline from its photos to its report.

use std::io::Write;
use std::path::Path;

use super::models::{make_ready, models_of};
use super::{Ended, RunArgs, block_on, output_failed};
use crate::Result;
use crate::console;
use crate::models::locate;
use crate::pipeline::{self, Options, Outcome, Purpose, preflight};
use crate::stream::{StageReport, Stop};

pub(super) fn run(args: &RunArgs, out: &mut impl Write) -> Result<Ended> {
    let (text, document) = args.pipeline.open(None)?;
    make_ready(document.repositories())?;
    let options = Options {
        pipeline: args.pipeline.file.clone(),
        text,
        resolved: document.resolve()?,
        store: args.store.store.clone(),
        out: args.out.clone(),
        new: args.new,
        sequential: args.sequential,
        progress: true,
    };
    if models_of(&options.resolved)
        .iter()
        .any(|model| locate(model).is_err())
    {
        // What is asked of the user comes before what is downloaded for them.
        let mut found = preflight(&options, Purpose::Run);
        let is_model = |part: Option<&String>| part.is_some_and(|part| part != "subject");
        found
            .absent
            .retain(|absent| !is_model(absent.field.first()));
        found.ready()?;
        make_ready(models_of(&options.resolved))?;
    }
    let outcome = block_on(async {
        let stop = Stop::default();
        stop.on_signals();
        pipeline::run(&options, stop).await
    })?;
    write!(out, "{}", describe(&outcome)).map_err(output_failed)?;
    if outcome.summary.warnings.is_empty() {
        return Ok(Ended::Well);
    }
    for warning in &outcome.summary.warnings {
        console::note(format!("warning: {warning}"));
    }
    Ok(Ended::WithWarnings)
}

/// What every stage did.
pub(super) fn stage_table(stages: &[StageReport]) -> String {
    let mut text = format!(
        "\n{:<12} {:>8} {:<10} {:>8} {:>9} {:>9} {:>9}\n",
        "stage", "done", "", "reused", "busy s", "waiting s", "per s"
    );
    for stage in stages {
        text += &format!(
            "{:<12} {:>8} {:<10} {:>8} {:>9.1} {:>9.1} {:>9.1}\n",
            stage.stage,
            stage.done,
            stage.unit,
            stage.reused,
            stage.busy,
            stage.waiting_in + stage.waiting_out,
            stage.rate()
        );
    }
    text
}

/// The tables at the end of a run.
fn describe(outcome: &Outcome) -> String {
    let summary = &outcome.summary;
    let mut text = stage_table(&summary.stages);
    text += &format!("wall time {:.1} s", summary.wall_seconds);
    if let Some((first, all)) = summary.first_training_proxy {
        text += &format!("; the first training step ran with {first} of {all} proxies committed");
    }
    text += "\n\n";
    text += &outcome.report.text();
    let place = |name: &str| outcome.dir.join(name).display().to_string();
    let mut made = vec![
        ("student", place("student")),
        ("sheet", place("sheet.png")),
        ("report", place("report.html")),
    ];
    if Path::new(&place("supervisor")).is_dir() {
        made.insert(0, ("supervisor", place("supervisor")));
    }
    text.push('\n');
    for (name, path) in made {
        text += &format!("{name:<10} {path}\n");
    }
    if let Some(latest) = &outcome.latest {
        let what = "newest run";
        text += &format!("{what:<10} {}\n", latest.display());
    }
    text
}
