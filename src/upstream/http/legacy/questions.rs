//! What a server asks its client, and the way back of the answer.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;

use super::{briefly, session::Session};
use crate::protocol::{
    Method, Params, Payload, Reply, RequestId, RpcError, ServerRequest, code, sign_question,
};

/// Questions of one session that are not answered yet: as many as calls may be parked, for clients share sessions.
pub(super) const MOST_QUESTIONS: usize = 4096;
/// A person may think this long over one.
const ANSWER_WITHIN: Duration = Duration::from_secs(10 * 60);

impl Session {
    /// A question on its way to the client, in the upstream's name. Its answer goes back to this session, whatever
    /// becomes of the stream it came on. `None` when too many are open already; then this one was refused.
    pub(super) async fn question(
        self: &Arc<Self>,
        id: RequestId,
        method: Method,
        params: Params,
    ) -> Option<ServerRequest> {
        let Ok(room) = self.questions.clone().try_acquire_owned() else {
            let error = RpcError::new(code::OVERLOADED, "too many questions are open");
            self.reply(&id, Payload::Error(error)).await;
            return None;
        };
        let params = sign_question(self.way.wire.upstream(), &method, params);
        let (reply, answer) = Reply::new();
        // A session that is over needs no answer, and must not live on for one.
        let (session, over) = (Arc::downgrade(self), self.over());
        tokio::spawn(async move {
            tokio::select! {
                Ok(payload) = answer => if let Some(session) = session.upgrade() {
                    session.reply(&id, payload).await;
                },
                () = over => {}
                () = tokio::time::sleep(ANSWER_WITHIN) => if let Some(session) = session.upgrade() {
                    let error = RpcError::new(code::TIMED_OUT, "the client did not answer");
                    session.reply(&id, Payload::Error(error)).await;
                },
            }
            drop(room);
        });
        Some(ServerRequest { method, params, reply })
    }

    /// Answers a question of the server.
    pub(super) async fn reply(&self, id: &RequestId, payload: Payload) {
        let (member, body) = match payload.to_json() {
            Some(Ok(result)) => ("result", result),
            Some(Err(error)) => ("error", error.as_bytes().clone()),
            None => return,
        };
        let message = [
            b"{\"jsonrpc\":\"2.0\",\"id\":",
            id.as_bytes().as_ref(),
            b",\"",
            member.as_bytes(),
            b"\":",
            &body,
            b"}",
        ]
        .concat();
        if briefly(self.post(message.into())).await.is_none() {
            tracing::debug!(id = id.as_str(), "the upstream did not take an answer");
        }
    }

    /// Answers a ping of the server.
    pub(super) async fn pong(&self, id: &RequestId) {
        self.reply(id, Payload::Raw(Bytes::from_static(b"{}"))).await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use http::{HeaderMap, Uri};

    use super::{super::session::Way, *};
    use crate::{protocol::RawObject, upstream::http::wire::Wire};

    /// A session at a server that is not there.
    fn session() -> Arc<Session> {
        let wire = Arc::new(Wire::new("up".parse().unwrap(), 1000));
        let uri = Uri::from_static("http://127.0.0.1:9/mcp");
        Arc::new(Session::new(
            Way { wire, uri, headers: HeaderMap::new() },
            RawObject::empty(),
            Arc::default(),
        ))
    }

    #[tokio::test(start_paused = true)]
    async fn questions_nobody_answers_make_room_after_a_while() {
        let session = session();
        let ask = async |n: usize| {
            let id = RequestId::from(n as u64);
            session.question(id, Method::RootsList, Params::default()).await
        };
        let mut open = Vec::new();
        for n in 0..MOST_QUESTIONS {
            open.push(ask(n).await.unwrap());
        }
        assert!(ask(100).await.is_none());
        tokio::time::sleep(ANSWER_WITHIN * 2).await;
        assert!(ask(101).await.is_some());
        assert_eq!(open.len(), MOST_QUESTIONS);
    }

    #[tokio::test(start_paused = true)]
    async fn a_question_keeps_no_session_alive() {
        let session = session();
        let held = session.question(RequestId::from(1), Method::RootsList, Params::default()).await.unwrap();
        let (weak, room) = (Arc::downgrade(&session), session.questions.clone());
        drop(session);
        assert!(weak.upgrade().is_none());
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert_eq!(room.available_permits(), MOST_QUESTIONS, "its task is over");
        drop(held);
    }
}
