//! One long trial of a watched folder: six subjects, photographs among them, arrive over time; one is extended, one
//! renamed, one retired, one folder holds only bad files, and the process is killed five times.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use proxytune::watch::state::{Ended, Home, Run, State};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::support::{Running, find, program, say, tables};

/// Where folders of photos called `dog6`, `backpack` and `cat` lie: the DreamBooth dataset.
const PHOTOS: &str = "PROXYTUNE_DREAMBOOTH";
/// Where to keep both watched folders and their stores; otherwise they vanish.
const KEEP: &str = "PROXYTUNE_TRIAL";

struct Trial {
    dir: PathBuf,
    process: Option<Running>,
    /// So often it is still to be killed while a run is under way.
    due: usize,
    /// What runs take, in seconds; when in a run it is killed, is drawn.
    run_takes: f64,
    random: ChaCha8Rng,
    /// The runs that were under way, and how long the process had been at them.
    kills: Vec<(usize, f64)>,
}

impl Trial {
    fn new(dir: PathBuf) -> Self {
        std::fs::create_dir_all(dir.join("photos")).unwrap();
        Self {
            dir,
            process: None,
            due: 0,
            run_takes: 0.0,
            random: ChaCha8Rng::seed_from_u64(5),
            kills: Vec::new(),
        }
    }

    fn photos(&self) -> PathBuf {
        self.dir.join("photos")
    }

    fn home(&self) -> Home {
        Home::of(&self.photos()).unwrap()
    }

    fn state(&self) -> State {
        self.home().load().unwrap()
    }

    /// Starts the watch, or starts it again.
    fn start(&mut self) {
        let mut command = program();
        command
            .arg("watch")
            .arg(self.photos())
            .arg("--store")
            .arg(self.dir.join("store"));
        // Nano models on photographs: DINO moves a lot, and no adapter shall be refused here.
        command.args(["--margin", "2", "--settle", "1", "--replay", "25"]);
        for setting in [
            "supervisor.steps=200",
            "proxies.count=48",
            "student.steps=120",
            "student.checkpoint_every=20",
        ] {
            command.args(["--set", setting]);
        }
        self.process = Some(Running::start(command));
    }

    /// Copies `files` of the folder `from` into `class/subject`, the last one in two halves.
    fn copy(&self, from: &Path, to: &str, files: std::ops::Range<usize>) {
        let to = self.photos().join(to);
        std::fs::create_dir_all(&to).unwrap();
        let all = find(from, &|name| {
            name.ends_with(".jpg") || name.ends_with(".png")
        });
        for path in &all[files.start..files.end.min(all.len())] {
            let bytes = std::fs::read(path).unwrap();
            let to = to.join(path.file_name().unwrap());
            std::fs::write(&to, &bytes[..bytes.len() / 2]).unwrap();
            std::fs::write(&to, &bytes).unwrap();
        }
    }

    /// Waits until `happened` holds for what is remembered and nothing is left to do. While kills are due, the process
    /// is killed in the middle of its runs and started again; what is due when there are no more runs stays due.
    fn until(&mut self, what: &str, kills: usize, happened: impl Fn(&State) -> bool) {
        self.due += kills;
        let home = self.home();
        let is_done =
            |state: &State| state.run.is_none() && state.queue().is_empty() && happened(state);
        loop {
            let is_due = self.due > 0;
            let process = self.process.as_mut().unwrap();
            let looked = || {
                std::thread::sleep(Duration::from_millis(50));
                let state = home.load().unwrap();
                is_done(&state) || (is_due && state.run.is_some())
            };
            assert!(process.runs_until(looked), "{what}: it ended");
            let state = home.load().unwrap();
            if is_done(&state) {
                break;
            }
            let Some(run) = state.run else {
                continue;
            };
            let seconds = self.random.random_range(0.05..0.8) * self.run_takes;
            let ended = process.ends_within(Duration::from_secs_f64(seconds));
            assert!(!ended, "{what}: it ended");
            let is_at_it = |now: &Run| now.number == run.number;
            if home.load().unwrap().run.as_ref().is_some_and(is_at_it) {
                self.process.take().unwrap().kill();
                self.due -= 1;
                self.kills.push((run.number, seconds));
                eprintln!("{what}: killed after {seconds:.1} s at run {}", run.number);
                self.start();
            }
        }
        eprintln!("{what}: {} runs", self.state().history.len());
    }

