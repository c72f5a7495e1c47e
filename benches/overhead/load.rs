//! The load generator: keep-alive HTTP/1.1 over plain TCP, one request in flight per connection.
//!
//! It does as little as it can and still notices a wrong answer. The first answer on every connection is
//! parsed and held against what was [`Want`]ed; every later one must have the status, about the length, the
//! id of its request and the marker.

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use futures_util::TryStreamExt;
use futures_util::stream::FuturesUnordered;
use memchr::memmem;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::canned::{Era, MARKER};
use crate::request::{Ask, Endpoint, FIRST_ID, Request};

/// No connection sends more than this in one window, whatever the clock says.
const MOST_REQUESTS: u64 = 1_000_000;
/// How long a whole window may overrun.
const PATIENCE: Duration = Duration::from_secs(30);
/// Id and marker stand within so many bytes of either end of a body.
const EDGE: usize = 1024;
/// Answers may differ by so much: a remaining lifetime may lose a digit.
const SLACK: usize = 64;

/// What the first answer must contain.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Want {
    Tools(usize),
    Text { at_least: usize },
}

/// One task for a connection: what to ask, and what to get.
#[derive(Clone, Debug)]
pub(crate) struct Errand {
    pub(crate) endpoint: Endpoint,
    pub(crate) era: Era,
    pub(crate) ask: Ask,
    pub(crate) want: Want,
}

/// A connection that repeats its errand.
pub(crate) struct Connection {
    wire: Wire,
    request: Request,
    goodbye: Option<Request>,
    next_id: u64,
    usual: usize,
}

/// What one window of load came to.
pub(crate) struct Load {
    pub(crate) elapsed: Duration,
    /// One for every request, unsorted.
    pub(crate) latencies: Vec<Duration>,
}

/// A socket and the bytes of the last answer.
pub(crate) struct Wire {
    stream: TcpStream,
    buffer: Vec<u8>,
}

/// An answer as it lies in the buffer.
pub(crate) struct Answer<'a> {
    pub(crate) status: u16,
    pub(crate) head: &'a [u8],
    pub(crate) body: &'a [u8],
}

/// Lets every connection ask and ask again for the length of `window`; all answers are awaited.
pub(crate) async fn run(connections: &mut [Connection], window: Duration) -> anyhow::Result<Load> {
    let start = Instant::now();
    let all = connections.iter_mut().map(|connection| connection.run(start + window));
    let parts: FuturesUnordered<_> = all.collect();
    let latencies: Vec<Vec<Duration>> = tokio::time::timeout(window + PATIENCE, parts.try_collect())
        .await
        .context("the answers stopped coming")??;
    Ok(Load { elapsed: start.elapsed(), latencies: latencies.concat() })
}

/// Opens a legacy session on `wire` and returns its id.
pub(crate) async fn open_session(wire: &mut Wire, endpoint: &Endpoint) -> anyhow::Result<String> {
    let mut hello = Request::new(endpoint, Era::Legacy, None, &Ask::Initialize);
    let answer = wire.exchange(hello.with_id(FIRST_ID)).await?;
    ensure!(answer.status == 200, "initialize was answered with {answer}");
    let session = answer.header("mcp-session-id").context("initialize opened no session")?.to_owned();
    let mut done = Request::new(endpoint, Era::Legacy, Some(&session), &Ask::Initialized);
    let answer = wire.exchange(done.with_id(FIRST_ID)).await?;
    ensure!(answer.status == 202, "notifications/initialized was answered with {answer}");
    Ok(session)
}

/// `GET path`, on a connection of its own.
pub(crate) async fn get(port: u16, path: &str) -> anyhow::Result<(u16, Vec<u8>)> {
    let mut wire = Wire::connect(port).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n");
    let answer = wire.exchange(request.as_bytes()).await?;
    Ok((answer.status, answer.body.to_vec()))
}

// === impl Want ===

impl Want {
    fn check(self, message: &Value) -> anyhow::Result<()> {
        let result = message.get("result").context("there is no result")?;
        match self {
            Want::Tools(wanted) => {
                let got = result["tools"].as_array().context("there are no tools")?.len();
                ensure!(got == wanted, "{got} tools instead of {wanted}");
                ensure!(result.get("nextCursor").is_none(), "the list goes on at a cursor");
            }
            Want::Text { at_least } => {
                ensure!(result["isError"] != true, "the call failed: {}", result["content"]);
                let text = result["content"][0]["text"].as_str().context("there is no text")?;
                ensure!(text.len() >= at_least, "{} bytes of text instead of {at_least}", text.len());
            }
        }
        Ok(())
    }
}

// === impl Connection ===

