//! The legacy era: sessions, and what only they have.
//!
//! A client that goes away has not cancelled anything (2025-11-25, transports): its call runs on. It cancels with a
//! notification.

use std::{
    pin::Pin,
    sync::{Arc, Weak},
    task::{Context, Poll},
};

use bytes::Bytes;
use futures_util::{
    StreamExt as _,
    future::{AbortHandle, BoxFuture, abortable},
    stream,
};
use http::{HeaderValue, Response, StatusCode, header};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::{
    Door, DoorBody, Head, Refused, SESSION_HEADER, VERSION_HEADER, answer, apply_hint, call,
    converse::{Asked, Conversation},
    empty, events, json, method_not_allowed,
    modern::drained,
    session::Session,
};
use crate::{
    McpService,
    identity::{Affinity, Caller, Client, SessionToken},
    protocol::{
        Era, Frame, HttpHint, McpRequest, Message, Method, Params, Payload, ProtocolVersion, RawObject,
        RequestId, ResultType, RpcError, Unsolicited, code, meta,
    },
};

/// How large `clientInfo` and `capabilities` may each be.
const MOST_ABOUT_CLIENT: usize = 16 * 1024;
/// Messages of one stream that the client has not read yet.
const UNREAD: usize = 64;

pub(super) async fn serve<S: McpService>(
    service: S,
    door: &Arc<Door>,
    head: Head,
    message: Message,
) -> Result<Response<DoorBody>, Refused> {
    if let Message::Request { id, method: Method::Initialize, params } = &message {
        return initialize(service, door, head, id, params).await;
    }
    let id = match &message {
        Message::Request { id, .. } => Some(id),
        _ => None,
    };
    let session = find(door, &head, id)?;
    match message {
        Message::Request { id, method, params } => answer_request(service, session, id, method, params).await,
        Message::Notification { method, params } => {
            take_notification(service, &session, method, params).await;
            Ok(empty(StatusCode::ACCEPTED))
        }
        Message::Response { id, payload } => {
            if let Some(reply) = id.and_then(|id| session.answered(&id)) {
                reply.send(payload);
            }
            Ok(empty(StatusCode::ACCEPTED))
        }
    }
}

/// The stream for what belongs to no request.
pub(super) fn open_stream<S: McpService>(
    service: S,
    door: &Arc<Door>,
    head: Head,
) -> Result<Response<DoorBody>, Refused> {
    if !head.headers.contains_key(SESSION_HEADER) {
        return Err(method_not_allowed());
    }
    let session = find(door, &head, None)?;
    let accepts = head.headers.get_all(header::ACCEPT).iter().any(|v| {
        v.to_str().is_ok_and(|v| v.contains("text/event-stream") || v.contains("*/*") || v.contains("text/*"))
    });
    if !accepts {
        let why = "Accept must list text/event-stream";
        return Err(Refused::new(StatusCode::NOT_ACCEPTABLE, None, code::INVALID_REQUEST, why));
    }
    let messages =
        stream::unfold(session.open_outbox(), |mut outbox| async { Some((outbox.recv().await?, outbox)) });
    if !session.is_subscribed(&None) {
        let lists =
            json!({ "toolsListChanged": true, "promptsListChanged": true, "resourcesListChanged": true });
        let mut request = listen_request(&session, lists);
        request.extensions_mut().insert(Unsolicited);
        let feed = feed(Arc::downgrade(&session), Box::pin(call(service, request)));
        session.subscribe(None, spawn(feed));
    }
    Ok(events(Box::pin(messages.take_until(drained(head.draining)))))
}

/// `DELETE`.
pub(super) fn end_session(door: &Arc<Door>, head: &Head) -> Result<Response<DoorBody>, Refused> {
    let Ok(Some(id)) = head.single(SESSION_HEADER) else { return Err(method_not_allowed()) };
    find(door, head, None)?;
    door.sessions.end(id);
    Ok(empty(StatusCode::OK))
}

fn find(door: &Door, head: &Head, id: Option<&RequestId>) -> Result<Arc<Session>, Refused> {
    let refuse = |status, message: String| Refused::new(status, id.cloned(), code::INVALID_REQUEST, message);
    let version =
        head.single(VERSION_HEADER).map_err(|why| refuse(StatusCode::BAD_REQUEST, why.to_owned()))?;
    if let Some(version) = version.filter(|version| version.parse::<ProtocolVersion>().is_err()) {
        return Err(refuse(StatusCode::BAD_REQUEST, format!("unsupported protocol version {version:?}")));
    }
    let session = match head.single(SESSION_HEADER) {
        Ok(Some(session)) => session,
        Ok(None) => {
            let message =
                "Mcp-Session-Id is missing: send `initialize` first, or a request of MCP 2026-07-28";
            return Err(refuse(StatusCode::BAD_REQUEST, message.to_owned()));
        }
        Err(why) => return Err(refuse(StatusCode::BAD_REQUEST, format!("Mcp-Session-Id {why}"))),
    };
    door.sessions.get(session, &head.principal, &head.scope).ok_or_else(|| {
        refuse(StatusCode::NOT_FOUND, "there is no such session: send `initialize` again".to_owned())
    })
}

