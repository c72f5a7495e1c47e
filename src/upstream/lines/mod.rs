//! MCP over two byte streams, one message a line: a child's stdin and stdout, or an in-memory pipe.
//!
//! All requests share one connection, so ids and progress tokens are the connection's own and are mapped back on the
//! way to the caller. Above it the protocol is the internal one; a legacy peer is translated here.
//!
//! Who does what: `wire` moves lines, `calls` knows who waits for them, `handshake` finds the era, `owner` is whose the
//! connection is, `questions` finds whom a legacy peer asks, and a `place` has one connection after another.

mod calls;
mod handshake;
mod owner;
mod place;
mod questions;
mod reader;
#[cfg(test)]
mod tests;
mod wire;

use std::{any::Any, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};

use self::{
    calls::{Calls, Event, Kind, Ticket},
    owner::Whose,
};
pub(crate) use self::{
    handshake::{Opened, Unopened, open},
    owner::Owner,
    place::Place,
    wire::{Surroundings, Wire},
};
use super::{link::Connection, translate};
use crate::{
    BoxError,
    error::UpstreamError,
    protocol::{
        Frame, FrameStream, ListenFilter, McpRequest, McpResponse, Method, Params, Payload, ProtocolVersion,
        RawObject, ServerName, sign_result,
    },
};

#[cfg(feature = "client")]
pub(crate) use self::place::Places;

/// The longest line that is read unless somebody says otherwise.
pub(crate) const MAX_LINE: usize = 16 * 1024 * 1024;

/// How long a call waits for the level of logs to be set.
const BRIEFLY: Duration = Duration::from_secs(5);

/// A connection that is open.
pub(crate) struct Lines {
    wire: Wire,
    opened: Opened,
    /// The level last set with `logging/setLevel`.
    log_level: tokio::sync::Mutex<Option<Bytes>>,
    /// What lives exactly as long as the connection: the process, the task that serves the other end.
    _owned: Box<dyn Any + Send + Sync>,
}

impl Lines {
    pub(crate) fn new(wire: Wire, opened: Opened, owned: impl Any + Send + Sync) -> Self {
        Lines { wire, opened, log_level: tokio::sync::Mutex::default(), _owned: Box::new(owned) }
    }

    /// Sends one request or notification, and waits for the first that comes back.
    pub(crate) async fn call(self: Arc<Self>, request: McpRequest) -> Result<McpResponse, BoxError> {
        if request.id().is_none() && request.method().is_notification() {
            return Ok(self.notify(&request).await?);
        }
        match (&self.opened, request.method()) {
            (Opened::Legacy { discover, .. }, Method::Discover) => Ok(McpResponse::raw(discover.clone())),
            (Opened::Legacy { capabilities, .. }, Method::Listen) => {
                let filter = offered(ListenFilter::of(request.params()), capabilities);
                Ok(self.listen(filter).await?)
            }
            (Opened::Legacy { capabilities, .. }, _) => {
                let params = translate::checked_legacy_params(&request)?;
                self.follow_log_level(&request, capabilities).await?;
                Ok(self.forward(request, params).await?)
            }
            (Opened::Modern, _) => {
                let params = translate::modern_params(&request, ProtocolVersion::LATEST);
                Ok(self.forward(request, params).await?)
            }
        }
    }

    /// What the other side speaks.
    #[cfg(feature = "client")]
    pub(crate) fn era(&self) -> crate::protocol::Era {
        self.opened.era()
    }

    /// Whether no cancelled call may still have something to say.
    #[cfg(feature = "client")]
    fn is_quiet(&self) -> bool {
        self.wire.calls().is_quiet()
    }

    async fn forward(
        self: Arc<Self>,
        request: McpRequest,
        mut params: Params,
    ) -> Result<McpResponse, UpstreamError> {
        let token = params.progress_token();
        // A listener must not keep an upstream alive that nobody else wants any more.
        let (kind, keep) = match request.method() {
            Method::Listen => (Kind::Listen(request.id().cloned()), None),
            _ => (Kind::Plain, Some(self.clone())),
        };
        let ticket = self.wire.calls().register(token.clone(), kind)?;
        let sign = matches!(self.opened, Opened::Modern).then(|| self.wire.calls().upstream().clone());
        drop(self);
        if let (Some(mut m), Some(_)) = (params.meta().cloned(), token) {
            m.set("progressToken", ticket.id().to_string());
            params.object_mut().set("_meta", m.as_str());
        }
        ticket.send(request.method(), &params).await;
        drop((request, params));
        respond(ticket, keep, sign).await
    }

