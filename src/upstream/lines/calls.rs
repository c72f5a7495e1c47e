//! Who waits for what on one connection: requests by id, listeners, and whatever comes unasked.
//!
//! The connection's own ids are a counter, and a request's progress token is its id. A call's notifications queue up
//! in bounded space: whoever does not read them loses progress, never a question or the result.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use serde_json::json;
use tokio::sync::{broadcast, mpsc, oneshot};

use super::{
    owner::{Owner, Whose},
    questions::Questions,
};
use crate::{
    error::{Fault, UpstreamError},
    protocol::{
        Message, Method, Notification, Params, Payload, RawObject, RequestId, RpcError, ServerName,
        ServerRequest, meta,
    },
    upstream::translate,
};

/// How many notifications wait for one caller to read them.
const NOTICES: usize = 256;
/// How many bytes they may have together. A single one may have more.
const NOTICE_BYTES: usize = 1024 * 1024;
/// How many messages wait to be written. Further callers wait with their own.
const OUTGOING: usize = 16;
/// How many answers to the other side wait to be written. One that asks faster than it reads goes without some.
const REPLIES: usize = 256;
/// An id is echoed. Nobody needs a longer one.
const LONGEST_ID: usize = 1024;
/// How many unsolicited notifications a listener may be behind.
const UNSOLICITED: usize = 256;

pub(super) struct Calls {
    upstream: ServerName,
    state: Mutex<State>,
    queue: mpsc::Sender<Outgoing>,
    replies: mpsc::Sender<Bytes>,
    /// What cannot wait for room: it is sent from `drop`, or in an order that must be kept. Each of these follows a
    /// call that was written, or a listener, so there are never more of them than of those.
    urgent: mpsc::UnboundedSender<Urgent>,
}

pub(super) struct State {
    next: u64,
    calls: HashMap<u64, Entry>,
    /// How many listeners want updates of a resource. Legacy only.
    subscribed: HashMap<String, usize>,
    /// Gone when the connection is.
    unsolicited: Option<broadcast::Sender<Notification>>,
    pub(super) questions: Questions,
    closing: bool,
    end: Option<End>,
}

struct Entry {
    /// The caller's own progress token.
    token: Option<Bytes>,
    kind: Kind,
    written: bool,
    /// Bounded by `unread` for notifications, and for questions by how many may be open.
    news: mpsc::UnboundedSender<News>,
    unread: Arc<Unread>,
    answer: oneshot::Sender<Result<Payload, End>>,
}

/// What a call is to the notifications that come while it is under way.
pub(super) enum Kind {
    /// Notifications that name no request may be about this one.
    Plain,
    /// A modern `subscriptions/listen`, with the id its caller knows it by.
    Listen(Option<RequestId>),
    /// The connection's own business.
    Internal,
}

enum News {
    Notice { notification: Notification, size: usize },
    Question(ServerRequest),
}

/// Notifications a caller has not read yet.
#[derive(Default)]
struct Unread {
    count: AtomicUsize,
    bytes: AtomicUsize,
}

impl Unread {
    /// Makes room for one more. The first has room whatever its size.
    fn add(&self, size: usize) -> bool {
        let (count, bytes) =
            (self.count.fetch_add(1, Ordering::Relaxed), self.bytes.fetch_add(size, Ordering::Relaxed));
        let fits = count == 0 || (count < NOTICES && bytes + size <= NOTICE_BYTES);
        if !fits {
            self.remove(size);
        }
        fits
    }

    fn remove(&self, size: usize) {
        self.count.fetch_sub(1, Ordering::Relaxed);
        self.bytes.fetch_sub(size, Ordering::Relaxed);
    }
}

/// Why nothing will come any more.
#[derive(Clone, Debug)]
pub(super) struct End {
    pub(super) fault: Fault,
    pub(super) reason: Arc<str>,
}

impl End {
    pub(super) fn new(fault: Fault, reason: impl Into<Arc<str>>) -> Self {
        End { fault, reason: reason.into() }
    }
}

/// A line to write.
pub(super) struct Outgoing {
    /// The call it makes, if it makes one.
    pub(super) call: Option<u64>,
    pub(super) line: Bytes,
}

pub(super) enum Urgent {
    Cancel(u64),
    Line(Bytes),
}

impl Urgent {
    pub(super) fn into_line(self) -> Bytes {
        match self {
            Urgent::Line(line) => line,
            Urgent::Cancel(id) => {
                let params = Params::from_value(&json!({ "requestId": id }));
                crate::protocol::notification_json(&Method::Cancelled, &params)
            }
        }
    }
}