async fn initialize<S: McpService>(
    service: S,
    door: &Arc<Door>,
    head: Head,
    id: &RequestId,
    params: &Params,
) -> Result<Response<DoorBody>, Refused> {
    let wrong = |message: &str| {
        Refused::new(StatusCode::BAD_REQUEST, Some(id.clone()), code::INVALID_PARAMS, message)
    };
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
    let caller = Caller { principal: head.principal, scope: head.scope, client, affinity };
    let discover = McpRequest::bare(Method::Discover).with_caller(Arc::new(caller.clone()));
    let discovered = call(service, discover).await.into_payload();
    let discovered = match discovered.to_object() {
        Some(discovered) => discovered,
        None => {
            let chunks = answer::response(id, &Method::Initialize, discovered, Era::Legacy);
            return Ok(json(StatusCode::OK, chunks));
        }
    };
    let Some(session) = door.sessions.open(caller) else {
        let message = "too many sessions are open; try again later";
        return Err(Refused::new(
            StatusCode::SERVICE_UNAVAILABLE,
            Some(id.clone()),
            code::OVERLOADED,
            message,
        ));
    };
    let result = initialize_result(version, &discovered);
    let mut response =
        json(StatusCode::OK, answer::response(id, &Method::Initialize, Payload::Raw(result), Era::Legacy));
    let session = HeaderValue::from_str(&session).expect("session ids are Base64");
    response.headers_mut().insert(SESSION_HEADER, session);
    Ok(response)
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

async fn answer_request<S: McpService>(
    service: S,
    session: Arc<Session>,
    id: RequestId,
    method: Method,
    params: Params,
) -> Result<Response<DoorBody>, Refused> {
    let done = |payload| Ok(json(StatusCode::OK, answer::response(&id, &method, payload, Era::Legacy)));
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

/// Through the stack. The plain answer is plain JSON; one that has more to say becomes a conversation.
async fn forward<S: McpService>(
    service: S,
    session: Arc<Session>,
    id: RequestId,
    request: McpRequest,
) -> Result<Response<DoorBody>, Refused> {
    let (running, cancel) = abortable(call(service.clone(), request.clone()));
    if !session.start(&id, cancel) {
        let message = "a request with this id is under way";
        return Err(Refused::new(StatusCode::BAD_REQUEST, Some(id), code::INVALID_REQUEST, message));
    }
    let finish = Finish { session: session.clone(), id: id.clone() };
    let outcome = RunOn(Some((Box::pin(running), finish))).await;
    let Some((Ok(answered), finish)) = outcome else {
        // Cancelled: the specification wants no answer, and HTTP wants one.
        return Ok(empty(StatusCode::ACCEPTED));
    };
    let (payload, extensions) = answered.into_parts();
    let hint = extensions.get::<HttpHint>();
    let mark = ResultType::of(&payload);
    let mut response = match (payload, mark) {
        (payload @ Payload::Stream(_), _) | (payload, ResultType::InputRequired) => {
            stream_of(service, finish, request, payload)
        }
        (payload, mark) => {
            json(StatusCode::OK, answer::marked_response(&id, request.method(), payload, mark, Era::Legacy))
        }
    };
    apply_hint(&mut response, hint, false);
    Ok(response)
}

fn stream_of<S: McpService>(
    service: S,
    finish: Finish,
    request: McpRequest,
    payload: Payload,
) -> Response<DoorBody> {
    let (sender, receiver) = mpsc::channel(UNREAD);
    let (session, id) = (finish.session.clone(), finish.id.clone());
    let conversation = Conversation {
        service,
        session: session.clone(),
        id: id.clone(),
        request,
        sender,
        asked: Asked::default(),
    };
    let (running, cancel) = abortable(async move {
        conversation.run(payload).await;
        drop(finish);
    });
    session.goes_on(&id, cancel);
    tokio::spawn(running);
    let messages =
        stream::unfold(receiver, |mut receiver| async { Some((receiver.recv().await?, receiver)) });
    events(Box::pin(messages))
}

/// Forgets the request when it is over.
pub(super) struct Finish {
    session: Arc<Session>,
    id: RequestId,
}

impl Drop for Finish {
    fn drop(&mut self) {
        self.session.finish(&self.id);
    }
}

type Running<T> = BoxFuture<'static, T>;

/// A call that runs on by itself when nobody waits for it any more.
struct RunOn<T: Send + 'static>(Option<(Running<T>, Finish)>);

impl<T: Send + 'static> Future for RunOn<T> {
    type Output = Option<(T, Finish)>;

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

impl<T: Send + 'static> Drop for RunOn<T> {
    fn drop(&mut self) {
        let (Some((running, finish)), Ok(runtime)) = (self.0.take(), tokio::runtime::Handle::try_current())
        else {
            return;
        };
        runtime.spawn(async move {
            drop(running.await);
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

async fn subscribe<S: McpService>(service: S, session: &Arc<Session>, params: &Params) -> Payload {
    let Some(uri) = params.get_string("uri") else {
        return Payload::Error(RpcError::new(code::INVALID_PARAMS, "`uri` is missing or no string"));
    };
    let uri = uri.into_owned();
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
async fn feed(session: Weak<Session>, opening: BoxFuture<'static, crate::protocol::McpResponse>) {
    if let Payload::Stream(frames) = opening.await.into_payload() {
        feed_frames(session, frames).await;
    }
}

async fn feed_frames(session: Weak<Session>, mut frames: crate::protocol::FrameStream) {
    while let Some(Ok(frame)) = frames.next().await {
        let Some(session) = session.upgrade() else { return };
        match frame {
            Frame::Notification(n) if n.method != Method::Acknowledged => {
                session.push(answer::notification(&n))
            }
            Frame::Notification(_) | Frame::Request(_) => {}
            Frame::Final(_) => return,
        }
    }
}

async fn take_notification<S: McpService>(
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
        Method::Other(ref name) if **name == *"notifications/roots/list_changed" => {}
        method => {
            let request = McpRequest::new(method, params).with_caller(session.caller());
            let _ = call(service, request).await;
        }
    }
}
