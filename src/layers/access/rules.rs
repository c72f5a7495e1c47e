//! The predicate.

use std::{collections::HashMap, error::Error, fmt};

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};

use crate::protocol::ServerName;

/// Which tools, prompts and resources of which upstream may be seen. A server without rules shows everything.
#[derive(Clone, Debug, Default)]
pub struct AccessRules {
    servers: HashMap<ServerName, ServerRules>,
}

#[derive(Clone, Debug)]
struct ServerRules {
    allow: Option<GlobSet>,
    deny: GlobSet,
}

impl AccessRules {
    /// Sets the rules of one server. Globs match case-sensitively, `*` crosses everything, and either the upstream's
    /// own name or the exposed one may match. `allow: None` allows everything, an empty list nothing; `deny` wins.
    pub fn set_server(
        &mut self,
        server: ServerName,
        allow: Option<&[String]>,
        deny: &[String],
    ) -> Result<(), InvalidGlob> {
        if allow.is_none() && deny.is_empty() {
            self.servers.remove(&server);
            return Ok(());
        }
        let rules = ServerRules { allow: allow.map(compile).transpose()?, deny: compile(deny)? };
        self.servers.insert(server, rules);
        Ok(())
    }

    /// Whether nothing is restricted.
    pub fn is_empty(&self) -> bool {
        self.servers.is_empty()
    }

    /// Whether something named `own` at `server`, and `exposed` here, may be seen and called.
    pub fn allows(&self, server: &ServerName, own: &str, exposed: &str) -> bool {
        let Some(rules) = self.servers.get(server) else { return true };
        let matches = |globs: &GlobSet| globs.is_match(own) || globs.is_match(exposed);
        !matches(&rules.deny) && rules.allow.as_ref().is_none_or(matches)
    }
}

fn compile(globs: &[String]) -> Result<GlobSet, InvalidGlob> {
    let mut set = GlobSetBuilder::new();
    for glob in globs {
        set.add(GlobBuilder::new(glob).literal_separator(false).build().map_err(InvalidGlob)?);
    }
    set.build().map_err(InvalidGlob)
}

/// Not a glob.
#[derive(Debug)]
pub struct InvalidGlob(globset::Error);

impl fmt::Display for InvalidGlob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.glob() {
            Some(glob) => write!(f, "{glob:?} is not a glob: {}", self.0.kind()),
            None => write!(f, "not a glob: {}", self.0.kind()),
        }
    }
}

impl Error for InvalidGlob {}

#[cfg(test)]
mod tests {
    use super::*;

    fn allows(allow: Option<&[&str]>, deny: &[&str], own: &str) -> bool {
        let owned = |globs: &[&str]| globs.iter().map(|g| (*g).to_owned()).collect::<Vec<_>>();
        let server: ServerName = "s".parse().unwrap();
        let mut rules = AccessRules::default();
        rules.set_server(server.clone(), allow.map(owned).as_deref(), &owned(deny)).unwrap();
        rules.allows(&server, own, &format!("s_{own}"))
    }

    #[test]
    fn absent_allows_all_and_empty_none() {
        assert!(allows(None, &[], "x"));
        assert!(!allows(Some(&[]), &[], "x"));
    }

    #[test]
    fn deny_wins() {
        assert!(!allows(Some(&["read"]), &["r*"], "read"));
    }

    #[test]
    fn either_name_matches_and_case_counts() {
        assert!(allows(Some(&["s_read"]), &[], "read"));
        assert!(allows(Some(&["read"]), &[], "read"));
        assert!(!allows(Some(&["Read"]), &[], "read"));
        assert!(!allows(None, &["s_*"], "read"));
    }

    #[test]
    fn a_star_crosses_slashes() {
        assert!(allows(Some(&["file:*"]), &[], "file:///a/b"));
    }
}
