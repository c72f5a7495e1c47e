//! Two small upstreams inside the gateway, for trying it out: `clock` and `notes`.
//!
//! Each is an [`McpService`](crate::McpService) made of nothing but this library's own types, so this file is also the shortest
//! answer to "how do I write an upstream by hand?". What they keep is in memory and ends with them.
//!
//! ```
//! use portcullis::{demo, protocol::McpRequest};
//! use tower::ServiceExt as _;
//!
//! # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
//! let clock = demo::service("clock").expect("clock is built in");
//! let request = McpRequest::call_tool("add_days", serde_json::json!({ "date": "2024-02-28", "days": 2 }));
//! let answer = clock.oneshot(request).await?.payload().to_value().unwrap();
//! assert_eq!(answer["structuredContent"]["date"], "2024-03-01");
//! # Ok::<_, portcullis::BoxError>(()) }).unwrap();
//! ```

mod clock;
mod notes;

use serde_json::{Map, Value, json};

use crate::{
    BoxMcpService,
    protocol::{McpRequest, McpResponse, Method, RpcError, code},
    registry::{Origin, ServerRecord},
    upstream::{Transport, UpstreamSpec},
};

/// The upstream of that kind, new; `None` when there is none.
pub fn service(kind: &str) -> Option<BoxMcpService> {
    match kind {
        "clock" => Some(clock::service()),
        "notes" => Some(notes::service()),
        _ => None,
    }
}

/// The records that `serve --demo` adds.
pub fn servers() -> Vec<ServerRecord> {
    let record = |kind: &str| {
        let name = kind.parse().expect("a kind is a valid name");
        let spec = UpstreamSpec::new(Transport::Builtin { kind: kind.to_owned() });
        ServerRecord { origin: Origin::Demo, ..ServerRecord::new(name, spec) }
    };
    ["clock", "notes"].map(record).into()
}

// === what both need ===

/// What a server says of itself.
fn discover(name: &str, instructions: &str, capabilities: Value) -> McpResponse {
    complete(json!({
        "supportedVersions": ["2026-07-28"],
        "capabilities": capabilities,
        "serverInfo": { "name": name, "version": env!("CARGO_PKG_VERSION") },
        "instructions": instructions,
        "ttlMs": 0,
        "cacheScope": "public",
    }))
}

/// A list, all on one page.
fn list(member: &str, items: Value) -> McpResponse {
    complete(json!({ member: items, "ttlMs": 0, "cacheScope": "public" }))
}

fn text_resource(uri: &str, text: &str) -> McpResponse {
    let contents = json!([{ "uri": uri, "mimeType": "text/plain", "text": text }]);
    complete(json!({ "contents": contents, "ttlMs": 0, "cacheScope": "private" }))
}

/// What a tool found: for a person as text, for a program as it is.
fn found(text: impl Into<String>, structured: Value) -> McpResponse {
    let content = json!([{ "type": "text", "text": text.into() }]);
    complete(json!({ "content": content, "structuredContent": structured }))
}

/// A tool that cannot do what it was asked says so in its result, where a model can read it.
fn failed(why: impl Into<String>) -> McpResponse {
    complete(json!({ "content": [{ "type": "text", "text": why.into() }], "isError": true }))
}

fn complete(mut result: Value) -> McpResponse {
    result["resultType"] = json!("complete");
    McpResponse::value(result)
}

fn unknown(request: &McpRequest) -> McpResponse {
    let error = match request.target() {
        Some(target) => {
            let said = format!("Unknown {}: {}", target.kind(), target.name());
            RpcError::new(code::INVALID_PARAMS, said)
        }
        None => RpcError::new(code::METHOD_NOT_FOUND, format!("Method not found: {}", request.method())),
    };
    McpResponse::error(error)
}

/// The name or URI that the request is about; empty when there is none.
fn target(request: &McpRequest) -> &str {
    request.target().map_or("", |target| target.name())
}

/// A call's arguments; none are as good as an empty object.
fn arguments(request: &McpRequest) -> Map<String, Value> {
    debug_assert!(matches!(request.method(), Method::ToolsCall | Method::PromptsGet));
    request.params().get_as("arguments").and_then(Result::ok).unwrap_or_default()
}
