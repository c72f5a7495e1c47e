//! Names: of upstreams, and of their tools as clients see them.
//!
//! The exposed name is made here and nowhere else, and nothing ever splits one: the catalog remembers where each
//! name came from.

use std::{collections::HashSet, fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};

/// An upstream's name: `[A-Za-z0-9][A-Za-z0-9-]*`, at most 64 characters.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct ServerName(Arc<str>);

impl ServerName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ServerName {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let first = text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
        let rest = text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        match first && rest && text.len() <= 64 {
            true => Ok(ServerName(text.into())),
            false => Err(InvalidName(text.chars().take(80).collect())),
        }
    }
}

impl<'de> Deserialize<'de> for ServerName {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

impl fmt::Display for ServerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for ServerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Not a server name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidName(String);

impl fmt::Display for InvalidName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} is not a server name: use letters, digits and `-`, starting with a letter or digit, at most 64",
            self.0
        )
    }
}

impl std::error::Error for InvalidName {}

/// How exposed names are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NamingMode {
    /// `<server>_<tool>`, always.
    #[default]
    Prefix,
    /// The tool's own name. Where two upstreams have the same, the first in order keeps it and the others get
    /// the prefix.
    Bare,
    /// The tool's own name, unless two upstreams have the same: then all of them get the prefix.
    OnCollision,
}

impl FromStr for NamingMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "prefix" => Ok(NamingMode::Prefix),
            "bare" => Ok(NamingMode::Bare),
            "on-collision" => Ok(NamingMode::OnCollision),
            other => Err(format!("{other:?} is not a naming mode: use prefix, bare or on-collision")),
        }
    }
}

impl fmt::Display for NamingMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NamingMode::Prefix => "prefix",
            NamingMode::Bare => "bare",
            NamingMode::OnCollision => "on-collision",
        })
    }
}

/// The rule by which exposed names are made.
///
/// ```
/// use portcullis::protocol::Naming;
///
/// let exposed = Naming::default().expose(&[("github".parse()?, "search".into())]);
/// assert_eq!(&*exposed[0], "github_search");
/// # Ok::<(), portcullis::protocol::InvalidName>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Naming {
    /// Which names get the server's.
    pub mode: NamingMode,
    /// What stands between the server's name and the tool's.
    pub separator: String,
    /// The longest exposed name. A longer one is cut and gets a hash. 128 is the specification's limit; some
    /// clients stop at 64.
    pub limit: usize,
}

impl Default for Naming {
    fn default() -> Self {
        Naming { mode: NamingMode::Prefix, separator: "_".to_owned(), limit: 128 }
    }
}

impl Naming {
    /// The exposed name of each (server, own name), in order; all different. The order is the priority.
    pub fn expose(&self, names: &[(ServerName, Arc<str>)]) -> Vec<Arc<str>> {
        let mut taken: HashSet<Arc<str>> = HashSet::with_capacity(names.len());
        let shared = self.shared_names(names);
        names
            .iter()
            .map(|(server, own)| {
                let prefixed = || format!("{server}{}{own}", self.separator);
                let wanted = match self.mode {
                    NamingMode::Prefix => prefixed(),
                    NamingMode::Bare if taken.contains(own) => prefixed(),
                    NamingMode::OnCollision if shared.contains(own) => prefixed(),
                    NamingMode::Bare | NamingMode::OnCollision => own.to_string(),
                };
                let name = self.free(wanted, server, own, &taken);
                taken.insert(name.clone());
                name
            })
            .collect()
    }

    /// The names that more than one entry has.
    fn shared_names<'a>(&self, names: &'a [(ServerName, Arc<str>)]) -> HashSet<&'a Arc<str>> {
        let mut seen = HashSet::with_capacity(names.len());
        match self.mode {
            NamingMode::OnCollision => {
                names.iter().map(|(_, own)| own).filter(|own| !seen.insert(*own)).collect()
            }
            NamingMode::Prefix | NamingMode::Bare => HashSet::new(),
        }
    }

    /// `wanted`, or a shortened form with a hash when it is too long or taken.
    fn free(&self, wanted: String, server: &ServerName, own: &str, taken: &HashSet<Arc<str>>) -> Arc<str> {
        let fits = |name: &str| name.chars().count() <= self.limit && !taken.contains(name);
        if fits(&wanted) {
            return wanted.into();
        }
        (0u32..)
            .map(|salt| {
                let hash = format!("{:08x}", fnv1a(&[server.as_str(), "\0", own, "\0", &salt.to_string()]));
                let room = self.limit.saturating_sub(hash.len() + 1);
                let head: String = wanted.chars().take(room).collect();
                format!("{head}_{hash}")
            })
            .find(|name| !taken.contains(name.as_str()))
            .expect("some salt gives a free name")
            .into()
    }
}

/// FNV-1a, 32 bits: names must come out the same on every run and machine, and need no secrecy.
fn fnv1a(parts: &[&str]) -> u32 {
    parts
        .iter()
        .flat_map(|p| p.bytes())
        .fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn names(pairs: &[(&str, &str)]) -> Vec<(ServerName, Arc<str>)> {
        pairs.iter().map(|(s, t)| (s.parse().unwrap(), (*t).into())).collect()
    }

    fn exposed(mode: NamingMode, pairs: &[(&str, &str)]) -> Vec<String> {
        let naming = Naming { mode, ..Naming::default() };
        naming.expose(&names(pairs)).iter().map(|n| n.to_string()).collect()
    }

    #[test]
    fn the_three_modes() {
        let pairs = [("a", "read"), ("b", "read"), ("b", "write")];
        assert_eq!(exposed(NamingMode::Prefix, &pairs), ["a_read", "b_read", "b_write"]);
        assert_eq!(exposed(NamingMode::Bare, &pairs), ["read", "b_read", "write"]);
        assert_eq!(exposed(NamingMode::OnCollision, &pairs), ["a_read", "b_read", "write"]);
    }

    #[test]
    fn refuses_server_names_that_would_not_stay_unique() {
        for bad in ["", "-a", "a_b", "a.b", "ä", "a b", &"x".repeat(65)] {
            assert!(bad.parse::<ServerName>().is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn names_are_unique_short_and_stable(
            pairs in proptest::collection::btree_set(("[a-c]{1,2}", "[a-c_-]{1,12}"), 0..30),
            mode in prop_oneof![
                Just(NamingMode::Prefix), Just(NamingMode::Bare), Just(NamingMode::OnCollision)
            ],
            separator in "[_-]",
            limit in 10usize..20,
        ) {
            let naming = Naming { mode, separator, limit };
            let names: Vec<(ServerName, Arc<str>)> =
                pairs.iter().map(|(s, t)| (s.parse().unwrap(), t.as_str().into())).collect();
            let exposed = naming.expose(&names);
            prop_assert_eq!(exposed.len(), names.len());
            prop_assert_eq!(exposed.iter().collect::<HashSet<_>>().len(), names.len());
            prop_assert!(exposed.iter().all(|n| n.chars().count() <= limit));
            prop_assert_eq!(exposed, naming.expose(&names));
        }
    }
}