/// What the writer reads from.
pub(super) struct Outbox {
    pub(super) queue: mpsc::Receiver<Outgoing>,
    pub(super) replies: mpsc::Receiver<Bytes>,
    pub(super) urgent: mpsc::UnboundedReceiver<Urgent>,
}

impl Calls {
    pub(super) fn new(upstream: ServerName) -> (Arc<Self>, Outbox) {
        let (queue, queued) = mpsc::channel(OUTGOING);
        let (replies, replied) = mpsc::channel(REPLIES);
        let (urgent, hurried) = mpsc::unbounded_channel();
        let state = State {
            next: 1,
            calls: HashMap::new(),
            subscribed: HashMap::new(),
            unsolicited: Some(broadcast::Sender::new(UNSOLICITED)),
            questions: Questions::default(),
            closing: false,
            end: None,
        };
        let calls = Calls { upstream, state: Mutex::new(state), queue, replies, urgent };
        (Arc::new(calls), Outbox { queue: queued, replies: replied, urgent: hurried })
    }

    /// From now on the other side may ask, and this is whom.
    pub(super) fn belong_to(&self, owner: Arc<Owner>) {
        self.lock().questions.belong_to(owner);
    }

    /// Whether no cancelled call may still have something to say.
    #[cfg(feature = "client")]
    pub(super) fn is_quiet(&self) -> bool {
        !self.lock().questions.is_haunted()
    }

    /// Whose the connection is, if anybody may be asked there.
    pub(super) fn whose(&self) -> Option<Whose> {
        self.lock().questions.owner().map(|owner| owner.whose())
    }

    pub(super) fn upstream(&self) -> &ServerName {
        &self.upstream
    }

    pub(super) fn is_closed(&self) -> bool {
        let state = self.lock();
        state.closing || state.end.is_some()
    }

    /// From now on the connection takes no new calls, though those under way may yet be answered.
    pub(super) fn close(&self) {
        self.lock().closing = true;
    }

    /// Tells everybody who waits why it is over. The first reason counts.
    pub(super) fn end(&self, end: End) {
        let mut state = self.lock();
        if state.end.is_some() {
            return;
        }
        state.closing = true;
        state.unsolicited = None;
        state.questions.withdraw_all();
        for (_, entry) in state.calls.drain() {
            // A caller that has gone asks nothing more.
            let _ = entry.answer.send(Err(end.clone()));
        }
        state.end = Some(end);
    }

    /// Why it is over, when it is.
    pub(super) fn why(&self) -> Option<Arc<str>> {
        self.lock().end.as_ref().map(|end| end.reason.clone())
    }

    /// Ready when nothing can be written any more.
    pub(super) async fn ended(&self) {
        self.queue.closed().await;
    }

    /// A new call, not yet sent.
    pub(super) fn register(
        self: &Arc<Self>,
        token: Option<Bytes>,
        kind: Kind,
    ) -> Result<Ticket, UpstreamError> {
        self.enter(&mut self.lock(), token, kind)
    }

    fn enter(
        self: &Arc<Self>,
        state: &mut State,
        token: Option<Bytes>,
        kind: Kind,
    ) -> Result<Ticket, UpstreamError> {
        if let Some(end) = &state.end {
            return Err(self.error(end));
        }
        if state.closing {
            return Err(UpstreamError::new(&self.upstream, Fault::Lost, "the connection is closing"));
        }
        let id = state.next;
        state.next += 1;
        let (news, arriving) = mpsc::unbounded_channel();
        let (answer, outcome) = oneshot::channel();
        let unread: Arc<Unread> = Arc::default();
        let entry = Entry { token, kind, written: false, news, unread: unread.clone(), answer };
        state.calls.insert(id, entry);
        Ok(Ticket { calls: self.clone(), id, news: arriving, unread, outcome })
    }

    /// Sends a notification.
    pub(super) async fn notify(&self, line: Bytes) -> Result<(), UpstreamError> {
        match self.queue.send(Outgoing { call: None, line }).await {
            Ok(()) => Ok(()),
            Err(_) => Err(UpstreamError::new(&self.upstream, Fault::Lost, "the connection has ended")),
        }
    }

    /// Answers the other side as soon as there is room.
    pub(super) async fn reply(&self, id: &RequestId, answer: Result<Bytes, RpcError>) {
        // Without a connection nobody waits for it.
        let _ = self.replies.send(reply_json(id, answer)).await;
    }

    /// Answers the other side if there is room.
    pub(super) fn reply_now(&self, id: &RequestId, answer: Result<Bytes, RpcError>) {
        if id.as_str().len() > LONGEST_ID || self.replies.try_send(reply_json(id, answer)).is_err() {
            tracing::debug!(upstream = %self.upstream, "it asks faster than it reads");
        }
    }

