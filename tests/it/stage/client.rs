//! Clients of both eras, as they write to the wire.

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicU64, Ordering},
};

use http::Method;
use serde_json::{Value, json};

use super::{Answer, Request, Stream};

/// The `_meta` of a modern request, as JSON text.
pub(crate) const META: &str = r#"{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientInfo":{"name":"story","version":"1"},"io.modelcontextprotocol/clientCapabilities":{}}"#;

/// A client of 2026-07-28.
#[derive(Clone)]
pub(crate) struct Modern {
    address: SocketAddr,
    path: String,
    capabilities: Value,
}

impl Modern {
    pub(crate) fn of(address: SocketAddr) -> Self {
        Modern { address, path: "/mcp".to_owned(), capabilities: json!({}) }
    }

    pub(crate) fn at(self, path: &str) -> Self {
        Modern { path: path.to_owned(), ..self }
    }

    pub(crate) fn declaring(self, capabilities: Value) -> Self {
        Modern { capabilities, ..self }
    }

    /// A request in good order.
    pub(crate) fn request(&self, method: &str, mut params: Value) -> Request {
        let mut meta: Value = serde_json::from_str(META).expect("JSON");
        meta["io.modelcontextprotocol/clientCapabilities"] = self.capabilities.clone();
        for (key, value) in params["_meta"].as_object().into_iter().flatten() {
            meta[key] = value.clone();
        }
        params["_meta"] = meta;
        let member = if method == "resources/read" { "uri" } else { "name" };
        let name = params[member].as_str().map(str::to_owned);
        let body = json!({ "jsonrpc": "2.0", "id": 1, "method": method, "params": params });
        let request = self.raw(method, body.to_string());
        let named = ["tools/call", "prompts/get", "resources/read"].contains(&method);
        match name.filter(|_| named) {
            Some(name) => request.header("mcp-name", &portcullis::protocol::encode_header(&name)),
            None => request,
        }
    }

    /// A body as it is, with the headers of `method`.
    pub(crate) fn raw(&self, method: &str, body: impl Into<bytes::Bytes>) -> Request {
        Request::post(self.address, &self.path, body)
            .header("mcp-protocol-version", "2026-07-28")
            .header("mcp-method", method)
    }

    pub(crate) async fn ask(&self, method: &str, params: Value) -> Answer {
        self.request(method, params).send().await
    }

    pub(crate) async fn call(&self, tool: &str, arguments: Value) -> Answer {
        self.ask("tools/call", json!({ "name": tool, "arguments": arguments })).await
    }

    /// The names in `tools/list`.
    pub(crate) async fn tools(&self) -> Vec<String> {
        names(&self.ask("tools/list", json!({})).await.result()["tools"])
    }
}

/// The `name` of each.
pub(crate) fn names(items: &Value) -> Vec<String> {
    let items = items.as_array().expect("a list");
    items.iter().map(|item| item["name"].as_str().expect("a name").to_owned()).collect()
}

/// A client of the legacy era, in its session.
pub(crate) struct Legacy {
    address: SocketAddr,
    path: String,
    pub(crate) session: String,
    version: String,
    user: Option<String>,
    next_id: AtomicU64,
}

impl Legacy {
    /// Opens a session.
    pub(crate) async fn open(address: SocketAddr, capabilities: Value) -> Self {
        Legacy::open_as(None, address, "/mcp", "2025-11-25", capabilities).await
    }

    pub(crate) async fn open_as(
        user: Option<&str>,
        address: SocketAddr,
        path: &str,
        version: &str,
        capabilities: Value,
    ) -> Self {
        let mut initialize = Request::post(address, path, Legacy::initialize(version, capabilities));
        if let Some(user) = user {
            initialize = initialize.header("x-user", user);
        }
        let answer = initialize.send().await;
        let session = answer.header("mcp-session-id").unwrap_or_else(|| panic!("no session: {answer}"));
        let version = answer.result()["protocolVersion"].as_str().expect("a version").to_owned();
        let client = Legacy {
            address,
            path: path.to_owned(),
            session: session.to_owned(),
            version,
            user: user.map(str::to_owned),
            next_id: AtomicU64::new(1),
        };
        assert_eq!(client.notify("notifications/initialized", json!({})).await.status, 202);
        client
    }

    /// The message that opens a session.
    pub(crate) fn initialize(version: &str, capabilities: Value) -> String {
        let info = json!({ "name": "story", "version": "1" });
        let params = json!({ "protocolVersion": version, "capabilities": capabilities, "clientInfo": info });
        json!({ "jsonrpc": "2.0", "id": 0, "method": "initialize", "params": params }).to_string()
    }

    /// A body as it is, within the session.
    pub(crate) fn raw(&self, body: impl Into<bytes::Bytes>) -> Request {
        self.dressed(Request::post(self.address, &self.path, body))
    }

    pub(crate) fn request(&self, method: &str, params: Value) -> Request {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        self.request_with_id(json!(id), method, params)
    }

    pub(crate) fn request_with_id(&self, id: Value, method: &str, params: Value) -> Request {
        self.raw(json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params }).to_string())
    }

    pub(crate) async fn ask(&self, method: &str, params: Value) -> Answer {
        self.request(method, params).send().await
    }

    pub(crate) async fn call(&self, tool: &str, arguments: Value) -> Answer {
        self.ask("tools/call", json!({ "name": tool, "arguments": arguments })).await
    }

    pub(crate) async fn notify(&self, method: &str, params: Value) -> Answer {
        self.raw(json!({ "jsonrpc": "2.0", "method": method, "params": params }).to_string()).send().await
    }

    /// Answers a question of the server.
    pub(crate) async fn answer(&self, question: &Value, result: Value) {
        let body = json!({ "jsonrpc": "2.0", "id": question["id"], "result": result }).to_string();
        assert_eq!(self.raw(body).send().await.status, 202);
    }

    /// The stream for what belongs to no request.
    pub(crate) async fn listen(&self) -> Stream {
        let stream = self.bare(Method::GET).header("accept", "text/event-stream").open().await;
        assert_eq!(stream.status, 200);
        stream
    }

    /// `DELETE`.
    pub(crate) async fn end(&self) -> Answer {
        self.bare(Method::DELETE).send().await
    }

    /// A request without a body, within the session.
    pub(crate) fn bare(&self, method: Method) -> Request {
        self.dressed(Request::new(self.address, method, &self.path))
    }

    fn dressed(&self, request: Request) -> Request {
        let request =
            request.header("mcp-session-id", &self.session).header("mcp-protocol-version", &self.version);
        match &self.user {
            Some(user) => request.header("x-user", user),
            None => request,
        }
    }
}
