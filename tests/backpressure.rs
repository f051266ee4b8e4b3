//! A stage that stalls holds back everything before it: the source makes exactly what channels and hands can hold.
//!
//! All tests but the last run on one thread, where tasks go on only when others wait, so that "nothing can go on" is
//! a fact and not a guess about time.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use async_stream::try_stream;
use futures::{Stream, StreamExt};
use proxytune::stream::{Board, Inlet, Outlet, Stages, Worker, channel};
use proxytune::{Error, Result};
use tokio::sync::Semaphore;

/// Hangs become failures.
const PATIENCE: Duration = Duration::from_secs(60);

/// Yields 0, 1, 2 … and counts what it has made.
fn source(items: usize, made: Arc<AtomicUsize>) -> impl Stream<Item = Result<usize>> + Send {
    try_stream! {
        for item in 0..items {
            made.fetch_add(1, SeqCst);
            yield item;
        }
    }
}

/// Passes on what it is given.
fn passing(input: Inlet<usize>) -> impl Stream<Item = Result<usize>> + Send {
    try_stream! {
        let mut input = std::pin::pin!(input);
        while let Some(item) = input.next().await {
            yield item;
        }
    }
}

/// Takes an item only when `allowed` has a permit, and notes it.
fn gated(
    input: Inlet<usize>,
    allowed: Arc<Semaphore>,
    taken: Arc<std::sync::Mutex<Vec<usize>>>,
) -> impl Stream<Item = Result<()>> + Send {
    try_stream! {
        let mut input = std::pin::pin!(input);
        loop {
            if let Ok(permit) = allowed.acquire().await {
                permit.forget();
            }
            let Some(item) = input.next().await else { break };
            taken.lock().unwrap().push(item);
            yield ();
        }
    }
}

/// Lets every task of this thread go on until `count` stands still: each round polls all that can go on.
async fn settle(count: &AtomicUsize) -> usize {
    let (mut last, mut still) = (count.load(SeqCst), 0);
    while still < 100 {
        tokio::task::yield_now().await;
        let now = count.load(SeqCst);
        still = if now == last { still + 1 } else { 0 };
        last = now;
    }
    last
}

async fn all_end(mut stages: Stages) -> Vec<Result<()>> {
    let mut results = Vec::new();
    let ended = tokio::time::timeout(PATIENCE, async {
        while let Some(result) = stages.next().await {
            results.push(result);
        }
    });
    ended.await.expect("a stage hangs");
    results
}

#[tokio::test]
async fn a_stalled_consumer_stops_the_source_at_what_channels_and_hands_hold() {
    const ITEMS: usize = 50;
    for (a, b) in [(1, 1), (2, 3), (5, 1), (4, 8)] {
        let (board, mut stages) = (Board::default(), Stages::default());
        let meters = ["source", "stage", "consumer"].map(|name| board.meter(name, "items"));
        let (to_stage, at_stage) = channel(&board, "first", a, &meters[0], &meters[1]);
        let (to_consumer, at_consumer) = channel(&board, "second", b, &meters[1], &meters[2]);
        let (made, taken) = (Arc::default(), Arc::default());
        let allowed = Arc::new(Semaphore::new(0));
        stages.spawn(&meters[0], source(ITEMS, Arc::clone(&made)), to_stage);
        stages.spawn(&meters[1], passing(at_stage), to_consumer);
        let consumer = gated(at_consumer, allowed.clone(), Arc::clone(&taken));
        stages.spawn(&meters[2], consumer, ());

        // Two hands: the source's and the stage's each hold the item for which there is no room.
        assert_eq!(settle(&made).await, a + b + 2, "capacities {a} and {b}");
        assert_eq!(board.queues_into("stage"), [("first".to_string(), a, a)]);
        assert_eq!(
            board.queues_into("consumer"),
            [("second".to_string(), b, b)]
        );
        assert_eq!(meters[0].note(), "waits for room in first");
        assert_eq!(meters[1].note(), "waits for room in second");
        // What the consumer takes makes room for as much, and no more.
        for more in 1..=3 {
            allowed.add_permits(1);
            assert_eq!(settle(&made).await, a + b + 2 + more);
        }
        allowed.add_permits(ITEMS);
        assert!(all_end(stages).await.iter().all(Result::is_ok));
        assert_eq!(*taken.lock().unwrap(), (0..ITEMS).collect::<Vec<_>>());
        assert!(meters.iter().all(|meter| meter.finished()));
    }
}

