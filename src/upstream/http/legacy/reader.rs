//! The stream that answers one request, over as many connections as the server likes.
//!
//! A server that gives its events ids may close the connection and go on with the stream on another (MCP 2025-11-25,
//! transports, resumability): whoever wants the rest asks for it, when the server said it may be asked again.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http::HeaderValue;

use super::{
    is_list_change,
    session::{CancelOnDrop, Session, Unopened},
};
use crate::{
    error::{Fault, UpstreamError},
    protocol::{Frame, FrameStream, McpResponse, Message, Method, Notification, Payload, RequestId},
    upstream::{
        http::{
            modern::answers,
            sse::{Event, Events},
            wire::ReadError,
        },
        translate::text,
    },
};

/// How often a stream is asked for in a row without anything new on it.
const MOST_ATTEMPTS: usize = 5;

/// Reads it.
pub(super) struct Reader {
    session: Arc<Session>,
    events: Events,
    id: RequestId,
    /// The client's own progress token.
    token: Option<Bytes>,
    cancel: Option<CancelOnDrop>,
    /// How often the rest was asked for in a row.
    attempts: usize,
    /// After which event that was.
    asked_after: Option<HeaderValue>,
}

impl Reader {
    pub(super) fn new(
        session: Arc<Session>,
        events: Events,
        id: RequestId,
        token: Option<Bytes>,
        cancel: CancelOnDrop,
    ) -> Self {
        Reader { session, events, id, token, cancel: Some(cancel), attempts: 0, asked_after: None }
    }

    /// A stream whose first event is the result is no stream.
    pub(super) async fn answer(mut self) -> Result<McpResponse, UpstreamError> {
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
        let session = self.session.clone();
        let wire = &session.way.wire;
        loop {
            let id = self.id.clone();
            let event = tokio::select! {
                biased;
                event = self.event() => event?,
                late = session.late.answer(&id) => {
                    self.disarm();
                    return Ok(Frame::Final(late));
                }
            };
            match Message::parse_response(event.data.clone(), &self.id) {
                Ok(Message::Notification { method, params }) => match method {
                    method if is_list_change(&method) || method == Method::ResourceUpdated => {
                        session.stray.tell(Notification { method, params });
                    }
                    method => return Ok(Frame::Notification(self.own(Notification { method, params }))),
                },
                Ok(Message::Response { id, payload }) if answers(&id, &payload, &self.id) => {
                    self.disarm();
                    return Ok(Frame::Final(payload));
                }
                // On a stream that was opened again, it may be what another call waits for.
                Ok(Message::Response { id: Some(other), payload }) if self.asked_after.is_some() => {
                    session.late.put(other, payload);
                }
                Ok(Message::Response { .. }) => {
                    return Err(wire.error(Fault::Garbled, "an answer to something else"));
                }
                Ok(Message::Request { id, method: Method::Ping, .. }) => session.pong(&id).await,
                Ok(Message::Request { id, method, params }) => {
                    if let Some(question) = session.question(id, method, params).await {
                        return Ok(Frame::Request(question));
                    }
                }
                Err(e) => return Err(wire.error(Fault::Garbled, e)),
            }
        }
    }

    /// The next event, on this connection or another.
    async fn event(&mut self) -> Result<Event, UpstreamError> {
        loop {
            let end = match self.events.next().await {
                Ok(Some(event)) => return Ok(event),
                Ok(None) => None,
                Err(error @ ReadError::Cut(_)) => Some(error),
                Err(error) => return Err(self.session.way.wire.read_error(error)),
            };
            self.events = self.reopen(end).await?;
        }
    }

    /// The rest of the stream after it ended: with `end`, or in good order.
    async fn reopen(&mut self, end: Option<ReadError>) -> Result<Events, UpstreamError> {
        let (session, cursor) = (self.session.clone(), self.events.cursor().clone());
        let wire = &session.way.wire;
        if cursor.id != self.asked_after {
            // Something new came, be it an empty event: the server goes on. What has no id would come again.
            self.attempts = 0;
        }
        self.asked_after.clone_from(&cursor.id);
        while cursor.id.is_some() && self.attempts < MOST_ATTEMPTS {
            self.attempts += 1;
            tokio::time::sleep(cursor.wait()).await;
            match session.way.open_stream(cursor.clone()).await {
                Ok(events) => return Ok(events),
                Err(Unopened::Failed) => {}
                // That the request was processed is certain, so it does not go out again, session or no session.
                Err(Unopened::NotOffered | Unopened::Unknown) => break,
            }
        }
        Err(match end {
            Some(error) => wire.read_error(error),
            None => {
                if cursor.id.is_none() {
                    // It is done with the request, for better or worse.
                    self.disarm();
                }
                wire.error(Fault::Lost, "the stream ended before the result")
            }
        })
    }

    /// A notification under the client's own progress token.
    fn own(&self, mut notification: Notification) -> Notification {
        let ours = notification.params.get("progressToken") == Some(self.id.as_str());
        if let (true, Some(token)) = (ours, &self.token) {
            notification.params.object_mut().set("progressToken", text(token));
        }
        notification
    }

    fn disarm(&mut self) {
        if let Some(cancel) = self.cancel.take() {
            cancel.disarm();
        }
    }
}
