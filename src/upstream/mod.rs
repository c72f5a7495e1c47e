//! Upstream clients.

#[cfg(any(feature = "client", feature = "peer"))]
mod link;
mod spec;
pub(crate) mod translate;

pub use spec::{Transport, UpstreamSpec};
