//! HTTP+SSE, the transport of 2024-11-05: one stream for all that comes, a POST for each message that goes.
//!
//! That is a pair of byte streams in disguise, so the messages are pumped through a pipe to the client that speaks on
//! pipes. Each stream is a session, so each client session has one of its own.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{HeaderMap, HeaderValue, Method as HttpMethod, Uri, header::ACCEPT};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, DuplexStream},
    sync::oneshot,
    task::JoinSet,
    time::timeout,
};
use tower::Service;

use super::{
    MESSAGE_LIMIT, Spec,
    legacy::MOST_SESSIONS,
    sse::Events,
    wire::{Answer, Wire, post_headers, same_origin},
};
use crate::{
    BoxError,
    error::{Fault, UpstreamError},
    protocol::{Era, McpRequest, McpResponse, Message, Method, ServerName},
    upstream::lines::{self, Lines, Owner, Places, Surroundings, Unopened},
};

/// A server may have to be asked twice.
const CONNECT: Duration = Duration::from_secs(30);
/// How much may wait in the pipe.
const PIPE: usize = 64 * 1024;
/// How many POSTs may be open. Further messages wait in the pipe.
const MOST_POSTS: usize = 1024;
/// How long what follows waits for the server to take what must come first.
const FIRST_WITHIN: Duration = Duration::from_secs(2);

/// An upstream behind the deprecated HTTP+SSE transport.
///
/// ```
/// let upstream = portcullis::upstream::SseUpstream::new("old".parse()?, "http://127.0.0.1:3000/sse");
/// # Ok::<_, portcullis::protocol::InvalidName>(())
/// ```
#[derive(Clone)]
pub struct SseUpstream {
    name: ServerName,
    spec: Spec,
    wire: Arc<Wire>,
    sessions: Arc<Places>,
    /// What the last connection spoke.
    era: Arc<Mutex<Option<Era>>>,
}

impl SseUpstream {
    /// The server whose stream is at `url`, which may hold `${VAR}` references. Nothing is sent before the first
    /// request.
    pub fn new(name: ServerName, url: impl Into<String>) -> Self {
        let wire = Arc::new(Wire::new(name.clone(), MESSAGE_LIMIT));
        let sessions = Arc::new(Places::new(name.clone(), MOST_SESSIONS, CONNECT));
        SseUpstream { name, spec: Spec::new(url.into()), wire, sessions, era: Arc::default() }
    }

    /// Adds a header to every request. The value may hold `${VAR}` references.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.spec.headers.insert(name.to_owned(), value.to_owned());
        self
    }

    /// Most servers behind this transport are as old as it is, and some that are not speak of the modern era over it,
    /// too: each is asked once, as a program on stdio is.
    async fn connect(self, owner: Arc<Owner>) -> Result<Lines, UpstreamError> {
        let known = *self.lock_era();
        let opened = match self.open(known, &owner).await {
            Err(Unopened { probed: true, error }) => {
                tracing::debug!(upstream = %self.name, %error, "connecting again without asking for the era");
                self.open(Some(Era::Legacy), &owner).await
            }
            outcome => outcome,
        };
        let outcome = opened.map_err(|unopened| unopened.error);
        *self.lock_era() = outcome.as_ref().ok().map(Lines::era);
        outcome
    }

    fn lock_era(&self) -> MutexGuard<'_, Option<Era>> {
        self.era.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn open(&self, known: Option<Era>, owner: &Arc<Owner>) -> Result<Lines, Unopened> {
        let (wire, pumping) = self.start().await.map_err(|error| Unopened { error, probed: false })?;
        let opened = lines::open(&wire, known, owner).await?;
        Ok(Lines::new(wire, opened, pumping))
    }

    /// Opens the stream, and begins to read and write.
    async fn start(&self) -> Result<(lines::Wire, AbortOnDrop), UpstreamError> {
        let (uri, headers) = self.spec.resolve().map_err(|e| self.wire.error(Fault::Misconfigured, e))?;
        let mut get = headers.clone();
        get.insert(ACCEPT, HeaderValue::from_static("text/event-stream"));
        let mut events = match self.wire.send(HttpMethod::GET, &uri, get, Bytes::new()).await? {
            Answer::Events(_, events) => events,
            Answer::Refused(status, _, body) => return Err(self.wire.refused(status, &body)),
            _ => return Err(self.wire.error(Fault::Misconfigured, "there is no event stream at this URL")),
        };
        let first = events.next().await.map_err(|e| self.wire.read_error(e))?;
        let endpoint = first.and_then(|event| same_origin(&uri, std::str::from_utf8(&event.data).ok()?));
        let Some(endpoint) = endpoint else {
            return Err(self
                .wire
                .error(Fault::Garbled, "the stream does not begin with an endpoint of the same origin"));
        };

        let (ours, theirs) = tokio::io::duplex(PIPE);
        let pump = Pump { wire: self.wire.clone(), endpoint, headers: post_headers(&headers) };
        let task = tokio::spawn(pump.run(events, theirs));
        let pumping = AbortOnDrop(task.abort_handle());
        let around = Surroundings {
            max_line: MESSAGE_LIMIT,
            gone: Box::pin(async move { task.await.unwrap_or_else(|e| e.to_string()) }),
            closing: Box::pin(std::future::pending()),
        };
        let (read, write) = tokio::io::split(ours);
        Ok((lines::Wire::start(&self.name, read, write, around), pumping))
    }
}

