//! The room on the store's disk: estimated before proxies are made, watched while they are.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::store::ProxyRow;
use crate::stream::Meter;
use crate::{Error, Result};

/// What a row takes beside its picture: keys, prompt, settings; in bytes, before Lance compresses it.
const ROW_BYTES: u64 = 512;
/// A PNG of a drawn or photographed scene, in bytes for each pixel: two thirds of the pixels' own size.
const PIXEL_BYTES: u64 = 2;
/// From this many rows on, their mean size stands for the others'.
const ENOUGH_ROWS: u64 = 64;

/// How much room there is at a path, in bytes.
pub type FreeSpace = fn(&Path) -> Result<u64>;

/// Watches the disk of a store. Clones share what they have seen.
#[derive(Clone)]
pub struct Disk {
    store: PathBuf,
    keep_free: u64,
    free_space: FreeSpace,
    /// Counts what all processes have made.
    fleet: Meter,
    /// Rows that this process has written, and their bytes.
    written: Arc<Mutex<(u64, u64)>>,
}

impl Disk {
    /// The disk of `store`, of which `keep_free` bytes are to stay free. `fleet` counts the proxies that are in the
    /// store, of those that are to come.
    pub fn new(store: &Path, keep_free: u64, free_space: FreeSpace, fleet: Meter) -> Self {
        Self {
            store: store.to_path_buf(),
            keep_free,
            free_space,
            fleet,
            written: Arc::default(),
        }
    }

    /// Bytes that `proxies` pictures with `side` pixels squared will take, about.
    pub fn estimate(proxies: u64, side: u64) -> u64 {
        with_versions(proxies * (side * side * PIXEL_BYTES + ROW_BYTES))
    }

    /// The room that may be used, in bytes.
    ///
    /// # Errors
    /// When the disk does not tell, or there is none.
    pub fn usable(&self) -> Result<u64> {
        let free = (self.free_space)(&self.store)?;
        free.checked_sub(self.keep_free).ok_or_else(|| {
            Error::invalid(
                format!(
                    "the disk of {} has {} left, and {} are to stay free",
                    self.store.display(),
                    bytes(free),
                    bytes(self.keep_free)
                ),
                "free some space and run the same command again: it continues where it stopped; or lower --keep-free",
            )
        })
    }

    /// Looks at the disk after `rows` were committed.
    ///
    /// # Errors
    /// When too little is left, or what is left to be made surely does not fit, by the size of what was made.
    pub fn after_commit(&self, rows: &[ProxyRow]) -> Result<()> {
        let usable = self.usable()?;
        let (count, size) = {
            let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
            written.0 += rows.len() as u64;
            written.1 += rows
                .iter()
                .map(|row| row.image.len() as u64 + ROW_BYTES)
                .sum::<u64>();
            *written
        };
        if count < ENOUGH_ROWS {
            return Ok(());
        }
        let (done, total) = self.fleet.progress();
        let left = total.saturating_sub(done);
        let needed = with_versions(left * (size / count));
        if needed <= usable {
            return Ok(());
        }
        Err(Error::invalid(
            format!(
                "{left} more proxies need about {}, but {} has room for {}",
                bytes(needed),
                self.store.display(),
                bytes(usable)
            ),
            "free some space and run the same command again: it continues where it stopped; or lower --count",
        ))
    }
}

/// Compaction rewrites what is small, and older versions stay for a while.
fn with_versions(bytes: u64) -> u64 {
    bytes + bytes / 4
}

/// "3.2 GiB".
pub fn bytes(count: u64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{count} bytes"),
        _ => format!("{value:.1} {}", units[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(size: usize) -> ProxyRow {
        ProxyRow {
            key: String::new(),
            supervisor: String::new(),
            run: String::new(),
            subject: String::new(),
            class: String::new(),
            token: String::new(),
            number: 0,
            prompt: String::new(),
            seed: 0,
            settings: String::new(),
            width: 1,
            height: 1,
            image: vec![0; size],
            content: String::new(),
            created_us: 0,
        }
    }

    #[test]
    fn what_does_not_fit_is_known_after_the_first_rows_and_a_full_disk_at_once() {
        let fleet = crate::stream::Board::default().meter("all shards", "proxies");
        let disk = Disk::new(Path::new("store"), 1 << 20, |_| Ok(2 << 20), fleet.clone());
        assert_eq!(disk.usable().unwrap(), 1 << 20);
        // Rows of 1 KiB: 819 of them, with the room for versions, are just below 1 MiB.
        let rows = vec![row(512); 64];
        fleet.expect(881);
        fleet.add(62);
        disk.after_commit(&rows).unwrap();
        fleet.expect(882);
        let error = disk.after_commit(&rows).unwrap_err();
        let text = error.to_string();
        assert!(
            text.starts_with("820 more proxies need about 1.0 MiB"),
            "{text}"
        );
        assert!(error.hint().is_some());
        let full = Disk::new(Path::new("store"), 1 << 30, |_| Ok(3 << 20), fleet);
        let text = full.after_commit(&[]).unwrap_err().to_string();
        assert_eq!(
            text,
            "the disk of store has 3.0 MiB left, and 1.0 GiB are to stay free"
        );
    }
}
