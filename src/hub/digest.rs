//! Whether a file has the content that the hub publishes.

use std::io::{ErrorKind, Read};
use std::path::Path;

use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};

/// The digest that a hub publishes of a file, in hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Digest {
    /// Of the content: large files.
    Sha256(String),
    /// Git's of the content as a blob: small files.
    GitBlob(String),
}

impl Digest {
    /// The SHA-256 `text`; `None` when it is no such digest.
    pub fn sha256(text: &str) -> Option<Self> {
        is_hexadecimal(text, 64).then(|| Self::Sha256(text.to_ascii_lowercase()))
    }

    /// Git's `text`; `None` when it is no such digest.
    pub fn git_blob(text: &str) -> Option<Self> {
        is_hexadecimal(text, 40).then(|| Self::GitBlob(text.to_ascii_lowercase()))
    }

    /// Whether the file `path` has it.
    pub fn fits(&self, path: &Path) -> std::io::Result<bool> {
        let file = crate::files::open(path)?;
        let (mut context, expected) = match self {
            Self::Sha256(expected) => (Context::new(&SHA256), expected),
            Self::GitBlob(expected) => {
                let mut context = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
                context.update(format!("blob {}\0", file.metadata()?.len()).as_bytes());
                (context, expected)
            }
        };
        hash(file, &mut context)?;
        Ok(hexadecimal(context.finish().as_ref()) == *expected)
    }
}

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Sha256(digits) => write!(f, "SHA-256 {digits}"),
            Self::GitBlob(digits) => write!(f, "git blob {digits}"),
        }
    }
}

fn is_hexadecimal(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| b.is_ascii_hexdigit())
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn hash(mut file: std::fs::File, context: &mut Context) -> std::io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(read) => context.update(&buffer[..read]),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_sha256sum_and_git_hash_object() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, "hello\n").unwrap();
        let sha256 = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        let blob = "ce013625030ba8dba906f756967f9e9ca394464a";
        for (digest, other) in [
            (Digest::sha256(sha256), Digest::sha256(&"0".repeat(64))),
            (Digest::git_blob(blob), Digest::git_blob(&"0".repeat(40))),
        ] {
            assert!(digest.unwrap().fits(&file).unwrap());
            assert!(!other.unwrap().fits(&file).unwrap());
        }
        assert_eq!(Digest::sha256(blob), None);
        assert_eq!(Digest::git_blob("../../x"), None);
    }
}
