//! Portcullis

#[cfg(feature = "daemon")]
pub mod config;
pub mod error;
pub mod identity;
pub mod protocol;
pub mod registry;
pub mod service;
pub mod upstream;

pub use error::BoxError;
pub use service::{BoxMcpLayer, BoxMcpService, McpService};
