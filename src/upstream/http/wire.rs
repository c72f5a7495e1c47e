//! HTTP towards an upstream: one pooled client, requests with the right headers, answers within limits.

use std::{
    error::Error,
    fmt,
    sync::{LazyLock, OnceLock},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri,
    header::{ACCEPT, CONTENT_ENCODING, CONTENT_TYPE, LOCATION},
};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Body as _, Incoming};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};

use tokio::sync::Semaphore;

use super::sse::Events;
use crate::{
    error::{Fault, UpstreamError},
    lane,
    protocol::ServerName,
};

/// A server that does not even accept a connection in this time is not there.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
const IDLE_CONNECTION: Duration = Duration::from_secs(60);
/// A refusal's body is read this far: for the log, and to recognise a JSON-RPC error.
const REFUSAL_LIMIT: usize = 64 * 1024;
/// What grows beyond this gets all the room it may ever need.
const LARGE: usize = 1 << 20;

pub(super) const PROTOCOL_VERSION: HeaderName = HeaderName::from_static("mcp-protocol-version");
pub(super) const SESSION_ID: HeaderName = HeaderName::from_static("mcp-session-id");
pub(super) const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
pub(super) const MCP_METHOD: HeaderName = HeaderName::from_static("mcp-method");
pub(super) const MCP_NAME: HeaderName = HeaderName::from_static("mcp-name");

/// More lanes than this share pools.
const LANES: usize = 32;

type HttpClient = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// The client all requests to one upstream go through.
pub(super) struct Wire {
    upstream: ServerName,
    /// One pool a lane, made when it is first used.
    clients: [OnceLock<HttpClient>; LANES],
    /// How large one message may be.
    limit: usize,
    /// For requests that end sessions: however many end at once, these are under way.
    farewells: Semaphore,
}

const FAREWELLS: usize = 8;

/// Shared by all upstreams: the certificates are the same.
static CONNECTOR: LazyLock<HttpsConnector<HttpConnector>> = LazyLock::new(|| {
    let mut http = HttpConnector::new();
    http.set_nodelay(true);
    http.set_connect_timeout(Some(CONNECT_WITHIN));
    // A host that vanished sends no goodbye.
    http.set_keepalive(Some(IDLE_CONNECTION));
    http.enforce_http(false);
    HttpsConnectorBuilder::new().with_webpki_roots().https_or_http().enable_http1().wrap_connector(http)
});

/// An answer's status and what its body is.
pub(super) enum Answer {
    /// 2xx with one JSON message.
    Json(HeaderMap, Bytes),
    /// 2xx with a stream of them.
    Events(HeaderMap, Events),
    /// 2xx with nothing.
    Accepted,
    /// Anything else, with as much of the body as is worth reading.
    Refused(StatusCode, HeaderMap, Bytes),
}

impl Wire {
    pub(super) fn new(upstream: ServerName, limit: usize) -> Self {
        Wire { upstream, clients: Default::default(), limit, farewells: Semaphore::new(FAREWELLS) }
    }

    /// Turns for ending sessions.
    pub(super) fn farewells(&self) -> &Semaphore {
        &self.farewells
    }

    fn client(&self) -> &HttpClient {
        self.clients[lane::current() % LANES].get_or_init(|| {
            Client::builder(TokioExecutor::new())
                .pool_idle_timeout(IDLE_CONNECTION)
                .pool_timer(TokioTimer::new())
                .build(CONNECTOR.clone())
        })
    }

