//! From what lies in the folder to who is who: a subject is its photos, whatever its folder is called.

use std::collections::{BTreeMap, BTreeSet};

use super::scan::{Folder, Scan};
use super::state::{State, Subject};
use crate::config::own_subjects::{self, is_plain};
use crate::config::prompts::RARE_TOKENS;

/// Bytes of a subject's name that are taken from its folder's: it becomes part of the names of files, which systems
/// limit to 255.
const NAME: usize = 64;
/// Bytes of a class at most: every prompt says it, and models read some 77 tokens.
const CLASS: usize = 64;

/// So many usable photos make a subject.
pub const LEAST_PHOTOS: usize = 3;

/// Brings `state` up to what `scan` saw. Folders that are not at rest leave their subjects as they are.
pub fn reconcile(state: &mut State, scan: &Scan) {
    state.set_aside = scan.set_aside.clone();
    state.waiting.clear();
    for folder in &scan.unsettled {
        state
            .waiting
            .insert(folder.clone(), "its files are still changing".into());
    }
    let known = state.subjects.len();
    let owners = owners(&state.subjects, scan);
    for (path, folder) in &scan.folders {
        match owners.get(path.as_str()) {
            Some(&index) => update(state, index, path, folder),
            None => arrive(state, path, folder),
        }
    }
    for (index, subject) in state.subjects.iter_mut().enumerate() {
        let has_folder = index >= known || owners.values().any(|owner| *owner == index);
        if !has_folder && !scan.unsettled.contains(&subject.folder) {
            subject.retired = true;
        }
        subject.queue(&mut state.arrivals);
    }
}

/// Whether a folder, by its path and photos, is the subject's; the last is whether the subject's own place is empty.
type Sign = fn(&Subject, &str, &Folder, bool) -> bool;

/// Which subject each folder at rest belongs to, by position; strangers have none.
fn owners<'a>(subjects: &[Subject], scan: &'a Scan) -> BTreeMap<&'a str, usize> {
    let mut owners: BTreeMap<&str, usize> = BTreeMap::new();
    let mut taken = BTreeSet::new();
    // The surest signs first.
    let signs: [Sign; 4] = [
        // the same photos in the same place
        |subject, path, folder, _| subject.folder == path && same(subject, folder),
        // the same photos in another place: renamed, or back again
        |subject, _, folder, _| !folder.photos.is_empty() && same(subject, folder),
        // other photos in the same place
        |subject, path, _, _| subject.folder == path && !subject.retired,
        // most of the photos, while its own place is empty: renamed and changed
        |subject, _, folder, is_gone| {
            is_gone && shared(subject, folder) * 2 > subject.photos.len().max(folder.photos.len())
        },
    ];
    for sign in signs {
        for (path, folder) in &scan.folders {
            if owners.contains_key(path.as_str()) {
                continue;
            }
            let found = subjects.iter().enumerate().find(|(index, subject)| {
                let is_gone = !scan.folders.contains_key(&subject.folder);
                let is_moving = scan.unsettled.contains(&subject.folder);
                !taken.contains(index) && !is_moving && sign(subject, path, folder, is_gone)
            });
            if let Some((index, _)) = found {
                taken.insert(index);
                owners.insert(path, index);
            }
        }
    }
    owners
}

fn same(subject: &Subject, folder: &Folder) -> bool {
    folder.photos.keys().eq(&subject.photos)
}

fn shared(subject: &Subject, folder: &Folder) -> usize {
    subject
        .photos
        .iter()
        .filter(|photo| folder.photos.contains_key(*photo))
        .count()
}

fn update(state: &mut State, index: usize, path: &str, folder: &Folder) {
    let subject = &mut state.subjects[index];
    subject.folder = path.to_string();
    subject.retired = false;
    let published = state.published.as_ref();
    if published.is_some_and(|published| !published.scores.contains_key(&subject.id)) {
        // The student went on while it was away, and may have forgotten it.
        subject.learnt = None;
    }
    let class = class_of(path);
    let fault = match folder.photos.len() >= LEAST_PHOTOS {
        true => class_fault(&class, &subject.token),
        false => Some(too_few(folder)),
    };
    match fault {
        Some(why) => {
            let why = format!("{why}; it stays as it was learnt");
            state.waiting.insert(path.to_string(), why);
        }
        None => {
            subject.class = class;
            subject.photos = folder.photos.keys().cloned().collect();
        }
    }
}

