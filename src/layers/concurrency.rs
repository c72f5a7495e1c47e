//! How many requests may be under way at once; more are refused at once.

use std::{
    sync::Arc,
    task::{Context, Poll},
};

use futures_util::{StreamExt as _, future::BoxFuture};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower::{Layer, Service};

use crate::{
    BoxError, McpService,
    error::Overloaded,
    protocol::{Frame, McpRequest, McpResponse, Method, Payload},
};

/// A cap with load shed: a request beyond it fails with [`Overloaded`], and none ever waits in a queue that
/// nobody sees. A request holds its permit until its last frame. `subscriptions/listen` takes none, for it would
/// never give it back. One stands in each upstream's stack, so that a slow upstream fills its own cap and no other.
///
/// ```
/// # use portcullis::layers::ConcurrencyLayer;
/// let layer = ConcurrencyLayer::new(64);
/// ```
#[derive(Clone, Debug)]
#[must_use]
pub struct ConcurrencyLayer {
    limit: usize,
}

impl ConcurrencyLayer {
    /// At most `limit` at once, for each service the layer is put on.
    pub fn new(limit: usize) -> Self {
        ConcurrencyLayer { limit: limit.min(Semaphore::MAX_PERMITS) }
    }
}

/// Made by [`ConcurrencyLayer`].
#[derive(Clone, Debug)]
pub struct Concurrency<S> {
    inner: S,
    permits: Arc<Semaphore>,
    limit: usize,
}

impl<S> Layer<S> for ConcurrencyLayer {
    type Service = Concurrency<S>;

    fn layer(&self, inner: S) -> Concurrency<S> {
        Concurrency { inner, permits: Arc::new(Semaphore::new(self.limit)), limit: self.limit }
    }
}

impl<S: McpService> Service<McpRequest> for Concurrency<S> {
    type Response = McpResponse;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<McpResponse, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: McpRequest) -> Self::Future {
        let permit = match *request.method() {
            Method::Listen => None,
            _ => match self.permits.clone().try_acquire_owned() {
                Ok(permit) => Some(permit),
                Err(_) => return Box::pin(std::future::ready(Err(Overloaded { limit: self.limit }.into()))),
            },
        };
        let answer = self.inner.call(request);
        Box::pin(async move { Ok(hold(answer.await.map_err(Into::into)?, permit)) })
    }
}

/// Ties the permit to the stream, when the answer is one.
fn hold(response: McpResponse, permit: Option<OwnedSemaphorePermit>) -> McpResponse {
    match response.into_parts() {
        (Payload::Stream(frames), extensions) => {
            let mut permit = permit;
            let frames = frames.inspect(move |frame| {
                if !matches!(frame, Ok(Frame::Notification(_) | Frame::Request(_))) {
                    // The call is over, whenever its client reads that.
                    permit.take();
                }
            });
            McpResponse::from_parts(Payload::Stream(Box::pin(frames)), extensions)
        }
        (payload, extensions) => McpResponse::from_parts(payload, extensions),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[tokio::test]
    async fn one_too_many_is_refused_and_a_finished_one_makes_room() {
        let (mut service, mut inner) = testing::layer(ConcurrencyLayer::new(1));
        let first = service.call(testing::call("a"));
        let refused = service.call(testing::call("b")).await.unwrap_err();
        assert_eq!(refused.downcast_ref(), Some(&Overloaded { limit: 1 }));
        inner.answer(McpResponse::raw("{}")).await;
        first.await.unwrap();
        let _third = service.call(testing::call("c"));
        inner.answer(McpResponse::raw("{}")).await;
    }

    #[tokio::test]
    async fn a_stream_holds_its_permit_until_it_is_dropped() {
        let (mut service, mut inner) = testing::layer(ConcurrencyLayer::new(1));
        let first = service.call(testing::call("a"));
        let frames = futures_util::stream::pending::<Result<Frame, BoxError>>();
        inner.answer(McpResponse::new(Payload::Stream(Box::pin(frames)))).await;
        let open = first.await.unwrap();
        assert!(service.call(testing::call("b")).await.is_err());
        drop(open);
        let second = service.call(testing::call("c"));
        inner.answer(McpResponse::raw("{}")).await;
        second.await.unwrap();
    }

    #[tokio::test]
    async fn dropping_the_call_gives_the_permit_back() {
        let (mut service, mut inner) = testing::layer(ConcurrencyLayer::new(1));
        drop(service.call(testing::call("a")));
        tokio::task::yield_now().await;
        let second = service.call(testing::call("b"));
        let _first = inner.next_request().await;
        inner.answer(McpResponse::raw("{}")).await;
        second.await.unwrap();
    }
}