    /// Tells a legacy peer the level its one client wants, or the least severe that any of several wants: each gets no
    /// more than it asked for, at its door. Many servers take several requests at once, so the call waits until this one
    /// is taken, though not for ever.
    async fn follow_log_level(
        &self,
        request: &McpRequest,
        capabilities: &RawObject,
    ) -> Result<(), UpstreamError> {
        let client = &request.caller().client;
        let Some(level) = &client.log_level else { return Ok(()) };
        let calls = self.wire.calls();
        if capabilities.get("logging").is_none() {
            return Ok(());
        }
        let mut current = self.log_level.lock().await;
        let differs = match calls.whose() {
            Some(Whose::One) => current.as_ref() != Some(level),
            _ => client.wants_more_than(current.as_ref()),
        };
        if !differs {
            return Ok(());
        }
        let mut params = Params::default();
        params.object_mut().set("level", translate::text(level));
        let mut ticket = calls.register(None, Kind::Internal)?;
        let answer = async {
            ticket.send(&Method::SetLevel, &params).await;
            ticket.answer().await
        };
        match tokio::time::timeout(BRIEFLY, answer).await {
            Ok(Ok(Payload::Raw(_))) => {}
            Ok(Err(error)) => return Err(error),
            Ok(Ok(_)) | Err(_) => {
                tracing::debug!(upstream = %calls.upstream(), "it did not take the log level");
                ticket.forget();
            }
        }
        *current = Some(level.clone());
        Ok(())
    }

    async fn notify(&self, notification: &McpRequest) -> Result<McpResponse, UpstreamError> {
        // These two are about the caller's own connection.
        if !matches!(notification.method(), Method::Cancelled | Method::Initialized) {
            let params = match self.opened {
                Opened::Modern => translate::modern_params(notification, ProtocolVersion::LATEST),
                Opened::Legacy { .. } => translate::legacy_params(notification),
            };
            let line = crate::protocol::notification_json(notification.method(), &params);
            self.wire.calls().notify(line).await?;
        }
        Ok(McpResponse::raw("{}"))
    }

    /// The answer of a legacy peer to `subscriptions/listen`.
    async fn listen(&self, mut filter: ListenFilter) -> Result<McpResponse, UpstreamError> {
        let calls = self.wire.calls();
        let notifications = calls.unsolicited()?;
        let mut held = Held { calls: calls.clone(), uris: Vec::new() };
        let mut asked = Vec::new();
        for uri in std::mem::take(&mut filter.uris) {
            if !held.uris.contains(&uri) {
                let ticket = calls.hold(&uri)?;
                held.uris.push(uri.clone());
                asked.extend(ticket.map(|ticket| (uri, ticket)));
            }
        }
        for (uri, mut ticket) in asked {
            if let Payload::Error(error) = ticket.answer().await? {
                tracing::debug!(upstream = %calls.upstream(), uri, %error, "cannot subscribe");
                held.uris.retain(|u| *u != uri);
                calls.release(&uri);
            }
        }
        filter.uris.clone_from(&held.uris);
        let frames = translate::listen_stream(filter, notifications).inspect(move |_| {
            let _held = &held;
        });
        Ok(McpResponse::new(Payload::Stream(Box::pin(frames))))
    }
}

impl Connection for Lines {
    fn is_closed(&self) -> bool {
        self.wire.calls().is_closed()
    }

    fn why(&self) -> Option<Arc<str>> {
        self.wire.calls().why()
    }
}

/// The part of a filter that a legacy peer can honour.
fn offered(filter: ListenFilter, capabilities: &RawObject) -> ListenFilter {
    let has = |room, key| capabilities.get_object(room).is_some_and(|room| room.get(key) == Some("true"));
    ListenFilter {
        tools: filter.tools && has("tools", "listChanged"),
        prompts: filter.prompts && has("prompts", "listChanged"),
        resources: filter.resources && has("resources", "listChanged"),
        uris: if has("resources", "subscribe") { filter.uris } else { Vec::new() },
    }
}

/// Subscriptions to resources that a listener needs.
struct Held {
    calls: Arc<Calls>,
    uris: Vec<String>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.uris.iter().for_each(|uri| self.calls.release(uri));
    }
}

/// One payload, or a stream as soon as something comes before the result. A modern peer's result is signed.
async fn respond(
    mut ticket: Ticket,
    keep: Option<Arc<Lines>>,
    sign: Option<ServerName>,
) -> Result<McpResponse, UpstreamError> {
    let signed = move |payload| match &sign {
        Some(upstream) => sign_result(upstream, payload),
        None => payload,
    };
    let first = match ticket.next().await? {
        Event::Final(payload) => return Ok(McpResponse::new(signed(payload))),
        Event::Notification(notification) => Ok(Frame::Notification(notification)),
        Event::Question(question) => Ok(Frame::Request(question)),
    };
    let rest = stream::unfold(Some((ticket, keep, signed)), |open| async move {
        let (mut ticket, keep, signed) = open?;
        Some(match ticket.next().await {
            Ok(Event::Notification(n)) => (Ok(Frame::Notification(n)), Some((ticket, keep, signed))),
            Ok(Event::Question(question)) => (Ok(Frame::Request(question)), Some((ticket, keep, signed))),
            Ok(Event::Final(payload)) => (Ok(Frame::Final(signed(payload))), None),
            Err(error) => (Err(BoxError::from(error)), None),
        })
    });
    let frames: FrameStream = Box::pin(stream::iter([first]).chain(rest));
    Ok(McpResponse::new(Payload::Stream(frames)))
}