fn arrive(state: &mut State, path: &str, folder: &Folder) {
    if folder.photos.len() < LEAST_PHOTOS {
        state.waiting.insert(path.to_string(), too_few(folder));
        return;
    }
    let class = class_of(path);
    if let Some(why) = class_fault(&class, "") {
        state.waiting.insert(path.to_string(), why);
        return;
    }
    let is_free = |token: &&&str| {
        !state.tokens.iter().any(|taken| taken == **token) && class_fault(&class, token).is_none()
    };
    let Some(token) = RARE_TOKENS.iter().find(is_free) else {
        let why = format!(
            "all {} tokens are given away, and none is given twice",
            RARE_TOKENS.len()
        );
        state.waiting.insert(path.to_string(), why);
        return;
    };
    state.tokens.push(token.to_string());
    state.subjects.push(Subject {
        id: new_id(&state.subjects, path),
        folder: path.to_string(),
        class,
        token: token.to_string(),
        photos: folder.photos.keys().cloned().collect(),
        retired: false,
        pending: None,
        learnt: None,
        held: None,
    });
}

fn too_few(folder: &Folder) -> String {
    format!(
        "it has {} of at least {LEAST_PHOTOS} usable photos",
        folder.photos.len()
    )
}

fn class_of(path: &str) -> String {
    own_subjects::class_of(path.split('/').next().unwrap_or_default())
}

/// Why a subject with this token cannot be one of this class: no prompt could say it.
fn class_fault(class: &str, token: &str) -> Option<String> {
    if class.is_empty() {
        return Some("the name of its class's folder has no letters".into());
    }
    let is_token = class.split_whitespace().any(|word| word == token);
    if class.len() > CLASS {
        return Some(format!(
            "the name of its class's folder has {} bytes of at most {CLASS}: prompts say it",
            class.len()
        ));
    }
    is_token.then(|| format!("its class's folder is called like its token, {token}"))
}

/// Whether `text` is a name that we give a subject. Earlier versions gave longer ones.
pub fn is_id(text: &str) -> bool {
    !text.is_empty() && text.len() <= 200 && !text.starts_with('.') && text.chars().all(is_plain)
}

