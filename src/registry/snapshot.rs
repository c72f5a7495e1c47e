//! The registry as of one moment.

use std::{fmt, sync::Arc};

use super::record::ServerRecord;
use crate::protocol::ServerName;

/// All servers as of one moment. It never changes; [`Registry::snapshot`](super::Registry::snapshot) gives the
/// present one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Grows with every change of what is below.
    pub revision: u64,
    /// In order of priority: the config file's in the order of the file, then those added by hand in the order
    /// they were added, then the demonstration's. A server that did not change is the same `Arc` as before.
    pub servers: Vec<Arc<ServerRecord>>,
    /// What is in the registry and cannot be read. It takes no part, and is left as it is.
    pub unreadable: Vec<Unreadable>,
}

/// A record that this release cannot read: a newer one wrote it, or it is damaged. It is never overwritten.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// Where it is.
    pub key: String,
    /// What is wrong with it.
    pub why: String,
}

// === impl Snapshot ===

impl Snapshot {
    /// The server of that name, enabled or not.
    pub fn server(&self, name: &ServerName) -> Option<&Arc<ServerRecord>> {
        self.servers.iter().find(|server| server.name == *name)
    }

    /// The servers that take part, in order of priority.
    pub fn enabled(&self) -> impl Iterator<Item = &Arc<ServerRecord>> {
        self.servers.iter().filter(|server| server.enabled)
    }
}

// === impl Unreadable ===

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the record `{}` cannot be read, and is left as it is: {}", self.key, self.why)
    }
}

impl std::error::Error for Unreadable {}
