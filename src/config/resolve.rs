//! From what is written to what is meant: every value gets its type, or a sentence about why it has none.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, time::Duration};

use http::{HeaderName, HeaderValue, Uri};

use super::{
    file::{Placed, RawFile, RawServer, RawTime, Strings},
    problem::Problems,
};
use crate::{
    protocol::{Naming, ServerName},
    registry::{Origin, Rules, ServerRecord},
    upstream::{Isolation, Transport, UpstreamSpec, secret},
};

/// A config file, understood.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// Where to listen.
    pub listen: Option<SocketAddr>,
    /// Whether the HTTP+SSE transport of 2024-11-05 is served, too.
    pub sse: Option<bool>,
    /// How exposed names are made; there when the file has `naming` or `separator`.
    pub naming: Option<Naming>,
    /// The servers, in the order of the file, each with [`Origin::File`].
    pub servers: Vec<ServerRecord>,
}

/// What of the file can be understood; the rest goes to `problems`.
pub(super) fn resolve(raw: RawFile, problems: &mut Problems) -> Config {
    let listen = raw.listen.and_then(|listen| listen_address(&listen, problems));
    let naming = naming(raw.naming.as_ref(), raw.separator.as_ref(), problems);
    let servers = raw.servers.into_iter().filter_map(|server| resolve_server(server, problems)).collect();
    Config { listen, sse: raw.sse.map(|sse| sse.value), naming, servers }
}

// === the gateway's own keys ===

fn listen_address(listen: &Placed<String>, problems: &mut Problems) -> Option<SocketAddr> {
    let parsed = listen.value.parse().ok();
    if parsed.is_none() {
        let said = format!("{:?} is not an address and a port, such as \"127.0.0.1:8000\"", listen.value);
        problems.add(&listen.place, said);
    }
    parsed
}

fn naming(
    mode: Option<&Placed<String>>,
    separator: Option<&Placed<String>>,
    problems: &mut Problems,
) -> Option<Naming> {
    if mode.is_none() && separator.is_none() {
        return None;
    }
    let mut naming = Naming::default();
    if let Some(mode) = mode {
        match mode.value.parse() {
            Ok(mode) => naming.mode = mode,
            Err(error) => problems.add(&mode.place, error),
        }
    }
    if let Some(separator) = separator {
        let fits = (1..=8).contains(&separator.value.len())
            && separator.value.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.".contains(&b));
        if fits {
            naming.separator.clone_from(&separator.value);
        } else {
            problems.add(&separator.place, "must be 1 to 8 letters, digits, `_`, `-` or `.`");
        }
    }
    Some(naming)
}

// === a server ===

fn resolve_server(raw: RawServer, problems: &mut Problems) -> Option<ServerRecord> {
    let name = server_name(&raw.name, problems);
    let rules = Rules {
        allow: raw.allow.as_ref().map(|globs| checked_globs(globs, problems)),
        deny: raw.deny.as_ref().map(|globs| checked_globs(globs, problems)).unwrap_or_default(),
    };
    let enabled = enabled(&raw, problems);
    let timeout = raw.timeout.as_ref().and_then(|timeout| duration(timeout, problems));
    let concurrency = raw.concurrency.as_ref().and_then(|limit| concurrency(limit, problems));
    let isolation = raw.isolation.as_ref().and_then(|wanted| isolation(wanted, raw.url.is_some(), problems));
    let mut spec = UpstreamSpec::new(transport(raw, problems)?);
    spec.timeout = timeout.unwrap_or(spec.timeout);
    spec.concurrency = concurrency.unwrap_or(spec.concurrency);
    spec.isolation = isolation.unwrap_or(spec.isolation);
    Some(ServerRecord { name: name?, spec, enabled, rules, origin: Origin::File })
}

fn server_name(name: &Placed<String>, problems: &mut Problems) -> Option<ServerName> {
    match name.value.parse() {
        Ok(name) => Some(name),
        Err(error) => {
            let dashed = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
            let near = name.value.chars().map(dashed).collect::<String>();
            let near: String = near.trim_matches('-').chars().take(64).collect();
            let said = match near.parse::<ServerName>() {
                Ok(near) => format!("{error}; \"{near}\" would do"),
                Err(_) => error.to_string(),
            };
            problems.add(&name.place, said);
            None
        }
    }
}

