//! Every environment variable that Portcullis reads, and nothing reads one that is not here.
//!
//! (What a config file refers to with `${VAR}` is the person's own; see [`secret`](crate::upstream::secret).)
//!
//! ```
//! use std::path::Path;
//!
//! use portcullis::config::env;
//!
//! let vars = |name: &str| (name == env::DATA_DIR.name).then(|| "/srv/portcullis".into());
//! assert_eq!(env::data_dir(None, &vars)?, Path::new("/srv/portcullis"));
//! assert_eq!(env::data_dir(Some("/flag".into()), &vars)?, Path::new("/flag"));
//! # Ok::<(), env::NoHome>(())
//! ```

use std::{error::Error, ffi::OsString, fmt, path::PathBuf};

/// An environment variable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variable {
    /// Its name.
    pub name: &'static str,
    /// What it does, for `--help` and the docs.
    pub about: &'static str,
}

/// Where the registry, the control socket and the secrets are.
pub const DATA_DIR: Variable = Variable {
    name: "PORTCULLIS_DATA_DIR",
    about: "the data directory, when `--data-dir` is not given; `~/.portcullis` by default",
};

/// What is logged.
pub const LOG: Variable = Variable {
    name: "PORTCULLIS_LOG",
    about: "a tracing filter that says what is logged, such as `debug` or `portcullis::upstream=trace`",
};

/// Plain output.
pub const NO_COLOR: Variable =
    Variable { name: "NO_COLOR", about: "no colours in the output, when it is set to anything" };

/// The home directory.
pub const HOME: Variable =
    Variable { name: "HOME", about: "where `~/.portcullis` is, and `${file:~/..}` looks" };

/// Programs.
pub const PATH: Variable = Variable { name: "PATH", about: "where programs of servers are looked for" };

/// All of them.
pub const ALL: &[Variable] = &[DATA_DIR, LOG, NO_COLOR, HOME, PATH];

/// There is no home directory to put the data in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoHome;

/// The data directory: the flag's, else [`DATA_DIR`]'s, else `~/.portcullis`. A variable that is empty is not set.
///
/// # Errors
///
/// When it comes to the last and `HOME` is not set.
pub fn data_dir(flag: Option<PathBuf>, vars: &dyn Fn(&str) -> Option<OsString>) -> Result<PathBuf, NoHome> {
    let set = |variable: Variable| vars(variable.name).filter(|value| !value.is_empty()).map(PathBuf::from);
    flag.or_else(|| set(DATA_DIR)).or_else(|| Some(set(HOME)?.join(".portcullis"))).ok_or(NoHome)
}

/// The process's environment, as [`data_dir`] wants it.
pub fn process(name: &str) -> Option<OsString> {
    std::env::var_os(name)
}

impl fmt::Display for NoHome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "there is no home directory: say where the data is with --data-dir or PORTCULLIS_DATA_DIR",
        )
    }
}

impl Error for NoHome {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flag_before_variable_before_home() {
        let both = |name: &str| match name {
            "PORTCULLIS_DATA_DIR" => Some("/var/p".into()),
            "HOME" => Some("/home/me".into()),
            _ => None,
        };
        let home = |name: &str| match name {
            "PORTCULLIS_DATA_DIR" => Some("".into()),
            name => both(name),
        };
        assert_eq!(data_dir(Some("d".into()), &both), Ok("d".into()));
        assert_eq!(data_dir(None, &both), Ok("/var/p".into()));
        assert_eq!(data_dir(None, &home), Ok("/home/me/.portcullis".into()));
        assert_eq!(data_dir(None, &|_| None), Err(NoHome));
        assert_eq!(
            NoHome.to_string(),
            "there is no home directory: say where the data is with --data-dir or PORTCULLIS_DATA_DIR"
        );
    }
}