/// The folder's name in letters that every table and file system takes, with a number if it is taken.
fn new_id(subjects: &[Subject], path: &str) -> String {
    let name = path.rsplit('/').next().unwrap_or_default();
    let is_free = |id: &str| subjects.iter().all(|subject| subject.id != id);
    own_subjects::free_name(&own_subjects::plain_name(name, NAME), is_free)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::watch::state::SetAside;

    fn folder(photos: &[&str]) -> Folder {
        let path = |photo: &&str| (photo.to_string(), format!("{photo}.jpg").into());
        Folder {
            photos: photos.iter().map(path).collect(),
        }
    }

    fn scan(folders: &[(&str, &[&str])]) -> Scan {
        Scan {
            folders: folders
                .iter()
                .map(|(path, photos)| (path.to_string(), folder(photos)))
                .collect(),
            ..Scan::default()
        }
    }

    fn seen(state: &mut State, folders: &[(&str, &[&str])]) {
        reconcile(state, &scan(folders));
    }

    /// Pretends that every run that is waited for has ended well.
    fn learn(state: &mut State) {
        for subject in &mut state.subjects {
            subject.learnt = subject
                .pending
                .take()
                .map(|_| subject.look())
                .or(subject.learnt.take());
        }
    }

    fn summary(state: &State) -> Vec<(&str, &str, &str, bool, bool)> {
        let line = |s: &'_ Subject| (s.pending.is_some(), s.retired);
        state
            .subjects
            .iter()
            .map(|s| {
                (
                    s.id.as_str(),
                    s.folder.as_str(),
                    s.token.as_str(),
                    line(s).0,
                    line(s).1,
                )
            })
            .collect()
    }

    const REX: [&str; 3] = ["r1", "r2", "r3"];
    const MIA: [&str; 3] = ["m1", "m2", "m3"];

    #[test]
    fn three_photos_make_a_subject_and_two_wait() {
        let mut state = State::default();
        seen(&mut state, &[("dog/rex", &REX), ("cat/mia", &MIA[..2])]);
        assert_eq!(summary(&state), [("rex", "dog/rex", "sks", true, false)]);
        assert_eq!(
            state.waiting["cat/mia"],
            "it has 2 of at least 3 usable photos"
        );
        seen(&mut state, &[("dog/rex", &REX), ("cat/mia", &MIA)]);
        let queue: Vec<&str> = state.queue().iter().map(|s| s.id.as_str()).collect();
        assert_eq!(queue, ["rex", "mia"]);
        assert!(state.waiting.is_empty());
    }

    #[test]
    fn a_rename_keeps_token_and_identity_and_learns_nothing_anew() {
        let mut state = State::default();
        seen(&mut state, &[("dog/rex", &REX)]);
        seen(&mut state, &[("dog/rex", &REX), ("cat/mia", &MIA)]);
        learn(&mut state);
        seen(&mut state, &[("dog/hasso", &REX), ("cat/mia", &MIA)]);
        let expected = [
            ("rex", "dog/hasso", "sks", false, false),
            ("mia", "cat/mia", "ohw", false, false),
        ];
        assert_eq!(summary(&state), expected);
        // Two folders that exchange their names.
        seen(&mut state, &[("cat/mia", &REX), ("dog/hasso", &MIA)]);
        let expected = [
            ("rex", "cat/mia", "sks", true, false),
            ("mia", "dog/hasso", "ohw", true, false),
        ];
        assert_eq!(
            summary(&state),
            expected,
            "their classes have changed, so they are learnt again"
        );
        learn(&mut state);
        // Renamed and extended at once.
        seen(
            &mut state,
            &[("cat/tom", &["r1", "r2", "r3", "r4"]), ("dog/hasso", &MIA)],
        );
        assert_eq!(summary(&state)[0], ("rex", "cat/tom", "sks", true, false));
    }

    #[test]
    fn a_retired_token_is_never_given_again_but_its_subject_may_come_back() {
        let mut state = State::default();
        seen(&mut state, &[("dog/rex", &REX)]);
        learn(&mut state);
        seen(&mut state, &[]);
        assert_eq!(summary(&state), [("rex", "dog/rex", "sks", false, true)]);
        seen(&mut state, &[("dog/rex", &["x1", "x2", "x3"])]);
        let expected = [
            ("rex", "dog/rex", "sks", false, true),
            ("rex-2", "dog/rex", "ohw", true, false),
        ];
        assert_eq!(
            summary(&state),
            expected,
            "another dog in a folder of the same name"
        );
        seen(&mut state, &[("dog/old", &REX)]);
        let expected = [
            ("rex", "dog/old", "sks", false, false),
            ("rex-2", "dog/rex", "ohw", false, true),
        ];
        assert_eq!(
            summary(&state),
            expected,
            "what was learnt of it still holds"
        );
    }

    #[test]
    fn who_comes_back_after_something_was_published_without_it_is_learnt_again() {
        let mut state = State::default();
        seen(&mut state, &[("dog/rex", &REX), ("cat/mia", &MIA)]);
        learn(&mut state);
        let scores = crate::evaluation::metrics::Scores {
            clip_i: 0.5,
            clip_t: 0.5,
            dino: 0.5,
        };
        let mut published = crate::watch::state::Published {
            number: 2,
            run: String::new(),
            adapter: String::new(),
            scores: [("rex".to_string(), scores), ("mia".into(), scores)].into(),
        };
        state.published = Some(published.clone());
        let rex = |state: &State| {
            (
                state.subjects[1].retired,
                state.subjects[1].pending.is_some(),
            )
        };
        seen(&mut state, &[("cat/mia", &MIA)]);
        seen(&mut state, &[("dog/rex", &REX), ("cat/mia", &MIA)]);
        assert_eq!(rex(&state), (false, false), "it was away between two runs");
        seen(&mut state, &[("cat/mia", &MIA)]);
        published.scores.remove("rex");
        state.published = Some(published);
        seen(&mut state, &[("cat/mia", &MIA)]);
        assert_eq!(rex(&state), (true, false));
        seen(&mut state, &[("dog/rex", &REX), ("cat/mia", &MIA)]);
        assert_eq!(rex(&state), (false, true));
        assert_eq!(state.subjects[1].token, "ohw");
    }

    #[test]
    fn a_class_that_no_prompt_could_say_waits_with_the_reason() {
        let mut state = State::default();
        seen(&mut state, &[("__/rex", &REX), ("cat/mia", &MIA)]);
        assert_eq!(summary(&state), [("mia", "cat/mia", "sks", true, false)]);
        assert!(state.waiting["__/rex"].contains("has no letters"));
        learn(&mut state);
        for folder in ["{}/mia", "big sks/mia"] {
            seen(&mut state, &[(folder, &MIA)]);
            assert_eq!(summary(&state), [("mia", folder, "sks", false, false)]);
            assert_eq!(state.subjects[0].class, "cat");
            assert!(state.waiting[folder].contains("stays as it was learnt"));
        }
    }

    #[test]
    fn a_folder_that_is_still_changing_leaves_its_subject_alone() {
        let mut state = State::default();
        seen(&mut state, &[("dog/rex", &REX)]);
        learn(&mut state);
        let mut moving = scan(&[]);
        moving.unsettled = ["dog/rex".to_string(), "dog/hasso".into()].into();
        reconcile(&mut state, &moving);
        assert_eq!(summary(&state), [("rex", "dog/rex", "sks", false, false)]);
        assert_eq!(state.waiting.len(), 2);
    }

    #[test]
    fn fewer_photos_than_needed_keep_what_was_learnt_and_more_are_learnt() {
        let mut state = State::default();
        seen(&mut state, &[("dog/rex", &REX)]);
        learn(&mut state);
        seen(&mut state, &[("dog/rex", &REX[..1])]);
        assert_eq!(summary(&state), [("rex", "dog/rex", "sks", false, false)]);
        assert!(state.waiting["dog/rex"].contains("stays as it was learnt"));
        seen(&mut state, &[("dog/rex", &["r1", "r2", "r3", "r4"])]);
        assert_eq!(summary(&state), [("rex", "dog/rex", "sks", true, false)]);
        // Back to what is known: nothing to do.
        seen(&mut state, &[("dog/rex", &REX)]);
        assert_eq!(summary(&state), [("rex", "dog/rex", "sks", false, false)]);
    }

    #[test]
    fn what_was_held_back_is_tried_again_only_when_its_photos_change() {
        let mut state = State::default();
        seen(&mut state, &[("dog/rex", &REX)]);
        let subject = &mut state.subjects[0];
        subject.held = Some((subject.look(), "it forgets".into()));
        seen(&mut state, &[("dog/rex", &REX)]);
        assert!(!summary(&state)[0].3);
        seen(&mut state, &[("dog/rex", &["r1", "r2", "r4"])]);
        assert!(summary(&state)[0].3);
    }

    #[test]
    fn every_subject_has_a_token_and_a_name_of_its_own_until_tokens_run_out() {
        let mut state = State::default();
        let photos: Vec<[String; 3]> = (0..RARE_TOKENS.len() + 1)
            .map(|i| ["a", "b", "c"].map(|p| format!("{p}{i}")))
            .collect();
        let mut all = Scan::default();
        for (i, photos) in photos.iter().enumerate() {
            let photos: Vec<&str> = photos.iter().map(String::as_str).collect();
            all.folders
                .insert(format!("class {i:03}/the same näme"), folder(&photos));
        }
        all.set_aside.push(SetAside {
            path: "x/y/z.jpg".into(),
            reason: "empty".into(),
        });
        reconcile(&mut state, &all);
        let tokens: BTreeSet<&str> = state.subjects.iter().map(|s| s.token.as_str()).collect();
        let ids: BTreeSet<&str> = state.subjects.iter().map(|s| s.id.as_str()).collect();
        assert_eq!((tokens.len(), ids.len()), (64, 64));
        assert!(ids.contains("the-same-n-me") && ids.contains("the-same-n-me-64"));
        assert_eq!(state.waiting.len(), 1);
        assert!(state.waiting["class 064/the same näme"].contains("64 tokens"));
        assert_eq!(state.set_aside, all.set_aside);
    }
}
