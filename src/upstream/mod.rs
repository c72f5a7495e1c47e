//! Upstream clients.

#[cfg(any(feature = "client", feature = "peer"))]
mod lines;
#[cfg(any(feature = "client", feature = "peer"))]
mod link;
#[cfg(feature = "peer")]
pub mod peer;
mod spec;
#[cfg(all(feature = "client", unix))]
pub mod stdio;
pub(crate) mod translate;

#[cfg(feature = "peer")]
pub use peer::PeerUpstream;
pub use spec::{Transport, UpstreamSpec};
#[cfg(all(feature = "client", unix))]
pub use stdio::{StdioCommand, StdioUpstream};
