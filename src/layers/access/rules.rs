//! The predicate.

use std::{
    collections::{HashMap, HashSet},
    error::Error,
    fmt,
};

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};

use crate::protocol::{Route, ServerName};

/// Which tools, prompts and resources of which upstream may be seen. A server without rules shows everything.
#[derive(Clone, Debug, Default)]
pub struct AccessRules {
    servers: HashMap<ServerName, ServerRules>,
}

#[derive(Clone, Debug)]
struct ServerRules {
    allow: Option<Globs>,
    deny: Globs,
}

/// Globs, and their own text: a template's name holds braces, which mean something else in a glob.
#[derive(Clone, Debug)]
struct Globs {
    set: GlobSet,
    literals: HashSet<String>,
}

impl Globs {
    fn is_match(&self, name: &str) -> bool {
        self.literals.contains(name) || self.set.is_match(name)
    }
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

    /// Whether the server has rules: then what nobody here understands must not reach it, for that could be a way around
    /// them.
    pub fn restricts(&self, server: &ServerName) -> bool {
        self.servers.contains_key(server)
    }

    /// Whether something named `own` at `server`, and `exposed` here, may be seen and called.
    pub fn allows(&self, server: &ServerName, own: &str, exposed: &str) -> bool {
        let Some(rules) = self.servers.get(server) else { return true };
        let matches = |globs: &Globs| globs.is_match(own) || globs.is_match(exposed);
        !matches(&rules.deny) && rules.allow.as_ref().is_none_or(matches)
    }

    /// The same for where a name leads: an instance of a denied template is denied, and one of an allowed template
    /// is allowed, whatever its own URI is.
    pub fn allows_route(&self, route: &Route, exposed: &str) -> bool {
        let Some(rules) = self.servers.get(&route.server) else { return true };
        let names = [Some(&*route.own), Some(exposed), route.template.as_deref()];
        let matches = |globs: &Globs| names.iter().flatten().any(|name| globs.is_match(name));
        // What nobody lists is as the client spells it.
        let spelled = |name: &str| spellings(name).any(|name| rules.deny.is_match(&name));
        !matches(&rules.deny)
            && (route.definition.is_some() || !spelled(&route.own))
            && rules.allow.as_ref().is_none_or(matches)
    }
}

/// Other ways to write a URI, for all an upstream may know: decoded, without query and fragment, and with every slash
/// once.
fn spellings(uri: &str) -> impl Iterator<Item = String> {
    let plain = decoded(uri).unwrap_or_else(|| uri.to_owned());
    let bare = plain.split(['?', '#']).next().unwrap_or_default().to_owned();
    let (scheme, path) = bare.split_once("://").unwrap_or(("", &bare));
    let rooted = path.starts_with('/');
    let path = path.split('/').filter(|segment| !segment.is_empty()).collect::<Vec<_>>().join("/");
    let once = match (scheme, rooted) {
        ("", _) => path,
        (scheme, true) => format!("{scheme}:///{path}"),
        (scheme, false) => format!("{scheme}://{path}"),
    };
    [plain, bare, once].into_iter()
}

/// Without percent encoding. `None` when there is none.
pub(crate) fn decoded(uri: &str) -> Option<String> {
    uri.contains('%').then(|| {
        let (mut out, mut rest) = (Vec::with_capacity(uri.len()), uri.as_bytes());
        while let Some((first, after)) = rest.split_first() {
            let code = after.get(..2).and_then(|hex| std::str::from_utf8(hex).ok());
            let code = code.filter(|hex| *first == b'%' && hex.bytes().all(|b| b.is_ascii_hexdigit()));
            match code.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
                Some(byte) => {
                    out.push(byte);
                    rest = &after[2..];
                }
                None => {
                    out.push(*first);
                    rest = after;
                }
            }
        }
        String::from_utf8_lossy(&out).into_owned()
    })
}

fn compile(globs: &[String]) -> Result<Globs, InvalidGlob> {
    let mut set = GlobSetBuilder::new();
    for glob in globs {
        set.add(GlobBuilder::new(glob).literal_separator(false).build().map_err(InvalidGlob)?);
    }
    Ok(Globs { set: set.build().map_err(InvalidGlob)?, literals: globs.iter().cloned().collect() })
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
    fn what_a_template_is_denied_its_instances_are_too() {
        let server: ServerName = "s".parse().unwrap();
        let mut rules = AccessRules::default();
        rules.set_server(server.clone(), None, &["demo://secret/{id}".to_owned()]).unwrap();
        assert!(!rules.allows(&server, "demo://secret/{id}", "demo://secret/{id}"));
        let route = |template: &str| Route {
            server: server.clone(),
            own: "demo://secret/7".into(),
            template: Some(template.into()),
            definition: None,
        };
        assert!(!rules.allows_route(&route("demo://secret/{id}"), "demo://secret/7"));
        assert!(rules.allows_route(&route("demo://open/{id}"), "demo://secret/7"));
    }

    #[test]
    fn no_encoding_is_a_way_around_a_rule() {
        let server: ServerName = "s".parse().unwrap();
        let mut rules = AccessRules::default();
        rules.set_server(server.clone(), None, &["file:///secret/*".to_owned()]).unwrap();
        let allows = |own: &str| {
            let route = Route { server: server.clone(), own: own.into(), template: None, definition: None };
            rules.allows_route(&route, own)
        };
        assert!(!allows("file:///%73ecret/x"));
        assert!(!allows("file:///secret%2fx"));
        assert!(!allows("file:////secret/x"));
        assert!(!allows("file:///secret//x?y#z"));
        assert!(allows("file:///open/100%"));
        assert!(allows("file:///open/%zz%é"));
    }

    #[test]
    fn neither_query_nor_fragment_make_another_name() {
        let server: ServerName = "s".parse().unwrap();
        let mut rules = AccessRules::default();
        rules.set_server(server.clone(), None, &["demo://secret".to_owned()]).unwrap();
        for own in ["demo://secret#", "demo://secret?", "demo://secret?a#b", "demo://secret/"] {
            let route = Route { server: server.clone(), own: own.into(), template: None, definition: None };
            assert!(!rules.allows_route(&route, own), "{own}");
        }
    }

    #[test]
    fn a_star_crosses_slashes() {
        assert!(allows(Some(&["file:*"]), &[], "file:///a/b"));
    }
}
