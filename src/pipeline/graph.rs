//! Builds and runs what a [`Topology`] pictures: a channel for each edge, a task for each stage. Nobody else spawns
//! stages.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use futures::stream::{self, BoxStream};
use futures::{StreamExt, TryStreamExt};

use super::prepare::Prepared;
use super::topology::{Item, Stage, Topology};
use crate::config::Source;
use crate::models::LearnerOptions;
use crate::stages::direct::{Tuned, direct};
use crate::stages::evaluate::{Evaluated, evaluate};
use crate::stages::generate::{Work, generate};
use crate::stages::keep::{Keeping, keep};
use crate::stages::references::references;
use crate::stages::score::score_proxies;
use crate::stages::supervise::supervise;
use crate::stages::synthesize::synthesize;
use crate::stages::tokenize::tokenize;
use crate::stages::train::train;
use crate::stages::{Checkpoint, Context, Method, ProxyBatch, ReadyBatch, Supervisor};
use crate::stream::{Board, Inlet, Meter, Outlet, Stages, channel};
use crate::{Error, Result};

/// How the graph runs, beside what it is.
pub(super) struct Manner {
    /// One stage after another.
    pub sequential: bool,
    /// When proxies are committed.
    pub keeping: Keeping,
    /// Proxies are made together with other processes.
    pub shared: Option<Shared>,
}

/// What this process does of work that several share.
pub(super) struct Shared {
    pub work: Work,
    /// The subjects of which anything is left, in the order in which this process takes them up.
    pub subjects: Vec<usize>,
}

/// The running stages.
pub(super) struct Graph {
    stages: Stages,
    evaluated: Option<Inlet<Evaluated>>,
    reporting: Option<Meter>,
    first_training_proxy: Arc<AtomicUsize>,
}

/// What a graph came to.
pub(super) struct Ended {
    /// By method and step.
    pub evaluated: Vec<Evaluated>,
    /// How many proxies were committed when the first training step ran.
    pub first_training_proxy: Option<usize>,
}

impl Graph {
    /// Lays the channels and spawns the stages of `topology`.
    pub fn build(topology: &Topology, prepared: Prepared, manner: Manner) -> Self {
        let context = &prepared.context;
        let meters: BTreeMap<Stage, Meter> = topology
            .nodes
            .iter()
            .map(|node| {
                let meter = context.board.meter(node.stage.name(), node.stage.unit());
                meter.expect(expected(node.stage, context, manner.shared.as_ref()));
                (node.stage, meter)
            })
            .collect();
        let mut builder = Builder {
            wires: Wires::lay(topology, &context.board, &meters, manner.sequential),
            reporting: meters.get(&Stage::Report).cloned(),
            meters,
            stages: Stages::default(),
            first_training_proxy: Arc::new(AtomicUsize::new(usize::MAX)),
            prepared,
            manner,
        };
        for node in &topology.nodes {
            builder.spawn(node.stage);
        }
        Self {
            evaluated: builder.wires.evaluations.inlets.remove(&Stage::Report),
            stages: builder.stages,
            reporting: builder.reporting,
            first_training_proxy: builder.first_training_proxy,
        }
    }

    /// Waits for all stages. The first failure stops the others: with `drain`, by asking them to, so that what was made
    /// is committed; else at once.
    pub async fn join(mut self, context: &Context, drain: bool) -> Result<Ended> {
        let mut evaluated = Vec::new();
        let mut failure: Option<Error> = None;
        loop {
            tokio::select! {
                result = next(&mut self.evaluated), if self.evaluated.is_some() => match result {
                    Some(result) => {
                        self.reporting.iter().for_each(|meter| meter.add(1));
                        evaluated.push(result);
                    }
                    None => self.evaluated = None,
                },
                ended = self.stages.next() => match ended {
                    Some(Ok(())) => {}
                    Some(Err(error)) if drain => {
                        context.stop.request();
                        failure.get_or_insert(error);
                    }
                    Some(Err(error)) => return Err(error),
                    None if self.evaluated.is_none() => break,
                    None => {}
                },
            }
        }
        if let Some(error) = failure {
            return Err(error);
        }
        evaluated.sort_by_key(|result: &Evaluated| (result.method, result.step));
        let first = self.first_training_proxy.load(Relaxed);
        Ok(Ended {
            evaluated,
            first_training_proxy: (first != usize::MAX).then_some(first),
        })
    }
}

async fn next<T>(inlet: &mut Option<Inlet<T>>) -> Option<T> {
    match inlet {
        Some(inlet) => inlet.next().await,
        None => None,
    }
}

