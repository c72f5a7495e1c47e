//! HTTP+SSE, the transport of 2024-11-05: one stream of events, and a POST for each message.
//!
//! The stream begins by telling where to post. When it ends, so does the session.

use std::{
    collections::HashMap,
    convert::Infallible,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt as _, future::BoxFuture};
use http::{Method, Request, Response, StatusCode, Uri};
use http_body::Body;
use tower::Service;

use super::{
    DoorBody, Head, Options, Refused, body::Events, check_content_type, check_takes_events, drained, empty,
    events_after, read,
};
use crate::{
    BoxError, McpService,
    identity::{Principal, Scope},
    protocol::{Message, Params, code},
    server::{
        connection::{Connection, Who},
        legacy::new_id,
        modern::{self, is_modern_version},
        refusal::check_kind,
    },
};

/// The most requests that one client may have under way.
const MOST_REQUESTS: u32 = 256;
/// A little less than the listener gives.
const GRACE: Duration = Duration::from_secs(7);

/// The HTTP+SSE door: an MCP service as an HTTP service for clients of 2024-11-05.
///
/// A GET opens the stream; what is posted goes to the same path with `/messages` behind it. Who may come in is decided
/// as on [`McpHttp`](super::McpHttp).
///
/// ```
/// use portcullis::{gateway::Gateway, server::{self, McpSse, Options}};
///
/// # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
/// let door = McpSse::with_options(Gateway::builder().build(), Options::default().allow_host("mcp.example.com"));
/// let router = server::mount_sse(door);
/// # let _ = router; });
/// ```
#[derive(Clone)]
pub struct McpSse<S> {
    service: S,
    door: Arc<Door<S>>,
}

struct Door<S> {
    options: Options,
    clients: Mutex<HashMap<Arc<str>, Arc<Client<S>>>>,
}

struct Client<S> {
    principal: Principal,
    scope: Scope,
    connection: Arc<Connection<S>>,
}

impl<S: McpService> McpSse<S> {
    /// A door with the default options.
    pub fn new(service: S) -> Self {
        Self::with_options(service, Options::default())
    }

    /// A door with these options.
    pub fn with_options(service: S, options: Options) -> Self {
        McpSse { service, door: Arc::new(Door { options, clients: Mutex::default() }) }
    }

    /// How many clients there are.
    pub fn client_count(&self) -> usize {
        self.door.clients().len()
    }
}

impl<S, B> Service<Request<B>> for McpSse<S>
where
    S: McpService,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<DoorBody>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<DoorBody>, Infallible>>;

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

async fn serve<S, B>(
    service: S,
    door: Arc<Door<S>>,
    request: Request<B>,
) -> Result<Response<DoorBody>, Refused>
where
    S: McpService,
    B: Body<Data = Bytes> + Send,
    B::Error: Into<BoxError>,
{
    let (parts, body) = request.into_parts();
    if let Some(why) = door.options.allowed.refusal(&parts.headers, &parts.uri) {
        return Err(Refused::new(StatusCode::FORBIDDEN, code::INVALID_REQUEST, why));
    }
    let uri = parts.uri.clone();
    let posts = uri.path().ends_with(MESSAGES);
    match parts.method {
        Method::GET if !posts => open(service, &door, &uri, Head::of(parts)),
        Method::POST if posts => {
            check_content_type(&parts.headers)?;
            let head = Head::of(parts);
            let client = door.find(&uri, &head)?;
            let message = Message::parse(read(body, door.options.body_limit).await?)?;
            take(&client, message).await
        }
        _ => {
            let allow = if posts { "POST" } else { "GET" };
            let why = format!("only {allow} is served here");
            let refused = Refused::new(StatusCode::METHOD_NOT_ALLOWED, code::INVALID_REQUEST, why);
            Err(Refused { allow: Some(allow), ..refused })
        }
    }
}

const MESSAGES: &str = "/messages";

fn open<S: McpService>(
    service: S,
    door: &Arc<Door<S>>,
    uri: &Uri,
    head: Head,
) -> Result<Response<DoorBody>, Refused> {
    check_takes_events(&head.headers)?;
    let Head { principal, scope, draining, .. } = head;
    let who = Who { principal: principal.clone(), scope: scope.clone(), modern: false };
    let (connection, reader) = Connection::open(service, who, MOST_REQUESTS);
    let id = new_id();
    let open = Open { door: door.clone(), id: id.clone() };
    {
        let mut clients = door.clients();
        if clients.len() >= door.options.most_sessions {
            let why = "too many sessions are open; try again later";
            return Err(Refused::new(StatusCode::SERVICE_UNAVAILABLE, code::OVERLOADED, why));
        }
        clients.insert(id.clone(), Arc::new(Client { principal, scope, connection: connection.clone() }));
    }
    if draining.is_some() {
        tokio::spawn(end_with(connection.clone(), drained(draining)));
    }
    let path = uri.path().trim_end_matches('/');
    let endpoint = format!("event: endpoint\ndata: {path}{MESSAGES}?session={id}\n\n");
    let said = reader.map(move |sent| {
        // It lives as long as the stream, and ends the session with it.
        let _ = &open;
        sent
    });
    Ok(events_after(Some(endpoint.into()), Events::Numbered(Box::pin(said))))
}

/// Ends the session in good order when the server is about to end: what is under way is answered on the stream.
async fn end_with<S: McpService>(connection: Arc<Connection<S>>, drained: impl Future<Output = ()>) {
    tokio::select! {
        () = drained => {
            connection.drain(GRACE).await;
            connection.close();
        }
        () = connection.ended() => {}
    }
}

async fn take<S: McpService>(client: &Client<S>, message: Message) -> Result<Response<DoorBody>, Refused> {
    check_kind(&message)?;
    let named = |params: &Params| modern::named_version(params).is_some_and(|v| is_modern_version(&v));
    if let Message::Request { params, .. } | Message::Notification { params, .. } = &message
        && named(params)
    {
        let why = "this transport ended with 2024-11-05: newer clients use the other endpoint";
        return Err(Refused::new(StatusCode::BAD_REQUEST, code::INVALID_REQUEST, why));
    }
    client.connection.take(message).await;
    Ok(empty(StatusCode::ACCEPTED))
}

impl<S> Door<S> {
    /// The client whose session the URL names, if it is this principal's in this scope. An id is not a credential.
    fn find(&self, uri: &Uri, head: &Head) -> Result<Arc<Client<S>>, Refused> {
        let pairs = uri.query().unwrap_or_default().split('&');
        let id = pairs.filter_map(|pair| pair.strip_prefix("session=")).next().unwrap_or_default();
        let client = self.clients().get(id).cloned();
        client.filter(|client| client.principal == head.principal && client.scope == head.scope).ok_or_else(
            || {
                let why = "there is no such session: open the stream again";
                Refused::new(StatusCode::NOT_FOUND, code::INVALID_REQUEST, why)
            },
        )
    }

    fn clients(&self) -> MutexGuard<'_, HashMap<Arc<str>, Arc<Client<S>>>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A stream that is open.
struct Open<S: McpService> {
    door: Arc<Door<S>>,
    id: Arc<str>,
}

impl<S: McpService> Drop for Open<S> {
    fn drop(&mut self) {
        let client = self.door.clients().remove(&self.id);
        if let Some(client) = client {
            client.connection.close();
        }
    }
}

impl<S> fmt::Debug for McpSse<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("McpSse").field("options", &self.door.options).finish_non_exhaustive()
    }
}
