//! What is shown of servers and tools, and how: tables that fit the terminal, and nothing secret in them.

use std::io::{self, IsTerminal as _};

use comfy_table::{CellAlignment, ColumnConstraint, ContentArrangement, Table, Width, presets};

use super::control::{ServerView, State};
use crate::{
    registry::ServerRecord,
    upstream::{Isolation, Transport},
};

/// A record as it may be shown.
pub(super) fn server(server: &ServerRecord, state: State, tools: Option<usize>) -> ServerView {
    let spec = &server.spec;
    let (headers, env) = match &spec.transport {
        Transport::Http { headers, .. } | Transport::Sse { headers, .. } => {
            (Vec::from_iter(headers.keys().cloned()), Vec::new())
        }
        Transport::Stdio { env, .. } => (Vec::new(), Vec::from_iter(env.keys().cloned())),
        Transport::Builtin { .. } => Default::default(),
    };
    ServerView {
        name: server.name.clone(),
        state,
        tools,
        transport: spec.transport.kind().to_owned(),
        place: place(&spec.transport),
        headers,
        env,
        allow: server.rules.allow.clone(),
        deny: server.rules.deny.clone(),
        isolation: spec.isolation,
        timeout_ms: u64::try_from(spec.timeout.as_millis()).unwrap_or(u64::MAX),
        origin: server.origin,
    }
}

/// The servers as a table.
pub(super) fn servers(servers: &[ServerView]) -> Table {
    let mut table = table(["NAME", "STATUS", "TOOLS", "WHERE", "RULES"]);
    for server in servers {
        let tools = server.tools.map_or_else(|| "-".to_owned(), |tools| tools.to_string());
        table.add_row([
            server.name.to_string(),
            state(&server.state).to_owned(),
            tools,
            place_and_names(server),
            rules(server),
        ]);
    }
    align_right(&mut table, 2);
    table
}

/// The tools as a table: name, server, first line of the description.
pub(super) fn tools<'a>(tools: impl Iterator<Item = (String, &'a str, String)>) -> Table {
    let mut table = table(["NAME", "SERVER", "DESCRIPTION"]);
    for (name, server, description) in tools {
        table.add_row([plain(&name), server.to_owned(), plain(&description)]);
    }
    // Names are there to be copied: they are not broken.
    if let Some(column) = table.column_mut(0) {
        column.set_constraint(ColumnConstraint::ContentWidth);
    }
    table
}

/// The table's text, ready to be printed.
pub(super) fn text(table: &Table) -> String {
    let lines = table.lines().map(|line| line.trim_end().to_owned());
    Vec::from_iter(lines).join("\n")
}

/// In a word.
pub(super) fn state(state: &State) -> &'static str {
    match state {
        State::Up => "up",
        State::Connecting => "connecting",
        State::Down { .. } => "down",
        State::Disabled => "disabled",
        State::NotRunning => "not running",
    }
}

/// One line, whatever it holds: no line breaks, no control characters.
pub(super) fn plain(text: &str) -> String {
    let words = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty());
    Vec::from_iter(words).join(" ")
}

/// `1 tool`, `2 tools`.
pub(super) fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

// === tables ===

fn table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    if io::stdout().is_terminal() {
        // A line of the terminal is long enough, or the text is wrapped.
        table.set_content_arrangement(ContentArrangement::Dynamic);
    } else {
        table.set_content_arrangement(ContentArrangement::Disabled);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    if let Some(column) = table.column_mut(N - 1) {
        column.set_padding((0, 0));
    }
    if let Some(column) = table.column_mut(0) {
        column.set_constraint(ColumnConstraint::LowerBoundary(Width::Fixed(8)));
    }
    table
}

fn align_right(table: &mut Table, column: usize) {
    if let Some(column) = table.column_mut(column) {
        column.set_cell_alignment(CellAlignment::Right);
    }
}

fn place_and_names(server: &ServerView) -> String {
    let names = |what: &str, names: &[String]| match names {
        [] => String::new(),
        names => format!("  ({what} {})", names.join(", ")),
    };
    let shared = match server.isolation {
        Isolation::Shared => "",
        Isolation::Session => "  (one for each session)",
    };
    format!("{}{}{}{shared}", server.place, names("headers", &server.headers), names("env", &server.env))
}

fn rules(server: &ServerView) -> String {
    let mut rules = Vec::new();
    match server.allow.as_deref() {
        None => {}
        Some([]) => rules.push("allow nothing".to_owned()),
        Some(globs) => rules.push(format!("allow {}", globs.join(" "))),
    }
    if !server.deny.is_empty() {
        rules.push(format!("deny {}", server.deny.join(" ")));
    }
    rules.join("; ")
}

// === secrets ===

/// How a server is reached, with everything that looks like a secret hidden: people write keys into URLs and
/// arguments, although `${VAR}` is there for them.
fn place(transport: &Transport) -> String {
    match transport {
        Transport::Http { url, .. } | Transport::Sse { url, .. } => plain(&without_query_values(url)),
        Transport::Stdio { command, args, .. } => {
            let mut shown = vec![plain(command)];
            let mut secret_follows = false;
            for arg in args {
                shown.push(if secret_follows { hidden(arg) } else { argument(arg) });
                secret_follows = arg.starts_with('-') && !arg.contains('=') && is_telling(arg);
            }
            shown.join(" ")
        }
        Transport::Builtin { .. } => "built in".to_owned(),
    }
}

/// `https://x/mcp?key=…`
fn without_query_values(url: &str) -> String {
    let Some((before, query)) = url.split_once('?') else { return url.to_owned() };
    let pairs = query.split('&').map(|pair| match pair.split_once('=') {
        Some((name, value)) => format!("{name}={}", hidden(value)),
        None => pair.to_owned(),
    });
    format!("{before}?{}", Vec::from_iter(pairs).join("&"))
}

fn argument(arg: &str) -> String {
    match arg.split_once('=') {
        Some((name, value)) if is_telling(name) => format!("{}={}", plain(name), hidden(value)),
        _ if arg.is_empty() || arg.contains(char::is_whitespace) => format!("'{}'", plain(arg)),
        _ => plain(arg),
    }
}

/// A reference is no secret.
fn hidden(value: &str) -> String {
    match value.starts_with("${") && value.ends_with('}') {
        true => plain(value),
        false => "…".to_owned(),
    }
}

/// Whether what has this name is not for everybody's eyes.
fn is_telling(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    ["key", "token", "secret", "passw", "auth", "credential", "bearer"].iter().any(|word| name.contains(word))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upstream::UpstreamSpec;

    #[test]
    fn secrets_in_urls_and_arguments_are_hidden() {
        let url = place(&UpstreamSpec::http("https://x/mcp?apiKey=s3cret&v=2&t=${T}").transport);
        assert_eq!(url, "https://x/mcp?apiKey=…&v=…&t=${T}");
        let args = ["--api-key=s3cret", "--token", "s3cret", "--root", "/srv/a b", "API_TOKEN=${T}"];
        let command = place(&UpstreamSpec::stdio("run", args).transport);
        assert_eq!(command, "run --api-key=… --token … --root '/srv/a b' API_TOKEN=${T}");
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(plain("a\u{1b}[31m\r\n b\u{7}"), "a [31m b");
    }
}
