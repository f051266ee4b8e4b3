//! generate: the batches of a plan, shared between processes. Each has batches of its own and makes these first; then
//! it takes up what others have left, from the end of their share, whether they are slow, or were killed, or never
//! came. A batch is made under a claim that dies with its process, so nothing is made twice and nothing stays undone.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_stream::try_stream;
use futures::{FutureExt, Stream, StreamExt};

use super::synthesize::{batch_claim, draw};
use super::{Context, ProxyBatch, Supervisor};
use crate::Result;
use crate::config::limits;
use crate::store::{Claim, ProxyRow, Table, TokenRow};
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
    context: Arc<Context>,
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
    /// The claims by which the processes of this work are counted.
    shards: Vec<String>,
    /// Counts what all processes have committed.
    fleet: Meter,
    looked: Instant,
}

impl Work {
    /// What is left of the plan for `shard`, with tokens for every proxy if `tokens`. `fleet` counts what is in the
    /// store, whoever made it; `shards` are the claims of all processes at this work.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn open(
        context: Arc<Context>,
        shard: Shard,
        tokens: bool,
        shards: Vec<String>,
        fleet: Meter,
    ) -> Result<Self> {
        let proxies = context.store.proxies().await?;
        let tokens = match (tokens, &context.tokenizer) {
            (true, Some(tokenizer)) => {
                let table = context.store.tokens(&tokenizer.digest, tokenizer.count);
                Some(table.await?)
            }
            _ => None,
        };
        let batches = context.plan.batches();
        let own = (0..batches).filter(|number| number % shard.of == shard.index);
        let others = (0..batches).filter(|number| number % shard.of != shard.index);
        let mut work = Work {
            queues: vec![VecDeque::new(); context.subjects.len()],
            context: context.clone(),
            proxies,
            tokens,
            lacking: BTreeMap::new(),
            found: 0,
            busy: Vec::new(),
            shards,
            fleet,
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
                work.fleet.reuse(keys.len());
                continue;
            }
            work.lacking.insert(number, lacks);
            work.queues[context.plan.batch(number).subject].push_back((place, number));
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
        self.context.plan.batch(number).numbers.len()
    }

    fn keys(&self, number: usize) -> Vec<String> {
        self.context.proxy_keys(number, &self.proxies)
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
        self.fleet.add(come);
        if self.shards.len() > 1 {
            let at_work = self.context.store.locks().claimed(self.shards.iter())?;
            self.fleet
                .say(format!("{at_work} of {} shards at work", self.shards.len()));
        }
        Ok(())
    }

    /// Claims the next batch of a subject that is `ready`, if there is one that nobody has in hand.
    async fn claim(&mut self, ready: &BTreeMap<usize, Supervisor>) -> Result<Option<Taken>> {
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
            let Some(claim) = self.context.store.locks().try_claim(&batch_claim(&keys))? else {
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
            self.queues[self.context.plan.batch(number).subject].push_front((place, number));
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

/// Makes what is left, as supervisors come through `input`, until every batch is in the store or on its way there from
/// here.
pub fn generate(
    context: Arc<Context>,
    mut work: Work,
    input: impl Stream<Item = Supervisor> + Send,
    meter: Meter,
) -> impl Stream<Item = Result<ProxyBatch>> + Send {
    try_stream! {
        let Some(painter) = context.painter.clone() else { return };
        let mut ready: BTreeMap<usize, Supervisor> = BTreeMap::new();
        let mut input = std::pin::pin!(input.fuse());
        work.look()?;
        while !context.stop.requested() {
            while let Some(Some(supervisor)) = input.next().now_or_never() {
                ready.insert(supervisor.subject, supervisor);
            }
            if work.looked.elapsed() >= LOOK {
                work.look()?;
            }
            if let Some(Taken { number, keys, claim, draw: is_absent }) = work.claim(&ready).await? {
                let supervisor = &ready[&context.plan.batch(number).subject];
                let images = match is_absent {
                    true => Some(Arc::new(draw(&context, &painter, supervisor, number, &meter).await?)),
                    false => None,
                };
                match is_absent {
                    true => meter.add(keys.len()),
                    false => meter.reuse(keys.len()),
                }
                yield ProxyBatch { batch: number, keys, images, claim: Some(Arc::new(claim)) };
                continue;
            }
            work.look()?;
            let theirs = work.theirs();
            if theirs == 0 {
                break;
            }
            meter.say(format!("waits for {theirs} batches of other processes, or their supervisors"));
            tokio::select! {
                Some(supervisor) = input.next() => drop(ready.insert(supervisor.subject, supervisor)),
                () = tokio::time::sleep(RETRY) => {}
                () = context.stop.wait() => {}
            }
            work.refresh().await?;
            work.try_again();
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
}
