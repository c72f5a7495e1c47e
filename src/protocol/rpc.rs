//! JSON-RPC errors, and the codes this gateway speaks.

use std::{borrow::Cow, fmt};

use bytes::Bytes;
use serde_json::Value;

use super::RawObject;

/// Error codes. JSON-RPC's own, MCP's (2026-07-28, basic, error codes), and this gateway's, which stand outside
/// the range that JSON-RPC reserves (-32768..=-32000), as the specification asks.
pub mod code {
    /// The body is not JSON.
    pub const PARSE_ERROR: i64 = -32700;
    /// The body is JSON but no JSON-RPC message.
    pub const INVALID_REQUEST: i64 = -32600;
    /// Nobody here implements the method.
    pub const METHOD_NOT_FOUND: i64 = -32601;
    /// The params are wrong: also an unknown tool, prompt or resource.
    pub const INVALID_PARAMS: i64 = -32602;
    /// A defect on our side.
    pub const INTERNAL_ERROR: i64 = -32603;
    /// Legacy era only: no such resource. The modern era says [`INVALID_PARAMS`].
    pub const LEGACY_RESOURCE_NOT_FOUND: i64 = -32002;
    /// Legacy era only: URLs must be visited first. The modern era has a result for that.
    pub const LEGACY_URL_ELICITATION_REQUIRED: i64 = -32042;
    /// A header does not say what the body says.
    pub const HEADER_MISMATCH: i64 = -32020;
    /// The upstream needs something the client did not declare.
    pub const MISSING_CAPABILITY: i64 = -32021;
    /// The protocol version is not served here.
    pub const UNSUPPORTED_VERSION: i64 = -32022;

    /// A layer refused the request.
    pub const REFUSED: i64 = -31403;
    /// Too many requests at once for this upstream; try again.
    pub const OVERLOADED: i64 = -31429;
    /// The upstream answered something that is not MCP.
    pub const BAD_UPSTREAM: i64 = -31502;
    /// The upstream cannot be reached now.
    pub const UNAVAILABLE: i64 = -31503;
    /// The upstream did not answer in time.
    pub const TIMED_OUT: i64 = -31504;
}

/// A JSON-RPC error object. One that an upstream sent keeps its bytes.
#[derive(Clone)]
pub struct RpcError {
    code: i64,
    message: String,
    raw: Bytes,
}

impl RpcError {
    /// A new error.
    pub fn new(code: i64, message: impl Into<String>) -> Self {
        Self::build(code, message.into(), None)
    }

    /// The same with `data`.
    #[must_use]
    pub fn with_data(self, data: &Value) -> Self {
        Self::build(self.code, self.message, Some(data))
    }

    /// Reads an error object. `code` and `message` must be there, anything else is kept.
    pub fn parse(raw: Bytes) -> Result<Self, serde_json::Error> {
        use serde::de::Error as _;
        let object = RawObject::parse(raw.clone())?;
        let code = object.get_as("code").ok_or_else(|| serde_json::Error::missing_field("code"))??;
        let message = object.get_string("message").unwrap_or(Cow::Borrowed("")).into_owned();
        Ok(RpcError { code, message, raw })
    }

    /// The code.
    pub fn code(&self) -> i64 {
        self.code
    }

    /// The message.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The whole object as JSON.
    pub fn as_bytes(&self) -> &Bytes {
        &self.raw
    }

    fn build(code: i64, message: String, data: Option<&Value>) -> Self {
        let mut object = serde_json::json!({ "code": code, "message": message });
        if let Some(data) = data {
            object["data"] = data.clone();
        }
        RpcError { code, message, raw: object.to_string().into() }
    }
}

impl fmt::Debug for RpcError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RpcError").field("code", &self.code).field("message", &self.message).finish()
    }
}

impl fmt::Display for RpcError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.message, self.code)
    }
}

impl std::error::Error for RpcError {}
