//! The part of YAML in which Meta's `vqgan.yaml` is written: nested maps by indentation, lists of scalars in either
//! style, plain and quoted scalars, comments. Anchors, multi-line texts and lists of maps are refused.

use serde_json::{Map, Value};

/// A line that says something: its number from 1, its indentation, and what it says.
struct Line<'a> {
    number: usize,
    indent: usize,
    text: &'a str,
}

/// Reads `text`.
///
/// # Errors
/// The number of the first line that is not understood, with the reason.
pub fn parse(text: &str) -> Result<Value, String> {
    let lines: Vec<Line> = text
        .lines()
        .enumerate()
        .map(|(index, line)| {
            let said = without_comment(line).trim_end();
            let text = said.trim_start_matches(' ');
            Line {
                number: index + 1,
                indent: said.len() - text.len(),
                text,
            }
        })
        .filter(|line| !line.text.is_empty() && line.text != "---")
        .collect();
    let mut rest = lines.as_slice();
    let value = block(&mut rest)?;
    match rest.first() {
        None => Ok(value),
        Some(line) => Err(format!(
            "line {}: its indentation fits nothing",
            line.number
        )),
    }
}

/// `line` up to a `#` at its start or after a space, outside quotes.
fn without_comment(line: &str) -> &str {
    let mut quote = None;
    let mut before = ' ';
    for (at, c) in line.char_indices() {
        match (quote, c) {
            (None, '\'' | '"') => quote = Some(c),
            (Some(open), c) if c == open => quote = None,
            (None, '#') if before == ' ' => return &line[..at],
            _ => {}
        }
        before = c;
    }
    line
}

/// The map or list that starts with the first line.
fn block(lines: &mut &[Line]) -> Result<Value, String> {
    let Some(first) = lines.first() else {
        return Ok(Value::Null);
    };
    let indent = first.indent;
    if item(first.text).is_some() {
        return list(lines, indent);
    }
    let mut map = Map::new();
    while let Some(line) = lines.first().filter(|line| line.indent == indent) {
        let number = line.number;
        let (key, value) = line
            .text
            .split_once(':')
            .filter(|(_, value)| value.is_empty() || value.starts_with(' '))
            .ok_or_else(|| format!("line {number}: \"key: value\" expected"))?;
        *lines = &lines[1..];
        let value = match (value.trim(), lines.first()) {
            ("", Some(next)) if next.indent > indent => block(lines)?,
            // A list may stand as far left as its key.
            ("", Some(next)) if next.indent == indent && item(next.text).is_some() => {
                list(lines, indent)?
            }
            ("", _) => Value::Null,
            (value, _) => scalar(value).map_err(|e| format!("line {number}: {e}"))?,
        };
        if map
            .insert(unquoted(key.trim()).to_string(), value)
            .is_some()
        {
            return Err(format!("line {number}: {} stands there twice", key.trim()));
        }
    }
    Ok(Value::Object(map))
}

fn list(lines: &mut &[Line], indent: usize) -> Result<Value, String> {
    let mut values = Vec::new();
    while let Some(line) = lines.first().filter(|line| line.indent == indent) {
        let Some(text) = item(line.text) else {
            break;
        };
        values.push(scalar(text).map_err(|e| format!("line {}: {e}", line.number))?);
        *lines = &lines[1..];
    }
    Ok(Value::Array(values))
}

/// What follows the dash of a list's item.
fn item(text: &str) -> Option<&str> {
    text.strip_prefix("- ").map(str::trim)
}

fn scalar(text: &str) -> Result<Value, String> {
    if let Some(inside) = text.strip_prefix('[') {
        let inside = inside
            .strip_suffix(']')
            .ok_or("a list that does not end on its line")?;
        let parts = inside.split(',').map(str::trim);
        return parts.filter(|part| !part.is_empty()).map(scalar).collect();
    }
    if text.starts_with(['{', '&', '*', '|', '>', '!']) || text.contains(": ") {
        return Err(format!(
            "{text:?} is not a number, a word or a list of these"
        ));
    }
    let plain = unquoted(text);
    if plain.len() < text.len() {
        return Ok(plain.into());
    }
    Ok(match text {
        "true" | "True" => true.into(),
        "false" | "False" => false.into(),
        "null" | "~" => Value::Null,
        _ => match (text.parse::<i64>(), text.parse::<f64>()) {
            (Ok(number), _) => number.into(),
            (_, Ok(number)) if number.is_finite() => number.into(),
            _ => text.into(),
        },
    })
}

fn unquoted(text: &str) -> &str {
    ['\'', '"']
        .iter()
        .find_map(|&quote| text.strip_prefix(quote)?.strip_suffix(quote))
        .unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn both_list_styles_comments_and_quotes_are_read() {
        let text = "model:\n  base_learning_rate: 4.5e-06  # per image\n  target: taming.models.vqgan.VQModel\n  \
                    params:\n    embed_dim: 256\n    ddconfig:\n      attn_resolutions: []\n      ch_mult:\n      \
                    - 1\n      - 2\n      wide: [ 16, 32 ]\n      double_z: false\n    name: 'a # b'\n    empty:\n";
        let expected = json!({"model": {
            "base_learning_rate": 4.5e-6,
            "target": "taming.models.vqgan.VQModel",
            "params": {
                "embed_dim": 256,
                "ddconfig": {"attn_resolutions": [], "ch_mult": [1, 2], "wide": [16, 32], "double_z": false},
                "name": "a # b",
                "empty": null
            }
        }});
        assert_eq!(parse(text).unwrap(), expected);
        let indented = parse("a:\n    - 1\n    - x\nb: {\n").unwrap_err();
        assert!(indented.starts_with("line 4"), "{indented}");
        assert_eq!(
            parse("a:\n    - 1\n    - x\n").unwrap(),
            json!({"a": [1, "x"]})
        );
    }

    #[test]
    fn what_is_not_understood_is_named_by_its_line() {
        for (text, line) in [
            ("a: 1\n   b: 2\n", 2),
            ("a: 1\nb\n", 2),
            ("a: 1\na: 2\n", 2),
            ("a:\n  - b: 1\n", 2),
            ("a: [1,\n", 1),
            ("# nothing\na: *ref\n", 2),
        ] {
            let error = parse(text).unwrap_err();
            assert!(
                error.starts_with(&format!("line {line}")),
                "{text:?}: {error}"
            );
        }
    }
}
