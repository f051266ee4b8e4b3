//! What can go wrong, in one type. An error says what, where, and how to mend it; `main` prints it once.

use std::path::{Path, PathBuf};

use crate::console::shown;

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure, with the place where it happened and, where there is one, the way to mend it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or folder could not be read, written, synced or renamed.
    #[error("{}: {source}", shown(path))]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    /// A picture that cannot be used, with the reason.
    #[error("{}: {reason}", shown(path))]
    Image { path: PathBuf, reason: String },
    /// One or more faults of a pipeline file; each line already carries its file, line and column.
    #[error("{}", .0.join("\n"))]
    Config(Vec<String>),
    /// A checkpoint whose files are missing, or whose names or shapes differ from what its config asks for.
    #[error("{}: {}", shown(path), faults.join("\n  "))]
    Checkpoint { path: PathBuf, faults: Vec<String> },
    /// The store could not be opened, read or appended to.
    #[error("store: {what}")]
    Store { what: String, hint: Option<String> },
    /// A number that must be finite is not.
    #[error("{what} is not finite at step {step}")]
    NotFinite { what: String, step: usize },
    /// What was asked for cannot be done; `hint` says what can.
    #[error("{what}")]
    Invalid { what: String, hint: Option<String> },
    /// What was given to compare cannot be compared, for the reason inside.
    #[error(transparent)]
    Unusable(Box<Error>),
    /// A stage failed; its name goes in front of the cause.
    #[error("stage {stage}: {source}")]
    Stage { stage: String, source: Box<Error> },
    /// The run was asked to stop and has stopped cleanly.
    #[error("interrupted; the same command continues from here")]
    Interrupted,
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl Error {
    /// An [`Error::Io`] at `path`, for use in `map_err`.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { path, source }
    }

    /// An [`Error::Invalid`] with a hint.
    pub fn invalid(what: impl Into<String>, hint: impl Into<String>) -> Error {
        Error::Invalid {
            what: what.into(),
            hint: Some(hint.into()),
        }
    }

    /// Names the stage in which `self` happened.
    pub fn in_stage(self, stage: &str) -> Error {
        match self {
            Error::Stage { .. } | Error::Interrupted => self,
            other => Error::Stage {
                stage: stage.to_string(),
                source: Box::new(other),
            },
        }
    }

    /// How to mend it, where that is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Store { hint, .. } | Error::Invalid { hint, .. } => hint.clone(),
            Error::Stage { source, .. } => source.hint(),
            Error::Unusable(source) => source.hint(),
            Error::Io { source, path } => match source.kind() {
                std::io::ErrorKind::StorageFull => {
                    Some("free some space and run the same command again: it continues where it stopped".into())
                }
                std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem => {
                    Some(format!("make {} writable, or choose another place with --out or --store", shown(path)))
                }
                std::io::ErrorKind::NotADirectory | std::io::ErrorKind::AlreadyExists => Some(format!(
                    "{} is in the way of a directory: move it, or choose another place with --out or --store",
                    shown(path)
                )),
                std::io::ErrorKind::InvalidInput | std::io::ErrorKind::IsADirectory => {
                    Some("give a file: what a pipe or a device says can be saved as one".into())
                }
                std::io::ErrorKind::FileTooLarge => Some(format!("is {} the right file?", shown(path))),
                std::io::ErrorKind::NotFound => Some("check the path; relative paths start at the working directory".into()),
                _ => None,
            },
            Error::NotFinite { .. } => Some("lower learning_rate, or raise warmup_steps".into()),
            Error::Checkpoint { .. } => {
                Some("compare the files with config.json of the same checkpoint, or fetch the checkpoint again".into())
            }
            Error::Image { .. } => {
                Some("save it again as JPEG, PNG or WebP with an image editor, or take it out of the folder".into())
            }
            _ => None,
        }
    }
}
