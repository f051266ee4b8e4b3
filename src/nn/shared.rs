//! Frozen weights that several models of a process have in common. What one has loaded of a checkpoint's files, the next
//! takes, as long as one of them is there: see [`super::Weights::from_files`].

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};
use std::time::SystemTime;

use candle_core::{DType, Device, DeviceLocation, Tensor};

use super::precision::{HalfKind, HalfMatrix};
use super::weights::lock;
use crate::Result;

/// Loaded tensors of the same files on the same device, by name and type. They are never written to.
#[derive(Default)]
pub(super) struct Shared {
    tensors: Mutex<HashMap<(String, DType), Tensor>>,
    halves: Mutex<HashMap<(String, DType), HalfMatrix>>,
}

/// Which files, as they were when they were opened, on which device.
#[derive(PartialEq, Eq, Hash)]
struct Key {
    files: Vec<(PathBuf, u64, SystemTime)>,
    device: DeviceLocation,
}

/// All that is alive.
static ALIVE: Mutex<Option<HashMap<Key, Weak<Shared>>>> = Mutex::new(None);

impl Shared {
    /// What others have loaded of these `files`, or an empty one for them to come. A file that has been written since is
    /// another one.
    pub(super) fn of(files: &[PathBuf], device: &Device) -> Arc<Self> {
        let as_they_are = |path: &PathBuf| {
            let path: &Path = path;
            let metadata = std::fs::metadata(path).ok()?;
            let path = path.canonicalize().ok()?;
            Some((path, metadata.len(), metadata.modified().ok()?))
        };
        let Some(files) = files.iter().map(as_they_are).collect() else {
            return Arc::default();
        };
        let device = device.location();
        let mut alive = lock(&ALIVE);
        let alive = alive.get_or_insert_default();
        alive.retain(|_, shared| shared.strong_count() > 0);
        let entry = alive.entry(Key { files, device }).or_default();
        entry.upgrade().unwrap_or_else(|| {
            let new = Arc::default();
            *entry = Arc::downgrade(&new);
            new
        })
    }

    /// The tensor `name` in `dtype`; `load` is called by whoever needs it first.
    pub(super) fn tensor(
        &self,
        name: &str,
        dtype: DType,
        load: impl FnOnce() -> Result<Tensor>,
    ) -> Result<Tensor> {
        taken(&self.tensors, name, dtype, load)
    }

    /// The matrix `name` in half precision; `load` is called by whoever needs it first.
    pub(super) fn half(
        &self,
        name: &str,
        kind: HalfKind,
        load: impl FnOnce() -> Result<HalfMatrix>,
    ) -> Result<HalfMatrix> {
        taken(&self.halves, name, kind.dtype(), load)
    }
}

fn taken<T: Clone>(
    known: &Mutex<HashMap<(String, DType), T>>,
    name: &str,
    dtype: DType,
    load: impl FnOnce() -> Result<T>,
) -> Result<T> {
    // Held while it is loaded: a second copy would be the cost that is to be avoided.
    let mut known = lock(known);
    let key = (name.to_string(), dtype);
    if let Some(found) = known.get(&key) {
        return Ok(found.clone());
    }
    let loaded = load()?;
    known.insert(key, loaded.clone());
    Ok(loaded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_loaded_is_loaded_once_as_long_as_somebody_keeps_it_and_the_file_is_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let files = [dir.path().join("model.safetensors")];
        std::fs::write(&files[0], "one").unwrap();
        let of = || Shared::of(&files, &Device::Cpu);
        let (kept, other) = (of(), of());
        assert!(Arc::ptr_eq(&kept, &other));
        let ones = Tensor::ones((2, 2), DType::F32, &Device::Cpu).unwrap();
        let mut loads = 0;
        for kind in [HalfKind::Bf16, HalfKind::F16, HalfKind::Bf16] {
            let load = || {
                loads += 1;
                HalfMatrix::new(&ones, kind)
            };
            assert_eq!(other.half("w", kind, load).unwrap().kind(), kind);
        }
        assert_eq!(loads, 2);
        std::fs::write(&files[0], "another").unwrap();
        assert!(!Arc::ptr_eq(&kept, &of()));
    }
}
