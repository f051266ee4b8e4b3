//! A TOML document as values that know where they were typed, with overrides laid over it.

use std::fmt;
use std::sync::Arc;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::own_subjects::{self, Changes};
use super::reader::{Fault, Faults};
use super::surroundings::Surroundings;

/// Where a value was typed. Its text is shared by all values that stand there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    /// A file's name with line and column, from 1; columns count characters.
    File {
        file: Arc<str>,
        line: usize,
        column: usize,
    },
    /// An override, as it was typed.
    Override(Arc<str>),
    /// Another argument of the command line, as it was typed.
    Argument(Arc<str>),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::File { file, line, column } => write!(f, "{file}:{line}:{column}"),
            Place::Override(text) => write!(f, "--set {text}"),
            Place::Argument(text) => f.write_str(text),
        }
    }
}

/// A value and its place.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub place: Place,
    pub value: Value,
    /// How an override was typed whose value is neither a text nor made of several: where a text is wanted, this is it.
    pub typed: Option<String>,
}

impl Node {
    pub fn new(place: Place, value: Value) -> Self {
        Self {
            place,
            value,
            typed: None,
        }
    }

    /// The value as a text. Nobody puts quotes around the 2024 of `--set subject.rex.class=2024`.
    pub fn as_text(&self) -> Option<&str> {
        match &self.value {
            Value::Text(text) => Some(text),
            _ => self.typed.as_deref(),
        }
    }
}

/// A value, with integers wide enough to tell "too large" from "wrong".
#[derive(Debug, Clone)]
pub(super) enum Value {
    Text(String),
    Integer(i128),
    Float(f64),
    Boolean(bool),
    Date(String),
    List(Vec<Node>),
    Table(Table),
}

impl Value {
    /// What the value is, in words.
    pub fn kind(&self) -> &'static str {
        match self {
            Value::Text(_) => "a text",
            Value::Integer(_) => "a whole number",
            Value::Float(_) => "a number",
            Value::Boolean(_) => "true or false",
            Value::Date(_) => "a date",
            Value::List(_) => "a list",
            Value::Table(_) => "a table",
        }
    }
}

/// The entries of a table in the order in which they were typed.
#[derive(Debug, Clone, Default)]
pub(super) struct Table {
    pub entries: Vec<Entry>,
}

/// One key of a table; `place` is the key's, the node knows the value's.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub key: String,
    pub place: Place,
    pub node: Node,
}

impl Table {
    pub fn get(&self, key: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.key == key)
    }

    /// Where the value at `path` was typed, or else the nearest table around it; `None` when there is none.
    pub fn place(&self, path: &[String]) -> Option<&Place> {
        let (first, rest) = path.split_first()?;
        let entry = self.get(first)?;
        match (&entry.node.value, rest) {
            (_, []) => Some(&entry.node.place),
            (Value::Table(table), rest) => table.place(rest).or(Some(&entry.place)),
            _ => Some(&entry.place),
        }
    }
}

/// Faults of syntax that are looked at: each may follow from the one before.
const MOST_ERRORS: usize = 100;

/// Parses `text`, which is called `file` in faults, and lays `changes` over it. Gives the faults of the text's syntax,
/// then those of the changes.
///
/// The tree is whole even where there are faults; after a fault of syntax it may lack what followed.
pub(super) fn parse(
    text: &str,
    file: &str,
    changes: &Changes<'_>,
    surroundings: &dyn Surroundings,
) -> (Table, Vec<Fault>, Faults) {
    let places = Places::new(text, file);
    let (document, errors) = DeTable::parse_recoverable(text);
    let syntax: Vec<Fault> = errors
        .iter()
        .take(MOST_ERRORS)
        .map(|error| Fault {
            place: places.at(error.span().map_or(0, |span| span.start)),
            what: error.message().to_string(),
            hint: syntax_hint(error.message()).to_string(),
        })
        .collect();
    let mut table = places.table(document.get_ref());
    let faults = Faults::default();
    own_subjects::lay_over(&mut table, changes, surroundings, &faults);
    let overriding = changes.overrides.iter();
    faults.extend(overriding.filter_map(|text| lay_over(&mut table, text).err()));
    (table, syntax, faults)
}

