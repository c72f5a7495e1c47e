//! The two stacks, one page: what stands where, and why there.
//!
//! A request goes through [`Stack::edge`] once, and then through [`upstream`] of the server it is for. Layers are
//! always present; "off" is an empty value, so the order never changes and a reload swaps data only.
//!
//! ```
//! use std::sync::Arc;
//! use portcullis::{BoxMcpLayer, gateway::Gateway, layers::{self, Next}, stack::{Position, Stack}};
//!
//! # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
//! let count = layers::from_fn(|request, next: Next| async move { next.run(request).await });
//! let service = Stack::new()
//!     .foreign(Position::AfterAccess, BoxMcpLayer::new(count))
//!     .edge(Gateway::builder().build(), Arc::default());
//! # let _ = service; });
//! ```

use std::sync::Arc;

use arc_swap::ArcSwap;
use tower::{Layer as _, ServiceBuilder};

use crate::{
    BoxMcpLayer, BoxMcpService, McpService,
    gateway::Gateway,
    layers::{
        AccessLayer, AccessRules, ConcurrencyLayer, PaginateLayer, RescueLayer, TimeoutLayer, TraceLayer,
    },
    protocol::ServerName,
    upstream::{ParkLayer, UpstreamSpec},
};

/// Where a foreign layer enters the edge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Position {
    /// Just inside `rescue` and `trace`: sees every request and every answer, refusals too. Watchers.
    Outermost,
    /// Before `access`: may still change who asks. Names are not resolved yet.
    BeforeAccess,
    /// After `access`: the caller may see what they name, and [`Route`](crate::layers::Route) says whose it is.
    /// Deciders.
    AfterAccess,
    /// Last before the router. Changers of arguments and results.
    BeforeRouter,
}

/// Makes the edge.
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct Stack {
    foreign: Vec<(Position, BoxMcpLayer)>,
    paginate: PaginateLayer,
}

impl Stack {
    /// The default stack.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a layer at a position. Of several at the same, the first added is outermost.
    pub fn foreign(mut self, position: Position, layer: BoxMcpLayer) -> Self {
        self.foreign.push((position, layer));
        self
    }

    /// How many items a page of a list has.
    pub fn page_size(mut self, size: usize) -> Self {
        self.paginate = PaginateLayer::new(size);
        self
    }

    /// The edge: once per request, read from the outside in.
    pub fn edge(&self, gateway: Gateway, rules: Arc<ArcSwap<AccessRules>>) -> BoxMcpService {
        let access = AccessLayer::new(gateway.directory(), rules);
        ServiceBuilder::new()
            // Outermost, so that whatever fails inside becomes an answer.
            .layer(RescueLayer::new())
            // Sees errors as they were, before they are made presentable.
            .layer(TraceLayer::new())
            .layer(self.at(Position::Outermost))
            // Pages are cut from what is visible, so outside of what hides.
            .layer(self.paginate)
            .layer(self.at(Position::BeforeAccess))
            // Before everything that costs or asks: what is denied is worth neither.
            .layer(access)
            .layer(self.at(Position::AfterAccess))
            .layer(self.at(Position::BeforeRouter))
            .service(gateway.boxed_mcp())
            .boxed_mcp()
    }

    /// The foreign layers of one position, as one.
    fn at(&self, position: Position) -> BoxMcpLayer {
        let layers: Vec<BoxMcpLayer> =
            self.foreign.iter().filter(|(p, _)| *p == position).map(|(_, layer)| layer.clone()).collect();
        BoxMcpLayer::from_fn(move |inner| layers.iter().rev().fold(inner, |inner, layer| layer.layer(inner)))
    }
}

/// The stack of one upstream: once per request that reaches it, read from the outside in.
pub fn upstream(name: ServerName, client: impl McpService, spec: &UpstreamSpec) -> BoxMcpService {
    ServiceBuilder::new()
        // A slow upstream fills its own cap and no other; outside the timeout, so that a permit is held no longer
        // than that.
        .layer(ConcurrencyLayer::new(spec.concurrency))
        // What it measures is the upstream.
        .layer(TimeoutLayer::new(spec.timeout))
        // Inside of both: a call that waits for its client's answer is not under way, and has no deadline but its own.
        .layer(ParkLayer::new(name))
        .service(client)
        .boxed_mcp()
}
