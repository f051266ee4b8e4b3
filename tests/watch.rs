//! A watched folder: what comes to rest is learnt, whatever happens around it, and the chain of runs can be replayed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use proxytune::config::Document;
use proxytune::pipeline;
use proxytune::stream::Stop;
use proxytune::watch::reconcile::reconcile;
use proxytune::watch::remove::Leaving;
use proxytune::watch::scan::{Scan, Scanner};
use proxytune::watch::state::{Home, State};
use proxytune::watch::{Options, watch};
use tempfile::TempDir;

use crate::support::{Running, SMOKE, find, program, say, tables};

const SETTLE: Duration = Duration::from_secs(3);

/// A watched folder and a store that vanish with this value.
struct Place {
    dir: TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        std::fs::create_dir(place.photos()).unwrap();
        place
    }

    fn photos(&self) -> PathBuf {
        self.dir.path().join("photos")
    }

    fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    fn home(&self) -> Home {
        Home::of(&self.photos()).unwrap()
    }

    fn state(&self) -> State {
        self.home().load().unwrap()
    }

    /// Puts `count` photos of a nano subject into a folder `class/subject`.
    fn arrive(&self, folder: &str, subject: &str, count: usize) {
        let to = self.photos().join(folder);
        std::fs::create_dir_all(&to).unwrap();
        for (name, bytes) in nano(subject).into_iter().take(count) {
            std::fs::write(to.join(name), bytes).unwrap();
        }
    }

    fn rename(&self, from: &str, to: &str) {
        std::fs::rename(self.photos().join(from), self.photos().join(to)).unwrap();
    }

    fn options(&self) -> Options {
        Options {
            dir: self.photos(),
            pipeline: SMOKE.into(),
            overrides: Vec::new(),
            store: Some(self.store()),
            poll: None,
            once: true,
            replay: 5,
            margin: 2.0,
            settle: Duration::ZERO,
            progress: false,
        }
    }

    async fn learn(&self) -> State {
        watch(&self.options(), Stop::default()).await.unwrap()
    }

    /// The command that does what [`Place::learn`] does.
    fn command(&self, more: &[&str]) -> std::process::Command {
        let mut command = program();
        command
            .arg("watch")
            .arg(self.photos())
            .args(["--pipeline", SMOKE, "--store"])
            .arg(self.store());
        command
            .args(["--replay", "5", "--margin", "2", "--settle", "0"])
            .args(more);
        command
    }

    /// The adapters that were published, by their paths.
    fn adapters(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let is_adapter = |name: &str| name == "adapter_model.safetensors";
        let adapters = self.home().path().join("adapters");
        let read = |path: PathBuf| {
            let bytes = std::fs::read(&path).unwrap();
            (path.strip_prefix(&adapters).unwrap().to_path_buf(), bytes)
        };
        find(&adapters, &is_adapter).into_iter().map(read).collect()
    }
}

fn nano(subject: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("datasets/nano/subjects")
        .join(subject);
    let files = find(&folder, &|name| name.ends_with(".png")).into_iter();
    files
        .map(|path| {
            (
                path.file_name().unwrap().to_string_lossy().into_owned(),
                std::fs::read(&path).unwrap(),
            )
        })
        .collect()
}

/// What is remembered but for times and places.
fn essence(state: &State) -> State {
    let mut state = state.clone();
    state.store = Default::default();
    for ended in &mut state.history {
        ended.seconds = 0.0;
    }
    if let Some(published) = &mut state.published {
        published.run.clear();
    }
    state
}

fn scan(scanner: &mut Scanner, seconds: f64, start: Instant) -> Scan {
    scanner
        .scan(&[], start + Duration::from_secs_f64(seconds))
        .unwrap()
}

