//! How long one request may take, to its very end.

use std::{
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{StreamExt as _, future::BoxFuture, stream};
use tokio::time::{Instant, timeout_at};
use tower::{Layer, Service};

use crate::{
    BoxError, McpService,
    error::Elapsed,
    protocol::{FrameStream, McpRequest, McpResponse, Method, Payload},
};

/// Fails a request that has no result after `limit`; progress does not prolong it. Unlike tower's own timeout this
/// one sees the frames of a stream, not only its beginning. Of `subscriptions/listen` it sees the beginning only: the
/// rest is meant to stay open. It belongs in the upstream stack, right outside the client.
///
/// ```
/// # use portcullis::layers::TimeoutLayer;
/// let layer = TimeoutLayer::new(std::time::Duration::from_secs(60));
/// ```
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct TimeoutLayer {
    limit: Duration,
}

impl TimeoutLayer {
    /// With this limit.
    pub fn new(limit: Duration) -> Self {
        TimeoutLayer { limit }
    }
}

/// Made by [`TimeoutLayer`].
#[derive(Clone, Debug)]
pub struct Timeout<S> {
    inner: S,
    limit: Duration,
}

impl<S> Layer<S> for TimeoutLayer {
    type Service = Timeout<S>;

    fn layer(&self, inner: S) -> Timeout<S> {
        Timeout { inner, limit: self.limit }
    }
}

impl<S: McpService> Service<McpRequest> for Timeout<S> {
    type Response = McpResponse;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<McpResponse, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: McpRequest) -> Self::Future {
        let exempt = *request.method() == Method::Listen;
        let (limit, answer) = (self.limit, self.inner.call(request));
        Box::pin(async move {
            let deadline = Instant::now() + limit;
            let response = match timeout_at(deadline, answer).await {
                Ok(answered) => answered.map_err(Into::into)?,
                Err(_) => return Err(Elapsed { after: limit }.into()),
            };
            Ok(match response.into_parts() {
                (Payload::Stream(frames), ext) if !exempt => {
                    McpResponse::from_parts(Payload::Stream(until(frames, deadline, limit)), ext)
                }
                (payload, ext) => McpResponse::from_parts(payload, ext),
            })
        })
    }
}

/// The frames until the deadline, then the error. Dropping the rest cancels the call.
fn until(frames: FrameStream, deadline: Instant, limit: Duration) -> FrameStream {
    Box::pin(stream::unfold(Some(frames), move |frames| async move {
        let mut frames = frames?;
        match timeout_at(deadline, frames.next()).await {
            Ok(frame) => frame.map(|frame| (frame, Some(frames))),
            Err(_) => Some((Err(Elapsed { after: limit }.into()), None)),
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        protocol::{Frame, Notification, Params},
        testing,
    };

    const LIMIT: Duration = Duration::from_secs(5);

    #[tokio::test(start_paused = true)]
    async fn a_silent_upstream_is_given_up() {
        let (mut service, mut inner) = testing::layer(TimeoutLayer::new(LIMIT));
        let response = service.call(testing::call("x"));
        let _held = inner.next_request().await;
        let error = response.await.unwrap_err();
        assert_eq!(error.downcast_ref(), Some(&Elapsed { after: LIMIT }));
    }

    #[tokio::test(start_paused = true)]
    async fn progress_does_not_prolong_it() {
        let (mut service, mut inner) = testing::layer(TimeoutLayer::new(LIMIT));
        let response = service.call(testing::call("x"));
        let progress =
            || Frame::Notification(Notification { method: Method::Progress, params: Params::default() });
        let frames = stream::repeat_with(move || Ok(progress())).then(|frame| async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            frame
        });
        inner.answer(McpResponse::new(Payload::Stream(Box::pin(frames)))).await;
        let error = response.await.unwrap().into_payload().settle().await.unwrap_err();
        assert_eq!(error.downcast_ref(), Some(&Elapsed { after: LIMIT }));
    }

    #[tokio::test(start_paused = true)]
    async fn a_subscription_may_stay_open() {
        let (mut service, mut inner) = testing::layer(TimeoutLayer::new(LIMIT));
        let response = service.call(McpRequest::bare(Method::Listen));
        let frames = stream::once(async {
            tokio::time::sleep(LIMIT * 10).await;
            Ok(Frame::Final(Payload::Value(serde_json::json!({}))))
        });
        inner.answer(McpResponse::new(Payload::Stream(Box::pin(frames)))).await;
        assert!(response.await.unwrap().into_payload().settle().await.is_ok());
    }
}
