//! Upstreams that rmcp speaks with: a [`ServerHandler`] inside this process, or any [`Peer`] somebody connected.
//!
//! A handler is served over an in-memory pipe, and the gateway's own client speaks on the other end, so nothing is
//! lost between them but what rmcp's server loses.
//!
//! ```
//! use portcullis::{protocol::McpRequest, upstream::PeerUpstream};
//! use rmcp::{ServerHandler, model::ServerConfig};
//! use tower::ServiceExt as _;
//!
//! struct Empty;
//! impl ServerHandler for Empty {
//!     fn get_info(&self) -> ServerConfig {
//!         ServerConfig::default()
//!     }
//! }
//!
//! # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
//! let upstream = PeerUpstream::serve("empty".parse()?, Empty);
//! let answer = upstream.oneshot(McpRequest::bare("server/discover".into())).await?;
//! assert!(answer.payload().to_object().unwrap().get("capabilities").is_some());
//! # Ok::<(), portcullis::BoxError>(()) }).unwrap();
//! ```
//!
//! A foreign peer is rmcp's client, with rmcp's types in between. What that costs:
//!
//! - Members of a result that its type does not know are lost, where rmcp takes the result for one of its types. Key
//!   order and numbers beyond 64 bits are lost everywhere.
//! - Progress, log messages and a legacy server's change notifications go to the peer's own handler; the gateway
//!   never sees them, and a listener to a legacy server is promised nothing.
//! - A legacy server sees the client the peer was connected as, not the gateway's.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt as _, future::BoxFuture, stream};
use rmcp::{
    RoleClient, ServerHandler, ServiceExt as _,
    model::{
        ClientNotification, ClientRequest, CustomNotification, CustomRequest, RequestMetaObject,
        ServerNotification, SubscriptionFilter,
    },
    service::{Peer, PeerRequestOptions, RequestHandle, ServiceError, Subscription, SubscriptionEnd},
};
use serde_json::{Value, json};
use tokio::{io::DuplexStream, task::AbortHandle};
use tower::Service;

use super::{
    lines::{self, Lines, Owner, Place, Surroundings, Unopened, Wire},
    translate,
};
use crate::{
    BoxError,
    error::{Fault, UpstreamError},
    protocol::{
        Era, Frame, ListenFilter, McpRequest, McpResponse, Method, Notification, Params, Payload,
        ProtocolVersion, RawObject, RequestId, RpcError, ServerName, Unsolicited, code, meta, sign_result,
    },
};

/// How much the in-memory pipe holds before a side has to wait.
const PIPE: usize = 64 * 1024;
/// How often a listener to a legacy peer looks whether the peer is still there.
const LOOK: Duration = Duration::from_secs(5);

/// A client of an rmcp server.
#[derive(Clone)]
pub struct PeerUpstream {
    name: ServerName,
    way: Way,
}

#[derive(Clone)]
enum Way {
    Served(Arc<Served>),
    Foreign(Foreign),
}

impl PeerUpstream {
    /// Serves `handler` inside this process, from the first request on.
    pub fn serve<H: ServerHandler>(name: ServerName, handler: H) -> Self {
        let handler = Arc::new(handler);
        let serve: Serve = Arc::new(move |pipe| {
            let handler = handler.clone();
            Box::pin(async move {
                match handler.serve(pipe).await {
                    Ok(running) => match running.waiting().await {
                        Ok(reason) => format!("the handler's service ended: {reason:?}"),
                        Err(error) => format!("the handler's service failed: {error}"),
                    },
                    Err(error) => format!("the handler's service did not start: {error}"),
                }
            })
        });
        let place = Place::new(&name, Arc::new(Owner::everybody()));
        let served = Served { place, serve, era: Arc::default() };
        PeerUpstream { name, way: Way::Served(Arc::new(served)) }
    }

