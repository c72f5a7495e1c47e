//! One session: how it begins, what is sent in it, and how it ends.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Method as HttpMethod, StatusCode, Uri,
    header::{ACCEPT, CONTENT_TYPE},
};
use tokio::{
    sync::{Semaphore, watch},
    task::AbortHandle,
};

use super::{
    Refusal, briefly, client_of, is_about_us, late::Late, overhear::UnderWay, questions::MOST_QUESTIONS,
    reader::Reader, stray::Stray,
};
use crate::{
    error::{Fault, UpstreamError},
    identity::{Abilities, Affinity, Caller},
    protocol::{McpRequest, McpResponse, Message, Method, Params, Payload, RawObject, RequestId},
    upstream::{
        http::{
            Endpoint, Shared,
            modern::answers,
            sse::{Cursor, Events},
            wire::{Answer, LAST_EVENT_ID, PROTOCOL_VERSION, SESSION_ID, Wire, post_headers},
        },
        link::Connection,
        translate::{self, text},
    },
};

/// What servers say of a session they do not know, other than by the status.
const NO_SESSION: [i64; 2] = [-32000, -32001];

/// A server that does not say in this time whether it opens the stream for unsolicited messages is not waited for.
const OPEN_WITHIN: Duration = Duration::from_secs(2);

/// A server that hangs on this must not hold up the call.
const SET_LEVEL_WITHIN: Duration = Duration::from_secs(5);

/// One session.
pub(super) struct Session {
    pub(super) way: Arc<Way>,
    initialized: RawObject,
    next_id: AtomicU64,
    expired: AtomicBool,
    pub(super) stray: Arc<Stray>,
    pub(super) listening: AtomicBool,
    /// Becomes true when the server has opened the stream for unsolicited messages, or has said that it will not.
    pub(super) stream_settled: watch::Sender<bool>,
    pub(super) under_way: Arc<UnderWay>,
    pub(super) late: Late,
    /// The level last set with `logging/setLevel`.
    log_level: tokio::sync::Mutex<Option<Bytes>>,
    /// How many streams want updates of a resource.
    pub(super) subscribed: Mutex<HashMap<String, usize>>,
    /// Room for questions.
    pub(super) questions: Arc<Semaphore>,
    /// Becomes true, or is dropped, when the session is over.
    pub(super) ended: watch::Sender<bool>,
    /// The task that holds the stream for unsolicited messages.
    pub(super) listener: Mutex<Option<AbortHandle>>,
}

/// Where the messages of a session go, and with what.
pub(super) struct Way {
    pub(super) wire: Arc<Wire>,
    pub(super) uri: Uri,
    /// With version, session id and the configured ones.
    pub(super) headers: HeaderMap,
}

/// Why a GET opened no stream.
pub(super) enum Unopened {
    /// The server has none to give.
    NotOffered,
    /// The server does not know what was asked for, which may be the session.
    Unknown,
    /// It cannot be reached, or not now.
    Failed,
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

impl Way {
    /// Opens a stream to read: the one for what belongs to no request, or the rest of any.
    pub(super) async fn open_stream(&self, cursor: Cursor) -> Result<Events, Unopened> {
        let mut headers = self.headers.clone();
        headers.insert(ACCEPT, HeaderValue::from_static("text/event-stream"));
        headers.remove(CONTENT_TYPE);
        if let Some(id) = &cursor.id {
            headers.insert(LAST_EVENT_ID, id.clone());
        }
        match self.wire.send(HttpMethod::GET, &self.uri, headers, Bytes::new()).await {
            Ok(Answer::Events(_, events)) => Ok(events.after(cursor)),
            Ok(Answer::Refused(StatusCode::NOT_IMPLEMENTED, ..)) => Err(Unopened::NotOffered),
            Ok(Answer::Refused(status, ..)) if status.is_server_error() => Err(Unopened::Failed),
            Ok(Answer::Refused(StatusCode::NOT_FOUND, ..)) => Err(Unopened::Unknown),
            Ok(_) => Err(Unopened::NotOffered),
            Err(error) if matches!(error.fault, Fault::Unreachable | Fault::Lost) => Err(Unopened::Failed),
            Err(_) => Err(Unopened::NotOffered),
        }
    }
}

impl Session {
    /// Begins one on behalf of `caller`.
    pub(super) async fn open(
        shared: &Arc<Shared>,
        endpoint: &Arc<Endpoint>,
        caller: &Caller,
        stray: Arc<Stray>,
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
        let way = Way { wire: shared.wire.clone(), uri: endpoint.uri.clone(), headers };
        let session = Session::new(way, initialized, stray);
        match session.notify(&Method::Initialized, &Params::default()).await {
            Ok(()) => Ok(session),
            Err(Refusal::Failed(error)) => Err(error),
            Err(Refusal::Expired) => Err(wire.error(Fault::Garbled, "it forgot the session at once")),
        }
    }

