//! Names that others give: hubs, mirrors and indexes of shards. They become paths here, so they are accepted only in the
//! form in which we ourselves would write them.

/// As long as names of files may be on the usual disks, in bytes.
const LONGEST_NAME: usize = 255;
/// As long as paths in repositories are at the most, in bytes.
const LONGEST_PATH: usize = 1024;
/// The longest digest that names a blob or a commit has 128 hexadecimal digits.
const LONGEST_ID: usize = 128;

/// Whether `name` is a name of one file: no separator of any system, no drive, no parent, nothing that a URL or a
/// terminal would take for more than text.
pub fn is_file_name(name: &str) -> bool {
    let allowed = |c: char| c.is_alphanumeric() || " -_.+=@()[],~".contains(c);
    (1..=LONGEST_NAME).contains(&name.len())
        && name.chars().all(allowed)
        && !name.chars().all(|c| c == '.')
        && !name.starts_with(' ')
        && !name.ends_with([' ', '.'])
}

/// Whether `path` leads from a repository's root to one of its files: names of files with single slashes between.
pub fn is_repository_path(path: &str) -> bool {
    path.len() <= LONGEST_PATH && path.split('/').all(is_file_name)
}

/// Whether `id` may name a blob or a commit, as digests do.
pub fn is_id(id: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-_".contains(&b);
    (1..=LONGEST_ID).contains(&id.len()) && id.bytes().all(allowed)
}

/// Whether `revision` may be that of a repository: a branch, a tag, a commit, `refs/pr/3`.
pub fn is_revision(revision: &str) -> bool {
    let is_part = |part: &str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.+".contains(c);
        is_file_name(part) && !part.starts_with('.') && part.chars().all(allowed)
    };
    revision.len() <= LONGEST_NAME && revision.split('/').all(is_part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_names_of_files_are_accepted() {
        for name in [
            "model.safetensors",
            "model-00001-of-00002.safetensors",
            "consolidated.00.pth",
            ".gitattributes",
            "notes (final) v1.0+a=b.txt",
            "größe.json",
        ] {
            assert!(is_file_name(name) && is_repository_path(name), "{name:?}");
        }
        assert!(is_repository_path("text_encoder_2/config.json"));
        let long = "x".repeat(256);
        let deep = ["x"; 600].join("/");
        for path in [
            "",
            ".",
            "..",
            "...",
            "/etc/passwd",
            "../x",
            "a/../x",
            "a/..",
            "a//b",
            "a/",
            "/",
            "./a",
            "a/./b",
            "a\\b",
            "..\\x",
            "C:x",
            "C:\\x",
            "a?b",
            "a#b",
            "a%2e%2e",
            "a\0b",
            "a\nb",
            "a\x1b[2Jb",
            "a\u{202e}b",
            " a",
            "a ",
            "a.",
            "a*b",
            "a|b",
            "a\"b",
            "<a>",
            &long,
            &deep,
        ] {
            assert!(!is_repository_path(path), "{path:?}");
        }
        assert!(!is_file_name("folder/name"));
    }

    #[test]
    fn blobs_commits_and_revisions_lead_nowhere_else() {
        assert!(is_id(&"0a".repeat(32)) && is_id("6a3f-1b"));
        for id in [
            "",
            ".",
            "..",
            "../x",
            "a/b",
            "a.b",
            "a\\b",
            "a b",
            &"0".repeat(129),
        ] {
            assert!(!is_id(id), "{id:?}");
        }
        for revision in ["main", "v1.0", "refs/pr/3", "0123abc"] {
            assert!(is_revision(revision), "{revision:?}");
        }
        for revision in [
            "", "..", "../../x", "/x", "a/../b", "a/", "a?b", "a b", ".hidden",
        ] {
            assert!(!is_revision(revision), "{revision:?}");
        }
    }
}
