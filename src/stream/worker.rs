//! A model on threads of its own, spoken to through a channel: async code never computes. Each model has its own pool,
//! so that no thread ever takes up another model's work in the middle of its own.

use std::time::Instant;

use tokio::sync::{mpsc, oneshot};

use super::crowd::beside_others;
use super::meter::Meter;
use crate::{Error, Result};

type Job<M> = Box<dyn FnOnce(&mut M) + Send>;

/// Backward passes recurse along the graph, so the thread's stack is large; it is virtual memory until used.
const STACK_BYTES: usize = 256 << 20;

/// Runs `work`, which computes or waits for a disk, on a thread for such work. `what` says what it is, should it panic:
/// "reading photos".
///
/// # Errors
/// Those of `work`; a panic in it.
pub async fn blocking<T: Send + 'static>(
    what: &str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let ended = tokio::task::spawn_blocking(work).await;
    ended.map_err(|e| Error::Invalid {
        what: format!("{what} ended unexpectedly: {e}"),
        hint: None,
    })?
}

/// A handle to a model that lives on its own thread. Clones speak to the same model; calls are served in turn. The
/// thread ends when the last handle is dropped.
pub struct Worker<M> {
    jobs: mpsc::Sender<Job<M>>,
    name: String,
}

impl<M> Clone for Worker<M> {
    fn clone(&self) -> Self {
        Self {
            jobs: self.jobs.clone(),
            name: self.name.clone(),
        }
    }
}

impl<M: Send + 'static> Worker<M> {
    /// Starts the thread `name` and builds the model on it; returns when it is built, with its error if it has one.
    pub async fn spawn(
        name: &str,
        build: impl FnOnce() -> Result<M> + Send + 'static,
    ) -> Result<Self> {
        let (jobs, mut inbox) = mpsc::channel::<Job<M>>(1);
        let (ready, built) = oneshot::channel();
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(rayon::current_num_threads())
            .stack_size(STACK_BYTES)
            .build()
            .map_err(|e| Error::Invalid {
                what: format!("threads for {name}: {e}"),
                hint: None,
            })?;
        std::thread::Builder::new()
            .name(name.to_string())
            .spawn(move || {
                // On a thread of the pool itself: a job need not be handed on.
                pool.install(|| {
                    let mut model = match build() {
                        Ok(model) => {
                            let _ = ready.send(Ok(()));
                            model
                        }
                        Err(error) => {
                            let _ = ready.send(Err(error));
                            return;
                        }
                    };
                    while let Some(job) = inbox.blocking_recv() {
                        beside_others(|| job(&mut model));
                    }
                });
            })
            .map_err(Error::io(name))?;
        let worker = Self {
            jobs,
            name: name.to_string(),
        };
        match built.await {
            Ok(result) => result.map(|()| worker),
            Err(_) => Err(worker.died()),
        }
    }

    /// Runs `job` on the model's thread and returns its result; the time it computes counts as `meter`'s busy time.
    pub async fn call<T: Send + 'static>(
        &self,
        meter: &Meter,
        job: impl FnOnce(&mut M) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (reply, result) = oneshot::channel();
        let meter = meter.clone();
        let job: Job<M> = Box::new(move |model| {
            let start = Instant::now();
            let result = job(model);
            meter.worked(start.elapsed());
            // A caller that has gone away no longer wants the result.
            let _ = reply.send(result);
        });
        self.jobs.send(job).await.map_err(|_| self.died())?;
        result.await.map_err(|_| self.died())?
    }

    fn died(&self) -> Error {
        Error::Invalid {
            what: format!(
                "the thread of {} ended unexpectedly; its own message stands above",
                self.name
            ),
            hint: None,
        }
    }
}
