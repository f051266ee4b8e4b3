//! More steps for a student that has ended: where nothing but their number was changed, and the first of them would be
//! the very same, training goes on from the last checkpoint of the run that took fewer. The result is that of a run which
//! takes them all.

use std::path::Path;
use std::sync::Arc;

use super::RunDir;
use super::context::Context;
use super::prepare::StudentOrigin;
use super::run_dir::{COMPLETE, RESOLVED};
use crate::config::{Document, Resolved, Source};
use crate::plan::Plan;
use crate::training::{Checkpoints, optimizer::learning_rate_factor};
use crate::{Result, files};

/// The checkpoints of the student of a run in `dir`.
pub(super) fn checkpoints(dir: &Path, source: Source, identity: &str) -> Checkpoints {
    // As the stages call them.
    let name = match source {
        Source::Proxies | Source::Custom => "student",
        Source::References | Source::Augmented => "train",
    };
    Checkpoints::new(
        dir.join("checkpoints").join(name),
        format!("{name} {identity}"),
    )
}

/// Lets the student of the run in `dir`, which has no checkpoint, go on from another run of the same file that differs in
/// taking fewer steps. Returns what came of it in words; `None` where there is no such run.
///
/// # Errors
/// When the directories cannot be read or written.
pub(super) fn go_on(
    context: &Arc<Context>,
    origin: &StudentOrigin,
    dir: &RunDir,
) -> Result<Option<String>> {
    let new = &context.resolved;
    let own = checkpoints(dir.path(), new.student.source, &context.student_identity);
    if !own.list()?.is_empty() {
        return Ok(None);
    }
    let mut shorter: Option<(Resolved, RunDirName)> = None;
    for (name, path) in dir.siblings()? {
        let Ok(text) = files::read_text(&path.join(RESOLVED), files::SETTINGS) else {
            continue;
        };
        let Ok(old) = Document::parse(&text, &name, &[], &crate::models::Registry).resolve() else {
            continue;
        };
        let is_longest = shorter
            .as_ref()
            .is_none_or(|(other, _)| old.student.training.steps > other.student.training.steps);
        if path.join(COMPLETE).is_file() && is_longest && has_fewer_steps(&old, new) {
            shorter = Some((old, (name, path)));
        }
    }
    let Some((old, (name, path))) = shorter else {
        return Ok(None);
    };
    let steps = old.student.training.steps;
    let over = |why: String| {
        Ok(Some(format!(
            "starts over instead of going on from step {steps} of {name}: {why}"
        )))
    };
    let counts: Vec<(String, usize)> = context
        .subjects
        .iter()
        .map(|subject| (subject.name.clone(), subject.images.len()))
        .collect();
    let plan = Plan::new(&old, &counts)?;
    if let Some(why) = differs(&old, &plan, context) {
        return over(why);
    }
    let other = checkpoints(&path, old.student.source, &origin.identity(&plan));
    match own.take_over(&other, steps) {
        Ok(()) => Ok(Some(format!("goes on from step {steps} of {name}"))),
        Err(error) => over(format!("{error}")),
    }
}

type RunDirName = (String, std::path::PathBuf);

/// Whether `new` is `old` with more steps for the student, whatever the two evaluate beside.
fn has_fewer_steps(old: &Resolved, new: &Resolved) -> bool {
    let mut as_old = new.clone();
    as_old.evaluation = old.evaluation.clone();
    as_old.direct = old.direct.clone();
    as_old.channels = old.channels.clone();
    as_old.student.overlap = old.student.overlap;
    let (training, before) = (&mut as_old.student.training, &old.student.training);
    let more = training.steps > before.steps;
    training.steps = before.steps;
    training.checkpoint_every = before.checkpoint_every;
    training.memory = before.memory;
    more && as_old == *old
}

/// Why the first steps would not be those that were taken.
fn differs(old: &Resolved, plan: &Plan, context: &Context) -> Option<String> {
    let (before, now) = (&old.student.training, &context.resolved.student.training);
    let rate =
        |steps, step| learning_rate_factor(before.lr_scheduler, step, steps, before.warmup_steps);
    if (0..before.steps).any(|step| rate(before.steps, step) != rate(now.steps, step)) {
        return Some(
            "lr_scheduler lets the learning rate end with the steps; only \"constant\" and \"constant_with_warmup\" \
             can be gone on with"
                .to_string(),
        );
    }
    if (0..before.steps).all(|step| plan.examples(step) == context.plan.examples(step)) {
        return None;
    }
    let overlap = old.student.overlap;
    let grown = (overlap * before.steps as f64).ceil();
    let same = |digits: usize| {
        let text = format!("{:.digits$}", grown / now.steps as f64);
        let is_same = (text.parse::<f64>().ok()? * now.steps as f64).ceil() == grown;
        is_same.then_some(text)
    };
    let hint = match (1..12).find_map(same) {
        Some(text) => format!("; --set student.overlap={text} goes on"),
        None => String::new(),
    };
    Some(format!(
        "with student.overlap = {} its first steps would learn from other proxies{hint}",
        context.resolved.student.overlap
    ))
}
