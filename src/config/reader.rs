//! Reads values out of a [`Table`] and collects every fault with its place and a hint.

use std::cell::{Cell, RefCell};
use std::fmt::Display;

use super::limits::{Count, Real};
use super::tree::{Node, Place, Table, Value};

/// One thing that is wrong with a pipeline file.
#[derive(Debug, Clone)]
pub(super) struct Fault {
    pub place: Place,
    pub what: String,
    /// How to mend it.
    pub hint: String,
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}\n  hint: {}", self.place, self.what, self.hint)
    }
}

/// Faults that are told one by one: nobody reads more, and a file may have millions.
const MOST_FAULTS: usize = 100;
/// Characters of a fault that are told: a name in the file may be as long as the file.
const MOST_CHARACTERS: usize = 1000;

/// The faults found so far, shared by all sections of one file.
#[derive(Debug, Default)]
pub(super) struct Faults {
    told: RefCell<Vec<Fault>>,
    /// How many more there are.
    more: Cell<usize>,
}

impl Faults {
    pub fn push(&self, place: &Place, what: impl Into<String>, hint: impl Into<String>) {
        self.extend([Fault {
            place: place.clone(),
            what: what.into(),
            hint: hint.into(),
        }]);
    }

    pub fn extend(&self, faults: impl IntoIterator<Item = Fault>) {
        for mut fault in faults {
            if self.is_full() {
                self.more.set(self.more.get() + 1);
                continue;
            }
            if let Some((end, _)) = fault.what.char_indices().nth(MOST_CHARACTERS) {
                fault.what.truncate(end);
                fault.what.push('…');
            }
            self.told.borrow_mut().push(fault);
        }
    }

    /// Whether further faults are only counted.
    pub fn is_full(&self) -> bool {
        self.told.borrow().len() >= MOST_FAULTS
    }

    /// Adds those of `other`.
    pub fn append(&self, other: &Faults) {
        self.extend(other.told.borrow().iter().cloned());
        self.more.set(self.more.get() + other.more.get());
    }

    /// All of them: the file's in the order of lines, then those of overrides.
    pub fn into_lines(self) -> Vec<String> {
        let mut faults = self.told.into_inner();
        faults.sort_by_key(|fault| match &fault.place {
            Place::File { line, column, .. } => (*line, *column),
            Place::Override(_) | Place::Argument(_) => (usize::MAX, 0),
        });
        let mut lines: Vec<String> = faults.iter().map(Fault::to_string).collect();
        lines.dedup();
        if self.more.get() > 0 {
            lines.push(format!("and {} more faults", self.more.get()));
        }
        lines
    }
}

/// A value that was typed, and where.
#[derive(Debug, Clone)]
pub(super) struct At<T> {
    pub value: T,
    pub place: Place,
}

/// A choice that a file spells as a text.
pub(super) trait Choice: Copy + Sized + 'static {
    /// Every spelling with its meaning.
    const SPELLINGS: &'static [(&'static str, Self)];
}

/// One table of the file. Fields are asked for by name; what nobody asked for is unknown.
pub(super) struct Section<'a> {
    faults: &'a Faults,
    path: String,
    place: Place,
    table: &'a Table,
    asked: RefCell<Vec<&'static str>>,
}

impl<'a> Section<'a> {
    /// The table at `path`; an empty path is the file itself.
    pub fn new(faults: &'a Faults, path: &str, place: Place, table: &'a Table) -> Self {
        Self {
            faults,
            path: path.to_string(),
            place,
            table,
            asked: RefCell::default(),
        }
    }

