//! The real graph, with fake models over a store in memory.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use super::*;
use crate::config::Resolved;
use crate::stages::fakes::{FakeSource, Fakes, settles};
use crate::stages::source::ImageSource;

/// The graph of a run of `fakes`, and what its stages share.
async fn graph(fakes: &Fakes, topology: &Topology) -> (Graph, Arc<Context>) {
    let resolved = &fakes.resolved;
    let custom = resolved.student.source == Source::Custom;
    let source: Option<Arc<dyn ImageSource>> = match custom {
        true => Some(Arc::new(FakeSource(fakes.work.clone()))),
        false => None,
    };
    let keys = resolved.proxies.is_some().then(|| fakes.keys());
    let (tokenizer, open) = fakes.tokenizer();
    let context = Arc::new(Context {
        run: "run".into(),
        dir: fakes.dir.path().to_path_buf(),
        resolved: Arc::new(resolved.clone()),
        plan: fakes.plan.clone(),
        subjects: fakes.subjects.clone(),
        student_identity: "identity".into(),
        sources: vec!["supervisor 0".into(), "supervisor 1".into()],
        proxy_keys: keys,
        store: fakes.store.clone(),
        metrics: fakes.log("metrics").await.metrics,
        board: fakes.board.clone(),
        stop: fakes.stop.clone(),
        warnings: fakes.warnings.clone(),
        source,
        supervisor_sampler: resolved.supervisor.as_ref().map(|_| fakes.sampler()),
        student_sampler: fakes.sampler(),
        evaluator: fakes.evaluator(),
        tokenizer: Some(tokenizer),
    });
    let models = Models {
        student: fakes.learner(),
        baseline: fakes.learner(),
        supervisor: Some(fakes.learner()),
        given: None,
        tokenizer: open,
    };
    let how = GraphOptions {
        sequential: false,
        commit: CommitPolicy::at_once(),
        shared: None,
    };
    (
        Graph::build(topology, context.clone(), models, how),
        context,
    )
}

async fn ends(graph: Graph, context: &Context, drain: bool) -> Result<Finished> {
    let ended = tokio::time::timeout(Duration::from_secs(60), graph.join(context, drain));
    ended.await.expect("the graph hangs")
}

fn capacity(resolved: &Resolved, from: Stage, to: Stage) -> usize {
    let topology = Topology::of_run(resolved);
    let edge = topology.after(from).find(|edge| edge.to == to);
    edge.unwrap().capacity
}

#[tokio::test]
async fn proxies_are_made_ahead_of_a_tokenizer_that_stands_still_by_what_channels_and_hands_hold() {
    for channels in [["1", "1"], ["2", "3"]] {
        let [proxies, kept] = channels;
        let overrides = [
            "proxies.count=80",
            "student.overlap=0.1",
            "direct.enabled=false",
            "evaluation.untouched=false",
            &format!("channels.proxies={proxies}"),
            &format!("channels.kept={kept}"),
        ];
        let fakes = Fakes::new(&overrides).await;
        fakes.work.gate.close();
        let (graph, context) = graph(&fakes, &Topology::of_run(&fakes.resolved)).await;
        let running = tokio::spawn(async move { ends(graph, &context, false).await });
        // One batch each in the hands of synthesize, keep and tokenize, and what is between them.
        let between = capacity(&fakes.resolved, Stage::Synthesize, Stage::Keep)
            + capacity(&fakes.resolved, Stage::Keep, Stage::Tokenize);
        let made = || fakes.work.drawn.load(SeqCst);
        settles(made, 4 * (between + 3), &format!("{channels:?}")).await;
        fakes.work.gate.open();
        running.await.unwrap().unwrap();
        assert_eq!(fakes.store.proxies().await.unwrap().count(), 160);
    }
}

