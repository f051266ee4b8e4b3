//! Counters of stages and channels, shared between the stages that move them and the progress that shows them.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All meters and channels of a run, in the order in which they were made.
#[derive(Clone, Default)]
pub struct Board {
    inner: Arc<BoardInner>,
}

#[derive(Default)]
struct BoardInner {
    meters: Mutex<Vec<Meter>>,
    gauges: Mutex<Vec<Gauge>>,
}

impl Board {
    /// A new stage's meter. `unit` is what it counts, in the plural.
    pub fn meter(&self, name: &str, unit: &str) -> Meter {
        let meter = Meter {
            inner: Arc::new(MeterInner {
                name: name.to_string(),
                unit: unit.to_string(),
                total: AtomicU64::new(0),
                done: AtomicU64::new(0),
                skipped: AtomicU64::new(0),
                busy: AtomicU64::new(0),
                input: AtomicU64::new(0),
                output: AtomicU64::new(0),
                finished: AtomicU64::new(0),
                note: Mutex::default(),
            }),
        };
        lock(&self.inner.meters).push(meter.clone());
        meter
    }

    pub(super) fn gauge(
        &self,
        name: &str,
        capacity: usize,
        writer: &Meter,
        reader: &Meter,
    ) -> Gauge {
        let gauge = Gauge {
            inner: Arc::new(GaugeInner {
                name: name.to_string(),
                capacity,
                fill: AtomicUsize::new(0),
                writer: writer.name().to_string(),
                reader: reader.name().to_string(),
            }),
        };
        lock(&self.inner.gauges).push(gauge.clone());
        gauge
    }

    /// All meters.
    pub fn meters(&self) -> Vec<Meter> {
        lock(&self.inner.meters).clone()
    }

    /// The channels that `stage` reads: name, fill and capacity.
    pub fn queues_into(&self, stage: &str) -> Vec<(String, usize, usize)> {
        lock(&self.inner.gauges)
            .iter()
            .filter(|gauge| gauge.inner.reader == stage)
            .map(|gauge| {
                (
                    gauge.inner.name.clone(),
                    gauge.inner.fill.load(Relaxed),
                    gauge.inner.capacity,
                )
            })
            .collect()
    }

    /// What every stage did, for the table at the end of a run.
    pub fn report(&self) -> Vec<StageReport> {
        self.meters().iter().map(Meter::report).collect()
    }
}

/// The counters of one channel.
#[derive(Clone)]
pub(super) struct Gauge {
    inner: Arc<GaugeInner>,
}

struct GaugeInner {
    name: String,
    capacity: usize,
    fill: AtomicUsize,
    writer: String,
    reader: String,
}

impl Gauge {
    pub(super) fn name(&self) -> &str {
        &self.inner.name
    }

    pub(super) fn entered(&self) {
        self.inner.fill.fetch_add(1, Relaxed);
    }

    pub(super) fn left(&self) {
        self.inner.fill.fetch_sub(1, Relaxed);
    }
}

impl std::fmt::Debug for Gauge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} -> {} ({})",
            self.inner.writer, self.inner.reader, self.inner.name
        )
    }
}

/// The counters of one stage. Clones share them.
#[derive(Clone)]
pub struct Meter {
    inner: Arc<MeterInner>,
}

struct MeterInner {
    name: String,
    unit: String,
    total: AtomicU64,
    done: AtomicU64,
    skipped: AtomicU64,
    /// Nanoseconds.
    busy: AtomicU64,
    input: AtomicU64,
    output: AtomicU64,
    finished: AtomicU64,
    note: Mutex<String>,
}

/// What one stage did.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct StageReport {
    pub stage: String,
    /// What is counted.
    pub unit: String,
    pub done: u64,
    /// Of those, how many were there already.
    pub reused: u64,
    /// Seconds of computing or writing.
    pub busy: f64,
    /// Seconds of waiting for input.
    pub waiting_in: f64,
    /// Seconds of waiting for room in the channel behind it.
    pub waiting_out: f64,
}