    /// Whether the call is still wanted. From now on, dropping it tells the other side.
    pub(super) fn begin_to_write(&self, id: u64) -> bool {
        let mut state = self.lock();
        let State { calls, questions, .. } = &mut *state;
        let Some(entry) = calls.get_mut(&id) else { return false };
        entry.written = true;
        if matches!(entry.kind, Kind::Plain) {
            questions.call_begins();
        }
        true
    }

    /// What comes unasked, from now on.
    pub(super) fn unsolicited(&self) -> Result<broadcast::Receiver<Notification>, UpstreamError> {
        let state = self.lock();
        match (&state.unsolicited, &state.end) {
            (Some(sender), _) => Ok(sender.subscribe()),
            (None, Some(end)) => Err(self.error(end)),
            (None, None) => Err(UpstreamError::new(&self.upstream, Fault::Lost, "the connection has ended")),
        }
    }

    /// Counts a listener to a resource. The first one subscribes, and gets the call that does.
    pub(super) fn hold(self: &Arc<Self>, uri: &str) -> Result<Option<Ticket>, UpstreamError> {
        let mut state = self.lock();
        if let Some(listeners) = state.subscribed.get_mut(uri) {
            *listeners += 1;
            return Ok(None);
        }
        let ticket = self.enter(&mut state, None, Kind::Internal)?;
        state.subscribed.insert(uri.to_owned(), 1);
        // Under the lock, so that it cannot overtake the `unsubscribe` of a listener that is just leaving.
        self.subscription_line(Method::ResourcesSubscribe, ticket.id, uri);
        if let Some(entry) = state.calls.get_mut(&ticket.id) {
            entry.written = true;
        }
        Ok(Some(ticket))
    }

    /// Takes a [`Calls::hold`] back. The last one unsubscribes.
    pub(super) fn release(&self, uri: &str) {
        let mut state = self.lock();
        let Some(listeners) = state.subscribed.get_mut(uri) else { return };
        *listeners -= 1;
        if *listeners == 0 {
            state.subscribed.remove(uri);
            // Nobody waits for the answer: it will find no call.
            let id = state.next;
            state.next += 1;
            self.subscription_line(Method::ResourcesUnsubscribe, id, uri);
        }
    }

    fn subscription_line(&self, method: Method, id: u64, uri: &str) {
        let params = Params::from_value(&json!({ "uri": uri }));
        let line = crate::protocol::request_json(&RequestId::from(id), &method, &params);
        // Without a writer there is no connection, and everybody is told so.
        let _ = self.urgent.send(Urgent::Line(line));
    }

    /// Gives one incoming line to whom it concerns.
    pub(super) fn receive(self: &Arc<Self>, line: Bytes) {
        let size = line.len();
        let edge = id_at_the_edge(&line).map(RequestId::from);
        let message = match &edge {
            Some(id) => Message::parse_response(line, id),
            None => Message::parse(line),
        };
        match message {
            Ok(Message::Response { id: Some(id), payload }) => self.answered(&id, payload),
            Ok(Message::Response { id: None, payload }) => {
                tracing::debug!(upstream = %self.upstream, ?payload, "answer without id");
            }
            Ok(Message::Notification { method, params }) => {
                self.notified(Notification { method, params }, size)
            }
            Ok(Message::Request { id, method, params }) => self.asked(id, method, params, size),
            Err(error) => {
                tracing::debug!(upstream = %self.upstream, %error, size, "skipped a line that is not MCP");
                // It is no answer, but its beginning says whose it was to be.
                if let Some(entry) = error.id.or(edge).as_ref().and_then(|id| self.take(id)) {
                    let _ = entry.answer.send(Err(End::new(Fault::Garbled, error.message)));
                }
            }
        }
    }

    fn answered(&self, id: &RequestId, payload: Payload) {
        let Some(entry) = self.take(id) else {
            return tracing::debug!(upstream = %self.upstream, ?id, "answer to no call, or too late");
        };
        let payload = match (&entry.kind, payload) {
            (Kind::Listen(Some(own)), Payload::Raw(result)) => Payload::Raw(with_subscription(result, own)),
            (_, payload) => payload,
        };
        let _ = entry.answer.send(Ok(payload));
    }

