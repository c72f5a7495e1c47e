//! Streamable HTTP, both eras on one endpoint.
//!
//! A request with the modern `_meta` is served by itself; `initialize` opens a legacy session (MCP 2026-07-28,
//! basic/versioning). Which it is, is decided here and nowhere further in.

mod body;
mod legacy;
mod modern;
mod origin;
mod sse;

use std::{
    convert::Infallible,
    fmt,
    pin::pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header, request::Parts};
use http_body::Body;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use tower::Service;

use self::origin::Allowed;
use super::{
    legacy::Sessions,
    message::Chunks,
    refusal::{Refusal, check_kind},
};
use crate::{
    BoxError, McpService,
    identity::{Principal, Scope},
    protocol::{HttpHint, Message, ParseError, code},
};
pub use body::DoorBody;
pub use sse::McpSse;

const VERSION_HEADER: &str = "mcp-protocol-version";
const SESSION_HEADER: &str = "mcp-session-id";
/// A client that does not get its body here in this time is cut off: 4 MiB on a bad line, and no connection held for
/// nothing.
const BODY_TIME: Duration = Duration::from_secs(30);
/// How long the rest of a body is read that is too large.
const LINGER: Duration = Duration::from_secs(5);

/// The HTTP door: an MCP service as an HTTP service.
///
/// Whoever authenticates puts a [`Principal`] into the request's extensions; without one, the caller is anonymous.
/// A [`Scope`] there chooses the group.
///
/// ```
/// use portcullis::{gateway::Gateway, server::{McpHttp, Options}};
///
/// # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
/// let options = Options::default().allow_host("mcp.example.com").body_limit(1 << 20);
/// let door = McpHttp::with_options(Gateway::builder().build(), options);
/// # let _ = door; });
/// ```
#[derive(Clone)]
pub struct McpHttp<S> {
    service: S,
    door: Arc<Door>,
}

/// What all clones of a door share.
struct Door {
    options: Options,
    sessions: Sessions,
}

/// What a door lets in.
#[derive(Clone)]
#[must_use]
pub struct Options {
    allowed: Allowed,
    body_limit: usize,
    most_sessions: usize,
    session_idle: Duration,
    groups: Arc<dyn Fn(&str) -> bool + Send + Sync>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            allowed: Allowed::default(),
            // As much as clients in the field send, and no more.
            body_limit: 4 << 20,
            most_sessions: 65_536,
            // Longer than a lunch break: a client that finds its session gone has to begin again.
            session_idle: Duration::from_secs(4 * 60 * 60),
            groups: Arc::new(|_| false),
        }
    }
}

impl Options {
    /// Also serves requests for this host name. By default only loopback names are served, for any page a browser
    /// shows can send requests to loopback under a name of its own.
    pub fn allow_host(mut self, host: impl Into<String>) -> Self {
        self.allowed.hosts.get_or_insert_default().push(host.into());
        self
    }

    /// Serves requests for any host name: for doors behind a proxy that checks.
    pub fn allow_any_host(mut self) -> Self {
        self.allowed.hosts = None;
        self
    }

    /// Also serves pages of this origin, `https://app.example.com`. Pages on an allowed host are served anyway.
    pub fn allow_origin(mut self, origin: impl Into<String>) -> Self {
        self.allowed.origins.get_or_insert_default().push(origin.into());
        self
    }

    /// The largest request body, in bytes. 4 MiB by default.
    pub fn body_limit(mut self, bytes: usize) -> Self {
        self.body_limit = bytes;
        self
    }

    /// The most legacy sessions at once. 65,536 by default.
    pub fn most_sessions(mut self, most: usize) -> Self {
        self.most_sessions = most;
        self
    }

    /// How long a legacy session nobody uses is kept. 4 hours by default.
    pub fn session_idle(mut self, idle: Duration) -> Self {
        self.session_idle = idle;
        self
    }

    /// Which groups there are. None by default.
    pub fn groups(mut self, is_group: impl Fn(&str) -> bool + Send + Sync + 'static) -> Self {
        self.groups = Arc::new(is_group);
        self
    }
}

impl<S: McpService> McpHttp<S> {
    /// A door with the default options.
    pub fn new(service: S) -> Self {
        Self::with_options(service, Options::default())
    }

    /// A door with these options.
    pub fn with_options(service: S, options: Options) -> Self {
        let sessions = Sessions::new(options.most_sessions, options.session_idle);
        McpHttp { service, door: Arc::new(Door { options, sessions }) }
    }

    /// Whether the group exists.
    pub fn knows_group(&self, group: &str) -> bool {
        (self.door.options.groups)(group)
    }

    /// How many legacy sessions there are.
    pub fn session_count(&self) -> usize {
        self.door.sessions.len()
    }
}

