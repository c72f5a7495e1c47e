//! URIs in results: where an upstream's is spelled otherwise here, a link in its answers must lead there as well.
//!
//! Nothing is read unless something of that upstream is spelled otherwise, and that is rare.

use bytes::Bytes;
use memchr::memmem;
use serde_json::{json, value::RawValue};

use super::{
    uris::{change_items, respell_items, respell_member, respell_skill},
    view::View,
};
use crate::{
    layers::AccessRules,
    protocol::{Method, Payload, RawObject, RpcError, ServerName, Target, code},
};

/// Whose answer it is, and how its URIs are spelled.
pub(super) struct Links<'a> {
    pub(super) view: &'a View,
    pub(super) server: &'a ServerName,
}

impl Links<'_> {
    fn spell(&self, uri: &str) -> Option<String> {
        self.view.uris().spell(self.server, uri)
    }

    /// The answer to `method`, its URIs as clients find them here.
    pub(super) fn respell(&self, method: &Method, payload: Payload) -> Payload {
        if !self.view.uris().respells(self.server) {
            return payload;
        }
        if let Payload::Raw(json) = &payload
            && memmem::find(json, b"uri").is_none()
            && memmem::find(json, b"Uri").is_none()
        {
            return payload;
        }
        let Some(mut result) = payload.to_object() else { return payload };
        let changed = match method {
            Method::ToolsCall | Method::TasksResult => self.tool_result(&mut result),
            Method::TasksGet => self.within(&mut result, "result", |result| self.tool_result(result)),
            Method::PromptsGet => self.messages(&mut result),
            Method::ResourcesRead => self.items(&mut result, "contents"),
            Method::DirectoryRead => self.items(&mut result, "resources"),
            Method::SkillsGet => self.within(&mut result, "skill", |skill| {
                let before = skill.clone();
                respell_skill(skill, |uri| self.spell(uri));
                *skill != before
            }),
            _ => false,
        };
        if changed { Payload::Raw(result.into_bytes()) } else { payload }
    }

    fn tool_result(&self, result: &mut RawObject) -> bool {
        let meta = self.within(result, "_meta", |meta| {
            let flat = respell_member(meta, "ui/resourceUri", &|uri: &str| self.spell(uri));
            let spell = |uri: &str| self.spell(uri);
            self.within(meta, "ui", |ui| respell_member(ui, "resourceUri", &spell)) || flat
        });
        self.each(result, "content", |block| self.block(block)) || meta
    }

    fn messages(&self, result: &mut RawObject) -> bool {
        self.each(result, "messages", |message| {
            self.within(message, "content", |block| self.block(block))
                || self.each(message, "content", |block| self.block(block))
        })
    }

    /// A content block: a link, or a resource itself.
    fn block(&self, block: &mut RawObject) -> bool {
        let kind = block.get_string("type").map(std::borrow::Cow::into_owned);
        let spell = |uri: &str| self.spell(uri);
        match kind.as_deref() {
            Some("resource_link") => respell_member(block, "uri", &spell),
            Some("resource") => self.within(block, "resource", |inner| respell_member(inner, "uri", &spell)),
            _ => false,
        }
    }

    fn items(&self, result: &mut RawObject, member: &str) -> bool {
        let items = result.get_bytes(member).unwrap_or_default();
        let respelled = respell_items(&items, |uri| self.spell(uri));
        respelled.is_some_and(|items| {
            result.set(member, items);
            true
        })
    }

    fn within(
        &self,
        object: &mut RawObject,
        member: &str,
        change: impl FnOnce(&mut RawObject) -> bool,
    ) -> bool {
        let Some(mut inner) = object.get_object(member) else { return false };
        let changed = change(&mut inner);
        if changed {
            object.set(member, inner.as_str());
        }
        changed
    }

    fn each(&self, object: &mut RawObject, member: &str, change: impl Fn(&mut RawObject) -> bool) -> bool {
        let array = object.get_bytes(member).unwrap_or_default();
        let items = change_items(&array, change);
        if let Some(items) = &items {
            object.set(member, items);
        }
        items.is_some()
    }
}

/// What of a directory may be seen. It comes with the URIs that clients know.
pub(super) fn visible_entries(view: &View, rules: &AccessRules, payload: Payload) -> Payload {
    if matches!(payload, Payload::Error(_)) {
        return payload;
    }
    let unreadable = || Payload::Error(RpcError::new(code::BAD_UPSTREAM, "a directory that cannot be read"));
    let Some(mut result) = payload.to_object() else { return unreadable() };
    let entries = result.get_bytes("resources").unwrap_or_default();
    // What cannot be judged is not shown.
    let Ok(entries) = serde_json::from_slice::<Vec<&RawValue>>(&entries) else { return unreadable() };
    let shown = |entry: &&&RawValue| {
        let uri = RawObject::parse(Bytes::copy_from_slice(entry.get().as_bytes())).ok();
        let uri = uri.and_then(|entry| Some(entry.get_string("uri")?.into_owned()));
        // What has no name, or leads nowhere, cannot be judged.
        uri.is_some_and(|uri| {
            let route = view.find(&Target::Resource(uri.as_str().into()));
            route.is_some_and(|route| rules.allows_route(&route, &uri))
        })
    };
    let shown: Vec<&str> = entries.iter().filter(shown).map(|entry| entry.get()).collect();
    if shown.len() == entries.len() {
        return payload;
    }
    result.set("resources", format!("[{}]", shown.join(",")));
    Payload::Raw(result.into_bytes())
}

/// `contents[].uri` as the client asked for it; the rest of the result keeps its bytes.
pub(super) fn rename_contents(payload: Payload, own: &str, exposed: &str) -> Payload {
    let Some(mut result) = payload.to_object() else { return payload };
    let contents = result.get_bytes("contents").unwrap_or_default();
    match respell_items(&contents, |uri| (uri == own).then(|| exposed.to_owned())) {
        Some(contents) => {
            result.set("contents", contents);
            Payload::Raw(result.into_bytes())
        }
        None => payload,
    }
}

/// A JSON string.
pub(super) fn quoted(text: &str) -> String {
    json!(text).to_string()
}
