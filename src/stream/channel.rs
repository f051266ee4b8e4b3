//! Bounded channels that count what passes and how long either side waits.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use futures::Stream;
use tokio::sync::mpsc;

use super::meter::{Board, Gauge, Meter};

/// A channel of `capacity` items, at least 1, between the stage of `writer` and the stage of `reader`. Its fill shows
/// on `board` under `name`.
pub fn channel<T>(
    board: &Board,
    name: &str,
    capacity: usize,
    writer: &Meter,
    reader: &Meter,
) -> (Outlet<T>, Inlet<T>) {
    let (sender, receiver) = mpsc::channel(capacity.max(1));
    let gauge = board.gauge(name, capacity.max(1), writer, reader);
    let outlet = Outlet {
        sender,
        gauge: gauge.clone(),
        meter: writer.clone(),
    };
    (
        outlet,
        Inlet {
            receiver,
            gauge,
            meter: reader.clone(),
            waiting_since: None,
        },
    )
}

/// The sending end. Clones may be given to several writers; the channel closes when the last is dropped.
pub struct Outlet<T> {
    sender: mpsc::Sender<T>,
    gauge: Gauge,
    meter: Meter,
}

impl<T> Clone for Outlet<T> {
    fn clone(&self) -> Self {
        Self {
            sender: self.sender.clone(),
            gauge: self.gauge.clone(),
            meter: self.meter.clone(),
        }
    }
}

impl<T> Outlet<T> {
    /// Another writer's end of the same channel, whose waiting counts as that of `writer`.
    pub fn written_by(&self, writer: &Meter) -> Self {
        Self {
            meter: writer.clone(),
            ..self.clone()
        }
    }

    /// Sends `item`, waiting while the channel is full. Gives the item back if nobody reads any more.
    pub async fn send(&self, item: T) -> Result<(), T> {
        let permit = match self.sender.try_reserve() {
            Ok(permit) => permit,
            Err(mpsc::error::TrySendError::Closed(())) => return Err(item),
            Err(mpsc::error::TrySendError::Full(())) => {
                let waiting = self.meter.wait_for_room(self.gauge.name());
                let permit = self.sender.reserve().await;
                drop(waiting);
                match permit {
                    Ok(permit) => permit,
                    Err(_) => return Err(item),
                }
            }
        };
        self.gauge.entered();
        permit.send(item);
        Ok(())
    }
}

/// The receiving end: a stream that ends when every [`Outlet`] is dropped.
pub struct Inlet<T> {
    receiver: mpsc::Receiver<T>,
    gauge: Gauge,
    meter: Meter,
    waiting_since: Option<Instant>,
}

impl<T> Stream for Inlet<T> {
    type Item = T;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<T>> {
        match self.receiver.poll_recv(context) {
            Poll::Pending => {
                if self.waiting_since.is_none() {
                    self.waiting_since = Some(Instant::now());
                    self.meter.waits_for(self.gauge.name());
                }
                Poll::Pending
            }
            Poll::Ready(item) => {
                if let Some(since) = self.waiting_since.take() {
                    self.meter.waited_for_input(since.elapsed());
                }
                if item.is_some() {
                    self.gauge.left();
                }
                Poll::Ready(item)
            }
        }
    }
}