#[test]
fn a_folder_counts_when_it_has_come_to_rest() {
    let place = Place::new();
    let (mut scanner, start) = (Scanner::new(place.photos(), SETTLE), Instant::now());
    place.arrive("dog/rex", "dog1", 3);
    let seen = scan(&mut scanner, 0.0, start);
    assert_eq!((seen.folders.len(), seen.settles_in), (0, Some(SETTLE)));
    assert!(seen.unsettled.contains("dog/rex"));
    // A file that is still being copied: cut short at first, whole later.
    let (name, bytes) = &nano("dog1")[3];
    let growing = place.photos().join("dog/rex").join(name);
    std::fs::write(&growing, &bytes[..bytes.len() / 2]).unwrap();
    assert!(scan(&mut scanner, 2.0, start).folders.is_empty());
    std::fs::write(&growing, bytes).unwrap();
    assert!(
        scan(&mut scanner, 4.0, start).folders.is_empty(),
        "it changed since"
    );
    let seen = scan(&mut scanner, 7.0, start);
    assert_eq!(
        (seen.folders["dog/rex"].photos.len(), seen.settles_in),
        (4, None)
    );
    assert!(seen.set_aside.is_empty());
    // It rests gone, too: a folder that comes back at once was never away.
    place.rename("dog/rex", "rex");
    let seen = scan(&mut scanner, 8.0, start);
    assert!(seen.unsettled.contains("dog/rex") && seen.folders.is_empty());
    place.rename("rex", "dog/rex");
    assert!(scan(&mut scanner, 9.0, start).unsettled.contains("dog/rex"));
    assert_eq!(scan(&mut scanner, 12.0, start).folders.len(), 1);
    std::fs::remove_dir_all(place.photos().join("dog")).unwrap();
    assert!(
        scan(&mut scanner, 13.0, start)
            .unsettled
            .contains("dog/rex")
    );
    assert_eq!(scan(&mut scanner, 16.0, start), Scan::default());
    // What was there before this process began is missed in the same way.
    let expected = ["cat/mia".to_string()];
    let missing = |scanner: &mut Scanner, seconds| {
        let seen = scanner
            .scan(&expected, start + Duration::from_secs(seconds))
            .unwrap();
        seen.unsettled.contains("cat/mia")
    };
    assert!(missing(&mut scanner, 20));
}

#[test]
fn bad_files_are_set_aside_by_name_and_tried_again_when_they_change() {
    let place = Place::new();
    let (mut scanner, start) = (Scanner::new(place.photos(), Duration::ZERO), Instant::now());
    place.arrive("dog/rex", "dog1", 3);
    let folder = place.photos().join("dog/rex");
    let (_, whole) = &nano("dog1")[3];
    let write = |name: &str, bytes: &[u8]| std::fs::write(folder.join(name), bytes).unwrap();
    write("cut.png", &whole[..whole.len() / 2]);
    write("text.jpg", b"not a picture");
    write("phone.heic", b"....ftypheic");
    // An editor's and a browser's files in passing, and things that are no pictures.
    for name in [
        ".cut.png.swp",
        "~cut.png",
        "#cut.png#",
        "cut.png~",
        "new.jpg.crdownload",
        "new.jpg.part",
        "notes.txt",
    ] {
        write(name, whole);
    }
    std::fs::write(place.photos().join("dog/lost.png"), whole).unwrap();
    let seen = scan(&mut scanner, 0.0, start);
    let set_aside: Vec<(&str, &str)> = seen
        .set_aside
        .iter()
        .map(|bad| (bad.path.as_str(), bad.reason.as_str()))
        .collect();
    assert_eq!(set_aside.len(), 4, "{set_aside:?}");
    assert_eq!(set_aside[0].0, "dog/lost.png");
    assert!(set_aside[0].1.contains("outside"), "{set_aside:?}");
    assert_eq!(set_aside[1].0, "dog/rex/cut.png");
    assert_eq!(
        set_aside[2],
        ("dog/rex/phone.heic", "only JPEG, PNG and WebP are read")
    );
    assert_eq!(
        set_aside[3],
        ("dog/rex/text.jpg", "the content is text, not a picture")
    );
    assert_eq!(seen.folders["dog/rex"].photos.len(), 3);
    // Mended in place, and by another file moved over it; a copy of a photo counts once.
    write("cut.png", whole);
    write("copy.png", whole);
    let (_, other) = &nano("dog1")[4];
    write("text.new", other);
    std::fs::rename(folder.join("text.new"), folder.join("text.jpg")).unwrap();
    let seen = scan(&mut scanner, 1.0, start);
    assert_eq!(seen.set_aside.len(), 2, "{:?}", seen.set_aside);
    assert_eq!(seen.folders["dog/rex"].photos.len(), 5);
}

