//! What stages stand on: bounded channels with counters, models on threads of their own, progress, and the signal to
//! stop.
//!
//! A stage is a stream made from a stream. [`spawn`] drives it and sends what it yields into a bounded channel; sends
//! are awaited, so a slow stage holds back the ones before it. Closing is the only end signal: when a stage's input
//! ends, the stage drains and its output ends.

mod channel;
mod meter;
mod progress;
mod stop;
mod worker;

pub use channel::{Inlet, Outlet, channel};
pub use meter::{Board, Meter, StageReport};
pub use progress::Progress;
pub use stop::Stop;
pub use worker::Worker;

use futures::{Stream, StreamExt};
use tokio::task::JoinSet;

use crate::Result;

/// Drives `stage` as a task of `tasks`, sending what it yields to `outlet`. The first error ends the stage and becomes
/// the task's result, with the stage's name in front. A closed outlet ends the stage without an error.
pub fn spawn<T: Send + 'static>(
    tasks: &mut JoinSet<Result<()>>,
    meter: &Meter,
    stage: impl Stream<Item = Result<T>> + Send + 'static,
    outlet: Outlet<T>,
) {
    let meter = meter.clone();
    tasks.spawn(async move {
        let mut stage = std::pin::pin!(stage);
        while let Some(item) = stage.next().await {
            let item = item.map_err(|e| e.in_stage(meter.name()))?;
            if outlet.send(item).await.is_err() {
                break;
            }
        }
        meter.finish();
        Ok(())
    });
}

/// Drives the last stage of a graph, which yields nothing that anyone reads.
pub fn spawn_sink<T: Send + 'static>(
    tasks: &mut JoinSet<Result<()>>,
    meter: &Meter,
    stage: impl Stream<Item = Result<T>> + Send + 'static,
) {
    let meter = meter.clone();
    tasks.spawn(async move {
        let mut stage = std::pin::pin!(stage);
        while let Some(item) = stage.next().await {
            item.map_err(|e| e.in_stage(meter.name()))?;
        }
        meter.finish();
        Ok(())
    });
}
