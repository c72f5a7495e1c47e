//! URIs: whose each is, and how one is spelled that two upstreams have.
//!
//! A URI stays as its upstream wrote it, for clients compare it with those in results. Where two have the same, the
//! first in order keeps it, and the other gets its server's name in front: `files+demo://x`. Hosts of MCP Apps accept no
//! scheme but `ui`, so there the name stands behind the scheme: `ui://files+chart`.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap, HashSet},
    ops::Bound,
    sync::Arc,
};

use bytes::Bytes;
use globset::{Glob, GlobSet, GlobSetBuilder};
use serde_json::{json, value::RawValue};

use super::{Catalog, view};
use crate::{
    layers::Route,
    layers::decoded,
    protocol::{Item, ItemKind, RawObject, ServerName},
};

const UI: &str = "ui://";

/// All that is addressed by URI.
#[derive(Default)]
pub(super) struct Uris {
    servers: HashSet<ServerName>,
    listed: HashMap<Arc<str>, Listed>,
    templates: Vec<Listed>,
    by_template: HashMap<Arc<str>, usize>,
    fitting: Fitting,
    /// By the directory a skill is in, with the slash at its end.
    skills: BTreeMap<Arc<str>, Skill>,
    /// What tool definitions point to and nobody lists.
    linked: HashMap<Arc<str>, ServerName>,
    /// The upstreams that have something under another spelling than their own.
    respelled: HashSet<ServerName>,
    /// Whose all of a scheme and authority is. Nobody's when several have some.
    families: HashMap<Box<str>, Option<ServerName>>,
    /// The only upstream with skills: it may have more than it lists.
    skilled: Option<ServerName>,
}

struct Listed {
    server: ServerName,
    own: Arc<str>,
    raw: Bytes,
}

/// Whose a URI nobody lists may be, as that upstream spells it, and the template it fits.
type Guess<'a> = (&'a ServerName, Cow<'a, str>, Option<&'a Arc<str>>);

struct Skill {
    server: ServerName,
    /// The directory, as the upstream spells it.
    own: Arc<str>,
    /// The URI of its `SKILL.md`, likewise.
    entry: Arc<str>,
}

/// A URI of one upstream under a spelling nobody else has.
fn spelled(server: &ServerName, own: &str) -> String {
    match own.strip_prefix(UI) {
        Some(rest) => format!("{UI}{server}+{rest}"),
        None => format!("{server}+{own}"),
    }
}

/// The lists of what has a URI, and who is who in them.
pub(super) struct Merged {
    pub(super) uris: Uris,
    pub(super) resources: Vec<Item>,
    pub(super) templates: Vec<Item>,
    pub(super) skills: Vec<Item>,
}

impl Uris {
    pub(super) fn merge(catalogs: &[(ServerName, Arc<Catalog>)]) -> Merged {
        let mut uris =
            Uris { servers: catalogs.iter().map(|(server, _)| server.clone()).collect(), ..Uris::default() };
        let has_skills = |catalog: &Catalog| {
            catalog.capabilities().is_some_and(|capabilities| ItemKind::Skills.is_offered(&capabilities))
        };
        let mut skilled = catalogs.iter().filter(|(_, catalog)| has_skills(catalog));
        uris.skilled = skilled.next().filter(|_| skilled.next().is_none()).map(|(server, _)| server.clone());
        let resources = by_uri(ItemKind::Resources, catalogs);
        let templates = by_uri(ItemKind::Templates, catalogs);
        let listed = |item: &Item| Listed {
            server: item.server.clone(),
            own: item.own.clone(),
            raw: item.raw.clone(),
        };
        uris.listed = resources.iter().map(|item| (item.exposed.clone(), listed(item))).collect();
        uris.by_template = templates.iter().enumerate().map(|(i, t)| (t.exposed.clone(), i)).collect();
        uris.templates = templates.iter().map(listed).collect();
        uris.fitting = Fitting::new(&templates);
        for item in resources.iter().chain(&templates) {
            if let Some(family) = family(&item.own) {
                let owner = uris.families.entry(family.into()).or_insert_with(|| Some(item.server.clone()));
                if owner.as_ref() != Some(&item.server) {
                    *owner = None;
                }
            }
        }
        let skills = uris.take_skills(catalogs, &resources);
        let respelled = [&resources, &templates, &skills].into_iter().flatten();
        uris.respelled = respelled.filter(|i| i.exposed != i.own).map(|i| i.server.clone()).collect();
        Merged { uris, resources, templates, skills }
    }

