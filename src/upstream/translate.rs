//! What a request looks like to an upstream of either era, and what a legacy upstream's answers look like inside.
//!
//! Inside the stack everything is as in MCP 2026-07-28. The functions here are the whole difference.

use bytes::Bytes;
use futures_util::stream;
use serde_json::{Value, json};
use tokio::sync::broadcast;

use crate::{
    error::InvalidParams,
    identity::Client,
    protocol::{
        Frame, FrameStream, ListenFilter, McpRequest, Method, Notification, Params, Payload, ProtocolVersion,
        RawObject, ResultType, ServerName, meta,
    },
};

/// Params for a modern upstream: `_meta` carries version, client and capabilities. A modern client wrote them
/// itself, and then the bytes stay.
pub(crate) fn modern_params(request: &McpRequest, version: ProtocolVersion) -> Params {
    let client = &request.caller().client;
    let meta = request.params().meta();
    let quoted = format!("\"{version}\"");
    let has = |key: &str| meta.is_some_and(|m| m.get(key).is_some());
    let mut added = Vec::new();
    if meta.and_then(|m| m.get(meta::PROTOCOL_VERSION)) != Some(&quoted) {
        added.push((meta::PROTOCOL_VERSION, quoted.as_str()));
    }
    if let (false, Some(info)) = (has(meta::CLIENT_INFO), &client.info) {
        added.push((meta::CLIENT_INFO, text(info)));
    }
    if !has(meta::CLIENT_CAPABILITIES) {
        added.push((meta::CLIENT_CAPABILITIES, text(&client.capabilities)));
    }
    if let (false, Some(level)) = (has(meta::LOG_LEVEL), &client.log_level) {
        added.push((meta::LOG_LEVEL, text(level)));
    }
    let mut params = request.params().clone();
    if !added.is_empty() {
        let mut m = meta.cloned().unwrap_or_else(RawObject::empty);
        added.iter().for_each(|(key, json)| m.set(key, json));
        params.object_mut().set("_meta", m.as_str());
    }
    params
}

/// Params for a legacy upstream: without the `_meta` keys that session knows already.
pub(crate) fn legacy_params(request: &McpRequest) -> Params {
    let mut params = request.params().clone();
    let Some(mut m) = params.meta().cloned() else { return params };
    let before = m.len();
    for key in [meta::PROTOCOL_VERSION, meta::CLIENT_INFO, meta::CLIENT_CAPABILITIES, meta::LOG_LEVEL] {
        m.remove(key);
    }
    match m.len() {
        0 => params.object_mut().remove("_meta"),
        left if left < before => params.object_mut().set("_meta", m.as_str()),
        _ => {}
    }
    params
}

/// The same for a request that a client sent. To ask in several rounds is of the modern era: a legacy upstream never gave
/// out a state, and whoever brings one has it from somewhere else.
pub(crate) fn checked_legacy_params(request: &McpRequest) -> Result<Params, InvalidParams> {
    if request.params().get("requestState").is_some() {
        return Err(InvalidParams(
            "`requestState` is not known here or has expired: call again without it".into(),
        ));
    }
    let mut params = legacy_params(request);
    if params.get("inputResponses").is_some() {
        params.object_mut().remove("inputResponses");
    }
    Ok(params)
}

/// The params of `initialize` for a session on behalf of `client`.
pub(crate) fn initialize_params(client: &Client) -> Value {
    let info = client.info.as_deref().and_then(|info| serde_json::from_slice::<Value>(info).ok());
    let capabilities = serde_json::from_slice::<Value>(&client.capabilities).unwrap_or_else(|_| json!({}));
    json!({
        "protocolVersion": ProtocolVersion::LATEST_LEGACY.as_str(),
        "capabilities": capabilities,
        "clientInfo": info.unwrap_or_else(|| json!({ "name": "portcullis", "version": env!("CARGO_PKG_VERSION") })),
    })
}

/// A legacy `initialize` result as the answer to `server/discover`.
pub(crate) fn discover_result(initialized: &RawObject) -> Bytes {
    let version = initialized.get("protocolVersion").unwrap_or("\"2025-11-25\"");
    let mut result = RawObject::empty();
    result.set("resultType", "\"complete\"");
    result.set("supportedVersions", format!("[{version}]"));
    result.set("capabilities", initialized.get("capabilities").unwrap_or("{}"));
    if let Some(instructions) = initialized.get("instructions").filter(|text| *text != "null") {
        result.set("instructions", instructions);
    }
    if let Some(info) = initialized.get("serverInfo") {
        result.set("_meta", format!("{{\"{}\":{info}}}", meta::SERVER_INFO));
    }
    result.set("ttlMs", "0");
    result.set("cacheScope", "\"private\"");
    result.into_bytes()
}

