//! References to secrets, resolved at the moment they are needed.
//!
//! What is stored, listed and logged holds `${GITHUB_TOKEN}`, never what that stands for. [`expand`] runs when a
//! connection is made, and its result is a [`Secret`]: it has no `Display`, and its `Debug` prints nothing.
//!
//! | written | becomes |
//! |---|---|
//! | `${VAR}`, `${env:VAR}` | the environment variable; unset is an error |
//! | `${VAR:-default}` | the same, or `default` when it is unset or empty |
//! | `${file:PATH}` | the file's text without its last line break; `~/` is the home directory |
//! | `$${` | `${` itself |
//!
//! ```
//! use portcullis::upstream::secret;
//!
//! let env = |name: &str| (name == "TOKEN").then(|| "s3cret".to_owned());
//! let header = secret::expand("Bearer ${TOKEN}", &env)?;
//! assert_eq!(header.expose(), "Bearer s3cret");
//! assert_eq!(format!("{header:?}"), "Secret(..)");
//! # Ok::<(), secret::Unresolved>(())
//! ```

use std::{
    error::Error,
    fmt,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

/// A text that is not to be shown: [`expose`](Secret::expose) is the only way to read it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

/// A reference that cannot be resolved. It names the variable or file, never what was in it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unresolved {
    /// The environment variable is not set, or not UTF-8.
    Unset {
        /// Its name.
        variable: String,
    },
    /// The file cannot serve as a secret.
    File {
        /// Where it is.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// There is a `${` that begins no reference.
    Malformed {
        /// What stands between `${` and `}`; `None` when there is no `}`.
        reference: Option<String>,
    },
}

/// Resolves every reference in `text`. `env` looks up an environment variable.
///
/// # Errors
///
/// The first reference that cannot be resolved.
pub fn expand(text: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<Secret, Unresolved> {
    let mut out = String::with_capacity(text.len());
    for piece in pieces(text) {
        match piece? {
            Piece::Text(text) => out.push_str(text),
            Piece::Env { name, default } => out.push_str(&variable(name, default, env)?),
            Piece::File(path) => out.push_str(&file(path, env)?),
        }
    }
    Ok(Secret(out))
}

/// Whether every `${` in `text` begins a reference, without resolving any: what a config check can know.
///
/// # Errors
///
/// [`Unresolved::Malformed`], for the first that does not.
pub fn check(text: &str) -> Result<(), Unresolved> {
    pieces(text).try_for_each(|piece| piece.map(drop))
}

/// The process's environment, as [`expand`] wants it.
pub fn process_env(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

// === impl Secret ===

impl Secret {
    /// The text. Pass it on to whoever needs it, and nowhere else.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// The text, owned. The same care.
    pub fn into_exposed(self) -> String {
        self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

// === impl Unresolved ===

impl fmt::Display for Unresolved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unresolved::Unset { variable } => {
                write!(f, "the environment variable `{variable}` is not set")
            }
            Unresolved::File { path, why } => write!(f, "the secret file `{}` {why}", path.display()),
            Unresolved::Malformed { reference: Some(inner) } => write!(
                f,
                "`${{{inner}}}` is not a reference: use `${{VAR}}`, `${{VAR:-default}}` or `${{file:PATH}}`, \
                 or `$${{` for the characters themselves"
            ),
            Unresolved::Malformed { reference: None } => {
                f.write_str("a `${` has no `}`: write `$${` for the characters themselves")
            }
        }
    }
}

impl Error for Unresolved {}

// === reading a text ===

enum Piece<'a> {
    Text(&'a str),
    Env { name: &'a str, default: Option<&'a str> },
    File(&'a str),
}

fn pieces(mut rest: &str) -> impl Iterator<Item = Result<Piece<'_>, Unresolved>> {
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let (piece, after) = next_piece(rest);
        rest = after;
        Some(piece)
    })
}

