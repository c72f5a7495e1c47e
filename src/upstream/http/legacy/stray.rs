//! What belongs to no request: the stream it comes on, who hears it, and what has to be subscribed to.

use std::{
    sync::{Arc, Mutex, PoisonError, Weak, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use serde_json::json;
use tokio::sync::{broadcast, mpsc};

use super::{
    BRIEFLY, is_list_change,
    session::{Session, Unopened},
};
use crate::{
    identity::Client,
    protocol::{
        Frame, FrameStream, ListenFilter, McpRequest, McpResponse, Message, Method, Notification, Params,
        Payload, RpcError, ServerRequest, code,
    },
    upstream::{
        http::{sse::Cursor, wire::ReadError},
        translate,
    },
};

/// Notifications that nobody has read yet; the oldest go first.
const NOTIFICATIONS: usize = 64;
/// Questions that the client's stream has not taken yet; more are refused.
const QUESTIONS: usize = 16;
/// A server that cannot be reached for longer has lost the session.
const GIVE_UP_AFTER: Duration = Duration::from_secs(30);

/// Who hears what comes without belonging to a request, over one session after another.
pub(super) struct Stray {
    notifications: broadcast::Sender<Notification>,
    /// Who is asked: the one client, as long as it listens. A question has one answer, so it has one receiver.
    /// Boxed: a channel makes room for many, and mostly there is none.
    client: Mutex<Option<mpsc::Sender<Box<ServerRequest>>>>,
}

impl Default for Stray {
    fn default() -> Self {
        Stray { notifications: broadcast::Sender::new(NOTIFICATIONS), client: Mutex::default() }
    }
}

impl Stray {
    /// Whether somebody listens.
    pub(super) fn is_heard(&self) -> bool {
        self.notifications.receiver_count() > 0
    }

    /// Tells everybody who listens. Nobody may be; then nobody misses it.
    pub(super) fn tell(&self, notification: Notification) {
        let _ = self.notifications.send(notification);
    }

    /// Whether the one client whose sessions these are has a stream for it.
    fn has_client(&self) -> bool {
        let client = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        client.as_ref().is_some_and(|client| !client.is_closed())
    }

    /// Asks the client; nobody can be asked when it does not listen, or does not keep up.
    fn ask(&self, question: ServerRequest) {
        let client = self.client.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let asked = match client {
            Some(client) => {
                client.try_send(Box::new(question)).map_err(mpsc::error::TrySendError::into_inner)
            }
            None => Err(Box::new(question)),
        };
        if let Err(question) = asked {
            let error = RpcError::new(code::METHOD_NOT_FOUND, "nobody can be asked outside of a call");
            question.reply.refuse(error);
        }
    }

    /// What is said to whoever listens, other than what the gateway tells by itself.
    pub(super) fn notifications(&self) -> FrameStream {
        Box::pin(stream::unfold(self.notifications.subscribe(), |mut stray| async move {
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

    /// The same, with the questions that `client` can answer. It takes over from whoever was asked before.
    pub(super) fn to_client(&self, client: Client) -> FrameStream {
        let (sender, receiver) = mpsc::channel(QUESTIONS);
        let notifications = self.notifications();
        *self.client.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender);
        let questions = stream::unfold((receiver, client), |(mut questions, client)| async move {
            loop {
                let question = questions.recv().await?;
                match client.can_answer(&question.method, &question.params) {
                    Ok(()) => return Some((Ok(Frame::Request(*question)), (questions, client))),
                    Err(error) => question.reply.refuse(error),
                }
            }
        });
        Box::pin(stream::select(notifications, questions))
    }
}

impl Session {
    /// The unsolicited notifications the filter wants, with the resources in it subscribed to. It ends with the
    /// session: then the subscriptions are gone, and whoever wants them must ask again.
    pub(super) async fn listen(self: &Arc<Self>, request: &McpRequest) -> McpResponse {
        let filter = ListenFilter::of(request.params());
        let (notifications, over) = (self.stray.notifications.subscribe(), self.over());
        self.start_listening();
        let mut guard = Unsubscribe { session: Arc::downgrade(self), uris: Vec::new() };
        for uri in &filter.uris {
            // The guard has it before the server is asked: whoever waits for that may be dropped.
            guard.uris.push(uri.clone());
            if !self.subscribe(uri).await {
                guard.uris.pop();
            }
        }
        let filter = ListenFilter { uris: guard.uris.clone(), ..filter };
        let frames = translate::listen_stream(filter, notifications).inspect(move |_| {
            let _held = &guard;
        });
        McpResponse::new(Payload::Stream(Box::pin(frames.take_until(over))))
    }

    /// Opens the stream for unsolicited messages, once.
    pub(super) fn start_listening(self: &Arc<Self>) {
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

    async fn subscription(&self, method: &Method, uri: &str) -> bool {
        let params = Params::from_value(&json!({ "uri": uri }));
        matches!(self.ask(method, &params).await, Some(Payload::Raw(_)))
    }

    /// The call that a stray message goes to, where its client has no stream for such.
    fn overhearing(&self) -> Option<mpsc::Sender<Frame>> {
        if self.stray.has_client() { None } else { self.under_way.whose() }
    }

    /// A message that belongs to no request of ours.
    async fn take_stray(self: &Arc<Self>, data: Bytes) {
        match Message::parse(data) {
            Ok(Message::Notification { method, params }) => {
                let notification = Notification { method, params };
                match self.overhearing().filter(|_| notification.method == Method::LogMessage) {
                    Some(call) => drop(call.try_send(Frame::Notification(notification))),
                    None => self.stray.tell(notification),
                }
            }
            Ok(Message::Request { id, method: Method::Ping, .. }) => self.pong(&id).await,
            Ok(Message::Request { id, method, params }) => {
                let Some(question) = self.question(id, method, params).await else { return };
                match self.overhearing() {
                    // A call that does not take it has refused it.
                    Some(call) => drop(call.try_send(Frame::Request(question))),
                    None => self.stray.ask(question),
                }
            }
            Ok(Message::Response { id: Some(id), payload }) => self.late.put(id, payload),
            Ok(Message::Response { .. }) | Err(_) => {}
        }
    }
}

/// Holds the stream for unsolicited messages open as long as the session lives, if the server offers one. A server
/// that cannot be reached may have been restarted and lost the session; the next request finds out, and whoever
/// listens is told that it is over.
async fn keep_listening(session: Weak<Session>) {
    let Some(way) = session.upgrade().map(|session| session.way.clone()) else { return };
    let (mut cursor, mut was_open, mut failures) = (Cursor::default(), false, 0);
    loop {
        let opened = way.open_stream(cursor.clone()).await;
        if let Some(session) = session.upgrade() {
            session.stream_settled.send_replace(true);
        }
        match opened {
            Ok(mut events) => {
                (was_open, failures) = (true, 0);
                let end = loop {
                    match events.next().await {
                        Ok(Some(event)) => {
                            let Some(session) = session.upgrade() else { return };
                            session.take_stray(event.data).await;
                        }
                        Ok(None) => break None,
                        Err(error) => break Some(error),
                    }
                };
                cursor = events.cursor().clone();
                if let Some(ReadError::TooLarge(_)) = end {
                    // It would be sent again and again.
                    cursor.id = None;
                }
            }
            // It has forgotten how far we were, and may have the stream all the same.
            Err(Unopened::NotOffered | Unopened::Unknown) if cursor.id.is_some() => cursor.id = None,
            // One that never had the stream may say 404 of that.
            Err(Unopened::Unknown) if was_open => break,
            Err(Unopened::NotOffered | Unopened::Unknown) => return,
            Err(Unopened::Failed) => failures += 1,
        }
        let wait = cursor.wait() * 2u32.pow(failures);
        if wait > GIVE_UP_AFTER {
            break;
        }
        tokio::time::sleep(wait).await;
    }
    // One that never opened the stream may be well all the same.
    if let Some(session) = session.upgrade().filter(|_| was_open) {
        session.expire();
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