#[cfg(target_os = "linux")]
#[test]
fn a_name_that_is_not_utf_8_is_set_aside_and_the_rest_comes_to_rest() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let place = Place::new();
    place.arrive("dog/rex", "dog1", 3);
    place.arrive("cat/mia", "cat1", 3);
    let folder = place.photos().join("dog/rex");
    std::fs::copy(
        folder.join("00.png"),
        folder.join(OsStr::from_bytes(b"caf\xe9.png")),
    )
    .unwrap();
    std::fs::rename(
        place.photos().join("cat/mia"),
        place.photos().join(OsStr::from_bytes(b"cat/mi\xe4")),
    )
    .unwrap();
    let (mut scanner, start) = (Scanner::new(place.photos(), Duration::ZERO), Instant::now());
    let seen = scan(&mut scanner, 0.0, start);
    assert_eq!((seen.folders.len(), seen.settles_in), (1, None));
    assert_eq!(seen.folders["dog/rex"].photos.len(), 3);
    let set_aside: Vec<&str> = seen.set_aside.iter().map(|bad| bad.path.as_str()).collect();
    assert_eq!(set_aside, ["cat/mi\u{fffd}", "dog/rex/caf\u{fffd}.png"]);
    assert!(seen.set_aside[0].reason.contains("UTF-8"));
}

