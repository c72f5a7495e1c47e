//! Upstreams that follow a script, and remember every byte they were sent.

use std::{
    collections::{HashMap, HashSet},
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use axum::{body::Body, response::Response};
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, future::BoxFuture};
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use http_body_util::BodyExt as _;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use portcullis::protocol::{Era, RawObject};
use tokio::{
    net::TcpListener,
    task::{JoinHandle, JoinSet},
};

use super::eventually;

/// What an upstream was sent.
#[derive(Clone, Debug)]
pub(crate) struct Sent {
    pub(crate) verb: Method,
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Sent {
    /// The message's method, or nothing.
    pub(crate) fn method(&self) -> String {
        let method = self.message().and_then(|m| Some(m.get_string("method")?.into_owned()));
        method.unwrap_or_default()
    }

    /// A member of the message, as it stands there.
    pub(crate) fn raw(&self, member: &str) -> String {
        self.message().and_then(|m| Some(m.get(member)?.to_owned())).unwrap_or_else(|| "null".to_owned())
    }

    pub(crate) fn params(&self) -> serde_json::Value {
        serde_json::from_str(&self.raw("params")).expect("readable params")
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().expect("a readable header"))
    }

    fn message(&self) -> Option<RawObject> {
        RawObject::parse(self.body.clone()).ok()
    }
}

type Handler = Arc<dyn Fn(Sent) -> BoxFuture<'static, Response> + Send + Sync>;

/// A running upstream; it is gone, with its connections, when dropped.
pub(crate) struct Upstream {
    pub(crate) address: SocketAddr,
    seen: Arc<Mutex<Vec<Sent>>>,
    sessions: Arc<Mutex<Sessions>>,
    serving: JoinHandle<()>,
}

#[derive(Default)]
struct Sessions {
    known: HashSet<String>,
    opened: usize,
    /// What is said of one that is not known.
    unknown: Option<StatusCode>,
}

impl Upstream {
    /// One of 2026-07-28.
    pub(crate) fn modern() -> Script {
        Script::of(Era::Modern)
    }

    /// One of 2025-11-25.
    pub(crate) fn legacy() -> Script {
        Script::of(Era::Legacy)
    }

    /// One that knows nothing of MCP: every request goes to `handler`.
    pub(crate) async fn answering<F, Fut>(handler: F) -> Upstream
    where
        F: Fn(Sent) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Response> + Send + 'static,
    {
        let script = Script { wild: Some(boxed(handler)), ..Script::of(Era::Modern) };
        script.start().await
    }