impl StageReport {
    /// Newly made units for each busy second.
    pub fn rate(&self) -> f64 {
        if self.busy > 0.0 {
            (self.done - self.reused.min(self.done)) as f64 / self.busy
        } else {
            0.0
        }
    }
}

impl Meter {
    /// The stage's name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// What it counts.
    pub fn unit(&self) -> &str {
        &self.inner.unit
    }

    /// Sets how many units there will be.
    pub fn expect(&self, total: usize) {
        self.inner.total.store(total as u64, Relaxed);
    }

    /// Counts `count` finished units.
    pub fn add(&self, count: usize) {
        self.inner.done.fetch_add(count as u64, Relaxed);
    }

    /// Counts `count` units that were there already.
    pub fn reuse(&self, count: usize) {
        self.inner.done.fetch_add(count as u64, Relaxed);
        self.inner.skipped.fetch_add(count as u64, Relaxed);
    }

    /// Done and total.
    pub fn progress(&self) -> (u64, u64) {
        (
            self.inner.done.load(Relaxed),
            self.inner.total.load(Relaxed),
        )
    }

    /// How many of those done were not there already.
    pub fn fresh(&self) -> u64 {
        let skipped = self.inner.skipped.load(Relaxed);
        self.inner.done.load(Relaxed).saturating_sub(skipped)
    }

    /// What the stage is doing or waiting for.
    pub fn note(&self) -> String {
        lock(&self.inner.note).clone()
    }

    /// Says what the stage is doing.
    pub fn say(&self, note: impl Into<String>) {
        *lock(&self.inner.note) = note.into();
    }

    /// Whether the stage has ended.
    pub fn finished(&self) -> bool {
        self.inner.finished.load(Relaxed) != 0
    }

    /// Marks the stage as ended.
    pub fn finish(&self) {
        self.inner.finished.store(1, Relaxed);
        self.say("done");
    }

    /// Adds to the time of computing.
    pub fn worked(&self, time: Duration) {
        self.inner.busy.fetch_add(time.as_nanos() as u64, Relaxed);
    }

    /// Awaits `work`, counting its time as busy.
    pub async fn busy<T>(&self, work: impl Future<Output = T>) -> T {
        let start = Instant::now();
        let result = work.await;
        self.worked(start.elapsed());
        result
    }

    pub(super) fn waits_for(&self, channel: &str) {
        self.say(format!("waits for {channel}"));
    }

    pub(super) fn waited_for_input(&self, time: Duration) {
        self.inner.input.fetch_add(time.as_nanos() as u64, Relaxed);
        self.say("");
    }

    pub(super) fn wait_for_room(&self, channel: &str) -> WaitForRoom<'_> {
        self.say(format!("waits for room in {channel}"));
        WaitForRoom {
            meter: self,
            start: Instant::now(),
        }
    }

    fn report(&self) -> StageReport {
        let seconds = |nanoseconds: &AtomicU64| nanoseconds.load(Relaxed) as f64 * 1e-9;
        StageReport {
            stage: self.inner.name.clone(),
            unit: self.inner.unit.clone(),
            done: self.inner.done.load(Relaxed),
            reused: self.inner.skipped.load(Relaxed),
            busy: seconds(&self.inner.busy),
            waiting_in: seconds(&self.inner.input),
            waiting_out: seconds(&self.inner.output),
        }
    }
}

/// Counts the time until it is dropped as waiting for room.
pub(super) struct WaitForRoom<'a> {
    meter: &'a Meter,
    start: Instant,
}

impl Drop for WaitForRoom<'_> {
    fn drop(&mut self) {
        self.meter
            .inner
            .output
            .fetch_add(self.start.elapsed().as_nanos() as u64, Relaxed);
        self.meter.say("");
    }
}
