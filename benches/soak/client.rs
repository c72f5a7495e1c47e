//! Clients that come, call and go, and hold every reply against what they asked.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{net::TcpStream, task::JoinHandle, time::timeout};

use crate::upstream::{SHARED, Upstream};

/// Longer than any answer takes here.
const PATIENCE: Duration = Duration::from_secs(30);
const SERVERS: [&str; 4] = ["old", "new", "kid", "pup"];
/// How long calls take that are left, and calls that are cancelled.
const LEFT: u64 = 300;
const CANCELLED: u64 = 5_000;

/// What happened, and what should not have.
#[derive(Default)]
pub(crate) struct Ledger {
    pub(crate) sessions: AtomicU64,
    pub(crate) calls: AtomicU64,
    pub(crate) answered: AtomicU64,
    pub(crate) streamed: AtomicU64,
    pub(crate) vanished: AtomicU64,
    pub(crate) cancelled: AtomicU64,
    /// Calls to the legacy server of which it must be told that they are cancelled.
    pub(crate) told: AtomicU64,
    pub(crate) cut: AtomicU64,
    pub(crate) forgotten: AtomicU64,
    pub(crate) crossed: AtomicU64,
    pub(crate) lost: AtomicU64,
    pub(crate) troubles: Mutex<Vec<String>>,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Relaxed);
}

/// How a session ends.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    Ended,
    EndedInACall,
    Forgotten,
}

/// A client: with a session, or of the era that has none.
pub(crate) struct Session {
    id: Option<String>,
    pub(crate) owner: String,
    fate: Fate,
    next_id: u64,
}

impl Session {
    pub(crate) fn modern() -> Session {
        Session { id: None, owner: SHARED.to_owned(), fate: Fate::Forgotten, next_id: 1 }
    }
}

/// Plays several clients in turn, over one connection as long as it lasts.
pub(crate) struct Worker {
    port: u16,
    number: u64,
    random: u64,
    made: u64,
    upstreams: [Arc<Upstream>; 2],
    ledger: Arc<Ledger>,
    wire: Option<Wire>,
}

/// One call, ready to be sent.
struct Call {
    request: Request<Full<Bytes>>,
    id: u64,
    nonce: String,
    token: String,
}

