//! What stages stand on: bounded channels with counters, models on threads of their own, progress, and the signal to
//! stop.
//!
//! A stage is a stream made from a stream. [`Stages::spawn`] drives it and sends what it yields into a bounded channel; sends
//! are awaited, so a slow stage holds back the ones before it. Closing is the only end signal: when a stage's input
//! ends, the stage drains and its output ends.

mod channel;
mod crowd;
mod meter;
mod progress;
mod stages;
mod stop;
mod worker;

pub use channel::{Inlet, Outlet, channel};
pub use crowd::{beside_others, computing};
pub use meter::{Board, Meter, StageReport};
pub use progress::Progress;
pub use stages::{Downstream, Stages};
pub use stop::Stop;
pub use worker::{Worker, blocking};
