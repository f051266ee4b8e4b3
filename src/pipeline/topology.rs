//! The picture of a pipeline as a value: its stages and the bounded channels between them. The builder, `graph`,
//! `generate` and the progress read it; nobody draws it again.

use std::fmt::Write as _;

use crate::config::{Channels, Resolved, Source, Training};
use crate::console::shown;

/// A box of the picture, in the order of the dataflow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Photos become subjects.
    References,
    /// A diffusion model learns each subject.
    Supervise,
    /// Supervisors make proxies.
    Synthesize,
    /// Proxies are committed to the store.
    Keep,
    /// Proxies become VQ tokens.
    Tokenize,
    /// Proxies are scored.
    Score,
    /// The student's backbone is tuned on the references, as a baseline.
    Direct,
    /// The student learns.
    Train,
    /// Checkpoints draw the planned samples, which are scored.
    Evaluate,
    /// Scores become the report.
    Report,
}

impl Stage {
    /// Its name on the command line, in metrics and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Stage::References => "references",
            Stage::Supervise => "supervise",
            Stage::Synthesize => "synthesize",
            Stage::Keep => "keep",
            Stage::Tokenize => "tokenize",
            Stage::Score => "score",
            Stage::Direct => "direct",
            Stage::Train => "train",
            Stage::Evaluate => "evaluate",
            Stage::Report => "report",
        }
    }

    /// What it counts, in the plural.
    pub fn unit(self) -> &'static str {
        match self {
            Stage::References => "subjects",
            Stage::Supervise | Stage::Direct | Stage::Train => "steps",
            Stage::Synthesize | Stage::Keep | Stage::Tokenize | Stage::Score => "proxies",
            Stage::Evaluate => "samples",
            Stage::Report => "checkpoints",
        }
    }

    /// What it sends to `to`.
    fn sends(self, to: Stage) -> Item {
        match (self, to) {
            (_, Stage::Evaluate) => Item::Checkpoints,
            (Stage::References, _) => Item::References,
            (Stage::Supervise, _) => Item::Supervisors,
            (Stage::Synthesize, _) => Item::Proxies,
            (Stage::Keep | Stage::Score, _) => Item::Kept,
            (Stage::Tokenize, _) => Item::Tokens,
            (Stage::Direct | Stage::Train, _) => Item::Checkpoints,
            (Stage::Evaluate | Stage::Report, _) => Item::Evaluations,
        }
    }
}

/// What a channel carries, by the name that `[channels]` gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Item {
    /// Subjects with their photos.
    References,
    /// Supervisors that have learnt their subject.
    Supervisors,
    /// Batches of proxies that have just been made.
    Proxies,
    /// Batches of committed proxies.
    Kept,
    /// Batches with committed tokens.
    Tokens,
    /// What can draw samples.
    Checkpoints,
    /// The scores of a checkpoint.
    Evaluations,
}

impl Item {
    /// The channel's name.
    pub fn name(self) -> &'static str {
        match self {
            Item::References => "references",
            Item::Supervisors => "supervisors",
            Item::Proxies => "proxies",
            Item::Kept => "kept",
            Item::Tokens => "tokens",
            Item::Checkpoints => "checkpoints",
            Item::Evaluations => "evaluations",
        }
    }

    fn capacity(self, channels: &Channels) -> usize {
        match self {
            Item::References => channels.references,
            Item::Supervisors => channels.supervisors,
            Item::Proxies => channels.proxies,
            Item::Kept => channels.kept,
            Item::Tokens => channels.tokens,
            Item::Checkpoints => channels.checkpoints,
            Item::Evaluations => channels.evaluations,
        }
    }
}

/// A stage with what it will do, in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub stage: Stage,
    pub does: String,
}

/// A bounded channel. Edges of one item into one stage are writers of the same channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Edge {
    pub from: Stage,
    pub to: Stage,
    pub item: Item,
    /// Items that may wait in it.
    pub capacity: usize,
}

/// Stages, in the order of the dataflow, and the channels between them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topology {
    pub nodes: Vec<Node>,
    pub edges: Vec<Edge>,
}