    /// Skills are directories: one keeps its URI when nothing of another upstream is in it, nor it in another's.
    fn take_skills(&mut self, catalogs: &[(ServerName, Arc<Catalog>)], resources: &[Item]) -> Vec<Item> {
        let listed: BTreeMap<&str, &ServerName> =
            resources.iter().map(|item| (&*item.exposed, &item.server)).collect();
        let mut items = Vec::new();
        for (server, mut definition, own) in view::definitions_of(ItemKind::Skills, catalogs) {
            let Some(root) = skill_root(&own) else {
                tracing::warn!(%server, skill = %own, "left out a skill whose URI does not end in NAME/SKILL.md");
                continue;
            };
            let is_ours = |other: &ServerName| *other == server;
            let below = |root: &str| {
                let from = (Bound::Included(root), Bound::Unbounded);
                let skills = self.skills.range::<str, _>(from).take_while(|(r, _)| r.starts_with(root));
                let resources = listed.range(root..).take_while(|(uri, _)| uri.starts_with(root));
                skills.map(|(_, s)| &s.server).chain(resources.map(|(_, s)| *s)).all(is_ours)
            };
            let plain = below(root)
                && self.skills_around(root).all(|(_, skill)| is_ours(&skill.server))
                && self.fitting.all(&own).all(|i| is_ours(&self.templates[i].server));
            let exposed: Arc<str> = if plain { own.clone() } else { spelled(&server, &own).into() };
            let directory = exposed.strip_suffix("SKILL.md").unwrap_or_default().into();
            let skill = Skill { server: server.clone(), own: root.into(), entry: own.clone() };
            if self.skills.insert(directory, skill).is_some() {
                continue;
            }
            if !plain {
                respell_skill(&mut definition, |uri| Some(spelled(&server, uri)));
            }
            items.push(Item { exposed, server, own, raw: definition.into_bytes() });
        }
        items
    }

