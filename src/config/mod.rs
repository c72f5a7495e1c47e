//! The config file, and the environment.
//!
//! The file is the `{"mcpServers": {..}}` that other MCP clients use, so one that works there works here;
//! comments and trailing commas are allowed. Beside the keys that everybody has it knows a few of ours:
//!
//! | key | what |
//! |---|---|
//! | `listen` | the address, such as `"127.0.0.1:8000"` |
//! | `naming` | `"prefix"`, `"bare"` or `"on-collision"`: how tools are named |
//! | `separator` | what stands between a server's name and a tool's, `"_"` by default |
//! | `mcpServers.NAME.allow`, `.deny` | globs over what may be seen and called; `deny` wins |
//! | `.enabled` (or `.disabled`) | whether the server takes part |
//! | `.timeout` | the longest a request may take: seconds, or `"500ms"`, `"5s"`, `"2m"` |
//! | `.concurrency` | how many requests may be under way at once |
//! | `.isolation` | who shares a program: `"shared"`, everybody, or `"session"`, one for each client session |
//!
//! `type` may be `"http"` (or `"streamable-http"`), `"sse"` or `"stdio"`; without it, `url` means HTTP and
//! `command` a child process. `${VAR}`, `${VAR:-default}` and `${file:PATH}` stay as they are until a connection
//! is made (see [`secret`](crate::upstream::secret)). A relative `cwd` starts from where the gateway runs.
//!
//! A file is right as a whole or it changes nothing: all its problems are told at once.
//!
//! ```
//! use std::path::Path;
//!
//! let text = r#"{
//!     // As in any other client.
//!     "mcpServers": {
//!         "files": { "command": "mcp-server-filesystem", "args": ["/srv"], "timeout": "5s" },
//!     },
//! }"#;
//! let config = portcullis::config::parse(Path::new("mcp.json"), text)?;
//! assert_eq!(config.servers[0].name.as_str(), "files");
//!
//! let wrong = text.replace("timeout", "timeuot");
//! let error = portcullis::config::parse(Path::new("mcp.json"), &wrong).unwrap_err();
//! assert_eq!(
//!     error.to_string(),
//!     "mcp.json:4:74: mcpServers.files.timeuot: unknown key, did you mean `timeout`?"
//! );
//! # Ok::<(), portcullis::config::ConfigError>(())
//! ```

pub mod env;
mod file;
mod problem;
mod resolve;

use std::{fs::File, io::Read, path::Path};

pub use problem::{ConfigError, Problem};
use problem::{Problems, line_and_column};
pub use resolve::Config;

/// Reads a config file.
///
/// # Errors
///
/// Everything that is wrong with it, each with its line and its path in the file.
pub fn read(path: impl AsRef<Path>) -> Result<Config, ConfigError> {
    let path = path.as_ref();
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(LARGEST_FILE + 1).read_to_end(&mut bytes))
        .map_err(|error| ConfigError::whole(path, format!("cannot be read: {error}")))?;
    if bytes.len() as u64 > LARGEST_FILE {
        return Err(ConfigError::whole(path, "is larger than 16 MiB"));
    }
    let text = std::str::from_utf8(&bytes).map_err(|error| {
        let before = String::from_utf8_lossy(&bytes[..error.valid_up_to()]);
        ConfigError::one(path, Some(line_and_column(&before, before.len())), "the text is not UTF-8")
    })?;
    parse(path, text)
}

/// Reads the text of a config file. `file` is only for messages.
///
/// # Errors
///
/// Everything that is wrong with it, each with its line and its path in the file.
pub fn parse(file: &Path, text: &str) -> Result<Config, ConfigError> {
    // Some editors begin a file with a byte order mark.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut problems = Problems::default();
    let raw = file::read(text, &mut problems).map_err(|error| match error {
        file::Unparsable::Empty => {
            ConfigError::whole(file, "the file is empty; `{}` is the least it can hold")
        }
        file::Unparsable::Syntax { at, text } => ConfigError::one(file, Some(at), text),
    })?;
    let config = resolve::resolve(raw, &mut problems);
    problems.into_result(file, text)?;
    Ok(config)
}

/// Far more than anybody writes, and a bound for what is not a file.
const LARGEST_FILE: u64 = 16 * 1024 * 1024;

#[cfg(test)]
mod tests;
