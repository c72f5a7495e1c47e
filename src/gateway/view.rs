//! All catalogs as one: what is listed under which name, and whose it is. Immutable; a change makes a new one.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use bytes::Bytes;
use globset::{Glob, GlobSet, GlobSetBuilder};
use serde_json::{Map, Value, json};

use super::{Catalog, Upstream};
use crate::{
    BoxMcpService,
    layers::Route,
    protocol::{
        Item, ItemKind, ItemList, Naming, ParamHeaders, ProtocolVersion, RawObject, ServerName, Target, meta,
    },
};

/// The merged catalogs.
pub(super) struct View {
    upstreams: HashMap<ServerName, BoxMcpService>,
    lists: [ItemList; 4],
    by_name: [HashMap<Arc<str>, usize>; 4],
    templates: Templates,
    discover: Bytes,
    capabilities: Value,
}

impl Default for View {
    fn default() -> Self {
        let lists = ItemKind::ALL.map(|kind| ItemList::new(kind, Vec::new()));
        View {
            upstreams: HashMap::new(),
            lists,
            by_name: Default::default(),
            templates: Templates::default(),
            discover: Bytes::from_static(b"{}"),
            capabilities: json!({}),
        }
    }
}

impl View {
    /// Merges the catalogs, which come in priority order. A list that comes out as in `before` is the same list
    /// in memory, so what was derived from it stays good.
    pub(super) fn merge(naming: &Naming, upstreams: &[Arc<Upstream>], before: &View) -> View {
        let catalogs: Vec<(ServerName, Arc<Catalog>)> =
            upstreams.iter().map(|u| (u.name.clone(), u.catalog.load_full())).collect();
        let lists = ItemKind::ALL.map(|kind| {
            let items = match kind {
                ItemKind::Tools | ItemKind::Prompts => by_name(naming, kind, &catalogs),
                ItemKind::Resources | ItemKind::Templates => by_uri(kind, &catalogs),
            };
            let list = ItemList::new(kind, items);
            let old = before.list(kind);
            if is_unchanged(old, &list) { old.clone() } else { list }
        });
        let capabilities = merge_capabilities(&catalogs);
        View {
            upstreams: upstreams.iter().map(|u| (u.name.clone(), u.heard.clone())).collect(),
            by_name: [0, 1, 2, 3].map(|i: usize| index(&lists[i])),
            templates: Templates::new(&lists[ItemKind::Templates as usize]),
            discover: discover(&capabilities, &catalogs).to_string().into(),
            capabilities,
            lists,
        }
    }

    /// The list of one kind.
    pub(super) fn list(&self, kind: ItemKind) -> &ItemList {
        &self.lists[kind as usize]
    }

    /// The `server/discover` result.
    pub(super) fn discover(&self) -> &Bytes {
        &self.discover
    }

    /// Whether some upstream declares the capability.
    pub(super) fn offers(&self, capability: &str) -> bool {
        self.capabilities.get(capability).is_some()
    }

    /// An upstream's service.
    pub(super) fn upstream(&self, name: &ServerName) -> Option<BoxMcpService> {
        self.upstreams.get(name).cloned()
    }

    /// All upstreams' services.
    pub(super) fn upstreams(&self) -> impl Iterator<Item = BoxMcpService> {
        self.upstreams.values().cloned()
    }

    /// The upstream, when there is exactly one.
    pub(super) fn only_upstream(&self) -> Option<BoxMcpService> {
        let mut all = self.upstreams.values();
        all.next().filter(|_| all.len() == 0).cloned()
    }

    /// What a target stands for.
    pub(super) fn find(&self, target: &Target) -> Option<Route> {
        let listed = |kind: ItemKind| {
            let i = *self.by_name[kind as usize].get(target.name())?;
            let item = &self.list(kind).items()[i];
            Some(Route {
                server: item.server.clone(),
                own: item.own.clone(),
                template: None,
                definition: Some(item.raw.clone()),
            })
        };
        match target {
            Target::Tool(_) => listed(ItemKind::Tools),
            Target::Prompt(_) => listed(ItemKind::Prompts),
            Target::Template(uri) => listed(ItemKind::Templates)
                .or_else(|| listed(ItemKind::Resources))
                .or_else(|| self.unlisted(uri)),
            Target::Resource(uri) => listed(ItemKind::Resources).or_else(|| self.unlisted(uri)),
            _ => None,
        }
    }

