//! generate: the batches of a plan, shared between processes. Each has batches of its own and makes these first; then
//! it takes up what others have left, from the end of their share, whether they are slow, or were killed, or never
//! came. A batch is made under a claim that dies with its process, so nothing is made twice and nothing stays undone.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_stream::try_stream;
use futures::{FutureExt, Stream, StreamExt};

use super::source::ReadySource;
use super::synthesize::batch_claim;
use super::{Log, ProxyBatch, ProxyKeys, Subjects, TokenizerIdentity};
use crate::Result;
use crate::config::limits;
use crate::store::{Claim, ProxyRow, Store, Table, TokenRow};
use crate::stream::Meter;

/// Between two looks at what other processes have committed.
const LOOK: Duration = Duration::from_secs(1);
/// Between two attempts at what other processes have in hand, when nothing else is left.
const RETRY: Duration = Duration::from_millis(200);

/// One of several processes that fill one store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    /// From 0.
    pub index: usize,
    /// How many there are, at least 1.
    pub of: usize,
}

impl std::fmt::Display for Shard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.index + 1, self.of)
    }
}

impl std::str::FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let parts = text.split_once('/');
        let numbers: Option<(usize, usize)> =
            parts.and_then(|(index, of)| Some((index.parse().ok()?, of.parse().ok()?)));
        match numbers {
            Some((_, of)) if of > limits::SHARDS.most => {
                Err(format!("of so many processes, {}", limits::SHARDS))
            }
            Some((index, of)) if 1 <= index && index <= of => Ok(Shard {
                index: index - 1,
                of,
            }),
            _ => Err("a shard is a number and how many there are, such as 1/2".to_string()),
        }
    }
}

/// What a batch still lacks: the first of its proxies that is not in the store, and the first that has no tokens.
#[derive(Debug, Clone)]
struct Lacks {
    proxy: Option<String>,
    tokens: Option<String>,
    /// This process has made it, or is about to.
    ours: bool,
}

/// The batches that were not in the store when this process came.
pub struct Work {
    all: AllWork,
    proxies: Table<ProxyRow>,
    tokens: Option<Table<TokenRow>>,
    lacking: BTreeMap<usize, Lacks>,
    /// Proxies that were there when this process came, with tokens or without.
    found: usize,
    /// For each subject its batches in the order in which this process takes them up: places in that order, and the
    /// batches' numbers.
    queues: Vec<VecDeque<(usize, usize)>>,
    /// What others had in hand when it was looked at.
    busy: Vec<(usize, usize)>,
    looked: Instant,
}

/// What all processes do together.
pub struct AllWork {
    /// How many subjects there are.
    pub subjects: usize,
    pub keys: ProxyKeys,
    pub store: Arc<Store>,
    /// Whose tokens every proxy gets; `None` for proxies alone.
    pub tokens: Option<TokenizerIdentity>,
    /// The claims by which the processes of this work are counted.
    pub shards: Vec<String>,
    /// Counts what is in the store, whoever made it.
    pub fleet: Meter,
}

