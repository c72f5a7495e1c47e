//! The modern era: every request by itself, its headers held against its body.

use std::sync::Arc;

use futures_util::{StreamExt as _, future, stream};
use http::{Response, StatusCode};
use serde_json::json;

use super::{
    DoorBody, Head, Refused, SESSION_HEADER, VERSION_HEADER, answer, answer::Chunks, apply_hint, call, empty,
    events, json,
};
use crate::{
    McpService,
    identity::{Affinity, Caller, Client},
    protocol::{
        Era, Frame, FrameStream, HttpHint, McpRequest, Message, Method, MirroredHeaders, Notification,
        Params, Payload, ProtocolVersion, RawObject, RequestId, RpcError, code, decode_header, meta,
    },
    server::Draining,
};

/// Whether the message belongs to the modern era: header or `_meta` name a version that is not legacy. Without a
/// session, a message that is no `initialize` but has modern headers is a modern one that lacks something.
pub(super) fn is_modern(head: &Head, message: &Message) -> bool {
    let legacy = |version: &str| version.parse::<ProtocolVersion>().is_ok_and(|v| v.era() == Era::Legacy);
    let params = match message {
        Message::Request { params, .. } | Message::Notification { params, .. } => params,
        Message::Response { .. } => return named_version(head).is_some_and(|v| !legacy(v)),
    };
    if let Some(version) = params.meta().and_then(|m| m.get_string(meta::PROTOCOL_VERSION)) {
        return !legacy(&version);
    }
    match named_version(head) {
        Some(version) => !legacy(version) && !has_session(head),
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
            answer_request(service, request, id, head.draining).await
        }
        Message::Notification { method, params } => {
            // None is defined for HTTP. One that some extension defines goes to whoever may know it.
            if method != Method::Cancelled {
                let client = Client::gateway();
                let caller = Caller {
                    principal: head.principal,
                    scope: head.scope,
                    client,
                    affinity: Affinity::Shared,
                };
                let request = McpRequest::new(method, params).with_caller(Arc::new(caller));
                let _ = call(service, request).await;
            }
            Ok(empty(StatusCode::ACCEPTED))
        }
        Message::Response { id, .. } => {
            Err(invalid(id, code::INVALID_REQUEST, "a client of this era sends no responses"))
        }
    }
}

fn invalid(id: Option<RequestId>, code: i64, message: impl Into<String>) -> Refused {
    Refused::new(StatusCode::BAD_REQUEST, id, code, message)
}

/// Checks everything the specification wants checked before a request is a request.
fn admit(head: &Head, id: &RequestId, method: Method, params: Params) -> Result<McpRequest, Refused> {
    let refuse = |code, message: String| invalid(Some(id.clone()), code, message);
    let client = read_meta(&params, id).and_then(|client| {
        check_version_header(head, id, &params)?;
        client
    })?;
    check_header(head, "mcp-method", Some(method.as_str())).map_err(|m| refuse(code::HEADER_MISMATCH, m))?;
    if method.is_legacy_only() {
        let error = RpcError::new(code::METHOD_NOT_FOUND, format!("Method not found: {method}"));
        return Err(Refused::with(StatusCode::NOT_FOUND, Some(id.clone()), error));
    }
    if let Some(member) = method.name_member() {
        let name = params.get_string(member);
        check_header(head, "mcp-name", name.as_deref()).map_err(|m| refuse(code::HEADER_MISMATCH, m))?;
    }
    let caller = Caller {
        principal: head.principal.clone(),
        scope: head.scope.clone(),
        client,
        affinity: Affinity::Shared,
    };
    Ok(McpRequest::new(method, params).with_id(id.clone()).with_caller(Arc::new(caller)))
}

/// The request's context. The outer result is what to say when the version header is in order, too.
#[allow(clippy::type_complexity)]
fn read_meta(params: &Params, id: &RequestId) -> Result<Result<Client, Refused>, Refused> {
    let missing =
        |key: &str| invalid(Some(id.clone()), code::INVALID_PARAMS, format!("`_meta` needs `{key}`"));
    let Some(m) = params.meta() else { return Err(missing(meta::PROTOCOL_VERSION)) };
    let Some(version) = m.get_string(meta::PROTOCOL_VERSION) else {
        return Err(missing(meta::PROTOCOL_VERSION));
    };
    Ok(client(m, &version, id)
        .map_err(|refused| refused.unwrap_or_else(|| missing(meta::CLIENT_CAPABILITIES))))
}

fn client(m: &RawObject, version: &str, id: &RequestId) -> Result<Client, Option<Refused>> {
    let version = match version.parse::<ProtocolVersion>() {
        Ok(version) if version.era() == Era::Modern => version,
        _ => return Err(Some(unsupported(id, version))),
    };
    let wrong = |key: &str| {
        Some(invalid(
            Some(id.clone()),
            code::INVALID_PARAMS,
            format!("`_meta` has a `{key}` of the wrong type"),
        ))
    };
    let is_object = |json: &str| json.starts_with('{');
    let capabilities = m.get_bytes(meta::CLIENT_CAPABILITIES).ok_or(None)?;
    if capabilities.first() != Some(&b'{') {
        return Err(wrong(meta::CLIENT_CAPABILITIES));
    }
    if m.get(meta::CLIENT_INFO).is_some_and(|info| !is_object(info)) {
        return Err(wrong(meta::CLIENT_INFO));
    }
    if m.get("progressToken").is_some_and(|token| RequestId::from_json(token.to_owned().into()).is_none()) {
        return Err(wrong("progressToken"));
    }
    Ok(Client {
        version,
        info: m.get_bytes(meta::CLIENT_INFO),
        capabilities,
        log_level: m.get_bytes(meta::LOG_LEVEL),
    })
}

