//! Shows a [`Board`]: one line for each stage on a terminal, plain log lines elsewhere.

use std::collections::VecDeque;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::task::JoinHandle;

use super::meter::{Board, Meter};
use crate::console;

/// How often lines are drawn on a terminal, and how often written elsewhere.
const DRAW: Duration = Duration::from_millis(200);
const WRITE: Duration = Duration::from_secs(5);

/// A task that shows progress until it is finished or dropped.
pub struct Progress {
    task: JoinHandle<()>,
    bars: Option<MultiProgress>,
}

impl Progress {
    /// Starts to show `board` on standard error.
    pub fn show(board: Board) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bars = terminal.then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr()));
        let drawn = bars.clone();
        let task = tokio::spawn(async move {
            match drawn {
                Some(bars) => draw(board, bars).await,
                None => write(board).await,
            }
        });
        Self { task, bars }
    }

    /// Stops and clears the lines.
    pub fn finish(self) {
        self.task.abort();
        if let Some(bars) = &self.bars {
            // Nothing can be done about a terminal that went away.
            let _ = bars.clear();
        }
    }
}

/// What was newly done of late, for the rate: meters that stood still, or only found what was there, have none.
#[derive(Default)]
struct Pace {
    samples: VecDeque<(Instant, u64)>,
}

/// How far back a rate looks, and how often it looks.
const PACE_OVER: Duration = Duration::from_secs(60);
const PACE_EVERY: Duration = Duration::from_secs(1);

impl Pace {
    /// Units per second over the last minute, at the time `now` with `fresh` newly done in all.
    fn at(&mut self, now: Instant, fresh: u64) -> f64 {
        let due = self
            .samples
            .back()
            .is_none_or(|(last, _)| now.duration_since(*last) >= PACE_EVERY);
        if due {
            self.samples.push_back((now, fresh));
        }
        let old = |(then, _): &(Instant, u64)| now.duration_since(*then) > PACE_OVER;
        // Nothing done between the first two: the work began after them.
        while self.samples.len() > 2
            && (old(&self.samples[1]) || self.samples[0].1 == self.samples[1].1)
        {
            self.samples.pop_front();
        }
        let Some((since, before)) = self.samples.front() else {
            return 0.0;
        };
        let seconds = now.duration_since(*since).as_secs_f64();
        if seconds > 0.0 {
            (fresh - before.min(&fresh)) as f64 / seconds
        } else {
            0.0
        }
    }
}

async fn draw(board: Board, bars: MultiProgress) {
    let mut paces: Vec<Pace> = Vec::new();
    let mut lines: Vec<(Meter, ProgressBar)> = Vec::new();
    let style = ProgressStyle::with_template("{prefix:<12} {bar:24} {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    loop {
        for meter in board.meters().into_iter().skip(lines.len()) {
            let bar = bars.add(ProgressBar::new(1).with_style(style.clone()));
            bar.set_prefix(console::escaped(meter.name()).into_owned());
            lines.push((meter, bar));
        }
        paces.resize_with(lines.len(), Pace::default);
        for ((meter, bar), pace) in lines.iter().zip(&mut paces) {
            let (done, total) = meter.progress();
            bar.set_length(total.max(1));
            bar.set_position(done.min(total.max(1)));
            let line = describe(&board, meter, pace);
            bar.set_message(console::escaped(&line).into_owned());
        }
        tokio::time::sleep(DRAW).await;
    }
}

async fn write(board: Board) {
    let start = Instant::now();
    let mut last: Vec<String> = Vec::new();
    let mut paces: Vec<Pace> = Vec::new();
    loop {
        let meters = board.meters();
        paces.resize_with(meters.len(), Pace::default);
        for (meter, pace) in meters.iter().zip(&mut paces) {
            pace.at(Instant::now(), meter.fresh());
        }
        tokio::time::sleep(WRITE).await;
        for (index, meter) in meters.iter().enumerate() {
            let key = format!("{:?}{}", meter.progress(), meter.finished());
            if last.len() <= index {
                last.push(String::new());
            }
            if last[index] != key && meter.progress().0 > 0 {
                console::note(format!(
                    "{:>6.1}s {:<12} {}",
                    start.elapsed().as_secs_f64(),
                    meter.name(),
                    describe(&board, meter, &mut paces[index])
                ));
                last[index] = key;
            }
        }
    }
}

/// "48/96 proxies, 6.1/s, 8 s left, queue 2/4, waits for tokens".
fn describe(board: &Board, meter: &Meter, pace: &mut Pace) -> String {
    let (done, total) = meter.progress();
    let mut parts = vec![if total > 0 {
        format!("{done}/{total} {}", meter.unit())
    } else {
        format!("{done} {}", meter.unit())
    }];
    let rate = pace.at(Instant::now(), meter.fresh());
    if rate > 0.0 && !meter.finished() {
        parts.push(format!("{rate:.1}/s"));
        if done < total {
            parts.push(format!("{} left", duration((total - done) as f64 / rate)));
        }
    }
    for (name, fill, capacity) in board.queues_into(meter.name()) {
        parts.push(format!("{name} {fill}/{capacity}"));
    }
    let note = meter.note();
    if !note.is_empty() {
        parts.push(note);
    }
    parts.join(", ")
}

/// "48 s", "12 min", "3 h 20 min".
fn duration(seconds: f64) -> String {
    let seconds = seconds.ceil() as u64;
    match seconds {
        0..100 => format!("{seconds} s"),
        100..6000 => format!("{} min", seconds.div_ceil(60)),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_counts_new_work_alone_and_forgets_what_was_long_ago() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut pace = Pace::default();
        assert_eq!(pace.at(at(0), 0), 0.0);
        // An hour of waiting for a supervisor is no part of it.
        for second in 1..3600 {
            assert_eq!(pace.at(at(second), 0), 0.0);
        }
        for second in 0..=100 {
            pace.at(at(3600 + second), 10 * second);
        }
        assert_eq!(pace.at(at(3700), 1000), 10.0);
        for second in 0..=100 {
            pace.at(at(3700 + second), 1000 + 30 * second);
        }
        assert_eq!(pace.at(at(3800), 4000), 30.0);
        assert_eq!(duration(59.2), "60 s");
        assert_eq!(duration(601.0), "11 min");
        assert_eq!(duration(12_000.0), "3 h 20 min");
    }
}
