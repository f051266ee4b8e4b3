//! A watched folder that others share: what they, their systems and their links put there is no subject, harms nothing
//! outside of it, and what cannot be removed is told of.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use proxytune::evaluation::metrics::Scores;
use proxytune::files::system::is_system;
use proxytune::store::{ProxyRow, Store};
use proxytune::watch::chain::Recipe;
use proxytune::watch::reconcile::reconcile;
use proxytune::watch::scan::{Scan, Scanner, linked};
use proxytune::watch::state::{Ended, Home, Published, State, Subject};
use tempfile::TempDir;

use crate::support::filled;
use crate::support::{Running, SMOKE, Said, find, program, say};

const FEW: [&str; 3] = [
    "direct.enabled=false",
    "evaluation.every=0",
    "student.steps=4",
];

struct Shared {
    dir: TempDir,
}

impl Shared {
    fn new() -> Self {
        let shared = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        std::fs::create_dir(shared.photos()).unwrap();
        shared
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn photos(&self) -> PathBuf {
        self.at("photos")
    }

    fn store(&self) -> PathBuf {
        self.at("store")
    }

    fn home(&self) -> PathBuf {
        self.photos().join(".proxytune")
    }

    /// Photos of `subject` in the folder `to`, from here.
    fn put(&self, to: &str, subject: &str) {
        let (to, from) = (
            self.at(to),
            Path::new("datasets/nano/subjects").join(subject),
        );
        std::fs::create_dir_all(&to).unwrap();
        for path in find(&from, &|name| name.ends_with(".png")).iter().take(3) {
            std::fs::copy(path, to.join(path.file_name().unwrap())).unwrap();
        }
    }

    fn watch(&self, more: &[&str]) -> Said {
        let mut command = program();
        command.arg("watch").arg(self.photos());
        command.args([
            "--pipeline",
            SMOKE,
            "--once",
            "--settle",
            "0",
            "--margin",
            "2",
        ]);
        for text in FEW {
            command.args(["--set", text]);
        }
        command.args(more);
        say(command)
    }

    /// Lets the watch remember that everybody here is learnt, without learning anybody.
    fn begin(&self) {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let home = Home::of(&self.photos()).unwrap();
        let _lock = home.lock().unwrap();
        let mut state = home.load().unwrap();
        reconcile(&mut state, &self.scan());
        let scores = Scores {
            clip_i: 0.5,
            clip_t: 0.5,
            dino: 0.5,
        };
        let everybody = |subjects: &[Subject]| {
            let scored = |subject: &Subject| (subject.id.clone(), scores);
            subjects.iter().map(scored).collect()
        };
        for subject in &mut state.subjects {
            subject.pending = None;
            subject.learnt = Some(subject.look());
            let copies = home.photos(&subject.id, &subject.look());
            std::fs::create_dir_all(&copies).unwrap();
            std::fs::write(copies.join("00.png"), "a copy").unwrap();
        }
        let number = state.next_number();
        let run = home.runs().join(format!("run-{number:04}-0123abcd"));
        for dir in [&run, &home.adapter(number)] {
            std::fs::create_dir_all(dir).unwrap();
        }
        state.published = Some(Published {
            number,
            run: format!("runs/run-{number:04}-0123abcd"),
            adapter: "a".repeat(64),
            scores: everybody(&state.subjects),
        });
        state.history.push(Ended {
            number,
            subject: state.subjects[0].id.clone(),
            init: None,
            adapter: Some("a".repeat(64)),
            scores: everybody(&state.subjects),
            refused: None,
            seconds: 1.0,
        });
        runtime.block_on(async {
            let store = Store::open(self.store()).await.unwrap();
            state.store = store.reference(home.path());
            let proxies = state
                .subjects
                .iter()
                .zip(0..)
                .map(|(subject, number)| ProxyRow {
                    subject: subject.id.clone(),
                    ..filled::proxy(number)
                });
            let proxies: Vec<ProxyRow> = proxies.collect();
            store
                .proxies()
                .await
                .unwrap()
                .append(&proxies)
                .await
                .unwrap();
        });
        // As the watch itself would, so that nothing is judged anew.
        let recipe = Recipe::open(Path::new(SMOKE), &FEW.map(String::from), 25).unwrap();
        state.use_settings(&recipe.settings(2.0));
        home.save(&state).unwrap();
    }

    fn remove(&self, subject: &str) -> Said {
        let mut command = program();
        command
            .args(["remove", subject, "--yes", "--watch"])
            .arg(self.photos());
        say(command)
    }

    fn scan(&self) -> Scan {
        let mut scanner = Scanner::new(self.photos(), Duration::ZERO);
        scanner.scan(&[], Instant::now()).unwrap()
    }

    fn state(&self) -> serde_json::Value {
        let text = std::fs::read_to_string(self.home().join("state.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    fn edit(&self, change: impl FnOnce(&mut serde_json::Value)) {
        let mut state = self.state();
        change(&mut state);
        std::fs::write(self.home().join("state.json"), state.to_string()).unwrap();
    }
}

#[test]
fn folders_of_systems_and_other_programs_are_no_subjects_at_any_depth() {
    let shared = Shared::new();
    shared.put("photos/dog/rex", "dog1");
    let system = [
        "$RECYCLE.BIN/S-1-5-21",
        "$Recycle.Bin/x",
        ".Trash-1000/files",
        ".Trashes/501",
        ".thumbnails/large",
        ".git/x",
        ".stfolder/x",
        ".sync/Archive",
        ".stversions/dog",
        ".Spotlight-V100/x",
        ".fseventsd/x",
        "System Volume Information/x",
        "lost+found/x",
        "@eaDir/x",
        "#recycle/dog",
        "#snapshot/hourly",
        "@Recycle/dog",
        "@Recently-Snapshot/x",
        "__MACOSX/dog",
        "RECYCLER/x",
        "LOST.DIR/x",
        "FOUND.000/x",
        "Network Trash Folder/x",
        "dog/@eaDir",
        "dog/#recycle",
        "dog/__MACOSX",
        "dog/.thumbnails",
        "dog/$RECYCLE.BIN",
    ];
    for folder in system {
        shared.put(&format!("photos/{folder}"), "cat1");
    }
    shared.put("photos/dog/rex/@eaDir/00.png", "cat1");
    let seen = shared.scan();
    let folders: Vec<&String> = seen.folders.keys().collect();
    assert_eq!(folders, ["dog/rex"]);
    assert!(
        seen.set_aside.is_empty() && seen.unsettled.is_empty(),
        "{seen:?}"
    );
    for own in [
        "found",
        "#1",
        "@home",
        "$5",
        "recycling bin",
        "lost",
        "trash can",
    ] {
        assert!(!is_system(own), "{own}");
    }
}

#[test]
fn links_to_where_the_folder_lies_or_back_into_it_are_not_followed() {
    let shared = Shared::new();
    shared.put("photos/dog/rex", "dog1");
    shared.put("elsewhere/cats/mia", "cat1");
    shared.put("elsewhere/tom", "cat2");
    let link = |to: &Path, name: &str| symlink(to, shared.photos().join(name)).unwrap();
    link(Path::new("/"), "machine");
    link(shared.dir.path(), "parent");
    link(Path::new("."), "itself");
    link(Path::new("/"), "dog/root");
    link(Path::new(".."), "dog/loop");
    link(Path::new("rex"), "dog/twice");
    link(Path::new("circle"), "circle");
    link(&shared.at("elsewhere/cats"), "cat");
    link(&shared.at("elsewhere/tom"), "dog/tom");
    let seen = shared.scan();
    let folders: Vec<&String> = seen.folders.keys().collect();
    assert_eq!(folders, ["cat/mia", "dog/rex", "dog/tom"]);
    let aside: Vec<&str> = seen.set_aside.iter().map(|bad| bad.path.as_str()).collect();
    let expected = [
        "dog/loop",
        "dog/root",
        "dog/twice",
        "itself",
        "machine",
        "parent",
    ];
    assert_eq!(aside, expected);
    assert!(
        seen.set_aside
            .iter()
            .all(|bad| bad.reason.contains("not followed"))
    );
    let mut listened = linked(&shared.photos());
    listened.sort();
    let expected = ["cat", "cat/mia", "dog/tom"].map(|name| shared.photos().join(name));
    assert_eq!(listened, expected);
}

#[test]
fn pipes_sockets_and_devices_with_names_of_pictures_are_set_aside_without_being_opened() {
    let shared = Shared::new();
    shared.put("photos/dog/rex", "dog1");
    let folder = shared.photos().join("dog/rex");
    let name = std::ffi::CString::new(folder.join("pipe.jpg").to_str().unwrap()).unwrap();
    // SAFETY: the name ends with a zero byte and lives until the call is over.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    let _socket = std::os::unix::net::UnixListener::bind(folder.join("socket.png")).unwrap();
    symlink("/dev/zero", folder.join("zero.png")).unwrap();
    let seen = shared.scan();
    assert_eq!(seen.folders["dog/rex"].photos.len(), 3);
    let reasons: Vec<&str> = seen
        .set_aside
        .iter()
        .map(|bad| bad.reason.as_str())
        .collect();
    assert_eq!(reasons.len(), 3, "{reasons:?}");
    assert!(
        reasons.iter().all(|reason| reason.contains("not a file")),
        "{reasons:?}"
    );
}

#[test]
fn a_state_that_somebody_else_wrote_is_refused_and_nothing_outside_is_touched() {
    let shared = Shared::new();
    shared.put("photos/dog/rex", "dog1");
    shared.begin();
    shared.put("victim", "cat1");
    let victim = find(&shared.at("victim"), &|_| true).len();
    let whole = std::fs::read(shared.home().join("state.json")).unwrap();
    let up = "../../../victim";
    type Edit<'a> = (&'a str, &'a dyn Fn(&mut serde_json::Value));
    let edits: [Edit; 11] = [
        ("id", &|state| state["subjects"][0]["id"] = up.into()),
        ("absolute id", &|state| {
            state["subjects"][0]["id"] = shared.at("victim").to_str().into()
        }),
        ("id of nothing", &|state| {
            state["subjects"][0]["id"] = "".into()
        }),
        ("id of dots", &|state| {
            state["subjects"][0]["id"] = "..".into()
        }),
        ("folder", &|state| {
            state["subjects"][0]["folder"] = "../victim".into()
        }),
        ("deep folder", &|state| {
            state["subjects"][0]["folder"] = "a/b/../../..".into()
        }),
        ("photo", &|state| {
            state["subjects"][0]["photos"][0] = up.into()
        }),
        ("learnt", &|state| {
            state["subjects"][0]["learnt"]["photos"][0] = "é".into()
        }),
        ("published run", &|state| {
            state["published"]["run"] = up.into()
        }),
        ("adapter", &|state| {
            state["published"]["adapter"] = "ab".into()
        }),
        ("number", &|state| {
            state["history"][0]["number"] = u64::MAX.into()
        }),
    ];
    for (what, edit) in edits {
        shared.edit(edit);
        for name in ["rex", "victim", up] {
            let said = shared.remove(name);
            said.says(1, &["state.json", "did not write that", "hint: "]);
        }
        let said = shared.watch(&[]);
        assert_eq!(said.code, Some(1), "{what}: {said:?}");
        std::fs::write(shared.home().join("state.json"), &whole).unwrap();
    }
    // Another store of the same person's is not that of the watch, whatever its path.
    let other = Shared::new();
    other.put("photos/dog/rex", "dog1");
    other.begin();
    shared.edit(|state| state["store"]["path"] = other.store().to_str().into());
    shared.edit(|state| state["store"]["relative"] = other.store().to_str().into());
    shared.remove("rex").says(1, &["the store of the watch on"]);
    shared.edit(|state| state["store"] = other.store().to_str().into());
    shared
        .remove("rex")
        .says(1, &["has not noted which store", "--store"]);
    assert_eq!(find(&shared.at("victim"), &|_| true).len(), victim);
}

#[test]
fn deletion_and_writing_never_go_through_a_link() {
    let shared = Shared::new();
    shared.put("photos/dog/rex", "dog1");
    shared.begin();
    for folder in ["photos", "runs", "adapters"] {
        let (own, aside) = (shared.home().join(folder), shared.at("aside"));
        shared.put("victim/rex", "cat1");
        std::fs::rename(&own, &aside).unwrap();
        symlink(shared.at("victim"), &own).unwrap();
        for said in [shared.remove("rex"), shared.watch(&[])] {
            said.says(1, &["is a link", "hint: "]);
        }
        std::fs::remove_file(&own).unwrap();
        std::fs::rename(&aside, &own).unwrap();
    }
    let pictures = find(&shared.at("victim"), &|name| name.ends_with(".png"));
    assert_eq!(pictures.len(), 3);
    // One further down: it is refused before anything is gone.
    let own = shared.home().join("photos/rex");
    std::fs::remove_dir_all(&own).unwrap();
    symlink(shared.at("victim/rex"), &own).unwrap();
    let log = shared.home().join("watch.log");
    let _ = std::fs::remove_file(&log);
    symlink(shared.at("profile"), &log).unwrap();
    shared.watch(&[]).says(1, &["watch.log", "not a file"]);
    std::fs::remove_file(&log).unwrap();
    // A run directory that is laid out for the run to come.
    shared.put("photos/cat/mia", "cat1");
    let trap = shared.home().join("runs/run-0002-01234567");
    std::fs::create_dir(&trap).unwrap();
    symlink(shared.at("victim"), trap.join("checkpoints")).unwrap();
    shared
        .watch(&[])
        .says(1, &["run-0002-01234567/checkpoints is a link"]);
    std::fs::remove_dir_all(&trap).unwrap();
    assert!(!shared.at("profile").exists());
    shared.remove("rex").says(0, &[]);
    assert!(!own.is_symlink());
    let pictures = find(&shared.at("victim"), &|name| name.ends_with(".png"));
    assert_eq!(pictures.len(), 3);
}

#[test]
fn a_subject_in_a_linked_folder_is_forgotten_and_what_stays_of_it_is_told() {
    let shared = Shared::new();
    shared.put("elsewhere/rex", "dog1");
    shared.put("elsewhere/cats/mia", "cat1");
    std::fs::create_dir(shared.photos().join("dog")).unwrap();
    let linked = shared.photos().join("dog/rex");
    symlink(shared.at("elsewhere/rex"), &linked).unwrap();
    symlink(shared.at("elsewhere/cats"), shared.photos().join("cat")).unwrap();
    // Photos that are links themselves.
    shared.put("elsewhere/tom", "cat2");
    let tom = shared.photos().join("tiger/tom");
    std::fs::create_dir_all(&tom).unwrap();
    for photo in find(&shared.at("elsewhere/tom"), &|_| true) {
        symlink(&photo, tom.join(photo.file_name().unwrap())).unwrap();
    }
    shared.begin();
    let said = shared.remove("tom");
    assert_eq!(said.code, Some(3), "{said:?}");
    assert!(!tom.exists() && shared.at("elsewhere/tom/00.png").is_file());
    let photo = shared.at("elsewhere/tom/00.png");
    assert!(
        said.out.contains(&format!("{}: ", photo.display())),
        "{}",
        said.out
    );
    let said = shared.remove("rex");
    assert_eq!(said.code, Some(3), "{said:?}");
    assert!(said.out.contains("This is left of it:"), "{}", said.out);
    let photo = shared.at("elsewhere/rex/00.png");
    assert!(
        said.out.contains(&format!("{}: ", photo.display())),
        "{}",
        said.out
    );
    assert!(photo.is_file() && !linked.is_symlink());
    let said = shared.watch(&[]);
    assert_eq!(said.code, Some(0), "{said:?}");
    let subjects = shared.state()["subjects"].clone();
    let ids: Vec<&str> = subjects
        .as_array()
        .unwrap()
        .iter()
        .map(|s| s["id"].as_str().unwrap())
        .collect();
    assert_eq!(ids, ["mia"], "it is learnt again");
    let said = shared.remove("mia");
    assert_eq!(said.code, Some(3), "{said:?}");
    assert!(
        said.out.contains("the next watch learns it again"),
        "{}",
        said.out
    );
    assert!(shared.at("elsewhere/cats/mia/00.png").is_file());
}

#[test]
fn copies_that_systems_and_other_programs_keep_of_a_removed_subject_are_told_of() {
    let shared = Shared::new();
    shared.put("photos/dog/rex", "dog1");
    shared.put("photos/.Trash-1000/files", "dog1");
    shared.put("photos/dog/rex/@eaDir/00.png", "cat1");
    shared.put("photos/.Trash-1000/others", "cat1");
    shared.begin();
    let said = shared.remove("rex");
    assert_eq!(said.code, Some(3), "{said:?}");
    assert_eq!(
        said.out.matches(".Trash-1000/files").count(),
        3,
        "{}",
        said.out
    );
    assert_eq!(said.out.matches("@eaDir").count(), 3, "{}", said.out);
    assert!(!said.out.contains("others"), "{}", said.out);
    assert!(!shared.photos().join("dog/rex/00.png").exists());
}

#[test]
fn a_watch_knows_its_store_and_refuses_another() {
    let shared = Shared::new();
    shared.put("photos/dog/rex", "dog1");
    shared.put("photos/cat/mia", "cat1");
    shared.begin();
    let other = shared.at("other");
    let said = shared.watch(&["--store", other.to_str().unwrap()]);
    let store = shared.store();
    said.says(1, &[store.to_str().unwrap(), other.to_str().unwrap()]);
    assert!(!other.exists());
    // Without --store it is the watch's own; the program would look for datasets/store.
    shared.watch(&[]).says(0, &[]);
    let noted = shared.state()["store"]["path"].clone();
    assert_eq!(noted, store.to_str().unwrap());
    // Both are moved.
    let moved = tempfile::tempdir().unwrap();
    for name in ["photos", "store"] {
        std::fs::rename(shared.at(name), moved.path().join(name)).unwrap();
    }
    let moved = Shared { dir: moved };
    let said = moved.remove("mia");
    said.says(0, &[]);
    assert!(said.out.contains("rows of proxies"), "{}", said.out);
    // The store is gone: nothing is claimed.
    std::fs::rename(moved.store(), moved.at("away")).unwrap();
    moved
        .remove("rex")
        .says(1, &["the store of the watch on", "--store"]);
    assert!(moved.photos().join("dog/rex/00.png").is_file());
    let mut status = program();
    status.args(["watch", "--status"]).arg(moved.photos());
    say(status).says(0, &[]);
    assert!(!moved.store().exists());
}

#[test]
fn a_name_too_long_for_files_or_prompts_keeps_nobody_else_from_being_learnt() {
    let shared = Shared::new();
    let (long, class) = ("r".repeat(250), "d".repeat(200));
    shared.put(&format!("photos/dog/{long}"), "dog1");
    shared.put(&format!("photos/{class}/rex"), "cat1");
    shared.put("photos/cat/mia", "cat2");
    let mut state = State::default();
    reconcile(&mut state, &shared.scan());
    let ids: Vec<&str> = state.subjects.iter().map(|s| s.id.as_str()).collect();
    assert_eq!(ids, ["mia", &long[..64]]);
    assert_eq!(state.queue().len(), 2);
    let waiting = &state.waiting[&format!("{class}/rex")];
    assert!(waiting.contains("200 bytes of at most 64"), "{waiting}");
}

#[test]
fn a_change_behind_a_link_is_seen_by_events() {
    let shared = Shared::new();
    shared.put("elsewhere/rex", "dog1");
    std::fs::remove_file(shared.at("elsewhere/rex/00.png")).unwrap();
    std::fs::create_dir(shared.photos().join("dog")).unwrap();
    symlink(shared.at("elsewhere/rex"), shared.photos().join("dog/rex")).unwrap();
    let mut command = program();
    command
        .arg("watch")
        .arg(shared.photos())
        .args(["--pipeline", SMOKE, "--settle", "0.2"]);
    command.arg("--store").arg(shared.store());
    for text in FEW {
        command.args(["--set", text]);
    }
    let mut watch = Running::start(command);
    let start = Instant::now();
    let home = Home::of(&shared.photos()).unwrap();
    let waits = || {
        home.load()
            .is_ok_and(|state| state.waiting.contains_key("dog/rex"))
    };
    assert!(watch.runs_until(|| {
        std::thread::sleep(Duration::from_millis(20));
        waits() || start.elapsed().as_secs() > 30
    }));
    std::thread::sleep(Duration::from_millis(500));
    shared.put("elsewhere/rex", "dog1");
    let arrived = Instant::now();
    assert!(watch.runs_until(|| {
        std::thread::sleep(Duration::from_millis(20));
        let known = home.load().is_ok_and(|state| !state.subjects.is_empty());
        known || arrived.elapsed().as_secs() > 40
    }));
    assert!(
        arrived.elapsed() < Duration::from_secs(30),
        "{:?}",
        arrived.elapsed()
    );
    watch.kill();
}
