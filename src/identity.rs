//! Who is calling, what of the gateway they see, and through which client.
//!
//! A request without an identity does not exist: anonymous is a principal like any other, with rights of its own.
//!
//! ```
//! use std::sync::Arc;
//! use portcullis::{identity::{Caller, Principal}, protocol::{McpRequest, Method}};
//!
//! let alice = Caller { principal: Principal::named("alice"), ..(*Caller::anonymous()).clone() };
//! let request = McpRequest::bare(Method::ToolsList).with_caller(Arc::new(alice));
//! assert_eq!(request.principal().as_str(), "alice");
//! ```

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use bytes::Bytes;
use serde_json::{Value, json};

use crate::protocol::{Era, Method, Params, ProtocolVersion, RawObject, RpcError, code};

/// Who calls, as authentication found it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Principal(Arc<str>);

impl Principal {
    /// A caller nobody authenticated.
    pub fn anonymous() -> Self {
        static ANONYMOUS: std::sync::LazyLock<Principal> =
            std::sync::LazyLock::new(|| Principal("anonymous".into()));
        ANONYMOUS.clone()
    }

    /// A caller that authentication knows as `name`.
    pub fn named(name: impl Into<Arc<str>>) -> Self {
        Principal(name.into())
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What of the gateway a request sees: all of it, or one group's curated view.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum Scope {
    /// `/mcp`.
    #[default]
    Gateway,
    /// `/mcp/g/{group}`.
    Group(Arc<str>),
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Scope::Gateway => f.write_str("gateway"),
            Scope::Group(group) => write!(f, "group {group}"),
        }
    }
}

/// What the client said of itself: in `initialize` (legacy), or with the request (modern).
#[derive(Clone, Debug)]
pub struct Client {
    /// The revision it speaks.
    pub version: ProtocolVersion,
    /// Its `clientInfo`, as JSON.
    pub info: Option<Bytes>,
    /// Its capabilities, as JSON: what it can be asked.
    pub capabilities: Bytes,
    /// The least severe log notification it wants, as JSON. `None` = no log notifications.
    pub log_level: Option<Bytes>,
}

impl Client {
    /// The gateway itself, which cannot be asked anything.
    pub fn gateway() -> Self {
        let info = concat!(r#"{"name":"portcullis","version":""#, env!("CARGO_PKG_VERSION"), r#""}"#);
        Client {
            version: ProtocolVersion::LATEST,
            info: Some(Bytes::from_static(info.as_bytes())),
            capabilities: Bytes::from_static(b"{}"),
            log_level: None,
        }
    }
}

impl Client {
    /// Whether it wants this log notification. A modern client wants none that it did not ask for with the request
    /// (MCP 2026-07-28, server/utilities/logging); a legacy client that set no level leaves the choice to the server.
    ///
    /// ```
    /// use portcullis::{identity::Client, protocol::Params};
    ///
    /// let client = Client { log_level: Some(r#""warning""#.into()), ..Client::gateway() };
    /// assert!(client.wants_log(&Params::parse(r#"{"level":"error"}"#.into())?));
    /// assert!(!client.wants_log(&Params::parse(r#"{"level":"info"}"#.into())?));
    /// # Ok::<_, serde_json::Error>(())
    /// ```
    pub fn wants_log(&self, params: &Params) -> bool {
        match &self.log_level {
            None => self.version.era() == Era::Legacy,
            // A level that nobody knows is worth a look.
            Some(least) => {
                severity(params.get("level")).is_none_or(|level| Some(level) >= severity(text(least)))
            }
        }
    }

    /// Whether it wants less severe log notifications than `level`, or there is no level yet. For upstream clients that
    /// share a session among several: the level of that is the least severe that anyone wants.
    pub fn wants_more_than(&self, level: Option<&Bytes>) -> bool {
        match (&self.log_level, level) {
            (None, _) => false,
            (Some(_), None) => true,
            (Some(wanted), Some(level)) => severity(text(wanted)) < severity(text(level)),
        }
    }

    /// What it can be asked.
    pub fn abilities(&self) -> Abilities {
        Abilities::of(&self.capabilities)
    }

