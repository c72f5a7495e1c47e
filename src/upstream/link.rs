//! A connection that is made when it is needed, once, and not again too soon.
//!
//! Whoever needs the connection first makes it; the others wait for the same attempt. After a failure, everybody is
//! told the reason at once until the backoff has passed: a dead upstream costs its callers nothing. One that fails
//! again and again *trips*: whoever comes while it is tried once more is told at once, too.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::{runtime::Handle, sync::watch, time::Instant};

use crate::{
    error::{Chain, Fault, UpstreamError},
    protocol::ServerName,
};

/// No handshake takes longer: the slowest are programs that are downloaded first.
pub(crate) const ATTEMPT: Duration = Duration::from_secs(45);
const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// A connection that lived this long was a good one: its end is no reason to wait.
const PROVEN_AFTER: Duration = Duration::from_secs(10);

/// So many failures in a row are a habit.
const TRIPPED: u32 = 5;

/// What a [`Link`] holds.
pub(crate) trait Connection: Send + Sync + 'static {
    /// Whether it can take no more requests.
    fn is_closed(&self) -> bool;

    /// Whether its end is no sign of trouble, however soon it came.
    fn ended_well(&self) -> bool {
        false
    }

    /// Why it is closed, if it knows.
    fn why(&self) -> Option<Arc<str>> {
        None
    }
}

/// At most one connection of one kind.
pub(crate) struct Link<C> {
    upstream: ServerName,
    /// How long one attempt may take.
    within: Duration,
    /// Where the link was made. A connection lives there, and not on the lane of whoever asked first: lanes end before
    /// child processes are ended in order.
    home: Option<Handle>,
    state: Mutex<State<C>>,
}

enum State<C> {
    Idle { past: Past },
    Connecting { outcome: watch::Receiver<Option<Outcome<C>>>, past: Past },
    Up { connection: Arc<C>, since: Instant, past: Past },
    Down { until: Instant, past: Past },
}

/// The failures since it last was well.
#[derive(Clone, Default)]
struct Past {
    failures: u32,
    last: Option<Failure>,
}

type Outcome<C> = Result<Arc<C>, Failure>;

/// An [`UpstreamError`] that several callers can be told.
#[derive(Clone)]
struct Failure {
    fault: Fault,
    reason: Arc<str>,
}

impl<C: Connection> Link<C> {
    /// No connection yet.
    pub(crate) fn new(upstream: ServerName) -> Arc<Self> {
        Self::within(upstream, ATTEMPT)
    }

    /// The same, with a limit for each attempt: without one, a peer that is silent would be waited for for ever.
    pub(crate) fn within(upstream: ServerName, within: Duration) -> Arc<Self> {
        let home = Handle::try_current().ok();
        Arc::new(Link { upstream, within, home, state: Mutex::new(State::Idle { past: Past::default() }) })
    }