    /// A port where nobody listens.
    pub(crate) async fn nowhere() -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        format!("http://{address}/mcp")
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/mcp", self.address)
    }

    /// Everything it was sent.
    pub(crate) fn seen(&self) -> Vec<Sent> {
        self.seen.lock().expect("no panic").clone()
    }

    /// The messages of one method.
    pub(crate) fn seen_of(&self, method: &str) -> Vec<Sent> {
        self.seen().into_iter().filter(|sent| sent.method() == method).collect()
    }

    /// Forgets what it was sent.
    pub(crate) fn forget(&self) {
        self.seen.lock().expect("no panic").clear();
    }

    /// Forgets its sessions. Who uses one is told this status.
    pub(crate) fn forget_sessions(&self, status: StatusCode) {
        let mut sessions = self.sessions.lock().expect("no panic");
        sessions.known.clear();
        sessions.unknown = Some(status);
    }

    /// Goes away, and leaves its address.
    pub(crate) async fn stop(mut self) -> SocketAddr {
        self.serving.abort();
        let _ = (&mut self.serving).await;
        self.address
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// What an upstream does. Discovery and lists are answered by themselves.
#[must_use]
pub(crate) struct Script {
    era: Era,
    lists: HashMap<&'static str, String>,
    declared: Vec<String>,
    handlers: HashMap<&'static str, Handler>,
    wild: Option<Handler>,
}

impl Script {
    fn of(era: Era) -> Self {
        Script { era, lists: HashMap::new(), declared: Vec::new(), handlers: HashMap::new(), wild: None }
    }

    /// Its tools, each as JSON text.
    pub(crate) fn tools(self, tools: &[&str]) -> Self {
        self.list("tools", tools)
    }

    /// A tool of this name that does whatever a call is answered with.
    pub(crate) fn tool(self, name: &str) -> Self {
        self.tools(&[&format!(r#"{{"name":"{name}","inputSchema":{{"type":"object"}}}}"#)])
    }

    /// A list: `tools`, `prompts`, `resources` or `resourceTemplates`.
    pub(crate) fn list(mut self, member: &'static str, items: &[&str]) -> Self {
        self.lists.insert(member, format!("[{}]", items.join(",")));
        self
    }

    /// A capability beside those that its lists imply, as JSON text.
    pub(crate) fn declares(mut self, name: &str, json: &str) -> Self {
        self.declared.push(format!("\"{name}\":{json}"));
        self
    }

    /// What a message of this method is answered with. `GET` and `DELETE` stand for themselves.
    pub(crate) fn on<F, Fut>(mut self, method: &'static str, handler: F) -> Self
    where
        F: Fn(Sent) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Response> + Send + 'static,
    {
        self.handlers.insert(method, boxed(handler));
        self
    }

    /// Each call is answered with this result, as it is.
    pub(crate) fn answers(self, raw: impl Into<String>) -> Self {
        let raw = raw.into();
        self.on("tools/call", move |sent| {
            let answer = result(&sent, &raw);
            async { answer }
        })
    }

    pub(crate) async fn start(self) -> Upstream {
        self.start_at(([127, 0, 0, 1], 0).into()).await
    }

    /// At an address that was somebody's before.
    pub(crate) async fn start_at(self, address: SocketAddr) -> Upstream {
        let listener = TcpListener::bind(address).await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let (seen, sessions) = (Arc::default(), Arc::default());
        let serving = tokio::spawn(serve(listener, Arc::new(self), Arc::clone(&seen), Arc::clone(&sessions)));
        Upstream { address, seen, sessions, serving }
    }

    async fn answer(&self, sent: Sent, sessions: &Mutex<Sessions>) -> Response {
        let method = match &sent.verb {
            &Method::POST => sent.method(),
            verb => verb.to_string(),
        };
        if let Some(handler) = self.wild.as_ref().or_else(|| self.handlers.get(&*method)) {
            if let Some(refusal) = self.check_session(&sent, &method, sessions) {
                return refusal;
            }
            return handler(sent).await;
        }
        match self.era {
            Era::Modern => self.modern_answer(&sent, &method),
            Era::Legacy => self
                .check_session(&sent, &method, sessions)
                .unwrap_or_else(|| self.legacy_answer(&sent, &method, sessions)),
        }
    }

    fn modern_answer(&self, sent: &Sent, method: &str) -> Response {
        let discover = format!(
            r#"{{"resultType":"complete","supportedVersions":["2026-07-28"],"capabilities":{},"ttlMs":0,"cacheScope":"private"}}"#,
            self.capabilities()
        );
        match method {
            "server/discover" => result(sent, &discover),
            "GET" | "DELETE" => plain(405, ""),
            _ => self.listed(sent, method).unwrap_or_else(|| not_found(sent, 404)),
        }
    }

    fn legacy_answer(&self, sent: &Sent, method: &str, sessions: &Mutex<Sessions>) -> Response {
        match method {
            "initialize" => {
                let mut sessions = sessions.lock().expect("no panic");
                sessions.opened += 1;
                let id = format!("session-{}", sessions.opened);
                sessions.known.insert(id.clone());
                let initialized = format!(
                    r#"{{"protocolVersion":"2025-11-25","capabilities":{},"serverInfo":{{"name":"scripted","version":"1"}}}}"#,
                    self.capabilities()
                );
                let mut response = result(sent, &initialized);
                response
                    .headers_mut()
                    .insert("mcp-session-id", HeaderValue::from_str(&id).expect("a plain id"));
                response
            }
            "GET" => plain(405, ""),
            "DELETE" => plain(200, ""),
            "" => plain(202, ""),
            method if method.starts_with("notifications/") => plain(202, ""),
            _ => self.listed(sent, method).unwrap_or_else(|| not_found(sent, 200)),
        }
    }

    /// A legacy server refuses what comes without a session it knows.
    fn check_session(&self, sent: &Sent, method: &str, sessions: &Mutex<Sessions>) -> Option<Response> {
        if self.era == Era::Modern || method == "initialize" {
            return None;
        }
        let sessions = sessions.lock().expect("no panic");
        let Some(session) = sent.header("mcp-session-id") else {
            return Some(json_response(
                400,
                r#"{"jsonrpc":"2.0","id":null,"error":{"code":-32000,"message":"Bad Request: no session"}}"#,
            ));
        };
        let status = sessions.unknown.filter(|_| !sessions.known.contains(session))?;
        Some(json_response(
            status.as_u16(),
            r#"{"jsonrpc":"2.0","id":null,"error":{"code":-32000,"message":"No such session"}}"#,
        ))
    }

    fn listed(&self, sent: &Sent, method: &str) -> Option<Response> {
        let member = match method {
            "tools/list" => "tools",
            "prompts/list" => "prompts",
            "resources/list" => "resources",
            "resources/templates/list" => "resourceTemplates",
            "skills/list" => "skills",
            _ => return None,
        };
        let items = self.lists.get(member).map_or("[]", String::as_str);
        Some(result(sent, &format!(r#"{{"{member}":{items}}}"#)))
    }

    fn capabilities(&self) -> String {
        let mut offered: Vec<&str> = self
            .lists
            .keys()
            .filter(|member| **member != "skills")
            .map(|member| if *member == "resourceTemplates" { "resources" } else { member })
            .collect();
        offered.sort_unstable();
        offered.dedup();
        let offered = offered.iter().map(|member| format!("\"{member}\":{{}}"));
        let offered: Vec<String> = offered.chain(self.declared.iter().cloned()).collect();
        format!("{{{}}}", offered.join(","))
    }
}

fn boxed<F, Fut>(handler: F) -> Handler
where
    F: Fn(Sent) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Response> + Send + 'static,
{
    Arc::new(move |sent| Box::pin(handler(sent)))
}

async fn serve(
    listener: TcpListener,
    script: Arc<Script>,
    seen: Arc<Mutex<Vec<Sent>>>,
    sessions: Arc<Mutex<Sessions>>,
) {
    let mut connections = JoinSet::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let _ = stream.set_nodelay(true);
        let (script, seen, sessions) = (script.clone(), seen.clone(), sessions.clone());
        let service = service_fn(move |request: http::Request<hyper::body::Incoming>| {
            let (script, seen, sessions) = (script.clone(), seen.clone(), sessions.clone());
            async move {
                let (parts, body) = request.into_parts();
                let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
                let sent = Sent {
                    verb: parts.method,
                    path: parts.uri.path().to_owned(),
                    headers: parts.headers,
                    body,
                };
                seen.lock().expect("no panic").push(sent.clone());
                Ok::<_, Infallible>(script.answer(sent, &sessions).await)
            }
        });
        connections.spawn(async move {
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

/// The answer to `sent` with this result, as it is.
pub(crate) fn result(sent: &Sent, raw: &str) -> Response {
    json_response(200, &format!(r#"{{"jsonrpc":"2.0","id":{},"result":{raw}}}"#, sent.raw("id")))
}

/// The answer to `sent` with this error, as it is.
pub(crate) fn error(sent: &Sent, status: u16, raw: &str) -> Response {
    json_response(status, &format!(r#"{{"jsonrpc":"2.0","id":{},"error":{raw}}}"#, sent.raw("id")))
}

fn not_found(sent: &Sent, status: u16) -> Response {
    error(sent, status, r#"{"code":-32601,"message":"Method not found"}"#)
}

/// A body that is no message.
pub(crate) fn plain(status: u16, body: impl Into<Body>) -> Response {
    let mut response = Response::new(body.into());
    *response.status_mut() = StatusCode::from_u16(status).expect("a status");
    response
}

pub(crate) fn json_response(status: u16, body: &str) -> Response {
    let mut response = plain(status, body.to_owned());
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// A stream with these messages.
pub(crate) fn events<I: IntoIterator<Item = String>>(messages: I) -> Response {
    open_events(futures_util::stream::iter(messages.into_iter().collect::<Vec<_>>()))
}

/// A stream whose messages come when they come.
pub(crate) fn open_events(messages: impl Stream<Item = String> + Send + 'static) -> Response {
    let chunks = messages.map(|message| Ok::<_, Infallible>(format!("event: message\ndata: {message}\n\n")));
    let mut response = plain(200, Body::from_stream(chunks));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    response
}

/// Tells how often something has begun, and how often it is over.
#[derive(Clone, Default)]
pub(crate) struct Probe(Arc<[AtomicUsize; 2]>);

/// Over when dropped.
pub(crate) struct Inside(Probe);

impl Probe {
    pub(crate) fn enter(&self) -> Inside {
        self.0[0].fetch_add(1, Ordering::SeqCst);
        Inside(self.clone())
    }

    pub(crate) fn has_begun(&self) -> usize {
        self.0[0].load(Ordering::SeqCst)
    }

    pub(crate) fn is_over(&self) -> usize {
        self.0[1].load(Ordering::SeqCst)
    }

    pub(crate) async fn begun(&self) {
        eventually("it has begun", async || self.has_begun() > 0).await;
    }

    pub(crate) async fn over(&self) {
        eventually("it is over", async || self.is_over() > 0).await;
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.0[1].fetch_add(1, Ordering::SeqCst);
    }
}
