//! A span and one log line a request.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tokio::time::Instant;
use tower::{Layer, Service};
use tracing::{Level, Span};

use crate::{
    McpService,
    protocol::{McpRequest, McpResponse, Payload},
};

/// Runs each request in a span with its method, target, id and principal, and logs the outcome at `debug`. Neither
/// arguments nor results are ever logged. It stands just inside `rescue`, so that it sees every error as it was.
#[derive(Clone, Copy, Debug, Default)]
#[must_use]
pub struct TraceLayer(());

impl TraceLayer {
    /// The layer.
    pub fn new() -> Self {
        Self::default()
    }
}

/// Made by [`TraceLayer`].
#[derive(Clone, Debug)]
pub struct Trace<S> {
    inner: S,
}

impl<S> Layer<S> for TraceLayer {
    type Service = Trace<S>;

    fn layer(&self, inner: S) -> Trace<S> {
        Trace { inner }
    }
}

impl<S: McpService> Service<McpRequest> for Trace<S> {
    type Response = McpResponse;
    type Error = S::Error;
    type Future = TraceFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: McpRequest) -> Self::Future {
        // Building the fields costs more than the call when nobody listens.
        if !tracing::enabled!(Level::DEBUG) {
            return TraceFuture { inner: self.inner.call(request), watched: None };
        }
        let span = tracing::debug_span!(
            "request",
            method = %request.method(),
            target = request.target().map(|t| &**t.name()),
            id = request.id().map(tracing::field::debug),
            principal = %request.principal(),
        );
        let inner = span.in_scope(|| self.inner.call(request));
        TraceFuture { inner, watched: Some((span, Instant::now())) }
    }
}

pin_project! {
    /// Made by [`Trace`].
    pub struct TraceFuture<F> {
        #[pin]
        inner: F,
        watched: Option<(Span, Instant)>,
    }
}

impl<F, E> Future for TraceFuture<F>
where
    F: Future<Output = Result<McpResponse, E>>,
{
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let Some((span, started)) = this.watched else { return this.inner.poll(cx) };
        let _entered = span.enter();
        let outcome = ready!(this.inner.poll(cx));
        let word = match &outcome {
            Err(_) => "error",
            Ok(response) => match response.payload() {
                Payload::Error(_) => "rpc error",
                Payload::Stream(_) => "stream",
                _ => "result",
            },
        };
        tracing::debug!(outcome = word, elapsed = ?started.elapsed(), "answered");
        Poll::Ready(outcome)
    }
}