    fn adapters(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut found = BTreeMap::new();
        for root in [
            self.home().path().join("adapters"),
            self.dir.join("store/adapters"),
        ] {
            for path in find(&root, &|name| name.ends_with(".safetensors")) {
                let name = path.strip_prefix(&self.dir).unwrap().to_path_buf();
                // Beside a published adapter there may be what a killed process was writing aside.
                if !name.display().to_string().contains(".tmp/") {
                    found.insert(name, std::fs::read(&path).unwrap());
                }
            }
        }
        found
    }
}

fn runs(count: usize) -> impl Fn(&State) -> bool {
    move |state| state.history.len() == count
}

/// The same things happen to every folder; `kills` says how often the process is killed during each of them.
fn story(trial: &mut Trial, photographs: &Path, kills: [usize; 8]) {
    let nano = Path::new(env!("CARGO_MANIFEST_DIR")).join("datasets/nano/subjects");
    let photos = trial.photos();
    trial.start();
    trial.copy(&photographs.join("dog6"), "dog/dog6", 0..9);
    trial.until("dog6 arrives", kills[0], runs(1));
    let bad = photos.join("vase/bad");
    std::fs::create_dir_all(&bad).unwrap();
    for number in 0..4 {
        std::fs::write(bad.join(format!("{number}.jpg")), b"not a picture").unwrap();
    }
    trial.copy(&nano.join("dog1"), "dog/dog1", 0..4);
    trial.until("dog1 and bad files arrive", kills[1], |state| {
        state.history.len() == 2 && state.set_aside.len() == 4
    });
    trial.copy(&photographs.join("backpack"), "backpack/backpack", 0..9);
    trial.copy(&nano.join("teapot1"), "teapot/teapot1", 0..9);
    trial.until("backpack and teapot1 arrive", kills[2], runs(4));
    trial.copy(&nano.join("dog1"), "dog/dog1", 4..5);
    trial.until("dog1 is extended", kills[3], runs(5));
    std::fs::rename(photos.join("dog/dog6"), photos.join("dog/hasso")).unwrap();
    trial.until("dog6 is renamed", kills[4], |state| {
        state.subjects[0].folder == "dog/hasso"
    });
    std::fs::remove_dir_all(photos.join("teapot/teapot1")).unwrap();
    trial.until("teapot1 is retired", kills[5], |state| {
        state.subject("teapot1").unwrap().retired
    });
    trial.copy(&photographs.join("cat"), "cat/cat", 0..9);
    trial.until("cat arrives", kills[6], runs(6));
    trial.copy(&nano.join("toy1"), "toy/toy1", 0..9);
    trial.until("toy1 arrives", kills[7], runs(7));
    trial.process.take().unwrap().kill();
}

/// What the story comes to, whatever its scores.
fn assert_told(trial: &Trial) {
    let state = trial.state();
    let subjects: Vec<(&str, &str, &str, usize, bool)> = state
        .subjects
        .iter()
        .map(|s| (&*s.id, &*s.folder, &*s.token, s.photos.len(), s.retired))
        .collect();
    let expected = [
        ("dog6", "dog/hasso", "sks", 5, false),
        ("dog1", "dog/dog1", "ohw", 5, false),
        ("backpack", "backpack/backpack", "zwx", 6, false),
        ("teapot1", "teapot/teapot1", "pll", 5, true),
        ("cat", "cat/cat", "vok", 5, false),
        ("toy1", "toy/toy1", "zub", 5, false),
    ];
    assert_eq!(subjects, expected);
    let learnt: Vec<&str> = state.history.iter().map(|e| e.subject.as_str()).collect();
    let expected = ["dog6", "dog1", "backpack", "teapot1", "dog1", "cat", "toy1"];
    assert_eq!(learnt, expected);
    assert!(state.history.iter().all(|ended| ended.refused.is_none()));
    for (before, ended) in state.history.iter().zip(&state.history[1..]) {
        assert_eq!(ended.init, before.adapter, "run {}", ended.number);
    }
    let bad: Vec<&str> = state.set_aside.iter().map(|b| b.path.as_str()).collect();
    assert_eq!(
        bad,
        [0, 1, 2, 3].map(|number| format!("vase/bad/{number}.jpg"))
    );
    assert!(state.waiting["vase/bad"].contains("0 of at least 3"));
    let published = state.published.unwrap();
    let known: Vec<&str> = published.scores.keys().map(String::as_str).collect();
    assert_eq!(known, ["backpack", "cat", "dog1", "dog6", "toy1"]);
    let link = std::fs::canonicalize(trial.home().published()).unwrap();
    assert_eq!((published.number, link), (7, trial.home().adapter(7)));
}

