//! Legacy servers, and the sessions they keep.
//!
//! A session is made by `initialize`, belongs to one [`AffinityKey`](crate::identity::AffinityKey), and ends when
//! nobody can use it any more, or when the server says it does not know it: then the request, which was not
//! processed, goes out once more on a new one.
//!
//! `session` is what is sent, `reader` what comes back for one request, `stray` what comes for none, and `questions`
//! what the server asks on either.

mod late;
mod overhear;
mod questions;
mod reader;
mod session;
mod stray;

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http::StatusCode;

use self::{session::Session, stray::Stray};
use super::{Endpoint, HANDSHAKE, Shared};
use crate::{
    BoxError,
    error::{Fault, Overloaded, UpstreamError},
    identity::{Abilities, Affinity, Caller, Client},
    protocol::{McpRequest, McpResponse, Method, Payload, RawObject, ServerName, Unsolicited},
    upstream::{link::Link, translate},
};

/// Sessions at one upstream. The door allows no more clients than this.
pub(super) const MOST_SESSIONS: usize = 65_536;
/// For requests nobody waits for.
const BRIEFLY: Duration = Duration::from_secs(10);

/// The place of one session after another.
pub(super) struct Slot {
    link: Arc<Link<Session>>,
    stray: Arc<Stray>,
    /// One more than calls under way.
    taken: Arc<()>,
}

/// The places of one client session, which has one, or of those who share.
///
/// What comes on a session's own stream does not say which call it belongs to. So among clients that share, a call
/// that may cause some gets a session to itself for as long as it is under way, if there is one to have.
#[derive(Default)]
pub(super) struct Crowd(Mutex<Vec<Arc<Slot>>>);

/// Sessions of those who share.
const MOST_SHARED: usize = 8;

impl Crowd {
    /// A place, if there is one.
    fn first(&self) -> Option<Arc<Slot>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).first().cloned()
    }

    /// A place for one request, and that it is taken.
    fn slot(&self, alone: bool, upstream: &ServerName) -> (Arc<Slot>, Arc<()>) {
        let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = match slots.iter().find(|slot| !alone || slot.is_free()) {
            Some(slot) => slot.clone(),
            None if slots.is_empty() || (alone && slots.len() < MOST_SHARED) => {
                slots.push(Arc::new(Slot::new(upstream)));
                slots[slots.len() - 1].clone()
            }
            None => slots.iter().min_by_key(|slot| slot.taken()).expect("there are some").clone(),
        };
        let taken = slot.taken.clone();
        (slot, taken)
    }
}

/// Whether a call may cause what only its being alone can attribute.
fn wants_to_be_alone(request: &McpRequest) -> bool {
    let Caller { affinity, client, .. } = &**request.caller();
    let may_cause = client.log_level.is_some() || client.abilities() != Abilities::default();
    let is_call = !matches!(request.method(), Method::Listen | Method::Discover);
    matches!(affinity, Affinity::Shared) && is_call && may_cause
}

impl Slot {
    fn new(upstream: &ServerName) -> Slot {
        let link = Link::within(upstream.clone(), HANDSHAKE);
        Slot { link, stray: Arc::default(), taken: Arc::default() }
    }

    /// How many calls are under way.
    fn taken(&self) -> usize {
        Arc::strong_count(&self.taken) - 1
    }

    /// Whether what is said there can only be about a call that begins now.
    fn is_free(&self) -> bool {
        self.taken() == 0 && self.link.current().is_none_or(|session| !session.under_way.is_haunted())
    }
}

/// Why a request got no answer.
enum Refusal {
    /// The session is not known any more; the request was not processed.
    Expired,
    Failed(UpstreamError),
}

impl Refusal {
    /// Whether the server has certainly not begun with the request.
    fn is_unprocessed(&self) -> bool {
        match self {
            Refusal::Expired => true,
            Refusal::Failed(error) => error.fault == Fault::Unreachable,
        }
    }
}

impl From<UpstreamError> for Refusal {
    fn from(e: UpstreamError) -> Self {
        Refusal::Failed(e)
    }
}

