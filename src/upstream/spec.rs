//! What is known of an upstream before anyone calls it. This is what the registry stores.

use std::{collections::BTreeMap, fmt, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

/// How to reach an upstream, and within which limits. Values may hold `${VAR}`, `${env:VAR}` and `${file:PATH}`;
/// they are resolved when a connection is made, so what is stored and shown holds references, not secrets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpstreamSpec {
    /// The way to it.
    #[serde(flatten)]
    pub transport: Transport,
    /// How long one request may take until its result, progress or not. 60 s by default: long enough for slow
    /// tools, short enough that an agent learns of a stuck one.
    #[serde(default = "default_timeout", with = "millis")]
    pub timeout: Duration,
    /// How many requests may be under way at once; more are refused, never queued.
    #[serde(default = "default_concurrency")]
    pub concurrency: usize,
    /// Who shares a connection to it.
    #[serde(default, skip_serializing_if = "Isolation::is_default")]
    pub isolation: Isolation,
}

/// Who shares a connection to an upstream that has only one: a child process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Isolation {
    /// Everybody. What the child asks in the middle of a call belongs to nobody in particular, and is refused.
    #[default]
    Shared,
    /// Each client session has a child of its own, and modern clients one for each principal and scope: the child can
    /// ask its client, and keeps no state of others.
    Session,
}

impl Isolation {
    fn is_default(&self) -> bool {
        *self == Isolation::default()
    }
}

/// The ways to reach an upstream.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "transport", rename_all = "lowercase")]
pub enum Transport {
    /// Streamable HTTP, either era.
    Http {
        /// The MCP endpoint.
        url: String,
        /// Sent with every request.
        #[serde(default)]
        headers: BTreeMap<String, String>,
    },
    /// HTTP+SSE, the transport of 2024-11-05.
    Sse {
        /// The SSE endpoint.
        url: String,
        /// Sent with every request.
        #[serde(default)]
        headers: BTreeMap<String, String>,
    },
    /// A child process that speaks on stdin and stdout.
    Stdio {
        /// The program, looked up in `PATH`.
        command: String,
        /// Its arguments.
        #[serde(default)]
        args: Vec<String>,
        /// Added to the gateway's own environment.
        #[serde(default)]
        env: BTreeMap<String, String>,
        /// Its working directory; the gateway's own when absent.
        #[serde(default)]
        cwd: Option<PathBuf>,
    },
    /// One of the demonstration upstreams inside the gateway.
    Builtin {
        /// Which.
        kind: String,
    },
}

impl UpstreamSpec {
    /// A spec with the default limits.
    pub fn new(transport: Transport) -> Self {
        UpstreamSpec {
            transport,
            timeout: default_timeout(),
            concurrency: default_concurrency(),
            isolation: Isolation::default(),
        }
    }

    /// Streamable HTTP at `url`.
    pub fn http(url: impl Into<String>) -> Self {
        Self::new(Transport::Http { url: url.into(), headers: BTreeMap::new() })
    }

    /// A child process.
    pub fn stdio<A: Into<String>>(command: impl Into<String>, args: impl IntoIterator<Item = A>) -> Self {
        Self::new(Transport::Stdio {
            command: command.into(),
            args: args.into_iter().map(Into::into).collect(),
            env: BTreeMap::new(),
            cwd: None,
        })
    }
}

impl Transport {
    /// In a word: `http`, `sse`, `stdio`, `builtin`.
    pub fn kind(&self) -> &'static str {
        match self {
            Transport::Http { .. } => "http",
            Transport::Sse { .. } => "sse",
            Transport::Stdio { .. } => "stdio",
            Transport::Builtin { .. } => "builtin",
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Transport::Http { url, .. } | Transport::Sse { url, .. } => f.write_str(url),
            Transport::Stdio { command, args, .. } => {
                f.write_str(command)?;
                args.iter().try_for_each(|arg| write!(f, " {arg}"))
            }
            Transport::Builtin { kind } => write!(f, "built in: {kind}"),
        }
    }
}

/// Header and environment values may be secrets that somebody wrote down instead of referring to them.
impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Transport::Http { url, headers } | Transport::Sse { url, headers } => f
                .debug_struct(self.kind())
                .field("url", url)
                .field("headers", &Vec::from_iter(headers.keys()))
                .finish(),
            Transport::Stdio { command, args, env, cwd } => f
                .debug_struct("stdio")
                .field("command", command)
                .field("args", args)
                .field("env", &Vec::from_iter(env.keys()))
                .field("cwd", cwd)
                .finish(),
            Transport::Builtin { kind } => f.debug_struct("builtin").field("kind", kind).finish(),
        }
    }
}

fn default_timeout() -> Duration {
    Duration::from_secs(60)
}

/// Well above what one agent does, well below what drowns a small server.
fn default_concurrency() -> usize {
    256
}

mod millis {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(d: &Duration, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_u64(u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Duration, D::Error> {
        u64::deserialize(d).map(Duration::from_millis)
    }
}
