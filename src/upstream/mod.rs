//! Upstream clients: whatever era and transport a server speaks, inside it is an [`McpService`](crate::McpService)
//! that speaks MCP 2026-07-28.
//!
//! ```
//! use portcullis::upstream::{Transport, UpstreamSpec};
//!
//! let spec = UpstreamSpec::stdio("npx", ["-y", "@modelcontextprotocol/server-memory"]);
//! assert_eq!(spec.transport.kind(), "stdio");
//! assert!(matches!(UpstreamSpec::http("https://example.com/mcp").transport, Transport::Http { .. }));
//! ```

#[cfg(feature = "client")]
mod http;
#[cfg(any(feature = "client", feature = "peer"))]
mod lines;
#[cfg(any(feature = "client", feature = "peer"))]
mod link;
mod park;
#[cfg(feature = "peer")]
pub mod peer;
pub mod secret;
#[cfg(feature = "client")]
mod slots;
mod spec;
#[cfg(all(feature = "client", unix))]
pub mod stdio;
#[cfg(any(feature = "client", feature = "peer"))]
mod translate;

#[cfg(feature = "client")]
pub use http::{HttpUpstream, SseUpstream};
pub use park::{Park, ParkFuture, ParkLayer};
#[cfg(feature = "peer")]
pub use peer::PeerUpstream;
pub use spec::{Isolation, Transport, UpstreamSpec};
#[cfg(all(feature = "client", unix))]
pub use stdio::{StdioCommand, StdioUpstream};