/// Answers one request within the caller's session.
pub(super) async fn call(
    shared: &Arc<Shared>,
    endpoint: &Arc<Endpoint>,
    request: McpRequest,
) -> Result<McpResponse, BoxError> {
    if request.id().is_none() && request.method().is_notification() {
        return tell(shared, &request).await;
    }
    let upstream = shared.wire.upstream();
    let params = translate::checked_legacy_params(&request)?;
    let Some(crowd) = shared.sessions.get(request.caller(), Crowd::default) else {
        return Err(Overloaded { limit: MOST_SESSIONS }.into());
    };
    let (slot, taken) = crowd.slot(wants_to_be_alone(&request), upstream);
    if request.extensions().get::<Unsolicited>().is_some() {
        return Ok(unsolicited(&slot, request.caller()));
    }
    let link = &slot.link;
    for attempt in 0.. {
        let (s, e, caller) = (shared.clone(), endpoint.clone(), request.caller().clone());
        let stray = slot.stray.clone();
        let session = link.get(|| async move { Session::open(&s, &e, &caller, stray).await }).await?;
        let outcome = match request.method() {
            Method::Discover => {
                return Ok(McpResponse::raw(translate::discover_result(session.initialized())));
            }
            Method::Listen => return Ok(session.listen(&request).await),
            _ => session.request(&request, params.clone()).await,
        };
        match outcome {
            Err(Refusal::Expired) if attempt == 0 => link.discard(&session),
            Err(Refusal::Expired) => {
                let error = "it does not accept the session it just gave";
                return Err(shared.wire.error(Fault::Garbled, error).into());
            }
            Err(Refusal::Failed(error)) => {
                // What answers there may be another server now, or want other credentials than when we began.
                if matches!(error.fault, Fault::Unreachable | Fault::Unauthorized | Fault::Misconfigured) {
                    link.discard(&session);
                    shared.doubt(endpoint);
                }
                return Err(error.into());
            }
            Ok(response) => {
                return Ok(match response.payload() {
                    // The crowd stays as long as anything comes of it, and the place is taken.
                    Payload::Stream(_) => response.map_final(move |payload| {
                        let _until_the_end = (&crowd, &taken);
                        payload
                    }),
                    _ => response,
                });
            }
        }
    }
    unreachable!("the second attempt returns")
}

/// A notification is for a session that is there: to one that begins, nothing has happened yet.
async fn tell(shared: &Shared, request: &McpRequest) -> Result<McpResponse, BoxError> {
    let slot = shared.sessions.find(request.caller()).and_then(|crowd| crowd.first());
    let session = slot.and_then(|slot| slot.link.current());
    if let Some(session) = session {
        match session.notify(request.method(), &translate::legacy_params(request)).await {
            Err(Refusal::Failed(error)) => return Err(error.into()),
            // It is over, and nobody is left to be told.
            Ok(()) | Err(Refusal::Expired) => {}
        }
    }
    Ok(McpResponse::raw("{}"))
}

/// What the caller's sessions say without being asked. This opens none, but lets one that is there speak.
fn unsolicited(slot: &Slot, caller: &Caller) -> McpResponse {
    let frames = match caller.affinity {
        Affinity::Session(_) => slot.stray.to_client(caller.client.clone()),
        // A question on a shared session is nobody's.
        Affinity::Shared => slot.stray.notifications(),
    };
    if let Some(session) = slot.link.current() {
        session.start_listening();
    }
    McpResponse::new(Payload::Stream(frames))
}

/// Nobody waits for these requests, so they must end by themselves: a server that hangs must not collect them.
async fn briefly<T, E>(request: impl Future<Output = Result<T, E>>) -> Option<T> {
    tokio::time::timeout(BRIEFLY, request).await.ok()?.ok()
}

fn is_list_change(method: &Method) -> bool {
    matches!(method, Method::ToolsChanged | Method::PromptsChanged | Method::ResourcesChanged)
}

/// Statuses that are between the gateway and its upstream.
pub(super) fn is_about_us(status: StatusCode) -> bool {
    status.is_server_error()
        || status.is_redirection()
        || matches!(
            status,
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::PROXY_AUTHENTICATION_REQUIRED
        )
}

/// What the upstream is told of the client. One client's session has its name and what it said it can do. Requests of
/// several share a session of the gateway's own, which can be asked what each of them can be.
fn client_of(caller: &Caller) -> Client {
    match caller.affinity {
        Affinity::Shared => {
            let abilities = caller.client.abilities().to_value().to_string();
            Client { capabilities: abilities.into(), ..Client::gateway() }
        }
        Affinity::Session(_) => {
            let mut client = caller.client.clone();
            client.capabilities = match RawObject::parse(client.capabilities) {
                Ok(mut capabilities) => {
                    // What these promise does not pass through here.
                    ["tasks", "experimental"].iter().for_each(|key| capabilities.remove(key));
                    capabilities.into_bytes()
                }
                Err(_) => Bytes::from_static(b"{}"),
            };
            client
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::SessionToken;

    #[test]
    fn a_clients_own_session_has_its_name_and_a_shared_one_what_it_can_be_asked() {
        let declared =
            br#"{"roots":{"listChanged":true},"x":1e400,"tasks":{},"sampling":{},"experimental":{}}"#;
        let client = Client {
            info: Some(Bytes::from_static(br#"{"name":"story"}"#)),
            capabilities: Bytes::from_static(declared),
            ..Client::gateway()
        };
        let caller = Caller { client, ..(*Caller::anonymous()).clone() };
        let shared = client_of(&caller);
        assert_eq!(shared.capabilities, r#"{"roots":{},"sampling":{}}"#);
        assert_eq!(shared.info, Client::gateway().info);
        let own = Caller { affinity: Affinity::Session(SessionToken::new()), ..caller };
        let own = client_of(&own);
        assert_eq!(own.capabilities, r#"{"roots":{"listChanged":true},"x":1e400,"sampling":{}}"#);
        assert_eq!(own.info.unwrap(), r#"{"name":"story"}"#);
    }
}
