//! Subjects from the command line alone, in place of the pipeline's own: `--subject NAME=DIR:CLASS` and
//! `--subjects DIR`, a folder laid out `CLASS/SUBJECT/photos` as `watch` has it.

use std::path::{Path, PathBuf};

use super::reader::Faults;
use super::surroundings::Surroundings;
use super::tree::{Entry, Node, Place, Table, Value};
use crate::files::system::is_system;
use crate::images::is_photo_name;

/// What the command line changes in a pipeline file.
#[derive(Debug, Clone, Copy, Default)]
pub struct Changes<'a> {
    /// Subjects that take the place of the file's: `NAME=DIR:CLASS` or `NAME=DIR:CLASS:TOKEN`.
    pub subjects: &'a [String],
    /// A folder `CLASS/SUBJECT/photos` of such subjects.
    pub subjects_dir: Option<&'a Path>,
    /// Fields that are set after that, `a.b=value`.
    pub overrides: &'a [String],
}

/// Lays the subjects of `changes` over `root`: where there are any, its own do not count.
pub(super) fn lay_over(
    root: &mut Table,
    changes: &Changes<'_>,
    surroundings: &dyn Surroundings,
    faults: &Faults,
) {
    let mut subjects = Table::default();
    let mut add = |(name, subject): (String, Table), place: &Place| {
        if subjects.get(&name).is_some() {
            faults.push(
                place,
                format!("two subjects are called {name}"),
                "give each a name of its own",
            );
        }
        subjects
            .entries
            .push(entry(&name, Value::Table(subject), place));
    };
    for typed in changes.subjects {
        let place = Place::Argument(format!("--subject {typed}").into());
        match parse(typed, &place, |path| surroundings.is_dir(path)) {
            Some(subject) => add(subject, &place),
            None => faults.push(
                &place,
                "a subject has the form NAME=DIR:CLASS or NAME=DIR:CLASS:TOKEN",
                "for example --subject rex=photos/rex:dog",
            ),
        }
    }
    if let Some(dir) = changes.subjects_dir {
        let place = Place::Argument(format!("--subjects {}", dir.display()).into());
        match in_folder(dir, &place, surroundings) {
            Ok(found) => found.into_iter().for_each(|subject| add(subject, &place)),
            Err(what) => faults.push(
                &place,
                what,
                "lay the photos out as CLASS/SUBJECT, such as dog/rex/1.jpg below it; or name each subject with --subject",
            ),
        }
    }
    if changes.subjects.is_empty() && changes.subjects_dir.is_none() {
        return;
    }
    let place = match changes.subjects.first() {
        Some(typed) => Place::Argument(format!("--subject {typed}").into()),
        None => Place::Argument("--subjects".into()),
    };
    root.entries.retain(|entry| entry.key != "subject");
    root.entries
        .push(entry("subject", Value::Table(subjects), &place));
}

fn entry(key: &str, value: Value, place: &Place) -> Entry {
    Entry {
        key: key.to_string(),
        place: place.clone(),
        node: Node::new(place.clone(), value),
    }
}

/// The fields of a subject.
fn subject(images: &str, class: &str, token: Option<&str>, place: &Place) -> Table {
    let fields = [
        ("images", Some(images)),
        ("class", Some(class)),
        ("token", token),
    ];
    let fields = fields
        .into_iter()
        .filter_map(|(key, text)| Some(entry(key, Value::Text(text?.to_string()), place)));
    Table {
        entries: fields.collect(),
    }
}

/// Name and fields of `NAME=DIR:CLASS` or `NAME=DIR:CLASS:TOKEN`. A folder may have colons in its name: of both readings
/// the one counts whose folder is there, the longer one first.
fn parse(typed: &str, place: &Place, is_dir: impl Fn(&Path) -> bool) -> Option<(String, Table)> {
    let (name, rest) = typed.split_once('=')?;
    // The colon of a drive ends nothing: C:\photos.
    let drive = match rest.as_bytes() {
        [letter, b':', b'\\' | b'/', ..] if letter.is_ascii_alphabetic() => 2,
        _ => 0,
    };
    let (before_last, last) = split_last(rest, drive)?;
    let longer = (before_last, last, None);
    let chosen = match split_last(before_last, drive) {
        Some((dir, class)) if !is_dir(Path::new(before_last)) => (dir, class, Some(last)),
        _ => longer,
    };
    let (dir, class, token) = chosen;
    let parts = [name, dir, class, token.unwrap_or("sks")];
    parts
        .iter()
        .all(|part| !part.trim().is_empty())
        .then(|| (name.to_string(), subject(dir, class, token, place)))
}

