//! Where calls wait, and how they leave: once, by the right retry, or when their time is over.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use bytes::Bytes;
use serde_json::json;
use tokio::time::Instant;

use super::asked::Asked;
use crate::{
    BoxError,
    error::InvalidParams,
    protocol::{Frame, FrameStream, Payload, RawObject, Reply, RpcError, ServerRequest, code},
    seal::Seal,
};

/// The calls that wait at one upstream.
pub(super) struct Lot {
    seal: Seal,
    most: usize,
    wait: Duration,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// By number. All wait equally long, so the first is the next to expire.
    calls: BTreeMap<u64, Parked>,
    next: u64,
    expiring: bool,
}

/// One call that waits.
struct Parked {
    until: Instant,
    questions: Vec<Question>,
    /// What it has yet to say. `None` when it is over and may be made again.
    rest: Option<Rest>,
}

/// What an answer has yet to say.
pub(super) struct Rest {
    pub(super) frames: FrameStream,
    /// A frame that was read too far.
    pub(super) next: Option<Result<Frame, BoxError>>,
    /// The token under which the upstream reports progress: the first request's.
    pub(super) token: Option<Bytes>,
}

/// Nothing.
impl Default for Rest {
    fn default() -> Self {
        Rest { frames: Box::pin(futures_util::stream::empty()), next: None, token: None }
    }
}

/// One question of a call.
pub(super) struct Question {
    key: String,
    /// The request as it stands in `inputRequests`.
    request: RawObject,
    /// Where the answer goes. `None` when the call is made again: then there is nobody to tell.
    reply: Option<Reply>,
}

impl Question {
    pub(super) fn new(number: usize, request: ServerRequest) -> Self {
        let ServerRequest { method, params, reply } = request;
        let mut question = RawObject::empty();
        question.set("method", json!(method.as_str()).to_string());
        let mut params = RawObject::clone(&params);
        // It was there to be told when the person is done; a retry tells that by itself.
        params.remove("elicitationId");
        question.set("params", params.as_str());
        Question { key: format!("q{number}"), request: question, reply: Some(reply) }
    }

    /// A question of a call that has ended with it.
    pub(super) fn of_ended(number: usize, request: RawObject) -> Self {
        Question { key: format!("q{number}"), request, reply: None }
    }

    pub(super) fn refuse(self, error: RpcError) {
        if let Some(reply) = self.reply {
            reply.refuse(error);
        }
    }
}

/// What became of a call that was to be parked.
pub(super) enum Parking {
    /// It waits. The result for its client.
    Waits(Bytes),
    /// There was no room; what it has yet to say.
    Full(Option<Rest>),
}

/// How a retry goes on.
pub(super) enum Resumed {
    /// With what the call has yet to say.
    Goes(Rest),
    /// With the call made again.
    Anew,
    /// With the questions that were left unanswered: the result that asks them again.
    Again(Bytes),
}

impl Lot {
    pub(super) fn new(most: usize, wait: Duration) -> Self {
        Lot { seal: Seal::random(), most, wait, state: Mutex::default() }
    }

    /// Parks a call. When there is no room its questions are refused, and it goes on.
    pub(super) fn park(
        self: &Arc<Self>,
        asked: &Asked,
        questions: Vec<Question>,
        rest: Option<Rest>,
    ) -> Parking {
        let mut state = self.lock();
        if state.calls.len() >= self.most {
            drop(state);
            let full =
                || RpcError::new(code::OVERLOADED, "too many calls wait for an answer of their clients");
            questions.into_iter().for_each(|question| question.refuse(full()));
            return Parking::Full(rest);
        }
        state.next += 1;
        let number = state.next;
        let result = self.result(number, asked, &questions);
        state.calls.insert(number, Parked { until: Instant::now() + self.wait, questions, rest });
        if !std::mem::replace(&mut state.expiring, true) {
            tokio::spawn(expire(Arc::downgrade(self)));
        }
        Parking::Waits(result)
    }