/// Sends each item down `beside` before it yields it.
fn to_two(input: Inlet<usize>, beside: Outlet<usize>) -> impl Stream<Item = Result<usize>> + Send {
    try_stream! {
        let mut input = std::pin::pin!(input);
        while let Some(item) = input.next().await {
            if beside.send(item).await.is_err() {
                break;
            }
            yield item;
        }
    }
}

#[tokio::test]
async fn the_slower_of_two_readers_holds_the_source_back() {
    const ITEMS: usize = 40;
    for stalled in ["beside", "behind"] {
        let (a, beside, behind) = (2, 3, 5);
        let (board, mut stages) = (Board::default(), Stages::default());
        let meters = ["source", "stage", "beside", "behind"].map(|name| board.meter(name, "items"));
        let (to_stage, at_stage) = channel(&board, "first", a, &meters[0], &meters[1]);
        let (to_beside, at_beside) = channel(&board, "beside", beside, &meters[1], &meters[2]);
        let (to_behind, at_behind) = channel(&board, "behind", behind, &meters[1], &meters[3]);
        let made = Arc::default();
        stages.spawn(&meters[0], source(ITEMS, Arc::clone(&made)), to_stage);
        stages.spawn(&meters[1], to_two(at_stage, to_beside), to_behind);
        let gate =
            |name: &str| Arc::new(Semaphore::new(if name == stalled { 0 } else { ITEMS + 1 }));
        let (gates, seen) = (
            [gate("beside"), gate("behind")],
            [Arc::default(), Arc::default()],
        );
        let readers = [at_beside, at_behind];
        for (i, input) in readers.into_iter().enumerate() {
            let reader = gated(input, gates[i].clone(), Arc::clone(&seen[i]));
            stages.spawn(&meters[2 + i], reader, ());
        }
        let capacity = if stalled == "beside" { beside } else { behind };
        assert_eq!(settle(&made).await, a + capacity + 2, "{stalled}");
        // The other reader has all that the stage could give it: behind the stalled send it gets one item less.
        let (other, given) = if stalled == "beside" {
            (1, beside)
        } else {
            (0, behind + 1)
        };
        assert_eq!(seen[other].lock().unwrap().len(), given, "{stalled}");
        for gate in gates {
            gate.add_permits(ITEMS + 1);
        }
        assert!(all_end(stages).await.iter().all(Result::is_ok));
        for seen in seen {
            assert_eq!(*seen.lock().unwrap(), (0..ITEMS).collect::<Vec<_>>());
        }
    }
}

#[tokio::test]
async fn a_source_that_ends_is_drained_to_the_last_item() {
    let (board, mut stages) = (Board::default(), Stages::default());
    let meters = ["source", "stage", "consumer"].map(|name| board.meter(name, "items"));
    let (to_stage, at_stage) = channel(&board, "first", 4, &meters[0], &meters[1]);
    let (to_consumer, consumer) = channel(&board, "second", 4, &meters[1], &meters[2]);
    let made = Arc::default();
    stages.spawn(&meters[0], source(6, Arc::clone(&made)), to_stage);
    stages.spawn(&meters[1], passing(at_stage), to_consumer);
    assert_eq!(settle(&made).await, 6);
    assert!(
        meters[0].finished(),
        "the source is gone before anything is read"
    );
    let (arrived, ended) = tokio::join!(consumer.collect::<Vec<_>>(), all_end(stages));
    assert_eq!(arrived, [0, 1, 2, 3, 4, 5]);
    assert!(ended.iter().all(Result::is_ok));
}

#[tokio::test]
async fn a_reader_that_goes_away_ends_the_stages_before_it_without_an_error() {
    let (board, mut stages) = (Board::default(), Stages::default());
    let meters = ["source", "stage", "consumer"].map(|name| board.meter(name, "items"));
    let (to_stage, at_stage) = channel(&board, "first", 2, &meters[0], &meters[1]);
    let (to_consumer, mut consumer) = channel(&board, "second", 2, &meters[1], &meters[2]);
    let made = Arc::default();
    stages.spawn(&meters[0], source(usize::MAX, Arc::clone(&made)), to_stage);
    stages.spawn(&meters[1], passing(at_stage), to_consumer);
    assert_eq!(consumer.next().await, Some(0));
    drop(consumer);
    assert!(all_end(stages).await.iter().all(Result::is_ok));
}