/// `text` before and after its last colon from the byte `start` on.
fn split_last(text: &str, start: usize) -> Option<(&str, &str)> {
    let at = start + text.get(start..)?.rfind(':')?;
    Some((&text[..at], &text[at + 1..]))
}

/// The subjects in `dir`, in the order of their paths.
fn in_folder(
    dir: &Path,
    place: &Place,
    surroundings: &dyn Surroundings,
) -> Result<Vec<(String, Table)>, String> {
    // Sorted, without what is hidden or a system's own.
    let entries = |dir: &Path| -> Result<Vec<PathBuf>, String> {
        let mut paths = surroundings
            .entries(dir)
            .map_err(|error| error.to_string())?;
        paths.retain(|path| {
            let name = last_part(path);
            !name.starts_with('.') && !is_system(&name)
        });
        paths.sort();
        Ok(paths)
    };
    let mut found: Vec<(String, Table)> = Vec::new();
    for class in entries(dir)? {
        if !surroundings.is_dir(&class) {
            continue;
        }
        for path in entries(&class)? {
            if !surroundings.is_dir(&path) {
                if is_photo_name(&path) {
                    return Err(format!(
                        "{} holds photos, not folders of subjects",
                        class.display()
                    ));
                }
                continue;
            }
            let images = path
                .to_str()
                .ok_or_else(|| format!("the name of {} is not UTF-8", path.display()))?;
            let is_free = |name: &str| found.iter().all(|(taken, _)| taken != name);
            let name = free_name(&plain_name(&last_part(&path), NAME), is_free);
            let class = class_of(&last_part(&class));
            found.push((name, subject(images, &class, None, place)));
        }
    }
    match found.is_empty() {
        true => Err(format!("there is no subject in {}", dir.display())),
        false => Ok(found),
    }
}

fn last_part(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// A class's folder as a prompt says it: "stuffed_animal" is a stuffed animal.
pub fn class_of(folder: &str) -> String {
    let words = folder.replace(['{', '}', '_'], " ");
    words.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The most bytes of a name that a folder gives: a number may be added.
const NAME: usize = super::limits::NAME_BYTES - 10;

/// Whether every table and file system takes `c` in a name.
pub fn is_plain(c: char) -> bool {
    c.is_ascii_alphanumeric() || "_-.".contains(c)
}

/// A folder's name in plain letters, `most` bytes of it.
pub fn plain_name(folder: &str, most: usize) -> String {
    let plain = folder.chars().map(|c| if is_plain(c) { c } else { '-' });
    plain.take(most).collect()
}

/// `name`, or with a number where it is not free.
pub fn free_name(name: &str, is_free: impl Fn(&str) -> bool) -> String {
    let numbered = (2..).map(|number| format!("{name}-{number}"));
    std::iter::once(name.to_string())
        .chain(numbered)
        .find(|name| is_free(name))
        .unwrap_or_default() // there is always a next number
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(typed: &str) -> Option<(String, Vec<String>)> {
        let (name, table) = parse(typed, &Place::Argument("".into()), |path| {
            path == Path::new("photos/a:b")
        })?;
        let fields = table
            .entries
            .iter()
            .filter_map(|entry| entry.node.as_text());
        Some((name, fields.map(str::to_string).collect()))
    }

    #[test]
    fn a_typed_subject_is_a_name_a_folder_a_class_and_perhaps_a_token() {
        let odd = "photos/a:b";
        for (typed, fields) in [
            ("rex=photos/rex:dog", vec!["photos/rex", "dog"]),
            (
                "rex=photos/rex:stuffed animal:<s0><s1>",
                vec!["photos/rex", "stuffed animal", "<s0><s1>"],
            ),
            (r"rex=C:\photos:dog", vec![r"C:\photos", "dog"]),
            (r"rex=C:\photos:dog:sks", vec![r"C:\photos", "dog", "sks"]),
            (&format!("rex={odd}:dog"), vec![odd, "dog"]),
            (&format!("rex={odd}:dog:sks"), vec![odd, "dog", "sks"]),
        ] {
            let (name, found) = read(typed).unwrap();
            assert_eq!(
                (name.as_str(), found),
                ("rex", fields.iter().map(|f| f.to_string()).collect()),
                "{typed}"
            );
        }
        for typed in [
            "photos/rex",
            "rex=photos",
            "rex=photos:",
            "rex=:dog",
            "=a:dog",
            "rex=a:dog:",
        ] {
            assert!(read(typed).is_none(), "{typed}");
        }
    }
}
