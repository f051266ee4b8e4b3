//! Claims: who works at what, between processes and between machines that share a disk.
//!
//! A claim is a lock of the operating system on an empty file below `locks/` in the store. It dies with its process,
//! however that ends, so nothing is ever left claimed. The files stay: removing one that another process is about to
//! lock would let two of them hold "the same" lock.
//!
//! The locks are those of `flock(2)`. Linux carries them to NFS servers as byte-range locks, and to Lustre, Ceph and
//! GPFS as they are mounted by default today; a disk without locks is refused by the first claim. On a mount that
//! keeps locks to its own machine (NFS with `local_lock`, most buckets mounted as folders), processes of one machine
//! may share a store, but not several machines.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::{Error, Result, files};

/// Between two attempts at a claim that another process has.
const RETRY: Duration = Duration::from_millis(100);

/// The claims of one store.
#[derive(Clone, Debug)]
pub struct Locks {
    dir: Arc<PathBuf>,
}

/// A claim that this process has, until the value is dropped.
#[derive(Debug)]
pub struct Claim {
    file: File,
    path: PathBuf,
}

impl Locks {
    /// The claims of the store in `store`.
    pub(super) fn new(store: &Path) -> Self {
        Self {
            dir: Arc::new(store.join("locks")),
        }
    }

    /// Claims `name`, such as `supervisor/5f3a`; `None` while another has it.
    ///
    /// Errors: a directory that cannot be written, a disk without locks.
    pub fn try_claim(&self, name: &str) -> Result<Option<Claim>> {
        let (file, path) = self.open(name)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Claim { file, path })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(e)) => Err(without_locks(&path, e)),
        }
    }

    /// Claims `name` as soon as nobody else has it.
    ///
    /// Errors: those of [`Locks::try_claim`].
    pub async fn claim(&self, name: &str) -> Result<Claim> {
        loop {
            if let Some(claim) = self.try_claim(name)? {
                return Ok(claim);
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Claims `name` for a moment's work: waits in the queue of the operating system, which takes no time to notice
    /// that its turn has come, but cannot be called off.
    pub(super) async fn turn(&self, name: &str) -> Result<Claim> {
        if let Some(claim) = self.try_claim(name)? {
            return Ok(claim);
        }
        let (file, path) = self.open(name)?;
        let waiting = tokio::task::spawn_blocking(move || match file.lock() {
            Ok(()) => Ok(Claim { file, path }),
            Err(e) => Err(without_locks(&path, e)),
        });
        waiting.await.map_err(|e| Error::Invalid {
            what: format!("waiting for a lock ended unexpectedly: {e}"),
            hint: None,
        })?
    }

    /// Those of `names` that somebody has claimed.
    ///
    /// Errors: those of [`Locks::try_claim`].
    pub fn claimed<'a>(&self, names: impl Iterator<Item = &'a String>) -> Result<usize> {
        let mut count = 0;
        for name in names {
            count += usize::from(self.dir.join(name).exists() && self.try_claim(name)?.is_none());
        }
        Ok(count)
    }

    /// What the last holder of `name` noted; empty if nothing.
    pub fn noted(&self, name: &str) -> String {
        crate::files::read_text(&self.dir.join(name), crate::files::SETTINGS).unwrap_or_default()
    }

    fn open(&self, name: &str) -> Result<(File, PathBuf)> {
        let path = self.dir.join(name);
        let mut options = File::options();
        // NFS gives exclusive locks on files that are open for writing alone.
        let options = options.create(true).truncate(false).write(true);
        let file = match options.open(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                files::create_dir(path.parent().unwrap_or(&self.dir))?;
                options.open(&path)
            }
            opened => opened,
        };
        Ok((file.map_err(Error::io(&path))?, path))
    }
}

impl Claim {
    /// Notes who holds it, for those who cannot have it.
    ///
    /// Errors: a full disk.
    pub fn note(&self, text: &str) -> Result<()> {
        use std::io::{Seek, Write};
        self.file.set_len(0).map_err(Error::io(&self.path))?;
        let mut file = &self.file;
        file.rewind()
            .and_then(|()| file.write_all(text.as_bytes()))
            .map_err(Error::io(&self.path))
    }
}

pub(super) fn without_locks(path: &Path, cause: std::io::Error) -> Error {
    Error::invalid(
        format!("{}: this disk gives no locks: {cause}", path.display()),
        "mount it with locks (NFS without nolock, Lustre with flock), or choose a store on another disk with --store",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_claim_is_exclusive_until_it_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let (locks, others) = (Locks::new(dir.path()), Locks::new(dir.path()));
        let names = ["shards/1".to_string(), "shards/2".to_string()];
        let claim = locks.try_claim(&names[0]).unwrap().unwrap();
        claim.note("a long text").unwrap();
        claim.note("host, process 7").unwrap();
        assert!(others.try_claim(&names[0]).unwrap().is_none());
        assert_eq!(others.noted(&names[0]), "host, process 7");
        assert_eq!(others.claimed(names.iter()).unwrap(), 1);
        let (turn, ()) = tokio::join!(others.turn(&names[0]), async { drop(claim) });
        assert!(locks.try_claim(&names[0]).unwrap().is_none());
        drop(turn.unwrap());
        assert_eq!(others.claimed(names.iter()).unwrap(), 0);
    }
}
