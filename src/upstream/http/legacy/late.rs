//! Answers that come on another stream than that of their request.
//!
//! A server that closed a request's stream before the result should wait until the rest of *that* stream is asked for.
//! Some give the result to whatever stream is opened next, and that may be the session's own.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
};

use tokio::sync::Notify;

use crate::protocol::{Payload, RequestId};

/// Answers that nobody has taken yet; the oldest go first.
const UNCLAIMED: usize = 8;

/// The answers that came so.
#[derive(Default)]
pub(super) struct Late {
    answers: Mutex<VecDeque<(RequestId, Payload)>>,
    arrived: Notify,
}

impl Late {
    /// Keeps an answer for whoever waits for it, or will.
    pub(super) fn put(&self, id: RequestId, payload: Payload) {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        if answers.len() == UNCLAIMED {
            answers.pop_front();
        }
        answers.push_back((id, payload));
        drop(answers);
        self.arrived.notify_waiters();
    }

    /// The answer to `id`, when it comes.
    pub(super) async fn answer(&self, id: &RequestId) -> Payload {
        loop {
            let arrived = self.arrived.notified();
            if let Some(payload) = self.take(id) {
                return payload;
            }
            arrived.await;
        }
    }

    fn take(&self, id: &RequestId) -> Option<Payload> {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let at = answers.iter().position(|(answered, _)| answered == id)?;
        answers.remove(at).map(|(_, payload)| payload)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(text: &'static str) -> Payload {
        Payload::Raw(text.into())
    }

    #[tokio::test]
    async fn each_finds_its_own_before_or_after_it_waits() {
        let late = Late::default();
        late.put(RequestId::from(1), payload("1"));
        let second = RequestId::from(2);
        let (second, ()) = tokio::join!(late.answer(&second), async {
            tokio::task::yield_now().await;
            late.put(RequestId::from(2), payload("2"));
        });
        assert_eq!(second.to_value().unwrap(), 2);
        assert_eq!(late.answer(&RequestId::from(1)).await.to_value().unwrap(), 1);
        (0..100).for_each(|id| late.put(RequestId::from(id), payload("0")));
        assert_eq!(late.answers.lock().unwrap().len(), UNCLAIMED);
    }
}