fn unsupported(id: &RequestId, requested: &str) -> Refused {
    let supported: Vec<&str> = ProtocolVersion::ALL
        .iter()
        .filter(|v| **v > ProtocolVersion::V2024_11_05)
        .map(|v| v.as_str())
        .collect();
    let error = RpcError::new(code::UNSUPPORTED_VERSION, "Unsupported protocol version")
        .with_data(&json!({ "supported": supported, "requested": requested }));
    Refused::with(StatusCode::BAD_REQUEST, Some(id.clone()), error)
}

fn check_version_header(head: &Head, id: &RequestId, params: &Params) -> Result<(), Refused> {
    let version = params.meta().and_then(|m| m.get_string(meta::PROTOCOL_VERSION));
    check_header(head, VERSION_HEADER, version.as_deref())
        .map_err(|message| invalid(Some(id.clone()), code::HEADER_MISMATCH, message))
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

async fn answer_request<S: McpService>(
    service: S,
    request: McpRequest,
    id: RequestId,
    draining: Option<Draining>,
) -> Result<Response<DoorBody>, Refused> {
    let method = request.method().clone();
    let (payload, extensions) = call(service, request).await.into_parts();
    let hint = extensions.get::<HttpHint>();
    let mut response = match payload {
        Payload::Stream(frames) if method == Method::Listen => events(subscription(frames, id, draining)),
        Payload::Stream(frames) => events(stream_of(frames, id, method)),
        payload => {
            let status = status_of(&payload);
            let mut response = json(StatusCode::OK, answer::response(&id, &method, payload, Era::Modern));
            *response.status_mut() = status;
            response
        }
    };
    apply_hint(&mut response, hint, true);
    Ok(response)
}

/// The statuses the specification ties to codes; whatever a layer hints comes on top.
fn status_of(payload: &Payload) -> StatusCode {
    match payload {
        Payload::Error(error) => match error.code() {
            code::METHOD_NOT_FOUND => StatusCode::NOT_FOUND,
            code::HEADER_MISMATCH | code::MISSING_CAPABILITY | code::UNSUPPORTED_VERSION => {
                StatusCode::BAD_REQUEST
            }
            _ => StatusCode::OK,
        },
        _ => StatusCode::OK,
    }
}

/// The frames of one call. Dropping it cancels the call, which is what closing the stream means in this era.
fn stream_of(frames: FrameStream, id: RequestId, method: Method) -> super::body::Messages {
    let messages = frames.filter_map(move |frame| {
        future::ready(match frame {
            Ok(Frame::Notification(notification)) => Some(answer::notification(&notification)),
            Ok(Frame::Final(payload)) => Some(answer::response(&id, &method, payload, Era::Modern)),
            // This client cannot be asked in the middle of a call; dropped, the question is refused.
            Ok(Frame::Request(_)) => None,
            Err(error) => {
                tracing::warn!(%error, "a stream failed");
                Some(answer::error(Some(&id), &RpcError::new(code::INTERNAL_ERROR, "internal error")))
            }
        })
    });
    Box::pin(messages)
}

/// The frames of a subscription, each with its id. It ends in good order when the server does.
fn subscription(frames: FrameStream, id: RequestId, draining: Option<Draining>) -> super::body::Messages {
    let tag = id.clone();
    let messages = frames.filter_map(move |frame| {
        future::ready(match frame {
            Ok(Frame::Notification(notification)) => Some(answer::notification(&tagged(notification, &tag))),
            _ => None,
        })
    });
    let end = json!({ "resultType": "complete" }).to_string();
    let mut end = RawObject::parse(end.into()).expect("this is an object");
    end.set("_meta", format!("{{\"{}\":{}}}", meta::SUBSCRIPTION_ID, id.as_str()));
    let last = answer::response(&id, &Method::Listen, Payload::Raw(end.into_bytes()), Era::Modern);
    Box::pin(messages.take_until(drained(draining)).chain(stream::once(future::ready::<Chunks>(last))))
}

fn tagged(mut notification: Notification, id: &RequestId) -> Notification {
    let mut m = notification.params.meta().cloned().unwrap_or_else(RawObject::empty);
    m.set(meta::SUBSCRIPTION_ID, id.as_str());
    notification.params.object_mut().set("_meta", m.as_str());
    notification
}

/// Done when the server is about to end.
pub(super) async fn drained(draining: Option<Draining>) {
    match draining {
        Some(draining) => draining.begins().await,
        None => future::pending().await,
    }
}
