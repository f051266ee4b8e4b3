//! Shows a [`Board`]: one line for each stage on a terminal, plain log lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::task::JoinHandle;

use super::meter::{Board, Meter};

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

async fn draw(board: Board, bars: MultiProgress) {
    let start = Instant::now();
    let mut lines: Vec<(Meter, ProgressBar)> = Vec::new();
    let style = ProgressStyle::with_template("{prefix:<12} {bar:24} {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    loop {
        for meter in board.meters().into_iter().skip(lines.len()) {
            let bar = bars.add(ProgressBar::new(1).with_style(style.clone()));
            bar.set_prefix(meter.name().to_string());
            lines.push((meter, bar));
        }
        for (meter, bar) in &lines {
            let (done, total) = meter.progress();
            bar.set_length(total.max(1));
            bar.set_position(done.min(total.max(1)));
            bar.set_message(describe(&board, meter, start));
        }
        tokio::time::sleep(DRAW).await;
    }
}

async fn write(board: Board) {
    let start = Instant::now();
    let mut last: Vec<String> = Vec::new();
    loop {
        tokio::time::sleep(WRITE).await;
        for (index, meter) in board.meters().iter().enumerate() {
            let key = format!("{:?}{}", meter.progress(), meter.finished());
            if last.len() <= index {
                last.push(String::new());
            }
            if last[index] != key && meter.progress().0 > 0 {
                eprintln!(
                    "{:>6.1}s {:<12} {}",
                    start.elapsed().as_secs_f64(),
                    meter.name(),
                    describe(&board, meter, start)
                );
                last[index] = key;
            }
        }
    }
}

/// "48/96 proxies, 6.1/s, queue 2/4, waits for tokens".
fn describe(board: &Board, meter: &Meter, start: Instant) -> String {
    let (done, total) = meter.progress();
    let mut parts = vec![if total > 0 {
        format!("{done}/{total} {}", meter.unit())
    } else {
        format!("{done} {}", meter.unit())
    }];
    let elapsed = start.elapsed().as_secs_f64();
    if done > 0 && elapsed > 0.0 {
        parts.push(format!("{:.1}/s", done as f64 / elapsed));
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