    pub fn faults(&self) -> &'a Faults {
        self.faults
    }

    /// Where the table was opened.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// The dotted path of a field.
    pub fn name(&self, field: &str) -> String {
        if self.path.is_empty() {
            field.to_string()
        } else {
            format!("{}.{field}", self.path)
        }
    }

    fn node(&self, field: &'static str) -> Option<&'a Node> {
        self.asked.borrow_mut().push(field);
        self.table.get(field).map(|entry| &entry.node)
    }

    fn wrong_type(&self, field: &str, node: &Node, expected: &str, example: &str) {
        self.faults.push(
            &node.place,
            format!(
                "{} must be {expected}, not {}",
                self.name(field),
                node.value.kind()
            ),
            format!("for example {field} = {example}"),
        );
    }

    /// A text that is not empty.
    pub fn text(&self, field: &'static str) -> Option<At<String>> {
        let text = self.any_text(field)?;
        if text.value.trim().is_empty() {
            self.faults.push(
                &text.place,
                format!("{} is empty", self.name(field)),
                "write something between the quotes, or remove the line",
            );
            return None;
        }
        Some(text)
    }

    /// A text, which may be empty.
    pub fn any_text(&self, field: &'static str) -> Option<At<String>> {
        let node = self.node(field)?;
        let Some(text) = node.as_text() else {
            let example = match &node.value {
                Value::Integer(number) => format!("\"{number}\""),
                Value::Date(date) => format!("\"{date}\""),
                _ => "\"…\"".to_string(),
            };
            self.wrong_type(field, node, "a text", &example);
            return None;
        };
        Some(At {
            value: text.to_string(),
            place: node.place.clone(),
        })
    }

    /// A text that must be there.
    pub fn required_text(&self, field: &'static str, example: &str) -> Option<At<String>> {
        if self.table.get(field).is_none() {
            self.faults.push(
                &self.place,
                format!("{} is missing", self.name(field)),
                format!("add a line such as {field} = {example}"),
            );
        }
        self.text(field)
    }

    /// A whole number in `range`.
    pub fn count(&self, field: &'static str, range: &Count) -> Option<At<usize>> {
        let node = self.node(field)?;
        let Value::Integer(number) = node.value else {
            self.wrong_type(
                field,
                node,
                "a whole number",
                &range.least.max(1).to_string(),
            );
            return None;
        };
        let value = range.admit(number);
        if value.is_none() {
            self.out_of_range(field, node, &number, range);
        }
        Some(At {
            value: value?,
            place: node.place.clone(),
        })
    }

    /// A number in `range`; whole numbers count as numbers.
    pub fn number(&self, field: &'static str, range: &Real) -> Option<At<f64>> {
        let node = self.node(field)?;
        let value = match node.value {
            Value::Float(number) => number,
            Value::Integer(number) => number as f64,
            _ => {
                self.wrong_type(field, node, "a number", "1.0");
                return None;
            }
        };
        if range.admits(value) {
            return Some(At {
                value,
                place: node.place.clone(),
            });
        }
        self.out_of_range(field, node, &value, range);
        None
    }

    fn out_of_range(&self, field: &str, node: &Node, value: &impl Display, range: &impl Display) {
        self.faults.push(
            &node.place,
            format!("{} = {value} is out of range", self.name(field)),
            range.to_string(),
        );
    }

    pub fn boolean(&self, field: &'static str) -> Option<At<bool>> {
        let node = self.node(field)?;
        let Value::Boolean(value) = node.value else {
            self.wrong_type(field, node, "true or false", "true");
            return None;
        };
        Some(At {
            value,
            place: node.place.clone(),
        })
    }

    /// One of the spellings of `T`.
    pub fn choice<T: Choice>(&self, field: &'static str) -> Option<At<T>> {
        let text = self.any_text(field)?;
        let found = T::SPELLINGS
            .iter()
            .find(|(spelling, _)| *spelling == text.value);
        let Some((_, value)) = found else {
            let spellings = || T::SPELLINGS.iter().map(|(spelling, _)| *spelling);
            self.faults.push(
                &text.place,
                format!("{} = {:?} is not a choice", self.name(field), text.value),
                did_you_mean(&text.value, spellings(), "the choices are"),
            );
            return None;
        };
        Some(At {
            value: *value,
            place: text.place,
        })
    }

    /// A list of texts with at least one item.
    pub fn texts(&self, field: &'static str) -> Option<At<Vec<At<String>>>> {
        let node = self.node(field)?;
        let Value::List(items) = &node.value else {
            self.wrong_type(field, node, "a list of texts", "[\"…\"]");
            return None;
        };
        if items.is_empty() {
            self.faults.push(
                &node.place,
                format!("{} is empty", self.name(field)),
                "name at least one, or remove the line",
            );
            return None;
        }
        let mut texts = Vec::new();
        for item in items {
            match &item.value {
                Value::Text(text) if !text.trim().is_empty() => texts.push(At {
                    value: text.clone(),
                    place: item.place.clone(),
                }),
                Value::Text(_) => self.faults.push(
                    &item.place,
                    format!("an item of {} is empty", self.name(field)),
                    "write something between the quotes, or remove the item",
                ),
                other => self.faults.push(
                    &item.place,
                    format!(
                        "an item of {} must be a text, not {}",
                        self.name(field),
                        other.kind()
                    ),
                    "put it in double quotes",
                ),
            }
        }
        Some(At {
            value: texts,
            place: node.place.clone(),
        })
    }

    /// Whether the field is a text, without reading it.
    pub fn is_text(&self, field: &str) -> bool {
        self.table
            .get(field)
            .is_some_and(|entry| entry.node.as_text().is_some())
    }

    /// The table inside this one called `field`.
    pub fn section(&self, field: &'static str) -> Option<Section<'a>> {
        self.asked.borrow_mut().push(field);
        let entry = self.table.get(field)?;
        let Value::Table(table) = &entry.node.value else {
            self.wrong_type_of_table(&self.name(field), &entry.node);
            return None;
        };
        Some(Section::new(
            self.faults,
            &self.name(field),
            entry.place.clone(),
            table,
        ))
    }

    /// All tables inside this one, whatever their names.
    pub fn sections(&self) -> Vec<(String, Section<'a>)> {
        let mut sections = Vec::new();
        for entry in &self.table.entries {
            let path = self.name(&entry.key);
            match &entry.node.value {
                Value::Table(table) => sections.push((
                    entry.key.clone(),
                    Section::new(self.faults, &path, entry.place.clone(), table),
                )),
                _ => self.wrong_type_of_table(&path, &entry.node),
            }
        }
        sections
    }

    fn wrong_type_of_table(&self, path: &str, node: &Node) {
        self.faults.push(
            &node.place,
            format!("{path} must be a table, not {}", node.value.kind()),
            format!("open it with a line [{path}]"),
        );
    }

    /// Reports every field that nobody asked for.
    pub fn finish(self) {
        let asked = self.asked.borrow();
        for entry in self
            .table
            .entries
            .iter()
            .filter(|entry| !asked.contains(&entry.key.as_str()))
        {
            let hint = match self.faults.is_full() {
                true => String::new(),
                false => did_you_mean(&entry.key, asked.iter().copied(), "the fields here are"),
            };
            let what = format!("unknown field {}", self.name(&entry.key));
            self.faults.push(&entry.place, what, hint);
        }
    }
}

/// Characters that a name may have for another to be suggested.
const LONGEST_NAME: usize = 64;

/// "did you mean …?" for the nearest candidate, or all candidates after `otherwise` when none is near.
pub(crate) fn did_you_mean<'a>(
    typed: &str,
    candidates: impl Iterator<Item = &'a str>,
    otherwise: &str,
) -> String {
    let mut candidates: Vec<&str> = candidates.collect();
    candidates.sort_unstable();
    candidates.dedup();
    // What is longer than any name is near none, and its distance would be long to compute.
    let is_short = typed.chars().nth(LONGEST_NAME).is_none();
    let nearest = candidates
        .iter()
        .filter(|_| is_short)
        .map(|candidate| (edit_distance(typed, candidate), *candidate))
        .min();
    match nearest {
        Some((distance, candidate)) if distance <= 1 + typed.chars().count() / 4 => {
            format!("did you mean {candidate}?")
        }
        _ => format!("{otherwise} {}", candidates.join(", ")),
    }
}