    /// The skills whose directories a URI is in, the innermost first, and how much of the URI that is.
    fn skills_around<'a>(&'a self, uri: &'a str) -> impl Iterator<Item = (usize, &'a Skill)> {
        let ends = uri.rmatch_indices('/').map(|(at, _)| at + 1);
        let ends = ends.take_while(|_| !self.skills.is_empty());
        ends.filter_map(|end| Some((end, self.skills.get(&uri[..end])?)))
    }

    /// Where a tool's definition points to, as clients find it here.
    pub(super) fn link(&mut self, server: &ServerName, uri: &str) -> Option<String> {
        if self.find(uri).is_none() {
            self.linked.insert(uri.into(), server.clone());
        }
        let other = self.spell(server, uri);
        if other.is_some() {
            self.respelled.insert(server.clone());
        }
        other
    }

    /// Whether anything of an upstream is spelled otherwise than it does.
    pub(super) fn respells(&self, server: &ServerName) -> bool {
        self.respelled.contains(server)
    }

    /// An upstream's URI as clients find it here. `None` when it is the same, or leads nowhere and means nothing to us.
    pub(super) fn spell(&self, server: &ServerName, own: &str) -> Option<String> {
        let other = match self.find(own) {
            Some(plain) => plain.server != *server,
            // A skill may be respelled for what is in its directory.
            None => self.skill_of(server, own).is_some(),
        };
        other.then(|| spelled(server, own))
    }

    /// What a template's name stands for.
    pub(super) fn find_template(&self, uri: &str) -> Option<Route> {
        match self.by_template.get(uri) {
            Some(i) => Some(self.templates[*i].route()),
            None => self.find(uri),
        }
    }

    /// What a URI stands for.
    pub(super) fn find(&self, uri: &str) -> Option<Route> {
        match self.listed.get(uri) {
            Some(listed) => Some(listed.route()),
            None => self.unlisted(uri),
        }
    }

    /// A URI nobody lists: it may be a skill's file, be what a tool points to, be spelled for one server, fit a
    /// template, or be of the family of what one upstream alone lists. Servers hand out such URIs in their results.
    fn unlisted(&self, uri: &str) -> Option<Route> {
        // Rules are about names as they are written. `/a/../b` is another way to write `/b`, and what needs no encoding is
        // encoded to slip through (RFC 3986, 6.2.2.2).
        let plain = decoded(uri);
        let plain = plain.as_deref().unwrap_or(uri);
        if plain.split(['/', '\\', '?', '#']).any(|s| matches!(s, "." | "..")) || encodes_unreserved(uri) {
            return None;
        }
        if let Some((root, skill)) = self.skills_around(uri).next() {
            let own = format!("{}{}", skill.own, &uri[root..]);
            return Some(unlisted(&skill.server, &own, Some(&skill.entry)));
        }
        let (server, own, template) = self.guess(uri)?;
        // The same rules hold for a skill's file under every spelling.
        let template = self.skill_of(server, &own).map(|skill| &skill.entry).or(template);
        Some(unlisted(server, &own, template))
    }

    fn guess<'a>(&'a self, uri: &'a str) -> Option<Guess<'a>> {
        if let Some(server) = self.linked.get(uri) {
            return Some((server, uri.into(), None));
        }
        if let Some(i) = self.fitting.of(uri) {
            let template = &self.templates[i];
            return Some((&template.server, uri.into(), Some(&template.own)));
        }
        if let Some((server, own)) = self.spelled_for(uri) {
            let fits = self.fitting.all(&own).find(|i| self.templates[*i].server == *server);
            return Some((server, own.into(), fits.map(|i| &self.templates[i].own)));
        }
        let owner = match self.families.get(family(uri)?) {
            Some(owner) => owner,
            None if uri.starts_with("skill://") => &self.skilled,
            None => return None,
        };
        Some((owner.as_ref()?, uri.into(), None))
    }

    /// The skill of one upstream that its URI is in.
    fn skill_of(&self, server: &ServerName, own: &str) -> Option<&Skill> {
        if self.skills.is_empty() {
            return None;
        }
        let of = |uri: &str| {
            let mut ends = uri.rmatch_indices('/').map(|(at, _)| at + 1);
            ends.find_map(|end| self.skills.get(&uri[..end]).filter(|skill| skill.server == *server))
        };
        of(own).or_else(|| of(&spelled(server, own)))
    }

    /// `files+demo://x` is `demo://x` of the upstream `files`.
    fn spelled_for(&self, uri: &str) -> Option<(&ServerName, String)> {
        let (server, own) = match uri.strip_prefix(UI) {
            Some(rest) => rest.split_once('+').map(|(server, rest)| (server, format!("{UI}{rest}")))?,
            None => uri.split_once('+').map(|(server, own)| (server, own.to_owned()))?,
        };
        let server: ServerName = server.parse().ok()?;
        Some((self.servers.get(&server)?, own))
    }
}

impl Listed {
    fn route(&self) -> Route {
        Route {
            server: self.server.clone(),
            own: self.own.clone(),
            template: None,
            definition: Some(self.raw.clone()),
        }
    }
}

fn unlisted(server: &ServerName, own: &str, template: Option<&Arc<str>>) -> Route {
    Route { server: server.clone(), own: own.into(), template: template.cloned(), definition: None }
}

