//! One request on its way through the stack.

use std::{
    ops::Deref,
    sync::{Arc, OnceLock},
};

use bytes::Bytes;
use http::Extensions;
use serde::de::DeserializeOwned;

use super::{Method, RawObject, RequestId, Target};
use crate::identity::{Caller, Principal, Scope};

/// A self-contained request or notification: whatever era the client speaks, it carries who asks and with what
/// capabilities, as MCP 2026-07-28 has it. Cloning is cheap.
///
/// ```
/// use portcullis::protocol::{McpRequest, Method, Target};
///
/// let request = McpRequest::call_tool("add", serde_json::json!({ "a": 1, "b": 2 }));
/// assert_eq!(request.target(), Some(&Target::Tool("add".into())));
/// assert_eq!(request.params().get("arguments"), Some(r#"{"a":1,"b":2}"#));
/// ```
#[derive(Clone, Debug)]
pub struct McpRequest {
    id: Option<RequestId>,
    method: Method,
    target: Option<Target>,
    params: Params,
    caller: Arc<Caller>,
    extensions: Extensions,
}

impl McpRequest {
    /// A request as the anonymous principal, in the scope of the whole gateway.
    pub fn new(method: Method, params: Params) -> Self {
        let target = Target::of(&method, &params);
        let caller = Caller::anonymous();
        McpRequest { id: None, method, target, params, caller, extensions: Extensions::new() }
    }

    /// A `tools/call`.
    pub fn call_tool(name: &str, arguments: serde_json::Value) -> Self {
        let params = serde_json::json!({ "name": name, "arguments": arguments });
        Self::new(Method::ToolsCall, Params::from_value(&params))
    }

    /// A request without params.
    pub fn bare(method: Method) -> Self {
        Self::new(method, Params::default())
    }

    /// The same, with the id under which the client knows it.
    #[must_use]
    pub fn with_id(mut self, id: RequestId) -> Self {
        self.id = Some(id);
        self
    }

    /// The same, asked by `caller`.
    #[must_use]
    pub fn with_caller(mut self, caller: Arc<Caller>) -> Self {
        self.caller = caller;
        self
    }

    /// The client's id. `None` on a notification, and on what the gateway itself asks.
    pub fn id(&self) -> Option<&RequestId> {
        self.id.as_ref()
    }

    /// The method.
    pub fn method(&self) -> &Method {
        &self.method
    }

    /// The tool, prompt, resource or task it is about.
    pub fn target(&self) -> Option<&Target> {
        self.target.as_ref()
    }

    /// The params, raw.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// Replaces the params; the target follows.
    pub fn set_params(&mut self, params: Params) {
        self.target = Target::of(&self.method, &params);
        self.params = params;
    }

    /// Who asks, through which client.
    pub fn caller(&self) -> &Arc<Caller> {
        &self.caller
    }

    /// Who asks.
    pub fn principal(&self) -> &Principal {
        &self.caller.principal
    }

    /// What of the gateway they see.
    pub fn scope(&self) -> &Scope {
        &self.caller.scope
    }

    /// Typed values that layers leave for layers further in.
    pub fn extensions(&self) -> &Extensions {
        &self.extensions
    }

    /// The same, to be changed.
    pub fn extensions_mut(&mut self) -> &mut Extensions {
        &mut self.extensions
    }
}

/// A message's params: an object, or nothing.
#[derive(Clone, Debug, Default)]
pub struct Params {
    object: Option<RawObject>,
    /// `_meta`, once somebody asked for it: door and upstream client both do.
    meta: OnceLock<Option<RawObject>>,
}

impl PartialEq for Params {
    fn eq(&self, other: &Self) -> bool {
        self.object == other.object
    }
}

impl Params {
    /// From JSON text.
    pub fn parse(json: Bytes) -> Result<Self, serde_json::Error> {
        RawObject::parse(json).map(|object| Params { object: Some(object), meta: OnceLock::new() })
    }

    /// From a JSON object. Any other value gives no params.
    pub fn from_value(value: &serde_json::Value) -> Self {
        Params { object: RawObject::parse(value.to_string().into()).ok(), meta: OnceLock::new() }
    }

    /// Whether the message has a `params` member.
    pub fn is_present(&self) -> bool {
        self.object.is_some()
    }

    /// A typed view, for instance one of [`rmcp::model`]'s. The bytes stay what they are.
    pub fn typed<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        serde_json::from_slice(self.as_json())
    }

    /// The params as JSON: `{}` when there are none.
    pub fn as_json(&self) -> &Bytes {
        self.deref().as_bytes()
    }

    /// The object, to be changed; made when there is none.
    pub fn object_mut(&mut self) -> &mut RawObject {
        self.meta = OnceLock::new();
        self.object.get_or_insert_with(RawObject::empty)
    }

    /// `_meta`, scanned.
    pub fn meta(&self) -> Option<&RawObject> {
        self.meta.get_or_init(|| self.get_object("_meta")).as_ref()
    }

    /// Replaces a member other than `_meta`; what is known of that stays.
    pub(crate) fn set_keeping_meta(&mut self, key: &str, json: &str) {
        debug_assert_ne!(key, "_meta");
        let meta = std::mem::take(&mut self.meta);
        self.object_mut().set(key, json);
        self.meta = meta;
    }

    /// The progress token the sender wants notifications under, as JSON.
    pub fn progress_token(&self) -> Option<Bytes> {
        self.meta()?.get_bytes("progressToken")
    }
}

impl Deref for Params {
    type Target = RawObject;

    fn deref(&self) -> &RawObject {
        static EMPTY: std::sync::LazyLock<RawObject> = std::sync::LazyLock::new(RawObject::empty);
        self.object.as_ref().unwrap_or(&EMPTY)
    }
}
