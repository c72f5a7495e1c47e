//! The command line as clap reads it. The help text is the documentation, so it is written here with care; the
//! rules behind it are checked where they live.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::protocol::NamingMode;

/// One governed endpoint in front of many MCP servers.
///
/// Start the gateway with `portcullis serve`, put servers behind it with `portcullis add`, and point your client
/// at it with what `portcullis connect` prints. While a gateway runs, the other commands act through it and what
/// they change is live at once; while none runs, they work on what it will find when it starts.
#[derive(Debug, Parser)]
#[command(name = "portcullis", version, max_term_width = 100, after_help = ENVIRONMENT)]
pub(super) struct Cli {
    /// Where the registry is kept [default: $PORTCULLIS_DATA_DIR, or ~/.portcullis]
    #[arg(long, global = true, value_name = "DIR", display_order = 900)]
    pub(super) data_dir: Option<PathBuf>,

    #[command(subcommand)]
    pub(super) command: Command,
}

const ENVIRONMENT: &str = "\
Environment:
  PORTCULLIS_DATA_DIR  the data directory, when --data-dir is not given
  PORTCULLIS_LOG       what is logged on stderr, such as `debug` or `portcullis::upstream=trace`
  NO_COLOR             no colours, when it is set to anything

Exit codes: 0 done, 1 it failed, 2 the command line or the config file is wrong.";

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    Serve(Serve),
    Stdio(Stdio),
    Add(Add),
    /// Take a server away, and all that is known of it
    Remove(Name),
    /// Let a disabled server take part again
    Enable(Name),
    /// Keep a server's record, and show nothing of it
    Disable(Name),
    /// Show the servers and how they are
    List(List),
    /// Show the tools that clients see
    Tools(Tools),
    Call(Call),
    /// Ask a server again what it offers
    Refresh(Name),
    Connect(Connect),
}

/// Run the gateway.
///
/// It serves MCP at http://ADDRESS/mcp over streamable HTTP, to clients of every protocol revision. Ctrl-C or
/// SIGTERM ends it when the requests under way are answered; a second one ends it at once.
#[derive(Debug, Args)]
pub(super) struct Serve {
    /// A config file: the `{"mcpServers": {..}}` that other MCP clients use
    ///
    /// Comments are allowed. Its servers are exactly those of the file, beside those added by hand. A file with
    /// a mistake changes nothing.
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,

    /// Where to listen [default: the config file's `listen`, or 127.0.0.1:8000]
    #[arg(long, value_name = "ADDRESS", value_parser = listen_address)]
    pub(super) listen: Option<SocketAddr>,

    /// Also serve requests that name this host, such as `gateway.lan`; `*` for any
    ///
    /// Only loopback names are served otherwise: a page in a browser can reach this machine under a name of its own.
    #[arg(long = "allow-host", value_name = "HOST")]
    pub(super) hosts: Vec<String>,

    /// Also serve pages of this origin, such as `https://app.example.com`
    #[arg(long = "allow-origin", value_name = "ORIGIN")]
    pub(super) origins: Vec<String>,

    /// Also serve the HTTP+SSE transport of 2024-11-05, at /sse, for clients that know no other
    #[arg(long)]
    pub(super) sse: bool,

    /// How many threads serve connections [default: one for each processor]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(super) lanes: Option<u16>,

    /// How tools are named: `prefix` (server_tool), `bare` or `on-collision` [default: prefix]
    #[arg(long, value_name = "MODE", value_parser = |text: &str| text.parse::<NamingMode>())]
    pub(super) naming: Option<NamingMode>,

    /// Bring two small built-in servers, `clock` and `notes`, to try things with
    ///
    /// They are gone when the gateway ends. Without --data-dir nothing else is kept either.
    #[arg(long)]
    pub(super) demo: bool,
}

/// Serve one client on stdin and stdout.
///
/// For clients that only start programs: everything behind the gateway is then one such program. While a gateway runs
/// on the data directory, the client is passed on to it; otherwise the servers that are registered now run for this
/// client alone, and changes made meanwhile count from the next start.
#[derive(Debug, Args)]
pub(super) struct Stdio {
    /// Serve the servers of this config file, whatever is registered or runs
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
}

/// Put a server behind the gateway.
///
/// The server need not be up: the gateway connects when it can. Values may refer to secrets with `${VAR}`,
/// `${VAR:-default}` or `${file:PATH}`; they are read when a connection is made, and never stored or shown.
#[derive(Debug, Args)]
#[command(
    override_usage = "portcullis add [OPTIONS] <NAME> <URL>\n       portcullis add [OPTIONS] <NAME> -- <COMMAND> [ARGS]...",
    after_help = "\
Examples:
  portcullis add docs https://mcp.example.com/mcp --header 'Authorization: Bearer ${DOCS_TOKEN}'
  portcullis add memory -- npx -y @modelcontextprotocol/server-memory
  portcullis add git --allow 'git_log' --allow 'git_diff*' -- uvx mcp-server-git"
)]
pub(super) struct Add {
    /// Its name, which its tools get in front: letters, digits and `-`
    pub(super) name: String,

