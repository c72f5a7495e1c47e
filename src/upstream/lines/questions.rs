//! What a legacy peer asks: whom, and how the answer finds its way back.
//!
//! On one channel nothing says which call a question belongs to, so it is asked where no doubt is possible: in the
//! only call under way, or, when all calls are those of one client, in any of them, or outside of them. With doubt it
//! is refused: nobody must ever see another's question.
//!
//! Each open question has a task of its own, which ends with its answer, with its call, with the connection, or when
//! nobody answers. The reader waits for none of them.

use std::{collections::HashMap, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{
    sync::oneshot,
    time::{Instant, timeout_at},
};

use super::{
    calls::{Calls, State},
    owner::{Owner, Whose},
};
use crate::protocol::{
    Method, Params, Payload, Reply, RequestId, RpcError, ServerRequest, code, sign_question,
};

/// Questions of one connection that nobody has answered yet.
const MOST_OPEN: usize = 64;
/// How many bytes they may have together. A single one may have more.
const OPEN_BYTES: usize = 4 * 1024 * 1024;
/// A person may think this long over one question.
const ANSWER_WITHIN: Duration = Duration::from_secs(10 * 60);
/// Servers ask as soon as they are initialized, a moment before the first call is under way.
const PATIENCE: Duration = Duration::from_secs(2);
/// A call that was cancelled may ask for a while: the peer did not know yet, or does not care.
const GHOST_FOR: Duration = Duration::from_secs(60);
/// So many of them are remembered one by one.
const MOST_GHOSTS: usize = 1024;

/// The questions of one connection, and what it takes to tell whose they are.
#[derive(Default)]
pub(super) struct Questions {
    /// Whose the connection is. Without an owner nothing is asked.
    owner: Option<Arc<Owner>>,
    open: HashMap<RequestId, Open>,
    bytes: usize,
    /// Questions so far. The peer may use an id again; our numbers tell which is which.
    asked: u64,
    /// Whether any call was made. Before, a question can only come from the peer's own beginning.
    used: bool,
    ghosts: Ghosts,
}

struct Open {
    number: u64,
    /// The call it was asked in.
    call: Option<u64>,
    size: usize,
    /// Says that this call is over; dropped, that the question is withdrawn.
    over: Option<oneshot::Sender<()>>,
}

/// Calls that were cancelled, and that the peer may still be busy with.
#[derive(Default)]
struct Ghosts {
    known: HashMap<u64, Instant>,
    /// When those that did not fit are gone.
    others: Option<Instant>,
}

impl Ghosts {
    fn add(&mut self, id: u64) {
        let until = Instant::now() + GHOST_FOR;
        if self.known.len() >= MOST_GHOSTS {
            self.any();
        }
        match self.known.len() < MOST_GHOSTS {
            true => drop(self.known.insert(id, until)),
            false => self.others = Some(until),
        }
    }

    fn any(&mut self) -> bool {
        let now = Instant::now();
        self.known.retain(|_, until| *until > now);
        self.others = self.others.filter(|until| *until > now);
        self.others.is_some() || !self.known.is_empty()
    }
}

impl Questions {
    pub(super) fn belong_to(&mut self, owner: Arc<Owner>) {
        self.owner = Some(owner);
    }

    pub(super) fn owner(&self) -> Option<&Arc<Owner>> {
        self.owner.as_ref()
    }

    /// A plain call goes out.
    pub(super) fn call_begins(&mut self) {
        self.used = true;
        if let (Some(owner), false) = (&self.owner, self.open.is_empty()) {
            owner.aside().wake();
        }
    }

    /// A call is over, for the peer too.
    pub(super) fn call_ends(&mut self, id: u64) {
        self.ghosts.known.remove(&id);
        for open in self.open.values_mut().filter(|open| open.call == Some(id)) {
            if let Some(over) = open.over.take() {
                let _ = over.send(());
            }
        }
    }

    /// A plain call is over for us. The peer may not know.
    pub(super) fn call_cancelled(&mut self, id: u64) {
        self.call_ends(id);
        self.ghosts.add(id);
    }

    /// Whether something without a name may come from a call that is not under way any more.
    pub(super) fn is_haunted(&mut self) -> bool {
        self.ghosts.any()
    }

    /// The peer does not want an answer any more. Says whether it had asked.
    pub(super) fn withdraw(&mut self, id: &RequestId) -> bool {
        let open = self.open.remove(id);
        self.bytes -= open.as_ref().map_or(0, |open| open.size);
        open.is_some()
    }

    /// The question has its answer. Says whether one is still wanted.
    fn settle(&mut self, question: &Question) -> bool {
        self.is_open(question) && self.withdraw(&question.id)
    }

    fn is_open(&self, question: &Question) -> bool {
        self.open.get(&question.id).is_some_and(|open| open.number == question.number)
    }

    pub(super) fn withdraw_all(&mut self) {
        self.open.clear();
        self.bytes = 0;
    }

    #[cfg(test)]
    pub(super) fn open(&self) -> usize {
        self.open.len()
    }
}

struct Question {
    number: u64,
    id: RequestId,
    method: Method,
    params: Params,
}

/// What became of an attempt to ask.
enum Asked {
    /// Somebody was asked.
    Out {
        answer: oneshot::Receiver<Payload>,
        over: oneshot::Receiver<()>,
    },
    /// There is nobody yet.
    Nobody,
    Refused(RpcError),
    Withdrawn,
}

impl Calls {
    /// Takes a request of the peer.
    pub(super) fn asked(self: &Arc<Self>, id: RequestId, method: Method, params: Params, size: usize) {
        if method == Method::Ping {
            return self.reply_now(&id, Ok(Bytes::from_static(b"{}")));
        }
        let mut state = self.lock();
        match admit(&mut state.questions, &id, &method, &params, size) {
            Ok(Some(owner)) => {
                let params = sign_question(self.upstream(), &method, params);
                let question = Question { number: state.questions.asked, id, method, params };
                // Now, and not in the task: what is under way at this moment is what counts.
                let first = ask(&mut state, &owner, &question);
                drop(state);
                tokio::spawn(pursue(self.clone(), owner, question, first));
            }
            // An answer would be taken for that of the other.
            Ok(None) => tracing::debug!(upstream = %self.upstream(), ?id, "two questions with one id"),
            Err(why) => {
                drop(state);
                tracing::debug!(upstream = %self.upstream(), %method, why, "refused a question to the client");
                self.reply_now(&id, Err(refusal(why)));
            }
        }
    }
}

/// Whether it may be asked at all, and in whose name. `None` when one with its id is open.
fn admit(
    questions: &mut Questions,
    id: &RequestId,
    method: &Method,
    params: &Params,
    size: usize,
) -> Result<Option<Arc<Owner>>, &'static str> {
    // What exactly the client lacks is nothing that an old peer could read.
    let able = |owner: &&Arc<Owner>| owner.client().can_answer(method, params).is_ok();
    let Some(owner) = questions.owner.as_ref().filter(able).cloned() else {
        return Err(CANNOT);
    };
    if questions.open.contains_key(id) {
        return Ok(None);
    }
    let is_full = questions.open.len() >= MOST_OPEN
        || (questions.bytes + size > OPEN_BYTES && !questions.open.is_empty());
    if is_full {
        return Err("too many questions are open");
    }
    questions.bytes += size;
    questions.asked += 1;
    questions.open.insert(id.clone(), Open { number: questions.asked, call: None, size, over: None });
    Ok(Some(owner))
}

