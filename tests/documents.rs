//! What the documents say about the code is held against the code.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap()
}

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => sources(&path, found),
            false => found.extend(path.extension().is_some_and(|e| e == "rs").then_some(path)),
        }
    }
}

/// Rooms by the floor that the crate's documentation gives them; 0 is the topmost.
fn floors() -> BTreeMap<String, usize> {
    let mut floors = BTreeMap::new();
    let text = read("src/lib.rs");
    let rows = text.lines().filter_map(|line| line.strip_prefix("//! | ["));
    for (floor, row) in rows.enumerate() {
        let cell = row.split(" | ").next().unwrap();
        for name in cell.split('`').skip(1).step_by(2) {
            floors.insert(name.to_string(), floor);
        }
    }
    floors
}

/// The rooms that a source text names, by `crate::ROOM` or `crate::{ROOM::…, ROOM}`.
fn named(text: &str) -> Vec<String> {
    let code: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .collect();
    let code = code.join("\n");
    let mut rooms = Vec::new();
    for (start, _) in code.match_indices("crate::") {
        let rest = &code[start + "crate::".len()..];
        let word = |text: &str| -> String {
            let end = text.find(|c: char| !c.is_alphanumeric() && c != '_');
            text[..end.unwrap_or(text.len())].to_string()
        };
        match rest.strip_prefix('{') {
            None => rooms.push(word(rest)),
            Some(list) => {
                let (mut depth, mut item) = (0, String::new());
                for c in list.chars() {
                    match c {
                        '}' if depth == 0 => break,
                        ',' if depth == 0 => rooms.push(word(std::mem::take(&mut item).trim())),
                        _ => {
                            depth += i32::from(c == '{') - i32::from(c == '}');
                            item.push(c);
                        }
                    }
                }
                rooms.push(word(item.trim()));
            }
        }
    }
    rooms
}

#[test]
fn imports_run_downwards_only() {
    let floors = floors();
    assert!(floors.len() > 15, "{floors:?}");
    let mut files = Vec::new();
    sources(&root().join("src"), &mut files);
    let mut upwards = Vec::new();
    for file in files {
        let inside = file.strip_prefix(root().join("src")).unwrap();
        let first = inside.components().next().unwrap().as_os_str();
        let room = first.to_string_lossy().trim_end_matches(".rs").to_string();
        // Everything may fail.
        if ["lib", "main", "error"].contains(&room.as_str()) {
            continue;
        }
        let Some(floor) = floors.get(&room) else {
            panic!("{room} has no place in the map of lib.rs");
        };
        for name in named(&std::fs::read_to_string(&file).unwrap()) {
            if floors.get(&name).is_some_and(|other| other < floor) {
                upwards.push(format!("{}: {name}", inside.display()));
            }
        }
    }
    assert!(upwards.is_empty(), "imports of upper floors: {upwards:#?}");
}

#[test]
fn the_readme_fits_on_a_few_screens_and_its_links_lead_somewhere() {
    let pages = [
        "README.md",
        "datasets/README.md",
        "datasets/nano/README.md",
        "examples/README.md",
        "pipelines/README.md",
        "src/README.md",
        "tests/README.md",
    ];
    assert!(read("README.md").lines().count() <= 150);
    for page in pages {
        let text = read(page);
        let around = root().join(page).parent().unwrap().to_path_buf();
        for link in text.split("](").skip(1) {
            let link = link.split(')').next().unwrap();
            if link.starts_with("http") {
                continue;
            }
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => root().join(page),
                _ => around.join(file),
            };
            assert!(target.exists(), "{page}: {link}");
            if !anchor.is_empty() {
                let heading = |line: &str| {
                    let text = line.trim_start_matches('#').trim().to_lowercase();
                    let kept = text
                        .chars()
                        .filter(|c| c.is_alphanumeric() || " -".contains(*c));
                    kept.collect::<String>().replace(' ', "-")
                };
                let text = std::fs::read_to_string(&target).unwrap();
                let mut headings = text
                    .lines()
                    .filter(|line| line.starts_with('#'))
                    .map(heading);
                assert!(headings.any(|heading| heading == anchor), "{page}: {link}");
            }
        }
    }
}

const BEGIN: &str = "<!-- fields: written from the doc comments of src/config/resolved.rs; tests/documents.rs holds the two \
                     equal -->\n";
const END: &str = "<!-- end of fields -->";

