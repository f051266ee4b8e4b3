//! Reading what others may have put there: only regular files are opened, and no more is read than a file of its kind
//! may hold.

use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result};
use std::path::Path;

/// The most bytes of settings and texts that programs write (configs, resolved pipelines, states): 8 MiB. The largest that
/// people publish have a tenth of that, and as JSON in memory it stays below 1 GiB whatever it says.
pub const SETTINGS: u64 = 8 << 20;

/// The most bytes of what grows with what it lists (tokenizers, `metadata.jsonl`, logs of runs): 64 MiB, twice the
/// largest tokenizer on the hub.
pub const LISTS: u64 = 64 << 20;

/// The most bytes of tensors that are read into memory as a whole, such as adapters: 8 GiB.
pub const TENSORS: u64 = 8 << 30;

/// Opens the file at `path` for reading, through links.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for a named pipe, a socket or a device, [`ErrorKind::IsADirectory`] for a folder, without
/// waiting for anyone at its other end; and those of the disk. What counts is what was opened, so nothing can take the
/// file's place between the question and the reading.
pub fn open(path: &Path) -> Result<File> {
    let mut options = File::options();
    options.read(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        // A pipe that nobody writes to opens at once, and a terminal does not become this process's own.
        options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    }
    let file = options.open(path).map_err(|error| {
        // A socket cannot be opened at all, with words that do not say why.
        match std::fs::metadata(path) {
            Ok(found) if !found.is_file() && !found.is_dir() => not_a_file(found.file_type()),
            _ => error,
        }
    })?;
    match file.metadata()?.file_type() {
        kind if kind.is_file() => Ok(file),
        kind => Err(not_a_file(kind)),
    }
}

fn not_a_file(kind: std::fs::FileType) -> Error {
    if kind.is_dir() {
        return Error::new(ErrorKind::IsADirectory, "a folder, not a file");
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        if kind.is_fifo() {
            return Error::new(ErrorKind::InvalidInput, "a named pipe, not a file");
        }
        if kind.is_socket() {
            return Error::new(ErrorKind::InvalidInput, "a socket, not a file");
        }
    }
    Error::new(ErrorKind::InvalidInput, "a device, not a file")
}

/// The bytes of the file at `path`, of which there may be `most`.
///
/// # Errors
/// Those of [`open`], and [`ErrorKind::FileTooLarge`] when there are more, also of a file that grows while it is read
/// or does not tell its length.
pub fn read(path: &Path, most: u64) -> Result<Vec<u8>> {
    let file = open(path)?;
    let length = file.metadata()?.len();
    if length > most {
        return Err(too_large(length, most));
    }
    let mut bytes = Vec::new();
    bytes
        .try_reserve_exact(usize::try_from(length).unwrap_or(usize::MAX))
        .map_err(|_| Error::from(ErrorKind::OutOfMemory))?;
    let taken = file.take(most + 1).read_to_end(&mut bytes)? as u64;
    if taken > most {
        return Err(too_large(taken, most));
    }
    Ok(bytes)
}

fn too_large(length: u64, most: u64) -> Error {
    let unit = |bytes: u64| match bytes >> 20 {
        0 => format!("{bytes} bytes"),
        mib => format!("{mib} MiB"),
    };
    let (length, most) = (unit(length), unit(most));
    Error::new(
        ErrorKind::FileTooLarge,
        format!("the file has {length}, at most {most} are read"),
    )
}

/// Copies the regular file `from` to `to`, which is replaced.
///
/// # Errors
/// Those of [`open`] and of the disk.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    std::io::copy(&mut open(from)?, &mut File::create(to)?).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_up_to_its_bound_and_refused_above() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("file");
        std::fs::write(&path, "12345").unwrap();
        assert_eq!(read(&path, 5).unwrap(), b"12345");
        let error = read(&path, 4).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FileTooLarge);
        let sparse = File::create(&path).unwrap();
        sparse.set_len(1 << 40).unwrap();
        let error = read(&path, SETTINGS).unwrap_err();
        assert!(error.to_string().contains("at most 8 MiB"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn pipes_devices_sockets_and_folders_are_refused_at_once_by_name() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name);
        let pipe = std::ffi::CString::new(at("pipe").to_str().unwrap()).unwrap();
        // SAFETY: the name ends with a zero byte.
        assert_eq!(unsafe { libc::mkfifo(pipe.as_ptr(), 0o600) }, 0);
        std::os::unix::fs::symlink("/dev/zero", at("zero")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        std::fs::create_dir(at("folder")).unwrap();
        for (name, word, kind) in [
            ("pipe", "named pipe", ErrorKind::InvalidInput),
            ("zero", "device", ErrorKind::InvalidInput),
            ("socket", "socket", ErrorKind::InvalidInput),
            ("folder", "folder", ErrorKind::IsADirectory),
        ] {
            let error = open(&at(name)).unwrap_err();
            assert_eq!(error.kind(), kind, "{name}");
            assert!(error.to_string().contains(word), "{name}: {error}");
            assert_eq!(copy(&at(name), &at("copy")).unwrap_err().kind(), kind);
        }
        assert_eq!(open(&at("none")).unwrap_err().kind(), ErrorKind::NotFound);
    }

    /// Files in /proc say that they have no bytes.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_file_without_a_length_is_read_up_to_its_bound() {
        let path = Path::new("/proc/self/status");
        assert!(read(path, SETTINGS).unwrap().len() > 100);
        assert_eq!(read(path, 9).unwrap_err().kind(), ErrorKind::FileTooLarge);
    }
}