#[tokio::test]
async fn training_is_ahead_of_an_evaluation_that_stands_still_by_what_channels_and_hands_hold() {
    for capacity_of in ["1", "3"] {
        let overrides = [
            "student.source=references",
            "direct.enabled=false",
            "student.steps=40",
            "evaluation.every=1",
            "evaluation.untouched=false",
            &format!("channels.checkpoints={capacity_of}"),
        ];
        let fakes = Fakes::new(&overrides).await;
        fakes.work.gate.close();
        let (graph, context) = graph(&fakes, &Topology::of_run(&fakes.resolved)).await;
        let running = tokio::spawn(async move { ends(graph, &context, false).await });
        // A checkpoint for each step: in the hands of train and evaluate, and between them.
        let between = capacity(&fakes.resolved, Stage::Train, Stage::Evaluate);
        let taken = || fakes.work.losses.load(SeqCst);
        settles(taken, between + 2, capacity_of).await;
        fakes.work.gate.open();
        let finished = running.await.unwrap().unwrap();
        let steps: Vec<usize> = finished.evaluated.iter().map(|e| e.step).collect();
        assert_eq!(steps, (1..=40).collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn a_second_run_over_the_same_store_and_folder_learns_and_draws_nothing() {
    let fakes = Fakes::new(&[]).await;
    let topology = Topology::of_run(&fakes.resolved);
    let (whole, context) = graph(&fakes, &topology).await;
    let first = ends(whole, &context, false).await.unwrap();
    assert_eq!(first.first_training_proxy, Some(4));
    let mut again = fakes.again(&[]);
    again.dir = fakes.dir;
    let (whole, context) = graph(&again, &topology).await;
    let second = ends(whole, &context, false).await.unwrap();
    let [_, drawn, encoded, losses] = again.work.of_learners();
    // Direct tuning looks at the photos before it finds that it is done.
    assert_eq!((drawn, encoded, losses), (0, 6, 0));
    let told = |finished: &Finished| -> Vec<_> {
        let told = finished.evaluated.iter();
        told.map(|e| (e.method, e.step, e.adapter.clone(), e.samples.clone()))
            .collect()
    };
    assert_eq!(told(&second), told(&first));
}

#[tokio::test]
async fn the_first_failure_is_what_comes_out_and_drained_stages_commit_what_was_made() {
    for drain in [false, true] {
        let fakes = Fakes::new(&["proxies.count=40"]).await;
        fakes.work.fails_after.store(20, SeqCst);
        let topology = Topology::of_proxies(&fakes.resolved, true);
        let (graph, context) = graph(&fakes, &topology).await;
        let error = ends(graph, &context, drain).await.err().unwrap();
        assert_eq!(error.to_string(), "stage synthesize: the model is broken");
        if drain {
            // Five whole batches.
            assert_eq!(fakes.store.proxies().await.unwrap().count(), 20);
            assert!(fakes.stop.requested());
        }
    }
}

#[tokio::test]
async fn a_stopped_graph_drains_and_ends_without_an_error() {
    let overrides = [
        "proxies.count=80",
        "student.overlap=0.1",
        "direct.enabled=false",
        "evaluation.untouched=false",
    ];
    let fakes = Fakes::new(&overrides).await;
    fakes.work.gate.close();
    let (graph, context) = graph(&fakes, &Topology::of_run(&fakes.resolved)).await;
    let running = tokio::spawn(async move { ends(graph, &context, false).await });
    while fakes.work.drawn.load(SeqCst) < 8 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    fakes.stop.request();
    fakes.work.gate.open();
    let finished = running.await.unwrap().unwrap();
    let drawn = fakes.work.drawn.load(SeqCst);
    assert!(drawn < 160 && finished.evaluated.is_empty(), "{drawn}");
    assert_eq!(fakes.store.proxies().await.unwrap().count(), drawn);
}

#[tokio::test]
async fn a_program_s_own_source_takes_the_place_of_supervisors_in_the_whole_graph() {
    let text = "seed = 1\n[subject.dog1]\nimages = \"any\"\nclass = \"dog\"\n[proxies]\ncount = 12\n\
                [student]\nmodel = \"nano-llamagen\"\nsource = \"custom\"\nsteps = 4\n[evaluation]\n\
                prompts = [\"a {token} {class}\"]\nimages_per_prompt = 1\n";
    let fakes = Fakes::of(text, &["subject.cat1.images=any", "subject.cat1.class=cat"]).await;
    let topology = Topology::of_run(&fakes.resolved);
    assert!(!topology.has(Stage::Supervise) && topology.has(Stage::Score));
    let (graph, context) = graph(&fakes, &topology).await;
    let finished = ends(graph, &context, false).await.unwrap();
    assert_eq!(finished.evaluated.last().unwrap().step, 4);
    let learnt = fakes.work.learnt.lock().unwrap().clone();
    // The student learns by what the source says of its images.
    let captions: std::collections::BTreeSet<String> = learnt.into_iter().collect();
    assert!(captions.contains("a sks dog number 0"), "{captions:?}");
    assert!(captions.iter().all(|caption| caption.contains(" number ")));
}
