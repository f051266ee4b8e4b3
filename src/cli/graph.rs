//! `proxytune graph`: the stages of a pipeline and the channels between them.

use std::fmt::Write as _;
use std::io::Write;

use super::{GraphArgs, output_failed};
use crate::Result;
use crate::config::{Resolved, Source};

/// An arrow of the graph: a channel by the name that `[channels]` gives it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Arrow {
    from: &'static str,
    to: &'static str,
    channel: &'static str,
    capacity: usize,
}

/// A box of the graph, with what it will do.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stage {
    name: &'static str,
    does: String,
}

/// Writes the graph of the pipeline to `out`.
///
/// # Errors
/// As [`check`](super::check::check).
pub fn graph(args: &GraphArgs, out: &mut impl Write) -> Result<()> {
    let resolved = args.pipeline.open(None)?.1.resolve()?;
    let (stages, arrows) = draw(&resolved);
    let text = if args.dot {
        as_dot(&stages, &arrows)
    } else {
        as_text(&stages, &arrows)
    };
    out.write_all(text.as_bytes()).map_err(output_failed)
}

fn draw(resolved: &Resolved) -> (Vec<Stage>, Vec<Arrow>) {
    let (student, evaluation, channels) =
        (&resolved.student, &resolved.evaluation, &resolved.channels);
    let arrow = |from, to, channel, capacity| Arrow {
        from,
        to,
        channel,
        capacity,
    };
    let subjects = resolved.subjects.len();
    let mut stages = vec![Stage {
        name: "references",
        does: format!(
            "photos of {subjects} subject{}",
            if subjects == 1 { "" } else { "s" }
        ),
    }];
    let mut arrows = Vec::new();
    let learns = |what: &str, training: &crate::config::Training| {
        format!(
            "{what}, {} steps of {} on {}",
            training.steps, training.batch_size, student.device
        )
    };
    if let Some((supervisor, proxies)) = resolved.teacher() {
        let training = &supervisor.training;
        let (model, device, count, size) = (
            &supervisor.model,
            supervisor.device,
            proxies.count,
            proxies.batch_size,
        );
        stages.extend([
            Stage {
                name: "supervise",
                does: format!(
                    "{model}, {} steps of {} per subject on {device}",
                    training.steps, training.batch_size
                ),
            },
            Stage {
                name: "synthesize",
                does: format!("{count} proxies per subject in batches of {size}"),
            },
            Stage {
                name: "keep",
                does: "commits proxies to the store".to_string(),
            },
            Stage {
                name: "tokenize",
                does: format!("{} on {}", student.model, student.device),
            },
            Stage {
                name: "score",
                does: format!(
                    "{}, {} on {}",
                    evaluation.clip, evaluation.dino, evaluation.device
                ),
            },
        ]);
        arrows.extend([
            arrow("references", "supervise", "references", channels.references),
            arrow(
                "supervise",
                "synthesize",
                "supervisors",
                channels.supervisors,
            ),
            arrow("synthesize", "keep", "proxies", channels.proxies),
            arrow(
                "synthesize",
                "evaluate",
                "checkpoints",
                channels.checkpoints,
            ),
            arrow("keep", "tokenize", "kept", channels.kept),
            arrow("keep", "score", "kept", channels.kept),
            arrow("tokenize", "train", "tokens", channels.tokens),
        ]);
    } else {
        arrows.push(arrow(
            "references",
            "train",
            "references",
            channels.references,
        ));
    }
    if let Some(direct) = resolved.direct() {
        stages.push(Stage {
            name: "direct",
            does: learns(source(direct.source), &direct.training),
        });
        arrows.push(arrow(
            "references",
            "direct",
            "references",
            channels.references,
        ));
        arrows.push(arrow(
            "direct",
            "evaluate",
            "checkpoints",
            channels.checkpoints,
        ));
    }
    let prompts: usize = resolved
        .subjects
        .iter()
        .map(|s| evaluation.prompts.templates(&s.class).len())
        .sum();
    stages.extend([
        Stage {
            name: "train",
            does: learns(source(student.source), &student.training),
        },
        Stage {
            name: "evaluate",
            does: format!(
                "{prompts} prompts, {} images each, per checkpoint",
                evaluation.images_per_prompt
            ),
        },
        Stage {
            name: "report",
            does: "sheet.png, report.html".to_string(),
        },
    ]);
    arrows.push(arrow(
        "train",
        "evaluate",
        "checkpoints",
        channels.checkpoints,
    ));
    arrows.push(arrow(
        "evaluate",
        "report",
        "evaluations",
        channels.evaluations,
    ));
    (stages, arrows)
}

fn source(source: Source) -> &'static str {
    match source {
        Source::Proxies => "from proxies",
        Source::References => "from references",
        Source::Augmented => "from augmented references",
    }
}

fn as_text(stages: &[Stage], arrows: &[Arrow]) -> String {
    let mut text = String::new();
    for stage in stages {
        // writing to a String cannot fail
        let _ = writeln!(text, "{:<12}{}", stage.name, stage.does);
        for arrow in arrows.iter().filter(|arrow| arrow.from == stage.name) {
            let _ = writeln!(
                text,
                "    ──{}[{}]──▶ {}",
                arrow.channel, arrow.capacity, arrow.to
            );
        }
    }
    text
}

fn as_dot(stages: &[Stage], arrows: &[Arrow]) -> String {
    let mut text = String::from("digraph proxytune {\n  rankdir=LR\n  node [shape=box]\n");
    for stage in stages {
        let does = stage.does.replace('\\', "\\\\").replace('"', "\\\"");
        let _ = writeln!(text, "  {} [label=\"{}\\n{does}\"]", stage.name, stage.name);
    }
    for Arrow {
        from,
        to,
        channel,
        capacity,
    } in arrows
    {
        let _ = writeln!(text, "  {from} -> {to} [label=\"{channel} [{capacity}]\"]");
    }
    text.push_str("}\n");
    text
}
