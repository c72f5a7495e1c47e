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
mod link;
pub mod secret;
mod spec;
pub(crate) mod translate;

#[cfg(feature = "client")]
pub use http::HttpUpstream;
pub use spec::{Transport, UpstreamSpec};
