//! Where one connection after another stands, made when it is needed; and many such places, each client's its own.

use std::sync::Arc;
#[cfg(feature = "client")]
use std::time::Duration;

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
use crate::{error::Overloaded, upstream::slots::Slots};

/// At most one connection, and whose it is.
pub(crate) struct Place {
    link: Arc<Link<Lines>>,
    owner: Arc<Owner>,
    /// Dropped with the place.
    wanted: watch::Sender<()>,
}

impl Place {
    /// Of a connection that is opened on behalf of `owner`.
    pub(crate) fn new(upstream: &ServerName, owner: Arc<Owner>) -> Self {
        Place { link: Link::new(upstream.clone()), owner, wanted: watch::Sender::new(()) }
    }

    #[cfg(feature = "client")]
    fn within(upstream: &ServerName, owner: Arc<Owner>, limit: Duration) -> Self {
        Place { link: Link::within(upstream.clone(), limit), owner, wanted: watch::Sender::new(()) }
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

/// A place for each client session, or for those who share one.
#[cfg(feature = "client")]
pub(crate) struct Places {
    upstream: ServerName,
    limit: Duration,
    most: usize,
    /// The owners of places, and of those that are not needed yet: whoever only listens needs none.
    owners: Slots<Owner>,
    places: Slots<Place>,
    /// Where connections live, whoever asks first.
    home: Option<Handle>,
}

/// Owners of places at one upstream. The door allows no more clients than this.
#[cfg(feature = "client")]
const MOST_OWNERS: usize = 65_536;

#[cfg(feature = "client")]
impl Places {
    /// At most so many, each of whose attempts to connect may take so long.
    pub(crate) fn new(upstream: ServerName, most: usize, limit: Duration) -> Self {
        let (owners, places) = (Slots::new(MOST_OWNERS), Slots::new(most));
        Places { upstream, limit, most, owners, places, home: Handle::try_current().ok() }
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
            return match self.places.find(caller) {
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
        let place = self.places.get(caller, || {
            let _there = self.home.as_ref().map(Handle::enter);
            Place::within(&self.upstream, owner, self.limit)
        });
        match place {
            Some(place) => place.call(request, connect).await,
            None => Err(Overloaded { limit: self.most }.into()),
        }
    }

    /// How many there are.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.places.len()
    }
}