    /// Gives a call its answers. `None` when the state is not of this lot at all.
    pub(super) fn resume(
        self: &Arc<Self>,
        asked: &Asked,
        text: &str,
        answers: &RawObject,
    ) -> Option<Result<Resumed, InvalidParams>> {
        let binding = asked.binding();
        let number = match self.seal.open(text, &refs(&binding)) {
            Ok(plain) => <[u8; 8]>::try_from(plain).ok().map(u64::from_le_bytes),
            Err(crate::seal::Broken::Foreign) => return None,
            Err(crate::seal::Broken::Forged) => None,
        };
        // Forged, stale, replayed or somebody else's: nobody needs to know which.
        let unknown =
            InvalidParams("`requestState` is not known here or has expired: call again without it".into());
        let Some(number) = number else { return Some(Err(unknown)) };
        let parked = {
            let mut state = self.lock();
            let parked = state.calls.get(&number).filter(|parked| parked.until > Instant::now());
            let Some(parked) = parked else { return Some(Err(unknown)) };
            let broken = |q: &Question| answers.get(&q.key).is_some_and(|json| !json.starts_with('{'));
            if let Some(question) = parked.questions.iter().find(|q| broken(q)) {
                let message = format!("`inputResponses.{}` is no object", question.key);
                return Some(Err(InvalidParams(message.into())));
            }
            state.calls.remove(&number).expect("it is there")
        };
        Some(Ok(self.answer(asked, parked, answers)))
    }

    fn answer(self: &Arc<Self>, asked: &Asked, parked: Parked, answers: &RawObject) -> Resumed {
        let mut left = Vec::new();
        for mut question in parked.questions {
            match (answers.get_bytes(&question.key), question.reply.take()) {
                (Some(answer), Some(reply)) => reply.send(Payload::Raw(answer)),
                (Some(_), None) => {}
                (None, reply) => left.push(Question { reply, ..question }),
            }
        }
        let rest = match left.is_empty() {
            true => parked.rest,
            false => match self.park(asked, left, parked.rest) {
                Parking::Waits(result) => return Resumed::Again(result),
                Parking::Full(rest) => rest,
            },
        };
        rest.map_or(Resumed::Anew, Resumed::Goes)
    }

    fn result(&self, number: u64, asked: &Asked, questions: &[Question]) -> Bytes {
        let mut wanted = RawObject::empty();
        questions.iter().for_each(|question| wanted.set(&question.key, question.request.as_str()));
        let mut result = RawObject::empty();
        result.set("resultType", r#""input_required""#);
        result.set("inputRequests", wanted.as_str());
        let state = self.seal.close(&number.to_le_bytes(), &refs(&asked.binding()));
        result.set("requestState", json!(state).to_string());
        result.into_bytes()
    }

    /// How many calls wait.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.lock().calls.len()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn refs(binding: &[Vec<u8>; 4]) -> [&[u8]; 4] {
    binding.each_ref().map(Vec::as_slice)
}

/// Ends what has waited too long, as long as anything waits.
async fn expire(lot: Weak<Lot>) {
    loop {
        let next = {
            let Some(lot) = lot.upgrade() else { return };
            let mut state = lot.lock();
            let next = state.calls.first_key_value().map(|(_, parked)| parked.until);
            state.expiring = next.is_some();
            next
        };
        let Some(until) = next else { return };
        tokio::time::sleep_until(until).await;
        let Some(lot) = lot.upgrade() else { return };
        let now = Instant::now();
        loop {
            let expired = {
                let mut state = lot.lock();
                match state.calls.first_entry() {
                    Some(first) if first.get().until <= now => first.remove(),
                    _ => break,
                }
            };
            for question in expired.questions {
                question.refuse(RpcError::new(code::TIMED_OUT, "the client did not answer in time"));
            }
            // Dropped, what it had yet to say is cancelled.
            drop(expired.rest);
        }
    }
}