fn syntax_hint(message: &str) -> &'static str {
    if message.contains("duplicate key") {
        "keep one of the two"
    } else {
        "texts stand in double quotes, tables in [brackets]; https://toml.io explains the format"
    }
}

/// Finds lines and columns in a text.
struct Places<'a> {
    text: &'a str,
    file: Arc<str>,
    line_starts: Vec<usize>,
    /// Characters before each block: a line may be as long as the file, and hold as many values.
    characters: Vec<usize>,
}

/// Bytes of a block.
const BLOCK: usize = 1024;

/// How many characters begin in `bytes`, which are UTF-8.
fn beginnings(bytes: &[u8]) -> usize {
    bytes.iter().filter(|byte| **byte & 0xC0 != 0x80).count()
}

impl<'a> Places<'a> {
    fn new(text: &'a str, file: &str) -> Self {
        let after_newlines = text.match_indices('\n').map(|(at, _)| at + 1);
        let mut before = 0;
        let blocks = text.as_bytes().chunks(BLOCK).map(|block| {
            before += beginnings(block);
            before
        });
        Self {
            text,
            file: file.into(),
            line_starts: std::iter::once(0).chain(after_newlines).collect(),
            characters: std::iter::once(0).chain(blocks).collect(),
        }
    }

    /// How many characters begin before the byte `offset`, which is at most the text's length.
    fn characters_before(&self, offset: usize) -> usize {
        let block = offset / BLOCK;
        self.characters[block] + beginnings(&self.text.as_bytes()[block * BLOCK..offset])
    }

    fn at(&self, offset: usize) -> Place {
        let line = self.line_starts.partition_point(|start| *start <= offset);
        let start = self.line_starts[line - 1]; // the first line starts at 0 <= offset, so `line` is at least 1
        let offset = offset.min(self.text.len());
        let column = self.characters_before(offset) - self.characters_before(start);
        Place::File {
            file: self.file.clone(),
            line,
            column: column + 1,
        }
    }

    fn table(&self, table: &DeTable<'_>) -> Table {
        let mut entries: Vec<(usize, Entry)> = table
            .iter()
            .map(|(key, value)| {
                let start = key.span().start;
                let entry = Entry {
                    key: key.get_ref().to_string(),
                    place: self.at(start),
                    node: self.node(value),
                };
                (start, entry)
            })
            .collect();
        entries.sort_by_key(|(start, _)| *start);
        Table {
            entries: entries.into_iter().map(|(_, entry)| entry).collect(),
        }
    }

    fn node(&self, value: &Spanned<DeValue<'_>>) -> Node {
        Node::new(self.at(value.span().start), self.value(value.get_ref()))
    }

    fn value(&self, value: &DeValue<'_>) -> Value {
        match value {
            DeValue::String(text) => Value::Text(text.to_string()),
            DeValue::Integer(number) => i128::from_str_radix(number.as_str(), number.radix())
                .map_or(Value::Integer(i128::MAX), Value::Integer),
            DeValue::Float(number) => Value::Float(number.as_str().parse().unwrap_or(f64::NAN)),
            DeValue::Boolean(value) => Value::Boolean(*value),
            DeValue::Datetime(date) => Value::Date(date.to_string()),
            DeValue::Array(items) => {
                Value::List(items.iter().map(|item| self.node(item)).collect())
            }
            DeValue::Table(table) => Value::Table(self.table(table)),
        }
    }
}

/// The most parts of an override's path: four times those of any field.
const DEEPEST: usize = 16;