    /// Speaks through a peer that is connected already. When its connection ends, so does this upstream. See the
    /// [module](self) for what is lost on the way.
    pub fn new(name: ServerName, peer: Peer<RoleClient>) -> Self {
        PeerUpstream { name: name.clone(), way: Way::Foreign(Foreign { name, peer }) }
    }
}

impl Service<McpRequest> for PeerUpstream {
    type Response = McpResponse;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<McpResponse, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: McpRequest) -> Self::Future {
        let (name, way) = (self.name.clone(), self.way.clone());
        Box::pin(async move {
            match way {
                Way::Served(served) => served.call(&name, request).await,
                Way::Foreign(foreign) => foreign.call(request).await,
            }
        })
    }
}

impl fmt::Debug for PeerUpstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerUpstream").field("name", &self.name).finish_non_exhaustive()
    }
}

// === A handler in this process ===

struct Served {
    place: Place,
    serve: Serve,
    era: Arc<Mutex<Option<Era>>>,
}

/// Serves the handler on a pipe until one of them ends, and says why.
type Serve = Arc<dyn Fn(DuplexStream) -> BoxFuture<'static, String> + Send + Sync>;

impl Served {
    async fn call(&self, name: &ServerName, request: McpRequest) -> Result<McpResponse, BoxError> {
        let (serve, era) = (self.serve.clone(), self.era.clone());
        self.place.call(request, |owner| connect(name.clone(), serve, era, owner)).await
    }
}

async fn connect(
    name: ServerName,
    serve: Serve,
    era: Arc<Mutex<Option<Era>>>,
    owner: Arc<Owner>,
) -> Result<Lines, UpstreamError> {
    let known = *era.lock().unwrap_or_else(PoisonError::into_inner);
    let opened = match start(&name, &serve, known, &owner).await {
        Err(Unopened { probed: true, .. }) => start(&name, &serve, Some(Era::Legacy), &owner).await,
        outcome => outcome,
    };
    let (lines, found) = opened.map_err(|unopened| unopened.error)?;
    *era.lock().unwrap_or_else(PoisonError::into_inner) = Some(found);
    Ok(lines)
}

async fn start(
    name: &ServerName,
    serve: &Serve,
    known: Option<Era>,
    owner: &Arc<Owner>,
) -> Result<(Lines, Era), Unopened> {
    let (ours, theirs) = tokio::io::duplex(PIPE);
    let task = tokio::spawn(serve(theirs));
    let serving = Serving(task.abort_handle());
    let around = Surroundings {
        max_line: lines::MAX_LINE,
        gone: Box::pin(
            async move { task.await.unwrap_or_else(|error| format!("the handler failed: {error}")) },
        ),
        closing: Box::pin(std::future::pending()),
    };
    let (read, write) = tokio::io::split(ours);
    let wire = Wire::start(name, read, write, around);
    let opened = lines::open(&wire, known, owner).await?;
    let era = opened.era();
    Ok((Lines::new(wire, opened, serving), era))
}

/// The task that serves the other end.
struct Serving(AbortHandle);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.abort();
    }
}

// === Somebody else's peer ===

#[derive(Clone)]
struct Foreign {
    name: ServerName,
    peer: Peer<RoleClient>,
}

impl Foreign {
    async fn call(self, request: McpRequest) -> Result<McpResponse, BoxError> {
        if request.extensions().get::<Unsolicited>().is_some() {
            // What nobody asked for goes to the peer's own handler.
            return Ok(McpResponse::new(Payload::Stream(Box::pin(stream::empty()))));
        }
        let Some(info) = self.peer.peer_info() else {
            return Err(self.fail(Fault::Misconfigured, "the peer is not initialized").into());
        };
        let era = if info.protocol_version.has_initialize() { Era::Legacy } else { Era::Modern };
        match request.method() {
            method if request.id().is_none() && method.is_notification() => Ok(self.notify(&request).await?),
            Method::Discover => {
                let info = RawObject::parse(json_of(&*info).into());
                let info = info.map_err(|error| self.fail(Fault::Garbled, error))?;
                Ok(McpResponse::raw(translate::discover_result(&info)))
            }
            Method::Listen if era == Era::Modern => Ok(self.listen(&request).await?),
            Method::Listen => Ok(self.listen_to_nothing()),
            _ => self.forward(&request, era).await,
        }
    }

