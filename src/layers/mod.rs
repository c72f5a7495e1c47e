//! Cross-cutting concerns, each a [`tower::Layer`] over [`McpService`](crate::McpService).
//!
//! A layer takes what it needs from the request, and lists and calls go by the same predicate. It does not know
//! its neighbours: order is the business of [`stack`](crate::stack), or of whoever writes a `ServiceBuilder`.
//!
//! ```
//! use portcullis::{layers, protocol::{McpRequest, McpResponse, Method}};
//! use tower::{ServiceBuilder, ServiceExt as _};
//!
//! # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
//! let service = ServiceBuilder::new()
//!     .layer(layers::RescueLayer::new())
//!     .layer(layers::from_fn(|request, next: layers::Next| async move {
//!         println!("{} asks for {}", request.principal(), request.method());
//!         next.run(request).await
//!     }))
//!     .service(tower::service_fn(|_: McpRequest| async {
//!         Ok::<_, portcullis::BoxError>(McpResponse::raw(r#"{"content":[]}"#))
//!     }));
//! service.oneshot(McpRequest::call_tool("add", serde_json::json!({}))).await.unwrap();
//! # });
//! ```

pub mod access;
mod concurrency;
mod from_fn;
mod paginate;
pub mod rescue;
mod timeout;
mod trace;

pub(crate) use access::decoded;
pub use access::{AccessLayer, AccessRules, Directory, InForce, Route, TaskRoute};
pub use concurrency::{Concurrency, ConcurrencyLayer};
pub use from_fn::{FromFn, FromFnLayer, Next, from_fn};
pub use paginate::{Paginate, PaginateLayer};
pub use rescue::{Rescue, RescueLayer};
pub use timeout::{Timeout, TimeoutLayer};
pub use trace::{Trace, TraceLayer};