/// How many units `stage` will do; 0 where nobody knows.
fn expected(stage: Stage, context: &Context, shared: Option<&Shared>) -> usize {
    let resolved = &context.resolved;
    let subjects = context.subjects.len();
    match stage {
        Stage::References => subjects,
        Stage::Supervise => {
            let taught = shared.map_or(subjects, |shared| shared.subjects.len());
            let steps = resolved.supervisor.as_ref().map(|s| s.steps());
            steps.unwrap_or(0) * taught
        }
        Stage::Synthesize | Stage::Keep | Stage::Tokenize | Stage::Score => match shared {
            // Others may make any part of them.
            Some(_) => 0,
            None => context.plan.proxies().len(),
        },
        Stage::Direct => resolved.direct.training.steps,
        Stage::Train => resolved.student.training.steps,
        Stage::Evaluate => expected_samples(context),
        Stage::Report => 0,
    }
}

/// How many samples the evaluation will draw.
fn expected_samples(context: &Context) -> usize {
    let images = context.plan.evaluation().images.len();
    let resolved = &context.resolved;
    let (steps, every) = (resolved.student.training.steps, resolved.evaluation.every);
    let between = (steps - 1).checked_div(every).unwrap_or(0);
    let from_proxies = resolved.student.source == Source::Proxies;
    let methods = 1
        + between
        + usize::from(resolved.evaluation.untouched)
        + usize::from(from_proxies)
        + usize::from(resolved.direct().is_some());
    images * methods
}

/// The ends of all channels of one item, by the stages that hold them.
struct Ends<T> {
    outlets: BTreeMap<Stage, Vec<Outlet<T>>>,
    inlets: BTreeMap<Stage, Inlet<T>>,
    /// Items are read only when all have come.
    in_order: bool,
}

impl<T: Send + 'static> Ends<T> {
    fn lay(
        item: Item,
        topology: &Topology,
        board: &Board,
        meters: &BTreeMap<Stage, Meter>,
        in_order: bool,
    ) -> Self {
        let mut ends = Ends {
            outlets: BTreeMap::new(),
            inlets: BTreeMap::new(),
            in_order,
        };
        let mut writers: BTreeMap<Stage, Outlet<T>> = BTreeMap::new();
        for edge in topology.edges.iter().filter(|edge| edge.item == item) {
            let (Some(writer), Some(reader)) = (meters.get(&edge.from), meters.get(&edge.to))
            else {
                continue;
            };
            let outlet = match writers.get(&edge.to) {
                Some(outlet) => outlet.written_by(writer),
                None => {
                    let (outlet, inlet) =
                        channel(board, item.name(), edge.capacity, writer, reader);
                    ends.inlets.insert(edge.to, inlet);
                    writers.insert(edge.to, outlet.clone());
                    outlet
                }
            };
            ends.outlets.entry(edge.from).or_default().push(outlet);
        }
        ends
    }

    /// What `stage` reads.
    fn read_by(&mut self, stage: Stage) -> BoxStream<'static, T> {
        match self.inlets.remove(&stage) {
            None => stream::empty().boxed(),
            Some(inlet) if self.in_order => stream::once(inlet.collect::<Vec<T>>())
                .flat_map(stream::iter)
                .boxed(),
            Some(inlet) => inlet.boxed(),
        }
    }

    /// Where `stage` writes.
    fn written_by(&mut self, stage: Stage) -> Vec<Outlet<T>> {
        self.outlets.remove(&stage).unwrap_or_default()
    }
}

/// Every channel.
struct Wires {
    references: Ends<usize>,
    supervisors: Ends<Supervisor>,
    proxies: Ends<ProxyBatch>,
    kept: Ends<ProxyBatch>,
    tokens: Ends<ReadyBatch>,
    checkpoints: Ends<Checkpoint>,
    evaluations: Ends<Evaluated>,
}

impl Wires {
    fn lay(
        topology: &Topology,
        board: &Board,
        meters: &BTreeMap<Stage, Meter>,
        sequential: bool,
    ) -> Self {
        Self {
            references: Ends::lay(Item::References, topology, board, meters, sequential),
            supervisors: Ends::lay(Item::Supervisors, topology, board, meters, sequential),
            // Pixels never wait for each other: readers take them from the store.
            proxies: Ends::lay(Item::Proxies, topology, board, meters, false),
            kept: Ends::lay(Item::Kept, topology, board, meters, sequential),
            tokens: Ends::lay(Item::Tokens, topology, board, meters, sequential),
            checkpoints: Ends::lay(Item::Checkpoints, topology, board, meters, sequential),
            evaluations: Ends::lay(Item::Evaluations, topology, board, meters, false),
        }
    }
}

struct Builder {
    prepared: Prepared,
    manner: Manner,
    wires: Wires,
    meters: BTreeMap<Stage, Meter>,
    stages: Stages,
    reporting: Option<Meter>,
    first_training_proxy: Arc<AtomicUsize>,
}

