//! The registry.

mod backend;
pub mod contract;
mod memory;
mod record;
#[cfg(feature = "redb")]
mod redb;

#[cfg(feature = "redb")]
pub use self::redb::RedbBackend;
pub use backend::{Backend, BackendError, CommitError, Expected, Version, Versioned, Write};
pub use memory::MemoryBackend;
pub use record::{CatalogRecord, Origin, Rules, ServerRecord};