const CANNOT: &str = "the client cannot be asked this";
const NOT_NOW: &str = "nobody can be asked outside of a call";

fn refusal(why: &'static str) -> RpcError {
    RpcError::new(code::METHOD_NOT_FOUND, why)
}

/// Asks whoever there is no doubt about.
fn ask(state: &mut State, owner: &Owner, question: &Question) -> Asked {
    if !state.questions.is_open(question) {
        return Asked::Withdrawn;
    }
    let call = match owner.whose() {
        Whose::One => state.plain().max(),
        Whose::Several | Whose::Everybody => {
            let haunted = state.questions.is_haunted();
            let mut calls = state.plain();
            match (calls.next(), calls.next()) {
                (Some(only), None) if !haunted => Some(only),
                (None, _) if !haunted && !state.questions.used => None,
                (None, _) if !haunted => return Asked::Refused(refusal(NOT_NOW)),
                _ => return Asked::Refused(refusal("cannot tell which call this belongs to")),
            }
        }
    };
    let (reply, answer) = Reply::new();
    let request = ServerRequest { method: question.method.clone(), params: question.params.clone(), reply };
    let out = match call {
        Some(id) => state.ask(id, request),
        None if owner.whose() == Whose::One => owner.aside().ask(request),
        None => false,
    };
    match (out, state.questions.open.get_mut(&question.id)) {
        (true, Some(open)) => {
            let (over, ended) = oneshot::channel();
            (open.call, open.over) = (call, Some(over));
            Asked::Out { answer, over: ended }
        }
        _ => Asked::Nobody,
    }
}

/// Sees a question through to its answer.
async fn pursue(calls: Arc<Calls>, owner: Arc<Owner>, question: Question, first: Asked) {
    let deadline = Instant::now() + ANSWER_WITHIN;
    let answered = tokio::select! {
        answered = timeout_at(deadline, answer(&calls, &owner, &question, first)) => answered,
        () = calls.ended() => return,
    };
    let answer = match answered {
        Ok(Some(answer)) => answer,
        Ok(None) => return,
        Err(_) => Payload::Error(RpcError::new(code::TIMED_OUT, "nobody answered in time")),
    };
    if !calls.lock().questions.settle(&question) {
        return;
    }
    let answer = match answer.to_json() {
        Some(answer) => answer,
        None => Err(RpcError::new(code::INTERNAL_ERROR, "the answer is none")),
    };
    match answer {
        Ok(_) => calls.reply(&question.id, answer).await,
        // A peer that asks without reading gets no refusals, and holds nothing here.
        Err(_) => calls.reply_now(&question.id, answer),
    }
}

/// The answer. `None` when none is wanted any more.
async fn answer(calls: &Calls, owner: &Owner, question: &Question, first: Asked) -> Option<Payload> {
    let mut patience = Instant::now() + PATIENCE;
    // Where there was nobody, somebody may have come meanwhile.
    let mut first = Some(first).filter(|first| !matches!(first, Asked::Nobody));
    loop {
        let mut changed = std::pin::pin!(owner.aside().changed());
        changed.as_mut().enable();
        let asked = first.take().unwrap_or_else(|| ask(&mut calls.lock(), owner, question));
        match asked {
            Asked::Out { answer, over } => tokio::select! {
                biased;
                over = over => {
                    over.ok()?;
                    if owner.whose() != Whose::One {
                        return Some(Payload::Error(refusal("the call it belongs to is over")));
                    }
                    // It was another call of the same client that asked, or this one would not be over.
                    patience = Instant::now();
                }
                answer = answer => return Some(answer.unwrap_or_else(|_| Payload::Error(refusal(CANNOT)))),
            },
            Asked::Nobody => {
                if timeout_at(patience, changed).await.is_err() {
                    return Some(Payload::Error(refusal(NOT_NOW)));
                }
            }
            Asked::Refused(error) => return Some(Payload::Error(error)),
            Asked::Withdrawn => return None,
        }
    }
}
