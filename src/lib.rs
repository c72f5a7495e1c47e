//! Portcullis

#[cfg(feature = "daemon")]
pub mod app;
#[cfg(feature = "daemon")]
pub mod cli;
#[cfg(feature = "daemon")]
pub mod config;
#[cfg(feature = "daemon")]
pub mod demo;
pub mod error;
pub mod gateway;
pub mod identity;
#[cfg(any(feature = "server", feature = "client"))]
mod lane;
pub mod layers;
pub mod protocol;
pub mod registry;
#[cfg(feature = "server")]
pub mod server;
pub mod service;
pub mod stack;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod upstream;

pub use error::BoxError;
pub use service::{BoxMcpLayer, BoxMcpService, McpService};
