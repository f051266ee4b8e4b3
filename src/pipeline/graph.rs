//! Builds and runs what a [`Topology`] pictures: a channel for each edge, a task for each stage. Nobody else spawns
//! stages.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use futures::stream::{self, BoxStream};
use futures::{StreamExt, TryStreamExt};

use super::context::Context;
use super::extend::checkpoints;
use super::prepare::Models;
use super::topology::{Item, Stage, Topology};
use crate::config::{Sampling, Source};
use crate::stages::direct::{BaselineSettings, Direct, Tuned};
use crate::stages::evaluate::{Evaluate, Evaluated, Sampler};
use crate::stages::generate::{Generate, Work};
use crate::stages::keep::{CommitPolicy, Keep};
use crate::stages::references::References;
use crate::stages::score::ScoreProxies;
use crate::stages::session::InitialAdapter;
use crate::stages::source::{ReadySource, SupervisorSource};
use crate::stages::supervise::Supervise;
use crate::stages::synthesize::Synthesize;
use crate::stages::tokenize::Tokenize;
use crate::stages::train::{StudentSettings, Train};
use crate::stages::{Checkpoint, ProxyBatch, ReadyBatch, Supervisor};
use crate::stream::{Board, Inlet, Meter, Outlet, Stages, channel};
use crate::training::Checkpoints;
use crate::{Error, Result};

