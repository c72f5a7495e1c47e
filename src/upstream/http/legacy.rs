//! Sessions at a legacy server.
//!
//! A session is made by `initialize`, belongs to one [`AffinityKey`], and ends when nobody can use it any more, or
//! when the server says it does not know it: then the request, which was not processed, goes out once more on a new
//! one.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http::{
    HeaderMap, HeaderValue, Method as HttpMethod, StatusCode, Uri,
    header::{ACCEPT, CONTENT_TYPE},
};
use serde_json::json;
use tokio::{
    sync::{broadcast, watch},
    task::AbortHandle,
};

use super::{
    Endpoint, HANDSHAKE, Shared,
    modern::answers,
    sse::Events,
    wire::{Answer, PROTOCOL_VERSION, SESSION_ID, Wire, post_headers},
};
use crate::{
    BoxError,
    error::{Fault, Overloaded, UpstreamError},
    identity::{Affinity, Caller, Client},
    protocol::{
        Frame, FrameStream, ListenFilter, McpRequest, McpResponse, Message, Method, Notification, Params,
        Payload, RawObject, Reply, RequestId, RpcError, ServerName, ServerRequest, Unsolicited, code,
        sign_question,
    },
    upstream::{
        link::{Connection, Link},
        translate::{self, text},
    },
};

/// Stray notifications that nobody has read yet; the oldest go first.
const NOTIFICATIONS: usize = 64;
/// Sessions at one upstream. The door allows no more clients than this.
pub(super) const MOST_SESSIONS: usize = 65_536;
/// For requests nobody waits for.
const BRIEFLY: Duration = Duration::from_secs(10);
/// What servers say of a session they do not know, other than by the status.
const NO_SESSION: [i64; 2] = [-32000, -32001];
/// A server that cannot be reached for longer has lost the session.
const GIVE_UP_AFTER: Duration = Duration::from_secs(30);
/// The stream for unsolicited messages is opened again after this long.
const REOPEN_AFTER: Duration = Duration::from_secs(1);

/// The place of one session after another.
pub(super) struct Slot {
    link: Arc<Link<Session>>,
    /// What comes without belonging to a request.
    stray: broadcast::Sender<Notification>,
}

/// One session.
pub(super) struct Session {
    wire: Arc<Wire>,
    uri: Uri,
    /// With version, session id and the configured ones.
    headers: HeaderMap,
    initialized: RawObject,
    next_id: AtomicU64,
    expired: AtomicBool,
    stray: broadcast::Sender<Notification>,
    listening: AtomicBool,
    /// The level last set with `logging/setLevel`.
    log_level: Mutex<Option<Bytes>>,
    /// How many streams want updates of a resource.
    subscribed: Mutex<HashMap<String, usize>>,
    /// Becomes true, or is dropped, when the session is over.
    ended: watch::Sender<bool>,
    /// The task that holds the stream for unsolicited messages.
    listener: Mutex<Option<AbortHandle>>,
}

impl Connection for Session {
    fn is_closed(&self) -> bool {
        self.expired.load(Ordering::Relaxed)
    }

    /// Sessions expire.
    fn ended_well(&self) -> bool {
        true
    }
}

