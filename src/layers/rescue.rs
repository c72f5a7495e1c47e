//! Errors become answers, here and nowhere else.
//!
//! One table maps an error's type to a JSON-RPC error or, for `tools/call`, to a result with `isError`: a model can
//! read that and do something else, which it cannot with a protocol error. The client gets the public text only;
//! the whole chain goes to the log.
//!
//! ```
//! use portcullis::{error::Refusal, layers::RescueLayer, protocol::McpRequest};
//! use tower::{ServiceBuilder, ServiceExt as _, service_fn};
//!
//! # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
//! let service = ServiceBuilder::new().layer(RescueLayer::new()).service(service_fn(|_: McpRequest| async {
//!     Err::<portcullis::protocol::McpResponse, _>(Refusal::new("asleep", "come back at nine"))
//! }));
//! let answer = service.oneshot(McpRequest::call_tool("open", serde_json::json!({}))).await.unwrap();
//! let result = answer.payload().to_value().unwrap();
//! assert_eq!((&result["isError"], &result["structuredContent"]["code"]), (&true.into(), &"asleep".into()));
//! # });
//! ```

use std::{
    borrow::Cow,
    error::Error,
    pin::Pin,
    task::{Context, Poll, ready},
};

use futures_util::StreamExt as _;
use http::{HeaderValue, StatusCode, header};
use pin_project_lite::pin_project;
use serde_json::{Value, json};
use tower::{Layer, Service};

use crate::{
    BoxError, McpService,
    error::{
        Chain, Elapsed, HeaderMismatch, InvalidParams, Overloaded, Refusal, Unimplemented, Unknown,
        UpstreamError,
    },
    protocol::{Frame, HttpHint, McpRequest, McpResponse, Method, Payload, RpcError, Target, code},
};

/// Turns every error into an answer. It stands outermost, so that all layers inside may simply fail.
#[derive(Clone, Copy, Debug, Default)]
#[must_use]
pub struct RescueLayer(());

impl RescueLayer {
    /// The layer.
    pub fn new() -> Self {
        Self::default()
    }
}

/// Made by [`RescueLayer`].
#[derive(Clone, Debug)]
pub struct Rescue<S> {
    inner: S,
}

impl<S> Layer<S> for RescueLayer {
    type Service = Rescue<S>;

    fn layer(&self, inner: S) -> Rescue<S> {
        Rescue { inner }
    }
}

impl<S: McpService> Service<McpRequest> for Rescue<S> {
    type Response = McpResponse;
    type Error = BoxError;
    type Future = RescueFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: McpRequest) -> Self::Future {
        let asked = Asked::of(&request);
        RescueFuture { inner: self.inner.call(request), asked: Some(asked) }
    }
}

pin_project! {
    /// Made by [`Rescue`].
    pub struct RescueFuture<F> {
        #[pin]
        inner: F,
        asked: Option<Asked>,
    }
}

impl<F, E> Future for RescueFuture<F>
where
    F: Future<Output = Result<McpResponse, E>>,
    E: Into<BoxError>,
{
    type Output = Result<McpResponse, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let outcome = ready!(this.inner.poll(cx));
        let asked = this.asked.take().expect("a future is not polled after it is done");
        Poll::Ready(Ok(match outcome {
            Ok(response) => rescue_stream(response, asked),
            Err(error) => answer(error.into(), &asked),
        }))
    }
}

/// What was asked, as far as the answer to an error depends on it.
#[derive(Clone, Debug)]
pub struct Asked {
    method: Method,
    target: Option<Target>,
}

impl Asked {
    /// Remembers it.
    pub fn of(request: &McpRequest) -> Self {
        Asked { method: request.method().clone(), target: request.target().cloned() }
    }
}

/// The answer to an error. Logs the chain.
pub fn answer(error: BoxError, asked: &Asked) -> McpResponse {
    let verdict = Verdict::of(&*error);
    let target = asked.target.as_ref().map(|t| &**t.name()).unwrap_or_default();
    match verdict.severity {
        Severity::Defect => {
            tracing::error!(method = %asked.method, target, error = %Chain(&*error), "request failed")
        }
        Severity::Upstream => {
            tracing::warn!(method = %asked.method, target, error = %Chain(&*error), "request failed")
        }
        Severity::Client => {
            tracing::debug!(method = %asked.method, target, error = %Chain(&*error), "request refused")
        }
    }
    let as_result = asked.method == Method::ToolsCall && verdict.in_tool_result;
    let mut response = match as_result {
        true => McpResponse::value(verdict.tool_result()),
        false => McpResponse::error(verdict.rpc_error()),
    };
    if let Some(hint) = verdict.hint(as_result) {
        response.extensions_mut().insert(hint);
    }
    response
}