#[tokio::test]
async fn a_stage_that_fails_is_named_in_the_error_and_what_it_sent_before_arrives() {
    let (board, mut stages) = (Board::default(), Stages::default());
    let meters = ["source", "tokenize", "consumer"].map(|name| board.meter(name, "items"));
    let (to_stage, at_stage) = channel(&board, "first", 2, &meters[0], &meters[1]);
    let (to_consumer, consumer) = channel(&board, "second", 2, &meters[1], &meters[2]);
    let failing = try_stream! {
        let mut input = std::pin::pin!(at_stage);
        while let Some(item) = input.next().await {
            if item == 3 {
                Err(Error::invalid("item 3 is bad", "leave it out"))?;
            }
            yield item;
        }
    };
    stages.spawn(&meters[0], source(usize::MAX, Arc::default()), to_stage);
    stages.spawn(&meters[1], failing, to_consumer);
    let (arrived, ended) = tokio::join!(consumer.collect::<Vec<_>>(), all_end(stages));
    assert_eq!(arrived, [0, 1, 2]);
    let errors: Vec<Error> = ended.into_iter().filter_map(Result::err).collect();
    assert_eq!(errors.len(), 1, "{errors:?}");
    assert_eq!(errors[0].to_string(), "stage tokenize: item 3 is bad");
    assert_eq!(errors[0].hint().as_deref(), Some("leave it out"));
    assert!(
        !meters[1].finished(),
        "a failed stage does not count as done"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_cause_of_a_failure_comes_before_the_complaints_of_later_stages() {
    for _ in 0..200 {
        let (board, mut stages) = (Board::default(), Stages::default());
        let meters = ["first", "second"].map(|name| board.meter(name, "items"));
        let (to_second, at_second) = channel::<usize>(&board, "items", 1, &meters[0], &meters[1]);
        let failing = try_stream! {
            yield 0;
            Err(Error::invalid("the cause", "mend it"))?;
        };
        let complaining = try_stream! {
            let mut input = std::pin::pin!(at_second);
            while let Some(item) = input.next().await {
                yield item;
            }
            Err(Error::invalid("the input ended early", "see above"))?;
        };
        stages.spawn(&meters[1], complaining, ());
        stages.spawn(&meters[0], failing, to_second);
        let said: Vec<String> = all_end(stages)
            .await
            .into_iter()
            .map(|result| result.unwrap_err().to_string())
            .collect();
        assert_eq!(
            said,
            [
                "stage first: the cause",
                "stage second: the input ended early"
            ]
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_whose_thread_ends_is_reported_and_never_waited_for() {
    let in_time = |work| tokio::time::timeout(PATIENCE, work);
    let board = Board::default();
    let meter = board.meter("score", "items");
    let worker = Worker::spawn("fragile", || Ok(1)).await.unwrap();
    let doubled = worker.call(&meter, |value| Ok(*value * 2)).await;
    assert_eq!(doubled.unwrap(), 2);
    // Failing is an answer: the thread lives on.
    let failed: Result<()> = worker
        .call(&meter, |_| Err(Error::invalid("no", "yes")))
        .await;
    assert_eq!(failed.unwrap_err().to_string(), "no");

    let (to_stage, at_stage) = channel(&board, "first", 1, &meter, &meter);
    let (own, counted) = (worker.clone(), meter.clone());
    let stage = try_stream! {
        let mut input = std::pin::pin!(at_stage);
        while let Some(item) = input.next().await {
            yield own.call(&counted, move |value: &mut usize| {
                assert!(item < 2, "a test's panic");
                Ok(*value + item)
            })
            .await?;
        }
    };
    let mut stages = Stages::default();
    stages.spawn(&meter, source(usize::MAX, Arc::default()), to_stage);
    stages.spawn(&meter, stage, ());
    let errors: Vec<Error> = all_end(stages)
        .await
        .into_iter()
        .filter_map(Result::err)
        .collect();
    assert_eq!(errors.len(), 1, "{errors:?}");
    let text = errors[0].to_string();
    assert!(
        text.starts_with("stage score: the thread of fragile ended unexpectedly"),
        "{text}"
    );

    let later = in_time(worker.call(&meter, |value| Ok(*value)))
        .await
        .expect("a call hangs");
    assert!(later.unwrap_err().to_string().contains("fragile"));
    let built = Worker::<usize>::spawn("unbuilt", || panic!("a test's panic"));
    let built = tokio::time::timeout(PATIENCE, built)
        .await
        .expect("building hangs");
    assert!(built.err().unwrap().to_string().contains("unbuilt"));
    let refused =
        Worker::<usize>::spawn("refused", || Err(Error::invalid("no model", "get one"))).await;
    assert_eq!(refused.err().unwrap().hint().as_deref(), Some("get one"));
}
