//! Whatever a file says, its reader answers within seconds and in bounded memory, and never panics. Each reader of
//! foreign bytes is given valid files of this repository with random changes, and random bytes.
//!
//! `PROXYTUNE_FUZZ_CASES` is the number of inputs for each reader (default 200), `PROXYTUNE_FUZZ_SEED` a number that
//! chooses other ones:
//!
//! ```text
//! PROXYTUNE_FUZZ_CASES=100000 cargo test --release --test tests -- fuzz --nocapture
//! ```
//!
//! What fails is kept as a file, whose path is told.

pub mod mutate;
mod readers;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use self::mutate::{input, inputs};
use super::support::memory::peak_of;

/// No call may take longer.
const LONGEST: Duration = Duration::from_secs(5);
/// A call that has not ended by then never will: the process ends, as nothing else stops it.
const HANGS: Duration = Duration::from_secs(120);
/// No call may have more allocated at once.
const MEMORY: usize = 1 << 30;

/// A reader of one kind of file.
pub struct Reader {
    /// For messages, and for choosing the inputs.
    pub name: &'static str,
    /// What the file is called in its folder.
    pub file: &'static str,
    /// Valid files.
    pub seeds: Vec<Vec<u8>>,
    /// Files that have to lie beside.
    pub beside: Vec<(String, Vec<u8>)>,
    /// Makes the file's bytes of an input, for files in which something else than all of it is changed.
    pub wrap: fn(Vec<u8>) -> Vec<u8>,
    /// Reads the file in the folder; whether it was accepted.
    pub read: Box<dyn Fn(&Path) -> bool>,
}

fn number(variable: &str, default: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text.parse().unwrap(),
        Err(_) => default,
    }
}

/// What all calls of one reader came to.
#[derive(Default)]
struct Tally {
    accepted: usize,
    slowest: Duration,
    peak: usize,
}

/// Tries `reader` with as many inputs as are wanted.
fn fuzz(reader: Reader) {
    let cases = number("PROXYTUNE_FUZZ_CASES", 200);
    let place = tempfile::tempdir().unwrap();
    for (name, bytes) in &reader.beside {
        std::fs::write(place.path().join(name), bytes).unwrap();
    }
    let mut read_unchanged = 0;
    for seed in &reader.seeds {
        let file = place.path().join(reader.file);
        std::fs::write(&file, (reader.wrap)(seed.clone())).unwrap();
        read_unchanged += usize::from((reader.read)(place.path()));
    }
    let all = reader.seeds.len();
    assert_eq!(
        read_unchanged, all,
        "{}: valid files are refused",
        reader.name
    );

    let config = Config {
        cases: cases as u32,
        failure_persistence: None,
        max_shrink_iters: 200,
        ..Config::default()
    };
    let chosen = format!("{} {}", reader.name, number("PROXYTUNE_FUZZ_SEED", 0));
    let random = TestRng::from_seed(
        RngAlgorithm::ChaCha,
        blake3::hash(chosen.as_bytes()).as_bytes(),
    );
    let mut runner = TestRunner::new_with_rng(config, random);
    let tally = std::cell::RefCell::new(Tally::default());
    let begun = Instant::now();
    let watchdog = Watchdog::start(reader.name);
    let outcome = runner.run(&inputs(), |(pick, edits)| {
        let bytes = (reader.wrap)(input(&reader.seeds, pick, &edits));
        attempt(
            &reader,
            place.path(),
            &bytes,
            &mut tally.borrow_mut(),
            &watchdog,
        )
    });
    let tally = tally.into_inner();
    eprintln!(
        "fuzz {}: {cases} inputs in {:.0} s, {} accepted, slowest {:.2} s, most memory {} MiB",
        reader.name,
        begun.elapsed().as_secs_f64(),
        tally.accepted,
        tally.slowest.as_secs_f64(),
        tally.peak >> 20,
    );
    if let Err(error) = outcome {
        panic!("{}: {error}", reader.name);
    }
}

fn attempt(
    reader: &Reader,
    folder: &Path,
    bytes: &[u8],
    tally: &mut Tally,
    watchdog: &Watchdog,
) -> Result<(), TestCaseError> {
    std::fs::write(folder.join(reader.file), bytes).unwrap();
    watchdog.begin();
    let begun = Instant::now();
    let call = || catch_unwind(AssertUnwindSafe(|| (reader.read)(folder)));
    let (outcome, peak) = peak_of(call);
    let took = begun.elapsed();
    watchdog.end();
    let fault = match outcome {
        Err(_) => Some("a panic".to_string()),
        Ok(_) if took > LONGEST => Some(format!("{:.1} s", took.as_secs_f64())),
        Ok(_) if peak > MEMORY => Some(format!("{} MiB of memory", peak >> 20)),
        Ok(_) => None,
    };
    if let Some(fault) = fault {
        let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{}", reader.file));
        std::fs::write(&kept, bytes).unwrap();
        return Err(TestCaseError::fail(format!("{fault}: {}", kept.display())));
    }
    tally.accepted += usize::from(matches!(outcome, Ok(true)));
    tally.slowest = tally.slowest.max(took);
    tally.peak = tally.peak.max(peak);
    Ok(())
}

/// Ends the process when a call never returns: a thread cannot be stopped from outside.
struct Watchdog {
    /// Milliseconds since the watchdog began at which the present call did; 0 when there is none.
    begun: std::sync::Arc<AtomicU64>,
    since: Instant,
}

impl Watchdog {
    fn start(name: &'static str) -> Self {
        let (begun, since) = (std::sync::Arc::new(AtomicU64::new(0)), Instant::now());
        let watched = std::sync::Arc::downgrade(&begun);
        std::thread::spawn(move || {
            while let Some(begun) = watched.upgrade() {
                let at = begun.load(Ordering::Relaxed);
                drop(begun);
                if at > 0 && since.elapsed() > Duration::from_millis(at) + HANGS {
                    eprintln!("fuzz {name}: a call does not return");
                    std::process::abort();
                }
                std::thread::sleep(Duration::from_millis(200));
            }
        });
        Self { begun, since }
    }

    fn begin(&self) {
        let now = self.since.elapsed().as_millis() as u64;
        self.begun.store(now.max(1), Ordering::Relaxed);
    }

    fn end(&self) {
        self.begun.store(0, Ordering::Relaxed);
    }
}
