//! Streamable HTTP, either era.
//!
//! Which era a server is of is found by asking it the modern way first (MCP 2026-07-28, streamable HTTP, backward
//! compatibility), once, and remembered until it is found to be wrong. A modern server needs no more than that. For
//! a legacy one, requests share sessions by [`Affinity`](crate::identity::Affinity).

mod legacy;
mod modern;
mod sse;
mod stream;
mod wire;

use std::{
    collections::BTreeMap,
    fmt,
    str::FromStr as _,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri};
use tower::Service;

use self::wire::{Answer, Wire, post_headers, redirect};
use super::{
    link::{Connection, Link},
    secret,
    slots::Slots,
    translate,
};
use crate::{
    BoxError,
    error::{Fault, UpstreamError},
    protocol::{
        Era, McpRequest, McpResponse, Message, Payload, ProtocolVersion, RawObject, RequestId, ServerName,
        code,
    },
};
pub use stream::SseUpstream;

/// One message of more than this is refused: 16 MiB, well above any result a model can use.
const MESSAGE_LIMIT: usize = 16 << 20;
/// A server that takes longer to answer one question is not there.
const HANDSHAKE: Duration = Duration::from_secs(10);
const MOST_REDIRECTS: usize = 3;

/// An upstream behind an MCP endpoint.
///
/// ```
/// use portcullis::upstream::HttpUpstream;
///
/// let upstream = HttpUpstream::new("docs".parse()?, "http://127.0.0.1:3000/mcp")
///     .header("authorization", "Bearer ${DOCS_TOKEN}");
/// # Ok::<_, portcullis::protocol::InvalidName>(())
/// ```
#[derive(Clone)]
pub struct HttpUpstream {
    shared: Arc<Shared>,
}

struct Shared {
    spec: Spec,
    wire: Arc<Wire>,
    endpoint: Arc<Link<Endpoint>>,
    sessions: Slots<legacy::Crowd>,
}

/// What the configuration says; references in it are resolved when a connection is made.
#[derive(Clone)]
struct Spec {
    url: String,
    headers: BTreeMap<String, String>,
}

impl Spec {
    fn new(url: String) -> Self {
        Spec { url, headers: BTreeMap::new() }
    }

    /// With what the references stand for now.
    fn resolve(&self) -> Result<(Uri, HeaderMap), BoxError> {
        let url = secret::expand(&self.url, &secret::process_env)?;
        let uri = Uri::from_str(url.expose())?;
        if uri.authority().is_none() {
            return Err("the URL has no host".into());
        }
        let mut headers = HeaderMap::new();
        for (name, value) in &self.headers {
            let value = secret::expand(value, &secret::process_env)?;
            let mut value = HeaderValue::from_str(value.expose())
                .map_err(|_| format!("the value of header {name:?} has characters no header may have"))?;
            value.set_sensitive(true);
            headers.insert(HeaderName::from_str(name)?, value);
        }
        Ok((uri, headers))
    }
}

/// The endpoint as found: where, with what headers, and of which era.
struct Endpoint {
    uri: Uri,
    headers: HeaderMap,
    /// The same with what every POST has.
    post: HeaderMap,
    version: ProtocolVersion,
}

impl Connection for Endpoint {
    /// Never by itself; whoever finds it to be wrong [doubts](Shared::doubt) it.
    fn is_closed(&self) -> bool {
        false
    }
}

impl HttpUpstream {
    /// The server at `url`, which may hold `${VAR}` references. Nothing is sent before the first request.
    pub fn new(name: ServerName, url: impl Into<String>) -> Self {
        Self::with(name, Spec::new(url.into()))
    }

    /// Adds a header to every request. The value may hold `${VAR}` references.
    #[must_use]
    pub fn header(self, name: &str, value: &str) -> Self {
        let mut spec = self.shared.spec.clone();
        spec.headers.insert(name.to_owned(), value.to_owned());
        Self::with(self.shared.wire.upstream().clone(), spec)
    }

    fn with(name: ServerName, spec: Spec) -> Self {
        let wire = Arc::new(Wire::new(name.clone(), MESSAGE_LIMIT));
        let endpoint = Link::within(name, HANDSHAKE);
        HttpUpstream {
            shared: Arc::new(Shared { spec, wire, endpoint, sessions: Slots::new(legacy::MOST_SESSIONS) }),
        }
    }
}

