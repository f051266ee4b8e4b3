//! The little that a self-contained page needs: escaping, base64, the style sheet.

/// `text` for use between tags and in quoted attributes.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}

/// Standard base64 with padding (RFC 4648).
pub(super) fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let byte = |i: usize| u32::from(chunk.get(i).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for place in 0..4 {
            if place > chunk.len() {
                text.push('=');
            } else {
                let index = bits >> (18 - 6 * place) & 63;
                text.push(char::from(ALPHABET[index as usize]));
            }
        }
    }
    text
}

/// The page's looks, light and dark.
pub(super) const STYLE: &str = r#"
:root { color-scheme: light dark;
  --paper: #ffffff; --panel: #f6f7f9; --ink: #1c1e26; --faint: #646a78; --rule: #dfe2e8; --best: #0b6b3a; --warn: #8a5a00;
  --c0: #2563c9; --c1: #d2601a; --c2: #16876b; --c3: #a33b8f; --c4: #8a7a00; --c5: #5b6270; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14161b; --panel: #1c1f26; --ink: #e6e8ee; --faint: #9aa1b0; --rule: #2f343e; --best: #5fce94; --warn: #e0b050;
  --c0: #7aa9ff; --c1: #ff9d5c; --c2: #4fd0ab; --c3: #e58ad3; --c4: #d8c84a; --c5: #aab1c0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 75rem; margin: 0 auto; padding: 3rem 1.5rem 5rem; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 0.4rem; }
h2 { font-size: 1.2rem; margin: 3rem 0 0.8rem; padding-bottom: 0.35rem; border-bottom: 1px solid var(--rule); }
p { max-width: 48rem; margin: 0.6rem 0; }
.lead { font-size: 1.08rem; color: var(--faint); }
.note { font-size: 0.875rem; color: var(--faint); }
dl.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 0.9rem 1.6rem; margin: 1.6rem 0 0; }
dl.facts dt { font-size: 0.8rem; color: var(--faint); }
dl.facts dd { margin: 0; font-weight: 550; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
table.scores { font-size: 1.05rem; }
th, td { text-align: left; padding: 0.4rem 1.6rem 0.4rem 0; border-bottom: 1px solid var(--rule); white-space: nowrap; vertical-align: baseline; }
thead th { font-size: 0.85rem; font-weight: 600; color: var(--faint); border-bottom-color: var(--faint); }
td.n, th.n { text-align: right; }
table.dense { font-size: 0.85rem; } table.dense th, table.dense td { padding-right: 0.8rem; }
table.dense td:first-child { min-width: 14rem; white-space: normal; }
table.dense .first { padding-left: 0.8rem; border-left: 1px solid var(--rule); }
td.wrap { white-space: normal; overflow-wrap: anywhere; }
tbody th { font-weight: 550; }
td.best { color: var(--best); font-weight: 650; }
small { color: var(--faint); font-weight: 400; }
img.sheet { display: block; max-width: 100%; height: auto; border: 1px solid var(--rule); border-radius: 6px; background: #fff; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(28rem, 100%), 1fr)); gap: 1.2rem; }
figure.chart { margin: 0; padding: 0.9rem 1rem 0.8rem; background: var(--panel); border-radius: 8px; }
figure.chart figcaption { font-weight: 600; font-size: 0.95rem; margin-bottom: 0.5rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 12px; fill: var(--faint); font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg path { fill: none; stroke-linejoin: round; stroke-linecap: round; }
svg .line { stroke-width: 2; } svg .raw { stroke-width: 1; opacity: 0.3; }
path.s0 { stroke: var(--c0); } path.s1 { stroke: var(--c1); } path.s2 { stroke: var(--c2); }
path.s3 { stroke: var(--c3); } path.s4 { stroke: var(--c4); } path.s5 { stroke: var(--c5); }
circle.s0 { fill: var(--c0); } circle.s1 { fill: var(--c1); } circle.s2 { fill: var(--c2); }
circle.s3 { fill: var(--c3); } circle.s4 { fill: var(--c4); } circle.s5 { fill: var(--c5); }
ul.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; padding: 0; margin: 0.5rem 0 0; font-size: 0.85rem; color: var(--faint); }
ul.legend i { display: inline-block; width: 1rem; height: 3px; border-radius: 2px; margin-right: 0.45rem; vertical-align: middle; }
i.s0 { background: var(--c0); } i.s1 { background: var(--c1); } i.s2 { background: var(--c2); }
i.s3 { background: var(--c3); } i.s4 { background: var(--c4); } i.s5 { background: var(--c5); }
ul.warnings { margin: 0.6rem 0; padding: 0.8rem 1rem 0.8rem 2rem; background: var(--panel); border-left: 3px solid var(--warn); border-radius: 4px; }
details { margin: 0.8rem 0; } summary { cursor: pointer; font-weight: 550; }
pre { background: var(--panel); border-radius: 8px; padding: 1rem; overflow-x: auto; font: 0.85rem/1.5 ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace; }
code { font: 0.875em ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace; }
@media print { main { padding: 0; } h2 { break-after: avoid; } figure, tr { break-inside: avoid; } }
"#;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_has_the_vectors_of_rfc_4648() {
        for (plain, coded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }

    #[test]
    fn markup_is_escaped() {
        assert_eq!(
            escape("<a href=\"x\">'&'</a>"),
            "&lt;a href=&quot;x&quot;&gt;&#39;&amp;&#39;&lt;/a&gt;"
        );
    }
}
