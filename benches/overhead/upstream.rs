//! The canned upstream: a process of its own that answers MCP in both eras as cheaply as hyper can.
//!
//! It counts what it is asked, by JSON-RPC method, and tells the counts at `GET /counts`: that one call makes
//! one upstream request, and a list none, is a matter of counting and not of timing.

use std::collections::HashMap;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::time::Interval;

use crate::canned::{ASKS, Canned, Era, Profile, tool};
use crate::process::{self, Announce};
use crate::request::MODERN;

/// Serves on `listeners` ports of 127.0.0.1 until stdin is closed.
pub(crate) fn main(listeners: usize) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let upstream = Arc::new(Upstream::default());
    runtime.block_on(async {
        let sockets = process::listen(listeners).await?;
        sockets.announce()?;
        process::serve_until_stdin_closes(sockets, move |request| {
            let upstream = upstream.clone();
            async move { Ok::<_, Infallible>(upstream.answer(request).await) }
        })
        .await
    })
}

/// The methods counted by name; everything else is counted as [`OTHER`].
const COUNTED: [&str; 9] = [
    "tools/call",
    "tools/list",
    "server/discover",
    "subscriptions/listen",
    "initialize",
    "notifications/initialized",
    "GET",
    "DELETE",
    OTHER,
];
const OTHER: &str = "other";
const KEEP_ALIVE: Duration = Duration::from_secs(15);
const SESSION: HeaderName = HeaderName::from_static("mcp-session-id");

#[derive(Default)]
struct Upstream {
    counts: [AtomicU64; COUNTED.len()],
    sessions: AtomicU64,
    questions: AtomicU64,
    profiles: Mutex<HashMap<String, Arc<Canned>>>,
}

#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow)]
    id: Option<&'a RawValue>,
    method: &'a str,
    #[serde(default)]
    params: Params<'a>,
}

#[derive(Default, Deserialize)]
struct Params<'a> {
    name: Option<&'a str>,
}

/// An answer: head and tail of a message, or a stream that stays open.
enum Body {
    Message { head: Bytes, tail: Bytes },
    Stream { first: Bytes, ticks: Interval },
}

// === impl Upstream ===

impl Upstream {
    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        match *request.method() {
            Method::GET if request.uri().path() == "/counts" => {
                respond(StatusCode::OK, Body::text(self.counts_json()))
            }
            Method::POST => self.post(request).await,
            Method::DELETE => {
                self.count("DELETE");
                respond(StatusCode::OK, Body::empty())
            }
            _ => {
                self.count("GET");
                let mut response = respond(StatusCode::METHOD_NOT_ALLOWED, Body::empty());
                response.headers_mut().insert(ALLOW, HeaderValue::from_static("POST, DELETE"));
                response
            }
        }
    }

    async fn post(&self, request: Request<Incoming>) -> Response<Body> {
        let (parts, body) = request.into_parts();
        let Ok(canned) = self.profile(parts.uri.path()) else {
            return respond(StatusCode::NOT_FOUND, Body::empty());
        };
        let Ok(body) = body.collect().await.map(|body| body.to_bytes()) else {
            return respond(StatusCode::BAD_REQUEST, Body::empty());
        };
        let Ok(message) = serde_json::from_slice::<Message<'_>>(&body) else {
            self.count(OTHER);
            return refuse(StatusCode::BAD_REQUEST, None, -32700, "parse error");
        };
        self.count(message.method);
        match canned.era {
            Era::Modern => modern(&canned, &parts.headers, &message),
            Era::Legacy => self.legacy(&canned, &parts.headers, &message),
        }
    }

    fn legacy(&self, canned: &Canned, headers: &HeaderMap, message: &Message<'_>) -> Response<Body> {
        if message.method == "initialize" {
            let session = format!("session-{:08}", self.sessions.fetch_add(1, Relaxed));
            let mut response = result(message, &canned.hello);
            if let Ok(value) = HeaderValue::from_str(&session) {
                response.headers_mut().insert(SESSION, value);
            }
            return response;
        }
        if !headers.contains_key(SESSION) {
            return refuse(StatusCode::BAD_REQUEST, message.id, -32000, "no valid session id provided");
        }
        match message.method {
            "tools/call" if message.params.name == Some(&tool(ASKS)) => self.question(),
            "tools/call" => call(canned, message),
            "tools/list" => result(message, &canned.list),
            "ping" => result(message, &canned.empty),
            _ if message.id.is_none() => respond(StatusCode::ACCEPTED, Body::empty()),
            _ => refuse(StatusCode::OK, message.id, -32601, "method not found"),
        }
    }

    /// A stream that asks something and then waits.
    fn question(&self) -> Response<Body> {
        let id = self.questions.fetch_add(1, Relaxed);
        let first = format!(
            "event: message\ndata: {{\"jsonrpc\":\"2.0\",\"id\":{id},\"method\":\"elicitation/create\",\
             \"params\":{{\"message\":\"Which one?\",\"requestedSchema\":{{\"type\":\"object\",\"properties\":{{}}}}}}}}\n\n"
        );
        stream(first)
    }

    fn profile(&self, path: &str) -> anyhow::Result<Arc<Canned>> {
        let mut profiles = self.profiles.lock().map_err(|_| anyhow::anyhow!("poisoned"))?;
        if let Some(known) = profiles.get(path) {
            return Ok(known.clone());
        }
        let canned = Arc::new(Canned::new(&Profile::from_path(path)?));
        profiles.insert(path.to_owned(), canned.clone());
        Ok(canned)
    }

    fn count(&self, method: &str) {
        let at = COUNTED.iter().position(|name| *name == method).unwrap_or(COUNTED.len() - 1);
        self.counts[at].fetch_add(1, Relaxed);
    }

    fn counts_json(&self) -> String {
        let counts = COUNTED.iter().zip(&self.counts).map(|(name, count)| (*name, count.load(Relaxed)));
        serde_json::json!(counts.collect::<HashMap<_, _>>()).to_string()
    }
}

