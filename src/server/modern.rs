//! The modern era: every request stands by itself, whatever the door.

use std::{pin::Pin, sync::Arc};

use futures_core::Stream;
use futures_util::{StreamExt as _, future};
use serde_json::{Value, json};

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
        ProtocolVersion, RawObject, RequestId, ResultType, RpcError, code, meta,
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
    /// A subscription: what it tells, and the answer, which says that it is over.
    Subscription(Messages, Chunks, Option<HttpHint>),
}

/// The version that a message's own `_meta` names.
pub(in crate::server) fn named_version(params: &Params) -> Option<std::borrow::Cow<'_, str>> {
    params.meta()?.get_string(meta::PROTOCOL_VERSION)
}

/// Whether it is one that no `initialize` leads to.
pub(in crate::server) fn is_modern_version(version: &str) -> bool {
    !version.parse::<ProtocolVersion>().is_ok_and(|version| version.era() == Era::Legacy)
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

/// Answers a request.
pub(in crate::server) async fn answer<S: McpService>(
    service: S,
    request: McpRequest,
    id: RequestId,
) -> Answer {
    let method = request.method().clone();
    let caller = request.caller().clone();
    let (payload, mut extensions) = call(service, request).await.into_parts();
    let hint = extensions.remove::<HttpHint>();
    match payload {
        Payload::Stream(frames) if method == Method::Listen => {
            let last = end_of_subscription(&id);
            Answer::Subscription(subscription(frames, id), last, hint)
        }
        Payload::Stream(frames) => Answer::Messages(stream_of(frames, id, method, caller), hint),
        payload => {
            let (payload, mark) = declared(payload, &caller.client);
            let code = match &payload {
                Payload::Error(error) => Some(error.code()),
                _ => None,
            };
            Answer::Message(message::marked_response(&id, &method, payload, mark, Era::Modern), code, hint)
        }
    }
}

/// The frames of one call. Dropping it cancels the call.
fn stream_of(frames: FrameStream, id: RequestId, method: Method, caller: Arc<Caller>) -> Messages {
    let messages = frames.filter_map(move |frame| {
        future::ready(match frame {
            Ok(Frame::Notification(n)) => {
                let wanted = n.method != Method::LogMessage || caller.client.wants_log(&n.params);
                wanted.then(|| message::notification(&n))
            }
            Ok(Frame::Final(payload)) => {
                let (payload, mark) = declared(payload, &caller.client);
                Some(message::marked_response(&id, &method, payload, mark, Era::Modern))
            }
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

// === questions in a result ===

/// A client is never shown a question that it did not declare to answer (patterns, multi round-trip requests, server
/// requirements). Only results that ask are looked into.
fn declared(payload: Payload, client: &Client) -> (Payload, ResultType) {
    let mark = ResultType::of(&payload);
    if mark != ResultType::InputRequired {
        return (payload, mark);
    }
    match payload.to_object().ok_or_else(unreadable).and_then(|result| check_questions(&result, client)) {
        Ok(()) => (payload, mark),
        Err(error) => (Payload::Error(error), ResultType::Other),
    }
}

fn check_questions(result: &RawObject, client: &Client) -> Result<(), RpcError> {
    let Some(questions) = result.get_bytes("inputRequests") else { return Ok(()) };
    let questions = RawObject::parse(questions).map_err(|_| unreadable())?;
    let mut missing: Option<RpcError> = None;
    let mut required = json!({});
    for (_, question) in questions.iter() {
        let question = RawObject::parse(question.to_owned().into()).map_err(|_| unreadable())?;
        let method = Method::from(&*question.get_string("method").ok_or_else(unreadable)?);
        let params = match question.get_bytes("params") {
            Some(params) => Params::parse(params).map_err(|_| unreadable())?,
            None => Params::default(),
        };
        match client.can_answer(&method, &params) {
            Ok(()) => {}
            Err(error) if error.code() == code::MISSING_CAPABILITY => {
                merge(&mut required, &required_by(&error));
                missing.get_or_insert(error);
            }
            // What no client can be asked.
            Err(_) => return Err(unreadable()),
        }
    }
    match missing {
        None => Ok(()),
        Some(error) => Err(error.with_data(&json!({ "requiredCapabilities": required }))),
    }
}

fn unreadable() -> RpcError {
    RpcError::new(code::BAD_UPSTREAM, "the upstream asks for input in a way that cannot be read")
}

fn required_by(error: &RpcError) -> Value {
    let error: Value = serde_json::from_slice(error.as_bytes()).unwrap_or_default();
    error["data"]["requiredCapabilities"].clone()
}

/// Adds what `more` has, to any depth.
fn merge(into: &mut Value, more: &Value) {
    match (into, more) {
        (Value::Object(into), Value::Object(more)) => {
            more.iter().for_each(|(key, value)| merge(into.entry(key).or_insert(json!({})), value));
        }
        (into, more) => *into = more.clone(),
    }
}

// === subscriptions ===

/// What a subscription tells, each message with its id.
fn subscription(frames: FrameStream, id: RequestId) -> Messages {
    let messages = frames.filter_map(move |frame| {
        future::ready(match frame {
            Ok(Frame::Notification(notification)) => Some(message::notification(&tagged(notification, &id))),
            _ => None,
        })
    });
    Box::pin(messages)
}

/// The answer to a subscription that ends in good order.
fn end_of_subscription(id: &RequestId) -> Chunks {
    let mut end = RawObject::empty();
    end.set("resultType", "\"complete\"");
    end.set("_meta", format!("{{\"{}\":{}}}", meta::SUBSCRIPTION_ID, id.as_str()));
    message::response(id, &Method::Listen, Payload::Raw(end.into_bytes()), Era::Modern)
}

/// Says that the server ends a subscription, where no stream of its own could end.
pub(in crate::server) fn cancelled_subscription(id: &RequestId) -> Chunks {
    let mut params = Params::default();
    params.object_mut().set("requestId", id.as_str());
    let notification = Notification { method: Method::Cancelled, params };
    message::notification(&tagged(notification, id))
}

fn tagged(mut notification: Notification, id: &RequestId) -> Notification {
    let mut m = notification.params.meta().cloned().unwrap_or_else(RawObject::empty);
    m.set(meta::SUBSCRIPTION_ID, id.as_str());
    notification.params.object_mut().set("_meta", m.as_str());
    notification
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(questions: &Value, capabilities: &'static str) -> Payload {
        let client = Client { capabilities: capabilities.into(), ..Client::gateway() };
        let result = json!({ "resultType": "input_required", "inputRequests": questions });
        declared(Payload::Raw(result.to_string().into()), &client).0
    }

    #[test]
    fn nobody_is_shown_a_question_they_did_not_declare() {
        let questions = json!({
            "a": { "method": "elicitation/create", "params": { "mode": "url", "url": "https://x" } },
            "b": { "method": "roots/list" },
            "c": { "method": "elicitation/create", "params": { "message": "?" } },
        });
        let all = r#"{"elicitation":{"form":{},"url":{}},"roots":{}}"#;
        assert!(matches!(asked(&questions, all), Payload::Raw(_)));
        let Payload::Error(error) = asked(&questions, r#"{"elicitation":{}}"#) else { panic!() };
        assert_eq!(error.code(), code::MISSING_CAPABILITY);
        assert_eq!(required_by(&error), json!({ "elicitation": { "url": {} }, "roots": {} }));
    }

    #[test]
    fn what_cannot_be_a_question_is_the_upstreams_fault() {
        for questions in
            [json!([]), json!({ "a": 1 }), json!({ "a": {} }), json!({ "a": { "method": "x/y" } })]
        {
            let Payload::Error(error) = asked(&questions, "{}") else { panic!("{questions}") };
            assert_eq!(error.code(), code::BAD_UPSTREAM, "{questions}");
        }
        // Only state, and nothing to ask.
        let result = Payload::Raw(r#"{"resultType":"input_required","requestState":"s"}"#.into());
        assert!(matches!(declared(result, &Client::gateway()), (Payload::Raw(_), ResultType::InputRequired)));
    }
}