    async fn forward(&self, request: &McpRequest, era: Era) -> Result<McpResponse, BoxError> {
        let params = match era {
            Era::Modern => translate::modern_params(request, ProtocolVersion::LATEST),
            Era::Legacy => translate::checked_legacy_params(request)?,
        };
        let params = match params.is_present().then(|| params.typed::<Value>()).transpose() {
            Ok(params) => params,
            // A number that rmcp cannot carry.
            Err(error) => {
                return Ok(McpResponse::error(RpcError::new(code::INVALID_PARAMS, error.to_string())));
            }
        };
        let mut options = PeerRequestOptions::no_options();
        if let Some(m) = params.as_ref().and_then(|params| params.get("_meta")) {
            // What stands here wins over what the peer would say of itself.
            options.meta = serde_json::from_value::<RequestMetaObject>(m.clone()).ok();
        }
        let custom = CustomRequest::new(request.method().as_str(), params);
        let sent = self.peer.send_request_with_option(ClientRequest::CustomRequest(custom), options).await;
        let mut call = ForeignCall(Some(sent.map_err(|error| self.error(error))?));
        match call.answer().await {
            Ok(result) => {
                let result = Payload::Raw(result);
                Ok(McpResponse::new(match era {
                    Era::Modern => sign_result(&self.name, result),
                    Era::Legacy => result,
                }))
            }
            Err(ServiceError::McpError(error)) => match RpcError::parse(json_of(&error).into()) {
                Ok(error) => Ok(McpResponse::error(error)),
                Err(error) => Err(self.fail(Fault::Garbled, error).into()),
            },
            Err(error) => Err(self.error(error).into()),
        }
    }

    async fn notify(&self, notification: &McpRequest) -> Result<McpResponse, UpstreamError> {
        // These two are about the caller's own connection.
        if !matches!(notification.method(), Method::Cancelled | Method::Initialized) {
            let params = translate::legacy_params(notification);
            let params = params.is_present().then(|| params.typed().ok()).flatten();
            let custom = CustomNotification::new(notification.method().as_str(), params);
            let sent = self.peer.send_notification(ClientNotification::CustomNotification(custom)).await;
            sent.map_err(|error| self.error(error))?;
        }
        Ok(McpResponse::raw("{}"))
    }

    async fn listen(&self, request: &McpRequest) -> Result<McpResponse, UpstreamError> {
        let filter = ListenFilter::of(request.params()).to_value();
        let filter: SubscriptionFilter =
            serde_json::from_value(filter).map_err(|error| self.fail(Fault::Garbled, error))?;
        let subscription = match self.peer.listen(filter).await {
            Ok(subscription) => subscription,
            Err(ServiceError::McpError(error)) => {
                let error = RpcError::parse(json_of(&error).into());
                return error.map(McpResponse::error).map_err(|error| self.fail(Fault::Garbled, error));
            }
            Err(error) => return Err(self.error(error)),
        };
        let own = request.id().cloned();
        let acknowledged = json!({ "notifications": subscription.acknowledged(), "_meta": {} });
        let mut params = Params::from_value(&acknowledged);
        name_subscription(&mut params, own.as_ref());
        let first = Frame::Notification(Notification { method: Method::Acknowledged, params });
        let open = Some((self.clone(), subscription, own));
        let rest = stream::unfold(open, |open| async move {
            let (foreign, mut subscription, own) = open?;
            Some(match foreign.next(&mut subscription, own.as_ref()).await {
                Ok(Frame::Final(payload)) => (Ok(Frame::Final(payload)), None),
                Ok(frame) => (Ok(frame), Some((foreign, subscription, own))),
                Err(error) => (Err(BoxError::from(error)), None),
            })
        });
        Ok(McpResponse::new(Payload::Stream(Box::pin(stream::iter([Ok(first)]).chain(rest)))))
    }

