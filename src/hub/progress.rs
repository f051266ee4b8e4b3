//! How far a download is: a bar on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use indicatif::{ProgressBar, ProgressStyle};

use super::human_bytes;
use crate::console;

struct State {
    name: String,
    size: u64,
    position: u64,
    /// Tenths of the size that a plain line has been written for.
    told: u64,
    bar: Option<ProgressBar>,
}

/// The progress of one file, over all attempts to get it.
#[derive(Clone)]
pub(super) struct Meter(Arc<Mutex<State>>);

impl Meter {
    /// Nothing is shown before the size is known.
    pub fn new(name: &str) -> Self {
        Self(Arc::new(Mutex::new(State {
            name: name.to_string(),
            size: 0,
            position: 0,
            told: 0,
            bar: None,
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that are there.
    pub fn position(&self) -> u64 {
        self.state().position
    }

    /// A line between the others.
    pub fn say(&self, line: &str) {
        match &self.state().bar {
            Some(bar) => bar.println(console::harmless(line)),
            None => console::note(line),
        }
    }

    /// Of `size` bytes `position` are there.
    pub fn begin(&self, size: u64, position: u64) {
        let mut state = self.state();
        let first = state.size == 0;
        (state.size, state.position) = (size, position);
        if let Some(bar) = &state.bar {
            bar.set_position(position);
        } else if std::io::stderr().is_terminal() {
            let bar =
                ProgressBar::new(size).with_message(console::escaped(&state.name).into_owned());
            let form = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
            if let Ok(style) = ProgressStyle::with_template(form) {
                bar.set_style(style);
            }
            state.bar = Some(bar);
        } else if first {
            console::note(format!("{}: {}", state.name, human_bytes(size)));
        }
    }

    /// So many more have arrived.
    pub fn advance(&self, bytes: u64) {
        let mut state = self.state();
        state.position += bytes;
        match &state.bar {
            Some(bar) => bar.set_position(state.position),
            None => {
                let tenth = state.position.saturating_mul(10) / state.size.max(1);
                // A file that arrives at once needs no lines.
                if tenth > state.told && tenth < 10 && state.size > 64 << 20 {
                    state.told = tenth;
                    console::note(format!("{}: {} %", state.name, tenth * 10));
                }
            }
        }
    }

    /// All of them are there.
    pub fn end(&self) {
        if let Some(bar) = &self.state().bar {
            bar.finish();
        }
    }
}
