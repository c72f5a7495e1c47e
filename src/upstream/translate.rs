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
        Frame, FrameStream, ListenFilter, McpRequest, Notification, Params, ProtocolVersion, RawObject, meta,
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

/// The same, of a request that a client may have made up: a legacy upstream gave out no state, and has no questions
/// that the answers in it could be to.
pub(crate) fn checked_legacy_params(request: &McpRequest) -> Result<Params, InvalidParams> {
    let mut params = legacy_params(request);
    match params.get("requestState") {
        None => {}
        Some("null") => params.object_mut().remove("requestState"),
        Some(_) => {
            let message = "`requestState` is not known here or has expired: call again without it";
            return Err(InvalidParams(message.into()));
        }
    }
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

/// JSON bytes that were text before.
pub(crate) fn text(json: &Bytes) -> &str {
    std::str::from_utf8(json).expect("JSON that was parsed is UTF-8")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Method;

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
    fn a_state_that_nobody_gave_out_is_refused() {
        let forged = request(json!({ "name": "a", "requestState": "s", "inputResponses": {} }));
        let error = checked_legacy_params(&forged).unwrap_err();
        assert!(error.to_string().starts_with("`requestState` is not known here"), "{error}");
        for odd in [
            json!({ "name": "a", "inputResponses": { "q": {} } }),
            json!({ "name": "a", "requestState": null }),
        ] {
            assert_eq!(checked_legacy_params(&request(odd)).unwrap().as_str(), r#"{"name":"a"}"#);
        }
        let text = r#"{ "name":"a", "x":1e400 }"#;
        let plain = McpRequest::new(Method::ToolsCall, Params::parse(text.into()).unwrap());
        assert_eq!(checked_legacy_params(&plain).unwrap().as_str(), text);
    }
}
