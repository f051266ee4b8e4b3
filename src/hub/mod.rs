//! Checkpoints by name: what is published where, what of it is already on this machine, and how the rest arrives.

pub mod catalogue;
mod client;
mod digest;
mod download;
mod names;
pub mod parts;
mod progress;
mod published;
mod settings;
mod snapshot;

pub use download::{download, download_repository, drop_damaged};
pub use names::is_file_name;
pub use published::{ByHand, Found, Presence, Published, Repository, Wanted, gather, shard_names};
pub use settings::Settings;
pub use snapshot::{RepoId, Snapshot};

/// The files that would be fetched of a repository of which the hub says `answer`; `None` when no hub says that.
pub fn wanted_of(answer: &[u8]) -> Option<Vec<String>> {
    let listing = client::listing(answer).ok()?;
    let listed: Vec<String> = listing.into_keys().collect();
    Some(snapshot::choose(&listed))
}

/// A size in words: `3.1 GB`, in powers of a thousand.
pub fn human_bytes(bytes: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB"];
    let mut size = bytes as f64;
    let mut unit = 0;
    while size >= 999.5 && unit + 1 < units.len() {
        size /= 1000.0;
        unit += 1;
    }
    if unit == 0 || size >= 99.95 {
        format!("{size:.0} {}", units[unit])
    } else {
        format!("{size:.1} {}", units[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::human_bytes;

    #[test]
    fn sizes_are_written_with_two_or_three_digits() {
        let sizes = [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 kB"),
            (99_940, "99.9 kB"),
            (999_600, "1.0 MB"),
            (3_110_000_000, "3.1 GB"),
            (123_000_000_000, "123 GB"),
        ];
        for (bytes, text) in sizes {
            assert_eq!(human_bytes(bytes), text);
        }
    }
}