impl Work {
    /// What is left of it for `shard`.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn open(all: AllWork, shard: Shard) -> Result<Self> {
        let proxies = all.store.proxies().await?;
        let tokens = match &all.tokens {
            Some(TokenizerIdentity { digest, count }) => {
                Some(all.store.tokens(digest, *count).await?)
            }
            None => None,
        };
        let plan = all.keys.plan.clone();
        let batches = plan.batches();
        let own = (0..batches).filter(|number| number % shard.of == shard.index);
        let others = (0..batches).filter(|number| number % shard.of != shard.index);
        let mut work = Work {
            queues: vec![VecDeque::new(); all.subjects],
            all,
            proxies,
            tokens,
            lacking: BTreeMap::new(),
            found: 0,
            busy: Vec::new(),
            looked: Instant::now(),
        };
        for (place, number) in own.chain(others.rev()).enumerate() {
            let keys = work.keys(number);
            let first = |missing: Vec<String>| missing.into_iter().next();
            let lacks = Lacks {
                proxy: first(work.proxies.missing(&keys)),
                tokens: work
                    .tokens
                    .as_ref()
                    .and_then(|table| first(table.missing(&keys))),
                ours: false,
            };
            if lacks.proxy.is_none() {
                work.found += keys.len();
            }
            if lacks.proxy.is_none() && lacks.tokens.is_none() {
                work.all.fleet.reuse(keys.len());
                continue;
            }
            work.lacking.insert(number, lacks);
            work.queues[plan.batch(number).subject].push_back((place, number));
        }
        Ok(work)
    }

    /// Whether anything is left of the proxies of the subject at `subject`.
    pub fn wants(&self, subject: usize) -> bool {
        !self.queues[subject].is_empty()
    }

    /// How many proxies were there when this process came, with tokens or without.
    pub fn found(&self) -> usize {
        self.found
    }

    fn size(&self, number: usize) -> usize {
        self.all.keys.plan.batch(number).numbers.len()
    }

    fn keys(&self, number: usize) -> Vec<String> {
        self.all.keys.of(number, &self.proxies)
    }

    fn is_there(&self, lacks: &Lacks) -> bool {
        let has_tokens =
            |key: &String| self.tokens.as_ref().is_none_or(|table| table.contains(key));
        let proxy = lacks.proxy.as_ref();
        proxy.is_none_or(|key| self.proxies.contains(key))
            && lacks.tokens.as_ref().is_none_or(has_tokens)
    }

    /// Takes up what others have committed.
    async fn refresh(&self) -> Result<()> {
        self.proxies.refresh().await?;
        match &self.tokens {
            Some(table) => table.refresh().await,
            None => Ok(()),
        }
    }

    /// Counts what has come into the store, and who is at work.
    fn look(&mut self) -> Result<()> {
        self.looked = Instant::now();
        let mut lacking = std::mem::take(&mut self.lacking);
        let mut come = 0;
        lacking.retain(|&number, lacks| {
            let there = self.is_there(lacks);
            come += if there { self.size(number) } else { 0 };
            !there
        });
        self.lacking = lacking;
        self.all.fleet.add(come);
        if self.all.shards.len() > 1 {
            let at_work = self.all.store.locks().claimed(self.all.shards.iter())?;
            self.all.fleet.say(format!(
                "{at_work} of {} shards at work",
                self.all.shards.len()
            ));
        }
        Ok(())
    }

    /// Claims the next batch of a subject that is `ready`, if there is one that nobody has in hand.
    async fn claim(&mut self, ready: &BTreeMap<usize, ReadySource>) -> Result<Option<Taken>> {
        loop {
            let first = |subject: &&usize| self.queues[**subject].front().map(|(place, _)| *place);
            let waiting = ready.keys().filter(|subject| first(subject).is_some());
            let Some((place, number)) = waiting
                .min_by_key(first)
                .copied()
                .and_then(|subject| self.queues[subject].pop_front())
            else {
                return Ok(None);
            };
            let Some(lacks) = self.lacking.get(&number) else {
                continue;
            };
            if self.is_there(lacks) {
                continue;
            }
            let keys = self.keys(number);
            let Some(claim) = self.all.store.locks().try_claim(&batch_claim(&keys))? else {
                self.busy.push((place, number));
                continue;
            };
            // Whoever had it may have committed it just before letting go.
            self.refresh().await?;
            if let Some(lacks) = self.lacking.get_mut(&number) {
                lacks.ours = true;
                let lacks = lacks.clone();
                if !self.is_there(&lacks) {
                    let draw = lacks.proxy.is_some_and(|key| !self.proxies.contains(&key));
                    return Ok(Some(Taken {
                        number,
                        keys,
                        claim,
                        draw,
                    }));
                }
            }
        }
    }

    /// How many batches other processes have in hand, or will have.
    fn theirs(&self) -> usize {
        let others = self.lacking.values().filter(|lacks| !lacks.ours);
        others.count()
    }

    /// Puts what others had in hand back into the queues: they may have been killed.
    fn try_again(&mut self) {
        self.busy.sort_unstable();
        for (place, number) in std::mem::take(&mut self.busy).into_iter().rev() {
            self.queues[self.all.keys.plan.batch(number).subject].push_front((place, number));
        }
    }
}

/// A batch that is this process's to make.
struct Taken {
    number: usize,
    keys: Vec<String>,
    claim: Claim,
    /// Whether its images are still to be drawn; else it lacks tokens alone.
    draw: bool,
}

/// What the stage needs.
pub struct Generate {
    pub subjects: Subjects,
    pub work: Work,
    pub log: Log,
}

