//! The registry.

mod record;

pub use record::{CatalogRecord, Origin, Rules, ServerRecord};