/// Answers one request within the caller's session.
pub(super) async fn call(
    shared: &Arc<Shared>,
    endpoint: &Arc<Endpoint>,
    request: McpRequest,
) -> Result<McpResponse, BoxError> {
    let upstream = shared.wire.upstream();
    let Some(slot) = shared.sessions.get(request.caller(), || Slot::new(upstream)) else {
        return Err(Overloaded { limit: MOST_SESSIONS }.into());
    };
    if request.extensions().get::<Unsolicited>().is_some() {
        return Ok(McpResponse::new(Payload::Stream(unsolicited(slot.stray.subscribe()))));
    }
    let link = &slot.link;
    for attempt in 0.. {
        let (s, e, caller) = (shared.clone(), endpoint.clone(), request.caller().clone());
        let stray = slot.stray.clone();
        let session = link.get(|| async move { Session::open(&s, &e, &caller, stray).await }).await?;
        let outcome = match request.method() {
            Method::Discover => {
                return Ok(McpResponse::raw(translate::discover_result(&session.initialized)));
            }
            Method::Listen => return Ok(session.listen(&request).await),
            method if method.is_notification() => {
                session.notify(method, &translate::legacy_params(&request)).await
            }
            _ => session.request(&request).await,
        };
        match outcome {
            Err(Refusal::Expired) if attempt == 0 => link.discard(&session),
            Err(Refusal::Expired) => {
                let error = "it does not accept the session it just gave";
                return Err(shared.wire.error(Fault::Garbled, error).into());
            }
            Err(Refusal::Failed(error)) => {
                // What answers there may be another server now, or want other credentials than when we began.
                if matches!(error.fault, Fault::Unreachable | Fault::Unauthorized | Fault::Misconfigured) {
                    link.discard(&session);
                    shared.doubt(endpoint);
                }
                return Err(error.into());
            }
            Ok(response) => return Ok(response),
        }
    }
    unreachable!("the second attempt returns")
}

