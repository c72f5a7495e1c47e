//! What comes before a result: notifications, and questions back to the client.
//!
//! Everything that leaves, leaves through the response. So a layer that looks at the frames has looked at all.

use std::{fmt, pin::Pin};

use futures_core::Stream;
use tokio::sync::oneshot;

use super::{Method, Params, Payload, RpcError};
use crate::BoxError;

/// The frames of one answer. It ends with [`Frame::Final`], or with an error; dropping it cancels the call.
pub type FrameStream = Pin<Box<dyn Stream<Item = Result<Frame, BoxError>> + Send>>;

/// One message of an answer.
#[derive(Debug)]
pub enum Frame {
    /// Something the client may want to know.
    Notification(Notification),
    /// A legacy upstream asks the client something: in the middle of a call, or on an [`Unsolicited`] subscription.
    Request(ServerRequest),
    /// The result. Nothing follows.
    Final(Payload),
}

/// A notification, either way.
#[derive(Clone, Debug)]
pub struct Notification {
    /// What happened.
    pub method: Method,
    /// With what.
    pub params: Params,
}

/// In the extensions of a `subscriptions/listen` for a legacy client's session: it also wants what its sessions at
/// legacy upstreams say without being asked, logs above all, and is asked their questions that belong to no call. Such a
/// subscription opens no session by itself; of several in one session, the newest is asked.
#[derive(Clone, Copy, Debug)]
pub struct Unsolicited;

/// A question to the client: sampling, elicitation, roots.
#[derive(Debug)]
pub struct ServerRequest {
    /// What is asked.
    pub method: Method,
    /// With what.
    pub params: Params,
    /// Where the answer goes. Dropped, it says "nobody can answer this".
    pub reply: Reply,
}

/// The way back for one answer: [`Payload::Raw`] or [`Payload::Error`].
pub struct Reply(Option<oneshot::Sender<Payload>>);

impl Reply {
    /// A reply and where it arrives.
    pub fn new() -> (Reply, oneshot::Receiver<Payload>) {
        let (sender, receiver) = oneshot::channel();
        (Reply(Some(sender)), receiver)
    }

    /// Answers.
    pub fn send(mut self, payload: Payload) {
        if let Some(sender) = self.0.take() {
            // The asker may have gone; then nobody misses the answer.
            let _ = sender.send(payload);
        }
    }

    /// Refuses.
    pub fn refuse(self, error: RpcError) {
        self.send(Payload::Error(error));
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if let Some(sender) = self.0.take() {
            let error = RpcError::new(super::code::METHOD_NOT_FOUND, "the client cannot be asked this");
            let _ = sender.send(Payload::Error(error));
        }
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reply")
    }
}