impl Topology {
    /// The whole of what `run` does.
    pub fn of_run(resolved: &Resolved) -> Self {
        use Stage::{
            Direct, Evaluate, Keep, References, Report, Score, Supervise, Synthesize, Tokenize,
            Train,
        };
        let mut paths: Vec<&[Stage]> = Vec::new();
        if resolved.teacher().is_some() {
            paths.push(&[References, Supervise, Synthesize, Keep, Tokenize, Train]);
            paths.push(&[Keep, Score]);
            paths.push(&[Synthesize, Evaluate]);
        } else if resolved.student.source == Source::Custom {
            paths.push(&[References, Synthesize, Keep, Tokenize, Train]);
            paths.push(&[Keep, Score]);
        } else {
            paths.push(&[References, Train]);
        }
        if resolved.direct().is_some() {
            paths.push(&[References, Direct, Evaluate]);
        }
        paths.push(&[Train, Evaluate, Report]);
        Self::along(resolved, &paths)
    }

    /// What `generate` does: proxies alone, with tokens if so.
    pub fn of_proxies(resolved: &Resolved, tokens: bool) -> Self {
        use Stage::{Keep, References, Supervise, Synthesize, Tokenize};
        let path = [References, Supervise, Synthesize, Keep, Tokenize];
        Self::along(resolved, &[&path[..if tokens { 5 } else { 4 }]])
    }

    fn along(resolved: &Resolved, paths: &[&[Stage]]) -> Self {
        let mut stages: Vec<Stage> = paths.iter().copied().flatten().copied().collect();
        stages.sort_unstable();
        stages.dedup();
        let edge = |pair: &[Stage]| {
            let item = pair[0].sends(pair[1]);
            Edge {
                from: pair[0],
                to: pair[1],
                item,
                capacity: item.capacity(&resolved.channels).max(1),
            }
        };
        let node = |stage| Node {
            stage,
            does: does(stage, resolved),
        };
        Self {
            nodes: stages.into_iter().map(node).collect(),
            edges: paths
                .iter()
                .flat_map(|path| path.windows(2).map(edge))
                .collect(),
        }
    }

    /// Whether `stage` is part of it.
    pub fn has(&self, stage: Stage) -> bool {
        self.nodes.iter().any(|node| node.stage == stage)
    }

    /// The channels after `stage`.
    pub fn after(&self, stage: Stage) -> impl Iterator<Item = &Edge> {
        self.edges.iter().filter(move |edge| edge.from == stage)
    }

    /// As text: a stage a line, its channels below it.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        for Node { stage, does } in &self.nodes {
            // writing to a String cannot fail
            let _ = writeln!(text, "{:<12}{does}", stage.name());
            for Edge {
                to, item, capacity, ..
            } in self.after(*stage)
            {
                let _ = writeln!(text, "    ──{}[{capacity}]──▶ {}", item.name(), to.name());
            }
        }
        text
    }

    /// In Graphviz's language.
    pub fn to_dot(&self) -> String {
        let mut text = String::from("digraph proxytune {\n  rankdir=LR\n  node [shape=box]\n");
        for Node { stage, does } in &self.nodes {
            let does = does.replace('\\', "\\\\").replace('"', "\\\"");
            let name = stage.name();
            let _ = writeln!(text, "  {name} [label=\"{name}\\n{does}\"]");
        }
        for Edge {
            from,
            to,
            item,
            capacity,
        } in &self.edges
        {
            let _ = writeln!(
                text,
                "  {} -> {} [label=\"{} [{capacity}]\"]",
                from.name(),
                to.name(),
                item.name()
            );
        }
        text.push_str("}\n");
        text
    }

    /// In Mermaid's language, which Markdown viewers draw.
    pub fn to_mermaid(&self) -> String {
        let mut text = String::from("flowchart LR\n");
        for Node { stage, does } in &self.nodes {
            let does = does.replace('"', "#quot;");
            let name = stage.name();
            let _ = writeln!(text, "  {name}[\"{name}<br/>{does}\"]");
        }
        for Edge {
            from,
            to,
            item,
            capacity,
        } in &self.edges
        {
            let (from, to, item) = (from.name(), to.name(), item.name());
            let _ = writeln!(text, "  {from} -->|\"{item} [{capacity}]\"| {to}");
        }
        text
    }
}

