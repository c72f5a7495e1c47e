//! What comes on the session's own stream in the middle of a call, and may belong to it.
//!
//! Servers in the field send what a call causes, logs and questions, on the stream that belongs to no request. Where
//! the client whose session it is has a stream of its own, it goes there. Otherwise it can only be told when there is
//! no doubt: on a session of one client any of its calls leads to that client, on a shared one only the only call
//! under way does.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{StreamExt as _, future::BoxFuture, stream};
use tokio::{sync::mpsc, time::Instant};

use super::{Refusal, session::Session};
use crate::{
    BoxError,
    identity::Affinity,
    protocol::{Frame, FrameStream, McpRequest, McpResponse, Params, Payload},
};

/// What waits for a call to be read; more is lost, and a question refused.
const UNREAD: usize = 16;
/// A server may be busy so long with a call that was given up.
const HAUNTS_FOR: Duration = Duration::from_secs(60);

/// The calls of a session that are under way.
#[derive(Default)]
pub(super) struct UnderWay(Mutex<State>);

#[derive(Default)]
struct State {
    /// Those that overhear nothing among them.
    all: usize,
    /// The newest last.
    overhearing: Vec<(u64, bool, mpsc::Sender<Frame>)>,
    next: u64,
    /// Until then a call that was given up may still have something to say.
    haunted_until: Option<Instant>,
}

impl UnderWay {
    /// A call has begun. It is over when what is returned is dropped.
    pub(super) fn enter(self: &Arc<Self>) -> Entered {
        self.lock().all += 1;
        Entered { under_way: self.clone(), number: None, over: false }
    }

    /// Whether a call that was given up may still have something to say.
    pub(super) fn is_haunted(&self) -> bool {
        self.lock().haunted_until.is_some_and(|until| until > Instant::now())
    }

    /// The call that a stray frame can only belong to, or only lead to the right client through.
    pub(super) fn whose(&self) -> Option<mpsc::Sender<Frame>> {
        let state = self.lock();
        let (_, own, call) = state.overhearing.last()?;
        let haunted = state.haunted_until.is_some_and(|until| until > Instant::now());
        (*own || (state.all == 1 && !haunted)).then(|| call.clone())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One call under way.
pub(super) struct Entered {
    under_way: Arc<UnderWay>,
    number: Option<u64>,
    over: bool,
}

impl Entered {
    /// It is over for the server, too: it has answered, or never began.
    pub(super) fn end(&mut self) {
        self.over = true;
    }

    fn overhear(&mut self, own: bool) -> mpsc::Receiver<Frame> {
        let (sender, receiver) = mpsc::channel(UNREAD);
        let mut state = self.under_way.lock();
        state.next += 1;
        let number = state.next;
        state.overhearing.push((number, own, sender));
        self.number = Some(number);
        receiver
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut state = self.under_way.lock();
        state.all -= 1;
        if !self.over {
            state.haunted_until = Some(Instant::now() + HAUNTS_FOR);
        }
        if let Some(number) = self.number {
            state.overhearing.retain(|(n, ..)| *n != number);
        }
    }
}

impl Session {
    /// Sends a request whose client may be asked, or wants logs, with an ear for what comes on the session's own
    /// stream meanwhile. That stream is open before the request goes out: a server does not ask twice.
    pub(super) async fn request_overhearing(
        self: &Arc<Self>,
        request: &McpRequest,
        params: Params,
    ) -> Result<McpResponse, Refusal> {
        self.start_listening();
        self.stream_is_settled().await;
        let mut entered = self.under_way.enter();
        let mut strays = entered.overhear(matches!(request.caller().affinity, Affinity::Session(_)));
        let (session, request) = (self.clone(), request.clone());
        let mut answer: BoxFuture<'static, Result<McpResponse, Refusal>> =
            Box::pin(async move { session.request_plainly(&request, params).await });
        tokio::select! {
            biased;
            Some(first) = strays.recv() => {
                let rest = Overheard { strays, answer: Answer::Coming(answer), entered };
                let frames = stream::iter([Ok(first)]).chain(rest.into_frames());
                Ok(McpResponse::new(Payload::Stream(Box::pin(frames))))
            }
            answered = &mut answer => {
                if answered.as_ref().is_err_and(Refusal::is_unprocessed) {
                    entered.end();
                }
                let (payload, extensions) = answered?.into_parts();
                let payload = match payload {
                    Payload::Stream(frames) => {
                        let rest = Overheard { strays, answer: Answer::Frames(frames), entered };
                        Payload::Stream(Box::pin(rest.into_frames()))
                    }
                    payload => {
                        entered.end();
                        payload
                    }
                };
                Ok(McpResponse::from_parts(payload, extensions))
            }
        }
    }
}

/// A call, and what is overheard while it is under way.
struct Overheard {
    strays: mpsc::Receiver<Frame>,
    answer: Answer,
    entered: Entered,
}

enum Answer {
    Coming(BoxFuture<'static, Result<McpResponse, Refusal>>),
    Frames(FrameStream),
}

impl Overheard {
    fn into_frames(self) -> impl futures_core::Stream<Item = Result<Frame, BoxError>> + Send {
        stream::unfold(Some(self), |overheard| async {
            let mut overheard = overheard?;
            let frame = overheard.next().await?;
            if matches!(frame, Ok(Frame::Final(_))) {
                overheard.entered.end();
            }
            let more = matches!(frame, Ok(Frame::Notification(_) | Frame::Request(_)));
            Some((frame, more.then_some(overheard)))
        })
    }

    async fn next(&mut self) -> Option<Result<Frame, BoxError>> {
        loop {
            let Overheard { strays, answer, .. } = self;
            let frames = match answer {
                Answer::Coming(coming) => tokio::select! {
                    biased;
                    Some(frame) = strays.recv() => return Some(Ok(frame)),
                    answered = coming => match answered.map(McpResponse::into_payload) {
                        Ok(Payload::Stream(frames)) => frames,
                        Ok(payload) => return Some(Ok(Frame::Final(payload))),
                        Err(refusal) => return Some(Err(self.failed(refusal))),
                    },
                },
                Answer::Frames(frames) => tokio::select! {
                    biased;
                    Some(frame) = strays.recv() => return Some(Ok(frame)),
                    frame = frames.next() => return frame,
                },
            };
            self.answer = Answer::Frames(frames);
        }
    }

    /// A request whose call has spoken already cannot go out once more.
    fn failed(&self, refusal: Refusal) -> BoxError {
        match refusal {
            Refusal::Failed(error) => error.into(),
            Refusal::Expired => "the session ended in the middle of a call".into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_stray_belongs_to_the_only_call_if_no_other_was_given_up() {
        let under_way = Arc::new(UnderWay::default());
        let mut first = under_way.enter();
        let _strays = first.overhear(false);
        assert!(under_way.whose().is_some());
        let mut second = under_way.enter();
        assert!(under_way.whose().is_none(), "it may be the other's");
        second.end();
        drop(second);
        assert!(under_way.whose().is_some());
        drop(under_way.enter());
        assert!(under_way.whose().is_none(), "one that was given up may still speak");
        tokio::time::advance(HAUNTS_FOR).await;
        assert!(under_way.whose().is_some());
        first.end();
        drop(first);
        assert!(under_way.whose().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn on_a_session_of_one_client_every_call_leads_to_it() {
        let under_way = Arc::new(UnderWay::default());
        drop(under_way.enter());
        let (mut first, mut second) = (under_way.enter(), under_way.enter());
        let (_a, _b) = (first.overhear(true), second.overhear(true));
        assert!(under_way.whose().is_some());
    }
}