#[test]
fn a_thousand_files_at_once_are_seen_once_each() {
    let place = Place::new();
    let (mut scanner, start) = (Scanner::new(place.photos(), SETTLE), Instant::now());
    for subject in 0..100 {
        for photo in 0..10u8 {
            let mut picture = image::RgbImage::new(2, 2);
            picture.put_pixel(0, 0, image::Rgb([subject, photo, 0]));
            let folder = place.photos().join(format!("toy/toy{subject:03}"));
            std::fs::create_dir_all(&folder).unwrap();
            picture.save(folder.join(format!("{photo}.png"))).unwrap();
        }
    }
    assert_eq!(scan(&mut scanner, 0.0, start).unsettled.len(), 100);
    let seen = scan(&mut scanner, 3.0, start);
    assert_eq!(seen.folders.len(), 100);
    assert!(
        seen.folders
            .values()
            .all(|folder| folder.photos.len() == 10)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chain_is_replayed_to_the_same_adapters_by_a_watch_and_by_its_pipeline_files() {
    let [first, again] = [Place::new(), Place::new()];
    for place in [&first, &again] {
        place.arrive("dog/rex", "dog1", 4);
        place.arrive("cat/few", "cat2", 2);
        place.learn().await;
        // Two at once; the first is extended and renamed at once, and one folder holds bad files alone.
        place.arrive("cat/mia", "cat1", 5);
        place.arrive("toy/bob", "toy1", 3);
        place.arrive("dog/rex", "dog1", 5);
        place.rename("dog/rex", "dog/hasso");
        let bad = place.photos().join("vase/bad");
        std::fs::create_dir_all(&bad).unwrap();
        (0..3).for_each(|i| std::fs::write(bad.join(format!("{i}.jpg")), b"bad").unwrap());
        place.learn().await;
        // One is retired, and another comes: it is not given the token, and no proxies of the first are replayed.
        std::fs::remove_dir_all(place.photos().join("toy/bob")).unwrap();
        place.arrive("teapot/pot", "teapot1", 3);
        place.learn().await;
    }
    let state = first.state();
    let runs: Vec<&str> = state
        .history
        .iter()
        .map(|ended| ended.subject.as_str())
        .collect();
    assert_eq!(runs, ["rex", "rex", "mia", "bob", "pot"]);
    let tokens: Vec<(&str, &str, bool)> = state
        .subjects
        .iter()
        .map(|s| (s.id.as_str(), s.token.as_str(), s.retired))
        .collect();
    assert_eq!(
        tokens,
        [
            ("rex", "sks", false),
            ("mia", "ohw", false),
            ("bob", "zwx", true),
            ("pot", "pll", false)
        ]
    );
    assert_eq!(state.subjects[0].folder, "dog/hasso");
    assert_eq!(state.set_aside.len(), 3);
    assert_eq!(state.waiting.len(), 2, "{:?}", state.waiting);
    let known: Vec<&String> = state.published.as_ref().unwrap().scores.keys().collect();
    assert_eq!(known, ["mia", "pot", "rex"]);
    for (before, ended) in state.history.iter().zip(&state.history[1..]) {
        assert_eq!(ended.init, before.adapter);
    }
    // The last run makes new proxies of one subject, and replays five of two others.
    let last = Document::parse(
        &resolved_of(&first, 5),
        "",
        &[],
        &proxytune::models::Registry,
    )
    .resolve()
    .unwrap();
    let replays: Vec<(&str, Option<usize>)> = last
        .subjects
        .iter()
        .map(|s| (s.name.as_str(), s.replay))
        .collect();
    assert_eq!(replays, [("pot", None), ("rex", Some(5)), ("mia", Some(5))]);

    assert_eq!(essence(&state), essence(&again.state()));
    assert_eq!(first.adapters(), again.adapters());
    assert_eq!(first.adapters().len(), 5);
    assert_eq!(tables(&first.store()).await, tables(&again.store()).await);

    // By hand: each run's own file, going on from what the one before made here.
    let elsewhere = tempfile::tempdir().unwrap();
    let mut student: Option<PathBuf> = None;
    for number in 1..=5 {
        let text = resolved_of(&first, number);
        let overrides: Vec<String> = student
            .iter()
            .map(|student| format!("student.init={:?}", student.display().to_string()))
            .collect();
        let options = pipeline::Options {
            store: Some(elsewhere.path().join("store")),
            out: elsewhere.path().join("runs"),
            ..pipeline::Options::new(format!("{number}.toml"), text, &overrides).unwrap()
        };
        let outcome = pipeline::run(&options, Stop::default()).await.unwrap();
        let made = std::fs::read(outcome.dir.join("student/adapter_model.safetensors")).unwrap();
        let expected =
            &first.adapters()[Path::new(&format!("{number:04}/adapter_model.safetensors"))];
        assert!(made == *expected, "run {number} made something else");
        student = Some(outcome.dir.join("student"));
    }
}

/// The resolved file of run `number`.
fn resolved_of(place: &Place, number: usize) -> String {
    let start = format!("run-{number:04}-");
    let runs = find(&place.home().runs(), &|name| name.starts_with(&start));
    assert_eq!(runs.len(), 1, "{runs:?}");
    std::fs::read_to_string(runs[0].join("resolved.toml")).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_loses_more_than_the_margin_is_not_published_and_the_log_says_why() {
    let place = Place::new();
    place.arrive("dog/rex", "dog1", 3);
    let before = place.learn().await;
    place.arrive("cat/mia", "cat1", 3);
    // With a margin below -2 every subject loses too much.
    let strict = Options {
        margin: -3.0,
        ..place.options()
    };
    let after = watch(&strict, Stop::default()).await.unwrap();
    assert_eq!(after.published, before.published);
    let published = place.home().published();
    assert_eq!(
        std::fs::canonicalize(&published).unwrap(),
        place.home().adapter(1)
    );
    let refused = after.history[1].refused.as_ref().unwrap();
    assert!(
        refused.contains("rex would lose") && refused.contains("the margin is -3"),
        "{refused}"
    );
    let log = std::fs::read_to_string(place.home().log()).unwrap();
    assert!(
        log.contains("run 2: not published, rex would lose"),
        "{log}"
    );
    // It is not tried again by itself, but when its photos or the settings change; the student goes on from what is
    // published.
    let again = watch(&strict, Stop::default()).await.unwrap();
    assert_eq!(again.history.len(), 2);
    place.arrive("cat/mia", "cat1", 4);
    let again = watch(&strict, Stop::default()).await.unwrap();
    assert_eq!(
        (again.history.len(), again.subjects[1].is_held()),
        (3, true)
    );
    let mut status = program();
    status.args(["watch", "--status"]).arg(place.photos());
    let said = say(status);
    for part in ["held back until", "--margin", "--replay"] {
        assert!(said.out.contains(part), "{part}: {}", said.out);
    }
    let last = place.learn().await;
    assert_eq!(last.history.len(), 4);
    assert_eq!(
        last.history[3].init,
        Some(before.published.unwrap().adapter)
    );
    assert_eq!(last.published.as_ref().unwrap().number, 4);
    assert_eq!(
        std::fs::canonicalize(&published).unwrap(),
        place.home().adapter(4)
    );
    // What runs need to be continued is gone with the last of them.
    let left = find(&place.home().runs(), &|name| name == "checkpoints");
    assert!(left.is_empty(), "{left:?}");
    // The student is the watch's own.
    let init = format!("student.init={:?}", place.home().adapter(4));
    let foreign = Options {
        overrides: vec![init],
        ..place.options()
    };
    let error = watch(&foreign, Stop::default()).await.unwrap_err();
    assert!(error.to_string().contains("student of its own"), "{error}");
    let scores = std::fs::read_to_string(published.join("evaluation/scores.json")).unwrap();
    assert!(
        scores.contains("\"rex\"") && scores.contains("\"mia\""),
        "{scores}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_killed_at_many_moments_comes_to_the_same_end() {
    let (calm, hit) = (Place::new(), Place::new());
    for place in [&calm, &hit] {
        place.arrive("dog/rex", "dog1", 3);
        place.arrive("cat/mia", "cat1", 3);
    }
    let undisturbed = calm.learn().await;
    // Each moment is known by what it leaves below the watch's own folder, and how often.
    let moments = [
        ("the first one's photos are copied", "photos", 1),
        ("a checkpoint is written", "checkpoint-000002", 1),
        ("the first is published", "published", 1),
        ("the second has learnt", "student", 2),
        ("the second is published", "0002", 1),
    ];
    let home = hit.home();
    for (what, name, count) in moments {
        let has_come = || find(home.path(), &|found| found == name).len() >= count;
        let mut run = Running::start(hit.command(&["--once"]));
        assert!(run.runs_until(has_come), "{what}: it ended before");
        run.kill();
    }
    let (status, said) = Running::start(hit.command(&["--once"])).wait();
    assert!(status.success(), "{said}");
    assert_eq!(essence(&hit.state()), essence(&undisturbed));
    assert_eq!(hit.adapters(), calm.adapters());
    assert_eq!(tables(&hit.store()).await, tables(&calm.store()).await);
    let left = find(hit.home().path(), &|name| name.ends_with(".tmp"));
    assert!(left.is_empty(), "{left:?}");
}

/// Starts a watch that goes on, and waits until it has seen the folder.
fn start(place: &Place, more: &[&str]) -> Running {
    let mut run = Running::start(place.command(more));
    assert!(run.runs_until(|| place.home().is_watched() && place.home().exists()));
    run
}

/// Waits until `happened` holds for what is remembered.
fn until(run: &mut Running, place: &Place, happened: impl Fn(&State) -> bool) -> State {
    assert!(
        run.runs_until(|| happened(&place.state())),
        "it ended before"
    );
    place.state()
}

#[cfg(unix)]
#[test]
fn arrivals_are_learnt_while_it_runs_by_events_and_by_polling() {
    for more in [&[][..], &["--poll", "0.05"]] {
        let place = Place::new();
        // Something outside that is moved in as a whole.
        let outside = Place::new();
        outside.arrive("dog/rex", "dog1", 3);
        let mut run = start(&place, more);
        std::fs::create_dir(place.photos().join("dog")).unwrap();
        std::fs::rename(
            outside.photos().join("dog/rex"),
            place.photos().join("dog/rex"),
        )
        .unwrap();
        until(&mut run, &place, |state| state.history.len() == 1);
        place.rename("dog/rex", "dog/hasso");
        until(&mut run, &place, |state| {
            state.subjects[0].folder == "dog/hasso"
        });
        // From another terminal, meanwhile.
        let mut status = program();
        status.args(["watch", "--status"]).arg(place.photos());
        let said = say(status);
        assert_eq!(said.code, Some(0), "{said:?}");
        for part in [
            ": watching",
            "rex",
            "dog/hasso",
            "sks",
            "learnt",
            "published",
        ] {
            assert!(said.out.contains(part), "{part}: {}", said.out);
        }
        let second = say(place.command(&[]));
        second.says(1, &["is being watched by another process", "hint: "]);
        // Moved out again.
        std::fs::rename(
            place.photos().join("dog/hasso"),
            outside.photos().join("hasso"),
        )
        .unwrap();
        let state = until(&mut run, &place, |state| state.subjects[0].retired);
        assert_eq!((state.history.len(), state.tokens.len()), (1, 1));
        run.interrupt();
        let (status, said) = run.wait();
        assert_eq!(status.code(), Some(130), "{said}");
        assert!(!place.home().is_watched());
    }
}

#[cfg(unix)]
#[test]
fn a_folder_that_was_away_is_listened_to_again() {
    let place = Place::new();
    std::fs::create_dir_all(place.photos().join("vase/worse")).unwrap();
    std::fs::write(place.photos().join("vase/worse/a.jpg"), b"worse").unwrap();
    let mut run = start(&place, &[]);
    // By then it listens.
    until(&mut run, &place, |state| state.set_aside.len() == 1);
    let (away, again) = (
        place.dir.path().join("away"),
        place.dir.path().join("again"),
    );
    std::fs::rename(place.photos(), &away).unwrap();
    // Long enough to be missed; should it not be, events come again after a minute.
    std::thread::sleep(Duration::from_secs(2));
    // As a drive that is mounted again: the same files, but in another folder to the system.
    let mut copy = std::process::Command::new("cp");
    copy.arg("-r").args([&away, &again]);
    assert!(copy.status().unwrap().success());
    std::fs::create_dir_all(again.join("vase/bad")).unwrap();
    std::fs::write(again.join("vase/bad/a.jpg"), b"bad").unwrap();
    std::fs::rename(&again, place.photos()).unwrap();
    until(&mut run, &place, |state| state.set_aside.len() == 2);
    place.arrive("cat/mia", "cat1", 3);
    until(&mut run, &place, |state| state.subjects.len() == 1);
}

#[test]
fn bad_photos_show_in_status_and_exit_code_and_a_folder_that_was_never_watched_is_named() {
    let place = Place::new();
    let bad = place.photos().join("vase/bad");
    std::fs::create_dir_all(&bad).unwrap();
    std::fs::write(bad.join("a.jpg"), b"bad").unwrap();
    let mut status = program();
    status.args(["watch", "--status"]).arg(place.photos());
    say(status).says(1, &["has never been watched", "hint: "]);
    let said = say(place.command(&["--once"]));
    assert_eq!(said.code, Some(3), "{said:?}");
    for part in [
        "vase/bad/a.jpg: ",
        "vase/bad: it has 0 of at least 3 usable photos",
        "published   nothing yet",
    ] {
        assert!(said.out.contains(part), "{part}: {}", said.out);
    }
}

#[test]
fn what_leaves_is_found_where_it_lies_today_and_a_name_of_two_is_refused() {
    let place = Place::new();
    place.arrive("dog/rex", "dog1", 3);
    place.arrive("cat/mia", "cat1", 3);
    let mut state = State {
        version: 1,
        ..State::default()
    };
    let mut scanner = Scanner::new(place.photos(), Duration::ZERO);
    reconcile(&mut state, &scan(&mut scanner, 0.0, Instant::now()));
    drop(place.home().lock().unwrap());
    place.home().save(&state).unwrap();
    // Nobody watched when these moved.
    place.rename("dog/rex", "dog/x");
    place.rename("cat/mia", "cat/x");
    let refused = Leaving::find(&place.photos(), "x").err().unwrap();
    assert!(refused.to_string().contains("several"), "{refused}");
    let hint = refused.hint().unwrap();
    assert!(
        hint.contains("rex in dog/x") && hint.contains("mia in cat/x"),
        "{hint}"
    );
    let photos = place.photos();
    std::fs::rename(photos.join("dog/x/00.png"), photos.join("lost.png")).unwrap();
    std::fs::copy(photos.join("dog/x/01.png"), photos.join("cat/x/copy.png")).unwrap();
    let leaving = Leaving::find(&photos, "rex").unwrap();
    let root = std::fs::canonicalize(&photos).unwrap();
    let below = |paths: &[PathBuf]| -> Vec<String> {
        let below = |path: &PathBuf| path.strip_prefix(&root).unwrap().display().to_string();
        paths.iter().map(below).collect()
    };
    assert_eq!(
        below(leaving.photos()),
        ["dog/x/01.png", "dog/x/02.png", "lost.png"]
    );
    assert_eq!(below(leaving.shared()), ["cat/x/copy.png"]);
    leaving.remove().unwrap();
    assert!(!photos.join("dog/x").exists() && !photos.join("lost.png").exists());
    assert_eq!(std::fs::read_dir(photos.join("cat/x")).unwrap().count(), 4);
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_under_way_that_replays_who_leaves_is_dropped_and_the_chain_goes_on() {
    let place = Place::new();
    place.arrive("dog/rex", "dog1", 3);
    place.learn().await;
    place.arrive("cat/mia", "cat1", 3);
    let mut run = Running::start(place.command(&["--once"]));
    let has_begun = || find(&place.home().runs(), &|name| name.starts_with("run-0002-")).len();
    assert!(run.runs_until(|| has_begun() == 1 && place.state().run.is_some()));
    run.kill();
    // As if it had been published just before it was killed.
    let home = place.home();
    std::fs::create_dir(home.adapter(2)).unwrap();
    std::fs::remove_file(home.published()).unwrap();
    std::os::unix::fs::symlink("adapters/0002", home.published()).unwrap();
    Leaving::find(&place.photos(), "rex")
        .unwrap()
        .remove()
        .unwrap();
    assert_eq!(has_begun(), 0);
    assert!(place.state().run.is_none() && !home.adapter(2).exists());
    assert_eq!(
        std::fs::canonicalize(home.published()).unwrap(),
        home.adapter(1)
    );
    let state = place.learn().await;
    let runs: Vec<&str> = state.history.iter().map(|e| e.subject.as_str()).collect();
    assert_eq!(runs, ["rex", "mia"]);
    assert_eq!(state.published.unwrap().number, 2);
}

#[test]
fn remove_deletes_photos_copies_and_what_runs_drew_and_the_token_stays_taken() {
    let place = Place::new();
    place.arrive("dog/rex", "dog1", 3);
    let said = say(place.command(&["--once"]));
    assert_eq!(said.code, Some(0), "{said:?}");
    place.arrive("cat/mia", "cat1", 3);
    say(place.command(&["--once"]));
    place.rename("dog/rex", "dog/hasso");
    say(place.command(&["--once"]));
    let remove = |more: &[&str]| {
        let mut command = program();
        command
            .args(["remove", "hasso", "--watch"])
            .arg(place.photos())
            .args(more);
        say(command)
    };
    remove(&[]).says(
        1,
        &["nothing was deleted", "hint: type the name, or give --yes"],
    );
    assert!(place.photos().join("dog/hasso/00.png").is_file());
    let photo = nano("dog1").remove(0).1;
    let said = remove(&["--yes"]);
    assert_eq!(said.code, Some(0), "{said:?}");
    assert!(
        said.out.contains("12 rows of proxies") && said.out.contains("1 supervisors"),
        "{}",
        said.out
    );
    // No file holds a photo, nor anything that is called after the subject.
    for path in find(place.dir.path(), &|_| true) {
        if path.is_file() {
            assert!(std::fs::read(&path).unwrap() != photo, "{}", path.display());
        }
        let name = path.file_name().unwrap().to_string_lossy();
        assert!(name != "rex" && name != "hasso", "{}", path.display());
    }
    let state = place.state();
    let left: Vec<&str> = state.subjects.iter().map(|s| s.id.as_str()).collect();
    assert_eq!(
        (left, state.tokens),
        (vec!["mia"], vec!["sks".to_string(), "ohw".into()])
    );
    // The chain goes on without it.
    place.arrive("toy/bob", "toy1", 3);
    let said = say(place.command(&["--once"]));
    assert_eq!(said.code, Some(0), "{said:?}");
    let state = place.state();
    assert_eq!(state.subject("bob").unwrap().token, "zwx");
    let known: Vec<&String> = state.published.as_ref().unwrap().scores.keys().collect();
    assert_eq!(known, ["bob", "mia"]);
}
