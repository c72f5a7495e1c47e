//! The one service type, and how to hold one.
//!
//! ```
//! use portcullis::{BoxError, BoxMcpService, McpService, protocol::{McpRequest, McpResponse}};
//!
//! // Every tower service of this shape is an McpService; `boxed_mcp` forgets which.
//! let ping = tower::service_fn(|_: McpRequest| async { Ok::<_, BoxError>(McpResponse::raw("{}")) });
//! let service: BoxMcpService = ping.boxed_mcp();
//! # let _ = service;
//! ```

use tower::{Layer, Service, ServiceExt as _, util::BoxCloneSyncService};

use crate::{
    BoxError,
    protocol::{McpRequest, McpResponse},
};

/// Anything that answers MCP: a layer's service, the gateway, an upstream client, your own.
///
/// Implemented for every [`Service`] of the right shape; never by hand.
pub trait McpService:
    Service<McpRequest, Response = McpResponse, Error: Into<BoxError>, Future: Send>
    + Clone
    + Send
    + Sync
    + 'static
{
    /// Erases the type.
    fn boxed_mcp(self) -> BoxMcpService {
        BoxCloneSyncService::new(self.map_err(Into::into))
    }
}

impl<S> McpService for S where
    S: Service<McpRequest, Response = McpResponse, Error: Into<BoxError>, Future: Send>
        + Clone
        + Send
        + Sync
        + 'static
{
}

/// An [`McpService`] of any kind.
pub type BoxMcpService = BoxCloneSyncService<McpRequest, McpResponse, BoxError>;

/// A [`Layer`] of any kind.
#[derive(Clone)]
pub struct BoxMcpLayer(std::sync::Arc<dyn Fn(BoxMcpService) -> BoxMcpService + Send + Sync>);

impl BoxMcpLayer {
    /// Erases a layer's type.
    pub fn new<L>(layer: L) -> Self
    where
        L: Layer<BoxMcpService, Service: McpService> + Send + Sync + 'static,
    {
        BoxMcpLayer(std::sync::Arc::new(move |inner| layer.layer(inner).boxed_mcp()))
    }

    /// From a function that puts something around a service.
    pub fn from_fn(wrap: impl Fn(BoxMcpService) -> BoxMcpService + Send + Sync + 'static) -> Self {
        BoxMcpLayer(std::sync::Arc::new(wrap))
    }
}

impl<S: McpService> Layer<S> for BoxMcpLayer {
    type Service = BoxMcpService;

    fn layer(&self, inner: S) -> BoxMcpService {
        (self.0)(inner.boxed_mcp())
    }
}

impl std::fmt::Debug for BoxMcpLayer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BoxMcpLayer")
    }
}

/// Takes the service that was polled ready and leaves a fresh clone in its place. A layer that awaits before it
/// calls needs this: the clone has not been polled (see [`Service`], "Be careful when cloning inner services").
pub fn take_ready<S: Clone>(service: &mut S) -> S {
    let fresh = service.clone();
    std::mem::replace(service, fresh)
}