/// The directory of a skill. It has a name, so that no skill is all there is of a scheme.
fn skill_root(uri: &str) -> Option<&str> {
    let root = uri.strip_suffix("SKILL.md")?;
    let name = root.strip_suffix('/')?.rsplit('/').next()?;
    (!name.is_empty() && !name.contains(':')).then_some(root)
}

/// Whether something is percent-encoded that means the same as it is.
fn encodes_unreserved(uri: &str) -> bool {
    uri.match_indices('%').any(|(at, _)| {
        let byte = uri.get(at + 1..at + 3).and_then(|hex| u8::from_str_radix(hex, 16).ok());
        byte.is_some_and(|byte| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte))
    })
}

/// `uri` and the files of a skill's entry, respelled where `spell` says so.
pub(super) fn respell_skill(entry: &mut RawObject, spell: impl Fn(&str) -> Option<String>) {
    respell_member(entry, "uri", &spell);
    let files = entry.get_bytes("resources").unwrap_or_default();
    if let Some(files) = respell_items(&files, &spell) {
        entry.set("resources", files);
    }
}

/// The `uri` of each object of an array. `None` when all stay what they are.
pub(super) fn respell_items(array: &Bytes, spell: impl Fn(&str) -> Option<String>) -> Option<String> {
    change_items(array, |item| respell_member(item, "uri", &spell))
}

/// The objects of an array, those changed that `change` says it has. `None` when it has none.
pub(super) fn change_items(array: &Bytes, change: impl Fn(&mut RawObject) -> bool) -> Option<String> {
    let items: Vec<&RawValue> = serde_json::from_slice(array).ok()?;
    let mut changed = false;
    let mut out = Vec::with_capacity(items.len());
    for item in items {
        let object = RawObject::parse(item.get().to_owned().into()).ok();
        let object = object.and_then(|mut object| change(&mut object).then_some(object));
        changed |= object.is_some();
        out.push(object.map_or_else(|| item.get().to_owned(), |object| object.as_str().to_owned()));
    }
    changed.then(|| format!("[{}]", out.join(",")))
}

/// Whether the member is another one now.
pub(super) fn respell_member(
    object: &mut RawObject,
    member: &str,
    spell: &impl Fn(&str) -> Option<String>,
) -> bool {
    let other = object.get_string(member).and_then(|uri| spell(&uri));
    if let Some(other) = &other {
        object.set(member, json!(other).to_string());
    }
    other.is_some()
}

/// Resources and templates, under their own URIs as far as these are theirs alone.
fn by_uri(kind: ItemKind, catalogs: &[(ServerName, Arc<Catalog>)]) -> Vec<Item> {
    let mut taken: HashSet<Arc<str>> = HashSet::new();
    let mut items = Vec::new();
    for (server, definition, own) in view::definitions_of(kind, catalogs) {
        let exposed: Arc<str> = match taken.contains(&own) {
            false => own.clone(),
            true => spelled(&server, &own).into(),
        };
        if taken.insert(exposed.clone()) {
            items.push(view::item(kind, server, own, exposed, definition));
        }
    }
    items
}

/// `scheme://authority`, or the scheme when there is no authority.
fn family(uri: &str) -> Option<&str> {
    let (scheme, rest) = uri.split_once(':')?;
    let authority =
        rest.strip_prefix("//").map(|rest| rest.find(['/', '?', '#', '{']).unwrap_or(rest.len()) + 2);
    Some(&uri[..scheme.len() + 1 + authority.unwrap_or(0)])
}

/// Which template a URI fits.
#[derive(Default)]
struct Fitting {
    globs: GlobSet,
    /// For each glob, the template's place in the list and how much of it is literal.
    places: Vec<(usize, usize)>,
}

impl Fitting {
    fn new(templates: &[Item]) -> Self {
        let mut set = GlobSetBuilder::new();
        let mut places = Vec::new();
        for (i, item) in templates.iter().enumerate() {
            let (glob, literal) = as_glob(&item.own);
            if let Ok(glob) = Glob::new(&glob) {
                set.add(glob);
                places.push((i, literal));
            }
        }
        Fitting { globs: set.build().unwrap_or_default(), places }
    }