impl Service<McpRequest> for HttpUpstream {
    type Response = McpResponse;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<McpResponse, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: McpRequest) -> Self::Future {
        let shared = self.shared.clone();
        Box::pin(async move {
            let found = shared.clone();
            let endpoint = shared.endpoint.get(|| async move { found.find().await }).await?;
            match endpoint.version.era() {
                Era::Modern => modern::call(&shared, &endpoint, request).await,
                Era::Legacy => legacy::call(&shared, &endpoint, request).await,
            }
        })
    }
}

impl Shared {
    /// What answers there may have become another server, of another era: the next request asks again. That costs
    /// nobody more than the asking, so one odd answer does not shut the others out.
    fn doubt(&self, endpoint: &Arc<Endpoint>) {
        self.endpoint.discard(endpoint);
    }

    /// Resolves the configuration and finds out the era.
    async fn find(&self) -> Result<Endpoint, UpstreamError> {
        let (uri, headers) = self.spec.resolve().map_err(|e| self.wire.error(Fault::Misconfigured, e))?;
        self.probe(uri, headers).await
    }

    /// Asks `server/discover`. A modern answer, good or bad, says modern; anything else says legacy.
    async fn probe(&self, mut uri: Uri, headers: HeaderMap) -> Result<Endpoint, UpstreamError> {
        let request = McpRequest::bare(crate::protocol::Method::Discover);
        let id = RequestId::from(0);
        let params = translate::modern_params(&request, ProtocolVersion::LATEST);
        let body = crate::protocol::request_json(&id, request.method(), &params);
        for _ in 0..=MOST_REDIRECTS {
            let probe = modern::headers(post_headers(&headers), ProtocolVersion::LATEST, &request, &params);
            let answer = self.wire.post(&uri, probe, body.clone()).await?;
            let version = match answer {
                Answer::Refused(status, answer, _) if is_redirect(status) => {
                    uri = redirect(&uri, &answer).ok_or_else(|| {
                        self.wire.error(
                            Fault::Misconfigured,
                            "it redirects to another origin, which is not followed",
                        )
                    })?;
                    continue;
                }
                Answer::Refused(status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN), _, body) => {
                    return Err(self.wire.refused(status, &body));
                }
                Answer::Refused(_, _, body) | Answer::Json(_, body) => version_of(body),
                Answer::Events(_, mut events) => {
                    let event = events.next().await.map_err(|e| self.wire.read_error(e))?;
                    event.and_then(|event| version_of(event.data))
                }
                Answer::Accepted => None,
            };
            let version = version.unwrap_or(ProtocolVersion::LATEST_LEGACY);
            tracing::debug!(upstream = %self.wire.upstream(), %version, "found the upstream's era");
            let post = post_headers(&headers);
            return Ok(Endpoint { uri, headers, post, version });
        }
        Err(self.wire.error(Fault::Misconfigured, "too many redirects"))
    }
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status, StatusCode::TEMPORARY_REDIRECT | StatusCode::PERMANENT_REDIRECT)
}

/// The version that an answer to the probe says to speak; `None` when it is no modern answer.
fn version_of(body: Bytes) -> Option<ProtocolVersion> {
    let Ok(Message::Response { payload, .. }) = Message::parse(body) else { return None };
    let supported = match &payload {
        Payload::Raw(result) => {
            RawObject::parse(result.clone()).ok()?.get_as::<Vec<String>>("supportedVersions")?.ok()?
        }
        Payload::Error(error) if error.code() == code::UNSUPPORTED_VERSION => {
            let data = RawObject::parse(error.as_bytes().clone()).ok()?.get_object("data")?;
            data.get_as::<Vec<String>>("supported")?.ok()?
        }
        Payload::Error(error) if matches!(error.code(), code::HEADER_MISMATCH | code::MISSING_CAPABILITY) => {
            return Some(ProtocolVersion::LATEST);
        }
        _ => return None,
    };
    // A modern server of versions we do not know is as good as none; the error it gives then says so.
    supported.iter().filter_map(|v| v.parse().ok()).max()
}

impl fmt::Debug for HttpUpstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpUpstream").field("upstream", self.shared.wire.upstream()).finish_non_exhaustive()
    }
}
