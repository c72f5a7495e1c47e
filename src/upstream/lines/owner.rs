//! Whose a connection is: what a legacy peer is told of its client, and where that client is reached outside of calls.

use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures_util::stream;
use tokio::sync::{Notify, futures::Notified, mpsc};

use crate::{
    identity::{Affinity, Caller, Client},
    protocol::{Frame, FrameStream, Notification, RawObject, ServerRequest},
};

/// What waits for one listener to read it.
const UNREAD: usize = 256;
/// As much of that as questions alone may fill: a flood of notifications must not keep them out.
const FOR_QUESTIONS: usize = 64;

/// Whose a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whose {
    /// Everybody's. The peer knows the gateway only, which cannot be asked anything.
    Everybody,
    /// That of modern clients who share principal, scope and abilities. Only a call tells which of them is meant.
    Several,
    /// That of one legacy client session.
    One,
}

/// The clients behind a connection, or one connection after another.
pub(crate) struct Owner {
    whose: Whose,
    client: Client,
    aside: Aside,
}

impl Owner {
    /// For a connection that everybody shares.
    pub(crate) fn everybody() -> Self {
        Owner::new(Whose::Everybody, Client::gateway())
    }

    /// For a connection that belongs to this caller, and those with the same [key](crate::identity::AffinityKey). It
    /// holds nothing of the caller that would keep a session alive.
    #[cfg_attr(not(feature = "client"), allow(dead_code))]
    pub(crate) fn of(caller: &Caller) -> Self {
        match caller.affinity {
            Affinity::Shared => {
                let capabilities = caller.client.abilities().to_value().to_string().into();
                Owner::new(Whose::Several, Client { capabilities, ..Client::gateway() })
            }
            Affinity::Session(_) => {
                let capabilities = without_tasks(&caller.client.capabilities);
                Owner::new(Whose::One, Client { capabilities, ..caller.client.clone() })
            }
        }
    }

    fn new(whose: Whose, client: Client) -> Self {
        Owner { whose, client, aside: Aside::default() }
    }

    pub(super) fn whose(&self) -> Whose {
        self.whose
    }

    /// The client as the peer is told of it.
    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    pub(super) fn aside(&self) -> &Aside {
        &self.aside
    }

    /// What the peer says to the one client outside of calls. To several, nothing can be said there: it ends at once.
    pub(super) fn listen(&self) -> FrameStream {
        match self.whose {
            Whose::One => self.aside.listen(),
            Whose::Several | Whose::Everybody => Box::pin(stream::empty()),
        }
    }
}

/// Tasks of the client's would have to be kept and polled for, which nobody here does.
fn without_tasks(capabilities: &Bytes) -> Bytes {
    match RawObject::parse(capabilities.clone()) {
        Ok(mut capabilities) => {
            capabilities.remove("tasks");
            capabilities.into_bytes()
        }
        Err(_) => Bytes::from_static(b"{}"),
    }
}

/// The way to a client that is not in a call. It outlives connections: who listens need not know of them.
#[derive(Default)]
pub(super) struct Aside {
    listeners: Mutex<Vec<mpsc::Sender<Frame>>>,
    changed: Notify,
}

impl Aside {
    fn listen(&self) -> FrameStream {
        let (sender, receiver) = mpsc::channel(UNREAD);
        self.lock().push(sender);
        self.wake();
        Box::pin(stream::unfold(receiver, |mut receiver| async {
            Some((Ok(receiver.recv().await?), receiver))
        }))
    }

    /// Tells everybody who listens. Whoever does not read misses it.
    pub(super) fn tell(&self, notification: &Notification) {
        for listener in self.lock().iter().filter(|listener| listener.capacity() > FOR_QUESTIONS) {
            let _ = listener.try_send(Frame::Notification(notification.clone()));
        }
    }

    /// Asks exactly one: who came last, for the others may be about to go. `false` when there is none.
    pub(super) fn ask(&self, question: ServerRequest) -> bool {
        let listeners = self.lock();
        listeners.last().is_some_and(|listener| listener.try_send(Frame::Request(question)).is_ok())
    }

    /// Ready when there is somebody else to ask: a listener, or a call.
    pub(super) fn changed(&self) -> Notified<'_> {
        self.changed.notified()
    }

    pub(super) fn wake(&self) {
        self.changed.notify_waiters();
    }

    /// Those who still listen.
    fn lock(&self) -> MutexGuard<'_, Vec<mpsc::Sender<Frame>>> {
        let mut listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.retain(|listener| !listener.is_closed());
        listeners
    }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt as _;

    use super::*;
    use crate::{
        identity::SessionToken,
        protocol::{Method, Params, Reply},
    };

    #[test]
    fn a_peer_is_told_of_its_own_client_only() {
        let capabilities = Bytes::from_static(br#"{"roots":{"listChanged":true},"tasks":{},"sampling":{}}"#);
        let client = Client { capabilities, info: Some("{\"name\":\"a\"}".into()), ..Client::gateway() };
        let caller = Caller { client, ..(*Caller::anonymous()).clone() };
        let shared = Owner::of(&caller);
        assert_eq!(shared.client().info, Client::gateway().info);
        assert_eq!(shared.client().capabilities, r#"{"roots":{},"sampling":{}}"#);
        let own = Owner::of(&Caller { affinity: Affinity::Session(SessionToken::new()), ..caller });
        assert_eq!(own.client().info.as_deref(), Some(&b"{\"name\":\"a\"}"[..]));
        assert_eq!(own.client().capabilities, r#"{"roots":{"listChanged":true},"sampling":{}}"#);
    }

    #[tokio::test]
    async fn a_flood_of_notifications_leaves_room_for_a_question() {
        let aside = Aside::default();
        let question = || {
            let (reply, answer) = Reply::new();
            (ServerRequest { method: Method::RootsList, params: Params::default(), reply }, answer)
        };
        assert!(!aside.ask(question().0));
        let (mut first, mut last) = (aside.listen(), aside.listen());
        for _ in 0..20_000 {
            aside.tell(&Notification { method: Method::LogMessage, params: Params::default() });
        }
        assert!(aside.ask(question().0));
        for listener in [&mut first, &mut last] {
            for _ in 0..UNREAD - FOR_QUESTIONS {
                assert!(matches!(listener.next().await, Some(Ok(Frame::Notification(_)))));
            }
        }
        assert!(matches!(last.next().await, Some(Ok(Frame::Request(_)))));
        drop(last);
        assert!(aside.ask(question().0));
        assert!(matches!(first.next().await, Some(Ok(Frame::Request(_)))));
    }
}