/// The README's table: what every subject scores after each run.
fn print_scores(trial: &Trial) {
    let state = trial.state();
    let ids: Vec<&str> = state.subjects.iter().map(|s| s.id.as_str()).collect();
    println!("| run | learns | seconds | {} |", ids.join(" | "));
    println!("|---|---|---|{}", "---|".repeat(ids.len()));
    for ended in &state.history {
        let dino = |id: &&str| match ended.scores.get(*id) {
            Some(scores) => format!("{:.3}", scores.dino),
            None => String::new(),
        };
        let dino: Vec<String> = ids.iter().map(dino).collect();
        let Ended {
            number,
            subject,
            seconds,
            ..
        } = ended;
        println!(
            "| {number} | `{subject}` | {seconds:.0} | {} |",
            dino.join(" | ")
        );
    }
    let first: Vec<f64> = state
        .history
        .iter()
        .map(|e| e.scores[ids[0]].dino)
        .collect();
    let last = first[first.len() - 1];
    println!(
        "DINO of {}: {:.3} when it was learnt, {last:.3} after {} further runs ({:+.3})",
        ids[0],
        first[0],
        first.len() - 1,
        last - first[0]
    );
}

/// `PROXYTUNE_DREAMBOOTH=DIR cargo test --release watch_trial -- --ignored --nocapture`; DIR holds the photos of
/// the DreamBooth dataset. Minutes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "minutes, and photographs that are not part of this repository"]
async fn a_folder_that_lives_and_is_killed_five_times_ends_like_one_that_was_left_alone() {
    let photographs = PathBuf::from(std::env::var(PHOTOS).expect("set PROXYTUNE_DREAMBOOTH"));
    let temporary = tempfile::tempdir().unwrap();
    let place = std::env::var(KEEP).map_or(temporary.path().to_path_buf(), PathBuf::from);
    let mut calm = Trial::new(place.join("calm"));
    let begun = Instant::now();
    story(&mut calm, &photographs, [0; 8]);
    println!("undisturbed: {:.0} s", begun.elapsed().as_secs_f64());
    assert_told(&calm);
    print_scores(&calm);
    let took: f64 = calm.state().history.iter().map(|ended| ended.seconds).sum();
    let mut hit = Trial::new(place.join("hit"));
    hit.run_takes = took / calm.state().history.len() as f64;
    let begun = Instant::now();
    story(&mut hit, &photographs, [1, 0, 2, 1, 0, 0, 1, 0]);
    println!("killed: {:.0} s", begun.elapsed().as_secs_f64());
    for (run, seconds) in &hit.kills {
        println!(
            "killed {seconds:.1} s after the start of run {run}, or after it was taken up again"
        );
    }
    assert_eq!(hit.kills.len(), 5);
    assert_told(&hit);

    let essence = |trial: &Trial| {
        let mut state = trial.state();
        state.store = Default::default();
        for ended in &mut state.history {
            ended.seconds = 0.0;
        }
        if let Some(published) = &mut state.published {
            published.run.clear();
        }
        state
    };
    assert_eq!(essence(&hit), essence(&calm));
    let (hit_adapters, calm_adapters) = (hit.adapters(), calm.adapters());
    assert_eq!(
        hit_adapters.keys().collect::<Vec<_>>(),
        calm_adapters.keys().collect::<Vec<_>>()
    );
    for (path, bytes) in &calm_adapters {
        assert!(*bytes == hit_adapters[path], "{} differs", path.display());
    }
    let mut status = program();
    status.args(["watch", "--status"]).arg(hit.photos());
    println!("{}", say(status).out);
    let (hit, calm) = (
        tables(&hit.dir.join("store")).await,
        tables(&calm.dir.join("store")).await,
    );
    assert_eq!(hit, calm);
    println!(
        "{} adapters and {} tables are equal",
        calm_adapters.len(),
        calm.len()
    );
}
