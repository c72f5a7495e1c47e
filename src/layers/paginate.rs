//! Pages of a list, cut after every filter has had its say.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tower::{Layer, Service};

use crate::{
    BoxError, McpService,
    error::InvalidParams,
    protocol::{Cursor, ItemKind, McpRequest, McpResponse, Payload},
};

/// Cuts lists into pages and reads cursors. It stands outside `access`, so that a page is full of what the caller
/// may see. Inside of it, a list is always whole.
///
/// ```
/// # use portcullis::layers::PaginateLayer;
/// let layer = PaginateLayer::new(500);
/// ```
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct PaginateLayer {
    size: usize,
}

impl PaginateLayer {
    /// Pages of `size` items, at least 1.
    pub fn new(size: usize) -> Self {
        PaginateLayer { size: size.max(1) }
    }
}

/// Many clients read the first page only; this one holds more tools than any model can use.
impl Default for PaginateLayer {
    fn default() -> Self {
        Self::new(10_000)
    }
}

/// Made by [`PaginateLayer`].
#[derive(Clone, Debug)]
pub struct Paginate<S> {
    inner: S,
    size: usize,
}

impl<S> Layer<S> for PaginateLayer {
    type Service = Paginate<S>;

    fn layer(&self, inner: S) -> Paginate<S> {
        Paginate { inner, size: self.size }
    }
}

impl<S: McpService> Service<McpRequest> for Paginate<S> {
    type Response = McpResponse;
    type Error = BoxError;
    type Future = PaginateFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: McpRequest) -> Self::Future {
        let state = if ItemKind::of(request.method()).is_none() {
            State::Pass { inner: self.inner.call(request) }
        } else {
            match cursor(&request) {
                Ok(cursor) => State::Cut { inner: self.inner.call(request), cursor, size: self.size },
                Err(error) => State::Refused { error: Some(error) },
            }
        };
        PaginateFuture { state }
    }
}

/// The cursor, when there is one. An empty string is one the gateway never gives out.
fn cursor(request: &McpRequest) -> Result<Option<Cursor>, InvalidParams> {
    match request.params().get("cursor") {
        None | Some("null") => Ok(None),
        Some(_) => match request.params().get_string("cursor").map(|text| text.parse()) {
            Some(Ok(cursor)) => Ok(Some(cursor)),
            _ => Err(InvalidParams("Invalid cursor".into())),
        },
    }
}

pin_project! {
    /// Made by [`Paginate`].
    pub struct PaginateFuture<F> {
        #[pin]
        state: State<F>,
    }
}

pin_project! {
    #[project = Projected]
    enum State<F> {
        // Not a list.
        Pass { #[pin] inner: F },
        // A list to cut.
        Cut { #[pin] inner: F, cursor: Option<Cursor>, size: usize },
        // A cursor that is none.
        Refused { error: Option<InvalidParams> },
    }
}

impl<F, E> Future for PaginateFuture<F>
where
    F: Future<Output = Result<McpResponse, E>>,
    E: Into<BoxError>,
{
    type Output = Result<McpResponse, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().state.project() {
            Projected::Pass { inner } => inner.poll(cx).map_err(Into::into),
            Projected::Refused { error } => {
                Poll::Ready(Err(error.take().expect("a future is not polled after it is done").into()))
            }
            Projected::Cut { inner, cursor, size } => {
                let (payload, extensions) = ready!(inner.poll(cx)).map_err(Into::into)?.into_parts();
                let payload = match payload {
                    Payload::Items(list) => {
                        let from = cursor.as_ref().map_or(0, |c| c.position_in(&list));
                        Payload::Items(list.page(from, *size))
                    }
                    payload => payload,
                };
                Poll::Ready(Ok(McpResponse::from_parts(payload, extensions)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        protocol::{Method, Params},
        testing,
    };

    #[tokio::test]
    async fn a_cursor_leads_to_the_next_page() {
        let (mut service, mut inner) = testing::layer(PaginateLayer::new(2));
        let first = service.call(McpRequest::bare(Method::ToolsList));
        inner.answer(testing::tools(&["a", "b", "c"])).await;
        let page = first.await.unwrap().payload().to_value().unwrap();
        assert_eq!(page["tools"].as_array().unwrap().len(), 2);
        let params = Params::from_value(&serde_json::json!({ "cursor": page["nextCursor"] }));
        let second = service.call(McpRequest::new(Method::ToolsList, params));
        inner.answer(testing::tools(&["a", "b", "c"])).await;
        let page = second.await.unwrap().payload().to_value().unwrap();
        assert_eq!(page["tools"][0]["name"], "c");
        assert!(page.get("nextCursor").is_none());
    }

    #[tokio::test]
    async fn a_made_up_cursor_is_refused() {
        for cursor in [serde_json::json!("!"), serde_json::json!(3), serde_json::json!("")] {
            let (mut service, _inner) = testing::layer(PaginateLayer::new(2));
            let params = Params::from_value(&serde_json::json!({ "cursor": cursor }));
            let error = service.call(McpRequest::new(Method::ToolsList, params)).await.unwrap_err();
            assert!(error.is::<InvalidParams>());
        }
    }
}