impl Generate {
    /// Makes what is left, as sources come through `input`, until every batch is in the store or on its way there from
    /// here.
    pub fn run(
        self,
        input: impl Stream<Item = ReadySource> + Send,
    ) -> impl Stream<Item = Result<ProxyBatch>> + Send {
        try_stream! {
            let Self { subjects, mut work, log: Log { meter, stop, .. } } = self;
            let plan = work.all.keys.plan.clone();
            let mut ready: BTreeMap<usize, ReadySource> = BTreeMap::new();
            let mut input = std::pin::pin!(input.fuse());
            work.look()?;
            while !stop.requested() {
                while let Some(Some(source)) = input.next().now_or_never() {
                    ready.insert(source.subject, source);
                }
                if work.looked.elapsed() >= LOOK {
                    work.look()?;
                }
                if let Some(Taken { number, keys, claim, draw: is_absent }) = work.claim(&ready).await? {
                    let subject = plan.batch(number).subject;
                    let made = match is_absent {
                        true => Some(ready[&subject].make(&plan, number, &subjects[subject], &meter).await?),
                        false => None,
                    };
                    match is_absent {
                        true => meter.add(keys.len()),
                        false => meter.reuse(keys.len()),
                    }
                    yield ProxyBatch { batch: number, keys, made, claim: Some(Arc::new(claim)) };
                    continue;
                }
                work.look()?;
                let theirs = work.theirs();
                if theirs == 0 {
                    break;
                }
                meter.say(format!("waits for {theirs} batches of other processes, or their supervisors"));
                tokio::select! {
                    Some(source) = input.next() => drop(ready.insert(source.subject, source)),
                    () = tokio::time::sleep(RETRY) => {}
                    () = stop.wait() => {}
                }
                work.refresh().await?;
                work.try_again();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shard_is_a_number_and_how_many_there_are() {
        let shard: Shard = "2/3".parse().unwrap();
        assert_eq!(shard, Shard { index: 1, of: 3 });
        assert_eq!(shard.to_string(), "2/3");
        for wrong in ["", "1", "0/2", "3/2", "1/0", "a/b", "1/2/3", "-1/2"] {
            assert!(wrong.parse::<Shard>().is_err(), "{wrong}");
        }
    }

    use std::sync::atomic::Ordering::SeqCst;

    use futures::stream;

    use super::super::fakes::{Fakes, all, next, supervisors};

    async fn stage(fakes: &Fakes, index: usize, of: usize) -> Generate {
        let all = AllWork {
            subjects: fakes.subjects.len(),
            keys: fakes.keys(),
            store: fakes.store.clone(),
            tokens: None,
            shards: (0..of).map(|shard| format!("shards/{shard}")).collect(),
            fleet: fakes.board.meter("fleet", "proxies"),
        };
        Generate {
            subjects: fakes.subjects.clone(),
            work: Work::open(all, Shard { index, of }).await.unwrap(),
            log: fakes.log("generate").await,
        }
    }

    #[tokio::test]
    async fn a_shard_makes_its_own_batches_in_order_and_then_those_of_others_from_their_end() {
        let fakes = Fakes::new(&[]).await;
        let sources = stream::iter(supervisors(&fakes, &fakes.sampler()));
        let stage = stage(&fakes, 1, 2).await.run(sources);
        let mut stage = std::pin::pin!(stage);
        let mut order = Vec::new();
        while let Some(batch) = next(&mut stage).await {
            let batch = batch.unwrap();
            assert!(batch.made.is_some() && batch.claim.is_some());
            order.push(batch.batch);
            // As keep does, so that it sees an end.
            all(fakes.keep().await.run(stream::iter([batch])))
                .await
                .unwrap();
        }
        assert_eq!(order, [1, 3, 5, 4, 2, 0]);
        assert_eq!(fakes.work.drawn.load(SeqCst), 24);
        let again = fakes.again(&[]);
        let sources = stream::iter(supervisors(&again, &again.sampler()));
        let found = self::stage(&again, 0, 2).await;
        assert_eq!(found.work.found(), 24);
        assert!(all(found.run(sources)).await.unwrap().is_empty());
        assert_eq!(again.work.of_learners(), [0; 4]);
    }

    #[tokio::test]
    async fn what_another_has_in_hand_is_left_to_it_and_taken_when_it_is_killed() {
        let fakes = Fakes::new(&["proxies.count=4"]).await;
        let keys = fakes.keys().known(0).newest().clone();
        let theirs = fakes.store.locks().try_claim(&batch_claim(&keys)).unwrap();
        assert!(theirs.is_some());
        let sources = stream::iter(supervisors(&fakes, &fakes.sampler()));
        let stage = stage(&fakes, 0, 1).await.run(sources);
        let mut stage = std::pin::pin!(stage);
        assert_eq!(next(&mut stage).await.unwrap().unwrap().batch, 1);
        drop(theirs);
        assert_eq!(next(&mut stage).await.unwrap().unwrap().batch, 0);
    }

    #[tokio::test]
    async fn a_stop_and_a_failure_end_it_at_once() {
        let fakes = Fakes::new(&[]).await;
        let sources = supervisors(&fakes, &fakes.sampler());
        fakes.work.fails_after.store(4, SeqCst);
        let broken = stage(&fakes, 0, 1).await.run(stream::iter(sources.clone()));
        let mut broken = std::pin::pin!(broken);
        assert_eq!(next(&mut broken).await.unwrap().unwrap().batch, 0);
        let error = next(&mut broken).await.unwrap().unwrap_err();
        assert_eq!(error.to_string(), "the model is broken");
        let again = fakes.again(&[]);
        again.stop.request();
        let stopped = stage(&again, 0, 1).await.run(stream::iter(sources));
        assert!(all(stopped).await.unwrap().is_empty());
    }
}
