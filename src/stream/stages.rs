//! The running stages of a graph.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::{Stream, StreamExt};
use tokio::task::JoinSet;

use super::{Meter, Outlet};
use crate::{Error, Result};

/// Where a stage sends what it yields.
pub trait Downstream<T>: Send + Sync + 'static {
    /// Sends `item`, waiting for room. `false` when nobody reads any more.
    fn pass(&self, item: T) -> impl Future<Output = bool> + Send;
}

/// The one channel after a stage.
impl<T: Send + 'static> Downstream<T> for Outlet<T> {
    async fn pass(&self, item: T) -> bool {
        self.send(item).await.is_ok()
    }
}

/// Several channels, each of which gets every item; the slowest reader holds the stage back. One whose reader has ended
/// is passed over: that reader says itself why. Where there is none, nobody has to read.
impl<T: Clone + Send + Sync + 'static> Downstream<T> for Vec<Outlet<T>> {
    async fn pass(&self, item: T) -> bool {
        let mut read = self.is_empty();
        for outlet in self {
            read |= outlet.send(item.clone()).await.is_ok();
        }
        read
    }
}

/// Nothing: what the last stage of a graph yields is not read.
impl<T: Send + 'static> Downstream<T> for () {
    async fn pass(&self, _: T) -> bool {
        true
    }
}

/// The running stages of a graph. Results come in the order in which stages ended, and a stage has ended before its
/// channels close: so whoever waits for the first failure gets the cause, not a later stage's complaint that its input
/// ended early.
#[derive(Default)]
pub struct Stages {
    tasks: JoinSet<()>,
    /// Of the stages that have ended and were not asked about yet.
    results: Arc<Mutex<VecDeque<Result<()>>>>,
}

impl Stages {
    /// Drives `stage`, sending what it yields to `to`. The first error ends the stage and becomes its result, with the
    /// stage's name in front. When nobody reads any more, the stage ends without an error.
    pub fn spawn<T: Send + 'static>(
        &mut self,
        meter: &Meter,
        stage: impl Stream<Item = Result<T>> + Send + 'static,
        to: impl Downstream<T>,
    ) {
        let (meter, results) = (meter.clone(), self.results.clone());
        self.tasks.spawn(async move {
            let result = drive(stage, &to).await;
            if result.is_ok() {
                meter.finish();
            }
            let result = result.map_err(|e| e.in_stage(meter.name()));
            queue(&results).push_back(result);
            drop(to);
        });
    }

    /// Waits for the next stage to end. `None` when all have; a stage that panicked has failed.
    pub async fn next(&mut self) -> Option<Result<()>> {
        match self.tasks.join_next().await? {
            Ok(()) => queue(&self.results).pop_front(),
            Err(panic) => Some(Err(Error::Invalid {
                what: format!("a stage ended unexpectedly: {panic}"),
                hint: None,
            })),
        }
    }

    /// Waits for all stages to end. Gives the first failure.
    pub async fn join(mut self) -> Result<()> {
        while let Some(result) = self.next().await {
            result?;
        }
        Ok(())
    }
}

fn queue(results: &Mutex<VecDeque<Result<()>>>) -> MutexGuard<'_, VecDeque<Result<()>>> {
    results.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn drive<T>(stage: impl Stream<Item = Result<T>>, to: &impl Downstream<T>) -> Result<()> {
    let mut stage = std::pin::pin!(stage);
    while let Some(item) = stage.next().await {
        if !to.pass(item?).await {
            break;
        }
    }
    Ok(())
}