/// Both directions, until one of them ends.
#[derive(Clone)]
struct Pump {
    wire: Arc<Wire>,
    endpoint: Uri,
    headers: HeaderMap,
}

impl Pump {
    /// Says why it ended.
    async fn run(self, mut events: Events, pipe: DuplexStream) -> String {
        let (read, mut write) = tokio::io::split(pipe);
        let mut outgoing = BufReader::new(read).lines();
        // A server may keep a POST open until it has answered on the stream; the others must not wait for that.
        let mut posts = JoinSet::new();
        loop {
            tokio::select! {
                event = events.next() => match event {
                    Ok(Some(event)) => {
                        // A message is a line; between tokens, JSON's own line breaks are spaces.
                        let mut line = event.data.to_vec();
                        line.iter_mut().filter(|b| matches!(**b, b'\n' | b'\r')).for_each(|b| *b = b' ');
                        line.push(b'\n');
                        if write.write_all(&line).await.is_err() {
                            return "nobody listens any more".to_owned();
                        }
                    }
                    Ok(None) => return "the stream ended".to_owned(),
                    Err(error) => return error.to_string(),
                },
                line = outgoing.next_line(), if posts.len() < MOST_POSTS => match line {
                    Ok(Some(line)) => {
                        let goes_first = goes_first(&line);
                        let (taken, wait) = oneshot::channel();
                        let post = self.clone().post(line.into());
                        posts.spawn(async move {
                            let posted = post.await;
                            let _ = taken.send(());
                            posted
                        });
                        if goes_first {
                            let _ = timeout(FIRST_WITHIN, wait).await;
                        }
                    }
                    _ => return "the connection was closed".to_owned(),
                },
                Some(posted) = posts.join_next() => if let Ok(Err(reason)) = posted {
                    return reason;
                },
            }
        }
    }

    /// An error is why the connection is of no use any more.
    async fn post(self, line: Bytes) -> Result<(), String> {
        let status = match self.wire.deliver(&self.endpoint, self.headers, line.clone()).await {
            Ok(status) if status.is_success() => return Ok(()),
            Ok(status) => status,
            Err(error) => return Err(error.to_string()),
        };
        match Message::parse(line) {
            // The server may have given up its question, or never wanted to know.
            Ok(Message::Response { .. } | Message::Notification { .. }) => {
                tracing::debug!(upstream = %self.wire.upstream(), %status, "a message nobody waits for was refused");
                Ok(())
            }
            _ => Err(format!("a message was refused: HTTP {status}")),
        }
    }
}

/// Each POST may take a way of its own, and what these say counts for all that follows.
fn goes_first(line: &str) -> bool {
    let notification = format!(r#"{{"jsonrpc":"2.0","method":"{}""#, Method::Initialized.as_str());
    // Behind the id, which is a number of ours.
    let is_level = line.get(..64).unwrap_or(line).contains(r#","method":"logging/setLevel""#);
    line.starts_with(&notification) || is_level
}

struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Service<McpRequest> for SseUpstream {
    type Response = McpResponse;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<McpResponse, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: McpRequest) -> Self::Future {
        let upstream = self.clone();
        Box::pin(
            async move { upstream.sessions.call(request, |owner| upstream.clone().connect(owner)).await },
        )
    }
}

impl fmt::Debug for SseUpstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SseUpstream").field("upstream", &self.name).finish_non_exhaustive()
    }
}