/// The answer of a legacy upstream to `subscriptions/listen`: its unsolicited notifications, as far as wanted. The
/// stream ends when the connection does. Whoever falls behind misses notifications, not the newest ones: all of
/// them say "look again", so the last is as good as all.
pub(crate) fn listen_stream(
    filter: ListenFilter,
    notifications: broadcast::Receiver<Notification>,
) -> FrameStream {
    let first = Frame::Notification(filter.acknowledged());
    let rest = stream::unfold((filter, notifications), |(filter, mut notifications)| async move {
        loop {
            match notifications.recv().await {
                Ok(n) if filter.wants(&n) => {
                    return Some((Ok(Frame::Notification(n)), (filter, notifications)));
                }
                Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    });
    use futures_util::StreamExt as _;
    Box::pin(stream::iter([Ok(first)]).chain(rest))
}

/// A question on its way to a client, in the name of who asks: the person who answers an elicitation must know which
/// server that is (MCP 2025-11-25, elicitation, security considerations). The client sees one server, us.
pub(crate) fn sign_question(upstream: &ServerName, method: &Method, mut params: Params) -> Params {
    if *method == Method::Elicit {
        let message = params.get_string("message").unwrap_or_default();
        let signed = Value::from(format!("[{upstream}] {message}")).to_string();
        params.object_mut().set("message", signed);
    }
    params
}

/// A modern upstream's result, its questions in its name.
pub(crate) fn sign_result(upstream: &ServerName, payload: Payload) -> Payload {
    match (ResultType::of(&payload), &payload) {
        (ResultType::InputRequired, Payload::Raw(json)) => match sign_questions(upstream, json.clone()) {
            Some(signed) => Payload::Raw(signed),
            None => payload,
        },
        _ => payload,
    }
}

fn sign_questions(upstream: &ServerName, result: Bytes) -> Option<Bytes> {
    let mut result = RawObject::parse(result).ok()?;
    let mut questions = result.get_object("inputRequests")?;
    let read: Vec<(String, RawObject)> = questions
        .iter()
        .filter_map(|(key, question)| {
            Some((key.to_owned(), RawObject::parse(question.to_owned().into()).ok()?))
        })
        .collect();
    for (key, mut question) in read {
        let method = Method::from(&*question.get_string("method")?);
        if let Some(params) = question.get_bytes("params").and_then(|params| Params::parse(params).ok()) {
            question.set("params", sign_question(upstream, &method, params).as_str());
            questions.set(&key, question.as_str());
        }
    }
    result.set("inputRequests", questions.as_str());
    Some(result.into_bytes())
}

/// JSON bytes that were text before.
pub(crate) fn text(json: &Bytes) -> &str {
    std::str::from_utf8(json).expect("JSON that was parsed is UTF-8")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(params: Value) -> McpRequest {
        McpRequest::new(Method::ToolsCall, Params::from_value(&params))
    }

    #[test]
    fn a_modern_clients_params_stay_the_bytes_they_were() {
        let text = r#"{"name":"a", "x":1e400,"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientInfo":{},"io.modelcontextprotocol/clientCapabilities":{}}}"#;
        let request = McpRequest::new(Method::ToolsCall, Params::parse(text.into()).unwrap());
        assert_eq!(modern_params(&request, ProtocolVersion::LATEST).as_str(), text);
    }

    #[test]
    fn a_legacy_clients_params_gain_the_context() {
        let params = modern_params(&request(json!({ "name": "a" })), ProtocolVersion::LATEST);
        let m = params.meta().unwrap();
        assert_eq!(m.get(meta::PROTOCOL_VERSION), Some("\"2026-07-28\""));
        assert_eq!(m.get(meta::CLIENT_CAPABILITIES), Some("{}"));
    }

    #[test]
    fn a_legacy_upstream_sees_no_modern_keys() {
        let m = json!({ meta::PROTOCOL_VERSION: "2026-07-28", "progressToken": 7 });
        let params = legacy_params(&request(json!({ "name": "a", "_meta": m })));
        assert_eq!(params.as_str(), r#"{"_meta":{"progressToken":7},"name":"a"}"#);
        let m = json!({ meta::PROTOCOL_VERSION: "2026-07-28" });
        assert_eq!(legacy_params(&request(json!({ "name": "a", "_meta": m }))).as_str(), r#"{"name":"a"}"#);
    }

    #[test]
    fn a_legacy_upstream_gets_no_state_and_no_answers() {
        let params = json!({ "inputResponses": {}, "name": "a" });
        assert_eq!(checked_legacy_params(&request(params)).unwrap().as_str(), r#"{"name":"a"}"#);
        let error = checked_legacy_params(&request(json!({ "name": "a", "requestState": "x" }))).unwrap_err();
        assert!(error.to_string().starts_with("`requestState` is not known here"), "{error}");
    }

    #[test]
    fn whoever_asks_a_person_is_named() {
        let result = r#"{"x":1e400,"resultType":"input_required","inputRequests":{"a":{"method":"elicitation/create","params":{"message":"Which?"}},"b":{"method":"roots/list"}}}"#;
        let Payload::Raw(signed) = sign_result(&"files".parse().unwrap(), Payload::Raw(result.into())) else {
            panic!()
        };
        assert_eq!(text(&signed), result.replace("Which?", "[files] Which?"));
    }
}
