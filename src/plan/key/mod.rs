//! Keys: digests that say what made something. Work is addressed by them, so that nothing is made twice and an edited
//! setting never finds old results.
//!
//! What a store holds took days, and a key that changes by accident orphans it. Therefore:
//!
//! - Every field of a key is written here by hand, under a name and in a spelling of its own. What a field, a type or a
//!   choice is called elsewhere in the program, or in a pipeline file, has no part in it.
//! - `settings` takes structs of settings apart whole, without `..`: a new field does not compile before it is decided
//!   whether it goes into keys.
//! - A field that a version did not have from its beginning is written with [`Digest::added`], only where it differs
//!   from what was done before there was such a field. A new option that nobody uses changes no key.
//! - A kind of key has versions, which [`Versions`] holds, the newest first. Things are made under the newest and found
//!   under every one. A new version is for things that are made in another way although their settings are the same;
//!   it stands in front of the kind's list, and the function that writes the key branches where the versions differ.
//!   A version whose results are wrong, not merely different, is struck from the list: they are made again.
//! - `tests/keys.rs` has a value of every key, and a store that version 1 made.

mod checkpoint;
mod kinds;
mod settings;

pub use checkpoint::checkpoint_digest;
pub(super) use kinds::plan_digest;
pub use kinds::{
    Sampled, captioned_photos_digest, drawing_key, evaluators_key, photos_digest, proxy_keys,
    reference_key, sample_keys, settings_digest, source_key, student_key, supervisor_keys,
    tokens_key,
};

/// Digests named fields. Names and values are preceded by their lengths, so that no two lists of fields look alike.
#[derive(Debug, Clone)]
pub struct Digest(blake3::Hasher);

impl Digest {
    /// A digest of a thing of this kind, which is a name with a version.
    pub fn new(kind: &str) -> Self {
        Digest(blake3::Hasher::new())
            .part(b"proxytune")
            .part(kind.as_bytes())
    }

    /// Adds a field.
    pub fn field(self, name: &str, value: impl AsRef<[u8]>) -> Self {
        self.part(name.as_bytes()).part(value.as_ref())
    }

    /// Adds a whole number.
    pub fn number(self, name: &str, value: u64) -> Self {
        self.field(name, value.to_le_bytes())
    }

    /// Adds a number of any kind, by its bits. Both zeros are one.
    pub fn real(self, name: &str, value: f64) -> Self {
        self.number(name, (value + 0.0).to_bits())
    }

    /// Adds yes or no.
    pub fn flag(self, name: &str, value: bool) -> Self {
        self.field(name, if value { "yes" } else { "no" })
    }

    /// Adds texts in their order.
    pub fn list<T: AsRef<[u8]>>(self, name: &str, values: &[T]) -> Self {
        let digest = self.number(name, values.len() as u64);
        let each = values.iter();
        each.fold(digest, |digest, value| digest.field("", value))
    }

    /// Adds what `write` writes, unless `value` is `before`: what was done before there was such a field.
    pub fn added<T: PartialEq>(
        self,
        value: &T,
        before: &T,
        write: impl FnOnce(Self, &T) -> Self,
    ) -> Self {
        match value == before {
            true => self,
            false => write(self, value),
        }
    }

    /// The digest in hex, 64 characters.
    pub fn finish(&self) -> String {
        self.0.finalize().to_hex().to_string()
    }

    fn part(mut self, bytes: &[u8]) -> Self {
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
        self
    }
}

/// The keys of one thing in every version of its kind that is known, the newest first; at least one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Versions<K> {
    newest: K,
    older: Vec<K>,
}

impl<K> Versions<K> {
    /// `newest`, and those that are looked for too, the newest of them first.
    pub fn new(newest: K, older: Vec<K>) -> Self {
        Self { newest, older }
    }

    /// What is made now is made under this one.
    pub fn newest(&self) -> &K {
        &self.newest
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = &K> {
        std::iter::once(&self.newest).chain(&self.older)
    }

    /// The newest under which it `is_there`; where it is under none, the newest of all.
    pub fn found(&self, is_there: impl Fn(&K) -> bool) -> &K {
        let found = self.all().find(|key| is_there(key));
        found.unwrap_or(&self.newest)
    }
}
