//! `connect`: the lines that make a client use the gateway.

use anyhow::Result;
use serde_json::{Value, json};

use super::{
    DataDir,
    args::{self, Client},
    control::Control,
    note, say,
    serve::{DEFAULT_LISTEN, mcp_url},
};

pub(super) async fn run(args: &args::Connect, dir: &DataDir) -> Result<()> {
    let url = match Control::running(&dir.path()?).await {
        Some(info) => mcp_url(info.listen),
        None => {
            note("no gateway runs now, so this is the usual address: start it with `portcullis serve`");
            mcp_url(DEFAULT_LISTEN)
        }
    };
    match args.client {
        // Nothing but what is to be pasted, for scripts.
        Some(client) => say(lines(client, &url)),
        None => say(everything(&url)),
    }
}

fn lines(client: Client, url: &str) -> String {
    let pretty = |value: &Value| format!("{value:#}");
    match client {
        Client::ClaudeCode => format!("claude mcp add --transport http portcullis {url}"),
        Client::Cursor => pretty(&json!({ "mcpServers": { "portcullis": { "url": url } } })),
        Client::Vscode => {
            let server = json!({ "name": "portcullis", "type": "http", "url": url });
            format!("code --add-mcp '{server}'")
        }
        Client::McpJson => pretty(&json!({ "mcpServers": { "portcullis": { "type": "http", "url": url } } })),
    }
}

fn everything(url: &str) -> String {
    let vscode_file = json!({ "servers": { "portcullis": { "type": "http", "url": url } } });
    let parts = [
        ("Claude Code, in a terminal:", lines(Client::ClaudeCode, url)),
        ("Cursor, in ~/.cursor/mcp.json:", lines(Client::Cursor, url)),
        ("VS Code, in a terminal:", lines(Client::Vscode, url)),
        ("VS Code, or for one project, in .vscode/mcp.json:", format!("{vscode_file:#}")),
        ("Any client that reads .mcp.json:", lines(Client::McpJson, url)),
    ];
    let part = |(title, lines): (&str, String)| {
        let indented = lines.lines().map(|line| format!("  {line}"));
        format!("{title}\n\n{}", Vec::from_iter(indented).join("\n"))
    };
    Vec::from_iter(parts.map(part)).join("\n\n")
}
