//! All catalogs as one: what is listed under which name, and whose it is. Immutable; a change makes a new one.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use memchr::memmem;
use serde_json::json;

use super::{
    Catalog, Upstream,
    capabilities::{Offer, TaskKind},
    uris::{Merged, Uris, respell_member},
};
use crate::{
    BoxMcpService,
    layers::Route,
    protocol::{
        Era, Item, ItemKind, ItemList, Naming, ParamHeaders, ProtocolVersion, RawObject, ServerName, Target,
    },
};

/// Unknown methods whose upstream is remembered. Clients make them up.
const MOST_ANSWERERS: usize = 256;

/// The merged catalogs.
pub(super) struct View {
    /// In priority order.
    members: Vec<Member>,
    by_server: HashMap<ServerName, usize>,
    lists: [ItemList; ItemKind::ALL.len()],
    by_name: [HashMap<Arc<str>, usize>; 2],
    uris: Uris,
    offer: Offer,
    /// Who answered a method that only upstreams know. It holds as long as the upstreams are these.
    answerers: Mutex<HashMap<Arc<str>, ServerName>>,
}

/// One upstream, as far as routing is concerned.
#[derive(Clone)]
pub(super) struct Member {
    pub(super) name: ServerName,
    pub(super) service: BoxMcpService,
    /// `None` when nobody knows yet.
    pub(super) era: Option<Era>,
    pub(super) tasks: Option<TaskKind>,
}

impl Default for View {
    fn default() -> Self {
        View {
            members: Vec::new(),
            by_server: HashMap::new(),
            lists: ItemKind::ALL.map(|kind| ItemList::new(kind, Vec::new())),
            by_name: Default::default(),
            uris: Uris::default(),
            offer: Offer::default(),
            answerers: Mutex::default(),
        }
    }
}

impl View {
    /// Merges the catalogs, which come in priority order. A list that comes out as in `before` is the same list
    /// in memory, so what was derived from it stays good.
    pub(super) fn merge(naming: &Naming, upstreams: &[Arc<Upstream>], before: &View) -> View {
        let catalogs: Vec<(ServerName, Arc<Catalog>)> =
            upstreams.iter().map(|u| (u.name.clone(), u.catalog.load_full())).collect();
        let Merged { mut uris, resources, templates, skills } = Uris::merge(&catalogs);
        let mut tools = by_name(naming, ItemKind::Tools, &catalogs);
        tools.iter_mut().for_each(|tool| link(tool, &mut uris));
        let prompts = by_name(naming, ItemKind::Prompts, &catalogs);
        let mut items = [tools, prompts, resources, templates, skills].into_iter();
        let lists = ItemKind::ALL.map(|kind| {
            let list = ItemList::new(kind, items.next().unwrap_or_default());
            let old = before.list(kind);
            if is_unchanged(old, &list) { old.clone() } else { list }
        });
        let members = upstreams.iter().zip(&catalogs).map(|(upstream, (name, catalog))| Member {
            name: name.clone(),
            service: upstream.heard.clone(),
            era: catalog.version().map(ProtocolVersion::era),
            tasks: TaskKind::of_upstream(catalog),
        });
        View {
            members: members.collect(),
            by_server: catalogs.iter().enumerate().map(|(i, (name, _))| (name.clone(), i)).collect(),
            by_name: [0, 1].map(|i: usize| index(&lists[i])),
            uris,
            offer: Offer::new(&catalogs),
            lists,
            answerers: Mutex::default(),
        }
    }

    /// The list of one kind.
    pub(super) fn list(&self, kind: ItemKind) -> &ItemList {
        &self.lists[kind as usize]
    }

    /// The `server/discover` result for a client of this revision.
    pub(super) fn discover(&self, version: ProtocolVersion) -> &Bytes {
        self.offer.discover(version)
    }

    /// What a client of this revision is offered.
    pub(super) fn capabilities(&self, version: ProtocolVersion) -> &RawObject {
        self.offer.capabilities(version)
    }

    /// Whether some upstream has things of this kind.
    pub(super) fn offers(&self, kind: ItemKind) -> bool {
        kind.is_offered(self.capabilities(ProtocolVersion::LATEST))
    }

    /// An upstream.
    pub(super) fn member(&self, name: &ServerName) -> Option<&Member> {
        self.by_server.get(name).map(|i| &self.members[*i])
    }

    /// An upstream's service.
    pub(super) fn upstream(&self, name: &ServerName) -> Option<BoxMcpService> {
        self.member(name).map(|member| member.service.clone())
    }

    /// All upstreams, in priority order.
    pub(super) fn members(&self) -> &[Member] {
        &self.members
    }

    /// All upstreams' services, in the same order.
    pub(super) fn upstreams(&self) -> impl Iterator<Item = BoxMcpService> {
        self.members.iter().map(|member| member.service.clone())
    }

    /// What is known of URIs.
    pub(super) fn uris(&self) -> &Uris {
        &self.uris
    }

    /// Who answered this method before.
    pub(super) fn answerer(&self, method: &str) -> Option<ServerName> {
        self.answerers.lock().unwrap_or_else(PoisonError::into_inner).get(method).cloned()
    }

    /// Remembers who answers a method.
    pub(super) fn remember_answerer(&self, method: &str, server: &ServerName) {
        let mut answerers = self.answerers.lock().unwrap_or_else(PoisonError::into_inner);
        if answerers.len() < MOST_ANSWERERS || answerers.contains_key(method) {
            answerers.insert(method.into(), server.clone());
        }
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
            Target::Template(uri) => self.uris.find_template(uri),
            Target::Resource(uri) => self.uris.find(uri),
            _ => None,
        }
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

/// What a tool's definition points to (MCP Apps) is where the client finds it.
fn link(tool: &mut Item, uris: &mut Uris) {
    // Nearly no tool points anywhere; nothing is parsed to learn that.
    if memmem::find(&tool.raw, b"resourceUri").is_none() {
        return;
    }
    let server = tool.server.clone();
    let Ok(mut definition) = RawObject::parse(tool.raw.clone()) else { return };
    let Some(mut meta) = definition.get_object("_meta") else { return };
    let linked = std::cell::RefCell::new(uris);
    let spell = |uri: &str| linked.borrow_mut().link(&server, uri);
    // As it was before it had a room of its own; servers write both.
    let mut changed = respell_member(&mut meta, "ui/resourceUri", &spell);
    if let Some(mut ui) = meta.get_object("ui")
        && respell_member(&mut ui, "resourceUri", &spell)
    {
        meta.set("ui", ui.as_str());
        changed = true;
    }
    if changed {
        definition.set("_meta", meta.as_str());
        tool.raw = definition.into_bytes();
    }
}

/// Every definition that has a name, each name once for each server.
pub(super) fn definitions_of<'a>(
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

pub(super) fn item(
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

#[cfg(test)]
mod tests {
    use serde_json::Value;

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
        let view = view(&[("a", catalog(a, &[], &[], &[])), ("b", catalog(b, &[], &[], &[]))]);
        let merged: Value =
            serde_json::from_str(view.capabilities(ProtocolVersion::LATEST).as_str()).unwrap();
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
