//! Servers over HTTP that remember who used which session.

use std::{
    collections::{HashMap, HashSet},
    convert::Infallible,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::Result;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request, Response, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::watch};

/// Whose calls share a session.
pub(crate) const SHARED: &str = "modern";

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Era {
    Legacy,
    Modern,
}

/// A server, in this process.
pub(crate) struct Upstream {
    pub(crate) port: u16,
    era: Era,
    /// Sessions and who used them.
    sessions: Mutex<HashMap<String, String>>,
    pub(crate) opened: AtomicU64,
    pub(crate) ended: AtomicU64,
    /// Calls on the session of somebody else.
    pub(crate) crossed: AtomicU64,
    /// Calls on sessions that are not known.
    pub(crate) strangers: AtomicU64,
    cancels: AtomicU64,
    under_way: AtomicUsize,
    connections: AtomicUsize,
    most_connections: AtomicUsize,
    /// The nonces of slow calls that have begun.
    begun: Mutex<HashSet<String>>,
    hang_up: watch::Sender<()>,
}

impl Upstream {
    pub(crate) async fn start(era: Era) -> Result<Arc<Upstream>> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let upstream = Arc::new(Upstream {
            port: listener.local_addr()?.port(),
            era,
            sessions: Mutex::default(),
            opened: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            crossed: AtomicU64::new(0),
            strangers: AtomicU64::new(0),
            cancels: AtomicU64::new(0),
            under_way: AtomicUsize::new(0),
            connections: AtomicUsize::new(0),
            most_connections: AtomicUsize::new(0),
            begun: Mutex::default(),
            hang_up: watch::Sender::new(()),
        });
        tokio::spawn(upstream.clone().serve(listener));
        Ok(upstream)
    }

    async fn serve(self: Arc<Self>, listener: TcpListener) {
        while let Ok((stream, _)) = listener.accept().await {
            if stream.set_nodelay(true).is_err() {
                continue;
            }
            let (upstream, mut hang_up) = (self.clone(), self.hang_up.subscribe());
            let service = service_fn(move |request| {
                let upstream = upstream.clone();
                async move { Ok::<_, Infallible>(upstream.take(request).await) }
            });
            let counting = self.clone();
            tokio::spawn(async move {
                let _open = Counted::of(&counting.connections);
                counting.most_connections.fetch_max(counting.connections.load(Relaxed), Relaxed);
                let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
                let mut connection = std::pin::pin!(connection);
                tokio::select! {
                    // A peer that hangs up is none of our business.
                    _ = connection.as_mut() => return,
                    _ = hang_up.changed() => connection.as_mut().graceful_shutdown(),
                }
                // One on which nothing ever came does not see itself as idle.
                let _ = tokio::time::timeout(Duration::from_secs(1), connection).await;
            });
        }
    }

    /// Closes all connections.
    pub(crate) fn hang_up(&self) {
        self.hang_up.send_replace(());
    }

    /// Whose sessions are open.
    pub(crate) fn owners(&self) -> Vec<String> {
        // One that nobody has called in is the gateway's own.
        let named = |owner: &String| if owner.is_empty() { SHARED.to_owned() } else { owner.clone() };
        self.sessions.lock().expect("no panic").values().map(named).collect()
    }

    pub(crate) fn most_connections(&self) -> usize {
        self.most_connections.load(Relaxed)
    }

    pub(crate) fn under_way(&self) -> usize {
        self.under_way.load(Relaxed)
    }

    /// How many calls it was told to cancel.
    pub(crate) fn cancels(&self) -> u64 {
        self.cancels.load(Relaxed)
    }

    pub(crate) fn has_begun(&self, nonce: &str) -> bool {
        self.begun.lock().expect("no panic").contains(nonce)
    }

    async fn take(self: Arc<Self>, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let (parts, body) = request.into_parts();
        let session = parts.headers.get("mcp-session-id").and_then(|v| v.to_str().ok()).unwrap_or_default();
        match parts.method {
            Method::DELETE => {
                let known = self.sessions.lock().expect("no panic").remove(session).is_some();
                self.ended.fetch_add(u64::from(known), Relaxed);
                return plain(if known { 200 } else { 404 });
            }
            Method::POST => {}
            _ => return plain(405),
        }
        let Ok(body) = body.collect().await else { return plain(400) };
        let Ok(message) = serde_json::from_slice::<Value>(&body.to_bytes()) else { return plain(400) };
        let id = &message["id"];
        match message["method"].as_str().unwrap_or_default() {
            "tools/call" => self.call(session, id, &message["params"]).await,
            "notifications/cancelled" => {
                self.cancels.fetch_add(1, Relaxed);
                plain(202)
            }
            method if method.starts_with("notifications/") => plain(202),
            method => {
                let mut response = json_answer(answer(id, general(method, self.era == Era::Modern)));
                if method == "initialize" && self.era == Era::Legacy {
                    let session = format!("s{}", self.opened.fetch_add(1, Relaxed));
                    response.headers_mut().insert("mcp-session-id", session.parse().expect("a plain id"));
                    self.sessions.lock().expect("no panic").insert(session, String::new());
                }
                response
            }
        }
    }

    async fn call(&self, session: &str, id: &Value, params: &Value) -> Response<Full<Bytes>> {
        let _under_way = Counted::of(&self.under_way);
        let arguments = &params["arguments"];
        if self.era == Era::Legacy && !self.check(session, arguments["owner"].as_str().unwrap_or_default()) {
            return plain(404);
        }
        if let Some(ms) = arguments["ms"].as_u64() {
            let nonce = arguments["nonce"].as_str().unwrap_or_default();
            self.begun.lock().expect("no panic").insert(nonce.to_owned());
            tokio::time::sleep(Duration::from_millis(ms)).await;
            self.begun.lock().expect("no panic").remove(nonce);
        }
        let answer = answer(id, Some(echo(arguments)));
        match (arguments["stream"] == true, params["_meta"].get("progressToken")) {
            (true, Some(token)) => {
                let events = format!("data: {}\n\ndata: {answer}\n\n", progress(token, arguments));
                let mut response = plain(200);
                *response.body_mut() = Full::new(events.into());
                let kind = "text/event-stream".parse().expect("a media type");
                response.headers_mut().insert("content-type", kind);
                response
            }
            _ => json_answer(answer),
        }
    }

    /// A session is one client's, from its first call on.
    fn check(&self, session: &str, owner: &str) -> bool {
        let mut sessions = self.sessions.lock().expect("no panic");
        let Some(known) = sessions.get_mut(session) else {
            self.strangers.fetch_add(1, Relaxed);
            return false;
        };
        if known.is_empty() {
            *known = owner.to_owned();
        }
        self.crossed.fetch_add(u64::from(known != owner), Relaxed);
        true
    }
}

