//! Upstream clients.

pub mod secret;
mod spec;

pub use spec::{Transport, UpstreamSpec};
