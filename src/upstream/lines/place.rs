//! Where one connection after another stands, made when it is needed.

use std::{sync::Arc, time::Duration};

use super::{Lines, Owner};
use crate::{
    BoxError,
    error::{Fault, UpstreamError},
    protocol::{McpRequest, McpResponse, Payload, ServerName, Unsolicited},
    upstream::link::Link,
};

/// At most one connection, and whose it is.
pub(crate) struct Place {
    link: Arc<Link<Lines>>,
    owner: Arc<Owner>,
}

impl Place {
    /// Of a connection that is opened on behalf of `owner`.
    pub(crate) fn new(upstream: &ServerName, owner: Arc<Owner>) -> Self {
        Place { link: Link::new(upstream.clone()), owner }
    }

    /// The same, with a limit for each attempt to connect.
    #[cfg(feature = "client")]
    pub(crate) fn within(upstream: &ServerName, owner: Arc<Owner>, limit: Duration) -> Self {
        Place { link: Link::within(upstream.clone(), limit), owner }
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
        if request.id().is_none() && request.method().is_notification() {
            // A peer that does not run has nothing to be told: it will learn everything when it is asked something.
            return match self.link.current() {
                Some(lines) => lines.call(request).await,
                None => Ok(McpResponse::raw("{}")),
            };
        }
        let lines = self.link.get(|| connect(self.owner.clone())).await?;
        let answer = lines.clone().call(request).await;
        let too_large = |error: &UpstreamError| error.fault == Fault::TooLarge;
        if answer.as_ref().is_err_and(|error| error.downcast_ref().is_some_and(too_large)) {
            // One long line says nothing against starting anew at once.
            self.link.discard(&lines);
        }
        answer
    }
}