/// Over when dropped, also when the caller went away.
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn of(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Relaxed);
        Counted(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

fn plain(status: u16) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = status.try_into().expect("a status");
    response
}

fn json_answer(body: String) -> Response<Full<Bytes>> {
    let mut response = plain(200);
    *response.body_mut() = Full::new(body.into());
    response.headers_mut().insert("content-type", "application/json".parse().expect("a media type"));
    response
}

// === what every server here says ===

/// The result of everything but calls.
pub(crate) fn general(method: &str, modern: bool) -> Option<Value> {
    match method {
        "server/discover" if modern => Some(json!({
            "resultType": "complete", "supportedVersions": ["2026-07-28"], "capabilities": { "tools": {} },
            "ttlMs": 0, "cacheScope": "private",
        })),
        "initialize" => Some(json!({
            "protocolVersion": "2025-11-25", "capabilities": { "tools": {} },
            "serverInfo": { "name": "soak", "version": "1" },
        })),
        "tools/list" => Some(crate::child::tools()),
        "ping" => Some(json!({})),
        _ => None,
    }
}

pub(crate) fn answer(id: &Value, result: Option<Value>) -> String {
    match result {
        Some(result) => json!({ "jsonrpc": "2.0", "id": id, "result": result }),
        None => json!({ "jsonrpc": "2.0", "id": id, "error": { "code": -32601, "message": "unknown" } }),
    }
    .to_string()
}

pub(crate) fn echo(arguments: &Value) -> Value {
    json!({ "content": [{ "type": "text", "text": arguments["nonce"] }], "resultType": "complete" })
}

/// Progress that says for whom it is.
pub(crate) fn progress(token: &Value, arguments: &Value) -> String {
    let params = json!({ "progressToken": token, "progress": 1, "message": arguments["nonce"] });
    json!({ "jsonrpc": "2.0", "method": "notifications/progress", "params": params }).to_string()
}
