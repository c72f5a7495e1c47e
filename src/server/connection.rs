//! One client on one channel: what stdio and HTTP+SSE have in common.
//!
//! All messages to the client leave by one way, whatever request they belong to. `initialize` opens a session that
//! lasts as long as the connection; requests of the modern era stand by themselves beside it.

use std::{
    collections::HashMap,
    panic::AssertUnwindSafe,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use futures_util::{
    FutureExt as _, StreamExt as _,
    future::{AbortHandle, abortable},
};
use serde_json::json;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::{
    legacy::{self, Session},
    message,
    modern::{self, is_modern_version},
    refusal::{Refusal, check_kind},
    streams::{Memory, Outlet, Reader, Streams},
};
use crate::{
    McpService,
    identity::{Principal, Scope},
    protocol::{Era, Message, Method, Params, Payload, RequestId, RpcError, code},
};

/// A connection's client, and what it has under way.
pub(in crate::server) struct Connection<S> {
    service: S,
    who: Who,
    streams: Arc<Streams>,
    out: Arc<Outlet>,
    session: OnceLock<Arc<Session>>,
    running: Mutex<Running>,
    most: u32,
    /// One for each request under way.
    permits: Arc<Semaphore>,
    ending: watch::Sender<bool>,
}

/// Whose connection it is.
#[derive(Clone, Debug)]
pub(in crate::server) struct Who {
    pub(in crate::server) principal: Principal,
    pub(in crate::server) scope: Scope,
    /// Whether requests of the modern era are served, too.
    pub(in crate::server) modern: bool,
}

#[derive(Default)]
struct Running {
    last: u64,
    by_id: HashMap<RequestId, (u64, AbortHandle)>,
}

impl<S: McpService> Connection<S> {
    /// A connection, and what its client is told. At most `most` requests are under way at once.
    pub(in crate::server) fn open(service: S, who: Who, most: u32) -> (Arc<Self>, Reader) {
        let streams = Streams::new(Memory::NONE);
        let (out, reader) = streams.open(false);
        let connection = Connection {
            service,
            who,
            streams,
            out,
            session: OnceLock::new(),
            running: Mutex::default(),
            most,
            permits: Arc::new(Semaphore::new(most as usize)),
            ending: watch::Sender::new(false),
        };
        (Arc::new(connection), reader)
    }

    /// Takes a message. Requests go on by themselves; this waits only for room to answer what is answered at once, and
    /// for `initialize`, because what is sent behind it belongs to the session.
    pub(in crate::server) async fn take(self: &Arc<Self>, message: Message) {
        let taken = match check_kind(&message) {
            Err(refusal) => Err(refusal),
            Ok(()) => match message {
                Message::Request { id, method, params } => self.request(id, method, params).await,
                Message::Notification { method, params } => {
                    self.notification(method, params);
                    Ok(())
                }
                Message::Response { id, payload } => {
                    self.answered(id, payload);
                    Ok(())
                }
            },
        };
        if let Err(refusal) = taken {
            self.refuse(&refusal).await;
        }
    }

    /// Says no.
    pub(in crate::server) async fn refuse(&self, refusal: &Refusal) {
        self.out.send(refusal.message()).await;
    }

    async fn request(self: &Arc<Self>, id: RequestId, method: Method, params: Params) -> Result<(), Refusal> {
        let session = self.session.get();
        let named = modern::named_version(&params).map(|version| is_modern_version(&version));
        // Without a session these can only be meant the modern way; what they lack is said there.
        let probe = session.is_none() && matches!(method, Method::Discover | Method::Listen);
        if self.who.modern && named.unwrap_or(probe) {
            return self.spawn(id.clone(), self.clone().modern(id, method, params));
        }
        let first = "send `initialize` first, or a request of MCP 2026-07-28";
        match (session, &method) {
            (None, Method::Initialize) => self.initialize(&id, &params).await,
            (Some(_), Method::Initialize) => {
                Err(Refusal::new(Some(id), code::INVALID_REQUEST, "`initialize` was sent before"))
            }
            // The one request that may come before.
            (None, Method::Ping) => {
                let pong = Payload::Value(json!({}));
                self.out.send(message::response(&id, &method, pong, Era::Legacy)).await;
                Ok(())
            }
            (None, _) => Err(Refusal::new(Some(id), code::INVALID_REQUEST, first)),
            (Some(session), _) => {
                let held = self.clone().legacy(session.clone(), id.clone(), method, params);
                self.spawn(id, held)
            }
        }
    }

    async fn initialize(&self, id: &RequestId, params: &Params) -> Result<(), Refusal> {
        let Who { principal, scope, .. } = self.who.clone();
        let open = |caller| {
            let session = Session::new(caller, self.streams.clone());
            session.set_outbox(self.out.clone());
            self.session.set(session).ok()
        };
        let (answer, _) =
            legacy::initialize(self.service.clone(), principal, scope, id, params, open).await?;
        self.out.send(answer).await;
        Ok(())
    }

    /// A request on its way, which can be cancelled from now on.
    fn spawn(
        self: &Arc<Self>,
        id: RequestId,
        request: impl Future<Output = ()> + Send + 'static,
    ) -> Result<(), Refusal> {
        let Ok(permit) = self.permits.clone().try_acquire_owned() else {
            let message = format!("more than {} requests at once", self.most);
            return Err(Refusal::new(Some(id), code::OVERLOADED, message));
        };
        let mut running = self.running();
        if running.by_id.contains_key(&id) {
            let message = "a request with this id is under way";
            return Err(Refusal::new(Some(id), code::INVALID_REQUEST, message));
        }
        running.last += 1;
        let number = running.last;
        let under_way = UnderWay { connection: self.clone(), id: id.clone(), number, _permit: permit };
        let (request, cancel) = abortable(async move {
            // A layer that panics must not leave a client waiting.
            if AssertUnwindSafe(request).catch_unwind().await.is_err() {
                let error = RpcError::new(code::INTERNAL_ERROR, "internal error");
                under_way.connection.out.send(message::error(Some(&under_way.id), &error)).await;
            }
            drop(under_way);
        });
        running.by_id.insert(id, (number, cancel));
        drop(running);
        tokio::spawn(request);
        Ok(())
    }

    async fn modern(self: Arc<Self>, id: RequestId, method: Method, params: Params) {
        let admitted = modern::client_of(&params, &id).and_then(|client| {
            let client = client?;
            modern::check_method(&id, &method)?;
            Ok(client)
        });
        let client = match admitted {
            Ok(client) => client,
            Err(refusal) => return self.refuse(&refusal).await,
        };
        let Who { principal, scope, .. } = self.who.clone();
        let request = modern::request(principal, scope, client, &id, method, params);
        match modern::answer(self.service.clone(), request, id.clone()).await {
            modern::Answer::Message(message, _, _) => drop(self.out.send(message).await),
            modern::Answer::Messages(mut messages, _) => {
                while let Some(message) = messages.next().await {
                    self.out.send(message).await;
                }
            }
            modern::Answer::Subscription(messages, last, _) => {
                let mut messages = pin!(messages.take_until(self.ended()));
                while let Some(message) = messages.next().await {
                    self.out.send(message).await;
                }
                // No stream ends here, so both are said (patterns: cancellation, and graceful closure).
                self.out.send(modern::cancelled_subscription(&id)).await;
                self.out.send(last).await;
            }
        }
    }

    async fn legacy(self: Arc<Self>, session: Arc<Session>, id: RequestId, method: Method, params: Params) {
        match legacy::answer(self.service.clone(), session, id, method, params).await {
            Ok(legacy::Answer::Message(message, _)) => drop(self.out.send(message).await),
            Ok(legacy::Answer::Talk(talk)) => talk.hold(self.out.clone()).await,
            Ok(legacy::Answer::Nothing) => {}
            Err(refusal) => self.refuse(&refusal).await,
        }
    }

    fn notification(self: &Arc<Self>, method: Method, params: Params) {
        if method == Method::Cancelled {
            if let Some(id) = params.get_bytes("requestId").and_then(RequestId::from_json) {
                self.cancel(&id);
            }
            return;
        }
        let is_modern = modern::named_version(&params).is_some_and(|version| is_modern_version(&version));
        let service = self.service.clone();
        match self.session.get().filter(|_| !is_modern).cloned() {
            // From now on it may be told, and asked, what belongs to no request.
            Some(session) if method == Method::Initialized => legacy::listen(service, &session),
            Some(session) => self.pass_on(async move {
                legacy::take_notification(service, &session, method, params).await;
            }),
            None if self.who.modern && method != Method::Initialized => {
                let Who { principal, scope, .. } = self.who.clone();
                self.pass_on(modern::take_notification(service, principal, scope, method, params));
            }
            None => {}
        }
    }

    /// Nobody waits for what comes of a notification. Those that are too many are lost.
    fn pass_on(&self, notification: impl Future<Output = ()> + Send + 'static) {
        let Ok(permit) = self.permits.clone().try_acquire_owned() else {
            return tracing::debug!("dropped a notification of a client that has too much under way");
        };
        let ended = self.ended();
        tokio::spawn(async move {
            tokio::select! {
                () = notification => {}
                () = ended => {}
            }
            drop(permit);
        });
    }

    fn answered(&self, id: Option<RequestId>, payload: Payload) {
        // A client of the modern era is asked nothing, and sends no answers.
        let session = self.session.get();
        if let Some(reply) = session.zip(id).and_then(|(session, id)| session.answered(&id)) {
            reply.send(payload);
        }
    }

    fn cancel(&self, id: &RequestId) {
        // First what runs inside, so that it does not run on by itself.
        if let Some(session) = self.session.get() {
            session.cancel(id);
        }
        let running = self.running().by_id.remove(id);
        if let Some((_, handle)) = running {
            handle.abort();
        }
    }

    /// Done when the connection is about to end.
    pub(in crate::server) fn ended(&self) -> impl Future<Output = ()> + Send + use<S> {
        let mut ending = self.ending.subscribe();
        // An error would say that it has ended.
        async move { drop(ending.wait_for(|now| *now).await) }
    }

    /// Ends subscriptions, and waits for requests under way.
    pub(in crate::server) async fn drain(&self, grace: Duration) {
        self.ending.send_replace(true);
        let _ = tokio::time::timeout(grace, self.permits.acquire_many(self.most)).await;
    }

    /// Ends everything.
    pub(in crate::server) fn close(&self) {
        self.ending.send_replace(true);
        if let Some(session) = self.session.get() {
            session.close();
        }
        let running = std::mem::take(&mut self.running().by_id);
        running.values().for_each(|(_, handle)| handle.abort());
        self.out.end();
    }

    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Forgets the request when it is over.
struct UnderWay<S: McpService> {
    connection: Arc<Connection<S>>,
    id: RequestId,
    number: u64,
    _permit: OwnedSemaphorePermit,
}

impl<S: McpService> Drop for UnderWay<S> {
    fn drop(&mut self) {
        let mut running = self.connection.running();
        if running.by_id.get(&self.id).is_some_and(|(number, _)| *number == self.number) {
            running.by_id.remove(&self.id);
        }
    }
}
