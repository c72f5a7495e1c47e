//! The legacy era: sessions, and what is answered in them, whatever the door.
//!
//! A client that goes away has not cancelled anything (2025-11-25, transports): its call runs on. It cancels with a
//! notification.

mod converse;
mod session;

use std::{
    pin::Pin,
    sync::{Arc, Weak},
    task::{Context, Poll},
};

use bytes::Bytes;
use futures_util::{
    FutureExt as _, StreamExt as _,
    future::{AbortHandle, Aborted, BoxFuture, abortable},
};
use serde_json::{Value, json};

use self::converse::{Asked, Conversation};
pub(in crate::server) use self::session::{Session, Sessions, new_id};
use super::{
    call,
    message::{self, Chunks},
    refusal::Refusal,
    streams::Outlet,
};
use crate::{
    McpService,
    identity::{Affinity, Caller, Client, Principal, Scope, SessionToken},
    protocol::{
        Era, Frame, FrameStream, HttpHint, McpRequest, McpResponse, Method, Params, Payload, ProtocolVersion,
        RawObject, RequestId, ResultType, RpcError, Unsolicited, code, meta,
    },
};

/// How large `clientInfo` and `capabilities` may each be.
const MOST_ABOUT_CLIENT: usize = 16 * 1024;

/// What a request in a session comes to.
pub(in crate::server) enum Answer<S> {
    /// One message, and what an HTTP door says around it.
    Message(Chunks, Option<HttpHint>),
    /// There is more to say, or to ask, before the result.
    Talk(Box<Talk<S>>),
    /// It was cancelled.
    Nothing,
}

/// A conversation about to begin.
pub(in crate::server) struct Talk<S> {
    conversation: Conversation<S>,
    first: Payload,
    finish: Finish,
    pub(in crate::server) hint: Option<HttpHint>,
}

impl<S: McpService> Talk<S> {
    /// Whose it is.
    pub(in crate::server) fn session(&self) -> &Arc<Session> {
        &self.finish.session
    }

    /// Holds it. The messages go to `out`, the result last. It can be cancelled from now on.
    pub(in crate::server) fn hold(self, out: Arc<Outlet>) -> impl Future<Output = ()> + Send + 'static {
        let Talk { conversation, first, finish, .. } = self;
        let (session, id, number) = (finish.session.clone(), finish.id.clone(), finish.number);
        let (running, cancel) = abortable(async move {
            conversation.run(first, &out).await;
            drop(finish);
        });
        session.goes_on(&id, number, cancel);
        running.map(|_| ())
    }
}

/// What `initialize` is answered with, and the session of that client. `open` keeps it, if there is room.
pub(in crate::server) async fn initialize<S: McpService, T>(
    service: S,
    principal: Principal,
    scope: Scope,
    id: &RequestId,
    params: &Params,
    open: impl FnOnce(Caller) -> Option<T>,
) -> Result<(Chunks, Option<T>), Refusal> {
    let wrong = |message: &str| Refusal::new(Some(id.clone()), code::INVALID_PARAMS, message);
    let Some(requested) = params.get_string("protocolVersion") else {
        return Err(wrong("`protocolVersion` is missing or no string"));
    };
    // The handshake never leads to the modern era; what we do not know is answered with the newest it can lead to.
    let version = requested.parse().ok().filter(|v: &ProtocolVersion| v.era() == Era::Legacy);
    let version = version.unwrap_or(ProtocolVersion::LATEST_LEGACY);
    let object = |member: &str| match params.get(member) {
        None => Ok(None),
        // A session keeps them; nobody has that much to say of itself.
        Some(json) if json.len() > MOST_ABOUT_CLIENT => {
            Err(wrong("`capabilities` or `clientInfo` is too large"))
        }
        Some(json) if json.starts_with('{') => Ok(Some(Bytes::copy_from_slice(json.as_bytes()))),
        Some(_) => Err(wrong("`capabilities` and `clientInfo` must be objects")),
    };
    let client = Client {
        version,
        info: object("clientInfo")?,
        capabilities: object("capabilities")?.unwrap_or_else(|| Bytes::from_static(b"{}")),
        log_level: None,
    };
    let affinity = Affinity::Session(SessionToken::new());
    let caller = Caller { principal, scope, client, affinity };
    let discover = McpRequest::bare(Method::Discover).with_caller(Arc::new(caller.clone()));
    let discovered = call(service, discover).await.into_payload();
    let discovered = match discovered.to_object() {
        Some(discovered) => discovered,
        None => return Ok((message::response(id, &Method::Initialize, discovered, Era::Legacy), None)),
    };
    let Some(session) = open(caller) else {
        let message = "too many sessions are open; try again later";
        return Err(Refusal::new(Some(id.clone()), code::OVERLOADED, message));
    };
    let result = Payload::Raw(initialize_result(version, &discovered));
    Ok((message::response(id, &Method::Initialize, result, Era::Legacy), Some(session)))
}