    /// A URI nobody lists: it may be spelled for one server, fit a template, or be of the family of what one
    /// upstream alone lists. Servers hand out such URIs in their results.
    fn unlisted(&self, uri: &str) -> Option<Route> {
        // Rules are about names as they are written, and `/a/../b` is another way to write `/b`.
        if uri.split(['/', '?', '#']).any(|segment| matches!(segment, "." | "..")) {
            return None;
        }
        let unlisted = |server: &ServerName, own: &str| Route {
            server: server.clone(),
            own: own.into(),
            template: None,
            definition: None,
        };
        if let Some(i) = self.templates.fitting(uri) {
            let template = &self.list(ItemKind::Templates).items()[i];
            return Some(Route { template: Some(template.own.clone()), ..unlisted(&template.server, uri) });
        }
        if let Some((server, own)) = self.spelled_for(uri) {
            let template = self.templates.fitting_of(self.list(ItemKind::Templates), server, own);
            return Some(Route { template, ..unlisted(server, own) });
        }
        let family = family(uri)?;
        let listed =
            [ItemKind::Resources, ItemKind::Templates].into_iter().flat_map(|kind| self.list(kind).items());
        let mut owners: Vec<&ServerName> =
            listed.filter(|item| self::family(&item.own) == Some(family)).map(|item| &item.server).collect();
        owners.sort();
        owners.dedup();
        match owners[..] {
            [owner] => Some(unlisted(owner, uri)),
            _ => None,
        }
    }

    /// `files+demo://x` is `demo://x` of the upstream `files`: see [`by_uri`].
    fn spelled_for<'a>(&self, uri: &'a str) -> Option<(&ServerName, &'a str)> {
        let (server, own) = uri.split_once('+')?;
        let server: ServerName = server.parse().ok()?;
        let (server, _) = self.upstreams.get_key_value(&server)?;
        Some((server, own))
    }
}

/// Tools and prompts, under names made by the naming rule.
fn by_name(naming: &Naming, kind: ItemKind, catalogs: &[(ServerName, Arc<Catalog>)]) -> Vec<Item> {
    let mut names = Vec::new();
    let mut definitions = Vec::new();
    for (server, definition, own) in definitions_of(kind, catalogs) {
        names.push((server, own));
        definitions.push(definition);
    }
    let exposed = naming.expose(&names);
    let items = names.into_iter().zip(definitions).zip(exposed);
    items.map(|(((server, own), definition), exposed)| item(kind, server, own, exposed, definition)).collect()
}

/// Resources and templates, under their own URIs: clients compare them with those in results. Where two upstreams
/// have the same, the first in order keeps it and the other gets its server's name in front, `files+demo://x`.
fn by_uri(kind: ItemKind, catalogs: &[(ServerName, Arc<Catalog>)]) -> Vec<Item> {
    let mut taken: HashSet<Arc<str>> = HashSet::new();
    let mut items = Vec::new();
    for (server, definition, own) in definitions_of(kind, catalogs) {
        let exposed: Arc<str> = match taken.contains(&own) {
            false => own.clone(),
            true => format!("{server}+{own}").into(),
        };
        if taken.insert(exposed.clone()) {
            items.push(item(kind, server, own, exposed, definition));
        }
    }
    items
}

/// Every definition that has a name, each name once for each server.
fn definitions_of<'a>(
    kind: ItemKind,
    catalogs: &'a [(ServerName, Arc<Catalog>)],
) -> impl Iterator<Item = (ServerName, RawObject, Arc<str>)> + 'a {
    catalogs.iter().flat_map(move |(server, catalog)| {
        let mut seen: HashSet<Arc<str>> = HashSet::new();
        catalog.items(kind).iter().filter_map(move |raw| {
            let definition = RawObject::parse(raw.clone()).ok();
            let own: Option<Arc<str>> =
                definition.as_ref().and_then(|d| Some(d.get_string(kind.name_member())?.into()));
            let Some((definition, own)) = definition.zip(own).filter(|(_, own)| !own.is_empty()) else {
                tracing::warn!(%server, list = kind.member(), "left out an item without a name");
                return None;
            };
            if let (ItemKind::Tools, Err(why)) = (kind, ParamHeaders::of_definition(raw)) {
                tracing::warn!(%server, tool = %own, why, "left out a tool");
                return None;
            }
            seen.insert(own.clone()).then_some((server.clone(), definition, own))
        })
    })
}

fn item(
    kind: ItemKind,
    server: ServerName,
    own: Arc<str>,
    exposed: Arc<str>,
    mut definition: RawObject,
) -> Item {
    if exposed != own {
        definition.set(kind.name_member(), json!(*exposed).to_string());
    }
    Item { exposed, server, own, raw: definition.into_bytes() }
}

