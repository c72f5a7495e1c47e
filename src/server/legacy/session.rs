//! Legacy sessions: who opened one, and what waits in it.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use futures_util::future::AbortHandle;
use tokio::time::Instant;

use crate::{
    identity::{Caller, Principal, Scope},
    protocol::{Reply, RequestId, ServerRequest},
    server::{
        message::{self, Chunks},
        streams::{Memory, Outlet, Reader, Streams},
    },
};

/// Questions of calls that a client may leave unanswered.
const MOST_ASKED: usize = 64;
/// The same for those that belong to no call: nobody takes them back, so a newer one takes the place of the oldest.
const MOST_UNRELATED: usize = 16;
/// Each is a subscription upstream, too.
const MOST_SUBSCRIPTIONS: usize = 1024;
const SWEEP_EVERY: Duration = Duration::from_secs(60);

/// All sessions of one door.
pub(in crate::server) struct Sessions {
    all: Arc<Mutex<HashMap<Arc<str>, Arc<Session>>>>,
    most: usize,
    idle: Duration,
    sweeping: std::sync::Once,
}

/// One session.
pub(in crate::server) struct Session {
    /// Who asks; replaced when the client sets its log level.
    caller: Mutex<Arc<Caller>>,
    opened: Instant,
    /// Milliseconds after `opened`.
    last_used: AtomicU64,
    state: Mutex<State>,
    /// What it is told.
    streams: Arc<Streams>,
}

/// What most sessions have nothing of.
#[derive(Default)]
struct State {
    /// How to cancel a request under way.
    running: HashMap<RequestId, (u64, AbortHandle)>,
    /// So that a request that was cancelled cannot forget a later one of the same id.
    started: u64,
    /// Questions the client has not answered yet.
    asked: HashMap<u64, Asked>,
    next_question: u64,
    /// Where what belongs to no request goes.
    outbox: Option<Arc<Outlet>>,
    /// What feeds the outbox: by resource, and under no resource the lists.
    subscriptions: HashMap<Option<String>, AbortHandle>,
}

struct Asked {
    reply: Reply,
    /// Whether it belongs to a call.
    related: bool,
}

impl Sessions {
    pub(in crate::server) fn new(most: usize, idle: Duration) -> Self {
        Sessions { all: Arc::default(), most, idle, sweeping: std::sync::Once::new() }
    }

    pub(in crate::server) fn len(&self) -> usize {
        self.lock().len()
    }

    /// Opens a session. `None` when there are too many.
    pub(in crate::server) fn open(&self, caller: Caller) -> Option<Arc<str>> {
        self.sweeping.call_once(|| drop(tokio::spawn(sweep(Arc::downgrade(&self.all), self.idle))));
        let session = Session::new(caller, Streams::new(Memory::SESSION));
        let id = new_id();
        let mut all = self.lock();
        if all.len() >= self.most {
            return None;
        }
        all.insert(id.clone(), session);
        Some(id)
    }

    /// The session, if it is this principal's in this scope. An id is not a credential: anybody else's session is as
    /// good as none.
    pub(in crate::server) fn get(
        &self,
        id: &str,
        principal: &Principal,
        scope: &Scope,
    ) -> Option<Arc<Session>> {
        let session = self.lock().get(id).cloned()?;
        let caller = session.caller();
        if caller.principal != *principal || caller.scope != *scope {
            return None;
        }
        session.touch();
        Some(session)
    }

