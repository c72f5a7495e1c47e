//! The doors: where clients come in.
//!
//! [`McpHttp`] is a plain tower service over HTTP requests and can be mounted anywhere; [`router`] mounts it where
//! clients look for it, and [`Server`] is a listener with the limits an open port needs. [`McpStdio`] serves one client
//! on stdin and stdout, and [`sse`] clients of the oldest transport. What they have in common knows nothing of HTTP:
//! `legacy` is sessions, `modern` is requests that stand by themselves, `connection` is both on one channel, and
//! `streams` is the way out.
//!
//! ```no_run
//! use portcullis::{gateway::Gateway, server};
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> std::io::Result<()> {
//! let gateway = Gateway::builder().build();
//! let server = server::Server::bind(([127, 0, 0, 1], 8000).into()).await?;
//! server.serve(server::router(gateway), std::future::pending()).await
//! # }
//! ```

mod connection;
mod http;
mod legacy;
mod listener;
mod message;
mod modern;
mod refusal;
mod stdio;
mod streams;

pub use http::{DoorBody, McpHttp, McpSse, Options};
pub use listener::{Draining, Server};
pub use stdio::McpStdio;

use axum::{Router, extract::Path, extract::Request, response::IntoResponse as _, routing::any};
use tower::ServiceExt as _;

use crate::{
    McpService,
    identity::Scope,
    layers::rescue::{self, Asked},
    protocol::{McpRequest, McpResponse},
};

/// `/mcp`, `/mcp/` and `/mcp/g/{group}`, with the default [`Options`].
pub fn router(service: impl McpService) -> Router {
    mount(McpHttp::new(service))
}

/// The same for a door of one's own making.
pub fn mount<S: McpService>(door: McpHttp<S>) -> Router {
    let groups = door.clone();
    let group = move |Path(group): Path<String>, mut request: Request| {
        let door = groups.clone();
        async move {
            if !door.knows_group(&group) {
                return (::http::StatusCode::NOT_FOUND, format!("unknown group `{group}`\n")).into_response();
            }
            request.extensions_mut().insert(Scope::Group(group.into()));
            match door.oneshot(request).await {
                Ok(response) => response.map(axum::body::Body::new),
                Err(never) => match never {},
            }
        }
    };
    Router::new()
        .route_service("/mcp", door.clone())
        .route_service("/mcp/", door)
        .route("/mcp/g/{group}", any(group))
}

/// The transport of 2024-11-05, for clients that know no other: `/sse`, and what it tells them to post to. With the
/// default [`Options`].
pub fn sse(service: impl McpService) -> Router {
    mount_sse(McpSse::new(service))
}

/// The same for a door of one's own making.
pub fn mount_sse<S: McpService>(door: McpSse<S>) -> Router {
    Router::new().route_service("/sse", door.clone()).route_service("/sse/messages", door)
}

/// Calls the service. An error that no layer rescued is rescued here: a stack made by hand may have no such layer.
async fn call<S: McpService>(service: S, request: McpRequest) -> McpResponse {
    let asked = Asked::of(&request);
    match service.oneshot(request).await {
        Ok(response) => response,
        Err(error) => rescue::answer(error.into(), &asked),
    }
}
