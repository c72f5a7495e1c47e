//! A layer from one async closure: the on-ramp for whoever does not want to write a `Future`.

use std::{
    fmt,
    task::{Context, Poll},
};

use futures_util::future::BoxFuture;
use tower::{Layer, Service};

use crate::{
    BoxError, BoxMcpService, McpService,
    protocol::{McpRequest, McpResponse},
    service::take_ready,
};

/// A layer that runs `f` around every request. `f` may answer itself, change the request, or change the answer.
///
/// See the [module page](super) for an example. It belongs wherever its concern does; give it to
/// [`Stack::foreign`](crate::stack::Stack::foreign) with a position, or put it into a `ServiceBuilder`.
pub fn from_fn<F, Fut>(f: F) -> FromFnLayer<F>
where
    F: Fn(McpRequest, Next) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Result<McpResponse, BoxError>> + Send + 'static,
{
    FromFnLayer { f }
}

/// Made by [`from_fn`].
#[derive(Clone)]
#[must_use]
pub struct FromFnLayer<F> {
    f: F,
}

/// Made by [`from_fn`].
#[derive(Clone)]
pub struct FromFn<F, S> {
    f: F,
    inner: S,
}

/// The rest of the stack, ready for one request.
pub struct Next(BoxMcpService);

impl Next {
    /// Goes on with the request.
    pub async fn run(mut self, request: McpRequest) -> Result<McpResponse, BoxError> {
        self.0.call(request).await
    }
}

impl<F: Clone, S> Layer<S> for FromFnLayer<F> {
    type Service = FromFn<F, S>;

    fn layer(&self, inner: S) -> FromFn<F, S> {
        FromFn { f: self.f.clone(), inner }
    }
}

impl<F, Fut, S> Service<McpRequest> for FromFn<F, S>
where
    S: McpService,
    F: Fn(McpRequest, Next) -> Fut,
    Fut: Future<Output = Result<McpResponse, BoxError>> + Send + 'static,
{
    type Response = McpResponse;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<McpResponse, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: McpRequest) -> Self::Future {
        let inner = take_ready(&mut self.inner);
        Box::pin((self.f)(request, Next(inner.boxed_mcp())))
    }
}

impl<F> fmt::Debug for FromFnLayer<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FromFnLayer")
    }
}

impl<F, S> fmt::Debug for FromFn<F, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FromFn")
    }
}

impl fmt::Debug for Next {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Next")
    }
}
