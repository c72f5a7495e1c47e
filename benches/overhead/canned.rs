//! What the canned upstream says, computed before anybody asks.
//!
//! A [`Profile`] is the first segment of the upstream's URL (`/modern.1000.100./mcp`), so one process plays
//! every upstream of every case, and the blind proxy can be sent the very bytes the gateway would produce
//! (`prefix` makes the tool names look as the gateway exposes them). Every answer carries [`MARKER`], so the
//! load generator can tell a right answer from a merely punctual one.

use std::fmt;

use anyhow::{Context, bail};
use bytes::Bytes;
use serde_json::{Value, json};

use crate::request::{LEGACY, MODERN};

/// A word that stands near the start or the end of every result.
pub(crate) const MARKER: &str = "bench-marker";

/// The length of the text in the big tool result.
pub(crate) const LARGE: usize = 100 * 1024;

/// The tool of a legacy upstream that asks something in the middle of its call, and waits.
pub(crate) const ASKS: usize = 2;

/// The own name of the `index`th tool. Tool 1 answers with the big result, [`ASKS`] asks, all others answer with the
/// small one.
pub(crate) fn tool(index: usize) -> String {
    format!("tool_{index:04}")
}

/// Which protocol era a party speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Era {
    Modern,
    Legacy,
}

/// One upstream as a value: its era, how many tools it lists, and how they are named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Profile {
    pub(crate) era: Era,
    /// Tools named `tool_*`.
    pub(crate) tools: usize,
    /// Tools named `hidden_*`, there for an allow rule to take away.
    pub(crate) hidden: usize,
    pub(crate) prefix: String,
}

/// The answers of one profile: everything of a message that follows its id.
pub(crate) struct Canned {
    pub(crate) era: Era,
    pub(crate) hello: Bytes,
    pub(crate) list: Bytes,
    pub(crate) small: Bytes,
    pub(crate) large: Bytes,
    pub(crate) empty: Bytes,
}

// === impl Era ===

impl Era {
    pub(crate) fn other(self) -> Era {
        match self {
            Era::Modern => Era::Legacy,
            Era::Legacy => Era::Modern,
        }
    }
}

impl fmt::Display for Era {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Era::Modern => "modern",
            Era::Legacy => "legacy",
        })
    }
}

// === impl Profile ===

impl Profile {
    /// The path of this profile's MCP endpoint.
    pub(crate) fn path(&self) -> String {
        format!("/{}.{}.{}.{}/mcp", self.era, self.tools, self.hidden, self.prefix)
    }

    /// Reads a path written by [`Profile::path`].
    pub(crate) fn from_path(path: &str) -> anyhow::Result<Profile> {
        let name =
            path.strip_prefix('/').and_then(|p| p.strip_suffix("/mcp")).context("not a profile path")?;
        let mut parts = name.splitn(4, '.');
        let mut next = || parts.next().context("a profile has four parts");
        let era = match next()? {
            "modern" => Era::Modern,
            "legacy" => Era::Legacy,
            other => bail!("unknown era {other:?}"),
        };
        let (tools, hidden) = (next()?.parse()?, next()?.parse()?);
        Ok(Profile { era, tools, hidden, prefix: next()?.to_owned() })
    }

    fn definitions(&self) -> Vec<Value> {
        let shown = (0..self.tools).map(tool);
        let hidden = (0..self.hidden).map(|index| format!("hidden_{index:04}"));
        shown.chain(hidden).map(|name| definition(&format!("{}{name}", self.prefix))).collect()
    }
}

// === impl Canned ===

impl Canned {
    /// Computes the answers of `profile`.
    pub(crate) fn new(profile: &Profile) -> Canned {
        let era = profile.era;
        let text = |text: String| json!({ "content": [{ "type": "text", "text": text }], "isError": false });
        Canned {
            era,
            hello: tail(hello(era)),
            list: tail(complete(era, true, json!({ "tools": profile.definitions() }))),
            small: tail(complete(era, false, text(small_text()))),
            large: tail(complete(era, false, text(large_text()))),
            empty: tail(complete(era, false, json!({}))),
        }
    }
}

/// Everything of a message that follows its id.
fn tail(result: Value) -> Bytes {
    format!(",\"result\":{result}}}").into()
}

fn hello(era: Era) -> Value {
    let info = json!({ "name": "canned", "version": "1.0.0" });
    let capabilities = json!({ "tools": { "listChanged": true } });
    match era {
        Era::Modern => complete(
            era,
            true,
            json!({
                "supportedVersions": [MODERN],
                "capabilities": capabilities,
                "_meta": { "io.modelcontextprotocol/serverInfo": info },
            }),
        ),
        Era::Legacy => json!({ "protocolVersion": LEGACY, "capabilities": capabilities, "serverInfo": info }),
    }
}

/// Adds what a modern result must carry.
fn complete(era: Era, cacheable: bool, mut result: Value) -> Value {
    if era == Era::Modern {
        result["resultType"] = "complete".into();
        if cacheable {
            result["ttlMs"] = 3_600_000.into();
            result["cacheScope"] = "public".into();
        }
    }
    result
}

/// A tool definition of about 600 bytes: what real servers send, give or take.
fn definition(name: &str) -> Value {
    json!({
        "name": name,
        "title": "Search the archive",
        "description": format!(
            "Searches the archive ({MARKER}) for documents that match a query and returns the best of them \
             with a short summary each. Use it before answering questions about past decisions."
        ),
        "inputSchema": {
            "type": "object",
            "properties": {
                "query": { "type": "string", "description": "Words to look for, in any order." },
                "limit": { "type": "integer", "minimum": 1, "maximum": 100, "default": 10 },
                "since": { "type": "string", "format": "date", "description": "Only documents after this day." }
            },
            "required": ["query"]
        },
        "annotations": { "readOnlyHint": true, "openWorldHint": false }
    })
}

fn small_text() -> String {
    format!(
        "{MARKER}: 3 documents found, the newest from 2026-07-28, none of them restricted. Ask for one by its number."
    )
}

fn large_text() -> String {
    let line = "The quick brown fox jumps over the \"lazy\" dog, again and again, until the page is full.\n";
    let filler: String = line.chars().cycle().take(LARGE - 2 * MARKER.len()).collect();
    format!("{MARKER}{filler}{MARKER}")
}
