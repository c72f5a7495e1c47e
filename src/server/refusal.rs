//! What a door says no to, before it is a matter of HTTP or of anything else.

use super::message::{self, Chunks};
use crate::protocol::{Message, ParseError, RequestId, RpcError, code};

/// An answer given at the door.
#[derive(Debug)]
pub(super) struct Refusal {
    /// The request's, if there is one and it could be read.
    pub(super) id: Option<RequestId>,
    pub(super) error: RpcError,
}

impl Refusal {
    pub(super) fn new(id: Option<RequestId>, code: i64, message: impl Into<String>) -> Self {
        Refusal { id, error: RpcError::new(code, message) }
    }

    /// As the message that says so.
    pub(super) fn message(&self) -> Chunks {
        message::error(self.id.as_ref(), &self.error)
    }
}

impl From<ParseError> for Refusal {
    fn from(e: ParseError) -> Self {
        Refusal::new(e.id, e.code, e.message)
    }
}

/// A method says by its name whether it is answered. One that is sent the other way would pass by the checks of its
/// kind.
pub(super) fn check_kind(message: &Message) -> Result<(), Refusal> {
    match message {
        Message::Notification { method, .. } if !method.is_notification() => {
            Err(Refusal::new(None, code::INVALID_REQUEST, "a request needs an `id`"))
        }
        Message::Request { id, method, .. } if method.is_notification() => {
            Err(Refusal::new(Some(id.clone()), code::INVALID_REQUEST, "a notification has no `id`"))
        }
        _ => Ok(()),
    }
}