fn checked_globs(globs: &Strings, problems: &mut Problems) -> Vec<String> {
    for glob in &globs.value {
        if let Err(error) = globset::Glob::new(&glob.value) {
            problems.add(&glob.place, format!("{:?} is not a glob: {}", glob.value, error.kind()));
        }
    }
    globs.value.iter().map(|glob| glob.value.clone()).collect()
}

fn enabled(raw: &RawServer, problems: &mut Problems) -> bool {
    match (&raw.enabled, &raw.disabled) {
        (Some(_), Some(disabled)) => {
            problems.add(&disabled.place, "stands beside `enabled`, and one of them is enough");
            true
        }
        (Some(enabled), None) => enabled.value,
        (None, Some(disabled)) => !disabled.value,
        (None, None) => true,
    }
}

fn duration(timeout: &Placed<RawTime>, problems: &mut Problems) -> Option<Duration> {
    let millis = match &timeout.value {
        RawTime::Seconds(seconds) => seconds * 1000.0,
        RawTime::Text(text) => match millis(text) {
            Some(millis) => millis,
            None => {
                let said = format!(
                    "{text:?} is not a time: use seconds, or a string such as \"500ms\", \"5s\" or \"2m\""
                );
                problems.add(&timeout.place, said);
                return None;
            }
        },
    };
    if !(1.0..=LONGEST_TIMEOUT).contains(&millis) {
        problems.add(&timeout.place, "must be between 1 ms and 24 h; a number is in seconds");
        return None;
    }
    // In range, so nothing is cut but fractions of a millisecond.
    Some(Duration::from_millis(millis as u64))
}

/// `5s` in milliseconds.
fn millis(text: &str) -> Option<f64> {
    let unit_at = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, unit) = text.split_at(unit_at);
    let scale = match unit {
        "ms" => 1.0,
        "s" => 1000.0,
        "m" => 60_000.0,
        "h" => 3_600_000.0,
        _ => return None,
    };
    Some(number.parse::<f64>().ok()? * scale)
}

/// Longer than any tool call, and a sign of milliseconds where seconds are meant.
const LONGEST_TIMEOUT: f64 = 24.0 * 3_600_000.0;

fn concurrency(limit: &Placed<f64>, problems: &mut Problems) -> Option<usize> {
    if limit.value.fract() == 0.0 && (1.0..=MOST_AT_ONCE).contains(&limit.value) {
        return Some(limit.value as usize);
    }
    problems.add(&limit.place, "must be a whole number from 1 to 1000000");
    None
}

const MOST_AT_ONCE: f64 = 1_000_000.0;

fn isolation(wanted: &Placed<String>, has_url: bool, problems: &mut Problems) -> Option<Isolation> {
    if has_url {
        let said = "does not go with `url`: such a server tells its sessions apart by itself";
        problems.add(&wanted.place, said);
        return None;
    }
    match wanted.value.as_str() {
        "shared" => Some(Isolation::Shared),
        "session" => Some(Isolation::Session),
        other => {
            let said = format!("{other:?} is not an isolation: use \"shared\" or \"session\"");
            problems.add(&wanted.place, said);
            None
        }
    }
}

// === how to reach it ===

