//! One governed endpoint in front of many [MCP](https://modelcontextprotocol.io) servers, made of
//! [tower](https://docs.rs/tower) layers.
//!
//! Everything from the HTTP door to the upstream is a `Service<McpRequest, Response = McpResponse>`: a layer, the
//! gateway, an upstream client, your own code. Whoever knows tower knows this library.
//!
//! ```
//! use std::sync::Arc;
//! use arc_swap::ArcSwap;
//! use portcullis::{
//!     gateway::Gateway,
//!     layers::{self, AccessLayer, AccessRules, Next, RescueLayer},
//!     protocol::{McpRequest, McpResponse, Method},
//! };
//! use tower::{ServiceBuilder, ServiceExt as _, service_fn};
//!
//! # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
//! // An upstream: usually `HttpUpstream`, `StdioUpstream` or `PeerUpstream`, here a function.
//! let files = service_fn(|request: McpRequest| async move {
//!     Ok::<_, portcullis::BoxError>(McpResponse::raw(match request.method() {
//!         Method::Discover => r#"{"supportedVersions":["2026-07-28"],"capabilities":{"tools":{}}}"#,
//!         Method::ToolsList => r#"{"tools":[{"name":"read"},{"name":"delete"}]}"#,
//!         _ => r#"{"content":[{"type":"text","text":"done"}]}"#,
//!     }))
//! });
//! let gateway = Gateway::builder().upstream("files".parse()?, files).build();
//!
//! let mut rules = AccessRules::default();
//! rules.set_server("files".parse()?, None, &["delete*".to_owned()])?;
//! let service = ServiceBuilder::new()
//!     .layer(RescueLayer::new())
//!     .layer(AccessLayer::new(gateway.directory(), Arc::new(ArcSwap::from_pointee(rules))))
//!     .layer(layers::from_fn(|request, next: Next| async move { next.run(request).await }))
//!     .service(gateway);
//!
//! let list = service.clone().oneshot(McpRequest::bare(Method::ToolsList)).await?;
//! assert_eq!(list.payload().to_value().unwrap()["tools"].as_array().unwrap().len(), 1);
//! // server::router(service) serves it at /mcp.
//! # Ok::<_, portcullis::BoxError>(()) }).unwrap();
//! ```
//!
//! # The onion
//!
//! ```text
//!  client ─▶ door (server::McpHttp, ..)   both eras of MCP become one kind of request
//!             └▶ edge stack               rescue · trace · paginate · access · yours        once per request
//!                 └▶ gateway              one lookup: whose is this name?
//!                     └▶ upstream stack   concurrency · timeout                             once per upstream
//!                         └▶ client       HttpUpstream · StdioUpstream · PeerUpstream
//! ```
//!
//! # Rooms, by floor
//!
//! A room uses lower floors and its own children only.
//!
//! | floor | rooms |
//! |--:|---|
//! | 0 | [`protocol`] (messages, raw first) · [`identity`] · [`service`] · [`error`] |
//! | 1 | [`layers`] · [`upstream`] |
//! | 2 | [`registry`] |
//! | 3 | [`gateway`] |
#![cfg_attr(feature = "server", doc = "| 4 | [`server`] |")]
#![cfg_attr(not(feature = "server"), doc = "| 4 | `server` |")]
#![cfg_attr(feature = "daemon", doc = "| 5 | [`stack`] · [`config`] · [`app`] |\n| 6 | [`cli`] |")]
#![cfg_attr(not(feature = "daemon"), doc = "| 5 | [`stack`] · `config` · `app` |\n| 6 | `cli` |")]
//!
//! # Features
//!
//! | feature | brings |
//! |---|---|
//! | none | protocol, layers, gateway, registry in memory |
//! | `server` | the doors: HTTP (axum, hyper), stdio, HTTP+SSE |
//! | `client` | upstreams over HTTP and as child processes |
//! | `peer` | upstreams over an rmcp peer or in-process handler |
//! | `redb` | the registry on disk |
//! | `testing` | mocks for testing a layer beside itself |
//! | `daemon` (default) | all of it, with config file, command line and control socket |

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
mod seal;
#[cfg(feature = "server")]
pub mod server;
pub mod service;
pub mod stack;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod upstream;

pub use error::BoxError;
pub use service::{BoxMcpLayer, BoxMcpService, McpService};
