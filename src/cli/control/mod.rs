//! Where a command does its work: in the gateway that runs on the data directory, or on the registry itself when
//! none runs. [`Control`] is both, and no command knows which.
//!
//! A running gateway answers on a Unix socket in its data directory, which is nobody's but the owner's. The
//! operations themselves are in [`desk`], and whoever holds the registry does them: the daemon behind its
//! socket, or the command in its own process.

mod desk;
mod listen;
mod local;
mod remote;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Result;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

pub(super) use desk::Desk;
pub(super) use listen::{Lock, Socket};
use local::Local;
pub(super) use local::{open_registry, remember_naming};
use remote::Remote;

use crate::{
    protocol::{Naming, ServerName},
    registry::{Origin, Registry, ServerRecord},
    upstream::Isolation,
};

/// The way to the servers.
pub(super) enum Control {
    /// Nobody runs: the registry itself.
    Local(Local),
    /// Through the gateway that runs.
    Remote(Remote),
}

/// Where a client on stdin and stdout is served.
pub(super) enum Line {
    /// In the gateway that runs: both directions of it.
    There(TokioIo<Upgraded>),
    /// In this process, on a copy of what is registered. The registry itself stays free for others.
    Here(Registry, Naming),
}

// === what goes to and fro ===

/// Who answers on the socket.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Info {
    pub(super) version: String,
    pub(super) pid: u32,
    pub(super) listen: SocketAddr,
    /// Whether what is added outlives it; the demonstration keeps nothing.
    pub(super) keeps: bool,
}

/// A change of the servers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "lowercase")]
pub(super) enum Edit {
    Add { server: Box<ServerRecord>, replace: bool },
    Remove { name: ServerName },
    Enable { name: ServerName },
    Disable { name: ServerName },
}

/// What a change came to.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Edited {
    /// In a word: `added`, `replaced`, `removed`, `enabled`, `disabled`, or `unchanged`.
    pub(super) outcome: String,
    /// Whose it is, or was.
    pub(super) origin: Origin,
    /// How the server is, when there is a gateway to say.
    pub(super) server: Option<ServerView>,
    /// Whether the change outlives the gateway that made it.
    pub(super) kept: bool,
}

/// All servers.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Servers {
    pub(super) servers: Vec<ServerView>,
    /// What the registry holds and cannot read, a sentence each.
    pub(super) unreadable: Vec<String>,
}

/// A server as it is shown: nothing secret is in it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct ServerView {
    pub(super) name: ServerName,
    #[serde(flatten)]
    pub(super) state: State,
    /// How many of its tools clients see, as far as is known.
    pub(super) tools: Option<usize>,
    pub(super) transport: String,
    #[serde(rename = "where")]
    pub(super) place: String,
    /// Names of the headers that are sent.
    pub(super) headers: Vec<String>,
    /// Names of the variables that are set.
    pub(super) env: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(super) allow: Option<Vec<String>>,
    pub(super) deny: Vec<String>,
    #[serde(default)]
    pub(super) isolation: Isolation,
    pub(super) timeout_ms: u64,
    pub(super) origin: Origin,
}

/// How a server is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "kebab-case")]
pub(super) enum State {
    Up,
    Connecting,
    Down {
        error: String,
    },
    Disabled,
    /// There is no gateway.
    NotRunning,
}

/// What clients see, and who is missing from it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Tools {
    pub(super) tools: Vec<Tool>,
    pub(super) missing: Vec<Missing>,
    /// How many servers take part.
    pub(super) servers: usize,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Tool {
    pub(super) server: ServerName,
    /// As clients get it.
    pub(super) definition: Box<RawValue>,
}

/// A server that is not up.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Missing {
    pub(super) name: ServerName,
    pub(super) why: String,
}

/// A call of a tool.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Call {
    pub(super) tool: String,
    pub(super) arguments: Arguments,
    pub(super) wait: Duration,
}

/// A tool's arguments as somebody wrote them.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Arguments {
    /// One object.
    Json(Box<RawValue>),
    /// Names and values, to be typed by the tool's own schema.
    Pairs(Vec<(String, String)>),
}

/// What a call came to.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Called {
    /// A result, which may say that the tool failed.
    Result(Box<RawValue>),
    /// A JSON-RPC error object.
    Error(Box<RawValue>),
    /// Clients see no tool of that name.
    Unknown { similar: Vec<String>, missing: Vec<Missing> },
}

// === impl Control ===

impl Control {
    /// The gateway on `data_dir` when one runs, else the registry there.
    pub(super) async fn open(data_dir: PathBuf) -> Result<Control> {
        let began = tokio::time::Instant::now();
        loop {
            if let Some(remote) = Remote::find(&data_dir).await? {
                return Ok(Control::Remote(remote));
            }
            match local::try_open(&data_dir).await? {
                Some(local) => return Ok(Control::Local(local)),
                // A gateway that is about to start or to end, or another command: both are done soon.
                None if began.elapsed() < PATIENCE => tokio::time::sleep(RETRY).await,
                None => return Err(local::in_use(&data_dir)),
            }
        }
    }

    /// Who runs on `data_dir`, if anybody does.
    pub(super) async fn running(data_dir: &Path) -> Option<Info> {
        Remote::find(data_dir).await.ok()??.info().await.ok()
    }

    pub(super) async fn servers(self) -> Result<Servers> {
        match self {
            Control::Local(local) => local.servers().await,
            Control::Remote(remote) => remote.servers().await,
        }
    }

    pub(super) async fn edit(self, edit: Edit) -> Result<Edited> {
        match self {
            Control::Local(local) => local.edit(edit).await,
            Control::Remote(remote) => remote.edit(edit).await,
        }
    }

    /// Asks a server again what it offers.
    pub(super) async fn refresh(self, name: ServerName) -> Result<ServerView> {
        match self {
            Control::Local(local) => local.at_desk(async |desk| desk.refresh(&name).await).await,
            Control::Remote(remote) => remote.refresh(&name).await,
        }
    }

    pub(super) async fn tools(self, wait: Duration) -> Result<Tools> {
        match self {
            Control::Local(local) => local.at_desk(async |desk| desk.tools(wait).await).await,
            Control::Remote(remote) => remote.tools(wait).await,
        }
    }

    /// The way for a client on stdin and stdout.
    pub(super) async fn line(self) -> Result<Line> {
        match self {
            Control::Local(local) => {
                local.copied().await.map(|(registry, naming)| Line::Here(registry, naming))
            }
            Control::Remote(remote) => Ok(Line::There(remote.line().await?)),
        }
    }

    pub(super) async fn call(self, call: Call) -> Result<Called> {
        match self {
            Control::Local(local) => local.at_desk(async |desk| desk.call(call).await).await,
            Control::Remote(remote) => remote.call(call).await,
        }
    }
}

/// How long to wait for somebody else to let go of the registry.
const PATIENCE: Duration = Duration::from_secs(5);
const RETRY: Duration = Duration::from_millis(25);

/// The socket of the gateway on `data_dir`.
fn socket_path(data_dir: &Path) -> PathBuf {
    data_dir.join("control.sock")
}
