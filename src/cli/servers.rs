//! `add`, `remove`, `enable`, `disable`, `list` and `refresh`.

use std::path::Path;

use anyhow::Result;

use super::{
    DataDir, Usage, args,
    control::{Edit, Edited, ServerView, State},
    note, say, spec, view, warn,
};
use crate::{config::env, protocol::ServerName, registry::Origin, upstream::Transport};

pub(super) async fn add(args: &args::Add, dir: &DataDir) -> Result<()> {
    let server = spec::record(args)?;
    let name = server.name.clone();
    let missing = match &server.spec.transport {
        Transport::Stdio { command, .. } if !is_there(command) => Some(command.clone()),
        _ => None,
    };
    let edit = Edit::Add { server: Box::new(server), replace: args.replace };
    let edited = dir.control().await?.edit(edit).await?;
    if let Some(command) = missing {
        warn(format!("there is no program `{command}` now: `{name}` stays down until there is"));
    }
    told(&name, &edited)
}

pub(super) async fn remove(name: &str, dir: &DataDir) -> Result<()> {
    edit(name, dir, |name| Edit::Remove { name }).await
}

pub(super) async fn enable(name: &str, dir: &DataDir) -> Result<()> {
    edit(name, dir, |name| Edit::Enable { name }).await
}

pub(super) async fn disable(name: &str, dir: &DataDir) -> Result<()> {
    edit(name, dir, |name| Edit::Disable { name }).await
}

async fn edit(name: &str, dir: &DataDir, edit: impl FnOnce(ServerName) -> Edit) -> Result<()> {
    let name = parsed(name)?;
    let edited = dir.control().await?.edit(edit(name.clone())).await?;
    told(&name, &edited)
}

pub(super) async fn list(json: bool, dir: &DataDir) -> Result<()> {
    let found = dir.control().await?.servers().await?;
    for unreadable in &found.unreadable {
        warn(unreadable);
    }
    if json {
        return say(serde_json::to_string_pretty(&found.servers)?);
    }
    if found.servers.is_empty() {
        return say(
            "No servers yet. Add one: portcullis add NAME URL, or portcullis add NAME -- COMMAND ARGS..",
        );
    }
    say(view::text(&view::servers(&found.servers)))?;
    for server in &found.servers {
        if let State::Down { error } = &server.state {
            note(format!("`{}` is down: {}", server.name, view::plain(error)));
        }
    }
    Ok(())
}

pub(super) async fn refresh(name: &str, dir: &DataDir) -> Result<()> {
    let server = dir.control().await?.refresh(parsed(name)?).await?;
    say(format!("refreshed `{}`: {}", server.name, how_many(&server)))
}

// === what they share ===

fn parsed(name: &str) -> Result<ServerName> {
    name.parse().map_err(|error: crate::protocol::InvalidName| Usage(error.to_string()).into())
}

/// Says what a change came to.
fn told(name: &ServerName, edited: &Edited) -> Result<()> {
    let Edited { outcome, origin, server, kept } = edited;
    let said = match outcome.as_str() {
        "unchanged" => format!("`{name}` was so already"),
        outcome => format!("{outcome} `{name}`"),
    };
    let news = match server {
        Some(server) => match &server.state {
            State::Down { error } => format!("; it is down: {}", view::plain(error)),
            State::Connecting => "; it has not answered yet".to_owned(),
            State::Up => format!(": {}", how_many(server)),
            State::Disabled | State::NotRunning => String::new(),
        },
        None => String::new(),
    };
    say(said + &news)?;
    if *origin == Origin::File {
        note(format!("`{name}` is the config file's: the file counts again when it is next read"));
    }
    if !kept {
        note("this gateway is the demonstration: nothing is kept when it ends");
    }
    Ok(())
}

fn how_many(server: &ServerView) -> String {
    server.tools.map_or_else(|| "no news of its tools".to_owned(), |tools| view::count(tools, "tool"))
}

/// Whether the program can be found. What is known only when it starts is taken to be there.
fn is_there(command: &str) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    let is_program = |path: &Path| {
        path.metadata().is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    };
    if command.contains("${") {
        return true;
    }
    if command.contains('/') {
        return is_program(Path::new(command));
    }
    let path = env::process(env::PATH.name).unwrap_or_default();
    std::env::split_paths(&path).any(|dir| is_program(&dir.join(command)))
}