/// A `server/discover` result as the answer to `initialize`.
fn initialize_result(version: ProtocolVersion, discovered: &RawObject) -> Bytes {
    let mut result = RawObject::empty();
    result.set("protocolVersion", format!("\"{version}\""));
    result.set("capabilities", discovered.get("capabilities").unwrap_or("{}"));
    let info = discovered.get_object("_meta").and_then(|m| Some(m.get(meta::SERVER_INFO)?.to_owned()));
    let ours = || json!({ "name": "portcullis", "version": env!("CARGO_PKG_VERSION") }).to_string();
    result.set("serverInfo", info.unwrap_or_else(ours));
    // Absent, not null: strict clients refuse that.
    if let Some(instructions) = discovered.get("instructions") {
        result.set("instructions", instructions);
    }
    result.into_bytes()
}

/// Answers a request of the session.
pub(in crate::server) async fn answer<S: McpService>(
    service: S,
    session: Arc<Session>,
    id: RequestId,
    method: Method,
    params: Params,
) -> Result<Answer<S>, Refusal> {
    let done = |payload| Ok(Answer::Message(message::response(&id, &method, payload, Era::Legacy), None));
    match method {
        Method::Ping => done(Payload::Value(json!({}))),
        Method::SetLevel => done(set_level(&session, &params)),
        Method::ResourcesSubscribe => done(subscribe(service, &session, &params).await),
        Method::ResourcesUnsubscribe => done(unsubscribe(&session, &params)),
        // Of the other era.
        Method::Discover | Method::Listen => {
            done(Payload::Error(RpcError::new(code::METHOD_NOT_FOUND, format!("Method not found: {method}"))))
        }
        _ => {
            let request = McpRequest::new(method, params).with_id(id.clone()).with_caller(session.caller());
            forward(service, session, id, request).await
        }
    }
}

/// Through the stack. The plain answer is one message; one that has more to say becomes a conversation.
async fn forward<S: McpService>(
    service: S,
    session: Arc<Session>,
    id: RequestId,
    request: McpRequest,
) -> Result<Answer<S>, Refusal> {
    let (running, cancel) = abortable(call(service.clone(), request.clone()));
    let Some(number) = session.start(&id, cancel) else {
        let message = "a request with this id is under way";
        return Err(Refusal::new(Some(id), code::INVALID_REQUEST, message));
    };
    let finish = Finish { session: session.clone(), id: id.clone(), number };
    let outcome = RunOn(Some((Box::pin(running), finish))).await;
    // Cancelled: the specification wants no answer.
    let Some((Ok(answered), finish)) = outcome else { return Ok(Answer::Nothing) };
    let (payload, mut extensions) = answered.into_parts();
    let hint = extensions.remove::<HttpHint>();
    let mark = ResultType::of(&payload);
    Ok(match (payload, mark) {
        (payload @ Payload::Stream(_), _) | (payload, ResultType::InputRequired) => {
            let conversation = Conversation { service, session, id, request, asked: Asked::default() };
            Answer::Talk(Box::new(Talk { conversation, first: payload, finish, hint }))
        }
        (payload, mark) => {
            Answer::Message(message::marked_response(&id, request.method(), payload, mark, Era::Legacy), hint)
        }
    })
}

/// Forgets the request when it is over.
struct Finish {
    session: Arc<Session>,
    id: RequestId,
    number: u64,
}

impl Drop for Finish {
    fn drop(&mut self) {
        self.session.finish(&self.id, self.number);
    }
}

type Outcome = Result<McpResponse, Aborted>;