    /// Where the server is
    pub(super) url: Option<String>,

    /// The program that is the server, and its arguments
    #[arg(last = true, value_name = "COMMAND")]
    pub(super) command: Vec<String>,

    /// An environment variable for the program; may be repeated
    #[arg(long, value_name = "NAME=VALUE")]
    pub(super) env: Vec<String>,

    /// The directory the program starts in
    #[arg(long, value_name = "DIR")]
    pub(super) cwd: Option<PathBuf>,

    /// A header that is sent with every request; may be repeated
    #[arg(long, value_name = "NAME: VALUE")]
    pub(super) header: Vec<String>,

    /// Show only what matches, by the tool's own name or as clients see it; may be repeated
    #[arg(long, value_name = "GLOB")]
    pub(super) allow: Vec<String>,

    /// Hide what matches, whatever --allow says; may be repeated
    #[arg(long, value_name = "GLOB")]
    pub(super) deny: Vec<String>,

    /// How to speak to it: `http`, `sse` or `stdio` [default: http for a URL, stdio for a program]
    #[arg(long, value_name = "TRANSPORT")]
    pub(super) transport: Option<String>,

    /// The longest a request may take: seconds, or `500ms`, `5s`, `2m` [default: 60s]
    #[arg(long, value_name = "TIME")]
    pub(super) timeout: Option<String>,

    /// Who shares the program: `shared`, one for everybody, or `session`, one for each client session [default: shared]
    ///
    /// With `session` it keeps no state of others, and can ask its client: for elicitation, sampling and roots.
    #[arg(long, value_name = "ISOLATION")]
    pub(super) isolation: Option<String>,

    /// Replace the server of that name, if there is one
    #[arg(long)]
    pub(super) replace: bool,
}

#[derive(Debug, Args)]
pub(super) struct Name {
    /// The server's name
    pub(super) name: String,
}

#[derive(Debug, Args)]
pub(super) struct List {
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Debug, Args)]
pub(super) struct Tools {
    /// Print the definitions as JSON
    #[arg(long)]
    pub(super) json: bool,

    #[command(flatten)]
    pub(super) wait: Wait,
}

/// Call a tool, as a client would.
///
/// Access rules hold. Prints text as it is and everything else as JSON. Exits with 1 when the tool fails.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  portcullis call clock_now
  portcullis call clock_add_days date=2026-02-27 days=3
  portcullis call notes_add '{\"text\": \"buy milk\"}'")]
pub(super) struct Call {
    /// The tool, by the name that `portcullis tools` shows
    pub(super) tool: String,

    /// One JSON object, or `name=value` for each argument
    ///
    /// A value is read as JSON when it is JSON and the tool does not ask for a string; otherwise it is text.
    #[arg(value_name = "JSON | NAME=VALUE")]
    pub(super) arguments: Vec<String>,

    /// Print the result as it came, as JSON
    #[arg(long)]
    pub(super) json: bool,

    #[command(flatten)]
    pub(super) wait: Wait,
}

#[derive(Debug, Args)]
pub(super) struct Wait {
    /// The longest to wait for servers that were not reached yet
    #[arg(long, value_name = "SECONDS", default_value = "15", value_parser = seconds)]
    pub(super) wait: Duration,
}

/// Print the lines that connect a client to the gateway.
#[derive(Debug, Args)]
pub(super) struct Connect {
    /// Only for this client
    #[arg(long, value_enum)]
    pub(super) client: Option<Client>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Client {
    ClaudeCode,
    Cursor,
    Vscode,
    McpJson,
}

fn listen_address(text: &str) -> Result<SocketAddr, String> {
    // `localhost` is what people write, and it has one meaning.
    let text = text.replacen("localhost:", "127.0.0.1:", 1);
    text.parse().map_err(|_| "it is not an address and a port, such as 127.0.0.1:8000".to_owned())
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.trim_end_matches('s').parse().ok();
    seconds
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .filter(|wait| *wait <= Duration::from_secs(3600))
        .ok_or_else(|| "it is not a number of seconds from 0 to 3600".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_of_add_end_where_the_command_begins() {
        let line = ["portcullis", "add", "git", "--env", "A=1", "--", "uvx", "mcp-server-git", "--env", "B"];
        let Command::Add(add) = Cli::parse_from(line).command else { panic!() };
        assert_eq!(add.env, ["A=1"]);
        assert_eq!(add.command, ["uvx", "mcp-server-git", "--env", "B"]);
        assert_eq!(add.url, None);
    }
}
