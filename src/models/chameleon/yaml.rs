//! The part of YAML in which Meta's `vqgan.yaml` is written, and PyYAML's other ways to write the same: nested maps by
//! indentation, maps and lists in brackets over any number of lines, lists by dashes, plain and quoted scalars,
//! comments. Anchors, multi-line texts and lists of maps by indentation are refused.

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
    if first.text.starts_with(['{', '[']) {
        let (number, text) = (first.number, first.text);
        *lines = &lines[1..];
        return value_of(text, number, lines);
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
            (value, _) => value_of(value, number, lines)?,
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
        let number = line.number;
        *lines = &lines[1..];
        values.push(value_of(text, number, lines)?);
    }
    Ok(Value::Array(values))
}

/// What follows the dash of a list's item.
fn item(text: &str) -> Option<&str> {
    text.strip_prefix("- ").map(str::trim)
}

/// The value that `text`, from line `number`, is or opens; `lines` are those after it.
fn value_of(text: &str, number: usize, lines: &mut &[Line]) -> Result<Value, String> {
    if !text.starts_with(['{', '[']) {
        return scalar(text).map_err(|e| format!("line {number}: {e}"));
    }
    let mut whole = text.to_string();
    while !is_closed(&whole) {
        let Some(line) = lines.first() else {
            return Err(format!("line {number}: a bracket that does not close"));
        };
        whole = format!("{whole} {}", line.text);
        *lines = &lines[1..];
    }
    let mut rest = whole.as_str();
    let value = flow(&mut rest).map_err(|e| format!("line {number}: {e}"))?;
    match rest.trim() {
        "" => Ok(value),
        more => Err(format!("line {number}: {more:?} after a bracket")),
    }
}

/// The characters of `text` outside quotes, with their places.
fn outside_quotes(text: &str) -> impl Iterator<Item = (usize, char)> {
    let mut quote = None;
    // A quote opens only where a scalar starts.
    let mut before = ' ';
    text.char_indices().filter(move |&(_, c)| {
        let starts = matches!(before, ' ' | ',' | '[' | '{');
        before = c;
        match (quote, c) {
            (None, '\'' | '"') if starts => quote = Some(c),
            (Some(open), c) if c == open => quote = None,
            (None, _) => return true,
            _ => {}
        }
        false
    })
}

/// Whether every bracket of `text` is closed.
fn is_closed(text: &str) -> bool {
    let depth = outside_quotes(text).fold(0, |depth, (_, c)| match c {
        '[' | '{' => depth + 1,
        ']' | '}' => depth - 1,
        _ => depth,
    });
    depth <= 0
}

/// The map, list or scalar at the start of `rest`, inside brackets or opening them.
fn flow(rest: &mut &str) -> Result<Value, String> {
    *rest = rest.trim_start();
    if let Some(inside) = rest.strip_prefix('[') {
        *rest = inside;
        let mut values = Vec::new();
        while !ends(rest, ']')? {
            values.push(flow(rest)?);
            separated(rest, ']')?;
        }
        return Ok(Value::Array(values));
    }
    if let Some(inside) = rest.strip_prefix('{') {
        *rest = inside;
        let mut map = Map::new();
        while !ends(rest, '}')? {
            let key = unquoted(token(rest)).to_string();
            *rest = rest.trim_start();
            let value = match rest.strip_prefix(':') {
                Some(after) => {
                    *rest = after;
                    flow(rest)?
                }
                None => Value::Null,
            };
            if map.insert(key.clone(), value).is_some() {
                return Err(format!("{key} stands there twice"));
            }
            separated(rest, '}')?;
        }
        return Ok(Value::Object(map));
    }
    match token(rest) {
        "" => Ok(Value::Null),
        text => scalar(text),
    }
}

/// Whether the bracket closes here, which is then passed.
fn ends(rest: &mut &str, bracket: char) -> Result<bool, String> {
    *rest = rest.trim_start();
    if rest.is_empty() {
        return Err(format!("{bracket:?} expected"));
    }
    let after = rest.strip_prefix(bracket);
    *rest = after.unwrap_or(rest);
    Ok(after.is_some())
}