/// An enum's choices, as a pipeline file spells them.
fn choices(text: &str) -> BTreeMap<String, String> {
    let mut choices = BTreeMap::new();
    for part in text.split("pub enum ").skip(1) {
        let (name, body) = part.split_once(" {").unwrap();
        let body = body.split("\n}").next().unwrap();
        let variants = body.lines().map(str::trim).filter(|line| {
            line.ends_with(',') && line.starts_with(char::is_uppercase) && !line.contains('(')
        });
        let snake = |variant: &str| {
            let mut word = String::new();
            for c in variant.trim_end_matches(',').chars() {
                if c.is_uppercase() && !word.is_empty() {
                    word.push('_');
                }
                word.extend(c.to_lowercase());
            }
            format!("`\"{word}\"`")
        };
        let list: Vec<String> = variants.map(snake).collect();
        choices.insert(name.to_string(), list.join(", "));
    }
    choices
}

fn type_in_words(of: &str, choices: &BTreeMap<String, String>) -> String {
    let of = of.trim_start_matches("Option<").trim_end_matches('>');
    match of {
        "u64" | "usize" => "whole number".into(),
        "f64" => "number".into(),
        "bool" => "true or false".into(),
        "String" | "PathBuf" => "text".into(),
        "Vec<String" => "list of texts".into(),
        "Vec<Subject" => "tables".into(),
        "PromptList" => "text or list of texts".into(),
        "Device" => "`\"cpu\"`, `\"cuda\"`, `\"cuda:N\"`".into(),
        other => choices
            .get(other)
            .cloned()
            .unwrap_or_else(|| other.to_string()),
    }
}

/// The tables of all fields, from the doc comments of the resolved pipeline's types.
fn fields() -> String {
    let text = read("src/config/resolved.rs");
    let choices = choices(&read("src/config/choices.rs"));
    let mut tables = String::new();
    let mut doc = String::new();
    let mut skipped = false;
    let mut renamed = None;
    let mut open = false;
    for line in text.lines() {
        let line = line.trim();
        if let Some(words) = line.strip_prefix("///") {
            doc.push_str(words);
        } else if let Some(rest) = line.strip_prefix("pub struct ") {
            let name = rest.trim_end_matches(" {");
            let doc = std::mem::take(&mut doc);
            write!(tables, "\n### {name}\n\n{}\n\n", doc.trim()).unwrap();
            tables.push_str("| field | type | what it is |\n|---|---|---|\n");
            open = true;
        } else if line == "#[serde(skip)]" {
            skipped = true;
        } else if let Some((_, name)) = line.split_once("(rename = \"") {
            renamed = name.split('"').next();
        } else if line == "}" {
            open = false;
        } else if let Some((field, of)) = line.strip_prefix("pub ").and_then(|f| f.split_once(": "))
        {
            let words = std::mem::take(&mut doc).trim().replace('|', "\\|");
            // Tables in tables, and fields of other tables that are laid into this one, have their own heading.
            let table = words.is_empty();
            let field = renamed.take().unwrap_or(field);
            if open && !std::mem::take(&mut skipped) && !table {
                let of = type_in_words(of.trim_end_matches(','), &choices);
                writeln!(tables, "| `{field}` | {of} | {words} |").unwrap();
            }
        } else if !line.starts_with("#[") {
            doc.clear();
        }
    }
    let plain = tables.replace(
        "[`RARE_TOKENS`](super::prompts::RARE_TOKENS)",
        "a list of rare words",
    );
    plain.replace("(`None`) ", "")
}

/// `PROXYTUNE_WRITE_DOCS=1 cargo test --release --test tests -- documents` writes them.
#[test]
fn every_field_of_a_pipeline_is_explained_as_its_doc_comment_explains_it() {
    let page = root().join("pipelines/README.md");
    let text = std::fs::read_to_string(&page).unwrap();
    let (before, rest) = text.split_once(BEGIN).unwrap();
    let (stands, after) = rest.split_once(END).unwrap();
    let fields = fields();
    assert!(fields.matches("\n| `").count() > 50);
    if std::env::var_os("PROXYTUNE_WRITE_DOCS").is_some() {
        std::fs::write(page, format!("{before}{BEGIN}{fields}{END}{after}")).unwrap();
        return;
    }
    assert_eq!(
        stands, fields,
        "write it again: PROXYTUNE_WRITE_DOCS=1 cargo test --release --test tests -- documents"
    );
}
