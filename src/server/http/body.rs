//! What goes out: one piece, a few, or server-sent events.

use std::{
    collections::VecDeque,
    convert::Infallible,
    fmt,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_core::Stream;
use http_body::{Body, Frame, SizeHint};
use tokio::time::{Instant, Sleep};

use crate::server::{
    message::Chunks,
    modern::Messages,
    streams::{EventId, Sent},
};

/// Milliseconds after which a client whose connection broke comes back.
const RETRY: u32 = 3000;
/// A comment this often keeps boxes in between from closing a quiet stream.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// The body of every answer of this door.
pub struct DoorBody(Kind);

enum Kind {
    Chunks(VecDeque<Bytes>),
    Events(Quiet),
}

/// Where events come from.
pub(super) enum Events {
    /// Messages, and that is all.
    Plain(Messages),
    /// Each may have an id to come back with.
    Numbered(Pin<Box<dyn Stream<Item = Sent> + Send>>),
}

impl Events {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<VecDeque<Bytes>>> {
        match self {
            Events::Plain(messages) => messages.as_mut().poll_next(cx).map(|next| Some(event(None, next?))),
            Events::Numbered(sent) => sent.as_mut().poll_next(cx).map(|next| {
                let Sent { id, message } = next?;
                Some(match (id, message) {
                    (id, Some(message)) => event(id, message),
                    (Some(id), None) => {
                        let text = format!("id: {id}\nretry: {RETRY}\ndata: \n\n");
                        VecDeque::from([Bytes::from(text)])
                    }
                    (None, None) => VecDeque::from([Bytes::from_static(b":\n\n")]),
                })
            }),
        }
    }
}

/// Events, and a sign of life when there are none.
struct Quiet {
    events: Events,
    quiet: Pin<Box<Sleep>>,
    /// The rest of an event whose beginning is out.
    rest: VecDeque<Bytes>,
}

impl DoorBody {
    /// Nothing.
    pub(super) fn empty() -> Self {
        DoorBody(Kind::Chunks(VecDeque::new()))
    }

    /// One message.
    pub(super) fn message(chunks: Chunks) -> Self {
        DoorBody(Kind::Chunks(chunks.joined()))
    }

    /// Each message an event, behind a first one that is written already.
    pub(super) fn events(first: Option<Bytes>, events: Events) -> Self {
        let quiet = Box::pin(tokio::time::sleep(KEEP_ALIVE));
        DoorBody(Kind::Events(Quiet { events, quiet, rest: first.into_iter().collect() }))
    }
}

impl Body for DoorBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match &mut self.0 {
            Kind::Chunks(chunks) => Poll::Ready(chunks.pop_front().map(|chunk| Ok(Frame::data(chunk)))),
            Kind::Events(events) => {
                events.poll_chunk(cx).map(|chunk| chunk.map(|chunk| Ok(Frame::data(chunk))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(&self.0, Kind::Chunks(chunks) if chunks.is_empty())
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Kind::Chunks(chunks) => SizeHint::with_exact(chunks.iter().map(|chunk| chunk.len() as u64).sum()),
            Kind::Events(_) => SizeHint::default(),
        }
    }
}

impl Quiet {
    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        if let Some(chunk) = self.rest.pop_front() {
            return Poll::Ready(Some(chunk));
        }
        match self.events.poll_next(cx) {
            Poll::Ready(Some(event)) => {
                self.quiet.as_mut().reset(Instant::now() + KEEP_ALIVE);
                self.rest = event;
                Poll::Ready(self.rest.pop_front())
            }
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Pending => {
                if self.quiet.as_mut().poll(cx).is_pending() {
                    return Poll::Pending;
                }
                self.quiet.as_mut().reset(Instant::now() + KEEP_ALIVE);
                // Polled once more, so that the timer wakes us the next time, too.
                let _ = self.quiet.as_mut().poll(cx);
                Poll::Ready(Some(Bytes::from_static(b": keep-alive\n\n")))
            }
        }
    }
}

/// One message as one event.
fn event(id: Option<EventId>, mut message: Chunks) -> VecDeque<Bytes> {
    message.flatten();
    let head = match id {
        Some(id) => format!("id: {id}\nevent: message\ndata: ").into(),
        None => Bytes::from_static(b"event: message\ndata: "),
    };
    message.0.insert(0, head);
    message.0.push(Bytes::from_static(b"\n\n"));
    message.joined()
}

impl fmt::Debug for DoorBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match &self.0 {
            Kind::Chunks(_) => "DoorBody(chunks)",
            Kind::Events(_) => "DoorBody(events)",
        })
    }
}

#[cfg(test)]
mod tests {
    use futures_util::stream;
    use http_body_util::BodyExt as _;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_quiet_stream_is_kept_alive_and_every_event_stands_on_one_line() {
        let message = Chunks(vec![Bytes::from_static(b"{\"a\":"), Bytes::from_static(b"[1,\n2]}")]);
        let messages = stream::once(async move {
            tokio::time::sleep(KEEP_ALIVE * 2 + Duration::from_secs(1)).await;
            message
        });
        let body =
            DoorBody::events(None, Events::Plain(Box::pin(messages))).collect().await.unwrap().to_bytes();
        let expected = ": keep-alive\n\n: keep-alive\n\nevent: message\ndata: {\"a\":[1, 2]}\n\n";
        assert_eq!(std::str::from_utf8(&body).unwrap(), expected);
    }
}