/// How the graph runs, beside what it is.
pub(super) struct GraphOptions {
    /// One stage after another.
    pub sequential: bool,
    /// When proxies are committed.
    pub commit: CommitPolicy,
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

/// What a graph leaves when it has ended.
pub(super) struct Finished {
    /// By method and step.
    pub evaluated: Vec<Evaluated>,
    /// How many proxies were committed when the first training step ran.
    pub first_training_proxy: Option<usize>,
}

impl Graph {
    /// Lays the channels and spawns the stages of `topology`.
    pub fn build(
        topology: &Topology,
        context: Arc<Context>,
        models: Models,
        options: GraphOptions,
    ) -> Self {
        let meters: BTreeMap<Stage, Meter> = topology
            .nodes
            .iter()
            .map(|node| {
                let meter = context.board.meter(node.stage.name(), node.stage.unit());
                meter.expect(expected(node.stage, &context, options.shared.as_ref()));
                (node.stage, meter)
            })
            .collect();
        let mut builder = Builder {
            wires: Wires::lay(topology, &context.board, &meters, options.sequential),
            reporting: meters.get(&Stage::Report).cloned(),
            meters,
            stages: Stages::default(),
            first_training_proxy: Arc::new(AtomicUsize::new(usize::MAX)),
            context,
            models,
            options,
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
    pub async fn join(mut self, context: &Context, drain: bool) -> Result<Finished> {
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
        Ok(Finished {
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
    let methods = 1
        + between
        + usize::from(resolved.evaluation.untouched)
        + usize::from(resolved.supervisor.is_some())
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
    context: Arc<Context>,
    models: Models,
    options: GraphOptions,
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
        match stage {
            Stage::References => self.references(&meter),
            Stage::Supervise => self.supervise(&meter),
            Stage::Synthesize => self.synthesize(&meter),
            Stage::Keep => self.keep(&meter),
            Stage::Tokenize => self.tokenize(&meter),
            Stage::Score => self.score(&meter),
            Stage::Direct => self.baseline(&meter),
            Stage::Train => self.train(&meter),
            Stage::Evaluate => self.evaluate(&meter),
            // Whoever joins the graph writes it, when all else has ended.
            Stage::Report => {}
        }
    }

    fn references(&mut self, meter: &Meter) {
        let needs = References {
            subjects: self.context.subjects.clone(),
            store: self.context.store.clone(),
            log: self.context.log(meter),
        };
        let to = self.wires.references.written_by(Stage::References);
        self.stages.spawn(meter, needs.run(), to);
    }

    fn supervise(&mut self, meter: &Meter) {
        let context = &self.context;
        let (Some((settings, _, sampling)), Some(open), Some(sampler)) = (
            context.resolved.teacher(),
            &self.models.supervisor,
            &context.supervisor_sampler,
        ) else {
            return;
        };
        let needs = Supervise {
            plan: context.plan.clone(),
            subjects: context.subjects.clone(),
            settings: settings.clone(),
            sampling: sampling.clone(),
            keys: context.sources.clone(),
            open: open.clone(),
            sampler: sampler.clone(),
            given: self.models.given.clone(),
            store: context.store.clone(),
            dir: context.dir.clone(),
            seed: context.resolved.seed,
            log: context.log(meter),
        };
        let input = self.wires.references.read_by(Stage::Supervise);
        let input = match &self.options.shared {
            None => input,
            // Photos are committed for all subjects, and then taken up in this process's own order.
            Some(Shared { subjects, .. }) => {
                let subjects = subjects.clone();
                stream::once(input.collect::<Vec<usize>>())
                    .flat_map(move |_| stream::iter(subjects.clone()))
                    .boxed()
            }
        };
        let to = self.wires.supervisors.written_by(Stage::Supervise);
        self.stages.spawn(meter, needs.run(input), to);
    }

    /// The sources of the subjects, as soon as they can make images.
    fn sources(&mut self) -> BoxStream<'static, ReadySource> {
        if let Some(source) = self.context.source.clone() {
            let subjects = self.wires.references.read_by(Stage::Synthesize);
            let ready = move |subject| ReadySource {
                subject,
                images: source.clone(),
                adapter: None,
            };
            return subjects.map(ready).boxed();
        }
        let supervisors = self.wires.supervisors.read_by(Stage::Synthesize);
        let (Some(sampler), Some((_, _, sampling))) = (
            self.context.supervisor_sampler.clone(),
            self.context.resolved.teacher(),
        ) else {
            return stream::empty().boxed();
        };
        let sampling = sampling.clone();
        let foreseen = Arc::new(self.sampled_prompts(&sampling.negative_prompt));
        let ready = move |supervisor: Supervisor| ReadySource {
            subject: supervisor.subject,
            adapter: Some(supervisor.adapter.clone()),
            images: Arc::new(SupervisorSource {
                key: supervisor.key,
                sampler: sampler.clone(),
                adapter: supervisor.adapter,
                values: Arc::default(),
                sampling: sampling.clone(),
                foreseen: foreseen.clone(),
            }),
        };
        supervisors.map(ready).boxed()
    }

    /// Every prompt that a supervisor's model will be asked for: by proxies, and where it is evaluated.
    fn sampled_prompts(&self, negative: &str) -> Vec<String> {
        let plan = &self.context.plan;
        let proxies = plan.proxies().iter().map(|proxy| &proxy.prompt);
        let evaluated = plan.evaluation().images.iter().map(|image| &image.prompt);
        let mut distinct = BTreeSet::from([negative]);
        distinct.extend(proxies.chain(evaluated).map(String::as_str));
        distinct.into_iter().map(String::from).collect()
    }

    fn synthesize(&mut self, meter: &Meter) {
        let input = self.sources();
        let to = self.wires.proxies.written_by(Stage::Synthesize);
        let context = &self.context;
        if let Some(Shared { work, .. }) = self.options.shared.take() {
            let needs = Generate {
                subjects: context.subjects.clone(),
                work,
                log: context.log(meter),
            };
            return self.stages.spawn(meter, needs.run(input), to);
        }
        let Some(keys) = context.proxy_keys.clone() else {
            return;
        };
        let steps = context.resolved.supervisor.as_ref();
        let steps = steps.map(|supervisor| supervisor.steps());
        let needs = Synthesize {
            subjects: context.subjects.clone(),
            keys,
            store: context.store.clone(),
            supervisor: context.supervisor_sampler.clone().zip(steps),
            log: context.log(meter),
        };
        let evaluated = self.wires.checkpoints.written_by(Stage::Synthesize);
        self.stages.spawn(meter, needs.run(input, evaluated), to);
    }

    fn keep(&mut self, meter: &Meter) {
        let needs = Keep {
            plan: self.context.plan.clone(),
            subjects: self.context.subjects.clone(),
            sources: self.context.sources.clone(),
            store: self.context.store.clone(),
            policy: self.options.commit.clone(),
            log: self.context.log(meter),
        };
        let sequential = self.options.sequential;
        let kept = needs.run(self.wires.proxies.read_by(Stage::Keep));
        let kept = kept.map_ok(move |mut batch| {
            if sequential {
                // Batches wait for each other; readers take the pixels from the store.
                batch.made = None;
            }
            batch
        });
        let to = self.wires.kept.written_by(Stage::Keep);
        self.stages.spawn(meter, kept, to);
    }

    fn tokenize(&mut self, meter: &Meter) {
        let needs = Tokenize {
            store: self.context.store.clone(),
            tokenizer: self.context.tokenizer.clone(),
            open: self.models.tokenizer.clone(),
            log: self.context.log(meter),
        };
        let tokens = needs.run(self.wires.kept.read_by(Stage::Tokenize));
        let to = self.wires.tokens.written_by(Stage::Tokenize);
        self.stages.spawn(meter, tokens, to);
    }

    fn score(&mut self, meter: &Meter) {
        let proxies = self.context.resolved.proxies.as_ref();
        let needs = ScoreProxies {
            plan: self.context.plan.clone(),
            prompts: proxies.map_or_else(Vec::new, |proxies| proxies.prompts.clone()),
            scorer: self.context.scorer(),
            log: self.context.log(meter),
        };
        let scores = needs.run(self.wires.kept.read_by(Stage::Score));
        self.stages.spawn(meter, scores, ());
    }

    fn baseline(&mut self, meter: &Meter) {
        let context = &self.context;
        let settings = &context.resolved.direct;
        let baseline = BaselineSettings {
            open: self.models.baseline.clone(),
            training: settings.training.clone(),
            sampling: context.resolved.student.sampling.clone(),
            checkpoints: Checkpoints::new(
                context.dir.join("checkpoints/direct"),
                format!("direct {}", context.student_identity),
            ),
            dir: context.dir.clone(),
        };
        let augmented = settings.source == Source::Augmented;
        self.tune(meter, Stage::Direct, Tuned::Baseline(baseline), augmented);
    }

    fn train(&mut self, meter: &Meter) {
        let student = self.student();
        let context = &self.context;
        let source = context.resolved.student.source;
        if !source.makes_proxies() {
            let augmented = source == Source::Augmented;
            return self.tune(meter, Stage::Train, Tuned::Student(student), augmented);
        }
        let needs = Train {
            plan: context.plan.clone(),
            subjects: context.subjects.len(),
            student,
            store: context.store.clone(),
            tokenizer: context.tokenizer.clone(),
            first_training_proxy: self.first_training_proxy.clone(),
            seed: context.resolved.seed,
            log: context.log(meter),
        };
        let learning = needs.run(self.wires.tokens.read_by(Stage::Train));
        let to = self.wires.checkpoints.written_by(Stage::Train);
        self.stages.spawn(meter, learning, to);
    }

    fn student(&self) -> StudentSettings {
        let context = &self.context;
        let (student, evaluation) = (&context.resolved.student, &context.resolved.evaluation);
        StudentSettings {
            open: self.models.student.clone(),
            training: student.training.clone(),
            sampling: student.sampling.clone(),
            init: student.init.clone().map(|dir| InitialAdapter {
                dir,
                digest: student.init_digest.clone(),
            }),
            evaluate_every: evaluation.every,
            untouched: evaluation.untouched,
            checkpoints: checkpoints(&context.dir, student.source, &context.student_identity),
            dir: context.dir.clone(),
        }
    }

    /// Spawns a stage that learns from the references alone.
    fn tune(&mut self, meter: &Meter, stage: Stage, tuned: Tuned, augmented: bool) {
        let needs = Direct {
            plan: self.context.plan.clone(),
            subjects: self.context.subjects.clone(),
            tuned,
            augmented,
            seed: self.context.resolved.seed,
            log: self.context.log(meter),
        };
        let learning = needs.run(self.wires.references.read_by(stage));
        let to = self.wires.checkpoints.written_by(stage);
        self.stages.spawn(meter, learning, to);
    }

    fn evaluate(&mut self, meter: &Meter) {
        let context = &self.context;
        let teacher = context.resolved.teacher();
        let sampling = teacher.map(|(_, _, sampling)| Sampling::Diffusion(sampling.clone()));
        let supervisor = context.supervisor_sampler.clone().zip(sampling);
        let needs = Evaluate {
            plan: context.plan.clone(),
            student: Sampler {
                model: context.student_sampler.clone(),
                sampling: context.resolved.student.sampling.clone(),
            },
            supervisor: supervisor.map(|(model, sampling)| Sampler { model, sampling }),
            scorer: context.scorer(),
            log: context.log(meter),
        };
        let scored = needs.run(self.wires.checkpoints.read_by(Stage::Evaluate));
        let to = self.wires.evaluations.written_by(Stage::Evaluate);
        self.stages.spawn(meter, scored, to);
    }
}

#[cfg(test)]
mod tests;
