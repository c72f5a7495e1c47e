//! What the gateway says of itself: what at least one upstream can do, and nothing a client of that era cannot use.
//!
//! Tasks are the difference. The experiment of 2025-11-25 exists in that revision only, and the extension in later ones;
//! they do not translate, so each is offered to clients of its own era, and counts only at upstreams of it. All other
//! extensions are methods and `_meta` that pass through in either era, and servers of both declare them; so they are
//! offered to all.

use std::sync::Arc;

use bytes::Bytes;
use serde_json::{Map, Value, json};

use super::Catalog;
use crate::protocol::{Era, ProtocolVersion, RawObject, ServerName, extension, meta};

/// The `server/discover` results.
#[derive(Clone, Debug, Default)]
pub(super) struct Offer {
    modern: Told,
    /// For 2025-11-25, which has tasks.
    experimental: Told,
    legacy: Told,
}

/// One of them.
#[derive(Clone, Debug)]
struct Told {
    capabilities: RawObject,
    discover: Bytes,
}

impl Default for Told {
    fn default() -> Self {
        Told { capabilities: RawObject::empty(), discover: Bytes::from_static(b"{}") }
    }
}

impl Offer {
    pub(super) fn new(catalogs: &[(ServerName, Arc<Catalog>)]) -> Self {
        let told = |to: ProtocolVersion| {
            let capabilities = merge_capabilities(catalogs, to);
            let discover = discover(&capabilities, catalogs).to_string().into();
            let capabilities = RawObject::parse(capabilities.to_string().into()).expect("this is an object");
            Told { capabilities, discover }
        };
        Offer {
            modern: told(ProtocolVersion::V2026_07_28),
            experimental: told(ProtocolVersion::V2025_11_25),
            legacy: told(ProtocolVersion::V2025_06_18),
        }
    }

    /// The result for a client of this revision.
    pub(super) fn discover(&self, version: ProtocolVersion) -> &Bytes {
        &self.to(version).discover
    }

    /// What such a client is offered.
    pub(super) fn capabilities(&self, version: ProtocolVersion) -> &RawObject {
        &self.to(version).capabilities
    }

    fn to(&self, version: ProtocolVersion) -> &Told {
        match version {
            ProtocolVersion::V2025_11_25 => &self.experimental,
            version if version.era() == Era::Modern => &self.modern,
            _ => &self.legacy,
        }
    }
}

/// Which kind of tasks an upstream has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum TaskKind {
    /// The extension.
    Extension,
    /// The experiment of 2025-11-25.
    Experiment,
}

impl TaskKind {
    /// What there is for a client of this revision.
    pub(super) fn of_version(version: ProtocolVersion) -> Option<TaskKind> {
        match version {
            ProtocolVersion::V2025_11_25 => Some(TaskKind::Experiment),
            version if version.era() == Era::Modern => Some(TaskKind::Extension),
            _ => None,
        }
    }

    /// What an upstream has, and lets one do.
    pub(super) fn of_upstream(catalog: &Catalog) -> Option<TaskKind> {
        let capabilities = catalog.capabilities()?;
        let kind = TaskKind::of_version(catalog.version()?)?;
        let declared = match kind {
            TaskKind::Extension => capabilities.get_object("extensions")?.get_object(extension::TASKS),
            TaskKind::Experiment => capabilities.get_object("tasks"),
        };
        declared.map(|_| kind)
    }
}

/// What at least one upstream can do. Lists of tools are always offered, and always announce their changes: the
/// gateway does that itself, and an upstream may be added at any time.
fn merge_capabilities(catalogs: &[(ServerName, Arc<Catalog>)], to: ProtocolVersion) -> Value {
    let mut merged = json!({ "tools": {} });
    for (_, catalog) in catalogs {
        let Some(Ok(mut theirs)) =
            catalog.capabilities().map(|c| serde_json::from_slice::<Value>(c.as_bytes()))
        else {
            continue;
        };
        let usable = TaskKind::of_upstream(catalog).filter(|kind| TaskKind::of_version(to) == Some(*kind));
        if let (Some(map), true) = (theirs.as_object_mut(), usable != Some(TaskKind::Experiment)) {
            map.remove("tasks");
        }
        if let Some(map) = theirs.get_mut("extensions").and_then(Value::as_object_mut)
            && usable != Some(TaskKind::Extension)
        {
            map.remove(extension::TASKS);
        }
        unite(&mut merged, theirs);
    }
    for key in ["tools", "prompts", "resources"] {
        if let Some(capability) = merged.get_mut(key).and_then(Value::as_object_mut) {
            capability.insert("listChanged".to_owned(), json!(true));
        }
    }
    if merged.get("extensions").and_then(Value::as_object).is_some_and(Map::is_empty)
        && let Some(merged) = merged.as_object_mut()
    {
        merged.remove("extensions");
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
