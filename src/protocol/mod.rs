//! MCP messages, raw first.
//!
//! A message is parsed once, as far as routing needs: id, method, the name it is about, the top-level members
//! of its params. Everything below that stays the bytes that came in, so what nobody opens leaves exactly as it
//! arrived: unknown fields, key order, numbers no float can hold. Typed views come from [`rmcp::model`], on
//! demand, and are never the carrier.
//!
//! ```
//! use portcullis::protocol::{Message, Method};
//!
//! let body = br#"{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"add","x":1e400}}"#;
//! let Message::Request { id, method, params } = Message::parse(body.as_slice().into())? else { panic!() };
//! assert_eq!((id.as_str(), &method), ("7", &Method::ToolsCall));
//! assert_eq!(params.get("x"), Some("1e400"));
//! # Ok::<(), portcullis::protocol::ParseError>(())
//! ```

mod cursor;
mod encode;
mod filter;
mod frame;
mod header;
mod items;
mod message;
mod method;
mod name;
mod raw;
mod request;
mod response;
mod result_type;
mod route;
mod rpc;
mod shape;
mod sign;
mod version;

pub use cursor::{Cursor, InvalidCursor};
pub use encode::{notification_json, request_json};
pub use filter::ListenFilter;
pub(crate) use filter::is_within;
pub use frame::{Frame, FrameStream, Notification, Reply, ServerRequest, Unsolicited};
pub use header::{MirroredHeaders, ParamHeader, ParamHeaders, decode_header, encode_header};
pub use items::{Item, ItemKind, ItemList};
pub use message::{Message, ParseError, RequestId};
pub use method::{Method, Target};
pub use name::{InvalidName, Naming, NamingMode, ServerName};
pub use raw::RawObject;
pub use request::{McpRequest, Params};
pub use response::{HttpHint, McpResponse, Payload};
pub use result_type::ResultType;
pub use route::Route;
pub use rpc::{RpcError, code};
pub use sign::{sign_question, sign_result};
pub use version::{Era, ProtocolVersion};

/// The `_meta` keys that the specification reserves for a request's context (MCP 2026-07-28, basic, `_meta`).
pub mod meta {
    /// Protocol version of this request.
    pub const PROTOCOL_VERSION: &str = "io.modelcontextprotocol/protocolVersion";
    /// Name and version of the client.
    pub const CLIENT_INFO: &str = "io.modelcontextprotocol/clientInfo";
    /// What the client can be asked.
    pub const CLIENT_CAPABILITIES: &str = "io.modelcontextprotocol/clientCapabilities";
    /// Opt-in to log notifications, with their least severe level.
    pub const LOG_LEVEL: &str = "io.modelcontextprotocol/logLevel";
    /// Name and version of the server, on results.
    pub const SERVER_INFO: &str = "io.modelcontextprotocol/serverInfo";
    /// The `subscriptions/listen` request a notification belongs to.
    pub const SUBSCRIPTION_ID: &str = "io.modelcontextprotocol/subscriptionId";
    /// The task a message belongs to (MCP 2025-11-25, tasks).
    pub const RELATED_TASK: &str = "io.modelcontextprotocol/related-task";
}

/// The extensions of MCP that need something of a gateway.
pub mod extension {
    /// Tasks of 2026-07-28.
    pub const TASKS: &str = "io.modelcontextprotocol/tasks";
    /// Skills.
    pub const SKILLS: &str = "io.modelcontextprotocol/skills";
}
