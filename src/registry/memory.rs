//! A registry that ends with the process: for tests, and for gateways built in code.
//!
//! ```
//! use std::sync::Arc;
//!
//! use portcullis::registry::{MemoryBackend, Registry};
//!
//! let registry = Registry::open(Arc::new(MemoryBackend::new()))?;
//! assert!(registry.snapshot().servers.is_empty());
//! # Ok::<(), portcullis::registry::RegistryError>(())
//! ```

use std::{
    collections::{BTreeMap, HashSet},
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;

use super::backend::{Backend, BackendError, CommitError, Version, Versioned, Write};

/// Records in a map.
pub struct MemoryBackend {
    records: Mutex<BTreeMap<String, Versioned>>,
    /// Sent to while `records` is locked, so it grows in the order of the commits.
    revision: watch::Sender<u64>,
}

// === impl MemoryBackend ===

impl MemoryBackend {
    /// An empty one.
    pub fn new() -> Self {
        MemoryBackend { records: Mutex::default(), revision: watch::Sender::new(0) }
    }

    fn records(&self) -> MutexGuard<'_, BTreeMap<String, Versioned>> {
        // Nothing that holds the lock can panic half-way through a commit.
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for MemoryBackend {
    fn default() -> Self {
        MemoryBackend::new()
    }
}

impl fmt::Debug for MemoryBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryBackend").field("revision", &*self.revision.borrow()).finish_non_exhaustive()
    }
}

impl Backend for MemoryBackend {
    fn get(&self, key: &str) -> Result<Option<Versioned>, BackendError> {
        Ok(self.records().get(key).cloned())
    }

    fn scan(&self, prefix: &str) -> Result<Vec<(String, Versioned)>, BackendError> {
        let records = self.records();
        let from_prefix = records.range(prefix.to_owned()..);
        Ok(from_prefix
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(key, found)| (key.clone(), found.clone()))
            .collect())
    }

    fn commit(&self, writes: Vec<Write>) -> Result<Vec<Version>, CommitError> {
        if writes.is_empty() {
            return Ok(Vec::new());
        }
        let mut records = self.records();
        let mut named = HashSet::with_capacity(writes.len());
        for Write { key, expected, .. } in &writes {
            let found = records.get(key).map(|found| found.version);
            if !expected.allows(found) {
                return Err(CommitError::Conflict { key: key.clone(), found });
            }
            if !named.insert(key) {
                return Err(CommitError::Repeated { key: key.clone() });
            }
        }
        let revision = *self.revision.borrow() + 1;
        let version = Version(revision);
        let versions = vec![version; writes.len()];
        for Write { key, value, .. } in writes {
            match value {
                Some(value) => records.insert(key, Versioned { version, value }),
                None => records.remove(&key),
            };
        }
        self.revision.send_replace(revision);
        Ok(versions)
    }

    fn watch(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::registry::contract;

    #[test]
    fn keeps_the_contract() {
        contract::run(|| Arc::new(MemoryBackend::new()));
    }
}