/// The least number of insertions, deletions, replacements and swaps of neighbours that lead from `a` to `b`
/// (optimal string alignment; Damerau 1964).
fn edit_distance(a: &str, b: &str) -> usize {
    let a: Vec<char> = a.to_lowercase().chars().collect();
    let b: Vec<char> = b.to_lowercase().chars().collect();
    let mut rows: Vec<Vec<usize>> = vec![(0..=b.len()).collect()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let replaced = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut least = replaced.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                least = least.min(rows[i - 2][j - 2] + 1);
            }
            row.push(least);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_edit_distance_counts_a_swap_of_neighbours_once() {
        assert_eq!(edit_distance("steps", "steps"), 0);
        assert_eq!(edit_distance("setps", "steps"), 1);
        assert_eq!(edit_distance("step", "steps"), 1);
        assert_eq!(edit_distance("", "abc"), 3);
        assert_eq!(edit_distance("kitten", "sitting"), 3);
    }

    #[test]
    fn of_very_many_faults_some_are_told_and_the_others_counted() {
        let faults = Faults::default();
        let place = Place::Argument("here".into());
        for number in 0..1_000_000 {
            faults.push(&place, number.to_string(), "none");
        }
        faults.push(&place, "x".repeat(1_000_000), "none");
        let lines = faults.into_lines();
        assert_eq!(lines.len(), MOST_FAULTS + 1);
        assert_eq!(lines[MOST_FAULTS], "and 999901 more faults");
        let one = Faults::default();
        one.push(&place, "x".repeat(1_000_000), "none");
        assert!(one.into_lines()[0].len() < 2 * MOST_CHARACTERS);
    }

    #[test]
    fn a_far_word_gets_the_whole_list() {
        let hint = did_you_mean(
            "colour",
            ["steps", "seed"].into_iter(),
            "the fields here are",
        );
        assert_eq!(hint, "the fields here are seed, steps");
    }
}
