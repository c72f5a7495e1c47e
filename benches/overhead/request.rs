//! The requests of the load generator as finished bytes: head, body and a place to write the next id.
//!
//! Ids have a fixed width, so a connection sends ever new ids by patching ten digits in place.

use memchr::memmem;
use serde_json::{Value, json};

use crate::canned::Era;

pub(crate) const MODERN: &str = "2026-07-28";
pub(crate) const LEGACY: &str = "2025-11-25";

/// The first id; every id has as many digits.
pub(crate) const FIRST_ID: u64 = 1_000_000_000;
pub(crate) const ID_DIGITS: usize = 10;

/// Where a server listens: all that a request's head needs to know of it.
#[derive(Clone, Debug)]
pub(crate) struct Endpoint {
    pub(crate) port: u16,
    pub(crate) path: String,
}

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    Call(String),
    /// A call of a tool that asks something back.
    Question(String),
    List,
    Initialize,
    Initialized,
}

/// A request ready to be written to a socket.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    bytes: Vec<u8>,
    id_at: Option<usize>,
}

// === impl Ask ===

impl Ask {
    pub(crate) fn method(&self) -> &'static str {
        match self {
            Ask::Call(_) | Ask::Question(_) => "tools/call",
            Ask::List => "tools/list",
            Ask::Initialize => "initialize",
            Ask::Initialized => "notifications/initialized",
        }
    }

    /// What the client declares: what it must, for what it asks.
    fn capabilities(&self) -> Value {
        match self {
            Ask::Question(_) => json!({ "elicitation": {} }),
            _ => json!({}),
        }
    }

    fn params(&self) -> Value {
        match self {
            Ask::Call(name) | Ask::Question(name) => {
                json!({ "name": name, "arguments": { "query": "minutes of March", "limit": 10 } })
            }
            Ask::List | Ask::Initialized => json!({}),
            Ask::Initialize => json!({
                "protocolVersion": LEGACY,
                "capabilities": {},
                "clientInfo": { "name": "overhead", "version": "1.0.0" }
            }),
        }
    }
}

// === impl Request ===

impl Request {
    /// Writes out `ask` for `endpoint`, in the terms of `era`; a legacy one belongs to `session`.
    pub(crate) fn new(endpoint: &Endpoint, era: Era, session: Option<&str>, ask: &Ask) -> Request {
        let body = body(era, ask).to_string();
        let mut head = format!(
            "POST {} HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nAccept: application/json, text/event-stream\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n",
            endpoint.path,
            endpoint.port,
            body.len()
        );
        for (name, value) in headers(era, session, ask) {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        let bytes = format!("{head}\r\n{body}").into_bytes();
        let id = format!("\"id\":{FIRST_ID}");
        let id_at = memmem::find(&bytes, id.as_bytes()).map(|at| at + id.len() - ID_DIGITS);
        Request { bytes, id_at }
    }

    /// Ends `session`.
    pub(crate) fn goodbye(endpoint: &Endpoint, session: &str) -> Request {
        let Endpoint { port, path } = endpoint;
        let bytes = format!(
            "DELETE {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nMCP-Protocol-Version: {LEGACY}\r\n\
             Mcp-Session-Id: {session}\r\n\r\n"
        );
        Request { bytes: bytes.into_bytes(), id_at: None }
    }

    /// The bytes, carrying `id` if this request carries one.
    pub(crate) fn with_id(&mut self, id: u64) -> &[u8] {
        if let Some(at) = self.id_at {
            let mut rest = id;
            for digit in self.bytes[at..at + ID_DIGITS].iter_mut().rev() {
                *digit = b'0' + (rest % 10) as u8;
                rest /= 10;
            }
        }
        &self.bytes
    }
}

fn headers<'a>(era: Era, session: Option<&'a str>, ask: &'a Ask) -> Vec<(&'static str, &'a str)> {
    let mut headers = Vec::new();
    match era {
        Era::Modern => {
            headers.push(("MCP-Protocol-Version", MODERN));
            headers.push(("Mcp-Method", ask.method()));
            if let Ask::Call(name) | Ask::Question(name) = ask {
                headers.push(("Mcp-Name", name));
            }
        }
        Era::Legacy if *ask != Ask::Initialize => headers.push(("MCP-Protocol-Version", LEGACY)),
        Era::Legacy => {}
    }
    if let Some(session) = session {
        headers.push(("Mcp-Session-Id", session));
    }
    headers
}

fn body(era: Era, ask: &Ask) -> Value {
    let mut params = ask.params();
    if era == Era::Modern {
        params["_meta"] = json!({
            "io.modelcontextprotocol/protocolVersion": MODERN,
            "io.modelcontextprotocol/clientInfo": { "name": "overhead", "version": "1.0.0" },
            "io.modelcontextprotocol/clientCapabilities": ask.capabilities()
        });
    }
    let mut message = json!({ "jsonrpc": "2.0", "method": ask.method(), "params": params });
    if *ask != Ask::Initialized {
        message["id"] = FIRST_ID.into();
    }
    message
}