    /// Whether it declared that it answers this question. A client is never asked anything else: the error says what
    /// is missing (MCP 2026-07-28, basic, error codes).
    ///
    /// ```
    /// use portcullis::{identity::Client, protocol::{Method, Params}};
    ///
    /// let client = Client { capabilities: r#"{"elicitation":{}}"#.into(), ..Client::gateway() };
    /// assert!(client.can_answer(&Method::Elicit, &Params::default()).is_ok());
    /// assert!(client.can_answer(&Method::RootsList, &Params::default()).is_err());
    /// ```
    pub fn can_answer(&self, method: &Method, params: &Params) -> Result<(), RpcError> {
        let needed = match method {
            Method::CreateMessage if params.get("tools").is_some() => Abilities::SAMPLING_TOOLS,
            Method::CreateMessage => Abilities::SAMPLING,
            // URL mode came later and is declared by itself.
            Method::Elicit if params.get_string("mode").as_deref() == Some("url") => {
                Abilities::ELICITATION_URL
            }
            Method::Elicit => Abilities::ELICITATION_FORM,
            Method::RootsList => Abilities::ROOTS,
            _ => {
                let message = format!("clients cannot be asked {method}");
                return Err(RpcError::new(code::METHOD_NOT_FOUND, message));
            }
        };
        if self.abilities().include(needed) {
            return Ok(());
        }
        let message = format!("the client did not declare `{}`", needed.name());
        let data = json!({ "requiredCapabilities": needed.to_value() });
        Err(RpcError::new(code::MISSING_CAPABILITY, message).with_data(&data))
    }
}

/// The severity of a log level, as JSON: the levels of syslog (RFC 5424).
fn severity(level: Option<&str>) -> Option<usize> {
    const LEVELS: [&str; 8] =
        ["debug", "info", "notice", "warning", "error", "critical", "alert", "emergency"];
    let level = level?.trim_matches('"');
    LEVELS.iter().position(|name| *name == level)
}

fn text(json: &Bytes) -> Option<&str> {
    std::str::from_utf8(json).ok()
}

/// What servers may ask of a client, out of its capabilities: few enough that sessions can be filed under it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Abilities(u8);

impl Abilities {
    /// `sampling/createMessage`.
    pub const SAMPLING: Abilities = Abilities(1);
    /// The same with tools in it.
    pub const SAMPLING_TOOLS: Abilities = Abilities(1 | 2);
    /// `elicitation/create` with a form.
    pub const ELICITATION_FORM: Abilities = Abilities(4);
    /// `elicitation/create` with a URL.
    pub const ELICITATION_URL: Abilities = Abilities(8);
    /// `roots/list`.
    pub const ROOTS: Abilities = Abilities(16);
    /// Sampling with what other servers said as context, which is deprecated.
    pub const SAMPLING_CONTEXT: Abilities = Abilities(1 | 32);

    const ALL: [Abilities; 6] = [
        Self::SAMPLING,
        Self::SAMPLING_TOOLS,
        Self::SAMPLING_CONTEXT,
        Self::ELICITATION_FORM,
        Self::ELICITATION_URL,
        Self::ROOTS,
    ];

    /// Reads them out of client capabilities, as JSON. What is no object declares nothing.
    pub fn of(capabilities: &Bytes) -> Self {
        if capabilities == "{}" {
            return Abilities::default();
        }
        let Ok(declared) = RawObject::parse(capabilities.clone()) else { return Abilities::default() };
        let mut found = Abilities::default();
        if let Some(sampling) = declared.get_object("sampling") {
            found = found | Self::SAMPLING;
            if sampling.get("tools").is_some() {
                found = found | Self::SAMPLING_TOOLS;
            }
            if sampling.get("context").is_some() {
                found = found | Self::SAMPLING_CONTEXT;
            }
        }
        if let Some(elicitation) = declared.get_object("elicitation") {
            // Whoever says nothing of modes means forms: there was nothing else at first.
            if elicitation.get("form").is_some() || elicitation.get("url").is_none() {
                found = found | Self::ELICITATION_FORM;
            }
            if elicitation.get("url").is_some() {
                found = found | Self::ELICITATION_URL;
            }
        }
        if declared.get_object("roots").is_some() {
            found = found | Self::ROOTS;
        }
        found
    }

    /// Whether all of `others` are among them.
    pub fn include(self, others: Abilities) -> bool {
        self.0 & others.0 == others.0
    }

    /// As client capabilities: these, and nothing else.
    pub fn to_value(self) -> Value {
        let mut capabilities = json!({});
        for ability in Self::ALL.into_iter().filter(|ability| self.include(*ability)) {
            let (room, detail) = match ability {
                Self::SAMPLING_TOOLS => ("sampling", Some("tools")),
                Self::SAMPLING_CONTEXT => ("sampling", Some("context")),
                Self::SAMPLING => ("sampling", None),
                Self::ELICITATION_FORM => ("elicitation", Some("form")),
                Self::ELICITATION_URL => ("elicitation", Some("url")),
                _ => ("roots", None),
            };
            match detail {
                Some(detail) => capabilities[room][detail] = json!({}),
                None if capabilities[room].is_null() => capabilities[room] = json!({}),
                None => {}
            }
        }
        capabilities
    }

    fn name(self) -> &'static str {
        match self {
            Self::SAMPLING => "sampling",
            Self::SAMPLING_TOOLS => "sampling.tools",
            Self::SAMPLING_CONTEXT => "sampling.context",
            Self::ELICITATION_FORM => "elicitation.form",
            Self::ELICITATION_URL => "elicitation.url",
            _ => "roots",
        }
    }
}

impl std::ops::BitOr for Abilities {
    type Output = Abilities;

    fn bitor(self, other: Abilities) -> Abilities {
        Abilities(self.0 | other.0)
    }
}

/// Everything known of whoever sent a request.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Who.
    pub principal: Principal,
    /// Of what.
    pub scope: Scope,
    /// Through which client.
    pub client: Client,
    /// Which upstream session the request shares, where an upstream needs sessions.
    pub affinity: Affinity,
}