    pub(super) fn new(way: Way, initialized: RawObject, stray: Arc<Stray>) -> Session {
        Session {
            way: Arc::new(way),
            initialized,
            next_id: AtomicU64::new(1),
            expired: AtomicBool::new(false),
            stray,
            listening: AtomicBool::new(false),
            stream_settled: watch::Sender::new(false),
            under_way: Arc::default(),
            late: Late::default(),
            log_level: tokio::sync::Mutex::default(),
            subscribed: Mutex::default(),
            questions: Arc::new(Semaphore::new(MOST_QUESTIONS)),
            ended: watch::Sender::new(false),
            listener: Mutex::default(),
        }
    }

    /// The result of `initialize`.
    pub(super) fn initialized(&self) -> &RawObject {
        &self.initialized
    }

    /// Sends a request, with `params` instead of its own, and reads the answer.
    pub(super) async fn request(
        self: &Arc<Self>,
        request: &McpRequest,
        params: Params,
    ) -> Result<McpResponse, Refusal> {
        if self.stray.is_heard() {
            // Open before the request goes out: what that causes may come there, and a server does not say it twice.
            self.start_listening();
            self.stream_is_settled().await;
        }
        self.follow_log_level(request).await;
        let client = &request.caller().client;
        let shared = matches!(request.caller().affinity, Affinity::Shared);
        match client.abilities() != Abilities::default() || (shared && client.log_level.is_some()) {
            true => self.request_overhearing(request, params).await,
            false => {
                let mut entered = self.under_way.enter();
                let outcome = self.request_plainly(request, params).await;
                if outcome.as_ref().is_err_and(Refusal::is_unprocessed) {
                    entered.end();
                }
                let response = outcome?;
                Ok(match response.payload() {
                    Payload::Stream(_) => response.map_final(move |payload| {
                        entered.end();
                        payload
                    }),
                    _ => {
                        entered.end();
                        response
                    }
                })
            }
        }
    }

