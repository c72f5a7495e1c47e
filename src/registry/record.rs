//! What the registry holds: records, each under a key, each with a version.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::{protocol::ServerName, upstream::UpstreamSpec};

/// One registered upstream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerRecord {
    /// Its name.
    pub name: ServerName,
    /// How to reach it.
    #[serde(flatten)]
    pub spec: UpstreamSpec,
    /// Whether it takes part. A disabled one keeps its record and shows nothing.
    #[serde(default = "yes")]
    pub enabled: bool,
    /// What of it may be seen and called.
    #[serde(default)]
    pub rules: Rules,
    /// Where the record came from.
    #[serde(default)]
    pub origin: Origin,
}

impl ServerRecord {
    /// A server that takes part, of which everything may be seen, added by hand.
    pub fn new(name: ServerName, spec: UpstreamSpec) -> Self {
        ServerRecord { name, spec, enabled: true, rules: Rules::default(), origin: Origin::default() }
    }
}

/// Globs over an upstream's tools, prompts and resources: `deny` always wins.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rules {
    /// Absent = everything; empty = nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allow: Option<Vec<String>>,
    /// Never, whatever `allow` says.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub deny: Vec<String>,
}

/// Which pen wrote a record. A config file owns the records it wrote: one that is gone from the file goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// The command line or the control socket.
    #[default]
    Cli,
    /// The config file.
    File,
    /// `serve --demo`; gone when that ends.
    Demo,
}

/// The last-known answers of one upstream, kept so that lists are there at once after a restart.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct CatalogRecord {
    /// Its `server/discover` result.
    pub discover: Option<Box<RawValue>>,
    /// Definitions, as the upstream sent them.
    pub tools: Vec<Box<RawValue>>,
    /// Prompts likewise.
    pub prompts: Vec<Box<RawValue>>,
    /// Resources likewise.
    pub resources: Vec<Box<RawValue>>,
    /// Resource templates likewise.
    pub templates: Vec<Box<RawValue>>,
    /// Skills likewise.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skills: Vec<Box<RawValue>>,
}

fn yes() -> bool {
    true
}
