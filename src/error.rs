//! What can go wrong, as small types. Layers fail with them; [`rescue`](crate::layers::rescue) turns them into
//! answers.
//!
//! ```
//! use portcullis::{BoxError, error::Refusal};
//!
//! // What a layer of one's own fails with, when the client shall know why.
//! let error: BoxError = Refusal::new("budget_spent", "alice has no calls left today").into();
//! assert_eq!(error.to_string(), "alice has no calls left today");
//! ```

use std::{borrow::Cow, error::Error, fmt, time::Duration};

use crate::protocol::{Method, ServerName, Target};

/// Any error. What every [`McpService`](crate::McpService)'s error converts into, so stock tower layers fit.
pub type BoxError = Box<dyn Error + Send + Sync>;

/// Nothing visible to this caller has that name. Said of what is hidden, too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unknown(pub Target);

impl fmt::Display for Unknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unknown {}: {}", self.0.kind(), self.0.name())
    }
}

impl Error for Unknown {}

/// Nobody here implements the method.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unimplemented(pub Method);

impl fmt::Display for Unimplemented {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "method not found: {}", self.0)
    }
}

impl Error for Unimplemented {}

/// The params are not what the method wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidParams(pub Cow<'static, str>);

impl fmt::Display for InvalidParams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for InvalidParams {}

/// A header does not say what the body says (MCP 2026-07-28, streamable HTTP, server validation).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderMismatch(pub String);

impl fmt::Display for HeaderMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Header mismatch: {}", self.0)
    }
}

impl Error for HeaderMismatch {}

/// The answer did not come in time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Elapsed {
    /// The limit that passed.
    pub after: Duration,
}

impl fmt::Display for Elapsed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no answer within {:?}", self.after)
    }
}

impl Error for Elapsed {}

/// A layer says no, in words meant for the client. The type for layers of one's own: anything else a foreign layer
/// fails with is an "internal error" to the client.
#[derive(Clone, Debug, PartialEq)]
pub struct Refusal {
    /// What kind of refusal, in a word a program can compare: `budget_spent`.
    pub code: Cow<'static, str>,
    /// For whoever reads it, a model or a person.
    pub message: String,
    /// More, for programs.
    pub details: serde_json::Value,
}

impl Refusal {
    /// A refusal without details.
    pub fn new(code: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Refusal { code: code.into(), message: message.into(), details: serde_json::Value::Null }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for Refusal {}

/// As many requests as allowed are already under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overloaded {
    /// How many are allowed.
    pub limit: usize,
}

impl fmt::Display for Overloaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} requests are under way, no more are allowed", self.limit)
    }
}

impl Error for Overloaded {}

/// An upstream let us down.
#[derive(Debug)]
pub struct UpstreamError {
    /// Which.
    pub upstream: ServerName,
    /// How.
    pub fault: Fault,
    /// What happened, for the log. May hold paths and addresses: not for clients.
    pub source: BoxError,
}

/// How an upstream let us down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// It cannot be reached, or its process does not run.
    Unreachable,
    /// It went away in the middle of the request.
    Lost,
    /// It answered something that is not MCP.
    Garbled,
    /// It answered more than allowed.
    TooLarge,
    /// It wants credentials it did not get.
    Unauthorized,
    /// Its configuration cannot work.
    Misconfigured,
}

impl UpstreamError {
    /// An error of `upstream`.
    pub fn new(upstream: &ServerName, fault: Fault, source: impl Into<BoxError>) -> Self {
        UpstreamError { upstream: upstream.clone(), fault, source: source.into() }
    }

    /// What a client may read.
    pub fn public(&self) -> String {
        let what = match self.fault {
            Fault::Unreachable => "cannot be reached now",
            Fault::Lost => "went away before it answered",
            Fault::Garbled => "sent an answer that is not MCP",
            Fault::TooLarge => "sent a larger answer than allowed",
            Fault::Unauthorized => "did not accept the gateway's credentials",
            Fault::Misconfigured => "is misconfigured",
        };
        format!("upstream `{}` {what}", self.upstream)
    }
}

impl fmt::Display for UpstreamError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.public(), self.source)
    }
}

impl Error for UpstreamError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&*self.source)
    }
}

/// Shows an error with everything behind it.
pub(crate) struct Chain<'a>(pub(crate) &'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut said = self.0.to_string();
        f.write_str(&said)?;
        let mut next = self.0.source();
        while let Some(error) = next {
            let text = error.to_string();
            // Many errors quote their source in their own text already.
            if !said.contains(&text) {
                write!(f, ": {text}")?;
                said = text;
            }
            next = error.source();
        }
        Ok(())
    }
}