impl<S, B> Service<Request<B>> for McpHttp<S>
where
    S: McpService,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<DoorBody>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<DoorBody>, Infallible>>;

    /// Always: the service behind is asked for each request, on its own clone.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let (service, door) = (self.service.clone(), self.door.clone());
        Box::pin(
            async move { Ok(serve(service, door, request).await.unwrap_or_else(Refused::into_response)) },
        )
    }
}

/// A refusal with its status.
struct Refused {
    status: StatusCode,
    refusal: Refusal,
    allow: Option<&'static str>,
}

impl Refused {
    /// One about no request in particular.
    fn new(status: StatusCode, code: i64, message: impl Into<String>) -> Self {
        Refused { status, refusal: Refusal::new(None, code, message), allow: None }
    }

    fn into_response(self) -> Response<DoorBody> {
        let mut response = json(self.status, self.refusal.message());
        if let Some(allow) = self.allow {
            response.headers_mut().insert(header::ALLOW, HeaderValue::from_static(allow));
        }
        response
    }
}

/// What has no status of its own is the client's fault.
impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        let status = match refusal.error.code() {
            code::METHOD_NOT_FOUND => StatusCode::NOT_FOUND,
            code::OVERLOADED => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::BAD_REQUEST,
        };
        Refused { status, refusal, allow: None }
    }
}

impl From<ParseError> for Refused {
    fn from(e: ParseError) -> Self {
        Refusal::from(e).into()
    }
}

/// What is known of a request before its body is.
struct Head {
    pub(super) headers: HeaderMap,
    pub(super) principal: Principal,
    pub(super) scope: Scope,
    pub(super) draining: Option<super::Draining>,
}

impl Head {
    fn of(mut parts: Parts) -> Head {
        Head {
            headers: parts.headers,
            principal: parts.extensions.remove().unwrap_or_else(Principal::anonymous),
            scope: parts.extensions.remove().unwrap_or_default(),
            draining: parts.extensions.remove(),
        }
    }

    /// A header that must not come twice.
    fn single(&self, name: &str) -> Result<Option<&str>, &'static str> {
        let mut values = self.headers.get_all(name).iter();
        match (values.next(), values.next()) {
            (None, _) => Ok(None),
            (Some(value), None) => value.to_str().map(Some).map_err(|_| "has characters it may not have"),
            (Some(_), Some(_)) => Err("was sent twice"),
        }
    }
}

async fn serve<S, B>(service: S, door: Arc<Door>, request: Request<B>) -> Result<Response<DoorBody>, Refused>
where
    S: McpService,
    B: Body<Data = Bytes> + Send,
    B::Error: Into<BoxError>,
{
    let (parts, body) = request.into_parts();
    if let Some(why) = door.options.allowed.refusal(&parts.headers, &parts.uri) {
        return Err(Refused::new(StatusCode::FORBIDDEN, code::INVALID_REQUEST, why));
    }
    match parts.method {
        Method::POST => {
            check_media_types(&parts.headers)?;
            let head = Head::of(parts);
            let message = Message::parse(read(body, door.options.body_limit).await?)?;
            dispatch(service, &door, head, message).await
        }
        Method::GET => legacy::open_stream(service, &door, Head::of(parts)),
        Method::DELETE => legacy::end_session(&door, &Head::of(parts)),
        _ => Err(method_not_allowed()),
    }
}

/// By whoever sent it: modern says so in header or `_meta`, legacy has a session or opens one.
async fn dispatch<S: McpService>(
    service: S,
    door: &Arc<Door>,
    head: Head,
    message: Message,
) -> Result<Response<DoorBody>, Refused> {
    check_kind(&message)?;
    if modern::is_modern(&head, &message) {
        return modern::serve(service, head, message).await;
    }
    legacy::serve(service, door, head, message).await
}

fn method_not_allowed() -> Refused {
    Refused {
        allow: Some("POST"),
        ..Refused::new(
            StatusCode::METHOD_NOT_ALLOWED,
            code::INVALID_REQUEST,
            "only POST is served without a session",
        )
    }
}

fn check_media_types(headers: &HeaderMap) -> Result<(), Refused> {
    check_content_type(headers)?;
    check_accept(headers)
}

fn check_content_type(headers: &HeaderMap) -> Result<(), Refused> {
    let essence = |value: &HeaderValue| -> Option<String> {
        Some(value.to_str().ok()?.split(';').next()?.trim().to_ascii_lowercase())
    };
    if headers.get(header::CONTENT_TYPE).and_then(essence).as_deref() != Some("application/json") {
        let status = StatusCode::UNSUPPORTED_MEDIA_TYPE;
        return Err(Refused::new(status, code::INVALID_REQUEST, "Content-Type must be application/json"));
    }
    Ok(())
}