/// What the session says without being asked, other than what the gateway tells by itself.
fn unsolicited(stray: broadcast::Receiver<Notification>) -> FrameStream {
    Box::pin(stream::unfold(stray, |mut stray| async move {
        loop {
            match stray.recv().await {
                Ok(n) if is_list_change(&n.method) || n.method == Method::ResourceUpdated => {}
                Ok(n) => return Some((Ok(Frame::Notification(n)), stray)),
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }))
}

fn is_list_change(method: &Method) -> bool {
    matches!(method, Method::ToolsChanged | Method::PromptsChanged | Method::ResourcesChanged)
}

/// Why a request got no answer.
enum Refusal {
    /// The session is not known any more; the request was not processed.
    Expired,
    Failed(UpstreamError),
}

impl From<UpstreamError> for Refusal {
    fn from(e: UpstreamError) -> Self {
        Refusal::Failed(e)
    }
}

impl Slot {
    fn new(upstream: &ServerName) -> Slot {
        Slot { link: Link::within(upstream.clone(), HANDSHAKE), stray: broadcast::Sender::new(NOTIFICATIONS) }
    }
}

impl Session {
    async fn open(
        shared: &Arc<Shared>,
        endpoint: &Arc<Endpoint>,
        caller: &Caller,
        stray: broadcast::Sender<Notification>,
    ) -> Result<Session, UpstreamError> {
        let wire = &shared.wire;
        let id = RequestId::from(0);
        let params = Params::from_value(&translate::initialize_params(&client_of(caller)));
        let body = crate::protocol::request_json(&id, &Method::Initialize, &params);
        let answer = wire.post(&endpoint.uri, post_headers(&endpoint.headers), body).await?;
        let (answered, message) = match answer {
            Answer::Json(headers, body) => (headers, body),
            Answer::Events(headers, events) => (headers, first_response(wire, events).await?),
            Answer::Accepted => return Err(wire.error(Fault::Garbled, "`initialize` had no answer")),
            Answer::Refused(status, _, body) => {
                shared.doubt(endpoint);
                return Err(wire.refused(status, &body));
            }
        };
        let initialized = match Message::parse_response(message, &id) {
            Ok(Message::Response { payload: Payload::Raw(result), .. }) => RawObject::parse(result),
            Ok(Message::Response { payload: Payload::Error(error), .. }) => {
                return Err(wire.error(Fault::Misconfigured, format!("`initialize` was refused: {error}")));
            }
            _ => return Err(wire.error(Fault::Garbled, "`initialize` was answered with something else")),
        };
        let initialized = initialized.map_err(|e| wire.error(Fault::Garbled, e))?;
        let mut headers = endpoint.headers.clone();
        let version = initialized.get_string("protocolVersion");
        if let Some(version) = version.and_then(|v| HeaderValue::from_str(&v).ok()) {
            headers.insert(PROTOCOL_VERSION, version);
        }
        if let Some(session) = answered.get(SESSION_ID) {
            headers.insert(SESSION_ID, session.clone());
        }
        let session = Session {
            wire: shared.wire.clone(),
            uri: endpoint.uri.clone(),
            headers,
            initialized,
            next_id: AtomicU64::new(1),
            expired: AtomicBool::new(false),
            stray,
            listening: AtomicBool::new(false),
            log_level: Mutex::default(),
            subscribed: Mutex::default(),
            ended: watch::Sender::new(false),
            listener: Mutex::default(),
        };
        match session.notify(&Method::Initialized, &Params::default()).await {
            Ok(_) => Ok(session),
            Err(Refusal::Failed(error)) => Err(error),
            Err(Refusal::Expired) => Err(wire.error(Fault::Garbled, "it forgot the session at once")),
        }
    }

    async fn request(self: &Arc<Self>, request: &McpRequest) -> Result<McpResponse, Refusal> {
        if self.stray.receiver_count() > 0 {
            self.start_listening();
        }
        self.follow_log_level(request).await;
        let id = RequestId::from(self.next_id.fetch_add(1, Ordering::Relaxed));
        let mut params = translate::legacy_params(request);
        // Several clients may share the session; each must get its own progress.
        let token = params.progress_token();
        if let (Some(_), Some(mut meta)) = (&token, params.meta().cloned()) {
            meta.set("progressToken", id.as_str());
            params.object_mut().set("_meta", meta.as_str());
        }
        let cancel = CancelOnDrop { session: self.clone(), id: Some(id.clone()) };
        let body = crate::protocol::request_json(&id, request.method(), &params);
        let answer = self.send(HttpMethod::POST, post_headers(&self.headers), body).await;
        let wire = &self.wire;
        match answer? {
            Answer::Json(_, body) => {
                cancel.disarm();
                match Message::parse_response(body, &id) {
                    Ok(Message::Response { id: answered, payload }) if answers(&answered, &payload, &id) => {
                        Ok(McpResponse::new(payload))
                    }
                    Ok(_) => Err(wire.error(Fault::Garbled, "an answer to something else").into()),
                    Err(e) => Err(wire.error(Fault::Garbled, e).into()),
                }
            }
            Answer::Events(_, events) => {
                let reader = Reader { session: self.clone(), events, id, token, cancel: Some(cancel) };
                Ok(reader.answer().await?)
            }
            Answer::Accepted => {
                cancel.disarm();
                Err(wire.error(Fault::Garbled, "an answer without a body").into())
            }
            Answer::Refused(status, _, body) => {
                cancel.disarm();
                Err(wire.refused(status, &body).into())
            }
        }
    }

    async fn notify(&self, method: &Method, params: &Params) -> Result<McpResponse, Refusal> {
        self.send(
            HttpMethod::POST,
            post_headers(&self.headers),
            crate::protocol::notification_json(method, params),
        )
        .await?;
        Ok(McpResponse::raw("{}"))
    }

    /// Sends, and tells a session that is not known any more from other refusals: the specification has 404 for it,
    /// and servers in the field say 400 with an error that answers no request. A refusal that answers *this* request
    /// is about the request.
    async fn send(&self, method: HttpMethod, headers: HeaderMap, body: Bytes) -> Result<Answer, Refusal> {
        let answer = self.wire.send(method, &self.uri, headers, body).await?;
        let Answer::Refused(status, _, body) = &answer else { return Ok(answer) };
        let said = match Message::parse(body.clone()) {
            Ok(Message::Response { id, payload: Payload::Error(error) }) => Some((id, error.code())),
            _ => None,
        };
        let expired = match (*status, &said) {
            (StatusCode::NOT_FOUND, Some((Some(_), _))) => false,
            (StatusCode::NOT_FOUND, _) => true,
            (StatusCode::BAD_REQUEST, Some((None, code))) => NO_SESSION.contains(code),
            _ => false,
        };
        if expired && self.headers.contains_key(SESSION_ID) {
            self.expire();
            return Err(Refusal::Expired);
        }
        match answer {
            // A server that wants other credentials now says so in its own words; they are not for our client.
            Answer::Refused(status, _, body) if said.is_some() && !is_about_us(status) => {
                Ok(Answer::Json(HeaderMap::new(), body))
            }
            answer => Ok(answer),
        }
    }

    /// Nobody uses it any more, and whoever listened finds out.
    fn expire(&self) {
        self.expired.store(true, Ordering::Relaxed);
        self.ended.send_replace(true);
    }

    /// Tells the server the level its one client wants. A shared session has many, and then nobody decides.
    async fn follow_log_level(&self, request: &McpRequest) {
        let caller = request.caller();
        let (Affinity::Session(_), Some(level)) = (&caller.affinity, &caller.client.log_level) else {
            return;
        };
        let logs = self.initialized.get_object("capabilities").is_some_and(|c| c.get("logging").is_some());
        {
            let mut current = self.log_level.lock().unwrap_or_else(PoisonError::into_inner);
            if !logs || current.as_ref() == Some(level) {
                return;
            }
            *current = Some(level.clone());
        }
        let id = RequestId::from(self.next_id.fetch_add(1, Ordering::Relaxed));
        let mut params = Params::default();
        params.object_mut().set("level", text(level));
        let body = crate::protocol::request_json(&id, &Method::SetLevel, &params);
        if self.send(HttpMethod::POST, post_headers(&self.headers), body).await.is_err() {
            tracing::debug!("the upstream did not take the log level");
        }
    }

    /// The unsolicited notifications the filter wants, with the resources in it subscribed to. It ends with the
    /// session: then the subscriptions are gone, and whoever wants them must ask again.
    async fn listen(self: &Arc<Self>, request: &McpRequest) -> McpResponse {
        let filter = ListenFilter::of(request.params());
        let (notifications, mut ended) = (self.stray.subscribe(), self.ended.subscribe());
        self.start_listening();
        let mut guard = Unsubscribe { session: Arc::downgrade(self), uris: Vec::new() };
        for uri in &filter.uris {
            if self.subscribe(uri).await {
                guard.uris.push(uri.clone());
            }
        }
        let filter = ListenFilter { uris: guard.uris.clone(), ..filter };
        let frames = translate::listen_stream(filter, notifications).inspect(move |_| {
            let _held = &guard;
        });
        let over = async move {
            // An error says that the session is gone, which is the same.
            let _ = ended.wait_for(|over| *over).await;
        };
        McpResponse::new(Payload::Stream(Box::pin(frames.take_until(over))))
    }

    fn start_listening(self: &Arc<Self>) {
        if !self.listening.swap(true, Ordering::Relaxed) {
            let task = tokio::spawn(keep_listening(Arc::downgrade(self)));
            *self.listener.lock().unwrap_or_else(PoisonError::into_inner) = Some(task.abort_handle());
        }
    }

    /// One more stream wants updates. The server is asked for the first, for several streams share the session.
    async fn subscribe(self: &Arc<Self>, uri: &str) -> bool {
        let first = {
            let mut subscribed = self.subscribed.lock().unwrap_or_else(PoisonError::into_inner);
            let wanted = subscribed.entry(uri.to_owned()).or_default();
            *wanted += 1;
            *wanted == 1
        };
        let taken = !first || self.subscription(&Method::ResourcesSubscribe, uri).await;
        if !taken {
            self.unwant(uri);
        }
        taken
    }

    /// One stream less wants updates. True when it was the last.
    fn unwant(&self, uri: &str) -> bool {
        let mut subscribed = self.subscribed.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(wanted) = subscribed.get_mut(uri) else { return false };
        *wanted -= 1;
        let last = *wanted == 0;
        if last {
            subscribed.remove(uri);
        }
        last
    }

    async fn subscription(self: &Arc<Self>, method: &Method, uri: &str) -> bool {
        let id = RequestId::from(self.next_id.fetch_add(1, Ordering::Relaxed));
        let body = crate::protocol::request_json(&id, method, &Params::from_value(&json!({ "uri": uri })));
        let answer = match self.send(HttpMethod::POST, post_headers(&self.headers), body).await {
            Ok(Answer::Json(_, body)) => body,
            Ok(Answer::Events(_, events)) => first_response(&self.wire, events).await.unwrap_or_default(),
            _ => return false,
        };
        matches!(Message::parse(answer), Ok(Message::Response { payload: Payload::Raw(_), .. }))
    }

    /// Answers a question of the server.
    async fn reply(&self, id: &RequestId, payload: Payload) {
        let (member, body) = match payload.to_json() {
            Some(Ok(result)) => ("result", result),
            Some(Err(error)) => ("error", error.as_bytes().clone()),
            None => return,
        };
        let message = [
            b"{\"jsonrpc\":\"2.0\",\"id\":",
            id.as_bytes().as_ref(),
            b",\"",
            member.as_bytes(),
            b"\":",
            &body,
            b"}",
        ]
        .concat();
        if briefly(self.send(HttpMethod::POST, post_headers(&self.headers), message.into())).await.is_none() {
            tracing::debug!(id = id.as_str(), "the upstream did not take an answer");
        }
    }
}

/// Nobody waits for these requests, so they must end by themselves: a server that hangs must not collect them.
async fn briefly<T, E>(request: impl Future<Output = Result<T, E>>) -> Option<T> {
    tokio::time::timeout(BRIEFLY, request).await.ok()?.ok()
}

/// Statuses that are between the gateway and its upstream.
pub(super) fn is_about_us(status: StatusCode) -> bool {
    status.is_server_error()
        || status.is_redirection()
        || matches!(
            status,
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::PROXY_AUTHENTICATION_REQUIRED
        )
}

/// The server learns that the session is over.
impl Drop for Session {
    fn drop(&mut self) {
        if let Some(listener) = self.listener.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            listener.abort();
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if self.expired.load(Ordering::Relaxed) || !self.headers.contains_key(SESSION_ID) {
            return;
        }
        let (wire, uri, headers) = (self.wire.clone(), self.uri.clone(), self.headers.clone());
        runtime.spawn(async move {
            // A refusal is fine: many servers do not let clients end sessions.
            briefly(wire.send(HttpMethod::DELETE, &uri, headers, Bytes::new())).await;
        });
    }
}

/// What the upstream is told of the client. One client's session has its name and what it can be asked; requests of
/// several share a session of the gateway's own. Roots are left out: servers ask for them outside of any call, where
/// nobody can tell whose they are.
fn client_of(caller: &Caller) -> Client {
    match caller.affinity {
        Affinity::Shared => Client::gateway(),
        Affinity::Session(_) => {
            let mut client = caller.client.clone();
            if let Ok(mut capabilities) = RawObject::parse(client.capabilities) {
                capabilities.remove("roots");
                client.capabilities = capabilities.into_bytes();
            } else {
                client.capabilities = Bytes::from_static(b"{}");
            }
            client
        }
    }
}

/// The first response on a stream, as it came. For the gateway's own small questions.
async fn first_response(wire: &Wire, mut events: Events) -> Result<Bytes, UpstreamError> {
    while let Some(event) = events.next().await.map_err(|e| wire.read_error(e))? {
        if matches!(Message::parse(event.data.clone()), Ok(Message::Response { .. })) {
            return Ok(event.data);
        }
    }
    Err(wire.error(Fault::Lost, "the stream ended before the answer"))
}

/// Holds the stream for unsolicited messages open as long as the session lives, if the server offers one. A server
/// that cannot be reached may have been restarted and lost the session; the next request finds out, and whoever
/// listens is told that it is over.
async fn keep_listening(session: Weak<Session>) {
    let mut wait = REOPEN_AFTER;
    loop {
        match open_stream(&session).await {
            Stream::Open(mut events) => {
                wait = REOPEN_AFTER;
                while let Ok(Some(event)) = events.next().await {
                    let Some(session) = session.upgrade() else { return };
                    session.take_stray(event.data).await;
                }
            }
            Stream::NotOffered => return,
            Stream::Failed if wait > GIVE_UP_AFTER => {
                if let Some(session) = session.upgrade() {
                    session.expire();
                }
                return;
            }
            Stream::Failed => {}
        }
        tokio::time::sleep(wait).await;
        wait *= 2;
    }
}

enum Stream {
    Open(Events),
    /// The server has none, or the session is over.
    NotOffered,
    Failed,
}

async fn open_stream(session: &Weak<Session>) -> Stream {
    let Some((wire, uri, mut headers)) =
        session.upgrade().map(|s| (s.wire.clone(), s.uri.clone(), s.headers.clone()))
    else {
        return Stream::NotOffered;
    };
    headers.insert(ACCEPT, HeaderValue::from_static("text/event-stream"));
    headers.remove(CONTENT_TYPE);
    match wire.send(HttpMethod::GET, &uri, headers, Bytes::new()).await {
        Ok(Answer::Events(_, events)) => Stream::Open(events),
        Ok(Answer::Refused(status, ..)) if status.is_server_error() => Stream::Failed,
        Ok(Answer::Refused(StatusCode::NOT_FOUND, ..)) => {
            if let Some(session) = session.upgrade() {
                session.expire();
            }
            Stream::NotOffered
        }
        Ok(_) => Stream::NotOffered,
        Err(_) => Stream::Failed,
    }
}

impl Session {
    /// A message that belongs to no request of ours.
    async fn take_stray(&self, data: Bytes) {
        match Message::parse(data) {
            // Nobody may be listening; then nobody misses it.
            Ok(Message::Notification { method, params }) => {
                drop(self.stray.send(Notification { method, params }))
            }
            Ok(Message::Request { id, method: Method::Ping, .. }) => {
                self.reply(&id, Payload::Raw(Bytes::from_static(b"{}"))).await;
            }
            Ok(Message::Request { id, .. }) => {
                let error = RpcError::new(code::METHOD_NOT_FOUND, "nobody can be asked outside of a call");
                self.reply(&id, Payload::Error(error)).await;
            }
            Ok(Message::Response { .. }) | Err(_) => {}
        }
    }
}

/// Ends subscriptions with the stream they were for.
struct Unsubscribe {
    session: Weak<Session>,
    uris: Vec<String>,
}

impl Drop for Unsubscribe {
    fn drop(&mut self) {
        let (Some(session), Ok(runtime)) = (self.session.upgrade(), tokio::runtime::Handle::try_current())
        else {
            return;
        };
        let last: Vec<String> =
            std::mem::take(&mut self.uris).into_iter().filter(|uri| session.unwant(uri)).collect();
        if !last.is_empty() {
            runtime.spawn(async move {
                for uri in last {
                    let ended = session.subscription(&Method::ResourcesUnsubscribe, &uri);
                    let _ = tokio::time::timeout(BRIEFLY, ended).await;
                }
            });
        }
    }
}

/// A legacy server goes on working when the connection ends; it must be told.
struct CancelOnDrop {
    session: Arc<Session>,
    id: Option<RequestId>,
}

impl CancelOnDrop {
    fn disarm(mut self) {
        self.id = None;
    }
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        let (Some(id), Ok(runtime)) = (self.id.take(), tokio::runtime::Handle::try_current()) else { return };
        let session = self.session.clone();
        runtime.spawn(async move {
            let mut params = Params::default();
            params.object_mut().set("requestId", id.as_str());
            briefly(session.notify(&Method::Cancelled, &params)).await;
        });
    }
}

/// The stream that answers one request.
struct Reader {
    session: Arc<Session>,
    events: Events,
    id: RequestId,
    /// The client's own progress token.
    token: Option<Bytes>,
    cancel: Option<CancelOnDrop>,
}

impl Reader {
    /// A stream whose first event is the result is no stream.
    async fn answer(mut self) -> Result<McpResponse, UpstreamError> {
        match self.next().await? {
            Frame::Final(payload) => Ok(McpResponse::new(payload)),
            first => Ok(McpResponse::new(Payload::Stream(self.into_frames(first)))),
        }
    }

    fn into_frames(self, first: Frame) -> FrameStream {
        let rest = stream::unfold(Some(self), |reader| async move {
            let mut reader = reader?;
            let frame = reader.next().await;
            let more = matches!(frame, Ok(Frame::Notification(_) | Frame::Request(_)));
            Some((frame.map_err(Into::into), more.then_some(reader)))
        });
        Box::pin(stream::iter([Ok(first)]).chain(rest))
    }

    async fn next(&mut self) -> Result<Frame, UpstreamError> {
        let wire = self.session.wire.clone();
        loop {
            let event = self.events.next().await.map_err(|e| wire.read_error(e))?;
            let Some(event) = event else {
                self.disarm();
                return Err(wire.error(Fault::Lost, "the stream ended before the result"));
            };
            match Message::parse_response(event.data.clone(), &self.id) {
                Ok(Message::Notification { method, params }) => match method {
                    method if is_list_change(&method) || method == Method::ResourceUpdated => {
                        self.session.take_stray(event.data).await;
                    }
                    method => return Ok(Frame::Notification(self.own(Notification { method, params }))),
                },
                Ok(Message::Response { id, payload }) if answers(&id, &payload, &self.id) => {
                    self.disarm();
                    return Ok(Frame::Final(payload));
                }
                Ok(Message::Response { .. }) => {
                    return Err(wire.error(Fault::Garbled, "an answer to something else"));
                }
                Ok(Message::Request { id, method: Method::Ping, .. }) => {
                    self.session.reply(&id, Payload::Raw(Bytes::from_static(b"{}"))).await;
                }
                Ok(Message::Request { id, method, params }) => {
                    return Ok(Frame::Request(self.question(id, method, params)));
                }
                Err(e) => return Err(wire.error(Fault::Garbled, e)),
            }
        }
    }

    /// A notification under the client's own progress token.
    fn own(&self, mut notification: Notification) -> Notification {
        let ours = notification.params.get("progressToken") == Some(self.id.as_str());
        if let (true, Some(token)) = (ours, &self.token) {
            notification.params.object_mut().set("progressToken", text(token));
        }
        notification
    }

    /// A question on its way to the client. Its answer goes back to this session, whatever becomes of the stream.
    fn question(&self, id: RequestId, method: Method, params: Params) -> ServerRequest {
        let params = sign_question(self.session.wire.upstream(), &method, params);
        let (reply, answer) = Reply::new();
        let session = self.session.clone();
        tokio::spawn(async move {
            if let Ok(payload) = answer.await {
                session.reply(&id, payload).await;
            }
        });
        ServerRequest { method, params, reply }
    }

    fn disarm(&mut self) {
        if let Some(cancel) = self.cancel.take() {
            cancel.disarm();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::SessionToken;

    #[test]
    fn a_clients_name_and_abilities_reach_its_own_session_only() {
        let client = Client {
            capabilities: Bytes::from_static(br#"{"roots":{},"sampling":{}}"#),
            ..Client::gateway()
        };
        let caller = Caller { client, ..(*Caller::anonymous()).clone() };
        assert_eq!(client_of(&caller).capabilities, "{}");
        let own = Caller { affinity: Affinity::Session(SessionToken::new()), ..caller };
        assert_eq!(client_of(&own).capabilities, r#"{"sampling":{}}"#);
    }
}