/// Sets one value; tables on the way are made where they are missing.
fn lay_over(root: &mut Table, text: &str) -> Result<(), Fault> {
    let place = Place::Override(text.into());
    let fault = |what: String, hint: &str| Fault {
        place: place.clone(),
        what,
        hint: hint.to_string(),
    };
    let Some((path, keys, typed)) = assignment(text) else {
        return Err(fault(
            "an override has the form PATH=VALUE".to_string(),
            "for example --set subject.dog1.images=photos/dog",
        ));
    };
    let Some((last, tables)) = keys.split_last() else {
        return Err(fault(
            "the path is empty".to_string(),
            "name a field, such as student.steps",
        ));
    };
    if keys.len() > DEEPEST {
        return Err(fault(
            format!("the path has {} parts", keys.len()),
            "name a field, such as student.steps",
        ));
    }
    if keys.iter().any(|key| key.is_empty()) {
        return Err(fault(
            format!("{path:?} has an empty part"),
            "name a field, such as student.steps",
        ));
    }
    let mut table = root;
    for key in tables {
        let node = &mut entry(table, key, &place).node;
        table = match &mut node.value {
            Value::Table(inner) => inner,
            other => {
                return Err(fault(
                    format!("{key} is {}, not a table", other.kind()),
                    "set the field itself",
                ));
            }
        };
    }
    let entry = entry(table, last, &place);
    entry.place = place.clone();
    entry.node = override_value(typed.trim(), &place);
    Ok(())
}

/// Path, keys and value of an override. A key in quotes may hold dots and equals signs, as TOML has it; a path that is
/// no TOML key is cut at its dots.
fn assignment(text: &str) -> Option<(&str, Vec<String>, &str)> {
    // A key holds few of them, if any.
    let signs = text.match_indices('=').map(|(at, _)| at).take(8);
    let as_toml = signs
        .map(|at| (&text[..at], &text[at + 1..]))
        .find_map(|(path, value)| Some((path, dotted_key(path)?, value)));
    as_toml.or_else(|| {
        let (path, value) = text.split_once('=')?;
        let keys = path.split('.').map(|key| key.trim().to_string());
        Some((path, keys.collect(), value))
    })
}

/// The keys of a dotted TOML key.
fn dotted_key(path: &str) -> Option<Vec<String>> {
    let line = format!("{path} = 0");
    let document = DeTable::parse(&line).ok()?;
    let mut table = document.get_ref();
    let mut keys = Vec::new();
    loop {
        let (key, value) = table.iter().next().filter(|_| table.len() == 1)?;
        keys.push(key.get_ref().to_string());
        match value.get_ref() {
            DeValue::Table(inner) => table = inner,
            _ => return Some(keys),
        }
    }
}

fn entry<'t>(table: &'t mut Table, key: &str, place: &Place) -> &'t mut Entry {
    let at = table.entries.iter().position(|entry| entry.key == key);
    let at = at.unwrap_or_else(|| {
        table.entries.push(Entry {
            key: key.to_string(),
            place: place.clone(),
            node: Node::new(place.clone(), Value::Table(Table::default())),
        });
        table.entries.len() - 1
    });
    &mut table.entries[at]
}

/// What is a TOML value is read as one; everything else, dates too, is a text.
fn override_value(typed: &str, place: &Place) -> Node {
    let line = format!("value = {typed}");
    let parsed = DeTable::parse(&line).ok();
    let value = parsed
        .as_ref()
        .filter(|document| document.get_ref().len() == 1)
        .and_then(|document| document.get_ref().get("value"))
        .map(|value| Places::new(&line, "").value(value.get_ref()));
    let value = match value {
        None | Some(Value::Date(_)) => Value::Text(typed.to_string()),
        Some(value) => value,
    };
    let is_one = !matches!(value, Value::Text(_) | Value::List(_) | Value::Table(_));
    let mut node = Node::new(place.clone(), value);
    put_at(&mut node, place);
    node.typed = is_one.then(|| typed.to_string());
    node
}

fn put_at(node: &mut Node, place: &Place) {
    node.place = place.clone();
    match &mut node.value {
        Value::List(items) => items.iter_mut().for_each(|item| put_at(item, place)),
        Value::Table(table) => {
            for entry in &mut table.entries {
                entry.place = place.clone();
                put_at(&mut entry.node, place);
            }
        }
        _ => {}
    }
}