/// An error in the middle of a stream becomes its last frame.
fn rescue_stream(response: McpResponse, asked: Asked) -> McpResponse {
    match response.into_parts() {
        (Payload::Stream(frames), extensions) => {
            let frames = frames.map(move |frame| {
                Ok(frame.unwrap_or_else(|error| Frame::Final(answer(error, &asked).into_payload())))
            });
            McpResponse::from_parts(Payload::Stream(Box::pin(frames)), extensions)
        }
        (payload, extensions) => McpResponse::from_parts(payload, extensions),
    }
}

/// One row of the table, filled in.
struct Verdict {
    code: i64,
    /// The word for `code` in a tool result.
    word: Cow<'static, str>,
    public: String,
    details: Value,
    status: StatusCode,
    in_tool_result: bool,
    severity: Severity,
}

enum Severity {
    Client,
    Upstream,
    Defect,
}

impl Verdict {
    /// The table.
    fn of(error: &(dyn Error + 'static)) -> Verdict {
        if let Some(Unknown(target)) = find(error) {
            let what = match target {
                Target::Resource(_) => "Resource not found",
                Target::Tool(_) => "Unknown tool",
                Target::Prompt(_) => "Unknown prompt",
                Target::Template(_) => "Unknown resource template",
                Target::Task(_) => "Unknown task",
            };
            let details = match target {
                Target::Resource(uri) => json!({ "uri": uri }),
                _ => Value::Null,
            };
            let public = format!("{what}: {}", target.name());
            return Verdict { details, ..Verdict::refusal(code::INVALID_PARAMS, StatusCode::OK, public) };
        }
        if let Some(e) = find::<Unimplemented>(error) {
            let public = format!("Method not found: {}", e.0);
            return Verdict::refusal(code::METHOD_NOT_FOUND, StatusCode::NOT_FOUND, public);
        }
        if let Some(e) = find::<InvalidParams>(error) {
            return Verdict::refusal(code::INVALID_PARAMS, StatusCode::OK, e.to_string());
        }
        if let Some(e) = find::<HeaderMismatch>(error) {
            return Verdict::refusal(code::HEADER_MISMATCH, StatusCode::BAD_REQUEST, e.to_string());
        }
        if let Some(e) = find::<Refusal>(error) {
            let (word, public, details) = (e.code.clone(), e.message.clone(), e.details.clone());
            return Verdict::failure(code::REFUSED, word, public, details, StatusCode::OK);
        }
        if let Some(e) = find::<Overloaded>(error) {
            let details = json!({ "limit": e.limit });
            let public = format!("too many requests at once: {} are under way; try again shortly", e.limit);
            return Verdict::failure(
                code::OVERLOADED,
                "overloaded",
                public,
                details,
                StatusCode::TOO_MANY_REQUESTS,
            );
        }
        if let Some(e) = find::<Elapsed>(error) {
            let details = json!({ "after_ms": e.after.as_millis() as u64 });
            return Verdict::failure(
                code::TIMED_OUT,
                "timed_out",
                e.to_string(),
                details,
                StatusCode::GATEWAY_TIMEOUT,
            );
        }
        if let Some(e) = find::<UpstreamError>(error) {
            return Verdict::of_upstream(e);
        }
        Verdict {
            severity: Severity::Defect,
            ..Verdict::failure(
                code::INTERNAL_ERROR,
                "internal",
                "internal error".to_owned(),
                Value::Null,
                StatusCode::INTERNAL_SERVER_ERROR,
            )
        }
    }

    fn of_upstream(error: &UpstreamError) -> Verdict {
        use crate::error::Fault;
        let (code, word, status) = match error.fault {
            Fault::Garbled | Fault::TooLarge => (code::BAD_UPSTREAM, "bad_upstream", StatusCode::BAD_GATEWAY),
            Fault::Lost | Fault::Unreachable | Fault::Unauthorized | Fault::Misconfigured => {
                (code::UNAVAILABLE, "unavailable", StatusCode::SERVICE_UNAVAILABLE)
            }
        };
        let details = json!({ "upstream": error.upstream });
        Verdict {
            severity: Severity::Upstream,
            ..Verdict::failure(code, word, error.public(), details, status)
        }
    }

    /// The client's mistake: a protocol error, whatever the method.
    fn refusal(code: i64, status: StatusCode, public: String) -> Verdict {
        let (details, severity) = (Value::Null, Severity::Client);
        Verdict { code, word: "invalid".into(), public, details, status, in_tool_result: false, severity }
    }

    /// A failure: for a tool call, a result the model can read.
    fn failure(
        code: i64,
        word: impl Into<Cow<'static, str>>,
        public: String,
        details: Value,
        status: StatusCode,
    ) -> Verdict {
        let word = word.into();
        Verdict { code, word, public, details, status, in_tool_result: true, severity: Severity::Client }
    }

    fn tool_result(&self) -> Value {
        json!({
            "resultType": "complete",
            "content": [{ "type": "text", "text": self.public }],
            "structuredContent": { "error": self.public, "code": self.word, "details": self.details },
            "isError": true,
        })
    }

    fn rpc_error(&self) -> RpcError {
        let error = RpcError::new(self.code, self.public.clone());
        if self.details.is_null() { error } else { error.with_data(&self.details) }
    }

    fn hint(&self, as_result: bool) -> Option<HttpHint> {
        let mut hint = HttpHint::default();
        if self.code == code::OVERLOADED {
            hint.headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        hint.status = (!as_result && self.status != StatusCode::OK).then_some(self.status);
        (hint.status.is_some() || !hint.headers.is_empty()).then_some(hint)
    }
}

/// The first error of type `E` in the chain: layers in between may have wrapped it.
fn find<'a, E: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a E> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{error::Fault, testing};

    async fn rescued(request: McpRequest, error: impl Into<BoxError>) -> McpResponse {
        let (mut service, mut inner) = testing::layer(RescueLayer::new());
        let response = service.call(request);
        inner.fail(error).await;
        response.await.unwrap()
    }

    #[tokio::test]
    async fn a_failed_tool_call_is_a_result_the_model_can_read() {
        let error = UpstreamError::new(
            &"files".parse().unwrap(),
            Fault::Unreachable,
            "connect to /secret/path refused",
        );
        let response = rescued(testing::call("files_read"), error).await;
        let result = response.payload().to_value().unwrap();
        assert_eq!(result["isError"], true);
        assert_eq!(result["structuredContent"]["code"], "unavailable");
        assert_eq!(result["structuredContent"]["details"]["upstream"], "files");
        assert!(!result.to_string().contains("secret"));
    }

    #[tokio::test]
    async fn an_unknown_tool_is_a_protocol_error() {
        let response = rescued(testing::call("nope"), Unknown(Target::Tool("nope".into()))).await;
        let Payload::Error(error) = response.payload() else { panic!() };
        assert_eq!((error.code(), error.message()), (code::INVALID_PARAMS, "Unknown tool: nope"));
    }

    #[tokio::test]
    async fn a_foreign_error_says_nothing_of_itself() {
        let response = rescued(McpRequest::bare(Method::ToolsList), "password is hunter2").await;
        let Payload::Error(error) = response.payload() else { panic!() };
        assert_eq!((error.code(), error.message()), (code::INTERNAL_ERROR, "internal error"));
    }

    #[tokio::test]
    async fn an_error_within_a_stream_ends_it_with_an_answer() {
        let (mut service, mut inner) = testing::layer(RescueLayer::new());
        let response = service.call(McpRequest::bare(Method::PromptsGet));
        let frames = futures_util::stream::iter([Err::<Frame, BoxError>(Box::new(Overloaded { limit: 1 }))]);
        inner.answer(McpResponse::new(Payload::Stream(Box::pin(frames)))).await;
        let settled = response.await.unwrap().into_payload().settle().await.unwrap();
        assert!(matches!(settled, Payload::Error(e) if e.code() == code::OVERLOADED));
    }
}
