//! The modern era: every request stands by itself, whatever the door.

use std::{pin::Pin, sync::Arc};

use futures_core::Stream;
use futures_util::{StreamExt as _, future, stream};
use serde_json::json;

use super::{
    call,
    message::{self, Chunks},
    refusal::Refusal,
};
use crate::{
    McpService,
    identity::{Affinity, Caller, Client, Principal, Scope},
    protocol::{
        Era, Frame, FrameStream, HttpHint, McpRequest, Method, Notification, Params, Payload,
        ProtocolVersion, RawObject, RequestId, RpcError, code, meta,
    },
};

/// Whole messages, as they come. Dropping them cancels the call.
pub(in crate::server) type Messages = Pin<Box<dyn Stream<Item = Chunks> + Send>>;

/// What a request comes to.
pub(in crate::server) enum Answer {
    /// One message, its code when it is an error, and what an HTTP door says around it.
    Message(Chunks, Option<i64>, Option<HttpHint>),
    /// Messages, the answer last.
    Messages(Messages, Option<HttpHint>),
}

/// The version that a message's own `_meta` names.
pub(in crate::server) fn named_version(params: &Params) -> Option<std::borrow::Cow<'_, str>> {
    params.meta()?.get_string(meta::PROTOCOL_VERSION)
}

/// A request as the stack knows it.
pub(in crate::server) fn request(
    principal: Principal,
    scope: Scope,
    client: Client,
    id: &RequestId,
    method: Method,
    params: Params,
) -> McpRequest {
    let caller = Caller { principal, scope, client, affinity: Affinity::Shared };
    McpRequest::new(method, params).with_id(id.clone()).with_caller(Arc::new(caller))
}

/// A method that this era took away is an unknown one.
pub(in crate::server) fn check_method(id: &RequestId, method: &Method) -> Result<(), Refusal> {
    match method.is_legacy_only() {
        true => {
            Err(Refusal::new(Some(id.clone()), code::METHOD_NOT_FOUND, format!("Method not found: {method}")))
        }
        false => Ok(()),
    }
}

/// Takes a notification: one that some extension defines goes to whoever may know it.
pub(in crate::server) async fn take_notification<S: McpService>(
    service: S,
    principal: Principal,
    scope: Scope,
    method: Method,
    params: Params,
) {
    let caller = Caller { principal, scope, client: Client::gateway(), affinity: Affinity::Shared };
    let request = McpRequest::new(method, params).with_caller(Arc::new(caller));
    let _ = call(service, request).await;
}

/// The request's context. The outer result is what to say when the version header is in order, too.
#[allow(clippy::type_complexity)]
pub(in crate::server) fn client_of(
    params: &Params,
    id: &RequestId,
) -> Result<Result<Client, Refusal>, Refusal> {
    let missing =
        |key: &str| Refusal::new(Some(id.clone()), code::INVALID_PARAMS, format!("`_meta` needs `{key}`"));
    let Some(m) = params.meta() else { return Err(missing(meta::PROTOCOL_VERSION)) };
    let Some(version) = m.get_string(meta::PROTOCOL_VERSION) else {
        return Err(missing(meta::PROTOCOL_VERSION));
    };
    Ok(client(m, &version, id)
        .map_err(|refused| refused.unwrap_or_else(|| missing(meta::CLIENT_CAPABILITIES))))
}

fn client(m: &RawObject, version: &str, id: &RequestId) -> Result<Client, Option<Refusal>> {
    let version = match version.parse::<ProtocolVersion>() {
        Ok(version) if version.era() == Era::Modern => version,
        _ => return Err(Some(unsupported(id, version))),
    };
    let wrong = |key: &str| {
        Some(Refusal::new(
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

fn unsupported(id: &RequestId, requested: &str) -> Refusal {
    let supported: Vec<&str> = ProtocolVersion::ALL
        .iter()
        .filter(|v| **v > ProtocolVersion::V2024_11_05)
        .map(|v| v.as_str())
        .collect();
    let error = RpcError::new(code::UNSUPPORTED_VERSION, "Unsupported protocol version")
        .with_data(&json!({ "supported": supported, "requested": requested }));
    Refusal { id: Some(id.clone()), error }
}

/// Answers a request. A subscription ends in good order when `drained` is done.
pub(in crate::server) async fn answer<S: McpService>(
    service: S,
    request: McpRequest,
    id: RequestId,
    drained: impl Future<Output = ()> + Send + 'static,
) -> Answer {
    let method = request.method().clone();
    let (payload, mut extensions) = call(service, request).await.into_parts();
    let hint = extensions.remove::<HttpHint>();
    match payload {
        Payload::Stream(frames) if method == Method::Listen => {
            Answer::Messages(subscription(frames, id, drained), hint)
        }
        Payload::Stream(frames) => Answer::Messages(stream_of(frames, id, method), hint),
        payload => {
            let code = match &payload {
                Payload::Error(error) => Some(error.code()),
                _ => None,
            };
            Answer::Message(message::response(&id, &method, payload, Era::Modern), code, hint)
        }
    }
}

/// The frames of one call. Dropping it cancels the call, which is what closing the stream means in this era.
fn stream_of(frames: FrameStream, id: RequestId, method: Method) -> Messages {
    let messages = frames.filter_map(move |frame| {
        future::ready(match frame {
            Ok(Frame::Notification(notification)) => Some(message::notification(&notification)),
            Ok(Frame::Final(payload)) => Some(message::response(&id, &method, payload, Era::Modern)),
            // This client cannot be asked in the middle of a call; dropped, the question is refused.
            Ok(Frame::Request(_)) => None,
            Err(error) => {
                tracing::warn!(%error, "a stream failed");
                Some(message::error(Some(&id), &RpcError::new(code::INTERNAL_ERROR, "internal error")))
            }
        })
    });
    Box::pin(messages)
}

/// The frames of a subscription, each with its id. It ends in good order when the server does.
fn subscription(
    frames: FrameStream,
    id: RequestId,
    drained: impl Future<Output = ()> + Send + 'static,
) -> Messages {
    let tag = id.clone();
    let messages = frames.filter_map(move |frame| {
        future::ready(match frame {
            Ok(Frame::Notification(notification)) => Some(message::notification(&tagged(notification, &tag))),
            _ => None,
        })
    });
    let end = json!({ "resultType": "complete" }).to_string();
    let mut end = RawObject::parse(end.into()).expect("this is an object");
    end.set("_meta", format!("{{\"{}\":{}}}", meta::SUBSCRIPTION_ID, id.as_str()));
    let last = message::response(&id, &Method::Listen, Payload::Raw(end.into_bytes()), Era::Modern);
    Box::pin(messages.take_until(drained).chain(stream::once(future::ready::<Chunks>(last))))
}

fn tagged(mut notification: Notification, id: &RequestId) -> Notification {
    let mut m = notification.params.meta().cloned().unwrap_or_else(RawObject::empty);
    m.set(meta::SUBSCRIPTION_ID, id.as_str());
    notification.params.object_mut().set("_meta", m.as_str());
    notification
}
