//! The registry: which servers there are, what they last offered, and what must outlive the process.
//!
//! Everybody who changes something — config file, command line, admin — changes it here, and the gateway reads
//! only [`Snapshot`]s, which never change. A change that returned is on the disk and in the next snapshot.
//!
//! What holds the records is a [`Backend`] of four methods: [`RedbBackend`] in a file, [`MemoryBackend`] in a
//! map. A new one is one file, and [`contract`] says whether it is right.
//!
//! The trap: the methods that change something wait for the disk. Async code calls them in `spawn_blocking`.
//!
//! ```
//! use std::sync::Arc;
//!
//! use portcullis::{
//!     registry::{MemoryBackend, Registry, ServerRecord},
//!     upstream::UpstreamSpec,
//! };
//!
//! let registry = Registry::open(Arc::new(MemoryBackend::new()))?;
//! let spec = UpstreamSpec::stdio("uvx", ["mcp-server-time"]);
//! registry.create_server(ServerRecord::new("time".parse()?, spec.clone()))?;
//!
//! let again = registry.create_server(ServerRecord::new("time".parse()?, spec));
//! assert_eq!(again.unwrap_err().to_string(), "server `time` exists already");
//!
//! registry.set_enabled(&"time".parse()?, false)?;
//! assert_eq!(registry.snapshot().enabled().count(), 0);
//! # Ok::<(), portcullis::BoxError>(())
//! ```

mod backend;
pub mod contract;
mod memory;
mod record;
#[cfg(feature = "redb")]
mod redb;
mod snapshot;
mod store;
mod stored;

#[cfg(feature = "redb")]
pub use self::redb::RedbBackend;
pub use backend::{Backend, BackendError, CommitError, Expected, Version, Versioned, Write};
pub use memory::MemoryBackend;
pub use record::{CatalogRecord, Origin, Rules, ServerRecord};
pub use snapshot::{Snapshot, Unreadable};
pub use store::{Change, FileChange, Registry, RegistryError};
