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
use http_body::{Body, Frame, SizeHint};
use tokio::time::{Instant, Sleep};

use crate::server::{message::Chunks, modern::Messages};

/// A comment this often keeps boxes in between from closing a quiet stream.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// The body of every answer of this door.
pub struct DoorBody(Kind);

enum Kind {
    Chunks(VecDeque<Bytes>),
    Events(Events),
}

struct Events {
    messages: Messages,
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

    /// Each message an event.
    pub(super) fn events(messages: Messages) -> Self {
        let quiet = Box::pin(tokio::time::sleep(KEEP_ALIVE));
        DoorBody(Kind::Events(Events { messages, quiet, rest: VecDeque::new() }))
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

impl Events {
    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        if let Some(chunk) = self.rest.pop_front() {
            return Poll::Ready(Some(chunk));
        }
        match self.messages.as_mut().poll_next(cx) {
            Poll::Ready(Some(message)) => {
                self.quiet.as_mut().reset(Instant::now() + KEEP_ALIVE);
                self.rest = event(message);
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
fn event(mut message: Chunks) -> VecDeque<Bytes> {
    message.flatten();
    message.0.insert(0, Bytes::from_static(b"event: message\ndata: "));
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
        let body = DoorBody::events(Box::pin(messages)).collect().await.unwrap().to_bytes();
        let expected = ": keep-alive\n\n: keep-alive\n\nevent: message\ndata: {\"a\":[1, 2]}\n\n";
        assert_eq!(std::str::from_utf8(&body).unwrap(), expected);
    }
}
