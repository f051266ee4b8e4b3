//! The wish to stop: asked once, stages drain and checkpoint; asked twice, the process ends at once.

use tokio::sync::watch;

use crate::console;

/// A signal that many can watch. Clones are the same signal.
#[derive(Clone, Debug)]
pub struct Stop {
    sender: watch::Sender<bool>,
}

impl Default for Stop {
    fn default() -> Self {
        Self {
            sender: watch::Sender::new(false),
        }
    }
}

impl Stop {
    /// Asks for a stop.
    pub fn request(&self) {
        self.sender.send_replace(true);
    }

    /// Whether a stop was asked for.
    pub fn requested(&self) -> bool {
        *self.sender.borrow()
    }

    /// Waits until a stop is asked for.
    pub async fn wait(&self) {
        let mut receiver = self.sender.subscribe();
        // The sender is alive as long as `self` is, so this ends only with the wish.
        let _ = receiver.wait_for(|stop| *stop).await;
    }

    /// Listens to Ctrl-C (SIGINT) and SIGTERM: the first asks for a stop, the second ends the process with 130.
    pub fn on_signals(&self) {
        let stop = self.clone();
        tokio::spawn(async move {
            let mut asked = false;
            while signal().await.is_ok() {
                if asked {
                    std::process::exit(130);
                }
                asked = true;
                console::note(
                    "stopping: finishing what is in hand and writing a checkpoint (again: stop at once)",
                );
                stop.request();
            }
        });
    }
}

#[cfg(unix)]
async fn signal() -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        result = tokio::signal::ctrl_c() => result,
        _ = terminate.recv() => Ok(()),
    }
}

#[cfg(not(unix))]
async fn signal() -> std::io::Result<()> {
    tokio::signal::ctrl_c().await
}