fn modern(canned: &Canned, headers: &HeaderMap, message: &Message<'_>) -> Response<Body> {
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    if message.method == "initialize" || header("mcp-protocol-version") != Some(MODERN) {
        return unsupported(message);
    }
    if header("mcp-method") != Some(message.method)
        || (message.method == "tools/call" && header("mcp-name") != message.params.name)
    {
        return refuse(StatusCode::BAD_REQUEST, message.id, -32020, "headers and body differ");
    }
    match message.method {
        "tools/call" => call(canned, message),
        "tools/list" => result(message, &canned.list),
        "server/discover" => result(message, &canned.hello),
        "subscriptions/listen" => listen(message),
        _ if message.id.is_none() => respond(StatusCode::ACCEPTED, Body::empty()),
        _ => refuse(StatusCode::NOT_FOUND, message.id, -32601, "method not found"),
    }
}

fn call(canned: &Canned, message: &Message<'_>) -> Response<Body> {
    let name = message.params.name.unwrap_or_default();
    match name.ends_with(&tool(1)) {
        true => result(message, &canned.large),
        false => result(message, &canned.small),
    }
}

fn listen(message: &Message<'_>) -> Response<Body> {
    let first = format!(
        "event: message\ndata: {{\"jsonrpc\":\"2.0\",\"method\":\"notifications/subscriptions/acknowledged\",\
         \"params\":{{\"_meta\":{{\"io.modelcontextprotocol/subscriptionId\":{}}},\
         \"notifications\":{{\"toolsListChanged\":true}}}}}}\n\n",
        id(message.id)
    );
    stream(first)
}

/// What `first` says, and then comments.
fn stream(first: String) -> Response<Body> {
    let mut ticks = tokio::time::interval(KEEP_ALIVE);
    ticks.reset();
    let mut response = Response::new(Body::Stream { first: first.into(), ticks });
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    response
}

fn result(message: &Message<'_>, tail: &Bytes) -> Response<Body> {
    let head = format!("{{\"jsonrpc\":\"2.0\",\"id\":{}", id(message.id));
    respond(StatusCode::OK, Body::Message { head: head.into(), tail: tail.clone() })
}

fn unsupported(message: &Message<'_>) -> Response<Body> {
    let error = format!(
        "{{\"jsonrpc\":\"2.0\",\"id\":{},\"error\":{{\"code\":-32022,\"message\":\"unsupported protocol version\",\
         \"data\":{{\"supported\":[\"{MODERN}\"],\"requested\":\"\"}}}}}}",
        id(message.id)
    );
    respond(StatusCode::BAD_REQUEST, Body::text(error))
}

fn refuse(status: StatusCode, to: Option<&RawValue>, code: i32, text: &str) -> Response<Body> {
    let error = format!(
        "{{\"jsonrpc\":\"2.0\",\"id\":{},\"error\":{{\"code\":{code},\"message\":\"{text}\"}}}}",
        id(to)
    );
    respond(status, Body::text(error))
}

fn id(raw: Option<&RawValue>) -> &str {
    raw.map_or("null", RawValue::get)
}

fn respond(status: StatusCode, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

// === impl Body ===

impl Body {
    fn empty() -> Body {
        Body::Message { head: Bytes::new(), tail: Bytes::new() }
    }

    fn text(text: String) -> Body {
        Body::Message { head: text.into(), tail: Bytes::new() }
    }
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let part = match self.get_mut() {
            Body::Message { head, tail } if head.is_empty() => std::mem::take(tail),
            Body::Message { head, .. } => std::mem::take(head),
            Body::Stream { first, .. } if !first.is_empty() => std::mem::take(first),
            Body::Stream { ticks, .. } => {
                ready!(ticks.poll_tick(cx));
                Bytes::from_static(b":\n\n")
            }
        };
        Poll::Ready((!part.is_empty()).then(|| Ok(Frame::data(part))))
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Body::Message { head, tail } if head.is_empty() && tail.is_empty())
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Body::Message { head, tail } => SizeHint::with_exact((head.len() + tail.len()) as u64),
            Body::Stream { .. } => SizeHint::default(),
        }
    }
}