fn next_piece(text: &str) -> (Result<Piece<'_>, Unresolved>, &str) {
    // `$${` first: what follows the escaped dollar is plain text.
    if let Some(after) = text.strip_prefix("$${") {
        return (Ok(Piece::Text("${")), after);
    }
    if let Some(inner) = text.strip_prefix("${") {
        return match inner.split_once('}') {
            Some((inner, after)) => (reference(inner), after),
            None => (Err(Unresolved::Malformed { reference: None }), ""),
        };
    }
    let end = match text.find("${") {
        Some(at) if at > 0 && text.as_bytes()[at - 1] == b'$' => at - 1,
        Some(at) => at,
        None => text.len(),
    };
    (Ok(Piece::Text(&text[..end])), &text[end..])
}

fn reference(inner: &str) -> Result<Piece<'_>, Unresolved> {
    let malformed = || Unresolved::Malformed { reference: Some(inner.to_owned()) };
    if let Some(path) = inner.strip_prefix("file:") {
        return if path.is_empty() { Err(malformed()) } else { Ok(Piece::File(path)) };
    }
    let named = inner.strip_prefix("env:").unwrap_or(inner);
    let (name, default) = match named.split_once(":-") {
        Some((name, default)) => (name, Some(default)),
        None => (named, None),
    };
    let is_name = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
        && name.bytes().next().is_some_and(|b| !b.is_ascii_digit());
    if is_name { Ok(Piece::Env { name, default }) } else { Err(malformed()) }
}