    async fn next(
        &self,
        subscription: &mut Subscription,
        own: Option<&RequestId>,
    ) -> Result<Frame, UpstreamError> {
        if let Some(notification) = subscription.next().await.map_err(|error| self.error(error))? {
            let notification = untyped(&notification).ok_or_else(|| self.fail(Fault::Garbled, "not MCP"))?;
            let Notification { method, mut params } = notification;
            name_subscription(&mut params, own);
            return Ok(Frame::Notification(Notification { method, params }));
        }
        match subscription.end() {
            Some(SubscriptionEnd::Graceful(_) | SubscriptionEnd::Cancelled) => {
                Ok(Frame::Final(Payload::Value(json!({ "resultType": "complete" }))))
            }
            end => Err(self.fail(Fault::Lost, format!("the subscription ended: {end:?}"))),
        }
    }

    /// Promises nothing, and lasts as long as the peer.
    fn listen_to_nothing(self) -> McpResponse {
        let first = Frame::Notification(ListenFilter::default().acknowledged());
        let rest = stream::unfold(self.peer, |peer| async move {
            while !peer.is_transport_closed() {
                tokio::time::sleep(LOOK).await;
            }
            None
        });
        McpResponse::new(Payload::Stream(Box::pin(stream::iter([Ok(first)]).chain(rest))))
    }

    fn error(&self, error: ServiceError) -> UpstreamError {
        let fault = match error {
            ServiceError::UnexpectedResponse => Fault::Garbled,
            _ => Fault::Lost,
        };
        self.fail(fault, error)
    }

    fn fail(&self, fault: Fault, reason: impl Into<BoxError>) -> UpstreamError {
        UpstreamError::new(&self.name, fault, reason)
    }
}

/// A request under way. Dropped before its end, it is cancelled.
struct ForeignCall(Option<RequestHandle<RoleClient>>);

impl ForeignCall {
    async fn answer(&mut self) -> Result<Bytes, ServiceError> {
        let handle = self.0.as_mut().ok_or(ServiceError::TransportClosed)?;
        let outcome = (&mut handle.rx).await;
        self.0 = None;
        Ok(json_of(&outcome.map_err(|_| ServiceError::TransportClosed)??).into())
    }
}

impl Drop for ForeignCall {
    fn drop(&mut self) {
        let (Some(handle), Ok(runtime)) = (self.0.take(), tokio::runtime::Handle::try_current()) else {
            return;
        };
        // Ends as soon as the peer has taken the message, or is gone.
        runtime.spawn(async move { handle.cancel(None).await });
    }
}

fn untyped(notification: &ServerNotification) -> Option<Notification> {
    let object = RawObject::parse(json_of(notification).into()).ok()?;
    let method = Method::from(&*object.get_string("method")?);
    let params = object.get_bytes("params").and_then(|params| Params::parse(params).ok());
    Some(Notification { method, params: params.unwrap_or_default() })
}

/// Puts the caller's own id where the peer's stands.
fn name_subscription(params: &mut Params, own: Option<&RequestId>) {
    if let (Some(own), Some(mut m)) = (own, params.meta().cloned()) {
        m.set(meta::SUBSCRIPTION_ID, own.as_str());
        params.object_mut().set("_meta", m.as_str());
    }
}

fn json_of<T: serde::Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("rmcp's types are JSON")
}

#[cfg(test)]
mod tests {
    use std::{
        borrow::Cow,
        sync::atomic::{AtomicUsize, Ordering},
    };

