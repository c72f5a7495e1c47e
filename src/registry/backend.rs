//! The narrow waist under storage: four methods, and any database fits.
//!
//! A backend keeps versioned bytes under text keys. A change is a list of [`Write`]s that lands whole or not at
//! all, each with an expectation about what is there. What the bytes mean is the
//! [`Registry`](super::Registry)'s business.
//!
//! The methods block: a commit waits for the disk. On the async side call them in `spawn_blocking`.
//!
//! ```
//! use portcullis::registry::{Backend, CommitError, Expected, MemoryBackend, Write};
//!
//! let backend = MemoryBackend::new();
//! let first = backend.commit(vec![Write::put("server/a", Expected::Absent, "one")])?[0];
//! backend.commit(vec![Write::put("server/a", Expected::Version(first), "two")])?;
//!
//! let late = backend.commit(vec![Write::put("server/a", Expected::Version(first), "three")]);
//! assert!(matches!(late, Err(CommitError::Conflict { key, .. }) if key == "server/a"));
//! # Ok::<(), CommitError>(())
//! ```

use std::{error::Error, fmt, path::PathBuf};

use bytes::Bytes;
use tokio::sync::watch;

use crate::BoxError;

/// A place to keep records. [`contract`](super::contract) says in tests what is demanded of one.
pub trait Backend: Send + Sync + 'static {
    /// What is under `key`.
    fn get(&self, key: &str) -> Result<Option<Versioned>, BackendError>;

    /// Everything whose key starts with `prefix`, in byte order of the keys, as of one moment.
    fn scan(&self, prefix: &str) -> Result<Vec<(String, Versioned)>, BackendError>;

    /// All of the writes, or none of them. Gives each one's version, in order. When it returns, the writes are
    /// where they survive whatever the backend promises to survive, and every reader sees them.
    ///
    /// No writes are no commit: nothing happens.
    fn commit(&self, writes: Vec<Write>) -> Result<Vec<Version>, CommitError>;

    /// A revision that grows with every commit, whoever made it.
    fn watch(&self) -> watch::Receiver<u64>;
}

/// When a key was last written. A later commit has a greater version, and no version is ever used twice, not
/// even after the key was deleted and made again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(pub u64);

/// Bytes, and when they were written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Versioned {
    /// When.
    pub version: Version,
    /// What.
    pub value: Bytes,
}

/// One change to one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// Which key. A commit may name a key once.
    pub key: String,
    /// What must be there for the commit to happen.
    pub expected: Expected,
    /// What is to be there; `None` deletes. Empty bytes are a value.
    pub value: Option<Bytes>,
}

/// What a [`Write`] expects to find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// Whatever.
    Any,
    /// Nothing.
    Absent,
    /// Exactly this version.
    Version(Version),
}

/// Why a commit did not happen.
#[derive(Debug)]
#[non_exhaustive]
pub enum CommitError {
    /// Somebody else was there first: read again, and decide again.
    Conflict {
        /// Where.
        key: String,
        /// What is there; `None` is nothing.
        found: Option<Version>,
    },
    /// The commit names a key twice.
    Repeated {
        /// Which.
        key: String,
    },
    /// The storage failed.
    Backend(BackendError),
}

/// What is wrong with the storage.
#[derive(Debug)]
#[non_exhaustive]
pub enum BackendError {
    /// Another process has it.
    InUse {
        /// The data directory.
        path: PathBuf,
    },
    /// The file holds something else. It is left as it is.
    NotARegistry {
        /// The file.
        path: PathBuf,
    },
    /// A newer release wrote the file. It is left as it is.
    Newer {
        /// The file.
        path: PathBuf,
    },
    /// The file began as a registry and can no longer be read. It is left as it is.
    Damaged {
        /// The file.
        path: PathBuf,
        /// What the storage found.
        source: BoxError,
    },
    /// The data directory belongs to everybody.
    Shared {
        /// The data directory.
        path: PathBuf,
    },
    /// The operating system refused.
    Io {
        /// Where.
        path: PathBuf,
        /// What it said.
        source: std::io::Error,
    },
    /// Anything else that the storage says.
    Storage(BoxError),
}

// === impl Write ===

impl Write {
    /// Puts `value` under `key`.
    pub fn put(key: impl Into<String>, expected: Expected, value: impl Into<Bytes>) -> Self {
        Write { key: key.into(), expected, value: Some(value.into()) }
    }

    /// Deletes `key`.
    pub fn delete(key: impl Into<String>, expected: Expected) -> Self {
        Write { key: key.into(), expected, value: None }
    }
}

// === impl Expected ===

impl Expected {
    /// Whether what was `found` is what is expected.
    pub fn allows(self, found: Option<Version>) -> bool {
        match self {
            Expected::Any => true,
            Expected::Absent => found.is_none(),
            Expected::Version(version) => found == Some(version),
        }
    }
}

// === impl CommitError ===

impl fmt::Display for CommitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CommitError::Conflict { key, .. } => write!(f, "`{key}` was changed by somebody else"),
            CommitError::Repeated { key } => write!(f, "the commit names `{key}` twice"),
            CommitError::Backend(error) => error.fmt(f),
        }
    }
}

impl Error for CommitError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            CommitError::Backend(error) => error.source(),
            CommitError::Conflict { .. } | CommitError::Repeated { .. } => None,
        }
    }
}

impl From<BackendError> for CommitError {
    fn from(error: BackendError) -> Self {
        CommitError::Backend(error)
    }
}

// === impl BackendError ===

impl fmt::Display for BackendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BackendError::InUse { path } => write!(
                f,
                "the data directory {} is in use by another portcullis: stop that one, or choose another with \
                 --data-dir",
                path.display()
            ),
            BackendError::NotARegistry { path } => {
                write!(f, "{} is not a registry of portcullis, and is left as it is", path.display())
            }
            BackendError::Newer { path } => write!(
                f,
                "{} was written by a newer portcullis, and is left as it is: use that release, or choose \
                 another directory with --data-dir",
                path.display()
            ),
            BackendError::Damaged { path, source } => {
                write!(f, "{} is damaged, and is left as it is: {source}", path.display())
            }
            BackendError::Shared { path } => write!(
                f,
                "{} is shared by all users of this machine: choose a directory of its own with --data-dir",
                path.display()
            ),
            BackendError::Io { path, source } => write!(f, "cannot use {}: {source}", path.display()),
            BackendError::Storage(source) => write!(f, "the registry's storage failed: {source}"),
        }
    }
}

impl Error for BackendError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            BackendError::Io { source, .. } => Some(source),
            BackendError::Storage(source) | BackendError::Damaged { source, .. } => Some(&**source),
            BackendError::InUse { .. }
            | BackendError::NotARegistry { .. }
            | BackendError::Newer { .. }
            | BackendError::Shared { .. } => None,
        }
    }
}