fn is_unchanged(old: &ItemList, new: &ItemList) -> bool {
    old.len() == new.len()
        && old
            .items()
            .iter()
            .zip(new.items())
            .all(|(a, b)| a.raw == b.raw && a.server == b.server && a.own == b.own)
}

fn index(list: &ItemList) -> HashMap<Arc<str>, usize> {
    list.items().iter().enumerate().map(|(i, item)| (item.exposed.clone(), i)).collect()
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
struct Templates {
    globs: GlobSet,
    /// For each glob, the template's place in the list and how much of it is literal.
    places: Vec<(usize, usize)>,
}

impl Templates {
    fn new(list: &ItemList) -> Self {
        let mut set = GlobSetBuilder::new();
        let mut places = Vec::new();
        for (i, item) in list.items().iter().enumerate() {
            let (glob, literal) = as_glob(&item.own);
            if let Ok(glob) = Glob::new(&glob) {
                set.add(glob);
                places.push((i, literal));
            }
        }
        Templates { globs: set.build().unwrap_or_default(), places }
    }

    /// The template of one server that fits.
    fn fitting_of(&self, list: &ItemList, server: &ServerName, uri: &str) -> Option<Arc<str>> {
        let fitting = self.globs.matches(uri).into_iter().map(|g| &list.items()[self.places[g].0]);
        fitting.into_iter().find(|item| item.server == *server).map(|item| item.own.clone())
    }

    /// The most literal template that fits; the first of equals.
    fn fitting(&self, uri: &str) -> Option<usize> {
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

/// What at least one upstream can do. Lists of tools are always offered, and always announce their changes: the
/// gateway does that itself, and an upstream may be added at any time.
fn merge_capabilities(catalogs: &[(ServerName, Arc<Catalog>)]) -> Value {
    let mut merged = json!({ "tools": {} });
    for (_, catalog) in catalogs {
        let Some(Ok(mut theirs)) =
            catalog.capabilities().map(|c| serde_json::from_slice::<Value>(c.as_bytes()))
        else {
            continue;
        };
        // The experimental tasks of 2025-11-25 exist in that revision only.
        if let Some(map) = theirs.as_object_mut() {
            map.remove("tasks");
        }
        unite(&mut merged, theirs);
    }
    for key in ["tools", "prompts", "resources"] {
        if let Some(capability) = merged.get_mut(key).and_then(Value::as_object_mut) {
            capability.insert("listChanged".to_owned(), json!(true));
        }
    }
    merged
}

/// Objects are united member by member, and `true` beats `false`; for the rest, the first counts.
fn unite(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                match into.get_mut(&key) {
                    Some(there) => unite(there, value),
                    None if value.is_null() => {}
                    None => drop(into.insert(key, value)),
                }
            }
        }
        (into @ Value::Bool(false), Value::Bool(true)) => *into = Value::Bool(true),
        _ => {}
    }
}

fn discover(capabilities: &Value, catalogs: &[(ServerName, Arc<Catalog>)]) -> Value {
    let versions =
        ProtocolVersion::ALL.iter().filter(|v| **v > ProtocolVersion::V2024_11_05).map(|v| v.as_str());
    let info = json!({ "name": "portcullis", "version": env!("CARGO_PKG_VERSION") });
    let mut result = Map::new();
    result.insert("resultType".into(), json!("complete"));
    result.insert("supportedVersions".into(), versions.collect());
    result.insert("capabilities".into(), capabilities.clone());
    if let Some(instructions) = instructions(catalogs) {
        result.insert("instructions".into(), instructions.into());
    }
    result.insert("ttlMs".into(), json!(0));
    result.insert("cacheScope".into(), json!("private"));
    result.insert("_meta".into(), json!({ meta::SERVER_INFO: info }));
    Value::Object(result)
}