    /// Posts one message.
    pub(super) async fn post(
        &self,
        uri: &Uri,
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<Answer, UpstreamError> {
        self.send(Method::POST, uri, headers, body).await
    }

    /// Posts one message whose answer comes another way.
    pub(super) async fn deliver(
        &self,
        uri: &Uri,
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<StatusCode, UpstreamError> {
        let response = self.exchange(Method::POST, uri, headers, body).await?;
        let status = response.status();
        // Read to its end, or the connection cannot be used again.
        let _ = Limited::new(response.into_body(), REFUSAL_LIMIT).collect().await;
        Ok(status)
    }

    /// Sends a request and reads as much of the answer as its kind needs.
    pub(super) async fn send(
        &self,
        method: Method,
        uri: &Uri,
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<Answer, UpstreamError> {
        let response = self.exchange(method, uri, headers, body).await?;
        self.read(response).await
    }

    async fn exchange(
        &self,
        method: Method,
        uri: &Uri,
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<Response<Incoming>, UpstreamError> {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = uri.clone();
        *request.headers_mut() = headers;
        self.client().request(request).await.map_err(|e| {
            let fault = if e.is_connect() { Fault::Unreachable } else { Fault::Lost };
            self.error(fault, e)
        })
    }

    async fn read(&self, response: Response<Incoming>) -> Result<Answer, UpstreamError> {
        let (parts, body) = response.into_parts();
        let coding = coding_of(&parts.headers);
        if !parts.status.is_success() {
            let body = match coding {
                None => Limited::new(body, REFUSAL_LIMIT).collect().await.map(|b| b.to_bytes()),
                Some(_) => Ok(Bytes::new()),
            };
            return Ok(Answer::Refused(parts.status, parts.headers, body.unwrap_or_default()));
        }
        if let Some(coding) = coding {
            let error = format!("content encoding {coding:?}, which nobody asked for");
            return Err(self.error(Fault::Garbled, error));
        }
        let kind = parts.headers.get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
        let kind = kind.split(';').next().unwrap_or_default().trim();
        if kind.eq_ignore_ascii_case("text/event-stream") {
            return Ok(Answer::Events(parts.headers, Events::new(body, self.limit)));
        }
        if parts.status == StatusCode::ACCEPTED {
            // Taken, and that is all; some servers say so in words.
            let _ = Limited::new(body, REFUSAL_LIMIT).collect().await;
            return Ok(Answer::Accepted);
        }
        if !kind.eq_ignore_ascii_case("application/json") {
            // Nothing in it is of use, but whether there is something is.
            return match whole(body, REFUSAL_LIMIT).await {
                Ok(body) if body.is_empty() => Ok(Answer::Accepted),
                Err(error @ ReadError::Cut(_)) => Err(self.read_error(error)),
                _ => Err(self.error(Fault::Garbled, format!("content type {kind:?}"))),
            };
        }
        let body = whole(body, self.limit).await.map_err(|e| self.read_error(e))?;
        Ok(if body.is_empty() { Answer::Accepted } else { Answer::Json(parts.headers, body) })
    }

    /// An error of this upstream.
    pub(super) fn error(&self, fault: Fault, source: impl Into<crate::BoxError>) -> UpstreamError {
        UpstreamError::new(&self.upstream, fault, source)
    }

    /// What went wrong while reading, as an error of this upstream.
    pub(super) fn read_error(&self, error: ReadError) -> UpstreamError {
        let fault = match error {
            ReadError::Cut(_) => Fault::Lost,
            ReadError::TooLarge(_) => Fault::TooLarge,
        };
        self.error(fault, error)
    }

    /// A refusal nobody expected.
    pub(super) fn refused(&self, status: StatusCode, body: &Bytes) -> UpstreamError {
        let fault = match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Fault::Unauthorized,
            s if s.is_redirection() => Fault::Misconfigured,
            StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => Fault::Misconfigured,
            s if s.is_server_error() => Fault::Unreachable,
            _ => Fault::Garbled,
        };
        let text: String = String::from_utf8_lossy(body).chars().take(200).collect();
        self.error(fault, format!("HTTP {status}: {text}"))
    }

    pub(super) fn upstream(&self) -> &ServerName {
        &self.upstream
    }
}

/// The whole body. One that is too large is refused as soon as that is known, and nothing is copied twice: a body in
/// one piece stays it, and one in many is gathered in one place that grows.
async fn whole(mut body: Incoming, limit: usize) -> Result<Bytes, ReadError> {
    let announced = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
    if announced > limit {
        return Err(TooLarge { limit }.into());
    }
    let (mut first, mut all) = (Bytes::new(), BytesMut::new());
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(ReadError::Cut)?.into_data() else { continue };
        if first.len() + all.len() + data.len() > limit {
            return Err(TooLarge { limit }.into());
        }
        if first.is_empty() && all.is_empty() {
            first = data;
            continue;
        }
        if all.is_empty() {
            all.reserve(announced);
            gather(&mut all, &std::mem::take(&mut first), limit);
        }
        gather(&mut all, &data, limit);
    }
    Ok(if all.is_empty() { first } else { all.freeze() })
}

/// Adds to what will be hardly more than `limit` bytes. Room costs memory only when something is in it, and a second copy of
/// something large costs it at once; so what is large does not grow in steps.
pub(super) fn gather(into: &mut BytesMut, more: &[u8], limit: usize) {
    let len = into.len() + more.len();
    if len > LARGE && len > into.capacity() {
        // The last piece may lead beyond the limit.
        into.reserve((limit + LARGE).max(len) - into.len());
    }
    into.extend_from_slice(more);
}

/// How the body is encoded. We accept nothing but it as it is.
fn coding_of(headers: &HeaderMap) -> Option<&HeaderValue> {
    let is_plain = |value: &[u8]| value.is_empty() || value.eq_ignore_ascii_case(b"identity");
    headers.get_all(CONTENT_ENCODING).iter().find(|value| !is_plain(value.as_bytes().trim_ascii()))
}

/// The headers every POST has.
pub(super) fn post_headers(extra: &HeaderMap) -> HeaderMap {
    let mut headers = extra.clone();
    headers.reserve(8);
    headers.insert(ACCEPT, HeaderValue::from_static("application/json, text/event-stream"));
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers
}

/// Where a redirect leads, when it stays at the origin: credentials must not follow one elsewhere.
pub(super) fn redirect(from: &Uri, headers: &HeaderMap) -> Option<Uri> {
    same_origin(from, headers.get(LOCATION)?.to_str().ok()?)
}

/// What a reference found at `from` means, when it stays at the origin.
pub(super) fn same_origin(from: &Uri, reference: &str) -> Option<Uri> {
    let base = || Some(format!("{}://{}", from.scheme_str()?, from.authority()?));
    let target: Uri = match reference {
        _ if reference.contains("://") || reference.starts_with("//") => reference.parse().ok()?,
        _ if reference.starts_with('/') => format!("{}{reference}", base()?).parse().ok()?,
        // Relative to the last segment of the path, or to its query.
        _ if reference.starts_with('?') => format!("{}{}{reference}", base()?, from.path()).parse().ok()?,
        _ => {
            let (folder, _) = from.path().rsplit_once('/')?;
            format!("{}{folder}/{reference}", base()?).parse().ok()?
        }
    };
    (target.scheme() == from.scheme() && target.authority() == from.authority()).then_some(target)
}

/// Why a body could not be read to its end.
#[derive(Debug)]
pub(super) enum ReadError {
    /// The connection broke.
    Cut(hyper::Error),
    /// There is more than allowed.
    TooLarge(TooLarge),
}

/// More than allowed.
#[derive(Debug)]
pub(super) struct TooLarge {
    pub(super) limit: usize,
}

impl From<TooLarge> for ReadError {
    fn from(e: TooLarge) -> Self {
        ReadError::TooLarge(e)
    }
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ReadError::Cut(_) => f.write_str("the connection broke"),
            ReadError::TooLarge(e) => e.fmt(f),
        }
    }
}

impl fmt::Display for TooLarge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a message of more than {} bytes", self.limit)
    }
}

impl Error for TooLarge {}

impl Error for ReadError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            ReadError::Cut(e) => Some(e),
            ReadError::TooLarge(_) => None,
        }
    }
}