/// What `stage` will do, in words.
fn does(stage: Stage, resolved: &Resolved) -> String {
    let (student, evaluation) = (&resolved.student, &resolved.evaluation);
    let subjects = resolved.subjects.len();
    match stage {
        Stage::References => {
            let plural = if subjects == 1 { "" } else { "s" };
            format!("photos of {subjects} subject{plural}")
        }
        Stage::Supervise => resolved
            .teacher()
            .map_or_else(String::new, |(supervisor, ..)| {
                let training = &supervisor.training;
                if let Some(adapter) = &supervisor.adapter {
                    return format!(
                        "{} with {}, learnt already",
                        supervisor.model,
                        shown(adapter)
                    );
                }
                format!(
                    "{}, {} steps of {} per subject on {}",
                    supervisor.model,
                    training.steps,
                    training.examples_per_step(),
                    supervisor.device
                )
            }),
        Stage::Synthesize => resolved
            .proxies
            .as_ref()
            .map_or_else(String::new, |proxies| {
                format!(
                    "{} proxies per subject in batches of {}",
                    proxies.count, proxies.batch_size
                )
            }),
        Stage::Keep => "commits proxies to the store".to_string(),
        Stage::Tokenize => format!("{} on {}", student.model, student.device),
        Stage::Score => format!(
            "{}, {} on {}",
            evaluation.clip, evaluation.dino, evaluation.device
        ),
        Stage::Direct => learns(resolved.direct.source, &resolved.direct.training, resolved),
        Stage::Train => learns(student.source, &student.training, resolved),
        Stage::Evaluate => {
            let prompts: usize = resolved
                .subjects
                .iter()
                .map(|subject| evaluation.prompts.templates(&subject.class).len())
                .sum();
            format!(
                "{prompts} prompts, {} images each, per checkpoint",
                evaluation.images_per_prompt
            )
        }
        Stage::Report => "sheet.png, report.html".to_string(),
    }
}

fn learns(source: Source, training: &Training, resolved: &Resolved) -> String {
    let from = match source {
        Source::Proxies => "from proxies",
        Source::Custom => "from a custom source",
        Source::References => "from references",
        Source::Augmented => "from augmented references",
    };
    format!(
        "{from}, {} steps of {} on {}",
        training.steps,
        training.examples_per_step(),
        resolved.student.device
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Document;

    fn resolved(overrides: &[&str]) -> Resolved {
        let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
        let text = std::fs::read_to_string("pipelines/nano-smoke.toml").unwrap();
        Document::parse(
            &text,
            "nano-smoke.toml",
            &overrides,
            &crate::models::Registry,
        )
        .resolve()
        .unwrap()
    }

    fn pairs(topology: &Topology) -> Vec<(Stage, Stage)> {
        let pair = |edge: &Edge| (edge.from, edge.to);
        topology.edges.iter().map(pair).collect()
    }

    #[test]
    fn every_edge_joins_two_stages_of_the_picture() {
        let whole = resolved(&[]);
        let alone = resolved(&["student.source=references", "direct.enabled=false"]);
        for topology in [
            Topology::of_run(&whole),
            Topology::of_run(&alone),
            Topology::of_proxies(&whole, false),
            Topology::of_proxies(&whole, true),
        ] {
            for edge in &topology.edges {
                assert!(topology.has(edge.from) && topology.has(edge.to), "{edge:?}");
                assert!(edge.from < edge.to, "{edge:?} leads backwards");
            }
            assert!(topology.nodes.is_sorted_by_key(|node| node.stage));
        }
    }

    #[test]
    fn proxies_alone_are_the_front_of_the_whole_picture() {
        let resolved = resolved(&[]);
        let whole = pairs(&Topology::of_run(&resolved));
        let proxies = Topology::of_proxies(&resolved, true);
        assert!(pairs(&proxies).iter().all(|pair| whole.contains(pair)));
        assert!(proxies.has(Stage::Tokenize) && !proxies.has(Stage::Train));
        assert!(!Topology::of_proxies(&resolved, false).has(Stage::Tokenize));
    }

    #[test]
    fn all_that_draws_samples_writes_into_one_channel() {
        let topology = Topology::of_run(&resolved(&[]));
        let writers: Vec<Stage> = topology
            .edges
            .iter()
            .filter(|edge| edge.to == Stage::Evaluate)
            .map(|edge| {
                assert_eq!(edge.item, Item::Checkpoints);
                edge.from
            })
            .collect();
        assert_eq!(writers, [Stage::Synthesize, Stage::Direct, Stage::Train]);
    }
}