fn transport(raw: RawServer, problems: &mut Problems) -> Option<Transport> {
    let kind = match &raw.kind {
        Some(kind) => Some(Kind::read(kind, problems)?),
        None => None,
    };
    let (command, url) = match (raw.command, raw.url) {
        (Some(_), Some(_)) => {
            problems.add(&raw.name.place, "has both `command` and `url`, and can have only one of them");
            return None;
        }
        (None, None) => {
            // When a key was refused, it was probably the one that is missing.
            if raw.intact {
                let said = "needs `command`, a program to start, or `url`, a server to call";
                problems.add(&raw.name.place, said);
            }
            return None;
        }
        found => found,
    };
    let has = if command.is_some() { "command" } else { "url" };
    if let (Some(kind), Some(written)) = (kind, &raw.kind)
        && (kind == Kind::Stdio) != command.is_some()
    {
        problems.add(&written.place, format!("{:?} does not go with `{has}`", written.value));
    }
    let stray = match has {
        "command" => vec![raw.headers.as_ref().map(|headers| &headers.place)],
        _ => vec![
            raw.args.as_ref().map(|args| &args.place),
            raw.env.as_ref().map(|env| &env.place),
            raw.cwd.as_ref().map(|cwd| &cwd.place),
        ],
    };
    for place in stray.into_iter().flatten() {
        problems.add(place, format!("does not go with `{has}`"));
    }
    match (command, url) {
        (Some(command), _) => Some(Transport::Stdio {
            command: program(command, problems),
            args: raw.args.map(|args| arguments(args.value, problems)).unwrap_or_default(),
            env: raw.env.map(|env| environment(env.value, problems)).unwrap_or_default(),
            cwd: raw.cwd.map(|cwd| PathBuf::from(argument(cwd, problems))),
        }),
        (None, url) => {
            let url = checked_url(url?, problems);
            let headers = raw.headers.map(|headers| checked_headers(headers.value, problems));
            let headers = headers.unwrap_or_default();
            Some(match kind {
                Some(Kind::Sse) => Transport::Sse { url, headers },
                _ => Transport::Http { url, headers },
            })
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Http,
    Sse,
    Stdio,
}

impl Kind {
    fn read(written: &Placed<String>, problems: &mut Problems) -> Option<Kind> {
        match written.value.as_str() {
            // One thing, as three families of clients spell it.
            "http" | "streamable-http" | "streamableHttp" => Some(Kind::Http),
            "sse" => Some(Kind::Sse),
            "stdio" => Some(Kind::Stdio),
            other => {
                let said = format!("{other:?} is not a type: use \"http\", \"sse\" or \"stdio\"");
                problems.add(&written.place, said);
                None
            }
        }
    }
}

fn program(command: Placed<String>, problems: &mut Problems) -> String {
    if command.value.trim().is_empty() {
        problems.add(&command.place, "must name a program");
    }
    argument(command, problems)
}

fn arguments(args: Vec<Placed<String>>, problems: &mut Problems) -> Vec<String> {
    args.into_iter().map(|arg| argument(arg, problems)).collect()
}

fn environment(env: Vec<(String, Placed<String>)>, problems: &mut Problems) -> BTreeMap<String, String> {
    let checked = env.into_iter().map(|(name, value)| {
        if name.is_empty() || name.contains(['=', '\0']) {
            problems.add(&value.place, format!("{name:?} is not a name of an environment variable"));
        }
        (name, argument(value, problems))
    });
    checked.collect()
}

/// What is given to a process: any text without NUL, with references.
fn argument(text: Placed<String>, problems: &mut Problems) -> String {
    if text.value.contains('\0') {
        problems.add(&text.place, "has a NUL character, which cannot be given to a program");
    }
    with_references(text, problems)
}

fn checked_headers(
    headers: Vec<(String, Placed<String>)>,
    problems: &mut Problems,
) -> BTreeMap<String, String> {
    let checked = headers.into_iter().map(|(name, value)| {
        if HeaderName::from_bytes(name.as_bytes()).is_err() {
            problems.add(&value.place, format!("{name:?} is not a header name"));
        }
        if HeaderValue::from_bytes(value.value.as_bytes()).is_err() {
            problems.add(&value.place, "has a character that a header cannot have");
        }
        (name, with_references(value, problems))
    });
    checked.collect()
}

fn checked_url(url: Placed<String>, problems: &mut Problems) -> String {
    if let Err(said) = check_url(&url.value) {
        problems.add(&url.place, said);
    }
    with_references(url, problems)
}

/// The text is not repeated: a URL may hold a key.
fn check_url(url: &str) -> Result<(), String> {
    // All of it, or its beginning, comes when the connection is made.
    if url.starts_with("${") {
        return Ok(());
    }
    let lower = url.to_ascii_lowercase();
    let Some(rest) = lower.strip_prefix("http://").or_else(|| lower.strip_prefix("https://")) else {
        return Err("must start with `http://` or `https://`".to_owned());
    };
    if rest.is_empty() || rest.starts_with(['/', '?', '#', ':']) {
        return Err("has no host".to_owned());
    }
    if url.contains("${") {
        return Ok(());
    }
    let uri: Uri = url.parse().map_err(|error| format!("is not a URL: {error}"))?;
    match uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
        true => Err("must not hold a user name or password: send them in `headers`".to_owned()),
        false => Ok(()),
    }
}

fn with_references(text: Placed<String>, problems: &mut Problems) -> String {
    if let Err(error) = secret::check(&text.value) {
        problems.add(&text.place, error.to_string());
    }
    text.value
}