    fn notified(&self, mut notification: Notification, size: usize) {
        let mut state = self.lock();
        let State { calls, unsolicited, questions, .. } = &mut *state;
        let subject = match &notification.method {
            Method::Progress => match notification.params.get("progressToken").and_then(number) {
                Some(id) => id,
                None => return,
            },
            Method::Cancelled => {
                // The other side ends a question of its own, or a subscription of ours.
                let asked = notification.params.get_bytes("requestId").and_then(RequestId::from_json);
                if asked.is_some_and(|id| questions.withdraw(&id)) {
                    return;
                }
                let Some(id) = notification.params.get("requestId").and_then(number) else { return };
                if calls.get(&id).is_some_and(Entry::is_listen)
                    && let Some(entry) = calls.remove(&id)
                {
                    let done = Bytes::from_static(br#"{"resultType":"complete"}"#);
                    let _ = entry.answer.send(Ok(Payload::Raw(done)));
                }
                return;
            }
            method => {
                let about = subscription(&notification.params).or_else(|| match is_change(method) {
                    true => None,
                    false => the_only_one(calls, questions),
                });
                match (about, questions.owner()) {
                    (Some(id), _) => id,
                    (None, Some(owner)) if owner.whose() == Whose::One && !is_change(method) => {
                        return owner.aside().tell(&notification);
                    }
                    (None, _) => {
                        if let Some(everybody) = unsolicited {
                            // Nobody may be listening.
                            let _ = everybody.send(notification);
                        }
                        return;
                    }
                }
            }
        };
        let Some(entry) = calls.get(&subject) else {
            return tracing::debug!(upstream = %self.upstream, id = subject, "notification for no call");
        };
        match (&notification.method, &entry.token, &entry.kind) {
            (Method::Progress, Some(token), _) => {
                notification.params.object_mut().set("progressToken", translate::text(token));
            }
            (Method::Progress, None, _) => return,
            (_, _, Kind::Listen(Some(own))) => restore_subscription(notification.params.object_mut(), own),
            _ => {}
        }
        if !entry.offer(notification, size) {
            tracing::debug!(upstream = %self.upstream, id = subject, "a caller does not read its notifications");
            // Progress may be lost. A listener that missed something must know, so that it looks again.
            if entry.is_listen()
                && let Some(entry) = calls.remove(&subject)
            {
                let _ = entry.answer.send(Err(End::new(Fault::Lost, "the listener fell behind")));
                let _ = self.urgent.send(Urgent::Cancel(subject));
            }
        }
    }

    fn take(&self, id: &RequestId) -> Option<Entry> {
        let id = number(id.as_str())?;
        let mut state = self.lock();
        state.questions.call_ends(id);
        state.calls.remove(&id)
    }

    fn error(&self, end: &End) -> UpstreamError {
        UpstreamError::new(&self.upstream, end.fault, &*end.reason)
    }

    #[cfg(test)]
    pub(super) fn open_questions(&self) -> usize {
        self.lock().questions.open()
    }

    /// How many notifications wait to be read.
    #[cfg(test)]
    pub(super) fn unread(&self) -> usize {
        self.lock().calls.values().map(|entry| entry.unread.count.load(Ordering::Relaxed)).sum()
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The plain calls the other side knows of.
    pub(super) fn plain(&self) -> impl Iterator<Item = u64> {
        plain(&self.calls)
    }

    /// Asks in the stream of a call. `false` when it has just ended.
    pub(super) fn ask(&self, call: u64, question: ServerRequest) -> bool {
        self.calls.get(&call).is_some_and(|entry| entry.news.send(News::Question(question)).is_ok())
    }
}

impl Entry {
    fn is_listen(&self) -> bool {
        matches!(self.kind, Kind::Listen(_))
    }

    fn offer(&self, notification: Notification, size: usize) -> bool {
        self.unread.add(size) && self.news.send(News::Notice { notification, size }).is_ok()
    }
}

/// One call under way. Dropped before its end, it is cancelled.
pub(super) struct Ticket {
    calls: Arc<Calls>,
    id: u64,
    news: mpsc::UnboundedReceiver<News>,
    unread: Arc<Unread>,
    outcome: oneshot::Receiver<Result<Payload, End>>,
}

/// What happens to a call.
pub(super) enum Event {
    Notification(Notification),
    Question(ServerRequest),
    Final(Payload),
}

impl Ticket {
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// Sends the request as soon as there is room for it.
    pub(super) async fn send(&self, method: &Method, params: &Params) {
        // If the connection has ended instead, the next event says so.
        if let Ok(room) = self.calls.queue.reserve().await {
            let line = crate::protocol::request_json(&RequestId::from(self.id), method, params);
            room.send(Outgoing { call: Some(self.id), line });
        }
    }

    /// What happens next. Nothing comes after [`Event::Final`] or an error.
    pub(super) async fn next(&mut self) -> Result<Event, UpstreamError> {
        while let Some(news) = self.news.recv().await {
            match news {
                News::Notice { notification, size } => {
                    self.unread.remove(size);
                    return Ok(Event::Notification(notification));
                }
                // The call is over: nobody waits for an answer any more.
                News::Question(_) if self.news.is_closed() => {}
                News::Question(question) => return Ok(Event::Question(question)),
            }
        }
        match (&mut self.outcome).await {
            Ok(Ok(payload)) => Ok(Event::Final(payload)),
            Ok(Err(end)) => Err(self.calls.error(&end)),
            Err(_) => Err(UpstreamError::new(&self.calls.upstream, Fault::Lost, "the call was given up")),
        }
    }

    /// The answer, without the notifications before it.
    pub(super) async fn answer(&mut self) -> Result<Payload, UpstreamError> {
        loop {
            if let Event::Final(payload) = self.next().await? {
                return Ok(payload);
            }
        }
    }

    /// The answer, if it is there.
    pub(super) fn answer_now(&mut self) -> Option<Payload> {
        self.outcome.try_recv().ok()?.ok()
    }

    /// Stops waiting without a word to the other side.
    pub(super) fn forget(self) {
        self.calls.lock().calls.remove(&self.id);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut state = self.calls.lock();
        let Some(entry) = state.calls.remove(&self.id).filter(|entry| entry.written) else { return };
        if matches!(entry.kind, Kind::Plain) {
            state.questions.call_cancelled(self.id);
        }
        let _ = self.calls.urgent.send(Urgent::Cancel(self.id));
    }
}

/// Says "look again" to everybody, whoever caused it.
fn is_change(method: &Method) -> bool {
    matches!(
        method,
        Method::ToolsChanged | Method::PromptsChanged | Method::ResourcesChanged | Method::ResourceUpdated
    )
}

/// Nothing on one channel tells which request a log message is about, unless there is only one, and none was cancelled
/// a moment ago. Among calls of one client there is no harm in being wrong.
fn the_only_one(calls: &HashMap<u64, Entry>, questions: &mut Questions) -> Option<u64> {
    let is_one = questions.owner().is_some_and(|owner| owner.whose() == Whose::One);
    let mut plain = plain(calls);
    match (plain.next(), plain.next()) {
        (Some(id), None) if is_one || !questions.is_haunted() => Some(id),
        _ => None,
    }
}

fn plain(calls: &HashMap<u64, Entry>) -> impl Iterator<Item = u64> {
    calls.iter().filter(|(_, entry)| matches!(entry.kind, Kind::Plain) && entry.written).map(|(id, _)| *id)
}

fn reply_json(id: &RequestId, answer: Result<Bytes, RpcError>) -> Bytes {
    let (member, body) = match &answer {
        Ok(result) => ("result", translate::text(result)),
        Err(error) => ("error", translate::text(error.as_bytes())),
    };
    format!(r#"{{"jsonrpc":"2.0","id":{},"{member}":{body}}}"#, id.as_str()).into()
}

fn subscription(params: &Params) -> Option<u64> {
    number(params.meta()?.get(meta::SUBSCRIPTION_ID)?)
}

fn restore_subscription(object: &mut RawObject, own: &RequestId) {
    if let Some(mut m) = object.get_object("_meta")
        && m.get(meta::SUBSCRIPTION_ID).is_some()
    {
        m.set(meta::SUBSCRIPTION_ID, own.as_str());
        object.set("_meta", m.as_str());
    }
}

fn with_subscription(result: Bytes, own: &RequestId) -> Bytes {
    match RawObject::parse(result.clone()) {
        Ok(mut object) => {
            restore_subscription(&mut object, own);
            object.into_bytes()
        }
        Err(_) => result,
    }
}

/// Our ids are numbers. Some servers give them back as strings.
fn number(json: &str) -> Option<u64> {
    json.trim_matches('"').parse().ok()
}

/// The id of a response whose id stands where [`Message::parse_response`] looks for it, so that the result need not
/// be scanned.
fn id_at_the_edge(line: &[u8]) -> Option<u64> {
    let digits = match line.strip_prefix(br#"{"jsonrpc":"2.0","id":"#) {
        Some(rest) => &rest[..rest.iter().take(20).take_while(|b| b.is_ascii_digit()).count()],
        None => {
            let rest = line.strip_prefix(br#"{"result":"#)?.strip_suffix(b"}")?;
            let digits = rest.iter().rev().take(20).take_while(|b| b.is_ascii_digit()).count();
            &rest[rest.len() - digits..]
        }
    };
    std::str::from_utf8(digits).ok()?.parse().ok()
}