impl Worker {
    pub(crate) fn new(port: u16, number: u64, upstreams: [Arc<Upstream>; 2], ledger: Arc<Ledger>) -> Worker {
        // The same every time.
        let random = (number + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        Worker { port, number, random, made: 0, upstreams, ledger, wire: None }
    }

    /// Opens a legacy session.
    pub(crate) async fn open(&mut self, owner: String, fate: Fate) -> Result<Session> {
        let info = json!({ "name": "soak", "version": "1" });
        let params = json!({ "protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": info });
        let hello = json!({ "jsonrpc": "2.0", "id": 0, "method": "initialize", "params": params });
        let reply = self.exchange(self.post(None, &hello)?).await?;
        let id = reply.session.clone().with_context(|| format!("no session: {reply:?}"))?;
        let done = json!({ "jsonrpc": "2.0", "method": "notifications/initialized" });
        let reply = self.exchange(self.post(Some(&id), &done)?).await?;
        ensure!(reply.status == 202, "initialized: {reply:?}");
        count(&self.ledger.sessions);
        Ok(Session { id: Some(id), owner, fate, next_id: 1 })
    }

    /// One call: of a hundred two vanish, one is cancelled, four have progress before the result.
    pub(crate) async fn call(&mut self, session: &mut Session) -> Result<()> {
        let server = SERVERS[self.pick(4) as usize];
        let over_http = SERVERS[self.pick(2) as usize];
        match self.pick(100) {
            0 | 1 => self.vanish(session, server).await,
            2 if session.id.is_some() => self.cancel(session, over_http).await,
            3..=6 => self.answered(session, server, true).await,
            _ => self.answered(session, server, false).await,
        }
    }

    /// The session is over, in its own way. Gives it back when nobody ended it.
    pub(crate) async fn leave(&mut self, mut session: Session) -> Result<Option<Session>> {
        if session.id.is_none() {
            return Ok(None);
        }
        match session.fate {
            Fate::Forgotten => {
                count(&self.ledger.forgotten);
                // So that it has something to leave at the legacy server.
                self.answered(&mut session, "old", false).await?;
                self.wire = None;
                return Ok(Some(session));
            }
            Fate::EndedInACall => {
                let call = self.make(&mut session, "old", json!({ "ms": CANCELLED }))?;
                let nonce = call.nonce.clone();
                let mut other = Wire::to(self.port).await?;
                let call = tokio::spawn(async move { timeout(PATIENCE, other.exchange(call.request)).await });
                self.begun(&nonce).await?;
                self.end(&session).await?;
                // It comes to an end; to which is not for the client to know, who has gone.
                drop(call.await?.context("a call outlived its session")?);
                count(&self.ledger.cut);
            }
            Fate::Ended => self.end(&session).await?,
        }
        Ok(None)
    }

    /// `DELETE`.
    pub(crate) async fn end(&mut self, session: &Session) -> Result<()> {
        let id = session.id.as_deref().context("there is a session")?;
        let request = Request::builder()
            .method(Method::DELETE)
            .uri("/mcp")
            .header("host", format!("127.0.0.1:{}", self.port))
            .header("mcp-session-id", id)
            .header("mcp-protocol-version", "2025-11-25");
        let reply = self.exchange(request.body(Full::default())?).await?;
        ensure!(reply.status == 200, "DELETE: {reply:?}");
        Ok(())
    }

    async fn answered(&mut self, session: &mut Session, server: &str, stream: bool) -> Result<()> {
        let call = self.make(session, server, json!({ "stream": stream }))?;
        let reply = self.exchange(call.request).await?;
        let messages = reply.messages();
        let (last, before) = messages.split_last().with_context(|| format!("nothing came: {reply:?}"))?;
        let foreign = |text: &Value| text.as_str().is_some_and(|text| text != call.nonce);
        let mut crossed = last["id"] != call.id || foreign(&last["result"]["content"][0]["text"]);
        for notice in before {
            crossed |=
                notice["params"]["progressToken"] != *call.token || foreign(&notice["params"]["message"]);
        }
        if last["result"]["content"][0]["text"] != *call.nonce {
            self.trouble(&self.ledger.lost, format!("{server}, {}: {reply:?}", call.nonce));
        } else {
            count(&self.ledger.answered);
        }
        if crossed {
            self.trouble(&self.ledger.crossed, format!("{server}, {}: {reply:?}", call.nonce));
        }
        if stream && !before.is_empty() {
            count(&self.ledger.streamed);
        }
        Ok(())
    }

    /// Drops the connection in the middle of a slow call: when the upstream has begun, or a little after it was sent.
    async fn vanish(&mut self, session: &mut Session, server: &str) -> Result<()> {
        let stream = self.pick(2) == 0;
        let call = self.make(session, server, json!({ "ms": LEFT, "stream": stream }))?;
        let (nonce, begins) = (call.nonce.clone(), self.pick(2) == 0 && ["old", "new"].contains(&server));
        let mut wire = Wire::to(self.port).await?;
        let moment = Duration::from_millis(self.pick(30));
        let upstreams = self.upstreams.clone();
        let gone = async {
            match begins {
                true => begun(&upstreams, &nonce).await,
                false => {
                    tokio::time::sleep(moment).await;
                    Ok(())
                }
            }
        };
        tokio::select! {
            reply = wire.exchange(call.request) => drop(reply?),
            gone = gone => gone?,
        }
        count(&self.ledger.vanished);
        Ok(())
    }

    /// Cancels a call by a notification, once the upstream has begun.
    async fn cancel(&mut self, session: &mut Session, server: &str) -> Result<()> {
        let call = self.make(session, server, json!({ "ms": CANCELLED }))?;
        let (nonce, id) = (call.nonce.clone(), call.id);
        let mut other = Wire::to(self.port).await?;
        let called = tokio::spawn(async move { timeout(PATIENCE, other.exchange(call.request)).await });
        self.begun(&nonce).await?;
        let cancelled =
            json!({ "jsonrpc": "2.0", "method": "notifications/cancelled", "params": { "requestId": id } });
        let reply = self.exchange(self.post(session.id.as_deref(), &cancelled)?).await?;
        ensure!(reply.status == 202, "cancelled: {reply:?}");
        let reply = called.await?.context("a cancelled call has no end")??;
        if !reply.body.is_empty() {
            self.trouble(&self.ledger.lost, format!("{nonce} was cancelled, and answered: {reply:?}"));
        }
        count(&self.ledger.cancelled);
        if server == "old" {
            count(&self.ledger.told);
        }
        Ok(())
    }

    async fn begun(&self, nonce: &str) -> Result<()> {
        begun(&self.upstreams, nonce).await
    }

    /// Ids are the same in all sessions; nonces are not.
    fn make(&mut self, session: &mut Session, server: &str, mut arguments: Value) -> Result<Call> {
        let id = session.next_id;
        (session.next_id, self.made) = (id + 1, self.made + 1);
        let nonce = format!("{}-{}-{}", session.owner, self.number, self.made);
        let token = format!("token-{nonce}");
        arguments["nonce"] = nonce.as_str().into();
        arguments["owner"] = session.owner.as_str().into();
        let name = format!("{server}_echo");
        let mut params = json!({ "name": name, "arguments": arguments, "_meta": { "progressToken": token } });
        if session.id.is_none() {
            let modern = params["_meta"].as_object_mut().context("an object")?;
            modern.extend(modern_meta());
        }
        let message = json!({ "jsonrpc": "2.0", "id": id, "method": "tools/call", "params": params });
        let mut request = self.post(session.id.as_deref(), &message)?;
        if session.id.is_none() {
            request.headers_mut().insert("mcp-method", "tools/call".parse()?);
            request.headers_mut().insert("mcp-name", name.parse()?);
        }
        count(&self.ledger.calls);
        Ok(Call { request, id, nonce, token })
    }

    fn post(&self, session: Option<&str>, message: &Value) -> Result<Request<Full<Bytes>>> {
        post(self.port, session, message)
    }

    async fn exchange(&mut self, request: Request<Full<Bytes>>) -> Result<Reply> {
        let wire = match self.wire.take() {
            Some(wire) => wire,
            None => Wire::to(self.port).await?,
        };
        let reply = timeout(PATIENCE, self.wire.insert(wire).exchange(request)).await;
        reply.context("no answer")?
    }

    fn trouble(&self, counter: &AtomicU64, what: String) {
        count(counter);
        self.ledger.troubles.lock().expect("no panic").push(what);
    }

    /// A number below `n`.
    fn pick(&mut self, n: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % n
    }
}

async fn begun(upstreams: &[Arc<Upstream>], nonce: &str) -> Result<()> {
    let began = std::time::Instant::now();
    while !upstreams.iter().any(|upstream| upstream.has_begun(nonce)) {
        ensure!(began.elapsed() < PATIENCE, "{nonce} never reached its upstream");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(())
}

fn modern_meta() -> serde_json::Map<String, Value> {
    let meta = json!({
        "io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientInfo": { "name": "soak", "version": "1" },
        "io.modelcontextprotocol/clientCapabilities": {},
    });
    meta.as_object().cloned().unwrap_or_default()
}

fn post(port: u16, session: Option<&str>, message: &Value) -> Result<Request<Full<Bytes>>> {
    let request = Request::post("/mcp")
        .header("host", format!("127.0.0.1:{port}"))
        .header("content-type", "application/json")
        .header("accept", "application/json, text/event-stream");
    let request = match session {
        Some(session) => {
            request.header("mcp-session-id", session).header("mcp-protocol-version", "2025-11-25")
        }
        None if message["method"] == "initialize" => request,
        None => request.header("mcp-protocol-version", "2026-07-28"),
    };
    Ok(request.body(Full::new(message.to_string().into()))?)
}

/// Waits until every server's tool is listed.
pub(crate) async fn wait_for(port: u16, servers: &[&str]) -> Result<()> {
    let began = std::time::Instant::now();
    loop {
        let message = json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": { "_meta": modern_meta() } });
        let mut request = post(port, None, &message)?;
        request.headers_mut().insert("mcp-method", "tools/list".parse()?);
        let reply = Wire::to(port).await?.exchange(request).await?;
        let listed = String::from_utf8_lossy(&reply.body).into_owned();
        if servers.iter().all(|server| listed.contains(&format!("\"{server}_echo\""))) {
            return Ok(());
        }
        ensure!(began.elapsed() < PATIENCE, "not all servers came up: {listed}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// One connection; dropped, it is closed, whatever is under way.
struct Wire {
    sender: http1::SendRequest<Full<Bytes>>,
    connection: JoinHandle<()>,
}

impl Wire {
    async fn to(port: u16) -> Result<Wire> {
        let stream = TcpStream::connect(("127.0.0.1", port)).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        Ok(Wire { sender, connection: tokio::spawn(async move { drop(connection.await) }) })
    }

    async fn exchange(&mut self, request: Request<Full<Bytes>>) -> Result<Reply> {
        self.sender.ready().await?;
        let (parts, body) = self.sender.send_request(request).await?.into_parts();
        let text = |name| parts.headers.get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
        Ok(Reply {
            status: parts.status.as_u16(),
            session: text("mcp-session-id"),
            events: text("content-type").as_deref() == Some("text/event-stream"),
            body: body.collect().await?.to_bytes(),
        })
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

#[derive(Debug)]
struct Reply {
    status: u16,
    session: Option<String>,
    events: bool,
    body: Bytes,
}

impl Reply {
    /// All messages in it; what is none is null.
    fn messages(&self) -> Vec<Value> {
        let read = |bytes: &[u8]| serde_json::from_slice(bytes).unwrap_or_default();
        match self.events {
            false => vec![read(&self.body)],
            true => {
                let data = self.body.split(|b| *b == b'\n').filter_map(|l| l.strip_prefix(b"data: "));
                // The first event of a legacy stream has an id and nothing to say.
                data.filter(|data| !data.is_empty()).map(read).collect()
            }
        }
    }
}
