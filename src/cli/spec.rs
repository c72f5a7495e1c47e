//! From the options of `add` to a record. They go through the rules of the config file, so that both pens take
//! and refuse the same.

use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::{Map, Value, json};

use super::{Usage, args::Add};
use crate::{
    config::{self, Problem},
    registry::{Origin, ServerRecord},
};

/// The record that the options describe.
pub(super) fn record(add: &Add) -> Result<ServerRecord> {
    let wanted = json!({ "mcpServers": { &add.name: entry(add)? } });
    match config::parse(Path::new(""), &wanted.to_string()) {
        Ok(mut config) => {
            let record = config.servers.pop().context("nothing to add")?;
            Ok(ServerRecord { origin: Origin::Cli, ..record })
        }
        Err(error) => {
            let said = error.problems.iter().map(|problem| sentence(&add.name, problem));
            Err(Usage(Vec::from_iter(said).join("\nerror: ")).into())
        }
    }
}

/// As the config file would have it.
fn entry(add: &Add) -> Result<Value> {
    let mut entry = Map::new();
    let mut set = |key: &str, value: Value| entry.insert(key.to_owned(), value);
    match (&add.url, add.command.split_first()) {
        (Some(url), None) => {
            if let Some(program) = not_a_url(url) {
                let name = &add.name;
                return usage(format!(
                    "{program:?} is not a URL, which starts with http:// or https://: to add a program, write \
                     `portcullis add {name} -- {program} ARGS..`"
                ));
            }
            set("url", json!(url));
        }
        (None, Some((command, args))) => {
            set("command", json!(from_anywhere(command)?));
            set("args", json!(args));
        }
        (Some(_), Some(_)) => {
            return usage("a server is either at a URL or a program after `--`, not both".to_owned());
        }
        (None, None) => {
            let name = &add.name;
            return usage(format!(
                "say what `{name}` is: `portcullis add {name} URL`, or `portcullis add {name} -- COMMAND ARGS..`"
            ));
        }
    }
    if !add.env.is_empty() {
        set("env", pairs("--env", "=", "NAME=VALUE", &add.env)?);
    }
    if !add.header.is_empty() {
        set("headers", pairs("--header", ":", "NAME: VALUE", &add.header)?);
    }
    if let Some(cwd) = &add.cwd {
        let cwd = cwd.to_str().ok_or_else(|| Usage("--cwd: the path is not UTF-8".to_owned()))?;
        set("cwd", json!(from_here(cwd)?));
    }
    if !add.allow.is_empty() {
        set("allow", json!(add.allow));
    }
    if !add.deny.is_empty() {
        set("deny", json!(add.deny));
    }
    if let Some(transport) = &add.transport {
        set("type", json!(transport));
    }
    if let Some(isolation) = &add.isolation {
        set("isolation", json!(isolation));
    }
    if let Some(timeout) = &add.timeout {
        // A bare number is in seconds, as in the file.
        let number = timeout.parse::<f64>().ok().filter(|seconds| seconds.is_finite());
        set("timeout", number.map_or(json!(timeout), |seconds| json!(seconds)));
    }
    Ok(Value::Object(entry))
}

/// The program that was written where a URL belongs.
fn not_a_url(url: &str) -> Option<&str> {
    let is_url = url.contains("://") || url.starts_with("${") || url.contains(char::is_whitespace);
    (!is_url && !url.is_empty()).then_some(url)
}

fn pairs(option: &str, separator: &str, form: &str, texts: &[String]) -> Result<Value> {
    let mut pairs = Map::new();
    for text in texts {
        // What follows the separator may be a secret: it is not repeated.
        let Some((name, value)) = text.split_once(separator) else {
            return usage(format!("{option}: it is not of the form `{form}`: there is no `{separator}`"));
        };
        let (name, value) = match separator {
            ":" => (name.trim(), value.trim()),
            _ => (name, value),
        };
        if pairs.insert(name.to_owned(), json!(value)).is_some() {
            return usage(format!("{option}: `{name}` is given twice"));
        }
    }
    Ok(Value::Object(pairs))
}

/// The gateway may run elsewhere, so a relative path is meant from here. A bare name is looked up in PATH.
fn from_anywhere(command: &str) -> Result<String> {
    match command.contains('/') {
        true => from_here(command),
        false => Ok(command.to_owned()),
    }
}

fn from_here(path: &str) -> Result<String> {
    if path.starts_with("${") || path.is_empty() {
        return Ok(path.to_owned());
    }
    let absolute = std::path::absolute(path).with_context(|| format!("cannot tell where {path} is"))?;
    Ok(absolute.to_str().map_or_else(|| path.to_owned(), ToOwned::to_owned))
}

/// A problem of the file, said of the option it came from.
fn sentence(name: &str, problem: &Problem) -> String {
    let path = problem.path.strip_prefix("mcpServers").unwrap_or(&problem.path);
    let quoted = format!("[{name:?}]");
    let path = path.strip_prefix(&*quoted).or_else(|| path.strip_prefix('.')?.strip_prefix(name));
    let key = path.unwrap_or_default().trim_start_matches('.');
    let (first, rest) = key.find(['.', '[']).map_or((key, ""), |at| key.split_at(at));
    let inner = rest.trim_start_matches('.');
    let option = match first {
        "" => return problem.text.clone(),
        "url" => return format!("the URL {}", problem.text),
        "command" => return format!("the command {}", problem.text),
        "args" => return format!("an argument of the command: {}", problem.text),
        "type" => "--transport".to_owned(),
        "headers" => format!("--header {inner}"),
        "env" => format!("--env {inner}"),
        other => format!("--{other}"),
    };
    format!("{}: {}", option.trim_end(), problem.text)
}

fn usage<T>(said: String) -> Result<T> {
    Err(Usage(said).into())
}
