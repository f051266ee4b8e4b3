//! Which rows a table has, by the digests of their keys: kept in memory, brought up to date with every version.

use std::collections::{BTreeMap, HashMap, HashSet};

use lance::Dataset;
use lance::table::format::Fragment;

/// The digest of a key: what the index holds in place of the key itself.
pub(super) fn key_digest(key: &str) -> u128 {
    let mut short = [0; 16];
    short.copy_from_slice(&blake3::hash(key.as_bytes()).as_bytes()[..16]);
    u128::from_le_bytes(short)
}

/// Where the first row of each key lies in one version of the table.
#[derive(Default)]
pub(super) struct Index {
    /// Row id of each key's first row.
    rows: HashMap<u128, u64>,
    /// Address by row id, of first rows alone: the order in which rows were committed.
    pub(super) addresses: BTreeMap<u64, u64>,
    /// The fragments this was built from, each with how many of its rows are deleted.
    pub(super) fragments: BTreeMap<u64, usize>,
}

impl Index {
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    pub fn contains(&self, key: u128) -> bool {
        self.rows.contains_key(&key)
    }

    /// The address of the first row of `key`.
    pub fn address(&self, key: u128) -> Option<u64> {
        self.addresses.get(self.rows.get(&key)?).copied()
    }

    pub fn insert(&mut self, key: u128, id: u64, address: u64) {
        match self.rows.get(&key) {
            Some(first) if *first < id => return,
            Some(later) if *later > id => drop(self.addresses.remove(later)),
            // The same row, perhaps moved by compaction.
            _ => (),
        }
        self.rows.insert(key, id);
        self.addresses.insert(id, address);
    }

    /// Whether `dataset` lacks a row that this knows, when `present` are the rows of its fragments that this does not
    /// know.
    pub fn has_lost(&self, dataset: &Dataset, present: &HashSet<u64>) -> bool {
        let now = fragments_of(dataset);
        let fragments = self.fragments.iter();
        let changed = fragments.filter(|(id, deleted)| now.get(id) != Some(deleted));
        let changed: HashSet<u64> = changed.map(|(id, _)| *id).collect();
        // An append changes none: the usual case takes no time.
        let mut known = self.addresses.iter();
        !changed.is_empty()
            && known.any(|(id, address)| {
                let fragment = address >> 32;
                changed.contains(&fragment) && !present.contains(id)
            })
    }
}

/// The fragments of `dataset`, each with how many of its rows are deleted.
pub(super) fn fragments_of(dataset: &Dataset) -> BTreeMap<u64, usize> {
    let deleted = |fragment: &Fragment| {
        let file = fragment.deletion_file.as_ref();
        file.and_then(|file| file.num_deleted_rows).unwrap_or(0)
    };
    let fragments = dataset.fragments().iter();
    fragments.map(|f| (f.id, deleted(f))).collect()
}