    use rmcp::{
        ClientServiceExt as _,
        model::{
            CallToolRequestParams, CallToolResponse, CallToolResult, ContentBlock, ErrorData,
            ProgressNotificationParam, ServerCapabilities, ServerConfig,
        },
        service::{ClientLifecycleMode, RequestContext, RoleServer, RunningService, SubscriptionContext},
    };
    use tower::ServiceExt as _;

    use super::*;

    /// `wait` waits until it is cancelled; everything else reports progress once and answers.
    #[derive(Clone, Default)]
    struct Handler {
        legacy: bool,
        cancelled: Arc<AtomicUsize>,
    }

    impl ServerHandler for Handler {
        fn get_info(&self) -> ServerConfig {
            ServerConfig::new(ServerCapabilities::builder().enable_tools().enable_tool_list_changed().build())
        }

        fn supported_protocol_versions(&self) -> Cow<'static, [rmcp::model::ProtocolVersion]> {
            match self.legacy {
                true => Cow::Borrowed(&[rmcp::model::ProtocolVersion::V_2025_11_25]),
                false => Cow::Borrowed(rmcp::model::ProtocolVersion::KNOWN_VERSIONS),
            }
        }

        async fn call_tool(
            &self,
            request: CallToolRequestParams,
            context: RequestContext<RoleServer>,
        ) -> Result<CallToolResponse, ErrorData> {
            match &*request.name {
                "wait" => {
                    context.ct.cancelled().await;
                    self.cancelled.fetch_add(1, Ordering::SeqCst);
                    Err(ErrorData::internal_error("cancelled", None))
                }
                "fail" => Err(ErrorData::invalid_params("no such thing", Some(json!({ "a": 1 })))),
                name => {
                    if let Some(token) = context.meta.get_progress_token() {
                        let progress = ProgressNotificationParam::new(token, 1.0);
                        context.peer.notify_progress(progress).await.unwrap();
                    }
                    let caller = context.meta.client_info().map(|info| info.name).unwrap_or_default();
                    Ok(CallToolResult::success(vec![ContentBlock::text(format!("{name} for {caller}"))])
                        .into())
                }
            }
        }

        fn accepted_subscription_filter(&self, requested: &SubscriptionFilter) -> Option<SubscriptionFilter> {
            Some(requested.clone())
        }