impl Caller {
    /// Nobody in particular, through the gateway's own client.
    pub fn anonymous() -> Arc<Caller> {
        static ANONYMOUS: std::sync::LazyLock<Arc<Caller>> = std::sync::LazyLock::new(|| {
            Arc::new(Caller {
                principal: Principal::anonymous(),
                scope: Scope::Gateway,
                client: Client::gateway(),
                affinity: Affinity::Shared,
            })
        });
        ANONYMOUS.clone()
    }
}

/// Which requests may share one session at a legacy upstream.
///
/// A legacy client's requests share a session that is theirs alone, because servers keep state in sessions. A
/// modern client has no session, so its requests share one with those of the same principal and scope whose clients
/// can be asked the same.
#[derive(Clone, Debug, Default)]
pub enum Affinity {
    /// The upstream session of the principal, scope and abilities.
    #[default]
    Shared,
    /// The upstream session of one legacy client session. When the last clone of the token is gone, the client
    /// is, and upstream clients may end their side.
    Session(Arc<SessionToken>),
}

/// Identity of a legacy client session; alive as long as the session is.
#[derive(Default)]
pub struct SessionToken {
    at_end: Mutex<Vec<Box<dyn FnOnce() + Send>>>,
}

impl SessionToken {
    /// A new one, unlike any other.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Runs `ended` when the session is over: for who keeps something on its behalf.
    pub fn on_end(&self, ended: impl FnOnce() + Send + 'static) {
        self.at_end.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(ended));
    }
}

impl Drop for SessionToken {
    fn drop(&mut self) {
        let at_end = self.at_end.get_mut().unwrap_or_else(PoisonError::into_inner);
        at_end.drain(..).for_each(|ended| ended());
    }
}

impl fmt::Debug for SessionToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionToken")
    }
}

/// What an upstream client files a session under.
#[derive(Clone, Debug)]
pub enum AffinityKey {
    /// By principal, scope, and what the client can be asked: a server is told that when the session begins.
    Shared(Principal, Scope, Abilities),
    /// By client session.
    Session(Weak<SessionToken>),
}

impl AffinityKey {
    /// The key of a caller.
    pub fn of(caller: &Caller) -> Self {
        match &caller.affinity {
            Affinity::Shared => {
                let (principal, scope) = (caller.principal.clone(), caller.scope.clone());
                AffinityKey::Shared(principal, scope, caller.client.abilities())
            }
            Affinity::Session(token) => AffinityKey::Session(Arc::downgrade(token)),
        }
    }

    /// Whether a request with this key can still come.
    pub fn is_live(&self) -> bool {
        match self {
            AffinityKey::Shared(..) => true,
            AffinityKey::Session(token) => token.strong_count() > 0,
        }
    }
}

impl PartialEq for AffinityKey {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (AffinityKey::Shared(p, s, a), AffinityKey::Shared(q, t, b)) => p == q && s == t && a == b,
            (AffinityKey::Session(a), AffinityKey::Session(b)) => Weak::ptr_eq(a, b),
            _ => false,
        }
    }
}

impl Eq for AffinityKey {}

impl std::hash::Hash for AffinityKey {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        match self {
            AffinityKey::Shared(principal, scope, abilities) => (principal, scope, abilities).hash(state),
            AffinityKey::Session(token) => token.as_ptr().hash(state),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn abilities(capabilities: &'static str) -> Abilities {
        Abilities::of(&Bytes::from_static(capabilities.as_bytes()))
    }

    #[test]
    fn no_mode_means_forms_and_one_mode_means_that_one() {
        assert_eq!(abilities(r#"{"elicitation":{}}"#), Abilities::ELICITATION_FORM);
        assert_eq!(abilities(r#"{"elicitation":{"url":{}}}"#), Abilities::ELICITATION_URL);
        let both = Abilities::ELICITATION_FORM | Abilities::ELICITATION_URL;
        assert_eq!(abilities(r#"{"elicitation":{"url":{},"form":{}}}"#), both);
        assert_eq!(abilities(r#"{"roots":true,"tasks":{}}"#), Abilities::default());
        assert_eq!(abilities("[]"), Abilities::default());
    }

    #[test]
    fn abilities_survive_being_declared() {
        for bits in 0..64u8 {
            // Details of sampling come with sampling.
            let bits = if bits & (2 | 32) != 0 { bits | 1 } else { bits };
            let declared = Bytes::from(Abilities(bits).to_value().to_string());
            assert_eq!(Abilities::of(&declared), Abilities(bits), "{declared:?}");
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let client =
            Client { capabilities: Bytes::from_static(br#"{"elicitation":{}}"#), ..Client::gateway() };
        let url = Params::from_value(&json!({ "mode": "url", "url": "https://x" }));
        let error = client.can_answer(&Method::Elicit, &url).unwrap_err();
        assert_eq!(error.code(), code::MISSING_CAPABILITY);
        let text = String::from_utf8_lossy(error.as_bytes());
        assert!(text.contains(r#""requiredCapabilities":{"elicitation":{"url":{}}}"#), "{text}");
    }
}
