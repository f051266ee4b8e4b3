//! One long trial of a watched folder: six subjects, photographs among them, arrive over time; one is extended, one
//! renamed, one retired, one folder holds only bad files, and the process is killed five times.

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use proxytune::watch::state::{Home, State};
use rand::{Rng, SeedableRng};
use support::{Running, find, program, tables};

/// Where folders of photos called `dog6`, `backpack` and `cat` lie: the DreamBooth dataset.
const PHOTOS: &str = "PROXYTUNE_DREAMBOOTH";
/// Where to keep both watched folders and their stores; otherwise they vanish.
const KEEP: &str = "PROXYTUNE_TRIAL";

struct Trial {
    dir: PathBuf,
    process: Option<Running>,
}

impl Trial {
    fn new(dir: PathBuf) -> Self {
        std::fs::create_dir_all(dir.join("photos")).unwrap();
        Self { dir, process: None }
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

    /// Waits until `happened` holds for what is remembered and nothing is left to do, killing the process at `kills`
    /// seconds, one after the other, and starting it again.
    fn until(&mut self, what: &str, kills: &[f64], happened: impl Fn(&State) -> bool) {
        for seconds in kills {
            let mut process = self.process.take().unwrap();
            let ended = process.ends_within(Duration::from_secs_f64(*seconds));
            assert!(!ended, "{what}: it ended");
            let state = self.state();
            eprintln!(
                "{what}: killed; under way: {:?}",
                state.run.map(|run| run.number)
            );
            process.kill();
            self.start();
        }
        let (home, process) = (self.home(), self.process.as_mut().unwrap());
        let is_done = || {
            std::thread::sleep(Duration::from_millis(50));
            let state = home.load().unwrap();
            state.run.is_none() && state.queue().is_empty() && happened(&state)
        };
        assert!(process.runs_until(is_done), "{what}: it ended");
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
                found.insert(name, std::fs::read(&path).unwrap());
            }
        }
        found
    }
}

fn runs(count: usize) -> impl Fn(&State) -> bool {
    move |state| state.history.len() == count
}

/// The same things happen to every folder; `kill` says at which seconds the process is killed after each of them.
fn story(trial: &mut Trial, photographs: &Path, mut kill: impl FnMut(usize) -> Vec<f64>) {
    let nano = Path::new(env!("CARGO_MANIFEST_DIR")).join("datasets/nano/subjects");
    trial.start();
    trial.copy(&photographs.join("dog6"), "dog/dog6", 0..9);
    let kills = kill(0);
    trial.until("dog6 arrives", &kills, runs(1));
    let bad = trial.photos().join("vase/bad");
    std::fs::create_dir_all(&bad).unwrap();
    for number in 0..4 {
        std::fs::write(bad.join(format!("{number}.jpg")), b"not a picture").unwrap();
    }
    trial.copy(&nano.join("dog1"), "dog/dog1", 0..4);
    let kills = kill(1);
    trial.until("dog1 and bad files arrive", &kills, |state| {
        state.history.len() == 2 && state.set_aside.len() == 4
    });
    trial.copy(&photographs.join("backpack"), "backpack/backpack", 0..9);
    trial.copy(&nano.join("teapot1"), "teapot/teapot1", 0..9);
    let kills = kill(2);
    trial.until("backpack and teapot1 arrive", &kills, runs(4));
    trial.copy(&nano.join("dog1"), "dog/dog1", 4..5);
    let kills = kill(3);
    trial.until("dog1 is extended", &kills, runs(5));
    std::fs::rename(
        trial.photos().join("dog/dog6"),
        trial.photos().join("dog/hasso"),
    )
    .unwrap();
    let kills = kill(4);
    trial.until("dog6 is renamed", &kills, |state| {
        state.subjects[0].folder == "dog/hasso"
    });
    std::fs::remove_dir_all(trial.photos().join("teapot/teapot1")).unwrap();
    let kills = kill(5);
    trial.until("teapot1 is retired", &kills, |state| {
        state.subject("teapot1").unwrap().retired
    });
    trial.copy(&photographs.join("cat"), "cat/cat", 0..9);
    let kills = kill(6);
    trial.until("cat arrives", &kills, runs(6));
    trial.copy(&nano.join("toy1"), "toy/toy1", 0..9);
    let kills = kill(7);
    trial.until("toy1 arrives", &kills, runs(7));
    trial.process.take().unwrap().kill();
}

/// `PROXYTUNE_DREAMBOOTH=DIR cargo test --release --test watch_trial -- --ignored --nocapture`; DIR holds the photos of
/// the DreamBooth dataset. Minutes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "minutes, and photographs that are not part of this repository"]
async fn a_folder_that_lives_and_is_killed_five_times_ends_like_one_that_was_left_alone() {
    let photographs = PathBuf::from(std::env::var(PHOTOS).expect("set PROXYTUNE_DREAMBOOTH"));
    let temporary = tempfile::tempdir().unwrap();
    let place = std::env::var(KEEP).map_or(temporary.path().to_path_buf(), PathBuf::from);
    let mut calm = Trial::new(place.join("calm"));
    story(&mut calm, &photographs, |_| Vec::new());
    // In which of the things that happen it is killed; when, is drawn within the time that runs took.
    let took: Vec<f64> = calm
        .state()
        .history
        .iter()
        .map(|ended| ended.seconds)
        .collect();
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(5);
    let mut hit = Trial::new(place.join("hit"));
    let mut kills = 0;
    story(&mut hit, &photographs, |happening| {
        let [run, times] = match happening {
            0 => [0, 1],
            2 => [2, 2],
            3 => [4, 1],
            6 => [5, 1],
            _ => [0, 0],
        };
        kills += times;
        (0..times)
            .map(|_| 1.5 + random.random_range(0.05..0.8) * took[run])
            .collect()
    });
    assert_eq!(kills, 5);

    println!("DINO of every subject after each run:");
    let state = calm.state();
    for ended in &state.history {
        let dino: Vec<String> = ended
            .scores
            .iter()
            .map(|(subject, scores)| format!("{subject} {:.3}", scores.dino))
            .collect();
        println!(
            "{} learns {:<9} {:>4.0} s  {}",
            ended.number,
            ended.subject,
            ended.seconds,
            dino.join("  ")
        );
    }
    let essence = |trial: &Trial| {
        let mut state = trial.state();
        state.store = PathBuf::new();
        state
            .history
            .iter_mut()
            .for_each(|ended| ended.seconds = 0.0);
        state
            .published
            .iter_mut()
            .for_each(|published| published.run.clear());
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
