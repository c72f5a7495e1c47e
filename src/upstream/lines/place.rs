//! Where one connection after another stands, made when it is needed; and many such places, each client's its own.

use std::sync::Arc;
#[cfg(feature = "client")]
use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

#[cfg(feature = "client")]
use futures_util::StreamExt as _;
#[cfg(feature = "client")]
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::{Lines, Owner};
use crate::{
    BoxError,
    error::{Fault, UpstreamError},
    protocol::{McpRequest, McpResponse, Payload, ServerName, Unsolicited},
    upstream::link::Link,
};
#[cfg(feature = "client")]
use crate::{
    error::Overloaded,
    identity::{Abilities, Affinity, Caller},
    protocol::Method,
    upstream::slots::Slots,
};

/// At most one connection, and whose it is.
pub(crate) struct Place {
    link: Arc<Link<Lines>>,
    owner: Arc<Owner>,
    /// Dropped with the place.
    wanted: watch::Sender<()>,
    /// One more than calls under way.
    #[cfg(feature = "client")]
    taken: Arc<()>,
}

impl Place {
    /// Of a connection that is opened on behalf of `owner`.
    pub(crate) fn new(upstream: &ServerName, owner: Arc<Owner>) -> Self {
        Place {
            link: Link::new(upstream.clone()),
            owner,
            wanted: watch::Sender::new(()),
            #[cfg(feature = "client")]
            taken: Arc::default(),
        }
    }

    #[cfg(feature = "client")]
    fn within(upstream: &ServerName, owner: Arc<Owner>, limit: Duration) -> Self {
        let link = Link::within(upstream.clone(), limit);
        Place { link, owner, wanted: watch::Sender::new(()), taken: Arc::default() }
    }

    /// Answers over the connection, which `connect` makes when there is none and the request is worth it.
    pub(crate) async fn call<Fut>(
        &self,
        request: McpRequest,
        connect: impl FnOnce(Arc<Owner>) -> Fut,
    ) -> Result<McpResponse, BoxError>
    where
        Fut: Future<Output = Result<Lines, UpstreamError>> + Send + 'static,
    {
        if request.extensions().get::<Unsolicited>().is_some() {
            return Ok(McpResponse::new(Payload::Stream(self.owner.listen())));
        }
        if is_told(&request) {
            // A peer that does not run has nothing to be told: it will learn everything when it is asked something.
            return match self.link.current() {
                Some(lines) => lines.call(request).await,
                None => Ok(McpResponse::raw("{}")),
            };
        }
        let lines = self.link.get(|| self.while_wanted(connect(self.owner.clone()))).await?;
        let answer = lines.clone().call(request).await;
        let too_large = |error: &UpstreamError| error.fault == Fault::TooLarge;
        if answer.as_ref().is_err_and(|error| error.downcast_ref().is_some_and(too_large)) {
            // One long line says nothing against starting anew at once.
            self.link.discard(&lines);
        }
        answer
    }

    /// An attempt outlives who asked for it, but not the place: else clients that come and go would leave a server that
    /// hangs with ever more attempts.
    fn while_wanted<Fut>(&self, attempt: Fut) -> impl Future<Output = Result<Lines, UpstreamError>> + use<Fut>
    where
        Fut: Future<Output = Result<Lines, UpstreamError>>,
    {
        let (mut wanted, upstream) = (self.wanted.subscribe(), self.link.upstream().clone());
        async move {
            tokio::select! {
                outcome = attempt => outcome,
                _ = wanted.changed() => {
                    Err(UpstreamError::new(&upstream, Fault::Unreachable, "nobody wants it any more"))
                }
            }
        }
    }
}

fn is_told(request: &McpRequest) -> bool {
    request.id().is_none() && request.method().is_notification()
}

/// The places of one client session, which has one, or of those who share.
///
/// Nothing on a connection says which call a question or a log message belongs to. So among clients that share, a call
/// that may cause some gets a connection that is its own for as long as it is under way, if there is one to have.
#[cfg(feature = "client")]
#[derive(Default)]
struct Crowd(Mutex<Vec<Arc<Place>>>);

/// Connections of those who share; more calls at once than this have to share them, too, and then their questions are
/// refused.
#[cfg(feature = "client")]
const MOST_SHARED: usize = 8;