fn variable(
    name: &str,
    default: Option<&str>,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<String, Unresolved> {
    match (env(name), default) {
        (Some(value), None) => Ok(value),
        (Some(value), Some(_)) if !value.is_empty() => Ok(value),
        (_, Some(default)) => Ok(default.to_owned()),
        (None, None) => Err(Unresolved::Unset { variable: name.to_owned() }),
    }
}

// === files ===

/// More than any key or token, less than what hurts to read by mistake.
const LARGEST_FILE: u64 = 64 * 1024;

fn file(path: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<String, Unresolved> {
    let path = match path.strip_prefix("~/") {
        Some(rest) => Path::new(&variable("HOME", None, env)?).join(rest),
        None => PathBuf::from(path),
    };
    let mut text = read_private(&path).map_err(|why| Unresolved::File { path, why })?;
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
    Ok(text)
}

fn read_private(path: &Path) -> Result<String, String> {
    let cannot = |error: io::Error| format!("cannot be read: {error}");
    // Before opening: opening a pipe would wait for its writer.
    if !fs::metadata(path).map_err(cannot)?.is_file() {
        return Err("is not a regular file".to_owned());
    }
    let file = File::open(path).map_err(cannot)?;
    let metadata = file.metadata().map_err(cannot)?;
    if !is_private(&metadata) {
        return Err("can be read by others: close it with `chmod 600`".to_owned());
    }
    let mut bytes = Vec::new();
    file.take(LARGEST_FILE + 1).read_to_end(&mut bytes).map_err(cannot)?;
    if bytes.len() as u64 > LARGEST_FILE {
        return Err("is larger than 64 KiB".to_owned());
    }
    String::from_utf8(bytes).map_err(|_| "is not UTF-8".to_owned())
}

#[cfg(unix)]
fn is_private(metadata: &fs::Metadata) -> bool {
    use std::os::unix::fs::PermissionsExt;
    metadata.permissions().mode() & 0o077 == 0
}

#[cfg(not(unix))]
fn is_private(_: &fs::Metadata) -> bool {
    true
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use proptest::prelude::*;

    use super::*;

    fn env(name: &str) -> Option<String> {
        match name {
            "TOKEN" => Some("s3cret".to_owned()),
            "EMPTY" => Some(String::new()),
            "ODD" => Some("a${TOKEN}b".to_owned()),
            _ => None,
        }
    }

    fn expanded(text: &str) -> String {
        expand(text, &env).unwrap().into_exposed()
    }

    fn refused(text: &str) -> String {
        expand(text, &env).unwrap_err().to_string()
    }

    #[test]
    fn resolves_references_and_nothing_else() {
        assert_eq!(expanded("Bearer ${TOKEN}!"), "Bearer s3cret!");
        assert_eq!(expanded("${env:TOKEN}${TOKEN}"), "s3crets3cret");
        assert_eq!(expanded("${EMPTY}|${EMPTY:-x}|${UNSET:-y}|${TOKEN:-z}|${UNSET:-}"), "|x|y|s3cret|");
        assert_eq!(expanded("$TOKEN $5 $$ 100%"), "$TOKEN $5 $$ 100%");
        assert_eq!(expanded("$${TOKEN} $$${TOKEN}"), "${TOKEN} $${TOKEN}");
        assert_eq!(expanded(""), "");
    }

    #[test]
    fn a_value_is_not_expanded_again() {
        assert_eq!(expanded("${ODD}"), "a${TOKEN}b");
    }

    #[test]
    fn names_what_is_missing_and_never_a_value() {
        assert_eq!(refused("${TOKEN} ${NOPE}"), "the environment variable `NOPE` is not set");
        assert_eq!(refused("a ${TOKEN"), "a `${` has no `}`: write `$${` for the characters themselves");
        assert_eq!(
            refused("${input:key}"),
            "`${input:key}` is not a reference: use `${VAR}`, `${VAR:-default}` or `${file:PATH}`, or `$${` for \
             the characters themselves"
        );
        for bad in ["${}", "${1}", "${a b}", "${file:}", "${env:}", "${:-x}"] {
            assert!(matches!(expand(bad, &env), Err(Unresolved::Malformed { .. })), "{bad}");
            assert!(check(bad).is_err());
        }
        assert_eq!(check("${NOPE} $${x ${file:/nowhere}"), Ok(()));
    }

    #[test]
    fn debug_prints_nothing_of_it() {
        assert_eq!(format!("{:?}", expand("${TOKEN}", &env).unwrap()), "Secret(..)");
    }

    #[test]
    fn reads_private_files_without_their_last_line_break() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8], mode: u32| {
            let path = dir.path().join(name);
            fs::write(&path, bytes).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            path.display().to_string()
        };
        let reference = |path: &str| format!("<${{file:{path}}}>");

        assert_eq!(expanded(&reference(&write("lf", b"key\n", 0o600))), "<key>");
        assert_eq!(expanded(&reference(&write("crlf", b"a\n\r\n", 0o400))), "<a\n>");
        assert_eq!(expanded(&reference(&write("full", &[b'x'; 65536], 0o600))).len(), 65538);

        let sentence = |path: &str, why: &str| format!("the secret file `{path}` {why}");
        let path = write("large", &[b'x'; 65537], 0o600);
        assert_eq!(refused(&reference(&path)), sentence(&path, "is larger than 64 KiB"));
        let path = write("open", b"key", 0o640);
        assert_eq!(
            refused(&reference(&path)),
            sentence(&path, "can be read by others: close it with `chmod 600`")
        );
        let path = write("binary", b"\xff", 0o600);
        assert_eq!(refused(&reference(&path)), sentence(&path, "is not UTF-8"));
        let path = dir.path().display().to_string();
        assert_eq!(refused(&reference(&path)), sentence(&path, "is not a regular file"));
        let path = format!("{path}/nothing");
        assert_eq!(
            refused(&reference(&path)),
            sentence(&path, "cannot be read: No such file or directory (os error 2)")
        );
    }

    #[test]
    fn finds_the_home_directory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        fs::write(&path, "k").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let home = |name: &str| (name == "HOME").then(|| dir.path().display().to_string());
        assert_eq!(expand("${file:~/key}", &home).unwrap().expose(), "k");
        assert_eq!(refused("${file:~/key}"), "the environment variable `HOME` is not set");
    }

    proptest! {
        #[test]
        fn never_panics(text in "[${}:a-zé~/-]{0,20}|\\PC{0,40}") {
            let _ = expand(&text, &env);
            prop_assert_eq!(check(&text).is_err(), pieces(&text).any(|p| p.is_err()));
        }

        #[test]
        fn text_without_references_stays(text in "[^$]{0,40}") {
            prop_assert_eq!(expanded(&text), text);
        }
    }
}