    /// The same, without an ear for anything else.
    pub(super) async fn request_plainly(
        self: &Arc<Self>,
        request: &McpRequest,
        mut params: Params,
    ) -> Result<McpResponse, Refusal> {
        let id = self.next_id();
        // Several clients may share the session; each must get its own progress.
        let token = params.progress_token();
        if let (Some(_), Some(mut meta)) = (&token, params.meta().cloned()) {
            meta.set("progressToken", id.as_str());
            params.object_mut().set("_meta", meta.as_str());
        }
        let cancel = CancelOnDrop { session: self.clone(), id: Some(id.clone()) };
        let body = crate::protocol::request_json(&id, request.method(), &params);
        let wire = &self.way.wire;
        let answer = match self.post(body).await {
            Err(refusal) if refusal.is_unprocessed() => {
                cancel.disarm();
                return Err(refusal);
            }
            answer => answer?,
        };
        match answer {
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
                Ok(Reader::new(self.clone(), events, id, token, cancel).answer().await?)
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

    pub(super) async fn notify(&self, method: &Method, params: &Params) -> Result<(), Refusal> {
        self.post(crate::protocol::notification_json(method, params)).await.map(drop)
    }

    /// One of the gateway's own small questions. `None` when it has no answer.
    pub(super) async fn ask(&self, method: &Method, params: &Params) -> Option<Payload> {
        let id = self.next_id();
        let body = match self.post(crate::protocol::request_json(&id, method, params)).await.ok()? {
            Answer::Json(_, body) => body,
            Answer::Events(_, events) => first_response(&self.way.wire, events).await.ok()?,
            Answer::Accepted | Answer::Refused(..) => return None,
        };
        match Message::parse_response(body, &id).ok()? {
            Message::Response { id: answered, payload } if answers(&answered, &payload, &id) => Some(payload),
            _ => None,
        }
    }

    fn next_id(&self) -> RequestId {
        RequestId::from(self.next_id.fetch_add(1, Ordering::Relaxed))
    }

    /// Sends, and tells a session that is not known any more from other refusals: the specification has 404 for it,
    /// and servers in the field say 400 with an error that answers no request. A refusal that answers *this* request
    /// is about the request.
    pub(super) async fn post(&self, body: Bytes) -> Result<Answer, Refusal> {
        let way = &self.way;
        let answer = way.wire.post(&way.uri, post_headers(&way.headers), body).await?;
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
        if expired && way.headers.contains_key(SESSION_ID) {
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

    /// Waits until the stream for unsolicited messages is open, or will not be.
    pub(super) async fn stream_is_settled(&self) {
        if *self.stream_settled.borrow() {
            return;
        }
        let mut settled = self.stream_settled.subscribe();
        if tokio::time::timeout(OPEN_WITHIN, settled.wait_for(|settled| *settled)).await.is_err() {
            self.stream_settled.send_replace(true);
        }
    }

    /// Nobody uses it any more, and whoever listened finds out.
    pub(super) fn expire(&self) {
        self.expired.store(true, Ordering::Relaxed);
        self.ended.send_replace(true);
    }

    /// Done when the session is over. Does not keep it alive.
    pub(super) fn over(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut ended = self.ended.subscribe();
        async move {
            // An error says that the session is gone, which is the same.
            let _ = ended.wait_for(|over| *over).await;
        }
    }

    /// Tells the server the level its one client wants, or the least severe that any of several wants: each gets no
    /// more than it asked for, at its door.
    async fn follow_log_level(&self, request: &McpRequest) {
        let caller = request.caller();
        let Some(level) = &caller.client.log_level else { return };
        let logs = self.initialized.get_object("capabilities").is_some_and(|c| c.get("logging").is_some());
        if !logs {
            return;
        }
        // Held until it is in force: a call that follows counts on it.
        let mut current = self.log_level.lock().await;
        let differs = match caller.affinity {
            Affinity::Session(_) => current.as_ref() != Some(level),
            Affinity::Shared => caller.client.wants_more_than(current.as_ref()),
        };
        if !differs {
            return;
        }
        let mut params = Params::default();
        params.object_mut().set("level", text(level));
        let set = tokio::time::timeout(SET_LEVEL_WITHIN, self.ask(&Method::SetLevel, &params));
        if set.await.ok().flatten().is_none() {
            tracing::debug!(upstream = %self.way.wire.upstream(), "the upstream did not take the log level");
        }
        *current = Some(level.clone());
    }
}

/// The server learns that the session is over.
impl Drop for Session {
    fn drop(&mut self) {
        if let Some(listener) = self.listener.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            listener.abort();
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if self.expired.load(Ordering::Relaxed) || !self.way.headers.contains_key(SESSION_ID) {
            return;
        }
        let way = self.way.clone();
        runtime.spawn(async move {
            // Many sessions may end at once, and each turn may need a connection of its own.
            let _turn = way.wire.farewells().acquire().await;
            // A refusal is fine: many servers do not let clients end sessions.
            briefly(way.wire.send(HttpMethod::DELETE, &way.uri, way.headers.clone(), Bytes::new())).await;
        });
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

/// A legacy server goes on working when the connection ends; it must be told.
pub(super) struct CancelOnDrop {
    session: Arc<Session>,
    id: Option<RequestId>,
}

impl CancelOnDrop {
    pub(super) fn disarm(mut self) {
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