    /// The connection, made by `connect` when there is none. The attempt goes on when the caller goes away, for
    /// others may wait for it, and a half-made handshake helps nobody.
    pub(crate) async fn get<Fut>(
        self: &Arc<Self>,
        connect: impl FnOnce() -> Fut,
    ) -> Result<Arc<C>, UpstreamError>
    where
        Fut: Future<Output = Result<C, UpstreamError>> + Send + 'static,
    {
        let mut outcome = {
            let mut state = self.lock();
            self.settle(&mut state);
            match &*state {
                State::Up { connection, .. } => return Ok(connection.clone()),
                State::Down { past: Past { last: Some(failure), .. }, .. } => return Err(self.error(failure)),
                State::Connecting { past: Past { failures: TRIPPED.., last: Some(failure) }, .. } => {
                    return Err(self.error(failure));
                }
                State::Connecting { outcome, .. } => outcome.clone(),
                State::Idle { past } | State::Down { past, .. } => {
                    let (sender, outcome) = watch::channel(None);
                    let past = past.clone();
                    *state = State::Connecting { outcome: outcome.clone(), past: past.clone() };
                    let attempt = connect();
                    let link = self.clone();
                    let made = async move {
                        let outcome = tokio::time::timeout(link.within, attempt).await.unwrap_or_else(|_| {
                            let error = "no answer to the handshake in time";
                            Err(UpstreamError::new(&link.upstream, Fault::Unreachable, error))
                        });
                        sender.send_replace(Some(link.attempted(outcome, past)));
                    };
                    match &self.home {
                        Some(home) => home.spawn(made),
                        None => tokio::spawn(made),
                    };
                    outcome
                }
            }
        };
        let outcome = match outcome.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone().expect("waited until it is there"),
            Err(_) => Err(Failure { fault: Fault::Unreachable, reason: "the attempt was given up".into() }),
        };
        outcome.map_err(|failure| self.error(&failure))
    }

    /// Whose connection it is.
    pub(crate) fn upstream(&self) -> &ServerName {
        &self.upstream
    }

    /// The connection, if there is one.
    pub(crate) fn current(&self) -> Option<Arc<C>> {
        let mut state = self.lock();
        self.settle(&mut state);
        match &*state {
            State::Up { connection, .. } => Some(connection.clone()),
            _ => None,
        }
    }

    /// Forgets `connection`, so that the next caller makes a new one at once.
    pub(crate) fn discard(&self, connection: &Arc<C>) {
        let mut state = self.lock();
        if matches!(&*state, State::Up { connection: current, .. } if Arc::ptr_eq(current, connection)) {
            *state = State::Idle { past: Past::default() };
        }
    }

    /// Notices what time and the other end have changed.
    fn settle(&self, state: &mut State<C>) {
        let now = Instant::now();
        match state {
            State::Up { connection, since, past } if connection.is_closed() => {
                *state = match connection.ended_well() || now.duration_since(*since) >= PROVEN_AFTER {
                    true => State::Idle { past: Past::default() },
                    false => {
                        let reason = match connection.why() {
                            Some(why) => format!("it ended soon after it began: {why}").into(),
                            None => "it ended soon after it began".into(),
                        };
                        past.failed(Failure { fault: Fault::Lost, reason })
                    }
                };
            }
            State::Down { until, past } if *until <= now => *state = State::Idle { past: past.clone() },
            State::Connecting { outcome, past }
                if outcome.has_changed().is_err() && outcome.borrow().is_none() =>
            {
                *state = State::Idle { past: past.clone() };
            }
            _ => {}
        }
    }

    fn attempted(&self, outcome: Result<C, UpstreamError>, past: Past) -> Outcome<C> {
        let mut state = self.lock();
        match outcome {
            Ok(connection) => {
                let connection = Arc::new(connection);
                *state = State::Up { connection: connection.clone(), since: Instant::now(), past };
                Ok(connection)
            }
            Err(error) => {
                let reason = Chain(&*error.source).to_string().into();
                *state = past.failed(Failure { fault: error.fault, reason });
                match &*state {
                    State::Down { past: Past { last: Some(failure), .. }, .. } => Err(failure.clone()),
                    _ => unreachable!("it failed just now"),
                }
            }
        }
    }

    fn error(&self, failure: &Failure) -> UpstreamError {
        UpstreamError::new(&self.upstream, failure.fault, &*failure.reason)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State<C>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Past {
    /// After one more failure.
    fn failed<C>(&self, failure: Failure) -> State<C> {
        let wait = FIRST_WAIT.saturating_mul(1 << self.failures.min(10)).min(LONGEST_WAIT);
        let failures = self.failures.saturating_add(1);
        let failure = match failures {
            TRIPPED.. => Failure {
                reason: format!(
                    "it failed {failures} times in a row, and is not tried again before {}; the last time: {}",
                    clock(wait),
                    failure.reason
                )
                .into(),
                ..failure
            },
            _ => failure,
        };
        State::Down { until: Instant::now() + wait, past: Past { failures, last: Some(failure) } }
    }
}

/// What the clock will show then. Whoever reads it may do so any time.
fn clock(wait: Duration) -> String {
    let then = SystemTime::now() + wait;
    let seconds = then.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (hours, minutes) = (seconds / 3600 % 24, seconds / 60 % 60);
    format!("{hours:02}:{minutes:02}:{:02} UTC", seconds % 60)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use super::*;

    #[derive(Default)]
    struct Fake(AtomicBool);

    impl Connection for Fake {
        fn is_closed(&self) -> bool {
            self.0.load(Ordering::SeqCst)
        }
    }

    fn link() -> Arc<Link<Fake>> {
        Link::new("x".parse().unwrap())
    }

    async fn refused() -> Result<Fake, UpstreamError> {
        Err(UpstreamError::new(&"x".parse().unwrap(), Fault::Unreachable, "refused"))
    }

    #[tokio::test(start_paused = true)]
    async fn everybody_shares_one_attempt() {
        let (link, attempts) = (link(), Arc::new(AtomicUsize::new(0)));
        let connect = || {
            let attempts = attempts.clone();
            async move {
                attempts.fetch_add(1, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_secs(1)).await;
                Ok(Fake::default())
            }
        };
        let (a, b) = tokio::join!(link.get(connect), link.get(connect));
        assert!(Arc::ptr_eq(&a.unwrap(), &b.unwrap()));
        assert_eq!(attempts.load(Ordering::SeqCst), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_failure_the_reason_is_told_at_once_until_it_is_time() {
        let link = link();
        assert!(link.get(refused).await.is_err());
        let error = link.get(|| async { Ok(Fake::default()) }).await.err().unwrap();
        assert_eq!(error.source.to_string(), "refused");
        tokio::time::advance(FIRST_WAIT).await;
        assert!(link.get(|| async { Ok(Fake::default()) }).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_crash_loop_backs_off_and_a_long_life_does_not() {
        let link = link();
        let connection = link.get(|| async { Ok(Fake::default()) }).await.unwrap();
        connection.0.store(true, Ordering::SeqCst);
        assert!(link.get(|| async { Ok(Fake::default()) }).await.is_err());
        tokio::time::advance(LONGEST_WAIT).await;
        let connection = link.get(|| async { Ok(Fake::default()) }).await.unwrap();
        tokio::time::advance(PROVEN_AFTER).await;
        connection.0.store(true, Ordering::SeqCst);
        assert!(link.get(|| async { Ok(Fake::default()) }).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_habit_of_failing_is_said_in_one_sentence_and_nobody_waits_for_it() {
        let link = link();
        for n in 1..=6 {
            let said = link.get(refused).await.err().unwrap().source.to_string();
            match n < TRIPPED {
                true => assert_eq!(said, "refused"),
                false => {
                    let start = format!("it failed {n} times in a row, and is not tried again before ");
                    assert!(
                        said.starts_with(&start) && said.ends_with(" UTC; the last time: refused"),
                        "{said}"
                    );
                }
            }
            tokio::time::advance(LONGEST_WAIT).await;
        }
        // One tries, and the others do not wait for it.
        let trying = tokio::spawn({
            let link = link.clone();
            async move { link.get(std::future::pending::<Result<Fake, UpstreamError>>).await.is_ok() }
        });
        tokio::task::yield_now().await;
        assert!(link.get(refused).await.is_err());
        tokio::time::advance(ATTEMPT).await;
        assert!(!trying.await.unwrap());
        // Once it is well, all is forgotten.
        tokio::time::advance(LONGEST_WAIT).await;
        let connection = link.get(|| async { Ok(Fake::default()) }).await.unwrap();
        tokio::time::advance(PROVEN_AFTER).await;
        connection.0.store(true, Ordering::SeqCst);
        assert_eq!(link.get(refused).await.err().unwrap().source.to_string(), "refused");
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_that_goes_away_does_not_end_the_attempt() {
        let link = link();
        let slow = || async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            Ok(Fake::default())
        };
        let gone = tokio::time::timeout(Duration::from_millis(10), link.get(slow)).await;
        assert!(gone.is_err());
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert!(link.get(refused).await.is_ok());
    }
}