impl Builder {
    fn spawn(&mut self, stage: Stage) {
        let Some(meter) = self.meters.get(&stage).cloned() else {
            return;
        };
        let context = self.prepared.context.clone();
        match stage {
            Stage::References => {
                let to = self.wires.references.written_by(stage);
                let subjects = references(context, meter.clone());
                self.stages.spawn(&meter, subjects, to);
            }
            Stage::Supervise => self.supervise(&meter),
            Stage::Synthesize => self.synthesize(&meter),
            Stage::Keep => {
                let keys = self.prepared.supervisor_keys.clone();
                let input = self.wires.proxies.read_by(stage);
                let sequential = self.manner.sequential;
                let kept = keep(
                    context,
                    keys,
                    input,
                    meter.clone(),
                    self.manner.keeping.clone(),
                )
                .map_ok(move |mut batch| {
                    if sequential {
                        // Batches wait for each other; readers take the pixels from the store.
                        batch.images = None;
                    }
                    batch
                });
                let to = self.wires.kept.written_by(stage);
                self.stages.spawn(&meter, kept, to);
            }
            Stage::Tokenize => {
                let input = self.wires.kept.read_by(stage);
                let tokenizer = self.prepared.tokenizer.clone();
                let tokens = tokenize(context, tokenizer, input, meter.clone());
                let to = self.wires.tokens.written_by(stage);
                self.stages.spawn(&meter, tokens, to);
            }
            Stage::Score => {
                let input = self.wires.kept.read_by(stage);
                let scores = score_proxies(context, input, meter.clone());
                self.stages.spawn(&meter, scores, ());
            }
            Stage::Direct => {
                let settings = &context.resolved.direct;
                let opening = LearnerOptions {
                    dropout: settings.dropout,
                    condition_dropout: settings.condition_dropout,
                    ..self.prepared.student.clone()
                };
                let tuned = Tuned {
                    method: Method::Direct,
                    source: settings.source,
                    settings: settings.training.clone(),
                };
                self.tune(&meter, stage, opening, tuned);
            }
            Stage::Train => self.train(&meter),
            Stage::Evaluate => {
                let input = self.wires.checkpoints.read_by(stage);
                let scored = evaluate(context, input, meter.clone());
                let to = self.wires.evaluations.written_by(stage);
                self.stages.spawn(&meter, scored, to);
            }
            // Whoever joins the graph writes it, when all else has ended.
            Stage::Report => {}
        }
    }

    fn supervise(&mut self, meter: &Meter) {
        let Some(opening) = self.prepared.supervisor.clone() else {
            return;
        };
        let context = self.prepared.context.clone();
        let keys = self.prepared.supervisor_keys.clone();
        let input = self.wires.references.read_by(Stage::Supervise);
        let input = match &self.manner.shared {
            None => input,
            // Photos are committed for all subjects, and then taken up in this process's own order.
            Some(Shared { subjects, .. }) => {
                let subjects = subjects.clone();
                stream::once(input.collect::<Vec<usize>>())
                    .flat_map(move |_| stream::iter(subjects.clone()))
                    .boxed()
            }
        };
        let keyed = input.map(move |subject| (subject, keys[subject].clone()));
        let supervisors = supervise(context, opening, keyed, meter.clone());
        let to = self.wires.supervisors.written_by(Stage::Supervise);
        self.stages.spawn(meter, supervisors, to);
    }

    fn synthesize(&mut self, meter: &Meter) {
        let context = self.prepared.context.clone();
        let input = self.wires.supervisors.read_by(Stage::Synthesize);
        let to = self.wires.proxies.written_by(Stage::Synthesize);
        match self.manner.shared.take() {
            Some(Shared { work, .. }) => {
                let made = generate(context, work, input, meter.clone());
                self.stages.spawn(meter, made, to);
            }
            None => {
                let evaluated = self.wires.checkpoints.written_by(Stage::Synthesize);
                let made = synthesize(context, input, evaluated, meter.clone());
                self.stages.spawn(meter, made, to);
            }
        }
    }

    fn train(&mut self, meter: &Meter) {
        let context = self.prepared.context.clone();
        let student = &context.resolved.student;
        let opening = self.prepared.student.clone();
        if student.source != Source::Proxies {
            let tuned = Tuned {
                method: Method::Student,
                source: student.source,
                settings: student.training.clone(),
            };
            return self.tune(meter, Stage::Train, opening, tuned);
        }
        let input = self.wires.tokens.read_by(Stage::Train);
        let first = self.first_training_proxy.clone();
        let learning = train(context.clone(), opening, input, first, meter.clone());
        let to = self.wires.checkpoints.written_by(Stage::Train);
        self.stages.spawn(meter, learning, to);
    }

    /// Spawns a stage that learns from the references alone.
    fn tune(&mut self, meter: &Meter, stage: Stage, opening: LearnerOptions, tuned: Tuned) {
        let input = self.wires.references.read_by(stage);
        let context = self.prepared.context.clone();
        let learning = direct(context, opening, tuned, input, meter.clone());
        let to = self.wires.checkpoints.written_by(stage);
        self.stages.spawn(meter, learning, to);
    }
}