impl Connection {
    /// Connects, opens a session if the era has them, and checks the first answer thoroughly.
    pub(crate) async fn open(errand: &Errand) -> anyhow::Result<Connection> {
        let Errand { endpoint, era, ask, want } = errand;
        let mut wire = Wire::connect(endpoint.port).await?;
        let session = match era {
            Era::Modern => None,
            Era::Legacy => Some(open_session(&mut wire, endpoint).await?),
        };
        let mut request = Request::new(endpoint, *era, session.as_deref(), ask);
        let answer = wire.exchange(request.with_id(FIRST_ID)).await?;
        let message = serde_json::from_slice::<Value>(answer.body);
        let checked = message.map_err(anyhow::Error::from).and_then(|message| want.check(&message));
        checked.with_context(|| format!("{} was answered with {answer}", ask.method()))?;
        let usual = answer.body.len();
        let goodbye = session.map(|session| Request::goodbye(endpoint, &session));
        Ok(Connection { wire, request, goodbye, next_id: FIRST_ID + 1, usual })
    }

    /// Ends the session, if there is one: ours shall not pile up in a gateway that serves many cases.
    pub(crate) async fn close(mut self) -> anyhow::Result<()> {
        if let Some(mut goodbye) = self.goodbye {
            let answer = self.wire.exchange(goodbye.with_id(FIRST_ID)).await?;
            ensure!(matches!(answer.status, 200 | 202 | 204), "DELETE was answered with {answer}");
        }
        Ok(())
    }

    async fn run(&mut self, until: Instant) -> anyhow::Result<Vec<Duration>> {
        let marker = memmem::Finder::new(MARKER);
        let mut latencies = Vec::with_capacity(16 * 1024);
        for _ in 0..MOST_REQUESTS {
            let start = Instant::now();
            if start >= until {
                break;
            }
            let id = self.next_id;
            self.next_id += 1;
            let answer = self.wire.exchange(self.request.with_id(id)).await?;
            latencies.push(start.elapsed());
            let right = answer.status == 200
                && answer.body.len().abs_diff(self.usual) <= SLACK
                && answer.edges_contain(&memmem::Finder::new(&format!("\"id\":{id}")))
                && answer.edges_contain(&marker);
            ensure!(right, "request {id} was answered with {answer}, usual are {} bytes", self.usual);
        }
        Ok(latencies)
    }
}

// === impl Wire ===

impl Wire {
    pub(crate) async fn connect(port: u16) -> anyhow::Result<Wire> {
        let stream = TcpStream::connect(("127.0.0.1", port)).await?;
        stream.set_nodelay(true)?;
        Ok(Wire { stream, buffer: Vec::with_capacity(64 * 1024) })
    }

    /// Sends one request and reads the whole answer.
    pub(crate) async fn exchange(&mut self, request: &[u8]) -> anyhow::Result<Answer<'_>> {
        self.stream.write_all(request).await?;
        self.buffer.clear();
        let head = loop {
            self.read().await?;
            if let Some(at) = memmem::find(&self.buffer, b"\r\n\r\n") {
                break at + 4;
            }
            ensure!(self.buffer.len() < 64 * 1024, "the head of the answer does not end");
        };
        let end = head + Answer::read(&self.buffer[..head])?.content_length()?;
        self.buffer.reserve(end.saturating_sub(self.buffer.len()));
        while self.buffer.len() < end {
            self.read().await?;
        }
        ensure!(self.buffer.len() == end, "there are bytes after the answer");
        Ok(Answer { body: &self.buffer[head..], ..Answer::read(&self.buffer[..head])? })
    }

    async fn read(&mut self) -> anyhow::Result<()> {
        let read = self.stream.read_buf(&mut self.buffer).await?;
        ensure!(read > 0, "the connection was closed");
        Ok(())
    }
}

// === impl Answer ===

impl<'a> Answer<'a> {
    fn read(head: &'a [u8]) -> anyhow::Result<Answer<'a>> {
        let status = head.get(9..12).and_then(|status| std::str::from_utf8(status).ok());
        let status = status.and_then(|status| status.parse().ok()).context("this is no HTTP answer")?;
        Ok(Answer { status, head, body: &[] })
    }

    pub(crate) fn header(&self, name: &str) -> Option<&'a str> {
        let lines = self.head.split(|byte| *byte == b'\n').skip(1);
        let mut fields = lines.filter_map(|line| {
            let colon = memchr::memchr(b':', line)?;
            Some((&line[..colon], &line[colon + 1..]))
        });
        let value = fields.find(|(field, _)| field.eq_ignore_ascii_case(name.as_bytes()))?.1;
        std::str::from_utf8(value.trim_ascii()).ok()
    }

    fn content_length(&self) -> anyhow::Result<usize> {
        match self.header("content-length") {
            Some(length) => Ok(length.parse()?),
            None if matches!(self.status, 202 | 204) && self.header("transfer-encoding").is_none() => Ok(0),
            None => bail!("the answer has no content-length: {}", String::from_utf8_lossy(self.head)),
        }
    }

    fn edges_contain(&self, needle: &memmem::Finder<'_>) -> bool {
        let edge = self.body.len().min(EDGE);
        needle.find(&self.body[..edge]).is_some()
            || needle.find(&self.body[self.body.len() - edge..]).is_some()
    }
}

impl std::fmt::Display for Answer<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let start = &self.body[..self.body.len().min(300)];
        write!(f, "{} and {} bytes: {}", self.status, self.body.len(), String::from_utf8_lossy(start))
    }
}
