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
    sync::{Arc, Weak},
};

use bytes::Bytes;

use crate::protocol::ProtocolVersion;

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
/// modern client has no session, so its requests share one with those of the same principal and scope.
#[derive(Clone, Debug, Default)]
pub enum Affinity {
    /// The upstream session of the principal and scope.
    #[default]
    Shared,
    /// The upstream session of one legacy client session. When the last clone of the token is gone, the client
    /// is, and upstream clients may end their side.
    Session(Arc<SessionToken>),
}

/// Identity of a legacy client session; alive as long as the session is.
#[derive(Debug)]
pub struct SessionToken(());

impl SessionToken {
    /// A new one, unlike any other.
    pub fn new() -> Arc<Self> {
        Arc::new(SessionToken(()))
    }
}

/// What an upstream client files a session under.
#[derive(Clone, Debug)]
pub enum AffinityKey {
    /// By principal and scope.
    Shared(Principal, Scope),
    /// By client session.
    Session(Weak<SessionToken>),
}

impl AffinityKey {
    /// The key of a caller.
    pub fn of(caller: &Caller) -> Self {
        match &caller.affinity {
            Affinity::Shared => AffinityKey::Shared(caller.principal.clone(), caller.scope.clone()),
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
            (AffinityKey::Shared(p, s), AffinityKey::Shared(q, t)) => p == q && s == t,
            (AffinityKey::Session(a), AffinityKey::Session(b)) => Weak::ptr_eq(a, b),
            _ => false,
        }
    }
}

impl Eq for AffinityKey {}

impl std::hash::Hash for AffinityKey {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        match self {
            AffinityKey::Shared(principal, scope) => (principal, scope).hash(state),
            AffinityKey::Session(token) => token.as_ptr().hash(state),
        }
    }
}