/// Passes the comma after a value; before the closing bracket there may be none.
fn separated(rest: &mut &str, bracket: char) -> Result<(), String> {
    *rest = rest.trim_start();
    match rest.strip_prefix(',') {
        Some(after) => *rest = after,
        None if rest.starts_with(bracket) => {}
        None => return Err(format!("{rest:?} where \",\" or {bracket:?} is expected")),
    }
    Ok(())
}

/// The scalar or key at the start of `rest`, quotes included.
fn token<'a>(rest: &mut &'a str) -> &'a str {
    *rest = rest.trim_start();
    let text = *rest;
    let ends = |&(at, c): &(usize, char)| match c {
        ',' | ']' | '}' => true,
        ':' => text[at + 1..].starts_with([' ', ',', ']', '}']),
        _ => false,
    };
    let end = outside_quotes(text)
        .find(ends)
        .map_or(text.len(), |(at, _)| at);
    let (token, after) = text.split_at(end);
    *rest = after;
    token.trim_end()
}

fn scalar(text: &str) -> Result<Value, String> {
    let plain = unquoted(text);
    if plain.len() < text.len() {
        return Ok(plain.into());
    }
    if text.starts_with(['[', '{', '&', '*', '|', '>', '!']) || text.contains(": ") {
        return Err(format!(
            "{text:?} is not a number, a word or a list of these"
        ));
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
        let indented = parse("a:\n    - 1\n    - x\nb: {\n\n").unwrap_err();
        assert!(indented.starts_with("line 4"), "{indented}");
        assert_eq!(
            parse("a:\n    - 1\n    - x\n").unwrap(),
            json!({"a": [1, "x"]})
        );
    }

    #[test]
    fn maps_and_lists_in_brackets_are_read_as_pyyaml_writes_them() {
        // yaml.safe_dump(…, default_flow_style=None) and True, at its width of 80.
        let leaves = "lossconfig:\n  params: {disc_conditional: false, disc_in_channels: 3, disc_num_layers: 2, disc_start: 1,\n    \
                      disc_weight: 0.8, name: 'a: {b', perceptual_weight: null}\n  target: x.Loss\nempty: {}\n";
        let params = json!({
            "disc_conditional": false, "disc_in_channels": 3, "disc_num_layers": 2, "disc_start": 1,
            "disc_weight": 0.8, "name": "a: {b", "perceptual_weight": null
        });
        let expected = json!({"lossconfig": {"params": params, "target": "x.Loss"}, "empty": {}});
        assert_eq!(parse(leaves).unwrap(), expected);
        let whole = "{model: {params: {ddconfig: {attn_resolutions: [], ch_mult: [1, 1,\n        2], resolution: 512},\n      \
                     embed_dim: 256}, target: taming.VQModel}, z's: [[a, b], {c: -1.5e-3}]}\n";
        let expected = json!({
            "model": {
                "params": {
                    "ddconfig": {"attn_resolutions": [], "ch_mult": [1, 1, 2], "resolution": 512},
                    "embed_dim": 256
                },
                "target": "taming.VQModel"
            },
            "z's": [["a", "b"], {"c": -1.5e-3}]
        });
        assert_eq!(parse(whole).unwrap(), expected);
    }

    #[test]
    fn what_is_not_understood_is_named_by_its_line() {
        for (text, line) in [
            ("a: 1\n   b: 2\n", 2),
            ("a: 1\nb\n", 2),
            ("a: 1\na: 2\n", 2),
            ("a:\n  - b: 1\n", 2),
            ("a: [1,\n", 1),
            ("a: {b: 1, b: 2}\n", 1),
            ("a: {b: *ref}\n", 1),
            ("a: 1\nb: [1] 2\n", 2),
            ("a: [1}\n", 1),
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