/// A call that runs on by itself when nobody waits for it any more.
struct RunOn(Option<(BoxFuture<'static, Outcome>, Finish)>);

impl Future for RunOn {
    type Output = Option<(Outcome, Finish)>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Some((running, _)) = &mut self.0 else { return Poll::Ready(None) };
        match running.as_mut().poll(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(outcome) => {
                let finish = self.0.take().map(|(_, finish)| finish);
                Poll::Ready(finish.map(|finish| (outcome, finish)))
            }
        }
    }
}

impl Drop for RunOn {
    fn drop(&mut self) {
        let (Some((running, finish)), Ok(runtime)) = (self.0.take(), tokio::runtime::Handle::try_current())
        else {
            return;
        };
        runtime.spawn(async move {
            if let Ok(response) = running.await {
                // To its end: dropped before that, it would be cancelled upstream. The client still can.
                let (rest, cancel) = abortable(response.into_payload().settle());
                finish.session.goes_on(&finish.id, finish.number, cancel);
                drop(rest.await);
            }
            drop(finish);
        });
    }
}

fn set_level(session: &Session, params: &Params) -> Payload {
    const LEVELS: [&str; 8] =
        ["debug", "info", "notice", "warning", "error", "critical", "alert", "emergency"];
    match params.get_string("level").filter(|level| LEVELS.contains(&&**level)) {
        Some(level) => {
            session.set_log_level(json!(level).to_string().into());
            Payload::Value(json!({}))
        }
        None => {
            Payload::Error(RpcError::new(code::INVALID_PARAMS, format!("`level` must be one of {LEVELS:?}")))
        }
    }
}

/// Passes on what belongs to no request, from now on, if nothing does yet.
pub(in crate::server) fn listen<S: McpService>(service: S, session: &Arc<Session>) {
    if session.is_subscribed(&None) {
        return;
    }
    let lists = json!({ "toolsListChanged": true, "promptsListChanged": true, "resourcesListChanged": true });
    let mut request = listen_request(session, lists);
    request.extensions_mut().insert(Unsolicited);
    let feed = feed(Arc::downgrade(session), Box::pin(call(service, request)));
    session.subscribe(None, spawn(feed));
}

async fn subscribe<S: McpService>(service: S, session: &Arc<Session>, params: &Params) -> Payload {
    let Some(uri) = params.get_string("uri") else {
        return Payload::Error(RpcError::new(code::INVALID_PARAMS, "`uri` is missing or no string"));
    };
    let uri = uri.into_owned();
    if !session.may_subscribe(&uri) {
        return Payload::Error(RpcError::new(code::OVERLOADED, "too many resources are subscribed to"));
    }
    let request = listen_request(session, json!({ "resourceSubscriptions": [uri] }));
    let mut frames = match call(service, request).await.into_payload() {
        Payload::Stream(frames) => frames,
        other => return other,
    };
    // The first message says what is honoured.
    let honoured = match frames.next().await {
        Some(Ok(Frame::Notification(first))) => first.params.get_object("notifications"),
        _ => None,
    };
    let honoured =
        honoured.and_then(|n| n.get_as::<Vec<String>>("resourceSubscriptions")).and_then(Result::ok);
    if !honoured.is_some_and(|uris| uris.contains(&uri)) {
        let error = RpcError::new(code::LEGACY_RESOURCE_NOT_FOUND, format!("Resource not found: {uri}"));
        return Payload::Error(error.with_data(&json!({ "uri": uri })));
    }
    let feed = feed_frames(Arc::downgrade(session), frames);
    session.subscribe(Some(uri), spawn(feed));
    Payload::Value(json!({}))
}

fn unsubscribe(session: &Session, params: &Params) -> Payload {
    match params.get_string("uri") {
        Some(uri) => {
            session.unsubscribe(&Some(uri.into_owned()));
            Payload::Value(json!({}))
        }
        None => Payload::Error(RpcError::new(code::INVALID_PARAMS, "`uri` is missing or no string")),
    }
}

fn listen_request(session: &Session, filter: Value) -> McpRequest {
    let params = Params::from_value(&json!({ "notifications": filter }));
    McpRequest::new(Method::Listen, params).with_caller(session.caller())
}

fn spawn(task: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
    let (task, handle) = abortable(task);
    tokio::spawn(task);
    handle
}

/// Passes what a subscription tells on to the session's stream, until either is gone.
async fn feed(session: Weak<Session>, opening: BoxFuture<'static, McpResponse>) {
    if let Payload::Stream(frames) = opening.await.into_payload() {
        feed_frames(session, frames).await;
    }
}

async fn feed_frames(session: Weak<Session>, mut frames: FrameStream) {
    while let Some(Ok(frame)) = frames.next().await {
        let Some(session) = session.upgrade() else { return };
        match frame {
            Frame::Notification(n) if n.method == Method::Acknowledged => {}
            Frame::Notification(n)
                if n.method == Method::LogMessage && !session.caller().client.wants_log(&n.params) => {}
            Frame::Notification(n) => session.push(message::notification(&n)),
            Frame::Request(question) => session.push_question(question),
            Frame::Final(_) => return,
        }
    }
}

/// Takes a notification of the session's client.
pub(in crate::server) async fn take_notification<S: McpService>(
    service: S,
    session: &Arc<Session>,
    method: Method,
    params: Params,
) {
    match method {
        Method::Cancelled => {
            if let Some(id) = params.get_bytes("requestId").and_then(RequestId::from_json) {
                session.cancel(&id);
            }
        }
        // About this session, which is ours.
        Method::Initialized | Method::Progress => {}
        method => {
            let request = McpRequest::new(method, params).with_caller(session.caller());
            let _ = call(service, request).await;
        }
    }
}
