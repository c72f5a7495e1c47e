//! The stage: one canned upstream, one blind proxy, and gateways started as cases need them.
//!
//! With `--self-check` a second blind proxy plays the gateway. Then every ratio must be about one, which
//! shows what the numbers of a real run are worth on this machine.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use crate::canned::{Era, Profile, tool};
use crate::load::{self, Connection, Errand, Want};
use crate::process::Process;
use crate::request::{Ask, Endpoint};

/// The most upstreams a fleet has.
pub(crate) const MOST_UPSTREAMS: usize = 50;

/// What stands behind a gateway: so many upstreams, each with so many tools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fleet {
    pub(crate) era: Era,
    pub(crate) upstreams: usize,
    /// Tools of each upstream that clients get to see.
    pub(crate) tools: usize,
    /// Tools of each upstream that an allow rule takes away. Zero means there is no rule.
    pub(crate) hidden: usize,
}

/// Who plays the gateway.
#[derive(Clone, Debug)]
pub(crate) enum Subject {
    Gateway(PathBuf),
    Blind,
}

pub(crate) struct Stage {
    pub(crate) subject: Subject,
    pub(crate) upstream: Process,
    pub(crate) blind: Process,
}

/// A running gateway with its configuration and data.
pub(crate) struct Gateway {
    pub(crate) process: Process,
    pub(crate) fleet: Fleet,
    subject: Subject,
    folder: TempDir,
}

// === impl Fleet ===

impl Fleet {
    /// The name under which clients see the `index`th tool of the `upstream`th server.
    pub(crate) fn exposed(upstream: usize, index: usize) -> String {
        format!("{}_{}", server(upstream), tool(index))
    }

    pub(crate) fn visible(&self) -> usize {
        self.upstreams * self.tools
    }

    /// One upstream that looks like the whole fleet seen through the gateway: what the blind proxy carries.
    pub(crate) fn as_seen(&self, client: Era) -> Profile {
        Profile { era: client, tools: self.visible(), hidden: 0, prefix: format!("{}_", server(0)) }
    }

    fn config(&self, ports: &[u16]) -> anyhow::Result<Value> {
        let profile =
            Profile { era: self.era, tools: self.tools, hidden: self.hidden, prefix: String::new() };
        let mut servers = Map::new();
        for (index, port) in ports.iter().take(self.upstreams).enumerate() {
            let mut entry = json!({ "url": format!("http://127.0.0.1:{port}{}", profile.path()) });
            if self.hidden > 0 {
                entry["allow"] = json!(["tool_*"]);
            }
            servers.insert(server(index), entry);
        }
        Ok(json!({ "mcpServers": servers }))
    }
}

fn server(index: usize) -> String {
    format!("up{index:02}")
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Subject::Gateway(binary) => write!(f, "{}", binary.display()),
            Subject::Blind => f.write_str("SELF-CHECK: a second blind proxy stands in for portcullis"),
        }
    }
}

// === impl Stage ===

impl Stage {
    pub(crate) fn new(subject: Subject) -> anyhow::Result<Stage> {
        let upstream = Process::of_ourselves("upstream", MOST_UPSTREAMS)?;
        let blind = Process::of_ourselves("blind", upstream.port())?;
        Ok(Stage { subject, upstream, blind })
    }

    /// Starts a gateway in front of `fleet` and waits until it lists every tool.
    pub(crate) async fn gateway(&self, fleet: Fleet) -> anyhow::Result<Gateway> {
        let folder = tempfile::tempdir()?;
        let config = fleet.config(&self.upstream.ports)?;
        std::fs::write(folder.path().join("config.json"), config.to_string())?;
        let process = self.start(folder.path())?;
        let mut gateway = Gateway { process, fleet, subject: self.subject.clone(), folder };
        gateway.ready().await?;
        Ok(gateway)
    }

    /// Starts the gateway's process once more on the same configuration and data.
    pub(crate) fn start(&self, folder: &Path) -> anyhow::Result<Process> {
        match &self.subject {
            Subject::Gateway(binary) => Process::gateway(binary, folder),
            Subject::Blind => Process::of_ourselves("blind", self.upstream.port()),
        }
    }

    /// How many upstream requests of the same method a request costs the gateway.
    pub(crate) fn upstream_requests_for(&self, ask: &Ask) -> u64 {
        match (ask, &self.subject) {
            (Ask::Call(_), _) | (_, Subject::Blind) => 1,
            (_, Subject::Gateway(_)) => 0,
        }
    }
}

// === impl Gateway ===

impl Gateway {
    /// Where a client of `era` finds this gateway.
    pub(crate) fn endpoint(&self, era: Era) -> Endpoint {
        let path = match self.subject {
            Subject::Gateway(_) => "/mcp".to_owned(),
            Subject::Blind => self.fleet.as_seen(era).path(),
        };
        Endpoint { port: self.process.port(), path }
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Fails if the gateway has left.
    pub(crate) fn check(&mut self) -> anyhow::Result<()> {
        self.process.check(&self.folder.path().join("log"))
    }

    async fn ready(&mut self) -> anyhow::Result<()> {
        let errand = Errand {
            endpoint: self.endpoint(Era::Modern),
            era: Era::Modern,
            ask: Ask::List,
            want: Want::Tools(self.fleet.visible()),
        };
        let patience = Instant::now() + Duration::from_secs(15);
        loop {
            self.check()?;
            let tried = tokio::time::timeout(Duration::from_secs(5), self.lists(&errand)).await;
            match tried.context("no answer").flatten() {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() > patience => return Err(error).context("not ready after 15 s"),
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    async fn lists(&self, errand: &Errand) -> anyhow::Result<()> {
        if let Subject::Gateway(_) = self.subject {
            let (status, _) = load::get(self.process.port(), "/healthz").await?;
            if status != 200 {
                bail!("/healthz answered {status}");
            }
        }
        Connection::open(errand).await.map(drop)
    }
}
