//! The modern era over HTTP: a request's headers held against its body.

use std::sync::Arc;

use futures_util::{StreamExt as _, future, stream};
use http::{Response, StatusCode};

use super::{
    DoorBody, Head, Refused, SESSION_HEADER, VERSION_HEADER, apply_hint, body::Events, drained, empty,
    events, json,
};
use crate::{
    McpService,
    protocol::{McpRequest, Message, Method, MirroredHeaders, Params, RequestId, code, decode_header},
    server::{
        modern::{self, Answer, is_modern_version},
        refusal::Refusal,
    },
};

/// Whether the message belongs to the modern era: header or `_meta` name a version that is not legacy. Without a
/// session, a message that is no `initialize` but has modern headers is a modern one that lacks something.
pub(super) fn is_modern(head: &Head, message: &Message) -> bool {
    let params = match message {
        Message::Request { params, .. } | Message::Notification { params, .. } => params,
        Message::Response { .. } => return named_version(head).is_some_and(is_modern_version),
    };
    if let Some(version) = modern::named_version(params) {
        return is_modern_version(&version);
    }
    match named_version(head) {
        Some(version) => is_modern_version(version) && !has_session(head),
        None => head.headers.contains_key("mcp-method") && !has_session(head),
    }
}

fn named_version(head: &Head) -> Option<&str> {
    head.headers.get(VERSION_HEADER)?.to_str().ok()
}

fn has_session(head: &Head) -> bool {
    head.headers.contains_key(SESSION_HEADER)
}

pub(super) async fn serve<S: McpService>(
    service: S,
    head: Head,
    message: Message,
) -> Result<Response<DoorBody>, Refused> {
    match message {
        Message::Request { id, method, params } => {
            let mut request = admit(&head, &id, method, params)?;
            if *request.method() == Method::ToolsCall {
                request.extensions_mut().insert(MirroredHeaders(Arc::new(head.headers)));
            }
            Ok(answer(service, request, id, head.draining).await)
        }
        Message::Notification { method, params } => {
            // None is defined for HTTP. One that some extension defines goes to whoever may know it.
            if method != Method::Cancelled {
                modern::take_notification(service, head.principal, head.scope, method, params).await;
            }
            Ok(empty(StatusCode::ACCEPTED))
        }
        Message::Response { id, .. } => {
            Err(Refusal::new(id, code::INVALID_REQUEST, "a client of this era sends no responses").into())
        }
    }
}

/// Checks everything the specification wants checked before a request is a request.
fn admit(head: &Head, id: &RequestId, method: Method, params: Params) -> Result<McpRequest, Refusal> {
    let mismatch = |message: String| Refusal::new(Some(id.clone()), code::HEADER_MISMATCH, message);
    let client = modern::client_of(&params, id).and_then(|client| {
        let version = modern::named_version(&params);
        check_header(head, VERSION_HEADER, version.as_deref()).map_err(mismatch)?;
        client
    })?;
    check_header(head, "mcp-method", Some(method.as_str())).map_err(mismatch)?;
    modern::check_method(id, &method)?;
    if let Some(member) = method.name_member() {
        let name = params.get_string(member);
        check_header(head, "mcp-name", name.as_deref()).map_err(mismatch)?;
    }
    Ok(modern::request(head.principal.clone(), head.scope.clone(), client, id, method, params))
}

/// A header must be there once and say what the body says; `None` when the body says nothing, and then the service
/// will say what is missing.
fn check_header(head: &Head, name: &str, body: Option<&str>) -> Result<(), String> {
    let Some(body) = body else { return Ok(()) };
    let value = head.single(name).map_err(|why| format!("Header mismatch: {name} {why}"))?;
    let value = value.ok_or_else(|| format!("Header mismatch: {name} is missing"))?;
    let decoded =
        decode_header(value).ok_or_else(|| format!("Header mismatch: {name} is not valid Base64"))?;
    match *decoded == *body {
        true => Ok(()),
        false => Err(format!("Header mismatch: {name} does not match the body")),
    }
}

async fn answer<S: McpService>(
    service: S,
    request: McpRequest,
    id: RequestId,
    draining: Option<crate::server::Draining>,
) -> Response<DoorBody> {
    let (mut response, hint) = match modern::answer(service, request, id).await {
        Answer::Message(message, code, hint) => (json(status_of(code), message), hint),
        Answer::Messages(messages, hint) => (events(Events::Plain(messages)), hint),
        // It ends in good order when the server does.
        Answer::Subscription(messages, last, hint) => {
            let messages = messages.take_until(drained(draining));
            let messages = messages.chain(stream::once(future::ready(last)));
            (events(Events::Plain(Box::pin(messages))), hint)
        }
    };
    apply_hint(&mut response, hint, true);
    response
}

/// The statuses the specification ties to codes; whatever a layer hints comes on top.
fn status_of(code: Option<i64>) -> StatusCode {
    match code {
        Some(code::METHOD_NOT_FOUND) => StatusCode::NOT_FOUND,
        Some(code::HEADER_MISMATCH | code::MISSING_CAPABILITY | code::UNSUPPORTED_VERSION) => {
            StatusCode::BAD_REQUEST
        }
        _ => StatusCode::OK,
    }
}
