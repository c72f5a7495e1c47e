//! A call that has something to say, or to ask, before its result: with a legacy client.
//!
//! Questions reach the client as requests on the call's own stream, whatever era the upstream is of: a legacy
//! upstream's as they come, a modern upstream's `input_required` by asking, and calling again with the answers.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt as _, future::join_all};
use serde_json::json;

use super::session::{Session, new_id};
use crate::{
    McpService,
    protocol::{
        Era, Frame, FrameStream, McpRequest, Method, Params, Payload, RawObject, Reply, RequestId,
        ResultType, RpcError, ServerRequest, code,
    },
    server::{call, message, streams::Outlet},
};

/// An upstream that still wants input after this many rounds will never have enough.
const MOST_ROUNDS: usize = 16;
/// A person may think this long over one question.
const ANSWER_WITHIN: Duration = Duration::from_secs(10 * 60);

/// One call of one legacy client.
pub(super) struct Conversation<S> {
    pub(super) service: S,
    pub(super) session: Arc<Session>,
    pub(super) id: RequestId,
    pub(super) request: McpRequest,
    /// Questions of this call; none outlives it.
    pub(super) asked: Asked,
}

/// The numbers of a call's questions.
#[derive(Default)]
pub(super) struct Asked(Mutex<Vec<u64>>);

impl<S> Drop for Conversation<S> {
    fn drop(&mut self) {
        let asked = self.asked.0.get_mut().unwrap_or_else(PoisonError::into_inner);
        asked.drain(..).for_each(|number| self.session.withdraw(number));
    }
}

impl<S: McpService> Conversation<S> {
    /// Runs it to its result.
    pub(super) async fn run(self, first: Payload, out: &Outlet) {
        let mut payload = self.settle(first, out).await;
        for _ in 0..MOST_ROUNDS {
            if ResultType::of(&payload) != ResultType::InputRequired {
                break;
            }
            payload = match self.retry(payload.to_object(), out).await {
                Ok(request) => {
                    let again = call(self.service.clone(), request).await.into_payload();
                    self.settle(again, out).await
                }
                Err(error) => Payload::Error(error),
            };
        }
        if ResultType::of(&payload) == ResultType::InputRequired {
            let error = RpcError::new(code::BAD_UPSTREAM, "the upstream asks for input without end");
            payload = Payload::Error(error);
        }
        out.send(message::response(&self.id, self.request.method(), payload, Era::Legacy)).await;
    }

    /// Passes everything before the result on.
    async fn settle(&self, payload: Payload, out: &Outlet) -> Payload {
        let Payload::Stream(frames) = payload else { return payload };
        match self.drive(frames, out).await {
            Some(payload) => payload,
            None => Payload::Error(RpcError::new(code::INTERNAL_ERROR, "internal error")),
        }
    }

    async fn drive(&self, mut frames: FrameStream, out: &Outlet) -> Option<Payload> {
        while let Some(frame) = frames.next().await {
            match frame {
                Ok(Frame::Notification(n)) => {
                    if n.method != Method::LogMessage || self.request.caller().client.wants_log(&n.params) {
                        let _ = out.notify(&n).await;
                    }
                }
                Ok(Frame::Request(ServerRequest { method, params, reply })) => {
                    self.pass_on(method, params, reply, out).await
                }
                Ok(Frame::Final(payload)) => return Some(payload),
                Err(error) => {
                    tracing::warn!(%error, "a stream failed");
                    return None;
                }
            }
        }
        None
    }

    /// `None` when too many questions are open already.
    fn number(&self, reply: Reply) -> Option<u64> {
        let number = self.session.ask(reply)?;
        self.asked.0.lock().unwrap_or_else(PoisonError::into_inner).push(number);
        Some(number)
    }

    /// The answer comes with a POST of its own and finds its way by its number.
    async fn pass_on(&self, method: Method, params: Params, reply: Reply, out: &Outlet) {
        match self.request.caller().client.can_answer(&method, &params) {
            Ok(()) => {
                if let Some(number) = self.number(reply) {
                    out.send(message::request(&RequestId::from(number), &method, &params)).await;
                }
            }
            Err(error) => reply.refuse(error),
        }
    }

    /// The call again, with what the client answered.
    async fn retry(&self, wanted: Option<RawObject>, out: &Outlet) -> Result<McpRequest, RpcError> {
        let garbled =
            |_| RpcError::new(code::BAD_UPSTREAM, "the upstream asks for input in a way that cannot be read");
        let wanted = wanted.ok_or(()).map_err(garbled)?;
        let questions = match wanted.get_bytes("inputRequests") {
            Some(questions) => RawObject::parse(questions).map_err(|_| garbled(()))?,
            None => RawObject::empty(),
        };
        let asked = questions.iter().map(|(key, question)| self.ask(key, question.to_owned().into(), out));
        let answers = join_all(asked).await.into_iter().collect::<Result<Vec<_>, _>>()?;
        let mut responses = RawObject::empty();
        for (key, answer) in &answers {
            responses.set(key, std::str::from_utf8(answer).unwrap_or("null"));
        }
        let mut params = self.request.params().clone();
        params.object_mut().set("inputResponses", responses.as_str());
        match wanted.get("requestState") {
            Some(state) => params.object_mut().set("requestState", state),
            None => params.object_mut().remove("requestState"),
        }
        let mut request = self.request.clone();
        request.set_params(params);
        Ok(request)
    }

    /// Asks one question and waits for its answer.
    async fn ask(&self, key: &str, question: Bytes, out: &Outlet) -> Result<(String, Bytes), RpcError> {
        let garbled =
            || RpcError::new(code::BAD_UPSTREAM, format!("the upstream's question {key:?} cannot be read"));
        let question = RawObject::parse(question).map_err(|_| garbled())?;
        let method = Method::from(&*question.get_string("method").ok_or_else(garbled)?);
        let mut params = match question.get_bytes("params") {
            Some(params) => Params::parse(params).map_err(|_| garbled())?,
            None => Params::default(),
        };
        self.request.caller().client.can_answer(&method, &params)?;
        let (reply, answer) = Reply::new();
        let too_many = || RpcError::new(code::OVERLOADED, "too many questions are open");
        let number = self.number(reply).ok_or_else(too_many)?;
        identify(&method, &mut params);
        out.send(message::request(&RequestId::from(number), &method, &params)).await;
        let answer = tokio::time::timeout(ANSWER_WITHIN, answer).await;
        self.session.withdraw(number);
        match answer {
            Ok(Ok(Payload::Raw(result))) => Ok((key.to_owned(), result)),
            // A person who cannot be asked has not agreed.
            Ok(Ok(Payload::Error(_))) | Err(_) if method == Method::Elicit => {
                Ok((key.to_owned(), Bytes::from_static(br#"{"action":"cancel"}"#)))
            }
            Ok(Ok(Payload::Error(error))) => Err(error),
            _ => Err(RpcError::new(code::TIMED_OUT, format!("the client did not answer {method}"))),
        }
    }
}

/// What is done at a URL has an id in this era. Nobody tells when it is over, so any will do.
fn identify(method: &Method, params: &mut Params) {
    let by_url = *method == Method::Elicit && params.get_string("mode").as_deref() == Some("url");
    // Some servers of the modern era, which has none, send an empty one.
    if by_url && params.get_string("elicitationId").is_none_or(|id| id.is_empty()) {
        params.object_mut().set("elicitationId", json!(*new_id()).to_string());
    }
}