        async fn listen(&self, subscription: SubscriptionContext) -> Result<(), ErrorData> {
            let _ = subscription.sink().notify_tool_list_changed().await;
            subscription.cancelled().await;
            Ok(())
        }
    }

    fn name() -> ServerName {
        "x".parse().unwrap()
    }

    fn call(tool: &str) -> McpRequest {
        McpRequest::call_tool(tool, json!({}))
    }

    async fn text(upstream: &PeerUpstream, request: McpRequest) -> String {
        let answer = upstream.clone().oneshot(request).await.unwrap().into_payload().settle().await.unwrap();
        let value = answer.to_value().unwrap_or_else(|| panic!("{answer:?}"));
        value["content"][0]["text"].as_str().unwrap().to_owned()
    }

    async fn foreign(handler: Handler) -> (PeerUpstream, RunningService<RoleClient, ()>) {
        let (ours, theirs) = tokio::io::duplex(PIPE);
        let lifecycle = match handler.legacy {
            true => ClientLifecycleMode::Initialize,
            false => ClientLifecycleMode::Discover {
                preferred_versions: vec![rmcp::model::ProtocolVersion::V_2026_07_28],
            },
        };
        tokio::spawn(async move { handler.serve(theirs).await.unwrap().waiting().await });
        let client = ().serve_with_lifecycle(ours, lifecycle).await.unwrap();
        (PeerUpstream::new(name(), client.peer().clone()), client)
    }

    async fn check(upstream: PeerUpstream, handler: Handler) {
        let discovered = upstream.clone().oneshot(McpRequest::bare(Method::Discover)).await.unwrap();
        let discovered = discovered.payload().to_value().unwrap();
        assert_eq!(discovered["capabilities"]["tools"], json!({ "listChanged": true }));

        let said = text(&upstream, call("hello")).await;
        assert_eq!(said, if handler.legacy { "hello for " } else { "hello for portcullis" });

        let failed = upstream.clone().oneshot(call("fail")).await.unwrap().into_payload();
        let Payload::Error(error) = failed else { panic!("{failed:?}") };
        let error: Value = serde_json::from_slice(error.as_bytes()).unwrap();
        assert_eq!(error, json!({ "code": -32602, "message": "no such thing", "data": { "a": 1 } }));

        let waiting = tokio::spawn(upstream.clone().oneshot(call("wait")));
        // Behind it on the same pipe.
        text(&upstream, call("hello")).await;
        waiting.abort();
        while handler.cancelled.load(Ordering::SeqCst) == 0 {
            text(&upstream, call("hello")).await;
        }
    }

    #[tokio::test]
    async fn a_handler_of_either_era_is_served() {
        for legacy in [false, true] {
            let handler = Handler { legacy, ..Handler::default() };
            let upstream = PeerUpstream::serve(name(), handler.clone());
            check(upstream.clone(), handler).await;
            let params = json!({ "name": "hello", "_meta": { "progressToken": "p" } });
            let request = McpRequest::new(Method::ToolsCall, Params::from_value(&params));
            let Payload::Stream(mut frames) = upstream.oneshot(request).await.unwrap().into_payload() else {
                panic!("no progress")
            };
            let Some(Ok(Frame::Notification(progress))) = frames.next().await else { panic!("no progress") };
            assert_eq!(progress.params.get("progressToken"), Some("\"p\""));
            assert!(matches!(frames.next().await, Some(Ok(Frame::Final(_)))));
        }
    }

    #[tokio::test]
    async fn a_foreign_peer_of_either_era_is_spoken_through() {
        for legacy in [false, true] {
            let handler = Handler { legacy, ..Handler::default() };
            let (upstream, client) = foreign(handler.clone()).await;
            check(upstream.clone(), handler).await;
            client.cancel().await.unwrap();
            let error = upstream.oneshot(call("hello")).await.unwrap_err();
            assert_eq!(error.downcast_ref::<UpstreamError>().unwrap().fault, Fault::Lost);
        }
    }

    #[tokio::test]
    async fn both_ways_listen() {
        let (peer, _client) = foreign(Handler::default()).await;
        for upstream in [peer, PeerUpstream::serve(name(), Handler::default())] {
            let params = Params::from_value(&json!({ "notifications": { "toolsListChanged": true } }));
            let request = McpRequest::new(Method::Listen, params).with_id(RequestId::from(4711));
            let Payload::Stream(mut frames) = upstream.oneshot(request).await.unwrap().into_payload() else {
                panic!("no stream")
            };
            for method in [Method::Acknowledged, Method::ToolsChanged] {
                let Some(Ok(Frame::Notification(n))) = frames.next().await else { panic!("it ended") };
                assert_eq!(n.method, method);
                assert_eq!(n.params.meta().unwrap().get(meta::SUBSCRIPTION_ID), Some("4711"));
            }
        }
    }

    #[tokio::test]
    async fn a_listener_to_a_legacy_peer_is_promised_nothing() {
        let (upstream, _client) = foreign(Handler { legacy: true, ..Handler::default() }).await;
        let params = Params::from_value(&json!({ "notifications": { "toolsListChanged": true } }));
        let answer = upstream.oneshot(McpRequest::new(Method::Listen, params)).await.unwrap();
        let Payload::Stream(mut frames) = answer.into_payload() else { panic!("no stream") };
        let Some(Ok(Frame::Notification(first))) = frames.next().await else { panic!("it ended") };
        assert_eq!(first.params.as_str(), r#"{"notifications":{}}"#);
    }
}