#[cfg(feature = "client")]
impl Crowd {
    /// A place, if there is one.
    fn first(&self) -> Option<Arc<Place>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).first().cloned()
    }

    /// A place for one call, and that it is taken.
    fn place(&self, alone: bool, make: impl FnOnce() -> Place) -> (Arc<Place>, Taken) {
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let free = places.iter().find(|place| !alone || place.is_free());
        let place = match free {
            Some(place) => place.clone(),
            None if places.is_empty() || (alone && places.len() < MOST_SHARED) => {
                let place = Arc::new(make());
                places.push(place.clone());
                place
            }
            None => places.iter().min_by_key(|place| place.taken()).expect("there are some").clone(),
        };
        let taken = Taken(place.taken.clone());
        (place, taken)
    }
}

/// A call under way at a place.
#[cfg(feature = "client")]
struct Taken(#[allow(dead_code)] Arc<()>);

#[cfg(feature = "client")]
impl Place {
    /// How many calls are under way.
    fn taken(&self) -> usize {
        Arc::strong_count(&self.taken) - 1
    }

    /// Whether what is said there can only be about a call that begins now.
    fn is_free(&self) -> bool {
        self.taken() == 0 && self.link.current().is_none_or(|lines| lines.is_quiet())
    }
}

/// Whether a call may cause what only its being alone can attribute.
#[cfg(feature = "client")]
fn wants_to_be_alone(request: &McpRequest) -> bool {
    let Caller { affinity, client, .. } = &**request.caller();
    let may_cause = client.log_level.is_some() || client.abilities() != Abilities::default();
    matches!(affinity, Affinity::Shared) && *request.method() != Method::Listen && may_cause
}

/// A place for each client session, or for those who share one.
#[cfg(feature = "client")]
pub(crate) struct Places {
    upstream: ServerName,
    limit: Duration,
    most: usize,
    /// The owners of places, and of those that are not needed yet: whoever only listens needs none.
    owners: Slots<Owner>,
    places: Slots<Crowd>,
    /// Where connections live, whoever asks first.
    home: Option<Handle>,
    /// Dropped with the places: subscriptions must not keep an upstream that was removed.
    there: watch::Sender<()>,
}

/// Owners of places at one upstream. The door allows no more clients than this.
#[cfg(feature = "client")]
const MOST_OWNERS: usize = 65_536;

#[cfg(feature = "client")]
impl Places {
    /// At most so many, each of whose attempts to connect may take so long.
    pub(crate) fn new(upstream: ServerName, most: usize, limit: Duration) -> Self {
        let (owners, places) = (Slots::new(MOST_OWNERS), Slots::new(most));
        let there = watch::Sender::new(());
        Places { upstream, limit, most, owners, places, home: Handle::try_current().ok(), there }
    }

    /// Answers over the caller's own connection.
    pub(crate) async fn call<Fut>(
        &self,
        request: McpRequest,
        connect: impl FnOnce(Arc<Owner>) -> Fut,
    ) -> Result<McpResponse, BoxError>
    where
        Fut: Future<Output = Result<Lines, UpstreamError>> + Send + 'static,
    {
        let caller = request.caller();
        if is_told(&request) {
            return match self.places.find(caller).and_then(|crowd| crowd.first()) {
                Some(place) => place.call(request, connect).await,
                None => Ok(McpResponse::raw("{}")),
            };
        }
        let Some(owner) = self.owners.get(caller, || Owner::of(caller)) else {
            return Err(Overloaded { limit: MOST_OWNERS }.into());
        };
        if request.extensions().get::<Unsolicited>().is_some() {
            return Ok(McpResponse::new(Payload::Stream(owner.listen())));
        }
        let Some(crowd) = self.places.get(caller, Crowd::default) else {
            return Err(Overloaded { limit: self.most }.into());
        };
        let (place, taken) = crowd.place(wants_to_be_alone(&request), || self.make(owner));
        // A subscription causes nothing that its own frames do not name.
        let is_call = *request.method() != Method::Listen;
        let taken = is_call.then_some(taken);
        let mut there = self.there.subscribe();
        let response = place.call(request, connect).await?;
        let response = match response.into_parts() {
            (Payload::Stream(frames), extensions) if !is_call => {
                let gone = async move { drop(there.changed().await) };
                McpResponse::from_parts(Payload::Stream(Box::pin(frames.take_until(gone))), extensions)
            }
            (payload, extensions) => McpResponse::from_parts(payload, extensions),
        };
        Ok(match response.payload() {
            // The crowd stays as long as anything comes of it, and the place is taken.
            Payload::Stream(_) => response.map_final(move |payload| {
                let _until_the_end = (&crowd, &taken);
                payload
            }),
            _ => response,
        })
    }

    fn make(&self, owner: Arc<Owner>) -> Place {
        let _there = self.home.as_ref().map(Handle::enter);
        Place::within(&self.upstream, owner, self.limit)
    }

    /// How many there are.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.places.len()
    }
}
