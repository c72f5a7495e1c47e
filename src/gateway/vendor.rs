//! What only upstreams understand: methods and notifications we have no name for.
//!
//! Nobody here can tell what such a message addresses. So where rules are in force, it does not reach an upstream that
//! has any: it could be a way around them.

use std::{sync::Arc, time::Duration};

use tower::ServiceExt as _;

use super::{
    Shared, tasks,
    view::{Member, View},
};
use crate::{
    BoxError,
    error::{Fault, Unimplemented, UpstreamError},
    layers::InForce,
    protocol::{McpRequest, McpResponse, Method, Payload, ServerName, code},
};

/// An upstream that has not taken a notification by then does not get it.
const NOTIFY_WITHIN: Duration = Duration::from_secs(10);

/// Asks one upstream after another, in the order of priority, until one knows the method: "method not found" proves that
/// the request was not processed. An upstream that cannot be reached did not process it either; when nobody else knows
/// the method, that is what the client is told.
pub(super) async fn ask(
    shared: &Arc<Shared>,
    view: &View,
    request: McpRequest,
) -> Result<McpResponse, BoxError> {
    let method = request.method().as_str();
    let before = view.answerer(method);
    let mut asked: Vec<&Member> = takes_part(view, &request).collect();
    // Stable, so the others stay in order.
    asked.sort_by_key(|member| Some(&member.name) != before.as_ref());
    let alone = asked.len() == 1;
    let mut unreachable: Option<BoxError> = None;
    for member in asked {
        let answer = member.service.clone().oneshot(request.clone()).await;
        match answer.map(|response| tasks::own_only(shared, request.caller(), member, response)) {
            // One upstream's words are as good as ours.
            Ok(response) if alone => return Ok(response),
            Ok(response) if is_unknown(&response) => {}
            Ok(response) => {
                // One that is away now may know it, too, and comes first when it is back.
                if unreachable.is_none() {
                    view.remember_answerer(method, &member.name);
                }
                return Ok(response);
            }
            Err(error) if is_unreachable(&error) => unreachable = unreachable.or(Some(error)),
            Err(error) => return Err(error),
        }
    }
    Err(unreachable.unwrap_or_else(|| Unimplemented(request.method().clone()).into()))
}

/// Tells every upstream, each by itself: a slow one keeps nobody waiting.
pub(super) fn tell(view: &View, request: &McpRequest) -> McpResponse {
    // Those we have a name for are about the sender's own connection, or come from servers only.
    if matches!(request.method(), Method::Other(_)) {
        for member in takes_part(view, request) {
            let told = member.service.clone().oneshot(request.clone());
            let server = member.name.clone();
            tokio::spawn(async move {
                match tokio::time::timeout(NOTIFY_WITHIN, told).await {
                    Ok(Ok(_)) => {}
                    Ok(Err(error)) => tracing::debug!(%server, %error, "a notification did not arrive"),
                    Err(_) => tracing::debug!(%server, "a notification was not taken in time"),
                }
            });
        }
    }
    McpResponse::raw("{}")
}

/// The upstreams that may get what nobody here understands, in the order of priority.
fn takes_part<'a>(view: &'a View, request: &McpRequest) -> impl Iterator<Item = &'a Member> + use<'a> {
    let rules = request.extensions().get::<InForce>().map(|InForce(rules)| Arc::clone(rules));
    let restricted = move |server: &ServerName| rules.as_ref().is_some_and(|rules| rules.restricts(server));
    view.members().iter().filter(move |member| !restricted(&member.name))
}

fn is_unknown(response: &McpResponse) -> bool {
    matches!(response.payload(), Payload::Error(error) if error.code() == code::METHOD_NOT_FOUND)
}

fn is_unreachable(error: &BoxError) -> bool {
    error.downcast_ref().is_some_and(|e: &UpstreamError| e.fault == Fault::Unreachable)
}
