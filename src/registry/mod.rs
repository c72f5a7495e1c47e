//! The registry.

mod backend;
pub mod contract;
mod memory;
mod record;

pub use backend::{Backend, BackendError, CommitError, Expected, Version, Versioned, Write};
pub use memory::MemoryBackend;
pub use record::{CatalogRecord, Origin, Rules, ServerRecord};