    /// Ends a session and whatever is under way in it.
    pub(in crate::server) fn end(&self, id: &str) {
        let ended = self.lock().remove(id);
        if let Some(session) = ended {
            session.close();
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Arc<str>, Arc<Session>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// 192 bits nobody can guess.
pub(in crate::server) fn new_id() -> Arc<str> {
    let mut bytes = [0u8; 24];
    getrandom::fill(&mut bytes).expect("the system has random numbers");
    URL_SAFE_NO_PAD.encode(bytes).into()
}

/// Ends the sessions that nobody has used for a while.
async fn sweep(all: std::sync::Weak<Mutex<HashMap<Arc<str>, Arc<Session>>>>, idle: Duration) {
    let mut tick = tokio::time::interval(SWEEP_EVERY.min(idle).max(Duration::from_millis(100)));
    loop {
        tick.tick().await;
        let Some(all) = all.upgrade() else { return };
        all.lock().unwrap_or_else(PoisonError::into_inner).retain(|_, session| {
            let keep = !session.is_idle(idle);
            match keep {
                true => session.streams.expire(),
                false => session.close(),
            }
            keep
        });
    }
}

impl Session {
    pub(in crate::server) fn new(caller: Caller, streams: Arc<Streams>) -> Arc<Self> {
        Arc::new(Session {
            caller: Mutex::new(Arc::new(caller)),
            opened: Instant::now(),
            last_used: AtomicU64::new(0),
            state: Mutex::default(),
            streams,
        })
    }

    /// Its streams.
    pub(in crate::server) fn streams(&self) -> &Arc<Streams> {
        &self.streams
    }

    pub(in crate::server) fn caller(&self) -> Arc<Caller> {
        self.caller.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The client wants log notifications from this level on.
    pub(in crate::server) fn set_log_level(&self, level: bytes::Bytes) {
        let mut caller = self.caller.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::make_mut(&mut caller).client.log_level = Some(level);
    }

    fn touch(&self) {
        let now = u64::try_from(self.opened.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_used.store(now, Ordering::Relaxed);
    }

    /// Not used for that long, with nothing under way and nobody listening.
    fn is_idle(&self, idle: Duration) -> bool {
        let unused = self
            .opened
            .elapsed()
            .saturating_sub(Duration::from_millis(self.last_used.load(Ordering::Relaxed)));
        let state = self.state();
        let listening = state.outbox.as_ref().is_some_and(|outbox| outbox.is_read());
        unused >= idle && state.running.is_empty() && !listening
    }

    /// Remembers how to cancel a request; gives the number to forget it by. `None` when the id is under way already.
    pub(in crate::server) fn start(&self, id: &RequestId, handle: AbortHandle) -> Option<u64> {
        let mut state = self.state();
        if state.running.contains_key(id) {
            return None;
        }
        state.started += 1;
        let number = state.started;
        state.running.insert(id.clone(), (number, handle));
        Some(number)
    }

    /// The request is now something else to cancel. If it was cancelled meanwhile, so is that.
    pub(in crate::server) fn goes_on(&self, id: &RequestId, number: u64, handle: AbortHandle) {
        match self.state().running.get_mut(id).filter(|(started, _)| *started == number) {
            Some((_, running)) => *running = handle,
            None => handle.abort(),
        }
    }

    pub(in crate::server) fn finish(&self, id: &RequestId, number: u64) {
        self.touch();
        let mut state = self.state();
        if state.running.get(id).is_some_and(|(started, _)| *started == number) {
            state.running.remove(id);
        }
    }

    pub(in crate::server) fn cancel(&self, id: &RequestId) {
        let running = self.state().running.remove(id);
        if let Some((_, handle)) = running {
            handle.abort();
        }
    }

    /// Remembers a question; its number is its id on the wire. `None` when too many are open.
    pub(in crate::server) fn ask(&self, reply: Reply) -> Option<u64> {
        let mut state = self.state();
        match state.asked.values().filter(|asked| asked.related).count() < MOST_ASKED {
            true => Some(state.ask(reply, true)),
            false => None,
        }
    }

    fn ask_unrelated(&self, reply: Reply) -> u64 {
        let mut state = self.state();
        let unrelated = state.asked.iter().filter(|(_, asked)| !asked.related).map(|(number, _)| *number);
        let (count, oldest) =
            unrelated.fold((0, u64::MAX), |(n, oldest), number| (n + 1, oldest.min(number)));
        if count >= MOST_UNRELATED {
            state.asked.remove(&oldest);
        }
        state.ask(reply, false)
    }

    /// The question an answer belongs to.
    pub(in crate::server) fn answered(&self, id: &RequestId) -> Option<Reply> {
        let number = id.as_str().parse().ok()?;
        self.state().asked.remove(&number).map(|asked| asked.reply)
    }

    /// Nobody waits for the answer any more.
    pub(in crate::server) fn withdraw(&self, number: u64) {
        self.state().asked.remove(&number);
    }

    /// A new stream for what belongs to no request; the one before ends.
    pub(in crate::server) fn open_outbox(&self, primed: bool) -> Reader {
        let (outlet, reader) = self.streams.open(primed);
        self.set_outbox(outlet);
        reader
    }

    /// From now on, what belongs to no request goes there.
    pub(in crate::server) fn set_outbox(&self, outlet: Arc<Outlet>) {
        self.state().outbox = Some(outlet);
    }

    /// Sends what belongs to no request, if anybody listens and keeps up, or may come back.
    pub(in crate::server) fn push(&self, message: Chunks) {
        let outbox = self.state().outbox.clone();
        outbox.map(|outbox| outbox.offer(message, false));
    }

    /// Asks something that belongs to no request. Unless it was declared, and somebody is there to be asked, the reply
    /// is dropped, which refuses.
    pub(in crate::server) fn push_question(&self, question: ServerRequest) {
        let ServerRequest { method, params, reply } = question;
        if self.caller().client.can_answer(&method, &params).is_err() {
            return;
        }
        let Some(outbox) = self.state().outbox.clone().filter(|outbox| outbox.is_read()) else { return };
        let number = self.ask_unrelated(reply);
        if !outbox.offer(message::request(&RequestId::from(number), &method, &params), true) {
            self.withdraw(number);
        }
    }

    /// Whether something feeds this subject already.
    pub(in crate::server) fn is_subscribed(&self, subject: &Option<String>) -> bool {
        self.state().subscriptions.contains_key(subject)
    }

    /// Whether there is room for updates of one more resource.
    pub(in crate::server) fn may_subscribe(&self, uri: &str) -> bool {
        let state = self.state();
        state.subscriptions.len() < MOST_SUBSCRIPTIONS
            || state.subscriptions.contains_key(&Some(uri.to_owned()))
    }

    pub(in crate::server) fn subscribe(&self, subject: Option<String>, task: AbortHandle) {
        if let Some(before) = self.state().subscriptions.insert(subject, task) {
            before.abort();
        }
    }

    pub(in crate::server) fn unsubscribe(&self, subject: &Option<String>) {
        if let Some(task) = self.state().subscriptions.remove(subject) {
            task.abort();
        }
    }

    /// Ends everything in it.
    pub(in crate::server) fn close(&self) {
        let state = std::mem::take(&mut *self.state());
        let running = state.running.values().map(|(_, handle)| handle);
        state.subscriptions.values().chain(running).for_each(AbortHandle::abort);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn ask(&mut self, reply: Reply, related: bool) -> u64 {
        self.next_question += 1;
        self.asked.insert(self.next_question, Asked { reply, related });
        self.next_question
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        identity::Client,
        protocol::{Method, Params},
    };

    fn caller() -> Caller {
        (*Caller::anonymous()).clone()
    }

    #[tokio::test(start_paused = true)]
    async fn an_id_is_no_credential() {
        let sessions = Sessions::new(10, Duration::from_secs(60));
        let id = sessions.open(caller()).unwrap();
        assert!(sessions.get(&id, &Principal::anonymous(), &Scope::Gateway).is_some());
        assert!(sessions.get(&id, &Principal::named("eve"), &Scope::Gateway).is_none());
        assert!(sessions.get(&id, &Principal::anonymous(), &Scope::Group("g".into())).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_session_goes_and_a_used_one_stays() {
        let sessions = Sessions::new(10, Duration::from_secs(90));
        let (used, idle) = (sessions.open(caller()).unwrap(), sessions.open(caller()).unwrap());
        for _ in 0..4 {
            tokio::time::sleep(Duration::from_secs(60)).await;
            sessions.get(&used, &Principal::anonymous(), &Scope::Gateway).unwrap();
        }
        assert!(sessions.get(&idle, &Principal::anonymous(), &Scope::Gateway).is_none());
        assert_eq!(sessions.len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn questions_nobody_answers_do_not_pile_up() {
        let client = Client { capabilities: r#"{"roots":{}}"#.into(), ..Client::gateway() };
        let session = Session::new(Caller { client, ..caller() }, Streams::new(Memory::SESSION));
        let ask = || {
            let (reply, answer) = Reply::new();
            session.push_question(ServerRequest {
                method: Method::RootsList,
                params: Params::default(),
                reply,
            });
            answer
        };
        assert!(ask().await.is_ok(), "refused: nobody is there");
        let _reader = session.open_outbox(false);
        let mut answers: Vec<_> = (0..=MOST_UNRELATED).map(|_| ask()).collect();
        assert!(answers[0].try_recv().is_ok(), "the oldest is refused");
        assert!(answers[1..].iter_mut().all(|answer| answer.try_recv().is_err()), "the others are open");
        for _ in 0..MOST_ASKED {
            assert!(session.ask(Reply::new().0).is_some());
        }
        assert!(session.ask(Reply::new().0).is_none());
        let refused = RequestId::from(2 + MOST_UNRELATED as u64);
        assert!(session.answered(&refused).is_some() && session.answered(&refused).is_none());
        session.close();
        assert!(answers.last_mut().unwrap().try_recv().is_ok(), "they end with the session");
    }

    #[tokio::test(start_paused = true)]
    async fn there_is_a_cap() {
        let sessions = Sessions::new(1, Duration::from_secs(60));
        let id = sessions.open(caller()).unwrap();
        assert!(sessions.open(caller()).is_none());
        sessions.end(&id);
        assert!(sessions.open(caller()).is_some());
    }
}