    /// The templates that fit.
    fn all(&self, uri: &str) -> impl Iterator<Item = usize> {
        self.globs.matches(uri).into_iter().map(|glob| self.places[glob].0)
    }

    /// The most literal template that fits; the first of equals.
    fn of(&self, uri: &str) -> Option<usize> {
        let fitting = self.globs.matches(uri).into_iter().map(|g| self.places[g]);
        fitting.max_by_key(|(i, literal)| (*literal, std::cmp::Reverse(*i))).map(|(i, _)| i)
    }
}

/// A URI template (RFC 6570) as a glob, each expression a star, and the length of its literals. For routing that is
/// close enough; the upstream decides what the URI means.
fn as_glob(template: &str) -> (String, usize) {
    let (mut glob, mut literal, mut rest) = (String::new(), 0, template);
    while let Some((before, after)) = rest.split_once('{') {
        let Some((_, after)) = after.split_once('}') else { break };
        glob.push_str(&globset::escape(before));
        glob.push('*');
        literal += before.len();
        rest = after;
    }
    glob.push_str(&globset::escape(rest));
    (glob, literal + rest.len())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A URI that may be anybody's.
    fn uri() -> impl Strategy<Value = String> {
        "(ui://|demo://|skill://|a\\+demo://)[ab](/[ab]){0,2}"
    }

    proptest! {
        /// Whatever the catalogs: what is listed is found, is its own upstream's, and has a name of its own; and an
        /// upstream's URI, spelled as it is spelled here, leads back to it.
        #[test]
        fn every_spelling_leads_back(
            resources in prop::collection::vec(("[ab]", prop::collection::vec(uri(), 0..6)), 0..3),
            skills in prop::collection::vec(prop::collection::vec("[ab](/[ab]){0,2}", 0..4), 3),
            links in prop::collection::vec(uri(), 0..4),
        ) {
            let catalogs: Vec<(ServerName, Arc<Catalog>)> = resources
                .iter()
                .zip(&skills)
                .enumerate()
                .map(|(i, ((name, uris), skills))| {
                    let record = json!({
                        "discover": { "capabilities": { "resources": {} } },
                        "tools": [], "prompts": [], "templates": [],
                        "resources": uris.iter().map(|uri| json!({ "uri": uri })).collect::<Vec<_>>(),
                        "skills": skills
                            .iter()
                            .map(|path| json!({ "uri": format!("skill://{path}/SKILL.md") }))
                            .collect::<Vec<_>>(),
                    });
                    let record = serde_json::from_str(&record.to_string()).unwrap();
                    (format!("{name}{i}").parse().unwrap(), Arc::new(Catalog::from_record(&record)))
                })
                .collect();
            let Merged { mut uris, resources, templates: _, skills } = Uris::merge(&catalogs);
            let mut names = HashSet::new();
            for item in resources.iter().chain(&skills) {
                let route = uris.find(&item.exposed).expect("what is listed is found");
                prop_assert_eq!((&route.server, &route.own), (&item.server, &item.own), "{}", item.exposed);
                let spelled = uris.spell(&item.server, &item.own).unwrap_or_else(|| item.own.to_string());
                let route = uris.find(&spelled).expect("what is spelled here is found");
                prop_assert_eq!((&route.server, &route.own), (&item.server, &item.own), "{}", spelled);
            }
            for item in &resources {
                prop_assert!(names.insert(item.exposed.clone()), "{}", item.exposed);
            }
            for (server, _) in &catalogs {
                for link in &links {
                    let exposed = uris.link(server, link).unwrap_or_else(|| link.clone());
                    let route = uris.find(&exposed).expect("a link leads somewhere");
                    prop_assert_eq!((&route.server, &*route.own), (server, &**link), "{}", exposed);
                }
            }
        }

        #[test]
        fn finding_never_panics(uri in any::<String>()) {
            let _ = Uris::default().find(&uri);
        }
    }
}