fn check_accept(headers: &HeaderMap) -> Result<(), Refused> {
    let mut accepted =
        headers.get_all(header::ACCEPT).iter().filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(','));
    // Whoever says nothing takes anything (RFC 9110, 12.5.1).
    let takes_json = !headers.contains_key(header::ACCEPT)
        || accepted.any(|v| {
            matches!(
                v.split(';').next().unwrap_or_default().trim(),
                "application/json" | "application/*" | "*/*"
            )
        });
    match takes_json {
        true => Ok(()),
        false => Err(Refused::new(
            StatusCode::NOT_ACCEPTABLE,
            code::INVALID_REQUEST,
            "Accept must list application/json and text/event-stream",
        )),
    }
}

/// Whoever opens a stream must say that it takes one.
fn check_takes_events(headers: &HeaderMap) -> Result<(), Refused> {
    let accepts = headers.get_all(header::ACCEPT).iter().any(|v| {
        v.to_str().is_ok_and(|v| v.contains("text/event-stream") || v.contains("*/*") || v.contains("text/*"))
    });
    match accepts {
        true => Ok(()),
        false => Err(Refused::new(
            StatusCode::NOT_ACCEPTABLE,
            code::INVALID_REQUEST,
            "Accept must list text/event-stream",
        )),
    }
}

async fn read<B>(body: B, limit: usize) -> Result<Bytes, Refused>
where
    B: Body<Data = Bytes> + Send,
    B::Error: Into<BoxError>,
{
    let mut body = pin!(body);
    let whole = tokio::time::timeout(BODY_TIME, Limited::new(body.as_mut(), limit).collect()).await;
    let Ok(whole) = whole else {
        let message = format!("the body did not arrive within {} seconds", BODY_TIME.as_secs());
        return Err(Refused::new(StatusCode::REQUEST_TIMEOUT, code::INVALID_REQUEST, message));
    };
    match whole {
        Ok(body) => Ok(body.to_bytes()),
        Err(e) if e.is::<LengthLimitError>() => {
            // Closing on a client that is still writing would take the answer away from it.
            let rest = async { while let Some(Ok(_)) = body.frame().await {} };
            let _ = tokio::time::timeout(LINGER, rest).await;
            let message = format!("the body is larger than {limit} bytes");
            Err(Refused::new(StatusCode::PAYLOAD_TOO_LARGE, code::INVALID_REQUEST, message))
        }
        Err(_) => {
            Err(Refused::new(StatusCode::BAD_REQUEST, code::PARSE_ERROR, "the body did not arrive whole"))
        }
    }
}

/// One message.
fn json(status: StatusCode, chunks: Chunks) -> Response<DoorBody> {
    let mut response = Response::new(DoorBody::message(chunks));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// A stream of messages.
fn events(messages: body::Events) -> Response<DoorBody> {
    events_after(None, messages)
}

/// The same behind a first event, which is written already.
fn events_after(first: Option<Bytes>, messages: body::Events) -> Response<DoorBody> {
    let mut response = Response::new(DoorBody::events(first, messages));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, no-transform"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// Nothing to say.
fn empty(status: StatusCode) -> Response<DoorBody> {
    let mut response = Response::new(DoorBody::empty());
    *response.status_mut() = status;
    response
}

/// Done when the server is about to end.
async fn drained(draining: Option<super::Draining>) {
    match draining {
        Some(draining) => draining.begins().await,
        None => std::future::pending().await,
    }
}

/// What a layer wanted said around the payload.
fn apply_hint(response: &mut Response<DoorBody>, hint: Option<HttpHint>, with_status: bool) {
    let Some(hint) = hint else { return };
    if let (true, Some(status)) = (with_status, hint.status) {
        *response.status_mut() = status;
    }
    response.headers_mut().extend(hint.headers);
}

impl<S> fmt::Debug for McpHttp<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("McpHttp").field("options", &self.door.options).finish_non_exhaustive()
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("allowed", &self.allowed)
            .field("body_limit", &self.body_limit)
            .field("most_sessions", &self.most_sessions)
            .field("session_idle", &self.session_idle)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::stream;
    use http_body_util::StreamBody;
    use tower::ServiceExt as _;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_body_that_never_ends_is_given_up() {
        let never = StreamBody::new(stream::pending::<Result<http_body::Frame<Bytes>, Infallible>>());
        let mut request = Request::new(never);
        *request.method_mut() = Method::POST;
        request.headers_mut().insert(header::HOST, HeaderValue::from_static("localhost"));
        request.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let (service, _below) = crate::testing::mock();
        let Ok(answer) = McpHttp::new(service).oneshot(request).await;
        assert_eq!(answer.status(), StatusCode::REQUEST_TIMEOUT);
    }
}
