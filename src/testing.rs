//! For testing a layer beside itself: a mock below it that can refuse readiness, and a caller above it that
//! respects readiness.
//!
//! ```
//! use portcullis::{layers::TimeoutLayer, protocol::McpResponse, testing};
//!
//! # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
//! let (mut service, mut inner) = testing::layer(TimeoutLayer::new(std::time::Duration::from_secs(1)));
//! let response = service.call(testing::call("add"));
//! inner.answer(McpResponse::raw("{}")).await;
//! assert!(response.await.is_ok());
//! # });
//! ```

use std::{
    future::poll_fn,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use futures_util::future::BoxFuture;
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
};
use tower::{Layer, Service};

use crate::{
    BoxError, McpService,
    protocol::{Item, ItemKind, ItemList, McpRequest, McpResponse, Payload},
};

/// Puts `layer` on a mock: what one calls, and what stands below.
pub fn layer<L>(layer: L) -> (Caller<L::Service>, Below)
where
    L: Layer<Mock, Service: McpService>,
{
    let (mock, below) = mock();
    (Caller { service: layer.layer(mock) }, below)
}

/// A mock service and the hand that moves it.
pub fn mock() -> (Mock, Below) {
    let (sender, requests) = mpsc::unbounded_channel();
    let ready = Arc::new(AtomicBool::new(true));
    (Mock { sender, ready: ready.clone(), polled: false }, Below { requests, ready })
}

/// A `tools/call` without arguments.
pub fn call(tool: &str) -> McpRequest {
    McpRequest::call_tool(tool, serde_json::json!({}))
}

/// An answer to `tools/list`: tools of an upstream named `mock`.
pub fn tools(names: &[&str]) -> McpResponse {
    let item = |name: &&str| Item {
        exposed: (*name).into(),
        server: "mock".parse().expect("a valid name"),
        own: (*name).into(),
        raw: format!(r#"{{"name":"{name}"}}"#).into(),
    };
    McpResponse::new(Payload::Items(ItemList::new(ItemKind::Tools, names.iter().map(item).collect())))
}

/// Calls a service the way tower wants it.
#[derive(Clone, Debug)]
pub struct Caller<S> {
    service: S,
}

impl<S: McpService> Caller<S> {
    /// Calls once. The call runs by itself; dropping what is returned cancels it.
    ///
    /// # Panics
    ///
    /// When the service is not ready.
    pub fn call(&mut self, request: McpRequest) -> Answer {
        assert!(self.poll_ready().is_ready(), "the service is not ready");
        let answer = self.service.call(request);
        Answer(tokio::spawn(async move { answer.await.map_err(Into::into) }))
    }

    /// The service.
    pub fn service(&self) -> &S {
        &self.service
    }

    /// Asks for readiness once.
    pub fn poll_ready(&mut self) -> Poll<Result<(), BoxError>> {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        self.service.poll_ready(&mut cx).map_err(Into::into)
    }
}

/// An answer under way.
#[derive(Debug)]
pub struct Answer(JoinHandle<Result<McpResponse, BoxError>>);

impl Future for Answer {
    type Output = Result<McpResponse, BoxError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx).map(|joined| joined.unwrap_or_else(|e| Err(e.into())))
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A service moved by a [`Below`]. It panics when it is called without having been polled ready: that is the
/// mistake layers make.
#[derive(Debug)]
pub struct Mock {
    sender: mpsc::UnboundedSender<Pending>,
    ready: Arc<AtomicBool>,
    polled: bool,
}

impl Clone for Mock {
    fn clone(&self) -> Self {
        Mock { sender: self.sender.clone(), ready: self.ready.clone(), polled: false }
    }
}

impl Service<McpRequest> for Mock {
    type Response = McpResponse;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<McpResponse, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.polled = self.ready.load(Ordering::SeqCst);
        if self.polled { Poll::Ready(Ok(())) } else { Poll::Pending }
    }

    fn call(&mut self, request: McpRequest) -> Self::Future {
        assert!(std::mem::take(&mut self.polled), "called without having been polled ready");
        let (reply, answer) = oneshot::channel();
        let sent = self.sender.send(Pending { request, reply });
        Box::pin(async move {
            sent.map_err(|_| "the mock is gone")?;
            answer.await.map_err(|_| BoxError::from("the mock did not answer"))?
        })
    }
}

/// What stands below the layer, in the test's hand.
#[derive(Debug)]
pub struct Below {
    requests: mpsc::UnboundedReceiver<Pending>,
    ready: Arc<AtomicBool>,
}

impl Below {
    /// Makes the mock ready or not.
    pub fn set_ready(&mut self, ready: bool) {
        self.ready.store(ready, Ordering::SeqCst);
    }

    /// The next request that came through.
    ///
    /// # Panics
    ///
    /// When none can come any more.
    pub async fn next_request(&mut self) -> Pending {
        self.requests.recv().await.expect("a request comes through")
    }

    /// Answers the next request.
    pub async fn answer(&mut self, response: McpResponse) -> McpRequest {
        self.next_request().await.answer(response)
    }

    /// Fails the next request.
    pub async fn fail(&mut self, error: impl Into<BoxError>) {
        let pending = self.next_request().await;
        let _ = pending.reply.send(Err(error.into()));
    }

    /// Whether no request came through.
    pub fn is_idle(&mut self) -> bool {
        self.requests.try_recv().is_err()
    }
}

/// A request that waits for its answer.
#[derive(Debug)]
pub struct Pending {
    /// The request as it came through.
    pub request: McpRequest,
    reply: oneshot::Sender<Result<McpResponse, BoxError>>,
}

impl Pending {
    /// Answers it.
    pub fn answer(self, response: McpResponse) -> McpRequest {
        let _ = self.reply.send(Ok(response));
        self.request
    }

    /// Waits until the caller gave up.
    pub async fn cancelled(&mut self) {
        poll_fn(|cx| self.reply.poll_closed(cx)).await;
    }
}
