//! What is wrong with a config file: everything at once, each in one sentence, with its place.

use std::{
    error::Error,
    fmt,
    path::{Path, PathBuf},
};

/// A config file that cannot be used. It prints a line per problem, in the order of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The file.
    pub file: PathBuf,
    /// What is wrong with it; at least one.
    pub problems: Vec<Problem>,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Line and column, from 1; `None` when it is about the whole file.
    pub at: Option<(usize, usize)>,
    /// The path in the file, such as `mcpServers.files.timeout`; may be empty.
    pub path: String,
    /// The sentence, without place and path.
    pub text: String,
}

/// The problems found so far, by their offset in the text.
#[derive(Default)]
pub(super) struct Problems(Vec<(Place, String)>);

/// A place in a file: how far into the text, and the path there.
#[derive(Clone, Debug, Default)]
pub(super) struct Place {
    pub(super) offset: usize,
    pub(super) path: String,
}

// === impl ConfigError ===

impl ConfigError {
    pub(super) fn whole(file: &Path, text: impl Into<String>) -> Self {
        ConfigError::one(file, None, text)
    }

    pub(super) fn one(file: &Path, at: Option<(usize, usize)>, text: impl Into<String>) -> Self {
        let problem = Problem { at, path: String::new(), text: text.into() };
        ConfigError { file: file.to_owned(), problems: vec![problem] }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, Problem { at, path, text }) in self.problems.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{}", self.file.display())?;
            if let Some((line, column)) = at {
                write!(f, ":{line}:{column}")?;
            }
            if !path.is_empty() {
                write!(f, ": {path}")?;
            }
            write!(f, ": {text}")?;
        }
        Ok(())
    }
}

impl Error for ConfigError {}

// === impl Problems ===

impl Problems {
    pub(super) fn add(&mut self, place: &Place, text: impl Into<String>) {
        self.0.push((place.clone(), text.into()));
    }

    pub(super) fn count(&self) -> usize {
        self.0.len()
    }

    /// An error when there are any.
    pub(super) fn into_result(mut self, file: &Path, text: &str) -> Result<(), ConfigError> {
        if self.0.is_empty() {
            return Ok(());
        }
        self.0.sort_by_key(|(place, _)| place.offset);
        let problem = |(place, said): (Place, String)| Problem {
            at: Some(line_and_column(text, place.offset)),
            path: place.path,
            text: said,
        };
        Err(ConfigError { file: file.to_owned(), problems: self.0.into_iter().map(problem).collect() })
    }
}

// === impl Place ===

impl Place {
    /// The place of what is under `key` here.
    pub(super) fn key(&self, offset: usize, key: &str) -> Place {
        let plain = !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_$".contains(&b));
        let path = match (self.path.as_str(), plain) {
            ("", true) => key.to_owned(),
            (path, true) => format!("{path}.{key}"),
            (path, false) => format!("{path}[{key:?}]"),
        };
        Place { offset, path }
    }

    /// The place of a list's item here.
    pub(super) fn index(&self, offset: usize, index: usize) -> Place {
        Place { offset, path: format!("{}[{index}]", self.path) }
    }
}

/// From 1, in characters.
pub(super) fn line_and_column(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |at| at + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}