/// Each upstream's instructions under its name. One upstream's stand as they are.
fn instructions(catalogs: &[(ServerName, Arc<Catalog>)]) -> Option<String> {
    let said: Vec<(&ServerName, String)> = catalogs
        .iter()
        .filter_map(|(server, catalog)| {
            let text = catalog.discover.as_ref()?.get_string("instructions")?.trim().to_owned();
            (!text.is_empty()).then_some((server, text))
        })
        .collect();
    match (&said[..], catalogs.len()) {
        ([], _) => None,
        ([(_, text)], 1) => Some(text.clone()),
        _ => Some(
            said.iter()
                .map(|(server, text)| format!("## {server}\n\n{text}"))
                .collect::<Vec<_>>()
                .join("\n\n"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn catalog(discover: Value, tools: &[&str], resources: &[&str], templates: &[&str]) -> Arc<Catalog> {
        let record = json!({
            "discover": discover,
            "tools": tools.iter().map(|n| json!({ "name": n, "x": 1 })).collect::<Vec<_>>(),
            "prompts": [],
            "resources": resources.iter().map(|n| json!({ "uri": n })).collect::<Vec<_>>(),
            "templates": templates.iter().map(|n| json!({ "uriTemplate": n })).collect::<Vec<_>>(),
        });
        Arc::new(Catalog::from_record(&serde_json::from_str(&record.to_string()).unwrap()))
    }

    fn view(catalogs: &[(&str, Arc<Catalog>)]) -> View {
        let upstreams: Vec<Arc<Upstream>> =
            catalogs.iter().map(|(name, c)| Upstream::for_test(name, c.clone())).collect();
        View::merge(&Naming::default(), &upstreams, &View::default())
    }

    #[test]
    fn names_lead_back_to_where_they_came_from() {
        let view = view(&[
            ("a", catalog(json!({}), &["read", "b_c"], &[], &[])),
            ("b", catalog(json!({}), &["read"], &[], &[])),
        ]);
        let route = view.find(&Target::Tool("b_read".into())).unwrap();
        assert_eq!((route.server.as_str(), &*route.own), ("b", "read"));
        assert_eq!(&route.definition.unwrap()[..], br#"{"name":"b_read","x":1}"#);
        assert!(view.find(&Target::Tool("read".into())).is_none());
    }

    #[test]
    fn the_same_uri_of_two_upstreams_is_two_uris() {
        let view = view(&[
            ("a", catalog(json!({}), &[], &["demo://x"], &["demo://t/{id}"])),
            ("b", catalog(json!({}), &[], &["demo://x"], &["demo://t/{id}"])),
        ]);
        let find = |uri: &str| {
            view.find(&Target::Resource(uri.into())).map(|r| (r.server.to_string(), r.own.to_string()))
        };
        assert_eq!(find("demo://x"), Some(("a".into(), "demo://x".into())));
        assert_eq!(find("b+demo://x"), Some(("b".into(), "demo://x".into())));
        assert_eq!(find("b+demo://t/7"), Some(("b".into(), "demo://t/7".into())));
        assert_eq!(find("demo://t/7").unwrap().0, "a");
        assert_eq!(find("other://x"), None);
    }

    #[test]
    fn the_most_literal_template_wins() {
        let view = view(&[
            ("a", catalog(json!({}), &[], &[], &["file:///{+path}"])),
            ("b", catalog(json!({}), &[], &[], &["file:///logs/{day}.txt"])),
        ]);
        let server = |uri: &str| view.find(&Target::Resource(uri.into())).unwrap().server.to_string();
        assert_eq!(server("file:///logs/monday.txt"), "b");
        assert_eq!(server("file:///etc/x"), "a");
    }

    #[test]
    fn a_uri_of_a_known_family_goes_to_its_only_owner() {
        let view = view(&[("a", catalog(json!({}), &[], &["demo://host/1"], &[]))]);
        assert!(view.find(&Target::Resource("demo://host/session/9".into())).is_some());
        assert!(view.find(&Target::Resource("demo://elsewhere/9".into())).is_none());
    }

    #[test]
    fn capabilities_are_what_any_upstream_can_do() {
        let a =
            json!({ "capabilities": { "resources": { "subscribe": false }, "extensions": { "x/y": {} } } });
        let b = json!({ "capabilities": { "resources": { "subscribe": true }, "logging": {}, "tasks": {} } });
        let merged = view(&[("a", catalog(a, &[], &[], &[])), ("b", catalog(b, &[], &[], &[]))]).capabilities;
        assert_eq!(
            merged,
            json!({
                "tools": { "listChanged": true },
                "resources": { "subscribe": true, "listChanged": true },
                "logging": {},
                "extensions": { "x/y": {} },
            })
        );
    }

    #[test]
    fn an_unchanged_list_is_the_same_list() {
        let upstreams = [Upstream::for_test("a", catalog(json!({}), &["read"], &[], &[]))];
        let before = View::merge(&Naming::default(), &upstreams, &View::default());
        let after = View::merge(&Naming::default(), &upstreams, &before);
        assert!(after.list(ItemKind::Tools).is_same(before.list(ItemKind::Tools)));
    }
}
