//! Upstream clients.

mod spec;

pub use spec::{Transport, UpstreamSpec};
